# SPDX-License-Identifier: Apache-2.0
"""How long steps take, dense and sparse in turns, from the weights at the end of a run.

Runs of a sweep may be beside other work, so that their own times prove nothing. In turns, what else happens slows both.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..commands import describe, one_line_errors
from ..data import write_text
from ..memory import keep_memory
from ..opening import read_json
from ..train import log
from ..train.config import TrainConfig
from ..train.measure import EpochTally, speedups
from ..train.report import Reporter
from ..train.trainer import Trainer
from ..train.world import join

FILE = "timing.json"

STEPS = 20
_WARMUP = 2
_MEASURE_EVERY = 4
_QUIET = 0.15
"""Cores that others may keep busy beside a measurement."""


def main(arguments: Sequence[str]) -> int:
    """Measure the run in the directory `arguments[0]` by `arguments[1]` steps, and write `timing.json` there."""
    with one_line_errors():
        folder = Path(arguments[0])
        try:
            write_text(folder / FILE, json.dumps(measure(folder, int(arguments[1])), indent=1) + "\n")
        except ValueError as error:
            print(f"error: {describe(error)}")
            return 1
    return 0


def measure(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Times in ms of a sparse run's steps and of their dense twins, and what one is of the other.

    Both begin with the weights of the run's checkpoint, and keep them but for one part in 10^12: densities are those of
    the end of the run.

    Raises:
        ValueError: the directory holds no run, or none that its checkpoint belongs to.
        OSError: a file cannot be read.
    """
    record = read_json(folder / log.JSON_FILE)
    config = TrainConfig(**record["config"])
    with join(config.device) as world:
        if world.device.type == "cpu":
            keep_memory()
        reporter = Reporter(Console(quiet=True))
        images = config.load_images()
        end = Trainer(config, images, folder, world, reporter)
        if not end.resume():
            raise ValueError(f"timing: {folder} holds no checkpoint")
        state = next(twin for twin in end.twins if twin.name == "sparse").state()
        free = {"learning_rate": 1e-12, "measure_every": _MEASURE_EVERY, "max_steps": None, "compare": True}
        trainer = Trainer(replace(config, **free), images, None, world, reporter)
        for twin in trainer.twins:
            histories = state["sigma_histories"] if twin.name == "sparse" else {}
            twin.restore({**state, "sigma_histories": histories, "tally": asdict(EpochTally())})
        with reporter.running(0, steps + _WARMUP):
            for step in range(steps + _WARMUP):
                if step == _WARMUP:
                    for twin in trainer.twins:
                        twin.tally = EpochTally()
                    busy = _Others()
                trainer.train_step()
        others = busy.cores()
        rows = {twin.name: twin.tally.row() for twin in trainer.twins}
    return {
        "format": 1,
        "steps": steps,
        "variants": {name: {**row, "layers": None} for name, row in rows.items()},
        "speedup": speedups(rows),
        "density": rows["sparse"]["density"],
        "environment": record["environment"],
        "cores": os.cpu_count(),
        "cores_busy_beside": others,
        "quiet": others is not None and others <= _QUIET,
    }


class _Others:
    """How many cores other processes keep busy, since construction."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float | None:
        """None where the system does not tell."""
        if self._start is None or (now := self._read()) is None:
            return None
        busy, own, wall = (after - before for after, before in zip(now, self._start))
        return round(max(0.0, busy - own) / wall, 3) if wall else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        with suppress(OSError, ValueError, IndexError):
            counts = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
            idle = counts[3] + counts[4]
            ticks = (sum(counts) - idle) / os.sysconf("SC_CLK_TCK")
            return ticks, sum(os.times()[:2]), time.monotonic()
        return None
