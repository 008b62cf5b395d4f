# SPDX-License-Identifier: Apache-2.0
"""Thresholds from the distribution of magnitudes: a histogram of |g|, or of a fixed sample of a gradient.

A threshold that does not depend on the numbers drawn keeps pruning without bias, whatever it is. So it may come from a
histogram instead of a sort, and from a part of the gradient instead of all.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["BINS", "Histogram", "count", "of_sampled", "sample"]

SHIFT = 19
"""A magnitude's bin is the bits of its float32 >> SHIFT: its exponent and the first 4 bits of its mantissa, so that bins are
as wide as 1/16 to 1/32 of the magnitudes in them."""

BINS = 2**31 >> SHIFT
FINITE = 255 << 23 >> SHIFT
"""The first bin of Inf and NaN."""

SAMPLES = 16381
"""How many elements a sample has at most. A prime, so that it does not meet the same channels and columns of each image."""


def count(values: Tensor) -> Tensor:
    """How many of ``values``, rounded to float32, have magnitudes in each bin: int64[BINS]."""
    bins = values.abs().float().contiguous().view(torch.int32).flatten().bitwise_right_shift(SHIFT)
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, bins.long(), counts.new_ones(()).expand(bins.shape))


def sample(grad: Tensor, samples: int = SAMPLES) -> Tensor:
    """Elements of a gradient (N, C, H, W), spread evenly over it by their logical positions: 1-D, of its dtype. All of
    them, in logical order, if there are no more than ``samples``; else element ⌊i numel / samples⌋ for each i.

    It depends on the shape alone, not on the layout, and on nothing that is drawn.
    """
    if grad.numel() <= samples:
        return grad.flatten()
    shape = tuple(grad.shape)
    if grad.is_contiguous():
        memory, order = grad.view(-1), "nchw"
    elif grad.is_contiguous(memory_format=torch.channels_last):
        memory, order = grad.permute(0, 2, 3, 1).view(-1), "nhwc"
    else:
        memory, order = grad.flatten(), "nchw"
    # Not kept on devices, where memory may belong to a graph that is being captured.
    places = _kept_places(shape, order, samples) if grad.is_cpu else _places(shape, order, samples, grad.device)
    return memory.index_select(0, places)


def of_sampled(values: Tensor, shape: tuple[int, int, int, int], samples: int = SAMPLES) -> Tensor:
    """Of ``values``, (N,), one for each image, that of the image of each element of a :func:`sample`."""
    n, c, h, w = shape
    elements = n * c * h * w
    if elements <= samples:
        return values.repeat_interleave(c * h * w)
    return values[torch.arange(samples, device=values.device) * elements // samples // (c * h * w)]


def _places(shape: tuple[int, int, int, int], order: str, samples: int, device: torch.device) -> Tensor:
    """Where in memory the elements of a sample are."""
    n, c, h, w = shape
    positions = torch.arange(samples, device=device) * (n * c * h * w) // samples
    if order == "nchw":
        return positions
    image, pixel = positions // (c * h * w), positions % (h * w)
    return (image * (h * w) + pixel) * c + positions // (h * w) % c


@lru_cache(maxsize=64)
def _kept_places(shape: tuple[int, int, int, int], order: str, samples: int) -> Tensor:
    with torch.inference_mode(False):
        return _places(shape, order, samples, torch.device("cpu"))


@lru_cache(maxsize=1)
def _kept_magnitudes() -> Tensor:
    with torch.inference_mode(False):
        return _magnitudes(torch.device("cpu"))


def _magnitudes(device: torch.device) -> Tensor:
    """The magnitude that stands for each finite bin: its middle, 0 for the first. float64[FINITE]"""
    middles = (torch.arange(FINITE, dtype=torch.int32, device=device) << SHIFT) + (1 << SHIFT - 1)
    middles = middles.view(torch.float32).double()
    middles[0].zero_()
    return middles


class Histogram:
    """What pruning at a threshold does to a gradient, as its histogram says it, on the device of the counts and in float64.

    With N elements of magnitude m in a bin, sums over bins, and Σ' over those with m < tau:
    E[density] = (Σ' N m / tau + the number of the others) / the number of all;
    V = E||pruned - g||² / ||g||² = (tau Σ' N m - Σ' N m²) / Σ N m².
    Both are continuous and monotonous in tau, and on each piece between two bins can be solved for it.

    counts: int64[BINS] of :func:`count`.
    """

    def __init__(self, counts: Tensor) -> None:
        self._finite = counts[:FINITE].double()
        self._others = counts[FINITE:].sum()
        self._at = _kept_magnitudes() if counts.is_cpu else _magnitudes(counts.device)
        moments = torch.stack([self._finite, self._finite * self._at, self._finite * self._at.square()])
        # Of all bins before each, and at last of all; exact zeros count nowhere but in the number of elements.
        self._numel = self._finite.sum() + self._others
        moments[0, 0].zero_()
        before = torch.nn.functional.pad(moments.cumsum(1), (1, 0))
        self._below, self._first, self._second = before.unbind()
        self._nonzeros, self._squares = self._below[-1], self._second[-1]
        self._edges = torch.nn.functional.pad(self._at, (0, 1), value=torch.inf)

    @property
    def mean(self) -> Tensor:
        """mean |g|; NaN for no elements, Inf where one is not finite."""
        return torch.where(self._others > 0, torch.inf, self._first[-1] / self._numel)

    def density(self, tau: Tensor | float) -> Tensor:
        """E[density] after pruning at ``tau`` > 0."""
        bin = self._bin(tau)
        return (self._first[bin] / tau + (self._nonzeros - self._below[bin])) / self._numel

    def variance(self, tau: Tensor | float) -> Tensor:
        """V of pruning at ``tau`` > 0."""
        bin = self._bin(tau)
        return (tau * self._first[bin] - self._second[bin]) / self._squares

    def _bin(self, tau: Tensor | float) -> Tensor:
        """How many bins have magnitudes below ``tau``."""
        return (self._at < tau).sum()

    def tau_for_density(self, density: float) -> Tensor:
        """The threshold at which E[density] is ``density``; 0 where there are no more non-zeros, or any is not finite."""
        above = self._nonzeros - self._below
        wanted = density * self._numel
        bin = _first(self._first / self._edges + above <= wanted)
        return self._or_none(self._first[bin] / (wanted - above[bin]), self._nonzeros > wanted)

    def tau_for_variance(self, variance: float) -> Tensor:
        """The threshold at which V is ``variance``; 0 for 0, for all zeros, or where any is not finite."""
        wanted = variance * self._squares
        bin = _first(self._edges * self._first - self._second >= wanted)
        return self._or_none((wanted + self._second[bin]) / self._first[bin], wanted > 0)

    def _or_none(self, tau: Tensor, prunes: Tensor) -> Tensor:
        return torch.where(prunes & (self._others == 0), tau, 0.0)


def _first(where: Tensor) -> Tensor:
    """The index of the first that is True."""
    return where.to(torch.uint8).argmax()
