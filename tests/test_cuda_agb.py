# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of AGB, and the plain ones of both convolutions, under the emulator, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulation import Device, Emulator, nonzeros_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems
from test_parity import GRID

from sparsebwd import reference
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, random_tensor

pytestmark = pytest.mark.emulated

# What the sparse kernel runs: widths around its strips, images that share one, tiles of channels and words of k that
# are not full, one and several of each.
SPARSE = [
    "n1c4h5w4k1r3s3p1",
    "n5c64h3w7k33r3s3p1",
    "n2c65h9w8k32r3s3p1",
    "n3c130h4w14k70r3s3p1",
    "n1c48h6w16k31r3s3p1",
    "n4c8h2w28k5r3s3p1",
    "n2c20h17w33k3r3s3p1",
    "n3c1h1w1k2r3s3p1",
    "n5c66h7w7k40r3s3u2p1",
    "n2c64h4w4k128r3s3p1",  # warps share rows: two, and on large devices four
    "n9c64h4w4k290r3s3p1",
    "n2c8h9w7k64r3s3u2p1",
    "n2c4h8w16k65r3s3u2p1",
    "n3c30h13w14k9r3s3u2p1",
    "n2c12h1w33k64r3s3u2p1",
    "n2c64h7w7k34r1s1",
    "n1c5h3w33k70r1s1",
    "n3c65h4w8k20r1s1",
    "n2c300h3w5k33r1s1",
    "n4c64h7w8k33r1s1u2",
    "n2c7h6w33k12r1s1u2",
    "n3c70h5w14k40r1s1u2",
    "n2c300h4w4k33r1s1u2",
]
DEVICES = [
    Device(),
    Device(multiprocessors=1),  # each warp has several strips
    Device(multiprocessors=132),  # each warp has a row or none
    Device(multiprocessors=2, shared_per_multiprocessor=0),  # so that warps wait for each other at each row
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


def _operands(problem: ConvProblem, density: float, generator, dtype=torch.float32, channels_last=True, integer=False):
    """Gradient, weight and input; the weight in the layout that the others do not have, for variety."""
    formats = torch.contiguous_format, torch.channels_last
    options = {"generator": generator, "dtype": dtype, "integer": integer}
    of_weight = dict(options, memory_format=formats[not channels_last])
    options["memory_format"] = formats[channels_last]
    return (
        fenced(random_tensor(problem.output_size, density=density, **options)),
        fenced(random_tensor(problem.weight_size, **of_weight)),
        fenced(random_tensor(problem.input_size, **options)),
    )


def _check_integers(actual: torch.Tensor, expected: torch.Tensor, problem: ConvProblem) -> None:
    """Sums of small integers are exact in any order. Adding 0 makes a zero positive."""
    assert_bit_equal(actual + 0, expected.to(actual.dtype) + 0, str(problem))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01, 0.0])
@pytest.mark.parametrize("text", SPARSE)
def test_integers_are_exact(emulator, text, density, generator):
    problem = ConvProblem.parse(text)
    assert emulator.agb_refusal(problem, torch.float32) is None
    grad_output, weight, _ = _operands(problem, density, generator, integer=True)
    actual = emulator.agb(problem, grad_output, weight, nonzeros_of(grad_output))
    _check_integers(actual, reference.conv2d_input(problem, weight, grad_output), problem)


@st.composite
def sparse_problems(draw) -> ConvProblem:
    """Any small convolution that the sparse kernel runs, an empty batch included."""
    r = draw(st.sampled_from([1, 3]))
    n, h, w = draw(st.integers(0, 6)), draw(st.integers(1, 10)), draw(st.integers(1, 40))
    c, k = draw(st.integers(1, 130)), draw(st.integers(1, 70))
    return ConvProblem(n, c, h, w, k, r, r, stride=draw(st.integers(1, 2)), padding=r // 2)


@given(
    problem=sparse_problems(),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 2**31),
)
def test_integers_are_exact_for_any_geometry_and_device(problem, density, dtype, device, seed):
    grad_output, weight, _ = _operands(problem, density, _seeded(seed), dtype, integer=True)
    actual = Emulator(device=device).agb(problem, grad_output, weight, nonzeros_of(grad_output))
    _check_integers(actual, reference.conv2d_input(problem, weight, grad_output), problem)


