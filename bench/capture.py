# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench capture``: real gradients, from a training run into a file."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from sparsebwd.train import Trainer
from sparsebwd.train.config import DTYPES

from . import gradients, training
from .convolutions import Convolution, watching
from .gradients import Captured, GradientFile
from .terminal import FILE, check_writable, fail

_MB = 10**6


def command(
    output: Annotated[Path, typer.Option(help="The file to write.", **FILE)],
    model: training.Model = "resnet18",
    data: training.Data = "digits",
    data_dir: training.DataDir = None,
    cache_dir: training.CacheDir = None,
    image_size: training.ImageSize = 32,
    steps: training.Steps = "0,50,300",
    layers: Annotated[
        str | None, typer.Option(help="Names of convolutions, or patterns as stages.1.*, separated by commas.")
    ] = None,
    batch_size: training.BatchSize = 32,
    percentile: training.Percentile = "90",
    placement: training.Placement = "auto",
    backend: training.Backend = "auto",
    learning_rate: training.LearningRate = None,
    dtype: training.Dtype = "float32",
    layout: training.Layout = "channels_last",
    threads: training.Threads = None,
    seed: training.Seed = 0,
    max_size: Annotated[float, typer.Option(min=0, help="MB that the file may take.")] = 2000,
) -> None:
    """Train a model, and store the gradients that reach its convolutions in some of the steps.

    The gradient is that of each convolution's output before it is pruned. Use the file with --gradients FILE.
    """
    given = locals()
    when = training.parse_steps(steps)
    check_writable(output=output)
    trainer = training.prepare(given)
    chosen = _chosen(training.convolutions(trainer), layers)
    nbytes = len(when) * DTYPES[dtype].itemsize * sum(math.prod(found.problem.output_size) for found in chosen)
    if nbytes > max_size * _MB:
        raise typer.BadParameter(
            f"max_size: got {max_size:g} MB, but {len(chosen)} layers at {len(when)} steps take "
            f"{math.ceil(nbytes / _MB)} MB; choose some with --layers, fewer --steps, a smaller --batch-size, or allow more",
            param_hint="--max-size",
        )
    try:
        captured = capture(trainer, when, [found.name for found in chosen])
        gradients.save(output, captured)
    except RuntimeError as error:
        fail(f"error: {error}")
    except OSError as error:
        fail(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        fail("interrupted: no file is written", status=130)
    typer.echo(f"{output}: {len(captured.gradients)} gradients of {len(chosen)} layers, {nbytes / _MB:.0f} MB")


def capture(trainer: Trainer, steps: Sequence[int], layers: Sequence[str]) -> GradientFile:
    """Train through `steps`, in rising order, and keep the gradients of `layers` in each of them.

    Raises:
        sparsebwd.train.TrainingError: the loss is not finite.
    """
    model, config = training.model_of(trainer), trainer.config
    taken: list[Captured] = []
    for step in steps:
        training.train_to(trainer, step)
        arrived: dict[str, Captured] = {}

        def keep(found: Convolution, gradient: Tensor, step: int = step, arrived: dict = arrived) -> None:
            if found.name in layers:
                copy = gradient.detach().clone()
                arrived[found.name] = Captured(found.name, found.problem, step, found.needs_grad_input, copy)

        with watching(model, keep):
            training.train_to(trainer, step + 1)
        taken.extend(arrived[name] for name in layers)
        trainer.reporter.say(f"step {step}: gradients of {len(arrived)} layers")
    return GradientFile(config.model, config.data, config.percentile, training.placement_of(model), tuple(taken))


def _chosen(found: list[Convolution], layers: str | None) -> list[Convolution]:
    """Those that `layers` names; all if it is None."""
    if layers is None:
        return found
    names = [convolution.name for convolution in found]
    chosen: set[str] = set()
    for pattern in (part.strip() for part in layers.split(",")):
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise typer.BadParameter(
                f"layers: got {pattern!r}; accepted: {', '.join(names)}, or patterns of these", param_hint="--layers"
            )
        chosen.update(matched)
    return [convolution for convolution in found if convolution.name in chosen]
