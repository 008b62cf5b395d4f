# SPDX-License-Identifier: Apache-2.0
"""The package with its modules for a GPU that is elsewhere (`make gpu-modules`): build/gpu-modules, for gpu-check's --prebuilt.

Needs nvcc, a C++ compiler and this PyTorch, with or without CUDA: the modules are behind PyTorch's stable ABI, and what they
need of PyTorch's CUDA library is found when they are loaded. For machines on which the package cannot be built.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_toolkit import ARCHITECTURES, NVCC_FLAGS, CudaToolkit, find_cuda_toolkit, gencode
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "gpu-modules"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
MODULE = "_C_cuda.abi3.so"


def compile_kernels(toolkit: CudaToolkit, architectures: list[str], folder: Path) -> list[Path]:
    """An object file of each source of csrc/cuda and of the operators, in `folder`. Raises CalledProcessError."""
    definitions = ["TORCH_TARGET_VERSION=0x020b000000000000", f'SPARSEBWD_CUDA_ARCHITECTURES="{listed(architectures)}"']
    systems = [*toolkit.includes, *cpp_extension.include_paths(), sysconfig.get_path("include")]
    plain = [*COMPILER, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030b0000"]
    plain += [*(f"-D{words}" for words in definitions), "-Icsrc/include", "-Icsrc/cuda", *(f"-isystem{f}" for f in systems)]
    kernels = [toolkit.nvcc, *NVCC_FLAGS, "-lineinfo", *gencode(architectures)]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.c*")) + [ROOT / "csrc" / "torch" / "library_cuda.cpp"]
    sources = [source for source in sources if source.suffix in (".cu", ".cpp")]

    def compile(source: Path) -> Path:
        result = folder / f"{source.name}.o"
        command = [*(kernels if source.suffix == ".cu" else plain), "-c", str(source), "-o", str(result)]
        subprocess.run(command, cwd=ROOT, check=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile, sources))


def link(toolkit: CudaToolkit, objects: list[Path], folder: Path) -> Path:
    """The module. It asks for libtorch_cuda.so by name, whether or not this PyTorch has one."""
    stand_in = folder / "libtorch_cuda.so"
    empty = [*COMPILER, "-shared", "-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so", "-o", str(stand_in)]
    subprocess.run(empty, check=True)
    module = folder / MODULE
    places = [f"-L{place}" for place in (folder, *toolkit.libraries, *cpp_extension.library_paths())]
    names = [f"-l{name}" for name in ("torch_cuda", "torch", "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread")]
    subprocess.run(
        [*COMPILER, "-shared", *map(str, objects), *places, "-Wl,--no-as-needed", *names, "-o", str(module)], check=True
    )
    return module


def listed(architectures: list[str]) -> str:
    """As PyTorch writes them: "8.0 9.0a"."""
    return " ".join(f"{name.rstrip('af')[:-1]}.{name.removeprefix(name.rstrip('af')[:-1])}" for name in architectures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["90a"], choices=ARCHITECTURES, help="default: 90a (H100, H200)")
    options = parser.parse_args()
    package = ROOT / "python" / "sparsebwd"
    if not list(package.glob("_C.*.so")):
        sys.exit("gpu-modules: the package is not built here; run 'make build' first.")
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        sys.exit("gpu-modules: no CUDA compiler is found; run 'pip install -r requirements-cuda.txt'.")
    OUTPUT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT.parent) as scratch:
        folder = Path(scratch)
        try:
            module = link(toolkit, compile_kernels(toolkit, options.architectures, folder), folder)
        except subprocess.CalledProcessError as error:
            sys.exit(f"gpu-modules: exit status {error.returncode} of {shlex.join(map(str, error.cmd))[:200]}")
        new = folder / "new"
        shutil.copytree(package, new / "sparsebwd", ignore=shutil.ignore_patterns("__pycache__", "_C_cuda.*"))
        shutil.copytree(ROOT / "bench", new / "sparsebwd" / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy2(module, new / "sparsebwd" / MODULE)
        shutil.rmtree(OUTPUT, ignore_errors=True)
        new.rename(OUTPUT)
    print(f"{OUTPUT.relative_to(ROOT)}: make gpu-check ARGS='--prebuilt {OUTPUT.relative_to(ROOT)}'")


if __name__ == "__main__":
    main()