@given(
    problem=problems(max_channels=12),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    with_nonzeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_integers_are_exact_whichever_kernel_runs(
    emulator, problem, density, dtype, channels_last, with_nonzeros, seed
):
    grad_output, weight, input = _operands(problem, density, _seeded(seed), dtype, channels_last, integer=True)
    nonzeros = nonzeros_of(grad_output) if with_nonzeros and channels_last else None
    actual = emulator.agb(problem, grad_output, weight, nonzeros, channels_last=channels_last)
    _check_integers(actual, reference.conv2d_input(problem, weight, grad_output), problem)
    actual = emulator.wgc(problem, grad_output, input, channels_last=channels_last)
    _check_integers(actual, reference.conv2d_weight(problem, input, grad_output), problem)


def _check_agb_error(emulator, problem, grad_output, weight, nonzeros, channels_last=True):
    actual = emulator.agb(problem, grad_output, weight, nonzeros, channels_last=channels_last)
    expected = reference.conv2d_input(problem, weight, grad_output)
    settings = (problem.stride, problem.padding, problem.dilation, problem.groups)
    dense = torch.nn.grad.conv2d_input(problem.input_size, weight, grad_output, *settings)
    assert_error_bounded(actual, expected, dense, f"AGB of {problem}")


@pytest.mark.parametrize("density", [1.0, 0.3, 0.02])
@pytest.mark.parametrize("text", SPARSE[:-4:3] + ["n1c16h3w3k512r3s3p1", "n2c16h16w16k512r1s1"])
def test_error_is_at_most_twice_that_of_dense(emulator, text, density, dtype, generator):
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = _operands(problem, density, generator, dtype)
    _check_agb_error(emulator, problem, grad_output, weight, nonzeros_of(grad_output))


@pytest.mark.parametrize("text", GRID)
def test_error_on_the_grid_of_all_backends(emulator, text, generator):
    """Each runs the kernel that is for it; the plain one has the accuracy of CPUs at least."""
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = _operands(problem, 0.35, generator)
    _check_agb_error(emulator, problem, grad_output, weight, nonzeros_of(grad_output))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("text", [GRID[1], GRID[3], *GRID[7:12], GRID[13], GRID[14]])
def test_error_of_the_plain_kernels(emulator, text, channels_last, dtype, generator):
    problem = ConvProblem.parse(text)
    grad_output, weight, input = _operands(problem, 0.3, generator, dtype, channels_last)
    _check_agb_error(emulator, problem, grad_output, weight, None, channels_last)
    actual = emulator.wgc(problem, grad_output, input, channels_last=channels_last)
    expected = reference.conv2d_weight(problem, input, grad_output)
    settings = (problem.stride, problem.padding, problem.dilation, problem.groups)
    dense = torch.nn.grad.conv2d_weight(input, problem.weight_size, grad_output, *settings)
    assert_error_bounded(actual, expected, dense, f"WGC of {problem}")


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("text", ["n2c16h8w8k512r1s1", "n1c16h3w3k512r3s3p1", "n1c64h9w14k64r3s3p1"])
def test_error_of_growing_sums(emulator, text, density, generator):
    """Sums of positive numbers: rounding errors grow with the length of a chain of additions."""
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = (operand.abs_() for operand in _operands(problem, density, generator))
    _check_agb_error(emulator, problem, grad_output, weight, nonzeros_of(grad_output))


@pytest.mark.parametrize("text", ["n4c64h9w9k33r3s3p1", "n4c20h9w9k33r3s3u2p1", "n4c70h9w9k33r1s1"])
def test_images_of_unlike_density(emulator, text, generator):
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = _operands(problem, 1.0, generator, integer=True)
    grad_output[:2] = 0
    grad_output[3, :, ::2] = 0
    actual = emulator.agb(problem, grad_output, weight, nonzeros_of(grad_output))
    _check_integers(actual, reference.conv2d_input(problem, weight, grad_output), problem)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["n2c70h9w17k64r3s3p1", "n3c9h8w8k33r3s3u2p1", "n2c65h6w7k33r1s1"])
