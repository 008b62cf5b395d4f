# SPDX-License-Identifier: Apache-2.0
"""The pruning kernel (csrc/cuda/prune.cu) under the emulator, against the reference and the cpu backend, bit for bit.

A block has 1024 threads, each of which takes 4 or 8 elements at a time: only tensors of more than 4096 elements are cut
into blocks. How many there are, and how much of the gradient is parked in shared memory, follows from the device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import Device, Emulator, Pruned, Pruning, build, nonzeros_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebwd import reference
from sparsebwd import settings as sparsebwd_settings
from sparsebwd.backends import available_backends
from sparsebwd.testing import assert_bit_equal, fenced, random_tensor

pytestmark = pytest.mark.emulated

PERCENTILE = 90.0
KEY = torch.tensor([0x123456789ABCDEF, -0x76543210FEDCBA98])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
KIB = 1024
# Shared memory that parks nothing, one or two packs of each thread, and all that the tests have.
DEVICES = [Device(1, 300), Device(3, 34 * KIB), Device(2, 200 * KIB), Device(9, 17 * KIB), Device(5, 227 * KIB)]
DEVICES += [Device(4, 34 * KIB, cooperative=False), Device(3, 200 * KIB, 100 * KIB)]  # the latter has no room for one launch
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (5, 10, 1, 1),
    (2, 5, 1, 9),
    (1, 8, 2, 33),
    (1, 17, 3, 2),
    (1, 31, 2, 15),
    (3, 48, 7, 7),
    (2, 64, 8, 8),
    (1, 96, 3, 5),
    (2, 130, 2, 2),
    (2, 12, 5, 4),
    (1, 24, 9, 9),
    (1, 4, 97, 101),
    (1, 9, 130, 65),
    (2, 260, 4, 4),
    (3, 36, 16, 12),
    (2, 128, 9, 10),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
    (2, 4, 0, 3),
]


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


def gradient(shape, dtype, memory_format, seed=0, scale=1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = random_tensor(shape, generator=generator, dtype=torch.float64, density=0.9) * scale
    return values.to(dtype).contiguous(memory_format=memory_format)


def pruning(key: Tensor = KEY, history: Tensor | None = None, scales: Tensor | None = None) -> Pruning:
    coefficient = reference.SIGMA_COEFFICIENT["corrected"]
    return Pruning(key, coefficient, reference.quantile(PERCENTILE), history, scales)


def threshold(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma, tau) as float32 tensors, of the sum that the cpu backend takes if it has the dtype."""
    if "cpu" in available_backends() and grad.dtype != torch.float16:
        abs_sum, _ = torch.ops.sparsebwd_cpu.abs_sum(grad)
    else:
        abs_sum = math.fsum(grad.double().abs().flatten().tolist())
    total = torch.tensor(abs_sum, dtype=torch.float64)
    return reference.threshold(total, grad.numel(), sparsebwd_settings.Pruning(PERCENTILE), grad.dtype)


def assert_pruned(
    result: Pruned, grad: Tensor, key: Tensor, sigma: Tensor, tau: Tensor, scales: Tensor | None = None
) -> None:
    """That is what is made of ``grad`` at ``tau``, or its images at that times their scales, and its sigma."""
    at = tau if scales is None else reference.thresholds_of_images(tau, scales, grad.dtype)
    expected = reference.prune_at(grad, key, at)
    assert_bit_equal(result.stats, torch.stack([tau, sigma, reference.density(expected)]), "tau, sigma, density")
    if result.values is not None:
        assert_bit_equal(result.values, expected, "values")
    if result.nonzeros is not None:
        assert torch.equal(result.nonzeros, nonzeros_of(expected))


