# SPDX-License-Identifier: Apache-2.0
"""The part that measures: rows of the benchmark, as many as the time is enough for."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from typing import Any

from . import machine
from .machine import Failed, clocks, require, run, say
from .record import Check
from .units import BATCHES, UNITS, Unit, choose_batch, choose_repeats


def bench(check: Check, name: str = "bench", units: Sequence[Unit] = UNITS) -> dict[str, Any]:
    require(["sparsebwd", "typer", "rich"])
    end = time.monotonic() + 60 * check.minutes
    batch = choose_batch(check.minutes, check.record["environment"]["gpu"]["memory_bytes"], units)
    left_out = [] if batch == BATCHES[0] else [f"batches of {BATCHES[0]}: {batch} images instead"]
    found: dict[str, Any] = {"batch": batch, "left_out": left_out, "units": []}
    check.record["parts"][name] = found
    failures, expected, took = [], 0.0, 0.0
    for number, unit in enumerate(units):
        start = time.monotonic()
        scale = took / expected if expected else 1.0
        repeats = choose_repeats(units[number:], batch, end - start, scale)
        if repeats is None:
            left_out.append(f"{unit.title}: the time was over")
            continue
        say(f"  {number + 1} of {len(units)}, {(end - start) / 60:.1f} minutes left: {unit.title}, {unit.rows} rows")
        try:
            rows, wrong = measure(check, unit, repeats, batch, end - start)
        except Failed as error:
            failures.append(str(error))
            say(f"    {error}")
            continue
        seconds = time.monotonic() - start
        if wrong:
            failures.append(f"{unit.title}: {wrong} rows are WRONG")
        if rows < unit.rows:
            left_out.append(f"{unit.title}: {unit.rows - rows} of {unit.rows} rows: the time was over")
        elif not wrong:
            took, expected = took + seconds, expected + unit.seconds(repeats, batch)
        found["units"].append(
            {"name": unit.title, "rows": rows, "wrong": wrong, "repeats": repeats, "seconds": round(seconds)}
            | {"clocks": clocks(), "command": shlex.join(map(str, unit.command(repeats, batch)[1:]))}
        )
        check.write()
    for text in left_out:
        say(f"  left out: {text}")
    if failures:
        raise Failed("; ".join(failures))
    return found


def measure(check: Check, unit: Unit, repeats: int, batch: int, seconds: float) -> tuple[int, int]:
    """Add the rows of a unit. How many there are, and how many are wrong. Raises Failed if there are none."""
    name = re.sub(r"[^a-z0-9]+", "-", unit.title.lower())
    output, log = machine.WORK / f"bench-{name}.json", machine.WORK / f"bench-{name}.log"
    output.unlink(missing_ok=True)
    done = run(unit.command(repeats, batch, (seconds - 10) / 60, output), log, seconds + 30)
    if not output.exists():
        last = done.stdout.rstrip().rpartition("\n")[2]
        raise Failed(f"{unit.title}: exit status {done.returncode} and no results; {log} ends in: {last}")
    measured = json.loads(output.read_text("utf-8"))
    merge_rows(check.record, measured)
    return len(measured["rows"]), sum(row["error"] is not None for row in measured["rows"])


ROW_KEY = (
    "suite", "layer", "problem", "op", "nominal_density", "percentile", "pattern", "dtype", "layout", "backend", "device",
    "math", "threads",
)  # fmt: skip


def merge_rows(record: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add rows of the benchmark, in the place of earlier ones of the same setting, and what it says of the machine."""
    rows = {tuple(row[name] for name in ROW_KEY): row for row in (*record["rows"], *measured["rows"])}
    record["rows"] = list(rows.values())
    environment = record["environment"]
    for name, value in measured["environment"].items():
        if name in ("peak_gflops", "copy_gbs"):
            for key, entry in value.items():
                before = environment.setdefault(name, {}).get(key)
                # The best that was seen of dtype and mode.
                if isinstance(entry, dict):
                    both = {mode: max((before or {}).get(mode, 0), rate) for mode, rate in entry.items()}
                    environment[name][key] = (before or {}) | both
                else:
                    environment[name][key] = max(before or 0, entry)
        elif name == "gpu":
            environment["gpu"] |= value
        else:
            environment[name] = value
