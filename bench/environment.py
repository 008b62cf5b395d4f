# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on besides the code."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sparsebwd

# These change which code runs, on either side; a command that repeats a row has to set them.
CODE_PATH_VARIABLES = ("SPARSEBWD_MAX_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")

_PREFIXES = tuple("SPARSEBWD_ ONEDNN_ DNNL_ ATEN_ OMP_ KMP_ GOMP_ MKL_ MALLOC_ GLIBC_ LD_PRELOAD".split())


def environment() -> dict[str, Any]:
    """:func:`sparsebwd.info`, and the state of the machine at this moment. json.dumps() takes it."""
    return {
        **sparsebwd.info(),
        "last_level_cache": last_level_cache(),
        "load": load(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
    }


def load() -> float | None:
    """Processes that wanted to run over the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class OtherProcesses:
    """How busy this machine's CPUs are with anything but this process, from when it is made."""

    def __init__(self) -> None:
        self._start = self._now()

    def cpus(self) -> float | None:
        """CPUs in use by others, on average, time stolen by a hypervisor included; None where /proc does not say."""
        if self._start is None:
            return None
        wall, busy = (now - start for now, start in zip(self._now(), self._start))
        return round(max(0.0, busy / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        own = os.times()
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - own.user - own.system


def last_level_cache() -> int | None:
    """Bytes of the first CPU's largest cache; None where the system does not say."""
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=None)


def _bytes(text: str) -> int:
    text = text.strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)
