# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of WGC (csrc/cuda/wgc.cu), run by the emulator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulation import Device, Emulator, nonzeros_of
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsebwd import reference
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, random_tensor

pytestmark = pytest.mark.emulated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
GRID = [
    "n2c64h8w8k64r3s3p1",
    "n2c40h9w7k40r3s3p1",  # no size is a multiple of a tile
    "n2c72h5w40k8r3s3p1",  # two strips; four channels of a lane
    "n2c136h7w17k56r3s3p1",  # narrow tiles again: of the wide ones half would be empty
    "n3c256h3w9k40r3s3p1",  # two wide tiles of c, two and a half of k
    "n5c16h4w4k32r3s3p1",  # a step spans images
    "n1c8h7w33k48r3s3p2",
    "n2c16h6w6k32r3s3",
    "n3c24h14w15k24r3s3u2p1",
    "n2c32h9w40k40r3s3u2x1p1",
    "n2c264h5w6k40r1s1",
    "n2c40h11w9k16r1s1u2",
    "n1c16h6w5k8r1s1p1",  # pixels that only see padding
    "n3c8h1w1k8r3s3p1",
]
SMALL_GRID = GRID[1:3] + GRID[4:6] + GRID[9:11]
DEVICES = [
    Device(1),
    Device(132),
    Device(3, 99 * 1024, 100 * 1024),  # less shared memory: shorter steps
]


def _operands(problem: ConvProblem, density: float, dtype, generator, integer=False):
    settings = {"generator": generator, "dtype": dtype, "memory_format": torch.channels_last, "integer": integer}
    return (
        random_tensor(problem.input_size, **settings),
        random_tensor(problem.output_size, density=density, **settings),
    )


def _wgc(emulator: Emulator, problem: ConvProblem, input, grad_output, memory_format=torch.channels_last):
    """By the sparse kernel: another one would not keep clear of the NaNs where `nonzeros` has no bit."""
    assert emulator.wgc_refusal(problem, input.dtype) is None
    holes = grad_output.clone().masked_fill_(grad_output == 0, torch.nan)
    return emulator.wgc(
        problem, holes, input, nonzeros_of(grad_output), channels_last=memory_format == torch.channels_last
    )


def _dense(problem: ConvProblem, input, grad_output):
    return torch.nn.grad.conv2d_weight(
        input, problem.weight_size, grad_output, problem.stride, problem.padding, problem.dilation, problem.groups
    )


def _check_error(emulator: Emulator, problem: ConvProblem, input, grad_output):
    actual = _wgc(emulator, problem, input, grad_output)
    expected = reference.conv2d_weight(problem, input, grad_output)
    assert_error_bounded(actual, expected, _dense(problem, input, grad_output), str(problem))


