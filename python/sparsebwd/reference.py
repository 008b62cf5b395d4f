# SPDX-License-Identifier: Apache-2.0
"""The oracle: pruning and both backward convolutions in plain PyTorch, exact before it is fast.

Every backend must produce the pruned gradients of this module bit for bit given the same sigma,
and its convolutions are compared with those of this module in float64.
"""

from __future__ import annotations

import ctypes
import math
import struct
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .histogram import Histogram, count, of_sampled, sample
from .problem import ConvProblem

if TYPE_CHECKING:
    from .settings import Pruning

SIGMA_COEFFICIENT = {
    # E|g| = sqrt(2/pi) sigma for a normal g, hence the factor sqrt(pi/2). The paper prints the
    # inverse, which underestimates sigma by 2/pi; it is kept to reproduce the paper's tables.
    "corrected": math.sqrt(math.pi / 2),
    "as_printed": math.sqrt(2 / math.pi),
}

SIGMA_HISTORY = 4
"""How many recent values of sigma the predicted threshold is the mean of."""

PHILOX_ROUNDS = 7
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


class PrunedGradient(NamedTuple):
    """A pruned gradient and how it was pruned.

    values: as the gradient in shape, dtype and memory format.
    tau, sigma, density: 0-dim float32 tensors on the gradient's device. tau is the threshold used, as
    rounded to the gradient's dtype, sigma the estimated standard deviation of this gradient, density
    the fraction of ``values`` that is not zero (0 for an empty tensor).
    """

    values: Tensor
    tau: Tensor
    sigma: Tensor
    density: Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a 4-D tensor stored so, else contiguous; the latter where both hold."""
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def density(tensor: Tensor) -> Tensor:
    """Fraction of elements that are not zero, a 0-dim float32 tensor; 0 for an empty tensor."""
    return (torch.count_nonzero(tensor).double() / max(tensor.numel(), 1)).float()


def quantile(percentile: float) -> float:
    """The standard normal quantile of ``percentile`` per cent."""
    return NormalDist().inv_cdf(percentile / 100)


def normal_density(threshold: float) -> float:
    """The expected density of normally distributed values with sigma 1 once they are pruned at ``threshold``:
    E[min(|x| / threshold, 1)]. 1 at a threshold of 0."""
    if threshold <= 0:
        return 1.0
    normal = NormalDist()
    return 2 * normal.cdf(-threshold) + 2 * (normal.pdf(0) - normal.pdf(threshold)) / threshold


Scalar = TypeVar("Scalar", Tensor, float)


def threshold(
    abs_sum: Scalar,
    numel: int,
    pruning: Pruning,
    dtype: torch.dtype,
    sigma_history: Tensor | None = None,
) -> tuple[Scalar, Scalar]:
    """Estimate sigma and tau of a gradient of ``numel`` elements from ``abs_sum`` = sum |g|.

    abs_sum: 0-dim float64 tensor, whose value stays on its device, or a float. Returns (sigma, tau): 0-dim float32
    tensors, or floats of the same values. tau is rounded to ``dtype``, so that the probabilities computed from it are
    those of the values written. sigma = C mean|g| and tau = sigma Phi^-1(p/100): "Threshold determination" in
    Ye et al. (2019), corrected as docs/numerics says. tau is 0, which prunes nothing, where sum |g| or tau itself is not finite.

    sigma_history: None, or what :func:`predict` takes. Then tau comes from the sigma that it predicts.
    """
    sigma = _rounded(pruning.sigma_coefficient * (abs_sum / max(numel, 1)), torch.float32)
    expected = sigma if sigma_history is None else predict(sigma_history, sigma)
    tau = _rounded(_rounded(expected * pruning.quantile, torch.float32), dtype)
    if isinstance(tau, Tensor):
        return sigma.float(), tau.nan_to_num(0.0, 0.0, 0.0).float()
    return sigma, tau if math.isfinite(tau) else 0.0


def threshold_of_counts(counts: Tensor, pruning: Pruning, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(sigma, tau) as :func:`threshold` returns them as tensors, for a density or a variance, from the int64
    ``counts`` of a histogram on their device, which is not waited for."""
    histogram = Histogram(counts)
    if pruning.density is not None:
        tau = histogram.tau_for_density(pruning.density)
    else:
        tau = histogram.tau_for_variance(pruning.variance)
    sigma = _rounded(pruning.sigma_coefficient * histogram.mean.nan_to_num(0.0, math.inf), torch.float32)
    return sigma.float(), _rounded(_rounded(tau, torch.float32), dtype).nan_to_num(0.0, 0.0, 0.0).float()


