# SPDX-License-Identifier: Apache-2.0
"""The kernels of the cuda backend on a real device. Where there is none, they run under the emulator (test_cuda_*.py)."""

from __future__ import annotations

import struct

import pytest
import test_parity as parity
import torch
from hypothesis import given
from on_gpu import BACKEND, DEVICE, DTYPES, LAYER, PLAIN, backward, dtype_fixture, key_of, operands_of, strict_math  # noqa: F401
from torch import Tensor

from sparsebwd import prune_gradient, reference
from sparsebwd.backends import get_backend
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_math")]


# ---- convolutions


@pytest.mark.parametrize("density", [1.0, 0.35, 0.03])
@pytest.mark.parametrize("text", [*parity.GRID, "n16c64h28w28k128r3s3u2p1", "n4c256h14w14k256r3s3p1", "n4c512h7w7k512r3s3p1"])
def test_error_is_at_most_twice_that_of_cudnn(text, density, dtype, memory_format, generator):
    parity._check_errors(BACKEND, text, density, dtype, memory_format, generator, device=DEVICE)


@pytest.mark.parametrize("text", parity.SMALL_GRID)
def test_operands_need_not_be_aligned(text, dtype, memory_format, generator):
    problem, operands = operands_of(text, generator, dtype, memory_format, 0.3)
    aligned = backward(problem, operands, percentile=None)
    moved = backward(problem, [fenced(operand) for operand in operands], percentile=None)
    expected = parity._oracle(problem, *operands)
    for one, two, wanted in zip(moved, aligned, expected):
        assert_error_bounded(one, wanted, two)


@pytest.mark.smoke
@pytest.mark.parametrize("text", ["n2c16h16w16k512r1s1", "n8c16h32w32k16r1s1", "n1c512h3w3k16r3s3p1", "n2c64h14w14k64r3s3p1"])
def test_error_of_growing_sums(text, memory_format, generator):
    parity._check_errors(BACKEND, text, 0.3, torch.float32, memory_format, generator, positive=True, device=DEVICE)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.01])
@pytest.mark.parametrize("text", parity.SMALL_GRID)
def test_error_of_auto(text, density, dtype, memory_format, generator):
    for _ in range(3):  # it knows the density after two calls
        parity._check_errors("auto", text, density, dtype, memory_format, generator, device=DEVICE)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(**parity.CHOICES)
def test_integers_are_exact_for_any_geometry(dtype, problem, density, memory_format, seed):
    parity._check_exactness(BACKEND, problem, density, dtype, memory_format, seed, device=DEVICE)


@pytest.mark.smoke
@pytest.mark.parametrize("text", [LAYER, PLAIN, "n4c32h9w9k40r3s3u2p1", "n4c64h9w9k48r1s1"])
def test_twenty_runs_give_the_same_bits(text, dtype, memory_format, generator):
    problem, operands = operands_of(text, generator, dtype, memory_format)
    with poisoned_memory():
        first = backward(problem, operands)
        for _ in range(19):
            for again, before in zip(backward(problem, operands), first):
                assert_bit_equal(again, before, text)


# ---- pruning

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (3, 4, 6, 6), (2, 33, 9, 9), (16, 64, 28, 28), (5, 256, 14, 13), (32, 256, 56, 56)]


def pruned_elsewhere(gradient: Tensor, key: Tensor, sigma: Tensor):
    """What the CPU's backend, or where it does not take the dtype the reference, makes of it, given sigma."""
    history = torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32)
    history[0], history[1] = 1, struct.unpack("i", struct.pack("f", sigma.item()))[0]
    cpu = get_backend("cpu")
    if (cpu.available() or cpu.can_run(None, "cpu", gradient.dtype)) is None:
        return torch.ops.sparsebwd.prune(gradient.cpu(), key.cpu(), "backend=cpu", history)
    return torch.ops.sparsebwd.prune(gradient, key, "backend=reference", history.to(DEVICE))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pruning_is_that_of_the_cpu(shape, dtype, memory_format, generator):
    gradient = random_tensor(shape, generator=generator, dtype=dtype, memory_format=memory_format).to(DEVICE)
    key = key_of(-5, 2**62 + 3)
    with poisoned_memory():
        values, tau, sigma, density = torch.ops.sparsebwd.prune(gradient, key, f"backend={BACKEND}")
    assert values.stride() == gradient.stride() and {t.device.type for t in (values, tau, sigma, density)} == {DEVICE}
    wanted = pruned_elsewhere(gradient, key, sigma)
    assert_bit_equal(values.cpu(), wanted[0].cpu(), "values")
    assert_bit_equal(tau.cpu(), wanted[1].cpu(), "tau")
    assert density.item() == pytest.approx(wanted[3].item(), abs=2**-24)
    exact = reference.SIGMA_COEFFICIENT["corrected"] * gradient.abs().double().mean().item()
    assert sigma.item() == pytest.approx(exact, rel=2**-23)
