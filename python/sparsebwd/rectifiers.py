# SPDX-License-Identifier: Apache-2.0
"""Rectifiers: between which values of its input one passes the gradient, and whether that leaves a large part of it zero."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

Bounds = tuple[float, float]

LARGE_PART = 0.125
"""A rectifier zeroes at least this part of a gradient, if the output of the convolution is standard normal."""


class Affine(NamedTuple):
    """A value as scale * output of the convolution + shift, as far as constants say."""

    scale: float = 1.0
    shift: float = 0.0


ABOVE_ZERO = Affine(0.1, 1.0)  # stands for any value that is not negative


ITSELF = Affine()


def passed_by(bounds: Bounds, value: Affine) -> Bounds:
    low, high = sorted((bound - value.shift) / value.scale for bound in bounds)
    return low, high


def _share(bounds: Bounds) -> float:
    """Of a standard normal distribution, what is between them."""
    return 0.5 * (math.erf(bounds[1] / math.sqrt(2)) - math.erf(bounds[0] / math.sqrt(2)))


def complement(passed: list[Bounds]) -> bool:
    """Whether several rectifiers together pass too much of a gradient to leave a large part zero, as relu(x) and relu(-x)."""
    share, reached = 0.0, -math.inf
    for low, high in sorted(passed):
        if high > reached:
            share += _share((max(low, reached), high))
            reached = high
    return len(passed) > 1 and 1 - share < LARGE_PART


def rectifies(bounds: Bounds, value: Affine = ITSELF) -> bool:
    """Whether a function that passes the gradient between ``bounds`` of ``value`` zeroes a large part of it.

    It does not where it only cuts off large values on both sides, seen from itself or from the convolution.
    """
    if bounds[0] < 0 < bounds[1]:
        return False
    return 1 - _share(passed_by(bounds, value)) >= LARGE_PART


def shrinks(size: float, value: Affine = ITSELF) -> bool:
    """Whether a function that zeroes what is between -size and size zeroes a large part of the gradient."""
    return _share(passed_by((-size, size), value)) >= LARGE_PART


def bounds_of(module: nn.Module) -> Bounds | None:
    """Between which values a module passes the gradient; None if it is no rectifier."""
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    if isinstance(module, nn.Threshold):
        return float(module.threshold), math.inf
    if isinstance(module, nn.ReLU) or isinstance(module, nn.LeakyReLU) and module.negative_slope == 0:
        return 0.0, math.inf
    return None
