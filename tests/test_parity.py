# SPDX-License-Identifier: Apache-2.0
"""AGB and WGC of every backend that runs here, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import backends_on, problems

from sparsebwd import grad, reference
from sparsebwd.backends import get_backend
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import (
    assert_bit_equal,
    assert_error_bounded,
    fenced,
    poisoned_memory,
    random_tensor,
)

GRID = [
    "n2c16h8w8k32r3s3p1",
    "n2c40h9w7k33r3s3p1",  # no size is a multiple of a vector
    "n2c64h4w4k64r3s3p1",
    "n3c20h14w15k24r3s3u2p1",
    "n2c33h10w10k70r1s1",
    "n2c64h8w8k16r1s1",
    "n2c24h11w9k20r1s1u2",
    "n1c3h17w18k16r7s7u2p3",
    "n2c8h12w9k12r5s2u2x1p2x0",
    "n2c12h13w13k16r3s3p2d2",
    "n2c24h10w10k32r3s3p1g4",
    "n2c32h10w11k32r3s3p1g32",
    "n2c16h9w9k32r3s3u2p1g16",
    "n2c10h6w5k9r1s1p1",  # pixels that only see padding
    "n2c8h16w16k8r2s2u3",  # pixels that are not seen at all
    "n1c1h20w20k1r3s3p1",
    "n1c128h2w2k96r3s3p1",
    "n8c16h32w32k16r1s1",  # long sums in WGC
    "n4c16h28w28k16r3s3p1",
    "n1c512h3w3k16r3s3p1",
    "n1c16h3w3k512r3s3p1",  # long sums in AGB
    "n2c64h6w5k200r3s3p1",  # panels of weights as long as the density tells
    "n2c16h16w16k512r1s1",
]
FASTEST = backends_on("cpu")[-1]
SMALL_GRID = GRID[1:5] + GRID[8:11]


def _operands(problem: ConvProblem, density: float, dtype, memory_format, generator, integer=False, device="cpu"):
    settings = {
        "generator": generator,
        "dtype": dtype,
        "memory_format": memory_format,
        "integer": integer,
    }
    # The sparse kernels of CUDA take tensors that are aligned; CPUs are tested with others.
    fence = 67 if device == "cpu" else 64
    return (
        fenced(random_tensor(problem.input_size, **settings).to(device), fence),
        fenced(random_tensor(problem.weight_size, **settings).to(device), fence),
        fenced(random_tensor(problem.output_size, density=density, **settings).to(device), fence),
    )


def _backward(backend: str, problem: ConvProblem, input, weight, grad_output):
    """Both convolutions, through the public functions, on poisoned memory."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    with poisoned_memory():
        return (
            grad.conv2d_input(problem.input_size, weight, grad_output, *geometry, backend=backend),
            grad.conv2d_weight(input, problem.weight_size, grad_output, *geometry, backend=backend),
        )


def _layer_backward(backend: str, problem: ConvProblem, input, weight, grad_output):
    """Both convolutions in the one call that training makes, without pruning."""
    with poisoned_memory():
        return torch.ops.sparsebwd.conv2d_backward(
            grad_output,
            input,
            weight,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
            torch.zeros(2, dtype=torch.int64, device=grad_output.device),
            Pruning(None, backend=backend).text,
            0,
            (True, True, False),
        )[:2]


def _oracle(problem: ConvProblem, input, weight, grad_output):
    return (
        reference.conv2d_input(problem, weight, grad_output),
        reference.conv2d_weight(problem, input, grad_output),
    )


def _check_errors(backend, text, density, dtype, memory_format, generator, positive=False, device="cpu"):
    problem = ConvProblem.parse(text)
    operands = _operands(problem, density, dtype, memory_format, generator, device=device)
    if positive:
        operands = [operand.abs_() for operand in operands]
    expected = _oracle(problem, *operands)
    dense = _backward("dense", problem, *operands)
    for run in (_backward, _layer_backward):
        for name, *results in zip(("AGB", "WGC"), run(backend, problem, *operands), expected, dense):
            assert_error_bounded(*results, f"{name} of {problem}")


# A backend that skips no zeros computes the same whatever the density.
DENSITIES = [
    (backend, density)
    for backend in backends_on("cpu")
    for density in ([0.35] if backend in ("dense", "reference") else [1.0, 0.35, 0.03])
]


@pytest.mark.parametrize("backend, density", DENSITIES)
@pytest.mark.parametrize("text", GRID)
def test_error_is_at_most_twice_that_of_dense(backend, text, density, dtype, memory_format, generator):
    _check_errors(backend, text, density, dtype, memory_format, generator)


@pytest.mark.isa
@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize(
    "text", ["n2c16h16w16k512r1s1", "n8c16h32w32k16r1s1", "n1c512h3w3k16r3s3p1", "n2c64h14w14k64r3s3p1"]
)
def test_error_of_growing_sums(text, density, memory_format, generator):
    """Sums of positive numbers: rounding errors grow with the length of a chain of additions."""
    _check_errors(FASTEST, text, density, torch.float32, memory_format, generator, positive=True)


@pytest.mark.isa
@pytest.mark.parametrize("density", [1.0, 0.1])
@pytest.mark.parametrize("text", SMALL_GRID)
def test_error_on_each_instruction_set(text, density, dtype, memory_format, generator):
    _check_errors(FASTEST, text, density, dtype, memory_format, generator)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("text", SMALL_GRID)
def test_error_of_auto(text, density, dtype, memory_format, generator):
    """It may take one implementation for AGB and another for WGC, by the density."""
    _check_errors("auto", text, density, dtype, memory_format, generator)


