# SPDX-License-Identifier: Apache-2.0
"""How long runs will take: as long as others of the sweep did, or, before there are any, by their multiply-adds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from statistics import median

import torch
from torch import nn

from .. import models
from .runs import Run

_OVERHEAD = 1.15  # optimiser, test, batches


def seconds(run: Run, others: Sequence[Run] = ()) -> float:
    """Of a whole run."""
    return run.steps() * step_seconds(run, others)[0]


def remaining(run: Run, others: Sequence[Run] = ()) -> float:
    """Of what is left of a run."""
    if run.done():
        return 0.0
    return max(0, run.steps() - run.steps_done()) * step_seconds(run, others)[0]


def step_seconds(run: Run, others: Sequence[Run] = ()) -> tuple[float, bool]:
    """Of a step, and whether that was measured in a run of the sweep like this one."""
    known = {}
    for other in (run, *others):
        record = other.log() if _alike(run, other) else None
        times = [
            row["step_ms"]
            for entry in (record or {}).get("epochs", ())
            for row in entry["variants"].values()
            if row["step_ms"]
        ]
        if times:
            known[other.config.dense] = _OVERHEAD * median(times) / 1e3
    if known:
        return known.get(run.config.dense, median(known.values())), True
    config = run.config
    work = sum(multiply_adds(config.model, config.network_form, config.width, config.image_size).values())
    return 3 * _OVERHEAD * work * config.batch_size / _rate(), False


def duration(value: float) -> str:
    """In words."""
    minutes = round(value / 60)
    if minutes < 1:
        return f"{value:.0f} s"
    days, hours = divmod(minutes // 60, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min"


@cache
def multiply_adds(model: str, form: str, width: int | None, image_size: int) -> dict[str, int]:
    """Of the forward pass of each convolution, by name, for one image."""
    with torch.device("meta"):
        network = models.create(model, 10, form, width).eval()
    result: dict[str, int] = {}

    def record(name: str):
        def hook(layer: nn.Conv2d, inputs, output) -> None:
            result[name] = output[0].numel() * layer.weight[0].numel()

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(record(name))
    with torch.no_grad():
        network(torch.empty(1, 3, image_size, image_size, device="meta"))
    return result


def _alike(one: Run, other: Run) -> bool:
    names = ("model", "width", "batch_size", "image_size", "dtype", "data", "network_form")
    return all(getattr(one.config, name) == getattr(other.config, name) for name in names)


@cache
def _rate() -> float:
    """Multiply-adds a second of a convolution here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = nn.Conv2d(64, 64, 3, padding=1).to(device)
    images = torch.randn(16, 64, 32, 32, device=device)
    times = []
    with torch.no_grad():
        for _ in range(5):
            begin = time.perf_counter()
            layer(images).sum().item()
            times.append(time.perf_counter() - begin)
    return 0.5 * images.numel() * layer.weight[0].numel() / min(times)
