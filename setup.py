# SPDX-License-Identifier: Apache-2.0
"""Builds sparsebwd._C, kernels compiled once for each instruction set, and sparsebwd._C_cuda, behind PyTorch's stable ABI.

The metadata is in pyproject.toml. The kernels have no torch header and compiler flags of their own,
so ninja compiles them apart; torch.utils.cpp_extension compiles the operators and links. Object
files are kept in build/ so that a rebuild compiles only what changed.

SPARSEBWD_CUDA=0|1|auto says whether to build the CUDA kernels (auto: where PyTorch has CUDA and nvcc
is found), TORCH_CUDA_ARCH_LIST for which architectures (else those of the devices here, or if there
are none those that the kernels are tested for).
SPARSEBWD_SANITIZE=1 compiles the CPU's part with AddressSanitizer and UBSan (tools/sanitize.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("sparsebwd: building needs PyTorch; run 'pip install torch' first, or build without --no-build-isolation.")
try:
    import ninja  # the package's own ninja need not be on PATH

    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
except ImportError:
    if shutil.which("ninja") is None:
        sys.exit("sparsebwd: building needs ninja; run 'pip install ninja'.")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "tools"))
import cpu_kernels  # noqa: E402
from cuda_toolkit import ARCHITECTURES, NVCC_FLAGS, CudaToolkit, find_cuda_toolkit, gencode  # noqa: E402

FLAGS = cpu_kernels.flags()
# Its functions then run only in processes that preload the sanitizers.
SANITIZED = os.environ.get("SPARSEBWD_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1"]
if SANITIZED:
    FLAGS += ["-O1", *SANITIZERS]

NINJA_RULES = """\
rule compile
  command = {compiler} -MMD -MF $out.d {flags} $own_flags -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
rule nvcc
  command = {nvcc} -MMD -MF $out.d $own_flags -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
