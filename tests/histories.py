# SPDX-License-Identifier: Apache-2.0
"""A model of the history of sigma, in plain Python, for tests of predicted thresholds."""

from __future__ import annotations

import math

import numpy as np
import torch

from sparsebwd import reference

LENGTH = reference.SIGMA_HISTORY
def empty_history() -> torch.Tensor:
    return torch.zeros(1 + LENGTH, dtype=torch.int32)


class Model:
    """The same in plain Python."""

    def __init__(self) -> None:
        self.recorded: list[float] = []

    def predict(self, sigma: float) -> float:
        last = self.places()
        total = 0.0
        for value in last:
            total += value
        mean = float(np.float32(total / len(last))) if last else 0.0
        if 0 < sigma < math.inf:
            self.recorded.append(sigma)
        return mean if mean > 0 else sigma

    def places(self) -> list[float]:
        """The last few values recorded: value i at i % LENGTH."""
        last = self.recorded[:LENGTH]
        for i, value in enumerate(self.recorded[LENGTH:]):
            last[i % LENGTH] = value
        return last

    def check(self, history: torch.Tensor) -> None:
        last = self.places()
        bits = np.array(last + [0.0] * (LENGTH - len(last)), dtype=np.float32).view(np.int32)
        assert history.dtype == torch.int32 and history.tolist() == [len(self.recorded), *bits.tolist()]


def tau_of(sigma: float, dtype: torch.dtype, percentile: float = 90.0) -> torch.Tensor:
    tau = torch.tensor(np.float32(sigma * reference.quantile(percentile))).to(dtype).float()
    return tau if torch.isfinite(tau) else torch.zeros(())


def sigmas(history: torch.Tensor) -> list[float]:
    """What is recorded in it, in the order of its places."""
    return history[1:].view(torch.float32)[: history[0]].tolist()
