# SPDX-License-Identifier: Apache-2.0
"""A training run that is stopped at some of its steps, to look at the gradients there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from sparsebwd import data, models
from sparsebwd.backends import registered_backends
from sparsebwd.commands import check_seed, check_threads
from sparsebwd.nn import SparseConv2d
from sparsebwd.train import TrainConfig, Trainer
from sparsebwd.train.config import DTYPES
from sparsebwd.train.report import Reporter
from sparsebwd.train.world import World

from . import devices
from .convolutions import Convolution, following
from .inputs import LAYOUTS
from .terminal import BATCH_SIZE, checked

_NEVER = 2**62

Model = Annotated[str, typer.Option(help=", ".join(models.names()))]
Data = Annotated[str, typer.Option(help=", ".join(data.names()))]
DataDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the data set's files are.")]
CacheDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where decoded images are kept.")]
ImageSize = Annotated[int, typer.Option(help="Height and width of the images, in pixels.")]
Steps = Annotated[str, typer.Option(help="Training steps finished before, separated by commas.")]
BatchSize = Annotated[int, typer.Option(*BATCH_SIZE, help="Images a step.")]
Percentile = Annotated[str, typer.Option(help="Pruning percentile in [50, 100), or none.")]
Placement = Annotated[str, typer.Option(help="Which gradient is pruned: output, input, or auto.")]
Backend = Annotated[str, typer.Option(help=f"{', '.join(registered_backends())}, or auto.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Default: that of the paper, 0.05 for AlexNet and 0.1 for the others.")
]
Device = Annotated[str, typer.Option(help=" | ".join(devices.DEVICES))]
Math = Annotated[
    str, typer.Option(help="On a GPU, how dense kernels compute with float32: " + " | ".join(devices.MATHS) + ".")
]
Dtype = Annotated[str, typer.Option(help=" | ".join(DTYPES) + ", the latter by autocast.")]
Layout = Annotated[str, typer.Option(help=" | ".join(LAYOUTS))]
Threads = Annotated[int | None, typer.Option(help="Default: as PyTorch chooses.", callback=checked(check_threads))]
Seed = Annotated[int, typer.Option(help="Of weights, batches and pruning.", callback=checked(check_seed))]


def parse_steps(text: str) -> list[int]:
    """Distinct steps in rising order. Raises typer.BadParameter."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"steps: got {text!r}; accepted: integers from 0, as 10,150,300", param_hint="--steps")
    return sorted({int(part) for part in parts})


def prepare(given: Mapping[str, Any]) -> Trainer:
    """A run at its beginning, of the one model that prunes. Its progress goes to stderr, nothing into files.

    Args:
        given: the options above by the names of their parameters; others are ignored.

    Raises:
        typer.BadParameter: an option or the data is refused.
    """
    layout = given["layout"]
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"layout: got {layout!r}; accepted: {', '.join(LAYOUTS)}", param_hint="--layout")
    names = {field.name for field in fields(TrainConfig)}
    options = {name: str(value) if isinstance(value, Path) else value for name, value in given.items() if name in names}
    try:
        options |= {
            "percentile": _percentile(given["percentile"]),
            "channels_last": layout == "channels_last",
            "device": given.get("device", "cpu"),
            "measure_every": _NEVER,
        }
        device = torch.device(devices.named(options["device"]).type)
        config = TrainConfig(**options)
        images = data.load(
            config.data, data_dir=config.data_dir, cache_dir=config.cache_dir, image_size=config.image_size
        )
        return Trainer(config, images, None, World(device), Reporter(Console(stderr=True)))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None


def _percentile(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"percentile: got {text!r}; accepted: numbers in [50, 100), and none") from None


def train_to(trainer: Trainer, step: int) -> None:
    """Train until `step` steps are finished. Raises :class:`sparsebwd.train.TrainingError`."""
    with trainer.reporter.running(trainer.steps_done, step):
        while trainer.steps_done < step:
            trainer.train_step()


def model_of(trainer: Trainer) -> nn.Module:
    return trainer.twins[0].model


def placement_of(model: nn.Module) -> str:
    """Which gradients its convolutions prune: "output", "input", or "input+output" where they differ."""
    return "+".join(sorted({module.placement for module in model.modules() if isinstance(module, SparseConv2d)}))


def convolutions(trainer: Trainer) -> list[Convolution]:
    """All of the model, at the run's batch, without training."""
    found: list[Convolution] = []
    model = model_of(trainer)
    training = model.training
    with torch.no_grad(), following(model, lambda convolution, output: found.append(convolution)):
        trainer.forward(model.eval(), trainer.batch(0)[0])
    model.train(training)
    return found
