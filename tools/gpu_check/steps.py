# SPDX-License-Identifier: Apache-2.0
"""The part that measures whole training steps, dense and sparse in turns."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine
from .machine import Failed, require, run, say
from .record import Check

_LEAST_SECONDS = 15.0


@dataclass(frozen=True)
class Step:
    """One call of `bench step`. mode: "strict", "tf32" (float32) or "bfloat16" (autocast)."""

    model: str
    image_size: int
    batch: int
    mode: str

    @property
    def title(self) -> str:
        return f"{self.model}, {self.image_size}x{self.image_size}, batch {self.batch}, {self.mode}"

    def command(self, output: Path) -> list[object]:
        dtype, math = ("bfloat16", "tf32") if self.mode == "bfloat16" else ("float32", self.mode)
        return [
            sys.executable, "-m", "sparsebwd.bench", "step", "--device", "cuda", "--model", self.model, "--data", "digits",
            "--image-size", self.image_size, "--batch", self.batch, "--steps", "20", "--repeats", "9", "--dtype", dtype,
            "--math", math, "--json", output,
        ]  # fmt: skip


STEPS = tuple(
    Step(model, size, batch, mode)
    for mode in ("strict", "bfloat16", "tf32")
    for model, size, batch in (("resnet18", 32, 256), ("resnet50", 160, 64))
)
"""The most important first."""


def steps(check: Check) -> dict[str, Any]:
    require(["sparsebwd", "typer", "rich", "sklearn"])
    end = time.monotonic() + 60 * check.minutes
    failures, left_out = [], []
    for number, step in enumerate(STEPS):
        left = end - time.monotonic()
        if left < _LEAST_SECONDS:
            left_out.append(step.title)
            continue
        say(f"  {number + 1} of {len(STEPS)}, {left / 60:.1f} minutes left: {step.title}")
        try:
            found = _measure(number, step, left)
        except Failed as error:
            failures.append(str(error))
            say(f"    {error}")
            continue
        kept = [other for other in check.record["steps"] if other["name"] != step.title]
        check.record["steps"] = [*kept, found]
        check.write()
    if failures:
        raise Failed("; ".join(failures))
    return {"left_out": left_out}


def _measure(number: int, step: Step, seconds: float) -> dict[str, Any]:
    output, log = machine.WORK / f"step-{number}.json", machine.WORK / f"step-{number}.log"
    output.unlink(missing_ok=True)
    done = run(step.command(output), log, seconds)
    if not output.exists():
        last = done.stdout.rstrip().rpartition("\n")[2]
        raise Failed(f"{step.title}: exit status {done.returncode} and no results; {log} ends in: {last}")
    (point,) = json.loads(output.read_text("utf-8"))["points"]
    return {
        "name": step.title,
        "density": point["density"]["macs"],
        **{name: {part: point[name][f"{part}_ms"] for part in ("total", "backward")} for name in ("dense", "sparse")},
        "speedup": point["speedup"]["total"],
        "command": shlex.join(map(str, step.command(Path("step.json"))[1:])),
    }
