# SPDX-License-Identifier: Apache-2.0
"""What is measured while training, and what is made of it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {
    "aten::convolution_backward": "convolution",
    "sparsebwd::conv2d_backward": "convolution",
    "aten::native_batch_norm_backward": "batch_norm",
    "aten::batch_norm_backward": "batch_norm",
    "aten::threshold_backward": "relu",
    "aten::max_pool2d_with_indices_backward": "pooling",
    "aten::avg_pool2d_backward": "pooling",
    "aten::_adaptive_avg_pool2d_backward": "pooling",
    "aten::mm": "linear",
    "aten::addmm": "linear",
}

KINDS = (*dict.fromkeys(_KINDS.values()), "other")
"""The kinds of operations that a `BackwardTimer` tells apart."""


class BackwardTimer(TorchDispatchMode):
    """Sums the times of the operations of a backward pass by kind, while active.

    It costs each operation some microseconds: times of whole steps are taken without it.

    seconds: of each of `KINDS`; "convolution" is the backward pass of all convolutions, dense and sparse, with pruning.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._synchronize = synchronize

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._synchronize()
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self._synchronize()
        self.record(_KINDS.get(func.name().partition(".")[0], "other"), time.perf_counter() - start)
        return result

    def record(self, kind: str, seconds: float) -> None:
        """Called after each operation."""
        self.seconds[kind] += seconds


@dataclass
class EpochTally:
    """Sums and times of one model over the steps of an epoch so far. Plain values: it goes into checkpoints.

    loss, correct, images: sums over the images of all processes. step, forward, backward: seconds of each step that
    was not measured; conv_backward: seconds of each that was. layers: for each layer and "" for all together, and
    for each of density, sigma and tau, [sum, count] over the measured steps.
    """

    loss: float = 0.0
    correct: float = 0.0
    images: float = 0.0
    step: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    conv_backward: list[float] = field(default_factory=list)
    layers: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add_densities(self, record: dict[str, Any]) -> None:
        """`record` is what `DensityMonitor.as_dict` says of one step."""
        for name, values in [("", record["total"]), *record["layers"].items()]:
            sums = self.layers.setdefault(name, {})
            for quantity in ("density", "sigma", "tau"):
                # Where gradients overflow, and a scaler skips the step, sigma is infinite.
                if values[quantity] is not None and math.isfinite(values[quantity]):
                    entry = sums.setdefault(quantity, [0.0, 0])
                    entry[0] += values[quantity]
                    entry[1] += 1

    def row(self) -> dict[str, Any]:
        """Means and medians; None where nothing was recorded."""
        layers = {
            name: {quantity: total / count for quantity, (total, count) in sums.items()}
            for name, sums in self.layers.items()
        }
        return {
            "train_loss": self.loss / self.images if self.images else None,
            "train_accuracy": self.correct / self.images if self.images else None,
            "step_ms": _median_ms(self.step),
            "forward_ms": _median_ms(self.forward),
            "backward_ms": _median_ms(self.backward),
            "conv_backward_ms": _median_ms(self.conv_backward),
            "density": layers.pop("", {}).get("density"),
            "layers": layers,
        }


TIMES = ("step_ms", "forward_ms", "backward_ms", "conv_backward_ms")


def speedups(variants: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """For each time, the dense model's divided by the sparse one's; None where either was not measured."""
    result = {}
    for time_name in TIMES:
        sparse, dense = (variants.get(name, {}).get(time_name) for name in ("sparse", "dense"))
        result[time_name.removesuffix("_ms")] = dense / sparse if sparse and dense else None
    return result


def summarize(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The end of a run: results of its last epoch, and times as medians over all epochs."""
    last = history[-1]
    variants = {}
    for name, row in last["variants"].items():
        times = {time_name: _median(entry["variants"][name][time_name] for entry in history) for time_name in TIMES}
        variants[name] = {**row, **times}
    return {
        "epoch": last["epoch"],
        "global_step": last["global_step"],
        "variants": variants,
        "speedup": speedups(variants),
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _median_ms(seconds: list[float]) -> float | None:
    return 1e3 * statistics.median(seconds) if seconds else None