def test_results_do_not_depend_on_the_order_of_threads(text, dtype, generator):
    problem = ConvProblem.parse(text)
    grad_output, weight, input = _operands(problem, 0.3, generator, dtype)
    results = []
    for seed in range(0, 4000, 1000):
        emulator = Emulator(seed=seed)
        results.append(
            (
                emulator.agb(problem, grad_output, weight, nonzeros_of(grad_output)),
                emulator.agb(problem, grad_output, weight),
                emulator.wgc(problem, grad_output, input),
            )
        )
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert_bit_equal(one, two, str(problem))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("text", ["n3c66h6w9k33r3s3p1", "n3c6h6w9k33r3s3u2p1", "n3c66h6w9k33r1s1"])
def test_what_is_not_finite_reaches_what_it_contributes_to_and_nothing_else(emulator, text, value, generator):
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = _operands(problem, 0.1, generator)
    p, q = problem.output_size[2:]
    for place in [(0, 0, 0, 0), (1, 32, p - 1, q - 1), (2, 7, p // 2, 0)]:
        grad_output[place] = value
    actual = emulator.agb(problem, grad_output, weight, nonzeros_of(grad_output))
    reached = reference.conv2d_input(problem, torch.ones_like(weight), (~grad_output.isfinite()).float()) > 0
    assert torch.equal(~actual.isfinite(), reached)
    assert 0 < reached.sum() < reached.numel()
    assert torch.equal(~emulator.agb(problem, grad_output, weight).isfinite(), reached)


@pytest.mark.parametrize("text", ["n2c6h6w9k8r3s3p1", "n2c66h6w9k8r1s1"])
def test_weights_of_zeros_are_not_read(emulator, text, generator):
    """A weight that is not finite does not meet a gradient of zero, in either kernel."""
    problem = ConvProblem.parse(text)
    grad_output, weight, _ = _operands(problem, 0.3, generator, integer=True)
    grad_output[:, 5] = 0
    expected = reference.conv2d_input(problem, weight, grad_output)
    weight[5] = torch.nan
    for nonzeros in (nonzeros_of(grad_output), None):
        _check_integers(emulator.agb(problem, grad_output, weight, nonzeros), expected, problem)


@pytest.mark.parametrize("text", ["n2c65h5w9k64r3s3p1", "n3c9h5w8k9r3s3u2p1", "n2c70h3w7k33r1s1", "n2c9h4w5k6r1s1u2"])
def test_memory_accesses(text, dtype, generator):
    """Each access is checked: within its operand, and no read of what was not written."""
    problem = ConvProblem.parse(text)
    grad_output, weight, input = _operands(problem, 0.3, generator, dtype, integer=True)
    emulator = Emulator("checked")
    expected = reference.conv2d_input(problem, weight, grad_output)
    for nonzeros in (nonzeros_of(grad_output), None):
        _check_integers(emulator.agb(problem, grad_output, weight, nonzeros), expected, problem)
    actual = emulator.wgc(problem, grad_output, input)
    _check_integers(actual, reference.conv2d_weight(problem, input, grad_output), problem)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_plain_kernel_runs_where_nonzeros_or_layout_are_missing(emulator, channels_last, generator):
    """It does not look at nonzeros: wrong ones do no harm."""
    problem = ConvProblem.parse("n2c8h6w6k8r3s3p1")
    grad_output, weight, _ = _operands(problem, 0.3, generator, channels_last=channels_last, integer=True)
    expected = reference.conv2d_input(problem, weight, grad_output)
    nonzeros = None if channels_last else torch.zeros_like(nonzeros_of(grad_output))
    actual = emulator.agb(problem, grad_output, weight, nonzeros, channels_last=channels_last)
    _check_integers(actual, expected, problem)


def test_the_sparse_kernel_goes_by_nonzeros(emulator, generator):
    """Without their bits, gradients do not count; else the tests above may have tested the plain kernel."""
    problem = ConvProblem.parse("n2c8h6w6k8r3s3p1")
    grad_output, weight, _ = _operands(problem, 0.5, generator, integer=True)
    actual = emulator.agb(problem, grad_output, weight, torch.zeros_like(nonzeros_of(grad_output)))
    assert not actual.any()


LAYER = ConvProblem(n=2, c=8, h=9, w=9, k=8, r=3, s=3, padding=(1, 1))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"groups": 2}, "groups"),
        ({"r": 5, "s": 5, "padding": (2, 2)}, "3x3 and 1x1"),
        ({"r": 1, "padding": (0, 1)}, "3x3 and 1x1"),
        ({"dilation": (2, 2)}, "dilation"),
        ({"stride": (3, 3)}, "strides"),
        ({"stride": (1, 2)}, "strides"),
        ({"padding": (0, 0)}, "padding"),
        ({"r": 1, "s": 1}, "padding"),
        ({"n": 2**25}, "2^31 pixels"),
        ({"k": 2**28}, "2^28 channels"),
    ],
)
def test_refusals_say_why(emulator, dtype, changes, words):
    assert emulator.agb_refusal(LAYER, dtype) is None
    assert words in emulator.agb_refusal(replace(LAYER, **changes), dtype)
