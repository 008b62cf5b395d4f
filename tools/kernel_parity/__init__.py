# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against plain loops, without PyTorch: compiled for this machine, or for aarch64 and run by an emulator.

``make aarch64``, or ``python -m kernel_parity --help`` with PYTHONPATH=tools.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cpu_kernels

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("prune", "abs_sum", "agb", "wgc", "depthwise")
"""What main.cpp can be made to do wrong."""


class Target(NamedTuple):
    """A machine to compile for: as platform.machine() calls it; the compiler; what runs a program of it that is linked statically,
    nothing if this is the machine."""

    machine: str
    compiler: list[str]
    runner: list[str]


def here() -> Target:
    """This machine."""
    return Target(platform.machine(), shlex.split(os.environ.get("CXX", "c++")), [])


def aarch64() -> Target:
    """aarch64: this machine if it is one, else by a cross compiler and an emulator of processes."""
    if platform.machine() == "aarch64":
        return here()
    emulator = next(filter(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")), "qemu-aarch64")
    return Target("aarch64", ["aarch64-linux-gnu-g++"], [emulator])


def missing(target: Target) -> str | None:
    """What the target lacks here, with what to do; None if nothing."""
    packages = "g++-aarch64-linux-gnu qemu-user" if target.runner else "g++"
    for program in (target.compiler[0], *target.runner):
        if shutil.which(program) is None:
            return f"{program} is not found; install it (Debian, Ubuntu: apt install {packages})"
    return None


def built() -> list[Path]:
    """The object files of the package's kernels on this machine, as `make build` compiled them and up to date; nothing where
    it did not."""
    folder = ROOT / cpu_kernels.build_folder() / "kernels"
    if not (folder / "kernels.ninja").exists():
        return []
    objects = [folder / cpu_kernels.object_name(f"cpu/{name}") for name in cpu_kernels.sources()]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run([sys.executable, "-m", "ninja", "-f", str(folder / "kernels.ninja"), *(str(path.relative_to(ROOT)) for path in objects)])
    return objects


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def build(target: Target, folder: Path, flags: Sequence[str] = (), kernels: Sequence[Path] = ()) -> Path:
    """Compile main.cpp and the kernels, but for object files that are given, into ``folder``, with ``flags`` behind those of
    the package. Returns the program.

    Raises RuntimeError with the compiler's message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = {} if kernels else {f"csrc/cpu/{name}": own for name, own in cpu_kernels.sources(target.machine).items()}
    sources["tools/kernel_parity/main.cpp"] = []
    common = [*target.compiler, *cpu_kernels.flags(target.machine)]

    def compile(source: str) -> str:
        output = str(folder / f"{Path(source).stem}.o")
        run([*common, *sources[source], *flags, "-c", source, "-o", output])
        return output

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile, sources))
    program = folder / "kernel_parity"
    run([*target.compiler, *objects, *map(str, kernels), *(["-static"] if target.runner else []), "-o", str(program)])
    return program


def check(target: Target, program: Path, cases: int, seed: int = 0, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``cases`` cases. The exit status is 0 if all are right, else 1; what it prints says the rest."""
    command = [*target.runner, str(program), str(cases), str(seed), *([fault] if fault else [])]
    return subprocess.run(command, capture_output=True, text=True)
