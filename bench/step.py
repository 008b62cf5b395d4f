# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench step``: whole training steps, dense and sparse, at moments of a training run.

docs/steps.md says what each number means.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

from sparsebwd import DensityMonitor, revert
from sparsebwd.train import Trainer
from sparsebwd.train.config import DTYPES
from sparsebwd.train.measure import KINDS, BackwardTimer

from . import training
from .convolutions import Convolution, watching
from .environment import command_line
from .memory import backward_peaks
from .phases import PHASES, WARMUP, PhaseTimer, median_ms
from .terminal import FILE, Table, check_writable, fail, measuring, report
from .timing import Call, interleave

SIDES = ("dense", "sparse")

_OFFSET_BYTES = 2  # of a non-zero in a compressed gradient, beside its value
_MB = 1e6

Batch = tuple[Tensor, Tensor]


def command(
    model: training.Model = "resnet18",
    data: training.Data = "digits",
    data_dir: training.DataDir = None,
    cache_dir: training.CacheDir = None,
    image_size: training.ImageSize = 32,
    steps: training.Steps = "10,150,300",
    batch: training.Batch = 64,
    percentile: training.Percentile = "90",
    placement: training.Placement = "auto",
    backend: training.Backend = "auto",
    learning_rate: training.LearningRate = None,
    dtype: training.Dtype = "float32",
    layout: training.Layout = "channels_last",
    threads: training.Threads = None,
    seed: training.Seed = 0,
    repeats: Annotated[
        int, typer.Option(min=3, help=f"Steps of which the median is taken, after {WARMUP} for warm-up.")
    ] = 7,
    json: Annotated[Path | None, typer.Option(help="Write environment, setting and results.", **FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables.", **FILE)] = None,
) -> None:
    """Time whole training steps, dense and sparse in turns, at moments of a training run.

    One model is trained with pruned gradients. After each number of --steps, copies of it with sparse and with dense
    convolutions take steps on the same batches, from the same weights.
    """
    given = locals()
    when = training.parse_steps(steps)
    check_writable(json=json, markdown=markdown)
    trainer = training.prepare(given)
    setting = {name: value for name, value in given.items() if name not in ("json", "markdown")}
    setting |= {
        "data_dir": None if data_dir is None else str(data_dir),
        "cache_dir": None if cache_dir is None else str(cache_dir),
        "steps": when,
        "percentile": trainer.config.percentile,
        "placement": training.placement_of(training.model_of(trainer)),
        "learning_rate": trainer.config.learning_rate_at(0, 1),
        "threads": torch.get_num_threads(),
        # On this number of threads.
        "command": command_line(given | {"threads": torch.get_num_threads(), "json": None, "markdown": None}, "step"),
    }
    points: list[dict[str, Any]] = []
    try:
        with measuring() as environment:
            for step in when:
                training.train_to(trainer, step)
                trainer.reporter.say(f"measuring after step {step}")
                points.append(measure(trainer, repeats))
    except RuntimeError as error:
        fail(f"error: {error}")
    except KeyboardInterrupt:
        fail("interrupted: no file is written", status=130)
    tables = [_overview(setting, points), *itertools.chain(*map(_tables, points))]
    report(tables, {"environment": environment, "setting": setting, "points": points}, json, markdown)


# ---- measuring


class LayerTimer(BackwardTimer):
    """Tells layers apart, too: `layers` has the seconds of each convolution. `layer` is the one that comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Counter[str] = Counter()
        self.layer = ""

    def record(self, kind: str, seconds: float) -> None:
        super().record(kind, seconds)
        if kind == "convolution":
            self.layers[self.layer] += seconds


class Side:
    """The model as it is at this step of training, dense or sparse, with an optimiser of its own.

    Its learning rate is 0: a step does all the work of a step, and the weights stay those that were trained.

    phases: takes the steps. kinds, layers: seconds in each step taken so far, by the names of each.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        twin = trainer.twins[0]
        self._trainer = trainer
        self.model, self.optimizer = copy.deepcopy((twin.model, twin.optimizer))
        if name == "dense":
            revert(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.phases = PhaseTimer()
        self.kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.layers: dict[str, list[float]] = {}
        self.convolutions: dict[str, Convolution] = {}

    def step(self, batch: Batch) -> None:
        """A training step, timed by phases."""
        self.phases.step(self.optimizer, partial(self._loss, batch))

    def backward_in_parts(self, batch: Batch) -> None:
        """Forward, and a backward pass whose operations are timed one by one."""
        self.optimizer.zero_grad()
        timer = LayerTimer()

        def arrived(convolution: Convolution, gradient: Tensor) -> None:
            self.convolutions[convolution.name] = convolution
            timer.layer = convolution.name

        with watching(self.model, arrived):
            loss = self._loss(batch)
            with timer:
                loss.backward()
        for samples, seconds in ((self.kinds, timer.seconds), (self.layers, timer.layers)):
            for name, value in seconds.items():
                samples.setdefault(name, []).append(value)

    def densities(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """What a :class:`sparsebwd.DensityMonitor` says of steps on these batches."""
        with DensityMonitor(self.model) as monitor:
            for batch in batches:
                self.optimizer.zero_grad()
                self._loss(batch).backward()
        return monitor.as_dict()

    def _loss(self, batch: Batch) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self._trainer.forward(self.model, inputs), labels)


def measure(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """One point of the result: the model as trained so far, on the batches that come next in training."""
    step = trainer.steps_done
    batches = [trainer.batch(step + turn) for turn in range(WARMUP + repeats)]
    sides = {name: Side(trainer, name) for name in SIDES}
    # All in turns: the bound divides times of one kind of step by those of the other.
    parts = {"whole": Side.step, "in parts": Side.backward_in_parts}
    calls = {
        f"{name} {part}": Call(partial(function, side), _next(batches, trainer.config.seed))
        for part, function in parts.items()
        for name, side in sides.items()
    }
    interleave(calls, repeats, WARMUP)
    monitored = sides["sparse"].densities(batches[WARMUP:])
    layers = [
        _layer(convolution, monitored["layers"][name], sides, DTYPES[trainer.config.dtype].itemsize)
        for name, convolution in sides["sparse"].convolutions.items()
    ][::-1]
    times = {name: _times(side) for name, side in sides.items()}
    weights = [layer["macs"] for layer in layers]
    density = {
        "elements": monitored["total"]["density"],
        "macs": statistics.fmean((layer["density"] for layer in layers), weights),
    }
    for side in sides.values():
        side.optimizer.zero_grad()
    memory: dict[str, Any] = backward_peaks(
        {name: side.model for name, side in sides.items()}, *batches[WARMUP], DTYPES[trainer.config.dtype]
    )
    memory["gradients"] = {
        name: {"sum": sum(sizes), "largest": max(sizes)}
        for name in ("dense_bytes", "compressed_bytes")
        for sizes in [[layer[name] for layer in layers]]
    }
    return {
        "step": step,
        "density": density,
        **times,
        "speedup": _speedups(times),
        "bound": bounds(density["macs"], times["dense"]["total_ms"], times["dense"]["kinds_ms"]["convolution"]),
        "memory": memory,
        "layers": layers,
    }


def bounds(density: float, step_ms: float, convolution_ms: float) -> dict[str, float]:
    """How much faster a step can get at most if the backward convolutions take `density` of their dense time.

    ideal: a step that is convolutions only, all three of equal cost. measured: a dense step of `step_ms`, of which the
    backward convolutions take `convolution_ms`, and the rest stays as it is.
    """
    return {"ideal": 3 / (1 + 2 * density), "measured": step_ms / (step_ms - convolution_ms * (1 - density))}


def _next(batches: Sequence[Batch], seed: int) -> Callable[[], Batch]:
    """The next batch; both sides drop out the same."""
    turns: Iterator[tuple[int, Batch]] = enumerate(batches)

    def next_batch() -> Batch:
        turn, batch = next(turns)
        torch.manual_seed(seed + turn)
        return batch

    return next_batch


def _times(side: Side) -> dict[str, Any]:
    return {
        **side.phases.times(),
        "kinds_ms": {kind: median_ms(samples) for kind, samples in side.kinds.items()},
    }


def _speedups(times: Mapping[str, dict[str, Any]]) -> dict[str, float | None]:
    """Dense / sparse of each phase and kind; None for a kind that the model does not have."""
    dense, sparse = (
        {phase: times[name][f"{phase}_ms"] for phase in PHASES} | times[name]["kinds_ms"] for name in SIDES
    )
    return {part: dense[part] / sparse[part] if sparse[part] else None for part in dense}


def _layer(
    convolution: Convolution, monitored: Mapping[str, Any], sides: Mapping[str, Side], itemsize: int
) -> dict[str, Any]:
    problem, density = convolution.problem, monitored["density"]
    times = {f"{name}_ms": median_ms(sides[name].layers[convolution.name]) for name in SIDES}
    elements = math.prod(problem.output_size)
    return {
        "layer": convolution.name,
        "problem": str(problem),
        "needs_grad_input": convolution.needs_grad_input,
        "macs": problem.macs * (1 + convolution.needs_grad_input),
        "density": density,
        "implementation": ", ".join(monitored["implementations"]),
        **times,
        "speedup": times["dense_ms"] / times["sparse_ms"],
        "dense_bytes": elements * itemsize,
        "compressed_bytes": round(elements * density * (itemsize + _OFFSET_BYTES)),
    }


# ---- tables


def _overview(setting: Mapping[str, Any], points: Sequence[dict[str, Any]]) -> Table:
    percentile = setting["percentile"]
    pruning = "no pruning" if percentile is None else f"percentile {percentile:g}"
    return Table(
        f"{setting['model']}, {setting['data']}, batch {setting['batch']}, {pruning}, "
        f"{setting['dtype']}, {setting['layout']}, threads {setting['threads']}",
        ("after step", "density", "dense ms", "sparse ms", "speed-up", "bound", "ideal bound"),
        [
            (
                str(point["step"]),
                f"{point['density']['elements']:.3f}",
                *(f"{point[name]['total_ms']:.1f}" for name in SIDES),
                f"{point['speedup']['total']:.2f}x",
                *(f"{point['bound'][name]:.2f}x" for name in ("measured", "ideal")),
            )
            for point in points
        ],
        (),
    )


def _tables(point: dict[str, Any]) -> list[Table]:
    return [_step_table(point), _layer_table(point)]


def _step_table(point: dict[str, Any]) -> Table:
    def row(heading: str, part: str, cells: Iterable[str]) -> tuple[str, ...]:
        speedup = point["speedup"][part]
        return heading, *cells, "-" if speedup is None else f"{speedup:.2f}x"

    def phase(name: str) -> tuple[str, ...]:
        cells = (f"{point[side][f'{name}_ms']:.1f} ± {point[side]['iqr_ms'][name] / 2:.1f}" for side in SIDES)
        return row(name if name == "total" else f"  {name}", name, cells)

    kinds = [
        row(f"    {kind.replace('_', ' ')}", kind, (f"{point[side]['kinds_ms'][kind]:.1f}" for side in SIDES))
        for kind in KINDS
        if any(point[side]["kinds_ms"][kind] for side in SIDES)
    ]
    memory, density = point["memory"], point["density"]
    peaks = {
        name: " / ".join("unknown" if memory[side][name] is None else _mb(memory[side][name]) for side in SIDES)
        for name in ("allocated_bytes", "resident_bytes")
    }
    gradients = {
        size: " / ".join(_mb(memory["gradients"][name][size]) for name in ("dense_bytes", "compressed_bytes"))
        for size in ("sum", "largest")
    }
    return Table(
        f"After step {point['step']}",
        ("", "dense ms", "sparse ms", "speed-up"),
        [phase("total"), phase("forward"), phase("backward"), *kinds, phase("optimizer")],
        ("",),
        (
            f"density {density['elements']:.3f} of all elements, {density['macs']:.3f} of all multiply-adds",
            f"at most {point['bound']['measured']:.2f}x with these dense times; 3/(1+2 density) "
            f"{point['bound']['ideal']:.2f}x",
            f"peak of the backward pass, dense / sparse: tensors {peaks['allocated_bytes']} MB, resident "
            f"{peaks['resident_bytes']} MB",
            f"computed, gradients of all outputs dense / compressed: {gradients['sum']} MB, the largest "
            f"{gradients['largest']} MB",
        ),
    )


def _layer_table(point: dict[str, Any]) -> Table:
    return Table(
        f"Backward convolutions by layer, after step {point['step']}",
        ("layer", "problem", "density", "ran", "dense ms", "sparse ms", "speed-up", "dense MB", "compressed MB"),
        [
            (
                layer["layer"],
                layer["problem"],
                f"{layer['density']:.3f}",
                layer["implementation"],
                *(f"{layer[f'{name}_ms']:.2f}" for name in SIDES),
                f"{layer['speedup']:.2f}x",
                *(_mb(layer[name]) for name in ("dense_bytes", "compressed_bytes")),
            )
            for layer in point["layers"]
        ],
        ("layer", "problem", "ran"),
    )


def _mb(nbytes: int) -> str:
    return f"{nbytes / _MB:.1f}"
