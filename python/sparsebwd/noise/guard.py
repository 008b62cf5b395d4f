# SPDX-License-Identifier: Apache-2.0
"""Watches the loss of a training run: whether it has run away, as it does where pruning adds too much noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed

STEPS = 10
"""Losses are looked at so many at a time."""

_NEWEST = 0.5  # share of the newest mean in what is compared
_SMOOTH = 0.2  # and in what the lowest is taken of
_TIMES, _PLUS = 1.5, 0.1


class LossGuard:
    """Says when the loss has risen to more than 1.5 times its lowest, plus a tenth of the first, or is not finite; both
    smoothed over a few tens of steps.

    On a GPU means are read a while after they are known, so that nothing waits.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count = 0
        self._late: tuple[Tensor, torch.cuda.Event] | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew: what the loss was until now is no measure."""
        self._first = self._recent = self._smooth = self._lowest = None

    def runs_away(self, loss: Tensor) -> bool:
        """Take the loss of the next step."""
        loss = loss.detach().float()
        self._total = loss.clone() if self._total is None else self._total + loss
        self._count += 1
        if self._count < STEPS:
            return False
        mean = self._total / STEPS
        self._total, self._count = None, 0
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(mean)
            mean = mean / distributed.get_world_size()
        known = self._exchange(mean)
        return known is not None and self._judge(known)

    def _exchange(self, mean: Tensor) -> float | None:
        """``mean`` on a CPU; on a GPU the one before."""
        if not mean.is_cuda:
            return mean.item()
        before = self._read_late()
        pinned = torch.empty((), pin_memory=True).copy_(mean, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._late = pinned, event
        return before

    def _read_late(self) -> float | None:
        if self._late is None:
            return None
        self._late[1].synchronize()
        return self._late[0].item()

    def _judge(self, mean: float) -> bool:
        if not math.isfinite(mean):
            return True
        if self._first is None:
            self._first = self._recent = self._smooth = self._lowest = mean
            return False
        self._recent += _NEWEST * (mean - self._recent)
        self._smooth += _SMOOTH * (mean - self._smooth)
        self._lowest = min(self._lowest, self._smooth)
        return self._recent > _TIMES * self._lowest + _PLUS * abs(self._first)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and None."""
        return {
            "total": None if self._total is None else self._total.item(),
            "count": self._count,
            "late": self._read_late(),
            "first": self._first,
            "recent": self._recent,
            "smooth": self._smooth,
            "lowest": self._lowest,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._count = state["count"]
        self._total = None if state["total"] is None else torch.tensor(state["total"], device=device)
        self._first, self._recent = state["first"], state["recent"]
        self._smooth, self._lowest = state["smooth"], state["lowest"]
        self._late = None
        if state["late"] is not None:
            self._exchange(torch.tensor(state["late"], device=device))
