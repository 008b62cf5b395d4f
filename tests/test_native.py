# SPDX-License-Identifier: Apache-2.0
"""The raw operators torch.ops.sparsebwd_cpu.*, against the reference.

Tests marked "isa" run again for each instruction set (test_isa.py).
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cpu_kernels import instruction_sets
from native import KEYS, assert_surroundings_kept, gradient, rounded

from sparsebwd import reference
from sparsebwd.backends import available_backends
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, fenced, random_tensor

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

RAW = torch.ops.sparsebwd_cpu


# ---- prune

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 4, 1, 1),
    (5, 10, 1, 1),
    (2, 5, 1, 9),
    (1, 8, 2, 33),
    (2, 16, 4, 4),
    (1, 17, 3, 2),
    (1, 31, 2, 15),
    (1, 32, 1, 70),
    (3, 48, 7, 7),
    (2, 64, 8, 8),
    (1, 96, 3, 5),
    (1, 127, 2, 3),
    (2, 130, 2, 2),
    (1, 4, 97, 101),
    (1, 9, 130, 65),
    (2, 260, 4, 4),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
    (2, 4, 0, 3),
]
TAUS = [(shape, tau) for shape in SHAPES for tau in (0.0, 1.25, 3e38)]
# Below the range in which the vector kernels compute.
TAUS += [(shape, tau) for shape in [(2, 5, 1, 9), (2, 64, 8, 8)] for tau in (1e-30, 1e-39)]


@pytest.mark.isa
@pytest.mark.parametrize("shape, tau", TAUS, ids=str)
def test_prune(shape, tau, dtype, memory_format):
    seed = SHAPES.index(shape)
    grad = fenced(gradient(shape, dtype, memory_format, seed, special=True))
    if 0 < tau < 1e-20:
        grad = (grad.double() * tau).to(dtype)
    threshold = rounded(tau, dtype)
    key = torch.tensor(KEYS[seed % len(KEYS)])
    expected = reference.prune_at(grad, key, threshold)

    out = fenced(torch.full_like(grad, math.nan))
    nonzeros = RAW.prune(grad, key, threshold.item(), out)
    assert_bit_equal(out, expected)
    assert nonzeros == int(torch.count_nonzero(expected))
    assert_surroundings_kept(out)

    assert RAW.prune(grad, key, threshold.item(), grad) == nonzeros  # in place
    assert_bit_equal(grad, expected)


@pytest.mark.isa
def test_prune_does_not_depend_on_threads_or_layout(dtype):
    grad = gradient((3, 72, 45, 37), dtype, torch.contiguous_format, 1)
    key = torch.tensor(KEYS[2])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                out = torch.empty_like(grad, memory_format=layout)
                nonzeros = RAW.prune(grad.contiguous(memory_format=layout), key, 1.25, out)
                results.append((nonzeros, out))
    finally:
        torch.set_num_threads(threads)
    for nonzeros, out in results[1:]:
        assert nonzeros == results[0][0]
        assert_bit_equal(out, results[0][1])


# ---- abs_sum


def _defined_sum(values: np.ndarray) -> float:
    """The sum as csrc/cpu/prune*.h define it: 32 partial sums in each chunk, chunks in order."""
    total = 0.0
    for chunk in np.split(values, range(16384, len(values), 16384)):
        partial = np.zeros(32)
        for row in np.pad(chunk, (0, -len(chunk) % 32)).reshape(-1, 32):
            partial += row
        while len(partial) > 1:
            partial = partial[: len(partial) // 2] + partial[len(partial) // 2 :]
        total += partial[0]
    return total


@pytest.mark.isa
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000, 16384, 16385, 100_003])
def test_abs_sum_has_the_bits_of_its_definition(count, dtype):
    grad = fenced(gradient((count,), dtype, torch.contiguous_format, count))
    magnitudes = grad.double().abs().numpy()
    total, nonzeros = RAW.abs_sum(grad)
    assert total == _defined_sum(magnitudes)
    assert nonzeros == np.count_nonzero(magnitudes)
    assert abs(total - math.fsum(magnitudes)) <= 1e-12 * total


@pytest.mark.isa
def test_abs_sum_does_not_depend_on_threads(dtype):
    grad = gradient((4, 64, 33, 31), dtype, torch.channels_last, 3)
    threads = torch.get_num_threads()
    try:
        results = set()
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.add(RAW.abs_sum(grad))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_abs_sum_shows_what_is_not_finite(value, dtype):
    for position in (0, 40, 69):
        grad = torch.ones(70, dtype=dtype)
        grad[position] = value
        total, nonzeros = RAW.abs_sum(grad)
        assert math.isnan(total) if math.isnan(value) else total == math.inf
        assert nonzeros == 70


# ---- the density to expect


@pytest.mark.isa
@pytest.mark.parametrize("taus_per_mean", [0.0, 0.4, 1.6])
@pytest.mark.parametrize("count", [1, 1000, 127 * 32, 127 * 32 + 5, 100_003])
def test_expected_density_is_that_of_a_fixed_sample(count, taus_per_mean, dtype):
    grad = gradient((1, 1, 1, count), dtype, torch.contiguous_format, count)
    before = grad.clone()
    sampled = grad if count <= 127 * 32 else grad.as_strided((127, 32), (count // 127, 1))
    magnitudes = sampled.double().abs()
    tau = magnitudes.mean() * taus_per_mean
    expected = (magnitudes / tau).clamp(max=1) if taus_per_mean else magnitudes.ne(0).double()
    assert RAW.expected_density(grad, taus_per_mean) == pytest.approx(expected.nan_to_num(0.0).mean().item(), abs=1e-6)
    assert_bit_equal(grad, before)


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_expected_density_where_nothing_can_be_pruned(value, dtype):
    grad = torch.zeros(200, dtype=dtype)
    assert RAW.expected_density(grad, 1.0) == RAW.expected_density(grad[:0], 1.0) == 0.0
    grad[3] = value
    assert RAW.expected_density(grad, 1.0) == 1.0
    assert RAW.expected_density(grad, 0.0) == pytest.approx(1 / 200)


# ---- copy_layout


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("to", [torch.channels_last, torch.contiguous_format], ids=["nchw to nhwc", "nhwc to nchw"])
def test_copy_layout(shape, to):
    other = torch.contiguous_format if to is torch.channels_last else torch.channels_last
    source = random_tensor(shape, generator=torch.Generator().manual_seed(0), memory_format=other)
    out = fenced(torch.full(shape, float("nan")).contiguous(memory_format=to))
    RAW.copy_layout(fenced(source), out)
    assert_bit_equal(out, source)
    assert_surroundings_kept(out)


# ---- conv2d_backward


def _conv2d_backward(problem, grad_output, input=None, weight=None):
    """(grad_input if there is a weight, grad_weight if there is an input) by the raw operator."""
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = torch.empty(problem.input_size, memory_format=torch.channels_last).to(grad_output.dtype)
    if input is not None:
        grad_weight = torch.empty(problem.weight_size, dtype=input.dtype)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    RAW.conv2d_backward(
        grad_output, input, weight, problem.input_size, problem.weight_size, *geometry,
        None, 0.0, None, grad_input, grad_weight,
    )  # fmt: skip
    return grad_input, grad_weight


def _channels_last(size, seed, dtype=torch.float32, density=1.0):
    generator = torch.Generator().manual_seed(seed)
    return random_tensor(
        size, generator=generator, dtype=dtype, density=density, integer=True, memory_format=torch.channels_last
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["n2c35h5w6k20r3s3p1", "n2c70h4w4k33r1s1", "n2c12h5w5k10r3s2g2"])
def test_weights_of_any_strides(text, dtype):
    problem = ConvProblem.parse(text)
    grad_output = _channels_last(problem.output_size, 0, dtype, density=0.5)
    weight = _channels_last(problem.weight_size, 1, dtype)
    expected = reference.conv2d_input(problem, weight, grad_output).to(dtype)
    for same in (weight, weight.contiguous(), weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert_bit_equal(_conv2d_backward(problem, grad_output, weight=same)[0], expected)


@pytest.mark.isa
@pytest.mark.parametrize("c, w", [(1, 5459), (3, 1818), (2, 2728)])
def test_packed_panel_that_fills_all_its_bytes(c, w):
    """What gathering the last pixel stores behind the panel is not part of the sums."""
    problem = ConvProblem.parse(f"n1c{c}h6w{w}k4r3s3p1")
    grad_output = _channels_last(problem.output_size, 0, density=0.5)
    input = _channels_last(problem.input_size, 1)
    expected = reference.conv2d_weight(problem, input, grad_output).float()
    assert_bit_equal(_conv2d_backward(problem, grad_output, input=input)[1], expected)


def test_groups_of_images_that_depend_on_threads_do_not_change_results():
    """Lists are about as long here as where their order changes, and chunks are no multiple of tiles."""
    problem = ConvProblem.parse("n24c256h8w8k256r3s3p1")
    generator = torch.Generator().manual_seed(0)
    grad_output, input, weight = (
        random_tensor(size, generator=generator, density=density, memory_format=torch.channels_last)
        for size, density in ((problem.output_size, 0.1875), (problem.input_size, 1.0), (problem.weight_size, 1.0))
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_conv2d_backward(problem, grad_output, input, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert_bit_equal(one, two)


# ---- bad input

GOOD_KEY = torch.tensor([1, 2])
GOOD = torch.ones(2, 4, 3, 5)
GOOD_TAUS = torch.ones(2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RAW.abs_sum(GOOD.double()), "g: got a tensor of dtype Double, accepted"),
        (lambda: RAW.abs_sum(GOOD[..., ::2]), "g: got strides .* accepted are contiguous"),
        (lambda: RAW.abs_sum(GOOD.to("meta")), "g: got a tensor on another device"),
        (lambda: RAW.expected_density(GOOD[..., ::2], 1.0), "g: got strides .* accepted are contiguous"),
        (lambda: RAW.expected_density(GOOD, -1.0), "taus_per_mean: got -1, accepted are finite"),
        (lambda: RAW.copy_layout(GOOD.double(), GOOD), "src: got Double .* accepted is Float"),
        (lambda: RAW.copy_layout(GOOD, GOOD[0]), "out: got Float of shape .* of 4 dimensions"),
        (lambda: RAW.copy_layout(GOOD, GOOD[:1]), r"out: got shape \[1, 4, 3, 5\], accepted is that of src"),
        (lambda: RAW.copy_layout(GOOD, GOOD.clone()), "src, out: got strides .* one contiguous and one channels_last"),
        (lambda: RAW.prune(GOOD.half(), GOOD_KEY, 1.0, GOOD.half()), "g: got a tensor of dtype Half"),
        (lambda: RAW.prune(GOOD[0], GOOD_KEY, 1.0, GOOD[0]), "g: got 3 dimensions, accepted are 4"),
        (lambda: RAW.prune(GOOD[:, ::2], GOOD_KEY, 1.0, GOOD[:, ::2]), "g: got strides"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD[:1]), r"out: got Float of shape \[1, 4, 3, 5\]"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD.bfloat16()), "out: got BFloat16 of shape"),
        (
            lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD.to(memory_format=torch.channels_last)),
            "out: got Float .* accepted are those of g",
        ),
        (lambda: RAW.prune(GOOD, GOOD_KEY.int(), 1.0, GOOD), "key: got Int of shape"),
        (lambda: RAW.prune(GOOD, GOOD_KEY[:1], 1.0, GOOD), r"key: got Long of shape \[1\], accepted"),
        (lambda: RAW.prune(GOOD, GOOD_KEY.to("meta"), 1.0, GOOD), "key: got a tensor on another"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, -1.0, GOOD), "tau: got -1, accepted are finite"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD, GOOD_TAUS[:1]), r"taus: got Float of shape \[1\], .* shape \[2\]"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD, GOOD_TAUS.double()), "taus: got Double of shape"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD, GOOD_TAUS.to("meta")), "taus: got a tensor on another"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD, -GOOD_TAUS), "taus: got -1, accepted are finite"),
        (
            lambda: RAW.prune(GOOD.bfloat16(), GOOD_KEY, 1.0, GOOD.bfloat16(), GOOD_TAUS * 1.001953125),
            "taus: got .* g's dtype represents",
        ),
        (lambda: RAW.prune(GOOD, GOOD_KEY, math.nan, GOOD), "tau: got nan"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, math.inf, GOOD), "tau: got inf"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 0.1, GOOD), "tau: got 0.1, .* g's dtype represents"),
        (
            lambda: RAW.prune(GOOD.bfloat16(), GOOD_KEY, 1.001953125, GOOD.bfloat16()),
            "tau: got 1.00195",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_unknown_instruction_set():
    program = "import torch, sparsebwd._C; torch.ops.sparsebwd_cpu.isa()"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SPARSEBWD_MAX_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    *others, last = instruction_sets()
    message = f"SPARSEBWD_MAX_ISA: got 'avx1024', accepted are {', '.join(others)} and {last}"
    assert message in process.stderr
