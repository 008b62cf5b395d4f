# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench noise``: what pruning adds to the noise of weight gradients, and what it saves.

docs/noise.md says what each number means.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd

from sparsebwd import DensityMonitor, NoiseController, SparseConv2d, convert
from sparsebwd.noise.controller import BATCHES
from sparsebwd.noise.measure import weights_of
from sparsebwd.settings import WHERE
from sparsebwd.train import Trainer

from . import training
from .environment import command_line
from .phases import WARMUP
from .sides import Batch, Side, density_of_macs, take_turns
from .terminal import FILE, Table, check_writable, fail, measuring, report, warn

PICTURES = (".png", ".svg")


class Way(NamedTuple):
    """A way to prune, and values of the argument of :func:`sparsebwd.convert` that says how much."""

    name: str
    knob: str
    values: tuple[float, ...]
    options: dict[str, Any] = {}


WAYS = (
    Way("percentile", "percentile", (80, 90, 95, 98, 99.5, 99.95)),
    Way("image", "percentile", (80, 90, 95, 98, 99.5, 99.95), {"importance": "image"}),
    Way("density", "density", (0.4, 0.3, 0.25, 0.2, 0.15)),
    Way("variance", "variance", (0.03, 0.1, 0.3)),
    Way("noise", "noise", (0.03, 0.1, 0.3, 1.0)),
    Way("noise-none", "noise", (0.03, 0.1, 0.3, 1.0), {"importance": "none"}),
    Way("row", "density", (0.8, 0.65, 0.5), {"granularity": "row"}),
    Way("sample", "density", (0.9, 0.8, 0.65), {"granularity": "sample"}),
)
_NAMES = tuple(way.name for way in WAYS)

_TESTED = 8
"""Batches whose weight gradients are compared, none of which a controller has measured."""


