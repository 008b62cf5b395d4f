# SPDX-License-Identifier: Apache-2.0
"""Builds sparsebwd._C: kernels compiled once for each instruction set, behind PyTorch's stable ABI.

The metadata is in pyproject.toml. The kernels have no torch header and a compiler flag of their own
for each instruction set, so ninja compiles them apart; torch.utils.cpp_extension compiles the
operators and links. Object files are kept in build/ so that a rebuild compiles only what changed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit("sparsebwd: building needs PyTorch; run 'pip install torch' first, or build without --no-build-isolation.")
try:
    import ninja  # the package's own ninja need not be on PATH

    os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
except ImportError:
    if shutil.which("ninja") is None:
        sys.exit("sparsebwd: building needs ninja; run 'pip install ninja'.")

CSRC = Path(__file__).resolve().parent / "csrc"
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Compiled once: the choice of kernels, and drivers that hand tasks to the thread pool.
PLAIN_SOURCES = ["isa", "prune", "conv_backward", "conv_plan", "layout", "lists", "agb", "wgc"]
# Compiled for each instruction set, from csrc/cpu/<kernel>_<instruction set>.cpp.
KERNELS = ["prune", "conv"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"]
ISA_FLAGS = {
    "baseline": [],
    **(
        {"avx2": AVX2_FLAGS, "avx512": [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]}
        if X86
        else {}
    ),
}
FLAGS = [
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
    *(["-DSPARSEBWD_X86"] if X86 else []),
]

NINJA_RULE = """\
rule compile
  command = {compiler} -MMD -MF $out.d {flags} $isa_flags -c $in -o $out
  description = compile $in
  depfile = $out.d
  deps = gcc
"""


def kernel_objects(build_dir: Path) -> list[str]:
    """Compiles what changed among the kernel sources and returns all object files."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(f"sparsebwd: no C++ compiler is found as '{compiler}'; install g++ or clang, or name one by CXX.")
    sources = {name: [] for name in PLAIN_SOURCES}
    sources |= {f"{kernel}_{isa}": flags for kernel in KERNELS for isa, flags in ISA_FLAGS.items()}
    objects = {name: str(build_dir / f"{name}.o") for name in sources}
    rules = [NINJA_RULE.format(compiler=compiler, flags=shlex.join(FLAGS))]
    for name, flags in sources.items():
        rules.append(f"build {objects[name]}: compile csrc/cpu/{name}.cpp\n  isa_flags = {shlex.join(flags)}\n")
    build_dir.mkdir(parents=True, exist_ok=True)
    rules_file = build_dir / "kernels.ninja"
    rules_file.write_text(f"builddir = {build_dir}\n" + "\n".join(rules))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if subprocess.run(["ninja", "-f", str(rules_file), *jobs]).returncode != 0:
        sys.exit("sparsebwd: a kernel did not compile; the compiler's message is above.")
    return list(objects.values())


class Build(BuildExtension):
    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable install would use a temporary directory, and compile everything every time.
        self.build_temp = str(Path("build") / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_objects = kernel_objects(Path(self.build_temp, "kernels"))
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "sparsebwd._C",
            ["csrc/torch/library.cpp"],
            include_dirs=[str(CSRC / "include"), str(CSRC / "cpu")],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # 2.11
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
