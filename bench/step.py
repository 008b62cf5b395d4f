# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench step``: whole training steps, dense and sparse, at moments of a training run.

docs/steps.md says what each number means.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsebwd.train import Trainer
from sparsebwd.train.config import DTYPES
from sparsebwd.train.measure import KINDS

from . import devices, training
from .environment import command_line
from .memory import backward_peaks, peak_on_cuda
from .phases import PHASES, WARMUP
from .sides import MB, SIDES, Batch, Side, density_of_macs, layer_table, layers, take_turns, times
from .terminal import FILE, Table, check_writable, fail, measuring, report


def command(
    model: training.Model = "resnet18",
    data: training.Data = "digits",
    data_dir: training.DataDir = None,
    cache_dir: training.CacheDir = None,
    image_size: training.ImageSize = 32,
    steps: training.Steps = "10,150,300",
    batch_size: training.BatchSize = 64,
    percentile: training.Percentile = "90",
    placement: training.Placement = "auto",
    backend: training.Backend = "auto",
    learning_rate: training.LearningRate = None,
    device: training.Device = "cpu",
    math: training.Math = "strict",
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
    if math not in devices.MATHS:
        raise typer.BadParameter(f"math: got {math!r}; accepted: {', '.join(devices.MATHS)}", param_hint="--math")
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
        with measuring() as environment, devices.DEVICES[device].restored():
            if device == "cuda":
                devices.DEVICES[device].set(devices.Mode(math=math))
            environment |= devices.DEVICES[device].describe()
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


def measure(trainer: Trainer, repeats: int) -> dict[str, Any]:
    """One point of the result: the model as trained so far, on the batches that come next in training."""
    step = trainer.steps_done
    batches = [trainer.batch(step + turn) for turn in range(WARMUP + repeats)]
    sides = {name: side_of(trainer, name) for name in SIDES}
    take_turns(sides, (Side.step, Side.backward_in_parts), batches, trainer.config.seed)
    monitored = sides["sparse"].densities(batches[WARMUP:])
    itemsize = DTYPES[trainer.config.dtype].itemsize
    by_layer = layers(sides, monitored, itemsize)
    spent = {name: times(side) for name, side in sides.items()}
    density = {"elements": monitored["total"]["density"], "macs": density_of_macs(by_layer)}
    for side in sides.values():
        side.optimizer.zero_grad()
    if trainer.world.device.type == "cuda":
        memory: dict[str, Any] = {name: peak_on_cuda(side.loss, batches[WARMUP]) for name, side in sides.items()}
    else:
        models = {name: side.model for name, side in sides.items()}
        memory = backward_peaks(models, *batches[WARMUP], DTYPES[trainer.config.dtype])
    memory["gradients"] = {
        name: {"sum": sum(sizes), "largest": max(sizes)}
        for name in ("dense_bytes", "compressed_bytes")
        for sizes in [[layer[name] for layer in by_layer]]
    }
    return {
        "step": step,
        "density": density,
        **spent,
        "speedup": _speedups(spent),
        "bound": bounds(density["macs"], spent["dense"]["total_ms"], spent["dense"]["kinds_ms"]["convolution"]),
        "memory": memory,
        "layers": by_layer,
    }


def side_of(trainer: Trainer, name: str) -> Side:
    """The model as it is at this step of training, dense or sparse."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(trainer.forward(model, batch[0]), batch[1])

    twin = trainer.twins[0]
    return Side(name, twin.model, twin.optimizer, loss, trainer.world.device)


def bounds(density: float, step_ms: float, convolution_ms: float) -> dict[str, float]:
    """How much faster a step can get at most if the backward convolutions take `density` of their dense time.

    ideal: a step that is convolutions only, all three of equal cost. measured: a dense step of `step_ms`, of which the
    backward convolutions take `convolution_ms`, and the rest stays as it is.
    """
    return {"ideal": 3 / (1 + 2 * density), "measured": step_ms / (step_ms - convolution_ms * (1 - density))}


def _speedups(times: Mapping[str, dict[str, Any]]) -> dict[str, float | None]:
    """Dense / sparse of each phase and kind; None for a kind that the model does not have."""
    dense, sparse = (
        {phase: times[name][f"{phase}_ms"] for phase in PHASES} | times[name]["kinds_ms"] for name in SIDES
    )
    return {part: dense[part] / sparse[part] if sparse[part] else None for part in dense}


# ---- tables


def _overview(setting: Mapping[str, Any], points: Sequence[dict[str, Any]]) -> Table:
    percentile = setting["percentile"]
    pruning = "no pruning" if percentile is None else f"percentile {percentile:g}"
    return Table(
        f"{setting['model']}, {setting['data']}, batch {setting['batch_size']}, {pruning}, "
        f"{setting['dtype']}, {setting['layout']}, {_where(setting)}",
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


def _where(setting: Mapping[str, Any]) -> str:
    if setting["device"] == "cpu":
        return f"threads {setting['threads']}"
    return f"on {setting['device']}" + (f", dense in {setting['math']}" if setting["dtype"] == "float32" else "")


def _tables(point: dict[str, Any]) -> list[Table]:
    title = f"Backward convolutions by layer, after step {point['step']}"
    return [_step_table(point), layer_table(title, point["layers"])]


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


def _mb(nbytes: int) -> str:
    return f"{nbytes / MB:.1f}"
