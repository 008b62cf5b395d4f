# SPDX-License-Identifier: Apache-2.0
"""A model with sparse and with dense convolutions, in turns on the same batches."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsebwd import DensityMonitor, SparseConv2d, revert
from sparsebwd.train.measure import KINDS, BackwardTimer

from .convolutions import Convolution, watching
from .phases import WARMUP, PhaseTimer, median_ms
from .terminal import Table
from .timing import Call, interleave

SIDES = ("dense", "sparse")

MB = 1e6

_CPU = torch.device("cpu")

_OFFSET_BYTES = 2  # of a non-zero in a compressed gradient, beside its value

Batch = tuple[Tensor, Tensor]


class LayerTimer(BackwardTimer):
    """Tells layers apart, too: `layers` has the seconds of each convolution. `layer` is the one that comes next."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        super().__init__(synchronize)
        self.layers: Counter[str] = Counter()
        self.layer = ""

    def record(self, kind: str, seconds: float) -> None:
        super().record(kind, seconds)
        if kind == "convolution":
            self.layers[self.layer] += seconds


class Side:
    """Copies of a model and its optimiser as they are now, dense or sparse.

    The learning rate is 0: a step does all the work of a step, and the weights stay those that were trained.

    loss: of the copy on a batch. phases: takes the steps. kinds, layers: seconds in each step taken so far, by the names of each.

    Args:
        model: converted; `name` "dense" reverts the copy.
        loss: of a model on a batch.
        device: that the model is on; each time begins and ends with nothing left to do there.
        clock: times the phases, in seconds.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[nn.Module, Batch], Tensor],
        device: torch.device = _CPU,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.optimizer = copy.deepcopy((model, optimizer))
        if name == "dense":
            revert(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
        self.phases = PhaseTimer(self._synchronize, clock)
        self.kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.layers: dict[str, list[float]] = {}
        self.convolutions: dict[str, Convolution] = {}
        self.loss = partial(loss, self.model)

    def step(self, batch: Batch) -> None:
        """A training step, timed by phases."""
        self.phases.step(self.optimizer, partial(self.loss, batch))

    def backward_in_parts(self, batch: Batch) -> None:
        """Forward, and a backward pass whose operations are timed one by one."""
        self.optimizer.zero_grad()
        timer = LayerTimer(self._synchronize)

        def arrived(convolution: Convolution, gradient: Tensor) -> None:
            self.convolutions[convolution.name] = convolution
            timer.layer = convolution.name

        with watching(self.model, arrived):
            loss = self.loss(batch)
            with timer:
                loss.backward()
        for samples, seconds in ((self.kinds, timer.seconds), (self.layers, timer.layers)):
            for name, value in seconds.items():
                samples.setdefault(name, []).append(value)

    def densities(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """What a :class:`sparsebwd.DensityMonitor` says of steps on these batches; of no layers if none is sparse."""
        if not any(isinstance(module, SparseConv2d) for module in self.model.modules()):
            return {"layers": {}}
        with DensityMonitor(self.model) as monitor:
            for batch in batches:
                self.optimizer.zero_grad()
                self.loss(batch).backward()
        return monitor.as_dict()


def take_turns(
    sides: Mapping[str, Side], parts: Iterable[Callable[[Side, Batch], object]], batches: Sequence[Batch], seed: int
) -> None:
    """Each of `parts` of each side on each of the batches, of which the first :data:`.phases.WARMUP` are for warm-up."""
    # All in turns: the bound on the speed-up divides times of one kind of step by those of the other.
    calls = {
        f"{name} {part.__name__}": Call(partial(part, side), next_batch(batches, seed))
        for part in parts
        for name, side in sides.items()
    }
    interleave(calls, len(batches) - WARMUP, WARMUP)


def next_batch(batches: Sequence[Batch], seed: int) -> Callable[[], Batch]:
    """Returns one after the other; both sides drop out the same."""
    turns: Iterator[tuple[int, Batch]] = enumerate(batches)

    def following() -> Batch:
        turn, batch = next(turns)
        torch.manual_seed(seed + turn)
        return batch

    return following


def times(side: Side) -> dict[str, Any]:
    """Of steps and of steps in parts, for a record."""
    kinds = {kind: median_ms(samples) for kind, samples in side.kinds.items()}
    return {**side.phases.times(), "kinds_ms": kinds}


def layers(sides: Mapping[str, Side], monitored: Mapping[str, Any], itemsize: int) -> list[dict[str, Any]]:
    """A record of each convolution, in the order of the forward pass, after steps in parts.

    Args:
        monitored: what `densities` says of the sparse side. A layer that is not sparse consumes all.
        itemsize: bytes of an element of a gradient.
    """
    dense = {"density": 1.0, "implementations": {"plain": 1}}
    # Nothing is recorded of a layer that found nothing to gain and was an nn.Conv2d.
    sparse = {name: record for name, record in monitored["layers"].items() if record["steps"]}
    found = [
        _layer(convolution, sparse.get(name, dense), sides, itemsize)
        for name, convolution in sides["sparse"].convolutions.items()
    ]
    return found[::-1]


def _layer(
    convolution: Convolution, monitored: Mapping[str, Any], sides: Mapping[str, Side], itemsize: int
) -> dict[str, Any]:
    problem, density = convolution.problem, monitored["density"]
    spent = {f"{name}_ms": median_ms(sides[name].layers[convolution.name]) for name in SIDES}
    elements = math.prod(problem.output_size)
    return {
        "layer": convolution.name,
        "problem": str(problem),
        "needs_grad_input": convolution.needs_grad_input,
        "macs": problem.macs * (1 + convolution.needs_grad_input),
        "density": density,
        "implementation": ", ".join(monitored["implementations"]),
        **spent,
        "speedup": spent["dense_ms"] / spent["sparse_ms"],
        "dense_bytes": elements * itemsize,
        "compressed_bytes": round(elements * density * (itemsize + _OFFSET_BYTES)),
    }


def density_of_macs(layers: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the layers by their multiply-adds; None if there are none."""
    return statistics.fmean(*zip(*((layer["density"], layer["macs"]) for layer in layers))) if layers else None


def layer_table(title: str, layers: Sequence[Mapping[str, Any]]) -> Table:
    """From what `layers` returned."""
    return Table(
        title,
        ("layer", "problem", "density", "ran", "dense ms", "sparse ms", "speed-up", "dense MB", "compressed MB"),
        [
            (
                layer["layer"],
                layer["problem"],
                f"{layer['density']:.3f}",
                layer["implementation"],
                *(f"{layer[f'{name}_ms']:.2f}" for name in SIDES),
                f"{layer['speedup']:.2f}x",
                *(f"{layer[name] / MB:.1f}" for name in ("dense_bytes", "compressed_bytes")),
            )
            for layer in layers
        ],
        ("layer", "problem", "ran"),
        optional=("compressed MB", "dense MB", "problem", "ran"),
    )
