# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench zoo``: whole steps of a training loop as users write it, for many networks.

docs/steps.md says what each number means.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import sparsebwd
from sparsebwd import SparseConv2d, convert, data
from sparsebwd.data import Batches, ImageData, Normalize
from sparsebwd.settings import check_percentile
from sparsebwd.train.config import DTYPES

from . import sides, training, zoo_models
from .convolutions import Convolution, following
from .environment import command_line
from .inputs import LAYOUTS
from .phases import PHASES, WARMUP
from .sides import SIDES, Batch, Side
from .terminal import FILE, Table, check_writable, fail, measuring, report, warn

T = TypeVar("T")

PIXELS = 32
"""Height and width of the images as they are read; each network's are scaled up from these."""

_QUICK = {"steps": 3, "repeats": 3}
_MOMENTUM, _WEIGHT_DECAY = 0.9, 5e-4


def command(
    models: Annotated[
        str | None, typer.Option(help=f"Separated by commas: {', '.join(zoo_models.names('own'))}. Default: all.")
    ] = None,
    source: Annotated[
        str, typer.Option(help=" | ".join(zoo_models.SOURCES) + ": whose; the latter two where they are installed.")
    ] = "own",
    layouts: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(LAYOUTS)}.")] = ",".join(LAYOUTS),
    percentile: Annotated[float, typer.Option(help="Pruning percentile in [50, 100).")] = 90.0,
    dtype: training.Dtype = "float32",
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images, as train/CLASS/* and test/CLASS/*. Default: digits.")
    ] = None,
    cache_dir: training.CacheDir = None,
    steps: Annotated[int, typer.Option(min=0, help="Training steps before, with pruned gradients.")] = 30,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of these.")] = 0.02,
    repeats: Annotated[int, typer.Option(min=2, help=f"Steps of each side, after {WARMUP} more.")] = 9,
    quick: Annotated[
        bool, typer.Option("--quick", help=" ".join(f"--{n.replace('_', '-')} {v}" for n, v in _QUICK.items()) + ".")
    ] = False,
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Call sparsebwd.keep_memory() first, for both sides.")
    ] = False,
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Time processors, not the clock: on a machine that others use. With --threads 1."),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Time the backward pass of each convolution, too, in steps of their own.")
    ] = False,
    threads: training.Threads = None,
    seed: training.Seed = 0,
    json: Annotated[Path | None, typer.Option(help="Write environment, setting and rows.", **FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables.", **FILE)] = None,
) -> None:
    """Time whole training steps of many networks, dense and converted in turns.

    A step is zero_grad(), forward, loss, backward and the step of SGD. Each network is converted by
    sparsebwd.convert(model, percentile), trained for some steps, and copied with dense convolutions. It has a process of
    its own, with malloc as it is by default.
    """
    given = {name: value for name, value in locals().items() if name not in ("quick", "json", "markdown")}
    chosen = [model.name for model in _checked("models", zoo_models.select, models and _parts(models), source)]
    for layout in _parts(layouts):
        _among("layouts", layout, LAYOUTS)
    _among("dtype", dtype, DTYPES)
    _checked("percentile", check_percentile, percentile)
    if cpu_time and (threads != 1 or layers):
        raise typer.BadParameter("cpu-time: accepted with --threads 1 and without --layers", param_hint="--cpu-time")
    check_writable(json=json, markdown=markdown)
    if threads is not None:
        torch.set_num_threads(threads)
    given |= {"threads": torch.get_num_threads()} | (_QUICK if quick else {})
    setting = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    _checked("data-dir", _images, setting)  # decoded once for all
    rows: list[dict[str, Any]] = []
    failed = False
    try:
        with measuring(keep=False) as environment:
            for job in (Job(model, layout, setting) for layout in _parts(layouts) for model in chosen):
                typer.echo(f"{job.model}, {job.layout}", err=True)
                try:
                    rows.append(in_process_of_its_own(measure, job))
                except RuntimeError as error:
                    warn(f"{job.model}, {job.layout}: not measured: {error}")
                    failed = True
    except KeyboardInterrupt:
        fail("interrupted: no file is written", status=130)
    record = {
        "environment": environment | {"allocator": rows[0]["allocator"] if rows else None},
        "setting": setting | {"command": command_line(setting, "zoo")},
        "rows": rows,
    }
    report(list(tables(record["setting"], rows)), record, json, markdown)
    if failed:
        raise typer.Exit(1)


# ---- measuring


@dataclass(frozen=True)
class Job:
    """What gives one row. setting: options of the command by the names of their parameters."""

    model: str
    layout: str
    setting: Mapping[str, Any]

    @property
    def command(self) -> str:
        """Repeats the measurement."""
        return command_line({**self.setting, "models": self.model, "layouts": self.layout}, "zoo")


def in_process_of_its_own(function: Callable[[Job], T], job: Job) -> T:
    """malloc is then in the state in which a user has it, not in that which other networks have left.

    Raises what the function raises, and RuntimeError if the process ends before.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, job).result()


def measure(job: Job) -> dict[str, Any]:
    """One row. Changes the number of threads, and with `keep_memory` malloc, of this process.

    Raises:
        RuntimeError: the loss is not finite, or the library of the network is not installed.
    """
    setting, model = job.setting, zoo_models.get(job.model, job.setting["source"])
    torch.set_num_threads(setting["threads"])
    if setting["keep_memory"]:
        sparsebwd.keep_memory()
    images = _images(setting)
    torch.manual_seed(setting["seed"])
    network = model.build(num_classes=len(images.classes)).to(memory_format=LAYOUTS[job.layout])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of depthwise layers; the row has their number
        convert(network, setting["percentile"])
    following_batch = _batches(images, model, job)
    loss = _loss(DTYPES[setting["dtype"]])
    optimizer = torch.optim.SGD(
        network.parameters(), setting["learning_rate"], momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY
    )
    for step in range(setting["steps"]):
        optimizer.zero_grad()
        value = loss(network, next(following_batch))
        value.backward()
        optimizer.step()
        if not math.isfinite(value.item()):
            raise RuntimeError(f"the loss became {value.item()} in step {step + 1}: try a lower --learning-rate")
    batches = [next(following_batch) for _ in range(WARMUP + setting["repeats"])]
    clock = time.process_time if setting["cpu_time"] else time.perf_counter
    both = {name: Side(name, network, optimizer, loss, clock=clock) for name in SIDES}
    del network, optimizer
    parts = (Side.step, Side.backward_in_parts) if setting["layers"] else (Side.step,)
    sides.take_turns(both, parts, batches, setting["seed"])
    return _row(job, model, both, batches[WARMUP:])


def _row(job: Job, model: zoo_models.Model, both: Mapping[str, Side], batches: Sequence[Batch]) -> dict[str, Any]:
    setting, sparse = job.setting, both["sparse"]
    spent = {name: side.phases.times() for name, side in both.items()}
    convolutions = _convolutions(sparse.model, batches[0][0])
    monitored = sparse.densities(batches[:1])
    consumed = [
        {"density": monitored["layers"][found.name]["density"], "macs": found.problem.macs * (1 + found.needs_grad_input)}
        for found in convolutions
        if monitored["layers"].get(found.name, {}).get("density") is not None
    ]
    row = {
        "model": job.model,
        "layout": job.layout,
        "image_size": model.image_size,
        "batch": model.batch,
        **spent,
        "speedup": {phase: spent["dense"][f"{phase}_ms"] / spent["sparse"][f"{phase}_ms"] for phase in PHASES},
        "spread": max(spent[name]["iqr_ms"]["total"] / spent[name]["total_ms"] for name in SIDES),
        "density": sides.density_of_macs(consumed),
        "convolutions": _count(sparse.model),
        "page_faults": {name: side.phases.page_faults() for name, side in both.items()},
        "allocator": "sparsebwd.keep_memory()" if setting["keep_memory"] else "as is",
        "command": job.command,
    }
    if setting["layers"]:
        row["kinds_ms"] = {name: sides.times(side)["kinds_ms"] for name, side in both.items()}
        row["layers"] = sides.layers(both, monitored, DTYPES[setting["dtype"]].itemsize)
    return row


def _images(setting: Mapping[str, Any]) -> ImageData:
    folder = setting["data_dir"]
    name = "digits" if folder is None else "imagefolder"
    return data.load(name, data_dir=folder, cache_dir=setting["cache_dir"], image_size=PIXELS)


def _batches(images: ImageData, model: zoo_models.Model, job: Job) -> Iterator[Batch]:
    """Augmented and normalised, inputs (N, 3, H, W) of the network's size and labels (N)."""
    drawn = Batches(
        images.train_images, images.train_labels, model.batch, seed=job.setting["seed"], mirror=images.mirror
    )
    normalize = Normalize(*images.statistics, channels_last=job.layout == "channels_last")
    size, epoch = (model.image_size, model.image_size), 0
    while True:
        for index in range(len(drawn)):
            pixels, labels = drawn.batch(epoch, index)
            inputs = normalize(pixels)
            if inputs.shape[2:] != size:
                inputs = interpolate(inputs, size=size, mode="bilinear").contiguous(memory_format=LAYOUTS[job.layout])
            yield inputs, labels
        epoch += 1


def _loss(dtype: torch.dtype) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross entropy; each pixel of a network that classifies pixels has the class of its image."""

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = batch
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(inputs)
        if logits.dim() == 4:
            labels = labels[:, None, None].expand(-1, *logits.shape[2:])
        return cross_entropy(logits.float(), labels)

    return loss


def _convolutions(network: nn.Module, inputs: Tensor) -> list[Convolution]:
    found: list[Convolution] = []
    with following(network, lambda convolution, output: found.append(convolution)):
        network(inputs)
    return found


def _count(network: nn.Module) -> dict[str, int]:
    """pruned, dense: convolutions that are not depthwise, by what they are. depthwise: all of them; depthwise_pruned."""
    counts = dict.fromkeys(("pruned", "dense", "depthwise", "depthwise_pruned"), 0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            pruned = isinstance(module, SparseConv2d) and module.percentile is not None
            depthwise = module.groups == module.in_channels > 1
            counts["depthwise" if depthwise else "pruned" if pruned else "dense"] += 1
            counts["depthwise_pruned"] += depthwise and pruned
    return counts


# ---- tables


def tables(setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One for each layout, and one for each network whose layers were timed."""
    images = "digits" if setting["data_dir"] is None else "an image folder"
    for layout in dict.fromkeys(row["layout"] for row in rows):
        own = [row for row in rows if row["layout"] == layout]
        yield Table(
            f"{layout}, {setting['dtype']}, percentile {setting['percentile']:g}, threads {setting['threads']}, after "
            f"{setting['steps']} steps on {images}",
            ("model", "images", "step ms", "ratio", "forward", "backward", "density", "layers", "spread"),
            [
                (
                    row["model"],
                    f"{row['batch']}x{row['image_size']}",
                    "/".join(f"{row[name]['total_ms']:.0f}" for name in SIDES),
                    f"{row['speedup']['total']:.2f}x",
                    *("/".join(f"{row[name][f'{phase}_ms']:.0f}" for name in SIDES) for phase in ("forward", "backward")),
                    "-" if row["density"] is None else f"{row['density']:.2f}",
                    "/".join(str(row["convolutions"][kind]) for kind in ("pruned", "dense", "depthwise")),
                    f"{row['spread']:.0%}",
                )
                for row in own
            ],
            ("model",),
            (
                "dense/sparse; ratio of steps; density by multiply-adds; layers pruned/dense/depthwise",
                f"memory: {own[0]['allocator']}" + ("; processor time" if setting.get("cpu_time") else ""),
            ),
            optional=("images", "spread"),
        )
    for row in rows:
        if "layers" in row:
            yield sides.layer_table(f"Backward convolutions of {row['model']}, {row['layout']}", row["layers"])


# ---- options


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _among(option: str, value: str, accepted: Mapping[str, Any]) -> None:
    if value not in accepted:
        raise typer.BadParameter(
            f"{option}: got {value!r}; accepted: {', '.join(accepted)}", param_hint=f"--{option}"
        )


def _checked(option: str, function: Callable[..., T], *arguments: object) -> T:
    try:
        return function(*arguments)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint=f"--{option}") from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}", param_hint=f"--{option}") from None
