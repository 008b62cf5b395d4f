# SPDX-License-Identifier: Apache-2.0
"""What is known so far, and where it goes."""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine
from .machine import Failed, clocks, nvcc_release, say
from .report import report


class Check:
    """What is known so far, and where it goes.

    minutes: the limit of the part that runs. prebuilt: a folder that holds the package with its modules, for where it
        cannot be built; None without one.
    """

    def __init__(self, output: Path, gpu: dict[str, Any], minutes: float, prebuilt: Path | None = None) -> None:
        self.minutes, self.prebuilt = minutes, prebuilt
        date = datetime.now(UTC).date().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
        self.path = output / f"{date}-{slug}.json"
        self.record: dict[str, Any] = {
            "date": date, "results": {}, "parts": {}, "environment": {}, "clocks": {}, "rows": [], "steps": [],
        }  # fmt: skip
        if self.path.exists():
            self.record |= json.loads(self.path.read_text("utf-8"))
        environment = self.record["environment"]
        environment["gpu"] = environment.get("gpu", {}) | gpu
        environment["nvcc"] = nvcc_release()
        self.record["clocks"] = clocks()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.record, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), self.report())
        self._pack_logs()

    def _pack_logs(self) -> None:
        """What all processes said goes beside the results, in one file: where a GPU is borrowed, only they come back."""
        packed = self.path.with_name(f"{self.path.stem}-logs.tar.gz")
        temporary = packed.with_name(f".{packed.name}.{os.getpid()}")
        with tarfile.open(temporary, "w:gz") as archive:
            for log in sorted(machine.WORK.glob("*.log")):
                archive.add(log, log.name)
        temporary.replace(packed)

    def report(self) -> str:
        try:
            return report(self.record)
        except Exception:  # the record is there, and other parts are yet to run
            return f"The report cannot be written:\n\n{traceback.format_exc()}"

    def part(self, name: str, function: Callable[[Check], dict[str, Any]]) -> bool:
        """Run it; whether it passed."""
        say(f"== {name}, at most {self.minutes:.1f} minutes")
        start = time.monotonic()
        try:
            self.record["parts"][name] = function(self)
            result = "passed"
        except Failed as error:
            result = f"FAILED: {error}"
        except Exception as error:  # a mistake of ours, or an answer that no one thought of
            result = f"FAILED: {type(error).__name__}: {error}"
            say(traceback.format_exc())
        minutes = (time.monotonic() - start) / 60
        say(f"   {name}: {result} ({minutes:.1f} minutes)")
        self.record["results"][name] = result.partition("\n")[0]
        self.write()
        return result == "passed"


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
