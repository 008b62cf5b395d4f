# SPDX-License-Identifier: Apache-2.0
"""What this CPU is, by /proc/cpuinfo where there is one."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As the CPU calls itself, else as the system does, with the numbers of its maker and design where it has these."""
    cpu = _first_cpu()
    name = cpu.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{what} {cpu[f'CPU {what}']}" for what in ("implementer", "part") if f"CPU {what}" in cpu]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def has_256_bit_units() -> bool:
    """Whether this CPU, which has AVX-512, computes with half a vector at a time: a Zen 4."""
    cpu = _first_cpu()
    return cpu.get("vendor_id") == "AuthenticAMD" and cpu.get("cpu family") == "25"


def _first_cpu() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}