def _check_bound_of_wgc(problem: ConvProblem, input, grad_output, panels: int) -> None:
    """docs/numerics.md, with ``panels`` at most. Each list has at most as many entries as there are pixels."""
    pixels = problem.n * problem.p * problem.q
    roundings = 32 + -(-pixels // 32) + panels + 8
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    actual = grad.conv2d_weight(input, problem.weight_size, grad_output, *geometry, backend="cpu")
    expected = reference.conv2d_weight(problem, input, grad_output)
    magnitudes = reference.conv2d_weight(problem, input.abs(), grad_output.abs())
    excess = (actual.double() - expected).abs() - 2.0**-24 * (roundings * magnitudes + expected.abs())
    assert excess.max() <= 0, f"{problem}: {excess.max()} above the bound"


needs_cpu = pytest.mark.skipif("cpu" not in backends_on("cpu"), reason="the cpu backend is not built")


@needs_cpu
@pytest.mark.isa
@pytest.mark.parametrize("text", ["n4c19h18w2k65r1s1u4x1p3x6d1x3g1", "n2c8h20w20k16r3s3p1", "n1c100h9w40k16r1s1"])
def test_bound_on_the_error_of_wgc(text, memory_format, generator):
    """Among others where most pixels see padding only: there dense kernels can be more exact by more than a factor of 2."""
    problem = ConvProblem.parse(text)
    for draw in range(8):
        input = random_tensor(problem.input_size, generator=generator, memory_format=memory_format)
        grad_output = random_tensor(problem.output_size, generator=generator, memory_format=memory_format)
        if draw % 2:
            input, grad_output = input.abs(), grad_output.abs()
        # A panel has at least a row of the gradient here.
        _check_bound_of_wgc(problem, input, grad_output, panels=problem.n * problem.p)


@needs_cpu
@pytest.mark.isa
@pytest.mark.parametrize("lost", [8, 16, 32])
def test_bound_on_the_error_of_wgc_at_worst(lost):
    """One large product, then small ones that are lost whenever not more than ``lost`` of them join it at a time."""
    problem = ConvProblem.parse("n1c4h32w40k16r1s1")
    input = torch.ones(problem.input_size)
    grad_output = torch.full(problem.output_size, 0.99 * 2.0**-24 / lost)
    grad_output[:, :, 0, 0] = 1
    _check_bound_of_wgc(problem, input, grad_output, panels=2)


CHOICES = {
    "problem": problems(),
    "density": st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0]),
    "memory_format": st.sampled_from([torch.contiguous_format, torch.channels_last]),
    "seed": st.integers(0, 2**32),
}


def _check_exactness(backend, problem, density, dtype, memory_format, seed, device="cpu"):
    """Operands are small integers, so that sums are exact in float32 in whatever order they are
    taken, and a result in bfloat16 is the exact sum rounded once."""
    generator = torch.Generator().manual_seed(seed)
    operands = _operands(problem, density, dtype, memory_format, generator, integer=True, device=device)
    expected = [tensor.to(dtype) for tensor in _oracle(problem, *operands)]
    for run in (_backward, _layer_backward):
        for name, actual, wanted in zip(("AGB", "WGC"), run(backend, problem, *operands), expected):
            # Adding 0 makes a zero positive: its sign is no part of the contract here.
            assert_bit_equal(actual + 0, wanted + 0, f"{name} of {problem}")


# How often dense PyTorch rounds in bfloat16 depends on the machine.
EXACT = [
    (backend, dtype)
    for backend, dtype in itertools.product(backends_on("cpu"), (torch.float32, torch.bfloat16))
    if (backend, dtype) != ("dense", torch.bfloat16)
]


@pytest.mark.parametrize("backend, dtype", EXACT)
@given(**CHOICES)
def test_integers_are_exact_for_any_geometry(backend, dtype, problem, density, memory_format, seed):
    assume(get_backend(backend).can_run(problem, "cpu", dtype) is None)
    _check_exactness(backend, problem, density, dtype, memory_format, seed)


@pytest.mark.isa
@given(**CHOICES)
def test_integers_are_exact_on_each_instruction_set(problem, density, memory_format, seed):
    _check_exactness(FASTEST, problem, density, torch.float32, memory_format, seed)


# PyTorch's own kernels promise this for a fixed number of threads only.
@pytest.mark.parametrize("backend", [name for name in backends_on("cpu") if name != "dense"])
def test_results_do_not_depend_on_the_number_of_threads(backend, dtype, memory_format, generator):
    threads = torch.get_num_threads()
    for text in SMALL_GRID:
        problem = ConvProblem.parse(text)
        operands = _operands(problem, 0.3, dtype, memory_format, generator)
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(_backward(backend, problem, *operands))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for one, two in zip(results[0], other):
                assert_bit_equal(one, two, str(problem))


@needs_cpu
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_zeros_of_the_gradient_skip_what_is_not_finite(value, memory_format, generator):
    """As docs/numerics.md says: a dense kernel has 0 * Inf there."""
    problem = ConvProblem.parse("n2c16h6w5k24r3s3p1")
    input, weight, grad_output = _operands(problem, 0.3, torch.float32, memory_format, generator, integer=True)
    grad_output[0] = 0
    grad_output[:, 5] = 0
    expected = [tensor.float() for tensor in _oracle(problem, input, weight, grad_output)]
    input[0, 3, 2, 2] = weight[5, 4, 1, 1] = value
    for actual, wanted in zip(_backward("cpu", problem, input, weight, grad_output), expected):
        assert_bit_equal(actual + 0, wanted + 0)
