# SPDX-License-Identifier: Apache-2.0
"""Sizes and settings at which what native kernels count in 16, 32 or 64 bits could overflow: refused, or computed right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparsebwd import grad, reference
from sparsebwd.backends import available_backends, choose_backend, get_backend
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, random_tensor

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

RAW = torch.ops.sparsebwd_cpu
SMALL = ConvProblem.parse("n2c3h4w5k4r2s2u1p0d1g1")
LARGEST = 2**63 - 1


def _geometry(problem):
    return problem.stride, problem.padding, problem.dilation, problem.groups


def _both(value, axis, other):
    return (value, other) if axis == 0 else (other, value)


def _far(axis, size, dilation=False):
    """A problem on small tensors whose window moves, or whose taps are apart, by ``size`` through padding as wide."""
    if dilation:
        half = (size + 1) // 2
        return replace(SMALL, dilation=_both(size, axis, 1), padding=_both(half, axis, 0))
    return replace(SMALL, stride=_both(size, axis, 1), padding=_both(size, axis, 0))


@pytest.mark.parametrize("dilation", [False, True], ids=["stride", "dilation"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [*(2**i + d for i in (8, 13, 15) for d in (-1, 0, 1))])
def test_windows_that_reach_far_are_right(size, axis, dilation):
    problem = _far(axis, size, dilation)
    generator = torch.Generator().manual_seed(0)
    input, weight, grad_output = (
        random_tensor(shape, generator=generator, integer=True)
        for shape in (problem.input_size, problem.weight_size, problem.output_size)
    )
    assert get_backend("cpu").can_run(problem, "cpu", torch.float32) is None
    actual = grad.conv2d_input(problem.input_size, weight, grad_output, *_geometry(problem), backend="cpu")
    assert_bit_equal(actual + 0, reference.conv2d_input(problem, weight, grad_output).float() + 0)
    actual = grad.conv2d_weight(input, problem.weight_size, grad_output, *_geometry(problem), backend="cpu")
    assert_bit_equal(actual + 0, reference.conv2d_weight(problem, input, grad_output).float() + 0)


def test_refused_problems_run_dense():
    """Of a row with its padding, bytes are counted in 32 bits: this one gave zeros."""
    size, geometry = (1, 64, 1, 4), ((1, 2**24), (0, 2**24))
    weight, grad_output = torch.ones(16, 64, 1, 1), torch.ones(1, 16, 1, 3)
    with pytest.raises(RuntimeError, match="'cpu': rows of the input, with their padding, are too long"):
        grad.conv2d_input(size, weight, grad_output, *geometry, backend="cpu")
    expected = torch.zeros(size)
    expected[..., 0] = 16
    assert torch.equal(grad.conv2d_input(size, weight, grad_output, *geometry), expected)


WIDE = 2**30
TOO_LARGE = [
    *(_far(axis, size, dilation) for axis in (0, 1) for size in (2**31, 2**32, 2**61) for dilation in (False, True)),
    *(_far(1, size, dilation) for size in (2**26, 2**30) for dilation in (False, True)),
    *(replace(SMALL, **{name: size}) for name in "nchwk" for size in (2**31, 2**32 + 4, LARGEST)),
    *(replace(SMALL, **{name: size, axis: size}) for name, axis in ("rh", "sw") for size in (2**31, LARGEST)),
    replace(SMALL, h=2**20, w=2**20, c=2**10),
    replace(SMALL, n=0, h=2**20, w=2**20, c=2**10),  # tensors without elements have such shapes
    replace(SMALL, padding=(2**29, 2**17)),
    replace(SMALL, k=65536),
    replace(SMALL, w=2**27),
    replace(SMALL, c=1, k=1, w=WIDE, s=WIDE, r=1),
]


@pytest.mark.parametrize("problem", TOO_LARGE, ids=str)
def test_what_could_overflow_is_refused(problem):
    backend = get_backend("cpu")
    reason = backend.can_run(problem, "cpu", torch.float32)
    assert reason and not reason.endswith(".")
    assert choose_backend("auto", problem, "cpu", torch.float32).name != "cpu"
    tensor = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="which no kernel takes: ") as raised:
        RAW.conv2d_backward(
            tensor, tensor, tensor, problem.input_size, problem.weight_size, *_geometry(problem),
            None, 0.0, None, tensor, tensor,
        )  # fmt: skip
    assert reason in str(raised.value)


@pytest.mark.parametrize("name", [*"nchwkrs", "stride", "padding", "dilation", "groups"])
def test_numbers_beyond_64_bits_are_refused_by_name(name):
    pair = name in ("stride", "padding", "dilation")
    with pytest.raises(ValueError, match=f"{name}: got .*; accepted: at most 2\\^63 - 1"):
        replace(SMALL, **{name: (1, 2**63) if pair else 2**63})


def test_operator_without_a_problem():
    with pytest.raises(ValueError, match="groups: got 3 for 4 input channels"):
        RAW.refusal((1, 4, 2, 2), (4, 4, 1, 1), (1, 1), (0, 0), (1, 1), 3)
    with pytest.raises(ValueError, match="accepted is a kernel not larger than the input"):
        RAW.refusal((1, 4, 2, 2), (4, 4, 3, 3), (1, 1), (0, 0), (1, 1), 1)
    assert RAW.refusal((1, 4, 2, 2), (4, 4, 1, 1), (1, 1), (0, 0), (1, 1), 1) == ""


def test_what_onednn_cannot_count_runs_on_the_reference():
    """It divides by zero there, which ends the process. All that this window sees is padding."""
    problem = ConvProblem.parse("n2c64h4w4k4r1s2u1073741824x2147483647p536870912x1073741823")
    assert choose_backend("auto", problem, "cpu", torch.float32).name == "reference"
    input, weight, grad_output = map(torch.ones, (problem.input_size, problem.weight_size, problem.output_size))
    assert not grad.conv2d_input(problem.input_size, weight, grad_output, *_geometry(problem)).any()
    assert not grad.conv2d_weight(input, problem.weight_size, grad_output, *_geometry(problem)).any()
