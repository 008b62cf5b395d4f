# SPDX-License-Identifier: Apache-2.0
"""How a budget of noise is shared among the layers, so that the backward pass takes least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..nn import SparseConv2d
from .measure import RATIOS, Call


@dataclass
class Curves:
    """Of one layer, at all ratios tau / sigma that it may have.

    ratios: float64[m], rising; 0: not pruned. noise: what its pruning adds. time: of the convolutions that its pruning makes
    faster, in multiply-adds of dense ones; multiply_adds: those that are left; dense: those of dense ones. fixed: the ratio
    that a layer has which says itself how much it prunes.
    """

    layer: SparseConv2d
    ratios: Tensor
    noise: Tensor
    time: Tensor
    multiply_adds: Tensor
    dense: float
    fixed: float

    def or_dense(self) -> Curves:
        """The choice between the fixed ratio and 0."""
        values = [torch.tensor(pair, dtype=torch.float64) for pair in zip(self.at(0.0), self.at(self.fixed))]
        return replace(self, ratios=torch.tensor([0.0, self.fixed], dtype=torch.float64), **dict(zip(_VALUES, values)))

    def at(self, ratio: float) -> tuple[float, float, float]:
        """(noise, time, multiply_adds) there, interpolated."""
        high = int(torch.searchsorted(self.ratios, ratio).clamp(1, len(self.ratios) - 1))
        low = high - 1
        step = (self.ratios[high] - self.ratios[low]).item()
        part = min(max((ratio - self.ratios[low].item()) / step, 0.0), 1.0)
        return tuple((curve[low] + part * (curve[high] - curve[low])).item() for curve in (getattr(self, name) for name in _VALUES))


_VALUES = ("noise", "time", "multiply_adds")


def curves_of(calls: Sequence[Call]) -> list[Curves]:
    """Those of each layer that prunes. Layers that are called several times have one threshold and the sum of all."""
    found: dict[SparseConv2d, Curves] = {}
    for place, call in enumerate(calls):
        if call.noise is None:
            continue
        noise, density = call.noise, call.density
        consumer = call
        if call.layer.pruning.placement == "input":
            # What it prunes reaches the layer before, on top of the zeros there.
            consumer = calls[place - 1] if place > 0 else None
            density = density / density[0] * consumer.natural if consumer is not None else density
        time = left = torch.zeros_like(noise)
        dense = 0.0
        if consumer is not None:
            dense = dense_work([consumer])
            time, left = _work(consumer, density)
        if call.layer.pruning.where == "faster":
            # Where nothing is gained nothing is pruned.
            stays = time >= time[0]
            noise = torch.where(stays, 0.0, noise)
            left = torch.where(stays, left[0], left)
        if known := found.get(call.layer):
            noise, time, left, dense = known.noise + noise, known.time + time, known.multiply_adds + left, known.dense + dense
        found[call.layer] = Curves(call.layer, RATIOS, noise, time, left, dense, call.ratio.item())
    return list(found.values())


def _work(call: Call, density: Tensor) -> tuple[Tensor, Tensor]:
    """(time, multiply-adds) of both convolutions of a layer that consume a gradient of such densities."""
    macs = float(call.problem.macs)
    parts = [limit for limit, wanted in zip(call.limits, (call.needs_grad_input, call.layer.weight.requires_grad)) if wanted]
    time = sum(macs * (density / limit if limit > 0 else torch.ones_like(density)).clamp(max=1) for limit in parts)
    return time, len(parts) * macs * density


def dense_work(calls: Sequence[Call]) -> float:
    """Multiply-adds of the backward passes of all calls, dense."""
    return float(sum(call.problem.macs * (call.needs_grad_input + call.layer.weight.requires_grad) for call in calls))


def share(curves: Sequence[Curves], budget: float, stretch: bool = True) -> list[float]:
    """The ratio of each layer: total time is least among those whose noise is at most ``budget``.

    At the optimum the last bit of noise buys as much time in every layer: each minimises time + price * noise, at the one
    price at which the budget is met. ``stretch``: what then is left, as curves have corners, goes to all layers that are
    pruned.
    """
    if not curves:
        return []

    def at_price(price: float) -> list[int]:
        return [int((curve.time + price * curve.noise).argmin()) for curve in curves]

    def total(chosen: Sequence[int]) -> float:
        return sum(curve.noise[index].item() for curve, index in zip(curves, chosen))

    time = sum(curve.time[0].item() for curve in curves)
    low, high = 1e-12 * time / max(budget, 1e-300), 1e12 * time / max(budget, 1e-300)
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if total(at_price(middle)) <= budget else (middle, high)
    ratios = [curve.ratios[index].item() for curve, index in zip(curves, at_price(high))]
    return _stretched(curves, ratios, budget) if stretch else ratios


def _stretched(curves: Sequence[Curves], ratios: list[float], budget: float) -> list[float]:
    """All ratios times the largest factor, up to 2, that keeps the noise within the budget."""

    def noise(factor: float) -> float:
        return sum(curve.at(min(factor * ratio, curve.ratios[-1].item()))[0] for curve, ratio in zip(curves, ratios))

    low, high = 1.0, 2.0
    if not any(ratios) or noise(1.0) > budget:
        return ratios
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if noise(middle) <= budget else (low, middle)
    return [min(low * ratio, curve.ratios[-1].item()) for curve, ratio in zip(curves, ratios)]
