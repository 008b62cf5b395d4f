# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench overhead``: what a sparse layer costs beside its computation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from sparsebwd import SparseConv2d
from sparsebwd.train.config import DTYPES

from . import training
from .environment import command_line
from .inputs import LAYOUTS
from .phases import WARMUP, PhaseTimer, iqr_ms, median_ms
from .terminal import BATCH_SIZE, FILE, Table, check_writable, measuring, report
from .timing import Call, interleave

PLAIN = "nn.Conv2d"

_PERCENTILE = 90.0
_PHASES = ("forward", "backward")
_US = 1e3  # in a millisecond

VARIANTS: dict[str, dict[str, Any]] = {
    "stays dense": {"where": "faster"},
    "nothing to do": {"percentile": None, "backend": "dense"},
    "percentile=None": {"percentile": None},
    f"percentile={_PERCENTILE:g}": {"percentile": _PERCENTILE},
}
"""Settings of the sparse layers."""


def command(
    layers: Annotated[int, typer.Option(min=1, max=1000, help="Convolutions in the chain, each of another geometry.")] = 20,
    image_size: Annotated[int, typer.Option(min=1, help="Height and width of the tensors, in pixels.")] = 4,
    batch_size: Annotated[int, typer.Option(*BATCH_SIZE, min=1, help="Images.")] = 1,
    dtype: training.Dtype = "float32",
    layout: training.Layout = "channels_last",
    threads: training.Threads = None,
    repeats: Annotated[int, typer.Option(min=2, help=f"Steps of each, after {WARMUP} for warm-up.")] = 200,
    json: Annotated[Path | None, typer.Option(help="Write environment, setting and results.", **FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table.", **FILE)] = None,
) -> None:
    """Time sparse layers on tensors so small that next to nothing is computed.

    A chain of different convolutions, with batch normalisation and a rectifier behind each, takes training steps: with
    nn.Conv2d, and with SparseConv2d of several settings. All take turns. Times are microseconds a layer.
    """
    given = locals()
    for name, value, accepted in (("dtype", dtype, DTYPES), ("layout", layout, LAYOUTS)):
        if value not in accepted:
            raise typer.BadParameter(
                f"{name}: got {value!r}; accepted: {', '.join(accepted)}", param_hint=f"--{name}"
            )
    check_writable(json=json, markdown=markdown)
    if threads is not None:
        torch.set_num_threads(threads)
    given["threads"] = torch.get_num_threads()
    options = {name: value for name, value in given.items() if name not in ("json", "markdown")}
    setting = options | {"command": command_line(options, "overhead")}
    with measuring() as environment:
        results = measure(layers, image_size, batch_size, DTYPES[dtype], LAYOUTS[layout], repeats)
    report([_table(setting, results)], {"environment": environment, "setting": setting, "results": results}, json, markdown)


def measure(
    layers: int, image_size: int, batch: int, dtype: torch.dtype, memory_format: torch.memory_format, repeats: int
) -> dict[str, dict[str, Any]]:
    """Results by variant, :data:`PLAIN` the first.

    forward_us, backward_us: a layer's, normalisation and rectifier included, median. over_forward_us, over_backward_us:
    median of the differences to the plain chain's step of the same round; iqr_us: their interquartile ranges.
    """
    images = torch.randn(batch, _channels(0), image_size, image_size).to(memory_format=memory_format)
    torch.manual_seed(0)
    plain = chain(layers, {}).to(memory_format=memory_format)
    timers: dict[str, PhaseTimer] = {}
    calls: dict[str, Call] = {}
    for name, settings in {PLAIN: {}, **VARIANTS}.items():
        model = chain(layers, settings).to(memory_format=memory_format)
        model.load_state_dict(plain.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        timers[name] = PhaseTimer()
        calls[name] = Call(
            partial(timers[name].step, optimizer), lambda model=model: partial(_loss, model, images, dtype)
        )
    interleave(calls, repeats, WARMUP)
    return {name: result(timer, timers[PLAIN], layers) for name, timer in timers.items()}


def chain(layers: int, settings: Mapping[str, Any]) -> nn.Sequential:
    """Convolutions that all differ: sparse ones with these settings, plain ones if there are none."""
    make = partial(SparseConv2d, **settings) if settings else nn.Conv2d
    return nn.Sequential(*(
        nn.Sequential(
            make(_channels(i), _channels(i + 1), kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(_channels(i + 1)),
            nn.ReLU(inplace=True),
        )
        for i in range(layers)
        for kernel in [1 if i % 3 == 2 else 3]
    ))  # fmt: skip


def _channels(layer: int) -> int:
    return 16 + 2 * layer


def _loss(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(images).float().mean()


def result(timer: PhaseTimer, plain: PhaseTimer, layers: int) -> dict[str, Any]:
    found: dict[str, Any] = {"iqr_us": {}}
    for phase in _PHASES:
        own, other = timer.seconds[phase], plain.seconds[phase]
        over = [mine - its for mine, its in zip(own, other)]
        found[f"{phase}_us"] = _US * median_ms(own) / layers
        found[f"over_{phase}_us"] = _US * median_ms(over) / layers
        found["iqr_us"][phase] = _US * iqr_ms(over) / layers
    return found


def _table(setting: Mapping[str, Any], results: Mapping[str, dict[str, Any]]) -> Table:
    def row(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
        over = ("-" if name == PLAIN else f"{result[f'over_{phase}_us']:.1f} ± {result['iqr_us'][phase] / 2:.1f}"
                for phase in _PHASES)  # fmt: skip
        return name, *(f"{result[f'{phase}_us']:.1f}" for phase in _PHASES), *over

    return Table(
        f"{setting['layers']} layers, batch {setting['batch_size']}, {setting['image_size']}x{setting['image_size']} pixels, "
        f"{setting['dtype']}, {setting['layout']}, threads {setting['threads']}",
        ("", "forward us", "backward us", "over nn.Conv2d: forward us", "backward us"),
        [row(*item) for item in results.items()],
        ("",),
        ("a layer, with normalisation and rectifier; medians of steps in turns",),
    )
