# SPDX-License-Identifier: Apache-2.0
"""The part that has ncu count what the kernels do."""

from __future__ import annotations

import csv
import io
import re
import sys
from typing import TYPE_CHECKING, Any

from . import machine
from .machine import Failed, checked, require

if TYPE_CHECKING:
    from .record import Check

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy",
    "LaunchStats",
)  # fmt: skip
COUNTERS = {
    # heading: names that versions of ncu have for it
    "us": ("gpu__time_duration.sum",),
    "DRAM %": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    "issue active %": (
        "smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    ),
    "FMA pipe %": (
        "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active", "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_fp32.avg.pct_of_peak_sustained_active",
    ),
    "L1 hit %": ("l1tex__t_sector_hit_rate.pct",),
    "L2 hit %": ("lts__t_sector_hit_rate.pct",),
    "occupancy %": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}  # fmt: skip
_STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio|"
                    r"smsp__average_warp_latency_issue_stalled_(\w+?)\.ratio")  # fmt: skip
_IN_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def counters_command() -> list[object]:
    sections = [part for name in SECTIONS for part in ("--section", name)]
    return [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "demangled", "--kernel-name",
        "regex:sparsebwd", *sections, "--csv", "--page", "raw", "--print-units", "base", sys.executable, machine.WORKLOAD, "layer",
    ]  # fmt: skip


def counters(check: Check) -> dict[str, Any]:
    require(["sparsebwd"], ["ncu"])
    output = checked(counters_command(), machine.WORK / "counters.log", 60 * check.minutes)
    found = kernels_of(output)
    if not found:
        raise Failed(f"ncu saw none of the kernels; see {machine.WORK / 'counters.log'}")
    return {"kernels": found}


def kernels_of(output: str) -> list[dict[str, Any]]:
    """Of ncu's output: for each launch the kernel, the counters above, the three most frequent stalls, and all metrics."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"'))))
    units, *launches = table
    found = []
    for launch in launches:
        values = {name: _number(text) for name, text in launch.items() if name}
        metrics = {name: value for name, value in values.items() if value is not None and "__" in name}
        kernel: dict[str, Any] = {"kernel": launch["Kernel Name"]}
        for heading, names in COUNTERS.items():
            name = next((name for name in names if name in metrics), None)
            kernel[heading] = None if name is None else metrics[name]
            if heading == "us" and name is not None:
                kernel[heading] *= _IN_US.get(units[name], 1.0)
        stalls = {}
        for name, value in metrics.items():
            match = _STALL.fullmatch(name)
            if match:
                stalls[match[1] or match[2]] = value
        kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:3])
        found.append(kernel | {"metrics": metrics})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