def looked_at(grad: Tensor, pruning: Pruning, scales: Tensor | None = None) -> Tensor:
    """What the threshold of a gradient (N, C, H, W) comes from: all of it or a sample. Where images have thresholds of their
    own, tau * ``scales``, the density is that of the elements divided by their scales."""
    sampled = pruning.threshold == "sampled"
    measured = sample(grad) if sampled else grad
    if scales is None or not pruning.needs_counts:
        return measured
    return measured / (of_sampled(scales, tuple(grad.shape)) if sampled else scales.view(-1, 1, 1, 1))


def find_threshold(
    grad: Tensor, pruning: Pruning, sigma_history: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sigma, tau) of a gradient (N, C, H, W), as tensors on its device. scales: see :func:`thresholds_of_images`."""
    measured = looked_at(grad, pruning, scales)
    if pruning.needs_counts:
        return threshold_of_counts(count(measured), pruning, grad.dtype)
    abs_sum = measured.abs().sum(dtype=torch.float64)
    return threshold(abs_sum, measured.numel(), pruning, grad.dtype, sigma_history)


def thresholds_of_images(tau: Tensor | float, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The threshold of each image, tau times its scale, rounded to ``dtype``; 0, which prunes nothing, where that is not finite.

    tau: representable in ``dtype``. scales: float32 (N,), as :func:`sparsebwd.importance.scales` returns them. Returns float32
    (N, 1, 1, 1).
    """
    return _rounded(scales * tau, dtype).nan_to_num(0.0, 0.0, 0.0).float().view(-1, 1, 1, 1)


def resolve(pruning: Pruning, state: Tensor | None) -> tuple[Pruning, Tensor | None]:
    """The settings with their tau / sigma, and what :func:`predict` takes.

    state: int32[1 + SIGMA_HISTORY], or with noise one more, at the end: the bits of tau / sigma as a float32. Read on the
    host only if it is on the CPU.
    """
    if pruning.noise is None or state is None:
        return pruning, state
    if state.is_cpu:
        ratio = struct.unpack("f", struct.pack("i", state[-1].item()))[0]
        pruning = pruning.at(ratio) if ratio > 0 else pruning.unpruned
    else:
        pruning = pruning.at(state[-1:].view(torch.float32)[0].double())
    return pruning, state[:-1] if pruning.threshold == "predicted" else None


def predict(sigma_history: Tensor, sigma: Scalar) -> Scalar:
    """The mean of the recorded values of sigma, or ``sigma`` if there are none; records ``sigma``.

    sigma_history: int32[1 + SIGMA_HISTORY], to begin with all 0. How many values were recorded so far, then the last
    SIGMA_HISTORY of them as the bits of float32s, value i at i % SIGMA_HISTORY. The mean is taken in float64, in the
    order of their places, and rounded to float32. A sigma that is 0 or not finite is not recorded.
    sigma: of the gradient at hand, with the value of a float32: a 0-dim float64 tensor on the device of
    ``sigma_history``, which is not waited for, or a float, if ``sigma_history`` is on the CPU.
    """
    if isinstance(sigma, Tensor):
        count, values = sigma_history[0], sigma_history[1:].view(torch.float32)
        places = torch.arange(SIGMA_HISTORY, device=sigma_history.device)
        recorded = torch.where(places < count, values, 0.0).double()
        total = recorded[0]
        for value in recorded[1:]:
            total = total + value
        mean = _rounded(total / count.clamp(1, SIGMA_HISTORY), torch.float32)
        fit = (sigma > 0) & (sigma < math.inf)
        values.copy_(torch.where(fit & (places == count % SIGMA_HISTORY), sigma.float(), values))
        count += fit
        return torch.where(mean > 0, mean, sigma)
    # The same in floats takes a tenth of the time.
    count, *bits = sigma_history.tolist()
    total = 0.0
    for value in struct.unpack(f"{SIGMA_HISTORY}f", struct.pack(f"{SIGMA_HISTORY}i", *bits))[:count]:
        total += value  # sum() would compensate for rounding
    mean = _rounded(total / max(1, min(count, SIGMA_HISTORY)), torch.float32)
    if 0 < sigma < math.inf:
        sigma_history[1 + count % SIGMA_HISTORY] = struct.unpack("i", struct.pack("f", sigma))[0]
        sigma_history[0] = count + 1
    return mean if mean > 0 else sigma