def check(
    emulator: Emulator, grad: Tensor, channels_last: bool, key: Tensor = KEY, scales: Tensor | None = None
) -> None:
    sigma, tau = threshold(grad)
    how = pruning(key, scales=scales)
    result = emulator.prune(grad, how, channels_last=channels_last, nonzeros=channels_last)
    assert_pruned(result, grad, key, sigma, tau, scales)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_reference(shape, dtype, memory_format):
    seed = SHAPES.index(shape)
    emulator = Emulator(seed=seed, device=DEVICES[seed % len(DEVICES)])
    check(emulator, gradient(shape, dtype, memory_format, seed), memory_format is torch.channels_last)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(LAYOUTS),
    device=st.sampled_from(DEVICES),
    key=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)),
)
def test_bits_for_any_shape(shape, dtype, memory_format, device, key):
    grad = gradient(shape, dtype, memory_format, sum(shape))
    check(Emulator(device=device), grad, memory_format is torch.channels_last, torch.tensor(key))


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 140), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(LAYOUTS),
    device=st.sampled_from(DEVICES),
)
def test_images_with_thresholds_of_their_own(shape, dtype, memory_format, device):
    """Of images, lanes of a warp may have several."""
    grad = gradient(shape, dtype, memory_format, sum(shape))
    scales = torch.exp(torch.randn(shape[0], generator=torch.Generator().manual_seed(sum(shape))))
    check(Emulator(device=device), grad, memory_format is torch.channels_last, scales=scales)


@pytest.mark.parametrize("exponent", [0, -103, 124])
def test_thresholds_of_images_that_are_tiny_or_no_numbers(exponent, dtype, memory_format):
    grad = gradient((5, 40, 5, 8), dtype, memory_format, scale=2.0**exponent)
    scales = torch.tensor([1.0, 0.3, 4.0, 2.0**-30, 2.0**60])
    check(Emulator(), grad, memory_format is torch.channels_last, scales=scales)


@pytest.mark.parametrize("device", [*DEVICES, Device(4, 67 * KIB)], ids=lambda d: f"{d[0]}x{d[1]}")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["f32", "bf16"])
def test_grids_and_parking_of_a_tensor_of_many_blocks(device, dtype, memory_format):
    grad = gradient((2, 70, 33, 32), dtype, memory_format)
    check(Emulator(device=device), grad, memory_format is torch.channels_last)


def test_in_place(dtype, memory_format):
    """And nothing is written outside: the gradient lies between NaNs, also unaligned."""
    channels_last = memory_format is torch.channels_last
    for shape in [(2, 64, 9, 8), (2, 13, 7, 7)]:
        for grad in (gradient(shape, dtype, memory_format), fenced(gradient(shape, dtype, memory_format))):
            sigma, tau = threshold(grad)
            before = grad.clone()
            storage = torch.empty(0, dtype=dtype).set_(grad.untyped_storage())
            outside = storage.isnan()
            result = Emulator(device=DEVICES[1]).prune(
                grad, pruning(), channels_last=channels_last, nonzeros=channels_last, out=grad
            )
            assert_pruned(result, before, KEY, sigma, tau)
            assert torch.equal(storage.isnan(), outside)


@pytest.mark.parametrize("shape", [(2, 64, 9, 8), (2, 13, 7, 7)], ids=str)
def test_parts_that_are_not_wanted(shape, dtype, memory_format):
    channels_last = memory_format is torch.channels_last
    grad = gradient(shape, dtype, memory_format)
    sigma, tau = threshold(grad)
    wanted = [(True, False), (False, True), (False, False)] if channels_last else [(False, False)]
    for values, nonzeros in wanted:
        result = Emulator().prune(grad, pruning(), channels_last=channels_last, values=values, nonzeros=nonzeros)
        assert (result.values is not None, result.nonzeros is not None) == (values, nonzeros)
        assert_pruned(result, grad, KEY, sigma, tau)


