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
from .runs import Run, reading

_OVERHEAD = 1.15  # optimiser, test, batches


class Estimates:
    """What the runs of a sweep will take, by what is known of them now."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._known: dict[tuple, dict[bool, list[float]]] = {}
        for run in runs:
            with reading(run.folder):
                rows = [row for entry in (run.log() or {}).get("epochs", ()) for row in entry["variants"].values()]
                for spent in (row["step_ms"] for row in rows if row["step_ms"]):
                    times = self._known.setdefault(_key(run), {}).setdefault(run.config.dense, [])
                    times.append(_OVERHEAD * spent / 1e3)

    def measured(self, run: Run) -> bool:
        """Whether a run like this one has been there."""
        return _key(run) in self._known

    def step(self, run: Run) -> float:
        """Seconds of a step."""
        if known := self._known.get(_key(run)):
            return median(known.get(run.config.dense) or [time for times in known.values() for time in times])
        config = run.config
        work = sum(multiply_adds(config.model, config.network_form, config.width, config.image_size).values())
        return 3 * _OVERHEAD * work * config.batch_size / _rate()

    def whole(self, run: Run) -> float:
        """Seconds of a run."""
        return run.steps() * self.step(run)

    def left(self, run: Run) -> float:
        """Seconds of what is left of it."""
        return 0.0 if run.done() else max(0, run.steps() - run.steps_done()) * self.step(run)


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


def _key(run: Run) -> tuple:
    """Equal in runs whose steps take about as long."""
    names = ("model", "width", "batch_size", "image_size", "dtype", "data", "network_form")
    return tuple(getattr(run.config, name) for name in names)


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
