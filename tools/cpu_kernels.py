# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels are compiled from, and with which flags: for setup.py, the tests and `make aarch64`."""

from __future__ import annotations

import platform
import sys
import sysconfig

# Compiled once: the choice of kernels, and drivers that hand tasks to the thread pool.
PLAIN_SOURCES = [
    "isa", "prune", "conv_backward", "conv_plan", "layout", "lists", "agb", "wgc", "depthwise", "depthwise_plan",
]  # fmt: skip
# Compiled for each instruction set, from csrc/cpu/<kernel>_<instruction set>.cpp.
KERNELS = ["prune", "conv", "depthwise"]

_AVX2_FLAGS = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
_X86 = {"avx2": _AVX2_FLAGS, "avx512": [*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
# Instruction sets beside "baseline" with the flags of each, and the macro by which isa.cpp knows of them.
_MACHINES = {
    "x86_64": (_X86, "SPARSEBWD_X86"),
    "amd64": (_X86, "SPARSEBWD_X86"),
    "aarch64": ({"neon": []}, "SPARSEBWD_AARCH64"),  # every one has NEON
    "arm64": ({"neon": []}, "SPARSEBWD_AARCH64"),
}

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",  # GCC 12 finds its own AVX-512 intrinsics at fault
    "-Icsrc/include",
    "-Icsrc/cpu",
]


def instruction_sets(machine: str = platform.machine()) -> dict[str, list[str]]:
    """The instruction sets of a machine, as platform.machine() calls it, with the flags of the files of each."""
    return {"baseline": [], **_MACHINES.get(machine.lower(), ({}, ""))[0]}


def flags(machine: str = platform.machine()) -> list[str]:
    """Those of every file."""
    macro = _MACHINES.get(machine.lower(), ({}, ""))[1]
    return [*_FLAGS, *([f"-D{macro}"] if macro else [])]


def sources(machine: str = platform.machine()) -> dict[str, list[str]]:
    """The files, relative to csrc/cpu, with the flags of each beside :func:`flags`."""
    return {f"{name}.cpp": [] for name in PLAIN_SOURCES} | {
        f"{kernel}_{isa}.cpp": own for kernel in KERNELS for isa, own in instruction_sets(machine).items()
    }


def build_folder(sanitized: bool = False) -> str:
    """Where setup.py keeps what it compiled, relative to the root; the kernels, and the rules for ninja, are in kernels/."""
    return f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}" + ("-sanitized" if sanitized else "")


def object_name(source: str) -> str:
    """The object file of a source, relative to csrc."""
    return f"{source.replace('/', '_')}.o"