def _check_exact(emulator: Emulator, problem: ConvProblem, input, grad_output, **settings):
    """Operands are small integers, so that sums are exact."""
    actual = _wgc(emulator, problem, input, grad_output, **settings)
    expected = reference.conv2d_weight(problem, input, grad_output).to(input.dtype)
    assert_bit_equal(actual + 0, expected + 0, str(problem))  # a zero may have either sign


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    chunk = 16 // dtype.itemsize
    pointwise = draw(st.booleans())
    widths = st.sampled_from([1, 4, 7, 8, 14, 16, 28, 33, 40, 70])
    try:
        problem = ConvProblem(
            n=draw(st.integers(0, 5)),
            c=chunk * draw(st.integers(1, 132 // chunk)),
            h=draw(st.integers(1, 9)),
            w=draw(widths),
            k=chunk * draw(st.integers(1, 72 // chunk)),
            r=1 if pointwise else 3,
            s=1 if pointwise else 3,
            stride=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
            padding=(draw(st.integers(0, 2)), draw(st.integers(0, 2))),
            dilation=(1, 1),
            groups=1,
        )
    except ValueError:
        assume(False)
    return problem, dtype


@given(
    case=cases(),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]),
    memory_format=st.sampled_from(FORMATS),
    device=st.sampled_from(DEVICES),
    seed=st.integers(0, 2**32),
)
def test_integers_are_exact_for_any_geometry(case, density, memory_format, device, seed):
    problem, dtype = case
    operands = _operands(problem, density, dtype, torch.Generator().manual_seed(seed), integer=True)
    _check_exact(Emulator(seed=seed, device=device), problem, *operands, memory_format=memory_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SMALL_GRID)
def test_checked(text, dtype, generator):
    """No access out of place, of memory that nothing was written to, or that races with another."""
    problem = ConvProblem.parse(text)
    operands = _operands(problem, 0.2, dtype, generator, integer=True)
    _check_exact(Emulator("checked"), problem, *operands)


@pytest.mark.parametrize("text", ["n2c20h8w9k36r3s3p1", "n2c20h8w9k4r1s1"])
def test_groups_of_which_half_the_channels_exist(text, generator):
    problem = ConvProblem.parse(text)
    operands = _operands(problem, 1.0, torch.float32, generator, integer=True)
    _check_exact(Emulator("checked"), problem, *operands)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", GRID)
def test_error_is_at_most_twice_that_of_dense(text, dtype, density, generator):
    problem = ConvProblem.parse(text)
    _check_error(Emulator(), problem, *_operands(problem, density, dtype, generator))


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("text", ["n4c8h32w32k8r3s3p1", "n8c16h32w32k8r1s1"])
def test_error_of_growing_sums(text, density, generator):
    """Sums of positive numbers: rounding errors grow with the length of a chain of additions, which is longest where
    there are few multiprocessors."""
    problem = ConvProblem.parse(text)
    operands = [operand.abs_() for operand in _operands(problem, density, torch.float32, generator)]
    _check_error(Emulator(device=Device(1)), problem, *operands)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("text", ["n4c64h14w14k32r3s3p1", "n8c64h16w16k64r1s1"])
def test_error_where_one_channel_of_a_group_has_all_values(text, positive, generator):
    problem = ConvProblem.parse(text)
    input, grad_output = _operands(problem, 1.0, torch.float32, generator)
    if positive:
        input.abs_(), grad_output.abs_()
    grad_output[:, torch.arange(problem.k) % 8 != 0] = 0
    _check_error(Emulator(device=Device(1)), problem, input, grad_output)


@pytest.mark.parametrize("text", SMALL_GRID)
def test_one_image_has_all_values(text, generator):
    problem = ConvProblem.parse(text)
    for image in range(problem.n):
        input, grad_output = _operands(problem, 1.0, torch.float32, generator, integer=True)
        grad_output[torch.arange(problem.n) != image] = 0
        _check_exact(Emulator(device=Device(132)), problem, input, grad_output)


@pytest.mark.parametrize("text", SMALL_GRID)
def test_one_channel_has_all_values(text, generator):
    problem = ConvProblem.parse(text)
    for k in range(0, problem.k, 5):
        input, grad_output = _operands(problem, 1.0, torch.float32, generator, integer=True)
        grad_output[:, torch.arange(problem.k) != k] = 0
        _check_exact(Emulator(), problem, input, grad_output)


@pytest.mark.parametrize("text", ["n1c64h5w64k8r3s3u2p1", "n1c256h3w33k8r1s1"])
def test_rows_that_shared_memory_cannot_hold_are_cut(text, generator):
    """With 49 KiB for each of two blocks."""
    problem = ConvProblem.parse(text)
    operands = _operands(problem, 0.3, torch.float32, generator, integer=True)
    _check_exact(Emulator(device=Device(3, 99 * 1024, 100 * 1024)), problem, *operands)


@pytest.mark.parametrize("variant", ["fast", "checked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_ranges_are_added_in_parts(dtype, variant, generator):
    problem = ConvProblem.parse("n9c8h14w33k8r3s3p1")
    operands = _operands(problem, 0.3, dtype, generator, integer=True)
    _check_exact(Emulator(variant, device=Device(132)), problem, *operands)


def test_empty_batch_gives_zeros():
    problem = ConvProblem.parse("n0c8h6w6k8r3s3p1")
    input, grad_output = torch.empty(problem.input_size), torch.empty(problem.output_size)
    result = Emulator().wgc(problem, grad_output, input, nonzeros_of(grad_output))
    assert_bit_equal(result, torch.zeros(problem.weight_size))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", SMALL_GRID)
def test_results_do_not_depend_on_the_order_of_threads(text, device, generator):
    problem = ConvProblem.parse(text)
    operands = _operands(problem, 0.3, torch.float32, generator)
    first, *others = (_wgc(Emulator(seed=seed, device=device), problem, *operands) for seed in (0, 1, 99))
    for other in others:
        assert_bit_equal(other, first)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", SMALL_GRID)
def test_values_that_are_not_finite_are_passed_on(text, dtype, value, generator):
    problem = ConvProblem.parse(text)
    input, grad_output = _operands(problem, 0.3, dtype, generator)
    _, k, p, q = grad_output.shape
    places = [(0, 0, 0, 0), (problem.n - 1, k - 1, p - 1, q - 1), (0, k // 2, p // 2, q // 2)]
    finite = grad_output.clone()
    for place in places:
        grad_output[place], finite[place] = value, 1
    actual = Emulator().wgc(problem, grad_output, input, nonzeros_of(grad_output))
    expected = reference.conv2d_weight(problem, input, grad_output)
    special = ~expected.isfinite()
    assert special.any() and not special.all()
    assert torch.equal(actual[special].double().nan_to_num(7), expected[special].nan_to_num(7))
    # Nothing else is touched.
    assert_bit_equal(actual[~special], _wgc(Emulator(), problem, input, finite)[~special])


def test_not_finite_input_is_skipped_with_the_zeros_that_it_meets(generator):
    problem = ConvProblem.parse(GRID[0])
    input, grad_output = _operands(problem, 0.3, torch.float32, generator, integer=True)
    clean = input.clone()
    input[0, :, 4, 4], clean[0, :, 4, 4] = torch.nan, 0
    grad_output[0, :, 3:6, 3:6] = 0  # all that meet it
    assert_bit_equal(_wgc(Emulator(), problem, input, grad_output), _wgc(Emulator(), problem, clean, grad_output))


@pytest.mark.parametrize(
    "text, dtype, reason",
    [
        ("n2c8h9w9k8r5s5p2", torch.float32, "neither 3x3 nor 1x1"),
        ("n2c8h9w9k8r3s1p1x0", torch.float32, "neither 3x3 nor 1x1"),
        ("n2c8h9w9k8r3s3u3p1", torch.float32, "stride"),
        ("n2c8h9w9k8r3s3p2d2", torch.float32, "dilated"),
        ("n2c8h9w9k8r3s3p1g2", torch.float32, "groups"),
        ("n2c6h9w9k8r3s3p1", torch.float32, "multiples of 4"),
        ("n2c8h9w9k6r1s1", torch.float32, "multiples of 4"),
        ("n2c12h9w9k8r3s3p1", torch.bfloat16, "multiples of 8"),
        ("n2c8h9w9k12r3s3p1", torch.float16, "multiples of 8"),
    ],
)
def test_refused_problems_are_computed_all_the_same(text, dtype, reason, generator):
    problem = ConvProblem.parse(text)
    emulator = Emulator()
    assert reason in emulator.wgc_refusal(problem, dtype)
    input, grad_output = _operands(problem, 0.3, dtype, generator, integer=True)
    actual = emulator.wgc(problem, grad_output, input, nonzeros_of(grad_output))
    assert_bit_equal(actual + 0, reference.conv2d_weight(problem, input, grad_output).to(dtype) + 0)


def test_sizes_that_the_kernel_cannot_count_are_refused():
    problem = ConvProblem.parse(GRID[0])
    for name, size in ("c", 2**24 + 4), ("k", 2**24 + 4), ("h", 2**24), ("w", 2**24):
        assert "above" in Emulator().wgc_refusal(replace(problem, **{name: size}), torch.float32)
    assert "too many rows" in Emulator().wgc_refusal(replace(problem, n=2**30, h=64), torch.float32)
    assert "too long" in Emulator().wgc_refusal(replace(problem, w=2**23, c=64, k=512), torch.float32)


def _contiguous(input, grad_output):
    return input.contiguous(), grad_output.contiguous()


def _misaligned(input, grad_output):
    return tuple(
        t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t) for t in (input, grad_output)
    )


def _every_second_pixel(input, grad_output):
    return input.repeat_interleave(2, 3)[..., ::2], grad_output.repeat_interleave(2, 3)[..., ::2]


@pytest.mark.parametrize("change", [_contiguous, _misaligned, _every_second_pixel])
def test_operands_in_other_places_of_memory(change, dtype, generator):
    problem = ConvProblem.parse(GRID[5])
    input, grad_output = _operands(problem, 0.3, dtype, generator, integer=True)
    expected = _wgc(Emulator(), problem, input, grad_output)
    nonzeros = nonzeros_of(grad_output)
    input, grad_output = change(input, grad_output)
    assert_bit_equal(Emulator().wgc(problem, grad_output, input, nonzeros) + 0, expected + 0)


def test_without_nonzeros(dtype, generator):
    problem = ConvProblem.parse(GRID[5])
    input, grad_output = _operands(problem, 0.3, dtype, generator, integer=True)
    expected = _wgc(Emulator(), problem, input, grad_output)
    assert_bit_equal(Emulator().wgc(problem, grad_output, input) + 0, expected + 0)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("text", ["n6c8h9w9k40r3s3p1", "n5c64h7w40k36r1s1"])
def test_images_of_unlike_density(text, multiprocessors, generator):
    """Rows are cut into parts by what they cost: some parts have many rows, some none."""
    problem = ConvProblem.parse(text)
    input, grad_output = _operands(problem, 1.0, torch.float32, generator, integer=True)
    grad_output[:3] = 0
    grad_output[4, ::3] = 0
    actual = _wgc(Emulator(device=Device(multiprocessors)), problem, input, grad_output)
    assert_bit_equal(actual + 0, reference.conv2d_weight(problem, input, grad_output).float() + 0, text)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
@pytest.mark.parametrize("text", ["n3c128h6w9k72r3s3p1", "n2c8h6w66k100r3s3p1"])
def test_channels_of_unlike_density(text, multiprocessors, generator):
    """Parts are cut across strips and tiles of output channels: a part may have rows of several tiles, a tile of several parts."""
    problem = ConvProblem.parse(text)
    input, grad_output = _operands(problem, 1.0, torch.float32, generator, integer=True)
    grad_output[:, 16:40] = 0
    grad_output[:, 40:68, 1:] = 0
    actual = _wgc(Emulator(device=Device(multiprocessors)), problem, input, grad_output)
    assert_bit_equal(actual + 0, reference.conv2d_weight(problem, input, grad_output).float() + 0, text)
