# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m sparsebwd profile``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from .. import models
from ..bench import devices, terminal, training
from ..commands import check_environment, describe, new_app, one_line_errors
from ..data.files import write_json
from ..settings import check_percentile
from ..train.config import LARGEST_CIFAR
from . import profile

app = new_app()

_BATCH_SIZE, _IMAGE_SIZE, _CLASSES = 32, 32, 10


@app.command()
def command(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(models.names())}; or module:callable.", metavar="MODEL", show_default=False)
    ],
    batch_size: Annotated[
        int | None, typer.Option(*terminal.BATCH_SIZE, min=1, help=f"Images of random pixels. Default: {_BATCH_SIZE}.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help=f"Height and width of them. Default: {_IMAGE_SIZE}.")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of images and weights.")] = False,
    percentile: Annotated[float, typer.Option(help="Pruning percentile in [50, 100).")] = 90.0,
    steps: Annotated[int, typer.Option(min=2, help="Measured of each kind, after 2 for warm-up.")] = 7,
    alternatives: Annotated[
        bool, typer.Option(help="Measure, too, what channels_last and kept memory do for the dense step.")
    ] = True,
    device: Annotated[str, typer.Option(help=" | ".join(devices.DEVICES))] = "cpu",
    threads: training.Threads = None,
    seed: training.Seed = 0,
    json: Annotated[Path | None, typer.Option(help="Write all that was measured.", **terminal.FILE)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw times and densities of the layers: .png or .svg.", **terminal.FILE)] = None,
) -> None:
    """Show what each convolution of a model does in training steps, what it gains by pruned gradients, and why not.

    module:callable is called without arguments, and returns the model, or a pair of the model and its batch: inputs or
    (inputs, target), as sparsebwd.profile takes it. Without a batch of its own it gets random images and classes, whose
    gradients are not those of real training; nor are those of a model that has not been trained.
    """
    try:
        check_environment()
        check_percentile(percentile)
    except ValueError as error:
        terminal.fail(f"error: {describe(error)}", 2)
    terminal.check_writable(json=json, plot=plot)
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise typer.BadParameter(f"plot: got {str(plot)!r}; accepted: .png or .svg", param_hint="--plot")
    target = _checked(lambda: torch.device(devices.named(device).type))
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    size = _IMAGE_SIZE if image_size is None else image_size
    network, batch = _checked(lambda: _made(model, size))
    if batch is not None and (batch_size is not None or image_size is not None):
        raise typer.BadParameter(f"batch_size, image_size: {model} has a batch of its own", param_hint="MODEL")
    if batch is None:
        batch = torch.randn(_BATCH_SIZE if batch_size is None else batch_size, 3, size, size)
    layout = torch.channels_last if channels_last else torch.preserve_format
    network = network.to(target, memory_format=layout)
    batch = torch.utils._pytree.tree_map(lambda value: _moved(value, target, layout), batch)
    with terminal.measuring(keep=False):
        try:
            found = profile(network, batch, percentile=percentile, steps=steps, alternatives=alternatives)
        except (RuntimeError, TypeError, ValueError) as error:
            terminal.fail(f"error: {describe(error)}")
    Console(soft_wrap=True).print(found, highlight=False)
    try:
        if json is not None:
            write_json(json, {"model": model, **found.as_dict()})
        if plot is not None:
            found.plot(plot)
    except (OSError, ValueError) as error:
        terminal.fail(f"error: {describe(error)}")


def _checked(function: Any) -> Any:
    try:
        return function()
    except ValueError as error:
        raise typer.BadParameter(describe(error)) from None


def _moved(value: Any, device: torch.device, layout: torch.memory_format) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, memory_format=layout) if value.dim() == 4 else value.to(device)


def _made(name: str, image_size: int) -> tuple[nn.Module, Any]:
    """The model, and its batch, if it has one of its own. Raises ValueError."""
    if name in models.names():
        return models.create(name, _CLASSES, "imagenet" if image_size > LARGEST_CIFAR else "cifar"), None
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"model: got {name!r}; accepted: {', '.join(models.names())}, or module:callable")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ValueError(f"model: {name} cannot be called: {type(error).__name__}: {describe(error)}") from error
    network, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"model: {name} returned {type(made).__name__}; accepted: an nn.Module, or a pair of one and its batch")
    return network, batch


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd profile") -> None:
    with one_line_errors():
        app(arguments, prog_name=prog)
