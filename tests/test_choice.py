# SPDX-License-Identifier: Apache-2.0
"""How a backend is chosen, and between its kernels and dense ones."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from strategies import backends_on
from test_ops import operands_of

import sparsebwd
from sparsebwd import backends
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, random_tensor


def test_order_of_backends():
    names = backends.registered_backends()
    assert names[:2] == ("reference", "dense")
    assert set(backends.available_backends()) <= set(names)
    problem = ConvProblem.parse("n2c3h5w5k4r3s3")
    for dtype, expected in (
        (torch.float64, "reference"),
        (torch.float16, "dense"),
        (torch.float32, backends_on("cpu")[-1]),
        (torch.bfloat16, backends_on("cpu")[-1]),
    ):
        assert backends.choose_backend("auto", problem, "cpu", dtype).name == expected
    assert backends.choose_backend("auto", problem, "mps", torch.float32).name == "dense"


def test_unknown_and_unable_backends():
    problem = ConvProblem.parse("n2c3h5w5k4r3s3")
    with pytest.raises(ValueError, match="backend: got 'abacus'; accepted: 'auto', 'reference'"):
        backends.choose_backend("abacus", problem, "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="'dense' cannot run n2c3.*float64.*not float32"):
        backends.choose_backend("dense", problem, "cpu", torch.float64)
    with pytest.raises(RuntimeError, match="'auto' cannot run pruning.*'dense': .*; 'reference': "):
        backends.choose_backend("auto", None, "cpu", torch.int32)


def test_backend_that_only_runs_by_name(register, caplog):
    class Asked(type(backends.get_backend("dense"))):
        name = "asked"
        only_by_name = "it is shy"

    register(Asked())
    assert backends.choose_backend("asked", None, "cpu", torch.float32).name == "asked"
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        assert backends.choose_backend("auto", None, "cpu", torch.float32).name != "asked"
    assert "'asked' refuses: it is shy" in caplog.text
    assert list(sparsebwd.info()["backends"]) == list(backends.registered_backends())
    assert sparsebwd.info()["backends"]["asked"] is None


def test_backend_that_is_not_available(register, caplog):
    class Absent(type(backends.get_backend("dense"))):
        name = "absent"

        def available(self):
            return "it is not here"

    register(Absent())
    assert "absent" in backends.registered_backends()
    assert "absent" not in backends.available_backends()
    with pytest.raises(RuntimeError, match="'absent': it is not here"):
        backends.choose_backend("absent", None, "cpu", torch.float32)
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        assert backends.choose_backend("auto", None, "cpu", torch.float32).name != "absent"
    assert "'absent' refuses: it is not here" in caplog.text
    with pytest.raises(ValueError, match="'absent' is registered already"):
        register(Absent())


LOGGING = """
import sys, torch, sparsebwd
sparsebwd.prune_gradient(torch.ones(1, 1, dtype=torch.float64))
assert "torch._dynamo" not in sys.modules, "torch.compile is loaded, which takes as long as the rest of PyTorch"
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["debug", "", "loud"])
def test_log_level_of_the_environment(level):
    process = subprocess.run(
        [sys.executable, "-c", LOGGING],
        env={**os.environ, "SPARSEBWD_LOG": level},
        capture_output=True,
        text=True,
    )
    if level == "loud":
        assert "SPARSEBWD_LOG: got 'loud'; accepted: debug" in process.stderr
    else:
        assert process.returncode == 0, process.stderr
        assert ("backend 'dense' refuses" in process.stderr) == (level == "debug")


def test_dense_convolutions_compute_in_the_layout_of_their_operands(memory_format):
    """Else PyTorch converts an operand, which can take longer than the convolution."""
    problem, input, weight, grad_output, _ = operands_of("n2c6h7w8k4r3s3p1", torch.float32, memory_format)
    dense = backends.get_backend("dense")
    for result in (
        dense.conv2d_input(problem, weight, grad_output),
        dense.conv2d_weight(problem, input, grad_output),
    ):
        assert result.is_contiguous(memory_format=memory_format)


needs_cpu_kernels = pytest.mark.skipif("cpu" not in backends.available_backends(), reason="no CPU kernels")


@needs_cpu_kernels
@pytest.mark.parametrize(
    "limits, expected", [((1, 1), "cpu"), ((1, 0.3), "cpu+dense"), ((0.3, 1), "cpu+dense"), ((0.3, 0.3), "dense")]
)
@pytest.mark.parametrize("percentile, placement", [(90.0, "output"), (90.0, "input"), (None, "output")])
def test_auto_takes_either_for_either_gradient(
    limits, expected, percentile, placement, memory_format, monkeypatch, stats
):
    monkeypatch.setattr(backends.cpu, "break_even", lambda problem, dtype, channels_last: limits)
    _, input, weight, grad_output, geometry = operands_of("n2c16h12w12k16r3s3p1", torch.float32, memory_format)
    results = []
    for backend in ("auto", "cpu"):
        config = (torch.tensor([1, 2]), Pruning(percentile=percentile, placement=placement, backend=backend).text, 0)
        results.append(
            torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config, (True, True, False))
        )
    assert [record.implementation for record in stats] == [expected, "cpu"]
    assert stats[0].density == stats[1].density and stats[0].sigma == stats[1].sigma
    for actual, wanted in zip(*results):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


@needs_cpu_kernels
@pytest.mark.parametrize("text", ["n1c16h4w4k16r3s3p1", "n2c64h16w16k64r3s3p1g64"])
def test_auto_leaves_to_pytorch_where_sparse_never_pays(text, stats):
    _, input, weight, grad_output, geometry = operands_of(text, torch.float32, torch.channels_last)
    config = (torch.tensor([1, 2]), Pruning(percentile=99.0).text, 0)
    torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config, (True, True, True))
    assert [record.implementation for record in stats] == ["dense"]


@needs_cpu_kernels
@pytest.mark.parametrize("shape", [(16, 32, 24, 24), (2, 3, 5, 7), (1, 1, 1, 1)])
def test_expected_density(shape, memory_format, dtype, generator):
    """Of a gradient whose images differ, within five standard deviations of a sample of 127 x 32."""
    key = torch.tensor([1, 2])
    grad = (
        random_tensor(shape, generator=generator, dtype=dtype) * torch.linspace(0.1, 2, shape[0])[:, None, None, None]
    )
    grad = grad.to(dtype).contiguous(memory_format=memory_format)
    before = grad.clone()
    values, _, _, density = torch.ops.sparsebwd.prune(grad, key, "backend=cpu")
    bound = 5 * 0.5 / min(grad.numel(), 127 * 32) ** 0.5
    assert backends.cpu._expected_density(grad, Pruning()) == pytest.approx(density.item(), abs=bound)
    assert backends.cpu._expected_density(values, Pruning(None)) == pytest.approx(density.item(), abs=bound)
    assert_bit_equal(grad, before)