def command(
    model: training.Model = "resnet18",
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first layer. Default: as published.")] = None,
    data: training.Data = "digits",
    data_dir: training.DataDir = None,
    cache_dir: training.CacheDir = None,
    image_size: training.ImageSize = 32,
    train_subset: Annotated[int | None, typer.Option(min=1, help="Train on so many images only.")] = None,
    steps: training.Steps = "20,150,400",
    batch_size: training.BatchSize = 64,
    ways: Annotated[str, typer.Option(help=f"Of {','.join(_NAMES)}: which, separated by commas.")] = ",".join(_NAMES),
    where: Annotated[str, typer.Option(help=" | ".join(WHERE))] = WHERE[0],
    learning_rate: training.LearningRate = None,
    layout: training.Layout = "channels_last",
    threads: training.Threads = None,
    seed: training.Seed = 0,
    draws: Annotated[int, typer.Option(min=2, help=f"Of pruned gradients, over {_TESTED} batches, for each mean.")] = 8,
    repeats: Annotated[
        int, typer.Option(min=0, help=f"Timed steps of each, after {WARMUP} for warm-up; 0: none is timed.")
    ] = 7,
    json: Annotated[Path | None, typer.Option(help="Write environment, setting and results.", **FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables.", **FILE)] = None,
    plot: Annotated[list[Path] | None, typer.Option(help="Write a .png or .svg. May be repeated.", **FILE)] = None,
) -> None:
    """Measure the noise that pruning adds to weight gradients, and the time it saves, at moments of a dense training run.

    After each number of --steps, copies of the model are pruned in each way, by each of its values. Of the groups, rows and
    samples, the values are densities.
    """
    given = locals()
    chosen = _chosen(ways)
    if where not in WHERE:
        raise typer.BadParameter(f"where: got {where!r}; accepted: {', '.join(WHERE)}", param_hint="--where")
    for path in plot or ():
        if path.suffix.lower() not in PICTURES:
            raise typer.BadParameter(f"plot: got {str(path)!r}; accepted: {' or '.join(PICTURES)}", param_hint="--plot")
        check_writable(plot=path)
    if batch_size < 4:
        raise typer.BadParameter(
            f"batch_size: got {batch_size}; accepted: 4 and more, as controllers measure halves", param_hint="--batch-size"
        )
    when = training.parse_steps(steps)
    check_writable(json=json, markdown=markdown)
    files = ("json", "markdown", "plot")
    trainer = training.prepare(given | {"percentile": "none", "dense": True})
    setting = {name: value for name, value in given.items() if name not in files}
    setting |= {name: None if given[name] is None else str(given[name]) for name in ("data_dir", "cache_dir")}
    setting |= {
        "steps": when,
        "threads": torch.get_num_threads(),
        "command": command_line(given | {"threads": torch.get_num_threads()} | dict.fromkeys(files), "noise"),
    }
    points: list[dict[str, Any]] = []
    try:
        with measuring() as environment:
            for step in when:
                training.train_to(trainer, step)
                trainer.reporter.say(f"measuring after step {step}")
                points.append(measure(trainer, chosen, where, draws, repeats))
    except RuntimeError as error:
        fail(f"error: {error}")
    except KeyboardInterrupt:
        fail("interrupted: no file is written", status=130)
    record = {"environment": environment, "setting": setting, "points": points}
    report(tables(setting, points), record, json, markdown)
    if plot:
        draw(plot, record)


def _chosen(text: str) -> list[Way]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _NAMES:
            raise typer.BadParameter(f"ways: got {name!r}; accepted: {', '.join(_NAMES)}", param_hint="--ways")
    return [way for way in WAYS if way.name in names]


def draw(paths: Sequence[Path], record: dict[str, Any]) -> None:
    """Write pictures of the results."""
    try:
        from . import noise_plot
    except ModuleNotFoundError as error:
        warn(f"plot: pictures need {error.name}: pip install matplotlib")
        return
    for path in paths:
        noise_plot.write(path, record)


# ---- measuring


def measure(trainer: Trainer, ways: Sequence[Way], where: str, draws: int, repeats: int) -> dict[str, Any]:
    """One point of the result: the model as trained so far, on the batches that come next in training."""
    step = trainer.steps_done
    # What a controller measures on is none of those that tell whether it was right.
    batches = [trainer.batch(step + turn) for turn in range(BATCHES + _TESTED)]
    seen, tested = batches[:BATCHES], batches[BATCHES:]
    model = copy.deepcopy(training.model_of(trainer)).train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()  # or gradients would differ by what is dropped
    exact = _Exact(trainer, model, tested)
    macs = {found.name: found.problem.macs * (1 + found.needs_grad_input) for found in training.convolutions(trainer)}
    sides = {"dense": _side(trainer, "dense", model)}
    rows = []
    for way, value in itertools.chain(*(zip(itertools.repeat(way), way.values) for way in ways)):
        pruned, said = _pruned(trainer, model, way, value, where, seen)
        with DensityMonitor(pruned) as monitor:
            noises = list(exact.noises(pruned, -(-draws // _TESTED)))
        recorded = monitor.as_dict()["layers"]
        densities = {name: recorded[name]["density"] if name in recorded else None for name in macs}
        layers = [{"macs": macs[name], "density": 1.0 if found is None else found} for name, found in densities.items()]
        rows.append(
            {
                "way": way.name,
                "value": value,
                "noise": statistics.fmean(noises),
                "noise_error": statistics.stdev(noises) / len(noises) ** 0.5,
                "density": density_of_macs(layers),
                "controller": said,
            }
        )
        sides[f"{way.name} {value:g}"] = _side(trainer, "sparse", pruned)
        trainer.reporter.say(f"{way.name} {value:g}: noise {rows[-1]['noise']:.4f}, density {rows[-1]['density']:.3f}")
    return {"step": step, "rows": rows, "dense": take_times(trainer, sides, rows, repeats)}


def take_times(
    trainer: Trainer, sides: Mapping[str, Side], rows: Sequence[dict[str, Any]], repeats: int
) -> dict[str, Any] | None:
    """Time steps of all sides in turns; adds the times of each but the first, the dense one, to its row. Returns those of that."""
    for row in rows:
        row["speedup"] = None
    if not repeats:
        return None
    first = trainer.steps_done + BATCHES + _TESTED
    batches = [trainer.batch(first + turn) for turn in range(WARMUP + repeats)]
    take_turns(sides, (Side.step,), batches, trainer.config.seed)
    dense, *others = (side.phases.times() for side in sides.values())
    for row, spent in zip(rows, others):
        row["times"] = spent
        row["speedup"] = {part: dense[f"{part}_ms"] / spent[f"{part}_ms"] for part in ("total", "backward")}
    return dense


class _Exact:
    """Batches, their weight gradients with nothing pruned, and the variance of these between batches."""

    def __init__(self, trainer: Trainer, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._trainer, self._batches = trainer, batches
        self._gradients = [self._of(model, batch) for batch in batches]
        mean = [sum(parts) / len(batches) for parts in zip(*self._gradients)]
        self._variance = sum(_square_distance(found, mean) for found in self._gradients) / (len(batches) - 1)

    def _of(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        loss = cross_entropy(self._trainer.forward(model, batch[0]), batch[1])
        return torch.autograd.grad(loss, weights_of(model))

    def noises(self, model: nn.Module, draws: int) -> Iterator[float]:
        """||dW - dW without pruning||² / variance of as many draws for each batch."""
        for draw, (batch, exact) in itertools.product(range(draws), zip(self._batches, self._gradients)):
            torch.manual_seed(draw)
            yield _square_distance(self._of(model, batch), exact) / self._variance


def _square_distance(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return sum(torch.linalg.vector_norm(one - other, dtype=torch.float64).item() ** 2 for one, other in zip(ones, others))


def _pruned(
    trainer: Trainer, model: nn.Module, way: Way, value: float, where: str, batches: Sequence[Batch]
) -> tuple[nn.Module, str | None]:
    """A copy that prunes, and what its controller says, if it has one."""
    pruned = convert(copy.deepcopy(model), where=where, **{way.knob: value}, **way.options)
    if way.knob != "noise":
        return pruned, None
    controller = NoiseController(
        pruned, lambda images, labels: cross_entropy(trainer.forward(pruned, images), labels), start=1
    )
    for batch in (batches[0], *batches):  # it does not measure before the first step
        controller.step(*batch)
    return pruned, str(controller)


def _side(trainer: Trainer, name: str, model: nn.Module) -> Side:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(trainer.forward(model, batch[0]), batch[1])

    if any(isinstance(module, SparseConv2d) for module in model.modules()):
        name = "sparse"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=trainer.config.momentum)
    return Side(name, model, optimizer, loss, trainer.world.device)


# ---- tables


def tables(setting: dict[str, Any], points: Sequence[dict[str, Any]]) -> list[Table]:
    name = setting["model"] + ("" if setting["width"] is None else f" of width {setting['width']}")
    return [
        Table(
            f"{name}, {setting['data']}, batch {setting['batch_size']}, after step {point['step']}",
            ("way", "value", "noise", "density", "step", "backward"),
            [
                (
                    row["way"],
                    f"{row['value']:g}",
                    f"{100 * row['noise']:.3g} ± {100 * row['noise_error']:.1g} %",
                    f"{row['density']:.3f}",
                    *("-" if row["speedup"] is None else f"{row['speedup'][part]:.2f}x" for part in ("total", "backward")),
                )
                for row in point["rows"]
            ],
            ("way",),
            [f"noise {row['value']:g}: {row['controller']}" for row in point["rows"] if row["controller"]],
        )
        for point in points
    ]
