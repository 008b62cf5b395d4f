# SPDX-License-Identifier: Apache-2.0
"""The part that runs small problems under compute-sanitizer."""

from __future__ import annotations

import sys
import time
from typing import Any

from . import machine
from .machine import Failed, require, run, say
from .record import Check

SANITIZER_TOOLS = ("memcheck", "racecheck")


def sanitizer_command(tool: str) -> list[object]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20",
        sys.executable, machine.WORKLOAD, "small",
    ]  # fmt: skip


def sanitizer(check: Check) -> dict[str, Any]:
    require(["sparsebwd"], ["compute-sanitizer"])
    found: dict[str, Any] = {}
    end = time.monotonic() + 60 * check.minutes
    for tool in SANITIZER_TOOLS:
        start = time.monotonic()
        # With PyTorch's allocator in between, few accesses are outside of what the driver allocated.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = machine.WORK / f"{tool}.log"
        try:
            done = run(sanitizer_command(tool), log, max(1, end - start), environment=environment)
        except Failed as error:
            found[tool] = {"result": str(error), "clean": False}
        else:
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            clean = done.returncode == 0 and bool(summary)
            text = summary[-1].lstrip("= ") if summary else f"exit status {done.returncode}; see {log}"
            found[tool] = {"result": text, "clean": clean}
        found[tool]["seconds"] = round(time.monotonic() - start)
        say(f"  {tool}: {found[tool]['result']} ({found[tool]['seconds']} s)")
        check.record["parts"]["sanitizer"] = found
    bad = [tool for tool in SANITIZER_TOOLS if not found[tool]["clean"]]
    if bad:
        raise Failed(f"{' and '.join(bad)}: not clean")
    return found