@pytest.mark.smoke
def test_sigma_of_exact_sums_is_that_of_the_cpu(dtype, memory_format, generator):
    """Multiples of 2^-6 add up without rounding, in any order."""
    gradient = torch.randint(-128, 129, (7, 40, 19, 23), generator=generator).double().mul(2.0**-6).to(dtype)
    gradient = gradient.contiguous(memory_format=memory_format)
    on_device = torch.ops.sparsebwd.prune(gradient.to(DEVICE), key_of(1, 2), f"backend={BACKEND}")
    on_cpu = torch.ops.sparsebwd.prune(gradient, key_of(1, 2).cpu(), "backend=reference")
    for name, one, two in zip(("values", "tau", "sigma", "density"), on_device, on_cpu):
        assert_bit_equal(one.cpu(), two, name)


@pytest.mark.smoke
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_pass(poison, dtype, memory_format, generator):
    gradient = random_tensor((4, 40, 9, 9), generator=generator, dtype=dtype, memory_format=memory_format)
    gradient[1, 33, 2, 3] = poison
    values, tau, *_ = torch.ops.sparsebwd.prune(gradient.to(DEVICE), key_of(1, 2), f"backend={BACKEND}")
    assert_bit_equal(values.cpu(), gradient)
    assert tau.item() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 8, 0, 3)], ids=str)
def test_nothing_to_prune(shape):
    pruned = prune_gradient(torch.empty(shape, device=DEVICE), 90, backend=BACKEND)
    assert pruned.values.shape == shape and pruned.tau == pruned.density == 0
    zeros = prune_gradient(torch.zeros(2, 8, 4, 4, device=DEVICE), 90, backend=BACKEND)
    assert not zeros.values.any() and zeros.tau == zeros.density == 0
@pytest.mark.smoke
def test_predicted_thresholds_are_those_of_the_reference(dtype, memory_format, generator):
    histories = [torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=d) for d in (DEVICE, "cpu")]
    for step in range(2 * reference.SIGMA_HISTORY):
        # Exact sums, as above, of another size each time.
        gradient = torch.randint(-128, 129, (3, 12, 7, 5), generator=generator).double().mul(2.0 ** (-6 - step)).to(dtype)
        gradient = gradient.contiguous(memory_format=memory_format)
        key = torch.tensor([step, 7])
        one = torch.ops.sparsebwd.prune(gradient.to(DEVICE), key.to(DEVICE), f"backend={BACKEND}", histories[0])
        two = torch.ops.sparsebwd.prune(gradient, key, "backend=reference", histories[1])
        for name, actual, wanted in zip(("values", "tau", "sigma", "density"), one, two):
            assert_bit_equal(actual.cpu(), wanted, f"{name} in step {step}")
        assert torch.equal(histories[0].cpu(), histories[1])


def test_more_than_two_to_the_31_elements():
    shape = (2**31 // (64 * 64 * 64) + 3, 64, 64, 64)
    needed = 2 * 3 * shape[0] * 64**3  # the gradient, the pruned one and room for the reference, in bfloat16
    free, _ = torch.cuda.mem_get_info()
    if free < 1.5 * needed:
        pytest.skip(f"{free / 2**30:.0f} GiB of memory are free, {1.5 * needed / 2**30:.0f} are wanted")
    generator = torch.Generator(DEVICE).manual_seed(1)
    gradient = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    for part in gradient.split(64):
        part.copy_(torch.randn(part.shape, generator=generator, device=DEVICE))
    key = key_of(3, 4)
    values, tau, sigma, density = torch.ops.sparsebwd.prune(gradient, key, f"backend={BACKEND}")
    assert sigma.item() == pytest.approx(1, abs=1e-3)
    kept = 0
    for number, (part, pruned) in enumerate(zip(gradient.split(64), values.split(64))):
        assert_bit_equal(pruned, reference.prune_at(part, key, tau, first=64 * number), f"images from {64 * number}")
        kept += torch.count_nonzero(pruned).item()
    assert density.item() == pytest.approx(kept / gradient.numel(), rel=1e-6)