@pytest.mark.parametrize("shape", [(2, 64, 9, 8), (2, 13, 7, 7), (0, 4, 3, 3)], ids=str)
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_without_pruning_it_copies_and_counts(value, shape, dtype, memory_format):
    channels_last = memory_format is torch.channels_last
    grad = gradient(shape, dtype, memory_format)
    if grad.numel():
        grad[1, 3, 5, 6] = value
        grad[1, 3, 5, 5] = -0.0
    result = Emulator().prune(grad, None, channels_last=channels_last, nonzeros=channels_last)
    assert_pruned(result, grad, KEY, torch.tensor(0.0), torch.tensor(0.0))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_passes_with_everything_else(value, dtype, memory_format):
    channels_last = memory_format is torch.channels_last
    grad = gradient((2, 40, 5, 8), dtype, memory_format)
    grad[0, 7, 0, 0], grad[1, 39, 4, 7] = -0.0, value
    result = Emulator().prune(grad, pruning(), channels_last=channels_last, nonzeros=channels_last)
    sigma = result.stats[1]
    assert sigma.isnan() if math.isnan(value) else sigma == math.inf
    assert_pruned(result, grad, KEY, sigma, torch.tensor(0.0))


@pytest.mark.parametrize("value", [0.0, -0.0, 3e38, 1e-40, 60000.0])
def test_constants(value, dtype, memory_format):
    """Zeros; sums and thresholds that overflow; numbers that are subnormal."""
    check(
        Emulator(),
        torch.full((2, 40, 5, 8), value).to(dtype).contiguous(memory_format=memory_format),
        memory_format is torch.channels_last,
    )


@pytest.mark.parametrize("scale", [1e38, 1e-37, 2e-44, 1e-4, 3e-8])
def test_extreme_magnitudes(scale, dtype, memory_format):
    """Sums that overflow float32, and products tau * r that are subnormal or 0; for float16, tau and g themselves."""
    grad = gradient((2, 40, 5, 8), dtype, memory_format, scale=scale)
    check(Emulator(), grad, memory_format is torch.channels_last)


@pytest.mark.parametrize("exponent", [0, -14, -24, -102, -103, -126, -133, -149])
def test_any_bits_and_magnitudes_around_what_is_kept(exponent, dtype, memory_format):
    """At thresholds near a power of two, subnormal ones too: any bits, and magnitudes at tau * r and next to it."""
    generator = torch.Generator().manual_seed(exponent)
    sigma = torch.tensor(2.0**exponent)
    tau = (sigma.double() * reference.quantile(PERCENTILE)).float().to(dtype).float()
    shape = (2, 40, 16, 18)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    lowest = torch.iinfo(integers).min
    any_bits = torch.randint(lowest, -lowest, shape, generator=generator, dtype=integers)
    around = (tau * reference.uniform(shape, KEY)).to(dtype).view(integers)
    around = (around + torch.randint(-1, 2, shape, generator=generator, dtype=integers)).clamp(min=0)
    around = torch.where(torch.rand(shape, generator=generator) < 0.5, around, around | lowest)
    grad = torch.where(torch.rand(shape, generator=generator) < 0.5, any_bits, around).view(dtype)
    grad = grad.contiguous(memory_format=memory_format)
    history = torch.tensor([1, sigma.view(torch.int32), 0, 0, 0], dtype=torch.int32)
    channels_last = memory_format is torch.channels_last
    result = Emulator().prune(grad, pruning(history=history), channels_last=channels_last, nonzeros=channels_last)
    assert result.stats[1].isnan()
    assert_pruned(result, grad, KEY, result.stats[1], tau)


