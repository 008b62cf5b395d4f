# SPDX-License-Identifier: Apache-2.0
"""Training steps, timed by phases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # not on Windows
    resource = None

PHASES = ("total", "forward", "backward", "optimizer")

WARMUP = 2
"""First steps that do not count."""


class PhaseTimer:
    """Takes steps. seconds: of each phase, in each step taken so far; "total" is the sum of the others.

    Args:
        synchronize: waits until a device has done what it was given; phases begin and end there.
        clock: in seconds.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._synchronize, self._clock = synchronize, clock
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._faults: list[int] = []

    def step(self, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        """zero_grad(), `loss()`, its backward pass, and the optimiser's step."""
        faults = _page_faults()
        begin = self._now()
        optimizer.zero_grad()
        cleared = self._now()
        value = loss()
        middle = self._now()
        value.backward()
        after = self._now()
        optimizer.step()
        end = self._now()
        seconds = (end - begin, middle - cleared, after - middle, (cleared - begin) + (end - after))
        for phase, value in zip(PHASES, seconds):
            self.seconds[phase].append(value)
        if faults is not None:
            self._faults.append(_page_faults() - faults)

    def _now(self) -> float:
        self._synchronize()
        return self._clock()

    def times(self) -> dict[str, object]:
        """For a record: medians, and `iqr_ms`."""
        return {
            **{f"{phase}_ms": median_ms(samples) for phase, samples in self.seconds.items()},
            "iqr_ms": {phase: iqr_ms(samples) for phase, samples in self.seconds.items()},
        }

    def page_faults(self) -> int | None:
        """In a step, median; None where the system does not say."""
        return round(statistics.median(self._faults[WARMUP:])) if self._faults else None


def _page_faults() -> int | None:
    """Pages of memory that this process has asked the system for so far."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def median_ms(samples: Sequence[float]) -> float:
    """Of samples in seconds, without the first for warm-up."""
    return 1e3 * statistics.median(samples[WARMUP:])


def iqr_ms(samples: Sequence[float]) -> float:
    """Their interquartile range."""
    low, _, high = statistics.quantiles(samples[WARMUP:], n=4, method="inclusive")
    return 1e3 * (high - low)