"""


class Cuda(NamedTuple):
    """What the CUDA kernels are compiled with, and for: architectures such as "8.0", "9.0a" or "10.0+PTX"."""

    toolkit: CudaToolkit
    architectures: list[str]


def find_cuda() -> Cuda | str:
    """How to build the CUDA kernels, or why they are not built. Exits if they were asked for and cannot be."""
    wanted = os.environ.get("SPARSEBWD_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"sparsebwd: SPARSEBWD_CUDA: got {wanted!r}; accepted: 0, 1, auto")
    if wanted == "0":
        return "SPARSEBWD_CUDA=0 was set"
    if torch.version.cuda is None:
        found = f"PyTorch {torch.__version__} is built without CUDA"
    elif (toolkit := find_cuda_toolkit()) is None:
        found = "nvcc is found neither in the nvidia-cuda-nvcc package nor by CUDA_HOME or PATH"
    elif not (architectures := cuda_architectures(toolkit)):
        found = "neither TORCH_CUDA_ARCH_LIST nor the GPUs here have a compute capability of 8.0 or more"
    else:
        found = Cuda(toolkit, architectures)
    if wanted == "1" and isinstance(found, str):
        sys.exit(f"sparsebwd: SPARSEBWD_CUDA=1, but {found}.")
    return found


def cuda_architectures(toolkit: CudaToolkit) -> list[str]:
    """Those of TORCH_CUDA_ARCH_LIST, else of the devices here, else all that the kernels are tested for and nvcc knows."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t\n"))
    if listed != [""]:
        for name in listed:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
                sys.exit(
                    f"sparsebwd: TORCH_CUDA_ARCH_LIST: got {name!r}; accepted: compute capabilities, such as "
                    "'8.0;9.0a;10.0+PTX'. SPARSEBWD_CUDA=0 builds without CUDA kernels."
                )
        return [name for name in listed if int(name.partition(".")[0]) >= 8]
    tested = [re.sub(r"(\d[af]?)$", r".\1", name) for name in ARCHITECTURES]
    by_version = {name.rstrip("af"): name for name in tested}
    local = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if local:
        versions = [f"{major}.{minor}" for major, minor in sorted(local) if major >= 8]
        return [by_version.get(version, version) for version in versions]
    known = subprocess.run([toolkit.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    *others, last = (version for version in by_version if f"compute_{version.replace('.', '')}" in known)
    # Later devices translate the last one themselves.
    return [*(by_version[version] for version in others), f"{last}+PTX"]


def nvcc_flags(architectures: list[str]) -> list[str]:
    names = [name.removesuffix("+PTX").replace(".", "") for name in architectures]
    portable = [name for name, listed in zip(names, architectures) if listed.endswith("+PTX")]
    return [
        *NVCC_FLAGS,
        "-lineinfo",  # lets profilers name source lines; the machine code is the same
        *gencode(names),
        *(f"-gencode=arch=compute_{name},code=compute_{name}" for name in portable),
    ]


CUDA = find_cuda()


def kernel_objects(build_dir: Path) -> dict[str, list[str]]:
    """Compiles what changed among the kernel sources. Returns the object files of each extension."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(f"sparsebwd: no C++ compiler is found as '{compiler}'; install g++ or clang, or name one by CXX.")
    nvcc = shlex.quote("nvcc" if isinstance(CUDA, str) else CUDA.toolkit.nvcc)
    rules = [NINJA_RULES.format(compiler=compiler, flags=shlex.join(FLAGS), nvcc=nvcc)]
    objects = {"sparsebwd._C": [], "sparsebwd._C_cuda": []}

    def compile(extension: str, source: str, rule: str, flags: list[str]) -> None:
        output = str(build_dir / cpu_kernels.object_name(source))
        rules.append(f"build {output}: {rule} csrc/{source}\n  own_flags = {shlex.join(flags)}\n")
        objects[extension].append(output)

    for source, flags in cpu_kernels.sources().items():
        compile("sparsebwd._C", f"cpu/{source}", "compile", flags)
    if not isinstance(CUDA, str):
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            compile("sparsebwd._C_cuda", f"cuda/{source.name}", "nvcc", nvcc_flags(CUDA.architectures))
        includes = ["-Icsrc/cuda", *(f"-I{folder}" for folder in CUDA.toolkit.includes)]
        for source in sorted((CSRC / "cuda").glob("*.cpp")):
            compile("sparsebwd._C_cuda", f"cuda/{source.name}", "compile", includes)
    build_dir.mkdir(parents=True, exist_ok=True)
    rules_file = build_dir / "kernels.ninja"
    rules_file.write_text(f"builddir = {build_dir}\n" + "\n".join(rules))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run(["ninja", "-f", str(rules_file), *jobs]).returncode != 0:
        sys.exit("sparsebwd: a kernel did not compile; the compiler's message is above.")
    return objects


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would use a temporary directory, and compile everything every time.
        self.build_temp = cpu_kernels.build_folder(SANITIZED)

    def build_extensions(self) -> None:
        objects = kernel_objects(Path(self.build_temp, "kernels"))
        for extension in self.extensions:
            extension.extra_objects = objects[extension.name]
        if isinstance(CUDA, str):
            print(f"sparsebwd: no CUDA kernels are built: {CUDA}")
            for earlier in (ROOT / "python" / "sparsebwd").glob("_C_cuda.*"):
                earlier.unlink()
        super().build_extensions()


def extension(name: str, source: str, folders: list[str], macros: list[tuple[str, str]], **settings) -> CppExtension:
    return CppExtension(
        name,
        [f"csrc/torch/{source}"],
        include_dirs=[str(CSRC / "include"), *folders],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), *macros],  # 2.11
        extra_compile_args=["-O3", "-fvisibility=hidden", *(SANITIZERS if SANITIZED else [])],
        extra_link_args=SANITIZERS if SANITIZED else [],
        py_limited_api=True,
        **settings,
    )


if isinstance(CUDA, str):
    macros = [("SPARSEBWD_NO_CUDA", json.dumps(CUDA))]
    cuda_extensions = []
else:
    macros = []
    cuda_extensions = [
        extension(
            "sparsebwd._C_cuda",
            "library_cuda.cpp",
            [str(CSRC / "cuda"), *CUDA.toolkit.includes],
            [("SPARSEBWD_CUDA_ARCHITECTURES", json.dumps(" ".join(CUDA.architectures)))],
            library_dirs=[*CUDA.toolkit.libraries],
            # The static runtime is wherever nvcc is, and need not be of the version that PyTorch loads. It works on the
            # same contexts and streams, as those belong to the driver.
            libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
        )
    ]

setup(
    ext_modules=[extension("sparsebwd._C", "library.cpp", [str(CSRC / "cpu")], macros), *cuda_extensions],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