@pytest.mark.parametrize("predicts", [False, True], ids=["exact", "predicted"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["f32", "bf16"])
def test_sums_of_magnitudes_are_those_of_float64(dtype, memory_format, predicts):
    """Sums of float32 would lose each 1 that comes after the first 2^24 of a thread."""
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(1, 64, 32, 32, generator=generator) < 0.1
    grad = torch.where(large, 2.0**24, 1.0).to(dtype).contiguous(memory_format=memory_format)
    sigma, _ = threshold(grad)
    history = torch.zeros(5, dtype=torch.int32)
    if predicts:
        history[0], history[1] = 1, torch.tensor(1.0).view(torch.int32)
    channels_last = memory_format is torch.channels_last
    result = Emulator(device=DEVICES[0]).prune(grad, pruning(history=history), channels_last=channels_last)
    assert_bit_equal(result.stats[1], sigma, "sigma")
    assert history[0] == predicts + 1


@pytest.mark.parametrize("predicts", [False, True], ids=["exact", "predicted"])
@pytest.mark.parametrize("device", DEVICES[:5], ids=lambda d: f"{d[0]}x{d[1]}")
def test_several_launches_have_the_bits_of_one(device, predicts, dtype, memory_format):
    grad = gradient((3, 40, 17, 12), dtype, memory_format)
    channels_last = memory_format is torch.channels_last
    found = []
    for shape in (device, device._replace(cooperative=False), device._replace(shared_per_multiprocessor=KIB)):
        history = torch.zeros(5, dtype=torch.int32)
        history[0], history[1] = predicts, torch.tensor(0.5).view(torch.int32)
        result = Emulator(device=shape).prune(grad, pruning(history=history), channels_last=channels_last, nonzeros=channels_last)
        found.append((result, history))
    for result, history in found[1:]:
        for name, one, other in zip(result._fields, found[0][0], result):
            if one is not None:
                assert_bit_equal(other, one, name)
        assert_bit_equal(history, found[0][1], "history")


# ---- predicted thresholds


class History:
    """What struct Pruning in kernels.h says of sigma_history."""

    def __init__(self):
        self.recorded: list[Tensor] = []  # all of them

    def mean(self) -> Tensor:
        count = min(len(self.recorded), 4)
        places = [[x for i, x in enumerate(self.recorded) if i % 4 == place][-1] for place in range(count)]
        total = torch.zeros((), dtype=torch.float64)
        for value in places:
            total += value.double()
        return (total / max(count, 1)).float()

    def record(self, sigma: Tensor) -> None:
        if 0 < sigma < math.inf:
            self.recorded.append(sigma)


@pytest.mark.parametrize("device", DEVICES[:3] + DEVICES[-2:], ids=lambda d: f"{d[0]}x{d[1]}")
def test_predicted_thresholds_follow_the_history(device, dtype, memory_format):
    channels_last = memory_format is torch.channels_last
    emulator, model = Emulator(device=device), History()
    history = torch.zeros(5, dtype=torch.int32)
    scales = [0.0, math.nan, 1.0, 2.0, 0.5, math.inf, 3.0, 0.0, 1.5, 0.25]
    for step, scale in enumerate(scales):
        grad = gradient((2, 36, 12, 9), dtype, memory_format, step)
        grad = grad * scale if math.isfinite(scale) else grad.index_fill(1, torch.tensor([3]), scale)
        grad = grad.contiguous(memory_format=memory_format)
        predicted, (sigma, tau) = model.mean(), threshold(grad)
        if predicted > 0:
            exact = predicted.double() * reference.quantile(PERCENTILE)
            tau = exact.float().to(dtype).float()
        result = emulator.prune(grad, pruning(history=history), channels_last=channels_last, nonzeros=channels_last)
        if sigma.isnan():
            assert result.stats[1].isnan()
            sigma = result.stats[1]
        assert_pruned(result, grad, KEY, sigma, tau)
        model.record(sigma)
        assert history[0] == len(model.recorded)
        expected = torch.zeros(4)
        for i, value in enumerate(model.recorded):
            expected[i % 4] = value
        assert_bit_equal(history[1:].view(torch.float32), expected, "history")
    assert len(model.recorded) == 6


# ---- positions beyond 32 bits


@pytest.fixture(scope="module")
def positions():
    return build("prune_positions", [Path(__file__).with_name("prune_positions.cpp")])


# Vectors need channels in eights, and pixels of a plane in pairs.
LARGE = [
    (3, 64, 50_000, 40_000),
    (70_001, 40, 302, 300),
    (2**31 - 1, 8, 4, 6),
    (50, 2**31 - 8, 2, 2),
    (4, 24, 2, 2**31 - 2),
]
# How many elements a pack has, and what it counts in the innermost loop.
PACKS = {"channels_last": (8, 1), "channels_last_quads": (4, 1), "contiguous": (8, 2), "contiguous_pixels": (4, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", PACKS)
@pytest.mark.parametrize("nonzeros", [False, True])
def test_positions_in_tensors_larger_than_memory(positions, layout, nonzeros):
    elements, step = PACKS[layout]
    channels_last = layout.startswith("channels_last")
    random_number = random.Random(0)
    for n, c, h, w in LARGE:
        if channels_last:
            packs = -(-c // elements)
            of_word = min(32 // elements, 1 << (packs - 1).bit_length()) if nonzeros else 1
            radices, strides = (-(-packs // of_word) * of_word, w, h), (elements, c, w * c, h * w * c)
        else:
            radices, strides = (w, h, -(-c // 4)), (1, w, 4 * h * w, c * h * w)
        total = math.prod(radices) * n // step
        assert total > 2**32
        some = [random_number.randrange(1024, total) for _ in range(50)]
        for pack in [1024, 2**31 - 1, 2**31, 2**32, total - 1, total, *some]:
            digits, rest = [], pack * step
            for radix in radices:
                rest, digit = divmod(rest, radix)
                digits.append(digit)
            digits.append(rest)
            first = digits[0] * elements if channels_last else 4 * digits[2]
            most = elements if channels_last else 4
            present = 0 if rest >= n else max(0, min(most, c - first))
            offset = sum(digit * stride for digit, stride in zip(digits, strides, strict=True))
            for rows in (-1, 0, 1):
                found = getattr(positions, layout)((n, c, h, w), channels_last, nonzeros, pack, rows)
                assert found == [*digits, offset, present], ((n, c, h, w), pack, rows)


# ---- rules of the machine


def cases() -> list[tuple[str, Callable[[], tuple[Tensor, Pruning]]]]:
    def case(shape, dtype, memory_format, history=None, scales=None):
        return lambda: (
            gradient(shape, dtype, memory_format),
            pruning(history=history and torch.tensor(history), scales=scales and torch.tensor(scales)),
        )

    one = torch.tensor(1.0).view(torch.int32).item()
    return [
        ("vectors", case((1, 64, 16, 15), torch.float32, torch.channels_last)),
        ("padding", case((2, 24, 12, 12), torch.bfloat16, torch.channels_last)),
        ("quads", case((1, 30, 13, 14), torch.float16, torch.channels_last)),
        ("planes", case((1, 18, 16, 24), torch.bfloat16, torch.contiguous_format)),
        ("odd planes", case((1, 18, 17, 17), torch.float32, torch.contiguous_format)),
        ("predicted", case((1, 64, 16, 15), torch.float32, torch.channels_last, [1, one, 0, 0, 0])),
        ("images", case((3, 24, 9, 11), torch.bfloat16, torch.channels_last, scales=[1.0, 0.5, 3.0])),
        ("planes of images", case((3, 18, 9, 11), torch.float32, torch.contiguous_format, scales=[1.0, 0.5, 3.0])),
    ]


@pytest.mark.parametrize("make", [make for _, make in cases()], ids=[name for name, _ in cases()])
def test_order_of_threads_does_not_matter_and_memory_is_used_by_the_rules(make):
    """Other orders give the same bits, in one launch and in several; in the checked build each access is seen."""
    results = []
    for variant, seed, cooperative in [("fast", 0, True), ("fast", 1, True), ("checked", 2, True), ("checked", 3, False)]:
        device = Device(3, 20 * KIB, cooperative=cooperative)
        grad, how = make()
        channels_last = reference.memory_format(grad) is torch.channels_last
        emulator = Emulator(variant, seed, device)
        results.append((emulator.prune(grad, how, channels_last=channels_last, nonzeros=channels_last), how))
    for result, how in results[1:]:
        assert_bit_equal(result.values, results[0][0].values, "values")
        assert_bit_equal(result.stats, results[0][0].stats, "tau, sigma, density")
        if result.nonzeros is not None:
            assert torch.equal(result.nonzeros, results[0][0].nonzeros)
        if how.sigma_history is not None:
            assert torch.equal(how.sigma_history, results[0][1].sigma_history)


def test_calls_that_are_refused():
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        Emulator().prune(torch.zeros(1, 4, 2, 2), pruning(), channels_last=False, nonzeros=True)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        Emulator().prune(torch.zeros(0, 4, 2, 2**31), pruning(), channels_last=False)
