# SPDX-License-Identifier: Apache-2.0
"""The CUDA compiler: where it is, and how csrc/cuda is compiled. setup.py, the tests and tools/sass.py agree by this file."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What the kernels are tuned for and tested to compile for: A100, H100, B200.
ARCHITECTURES = ("80", "90a", "100")

# Relative to the root of the project. The arithmetic is that of the CPU and of the emulator: kernels that mean a
# fused multiply-add say fmaf, and no other expression becomes one.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    "-Icsrc/include",
    "-Icsrc/cuda",
]


def gencode(architectures: tuple[str, ...] | list[str]) -> list[str]:
    """The flags of nvcc that make machine code for these architectures ("80", "90a", ...) in one object file."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA compiler and what belongs to it.

    ``nvcc`` is the path of the compiler; ``includes`` and ``libraries`` are the folders of cuda_runtime_api.h and of
    libcudart_static.a, for a C++ compiler; ``cuobjdump`` is the path of the disassembler, which may come from elsewhere,
    or None.
    """

    nvcc: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    cuobjdump: str | None


def find_cuda_toolkit() -> CudaToolkit | None:
    """The CUDA compiler of the Python packages (requirements-cuda.txt), else of CUDA_HOME, else of PATH, else None."""
    for nvcc in _programs("nvcc"):
        found = _ask(nvcc)
        if found is not None:
            return found
    return None


def _programs(name: str) -> Iterator[str]:
    """Where a program of CUDA's may be, the first choice first."""
    packages = importlib.util.find_spec("nvidia")  # a namespace: PyTorch's CUDA libraries are there as well
    folders = [Path(folder) for folder in packages.submodule_search_locations] if packages else []
    places = [str(home / "bin") for folder in folders for home in folder.glob("cu*")]
    if os.environ.get("CUDA_HOME"):
        places.append(os.path.join(os.environ["CUDA_HOME"], "bin"))
    places.append(os.environ.get("PATH", os.defpath))
    yield from filter(None, (shutil.which(name, path=place) for place in places))


def _ask(nvcc: str) -> CudaToolkit | None:
    """The toolkit of this compiler, from its own words: it may be a script or a link far from its files."""
    try:
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError):
        return None
    said = dict(re.findall(r"^#\$ (TOP|INCLUDES|SYSTEM_INCLUDES|LIBRARIES)=(.*)$", plan, re.MULTILINE))
    if not said.keys() >= {"TOP", "INCLUDES"}:
        return None
    includes = re.findall(r'"-I([^"]+)"', said["INCLUDES"])
    includes += re.findall(r'"-isystem" "([^"]+)"', said.get("SYSTEM_INCLUDES", ""))
    libraries = re.findall(r'"-L([^"]+)"', said.get("LIBRARIES", ""))
    libraries.append(os.path.join(said["TOP"], "lib"))  # of the Python packages: nvcc itself looks in lib64
    return CudaToolkit(nvcc, _existing(includes), _existing(libraries), next(_programs("cuobjdump"), None))


def _existing(folders: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.realpath(folder) for folder in folders if os.path.isdir(folder)))