def _rounded(value: Scalar, dtype: torch.dtype) -> Scalar:
    """The float64 ``value`` rounded to ``dtype``, as a float64."""
    if isinstance(value, Tensor):
        return value.to(dtype).double()
    if dtype == torch.float64:
        return value
    if dtype == torch.float32:
        return ctypes.c_float(value).value  # a tenth of the time that a tensor takes
    return torch.scalar_tensor(value, dtype=dtype, device="cpu").item()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    rounds: int = PHILOX_ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al., SC 2011) on int64 tensors that hold uint32 values.

    Counter words and key words broadcast together. Returns the four output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
        # The product is taken modulo 2^64, so its high word needs the mask after the signed shift.
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
    return c0, c1, c2, c3


def uniform(shape: tuple[int, int, int, int], key: Tensor, first: int = 0) -> Tensor:
    """Random numbers in [0, 1) of a gradient of shape (N, C, H, W): float32, multiples of 2^-24.

    key: int64[2]. The number at (n, c, h, w) depends on the key and on that position only.
    first: the image of the batch that these begin with.
    """
    n, c, h, w = shape
    device = key.device

    def axis(size: int, dim: int) -> Tensor:
        return torch.arange(size, device=device).view([-1 if d == dim else 1 for d in range(4)])

    words = philox4x32(
        (
            axis(w, 3) ^ (key[1] & _MASK32),
            axis(h, 2) ^ ((key[1] >> 32) & _MASK32),
            first + axis(n, 0),
            axis((c + 3) // 4, 1),
        ),
        (key[0] & _MASK32, (key[0] >> 32) & _MASK32),
    )
    # Four neighbouring channels take the four words of one counter.
    channels = torch.stack([word.expand(n, (c + 3) // 4, h, w) for word in words], dim=2)
    channels = channels.reshape(n, (c + 3) // 4 * 4, h, w)[:, :c]
    return (channels >> 8).float() * 2.0**-24


def prune_at(grad: Tensor, key: Tensor, tau: Tensor, first: int = 0) -> Tensor:
    """Stochastic pruning (Ye et al. (2019), Algorithm 1) at the threshold ``tau``.

    grad: (N, C, H, W); key: int64[2]; tau: float32, 0-dim or (N, 1, 1, 1), representable in the dtype of grad.
    first: the image of the batch that ``grad`` begins with, where it is a part of one.
    |g| < tau becomes copysign(tau, g) if |g| > tau * r with r uniform in [0, 1), else +0;
    everything else keeps its bits. Returns a new tensor in the memory format of ``grad``.
    """
    magnitude = grad.abs()
    if grad.dtype != torch.float64:
        magnitude = magnitude.float()
    kept = torch.where(
        magnitude > tau * uniform(tuple(grad.shape), key, first),
        torch.copysign(tau.to(grad.dtype), grad),
        torch.zeros_like(grad),
    )
    values = torch.where(magnitude < tau, kept, grad)
    return values.contiguous(memory_format=memory_format(grad))


def prune(
    grad: Tensor, key: Tensor, pruning: Pruning, sigma_history: Tensor | None = None, scales: Tensor | None = None
) -> PrunedGradient:
    """Prune a gradient (N, C, H, W) of any floating dtype; see :func:`sparsebwd.prune_gradient`. scales: None, or images have
    :func:`thresholds_of_images`."""
    sigma, tau = find_threshold(grad, pruning, sigma_history, scales)
    values = prune_at(grad, key, tau if scales is None else thresholds_of_images(tau, scales, grad.dtype))
    return PrunedGradient(values, tau, sigma, density(values))


def conv2d_input(problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
    """AGB in float64: the gradient (N, C, H, W) from weight (K, C/groups, R, S) and
    grad_output (N, K, P, Q)."""
    groups = problem.groups
    columns = torch.einsum(
        "gkm,ngkl->ngml",
        weight.double().reshape(groups, problem.k // groups, -1),
        grad_output.double().reshape(problem.n, groups, problem.k // groups, problem.p * problem.q),
    )
    return F.fold(
        columns.reshape(problem.n, problem.c * problem.r * problem.s, problem.p * problem.q),
        (problem.h, problem.w),
        (problem.r, problem.s),
        problem.dilation,
        problem.padding,
        problem.stride,
    )


def conv2d_weight(problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
    """WGC in float64: the gradient (K, C/groups, R, S) from input (N, C, H, W) and
    grad_output (N, K, P, Q)."""
    groups, pixels = problem.groups, problem.p * problem.q
    columns = F.unfold(
        input.double(),
        (problem.r, problem.s),
        problem.dilation,
        problem.padding,
        problem.stride,
    )
    return torch.einsum(
        "ngkl,ngml->gkm",
        grad_output.double().reshape(problem.n, groups, problem.k // groups, pixels),
        columns.reshape(problem.n, groups, problem.c // groups * problem.r * problem.s, pixels),
    ).reshape(problem.weight_size)
