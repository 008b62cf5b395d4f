# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA kernels for a CPU (csrc/emulator) and calls them on PyTorch's CPU tensors; see docs/emulator.md."""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import pybind11
import torch
from torch.utils import cpp_extension

from sparsebwd.problem import ConvProblem

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = ROOT / "csrc" / "emulator"
CUDA = ROOT / "csrc" / "cuda"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# Comes first in what is linked: of inline functions that it shares with kernels, the linker then takes the runtime's,
# which are not instrumented.
RUNTIME = sorted(set(EMULATOR.glob("*.cpp")) - {EMULATOR / "bindings.cpp"})
# Of PyTorch's, over its stable ABI.
OPERATORS = ROOT / "csrc" / "torch" / "library_cuda.cpp"

# fast: optimised. checked: each memory access of a kernel is seen by the runtime (csrc/emulator/checks.cpp).
# sanitized: with the compiler's own sanitizers, in a process for which sanitized_environment() is set.
Variant = Literal["fast", "checked", "sanitized"]
# Kernels may read memory as other types than it was written as: nvcc has no rule against that.
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -Wall -Wextra"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
KERNEL_FLAGS = {
    "fast": "-O2",
    "checked": "-O0 -g1 -fsanitize=thread,undefined -fno-sanitize=vptr",
    "sanitized": f"-O0 -g1 {SANITIZERS}",
}
RUNTIME_FLAGS = {
    "fast": "-O2",
    "checked": "-O2 -DSPARSEBWD_EMULATOR_CHECKED",
    "sanitized": "-O2 -DSPARSEBWD_EMULATOR_SANITIZED",
}
LINK_FLAGS = {"fast": "", "checked": "", "sanitized": SANITIZERS}


def sanitized_environment() -> dict[str, str] | None:
    """Environment variables for a process that imports the sanitized build; None if the compiler has no sanitizers."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the former looks for functions of the latter when it is loaded
        command = [*COMPILER, f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not all(map(os.path.isabs, libraries)):
        return None
    # Leaks are Python's own.
    return os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def fixed_addresses() -> list[str]:
    """A command before others: some versions of AddressSanitizer find no place for themselves, now and then, where addresses
    are very random."""
    command = ["setarch", "-R"]
    if shutil.which(command[0]) is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        return []
    return command


def _compile(source: Path, variant: Variant, name: str) -> str:
    """The flags for one source."""
    includes = [CUDA, ROOT / "csrc" / "include", EMULATOR]
    if source.suffix == ".cu":
        own = f"-x c++ -Wno-unknown-pragmas -Wno-unused-parameter {KERNEL_FLAGS[variant]}"
    else:
        own = RUNTIME_FLAGS[variant]
        # What only hands on arguments takes twice as long to optimise as to compile.
        python = Path(sysconfig.get_path("include"))
        if source == OPERATORS:
            includes += [*map(Path, cpp_extension.include_paths()), python]
            own += " -O0 -std=c++20 -DTORCH_TARGET_VERSION=0x020b000000000000"
        elif "PYBIND11_MODULE" in source.read_text("utf-8"):
            includes += [Path(pybind11.get_include()), python]
            own += f" -O0 -DSPARSEBWD_MODULE={name}"
    return " ".join([FLAGS, "-DSPARSEBWD_EMULATOR", own, *(f"-I{shlex.quote(str(path))}" for path in includes)])


def _escaped(*paths: Path) -> str:
    return " ".join(str(path).replace(" ", "$ ") for path in paths)


def _ninja(folder: Path, edges: list[str], targets: list[Path], link_flags: str = "") -> None:
    rules = [
        "rule compile",
        "  command = $cxx $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -Wl,-z,now -o $out.new $in {link_flags} -ldl && mv -f $out.new $out",
    ]
    (folder / "build.ninja").write_text("\n".join([f"cxx = {shlex.join(COMPILER)}", *rules, *edges, ""]))
    jobs = str(os.cpu_count())
    command = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs, *map(str, targets)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator does not compile:\n{done.stdout}{done.stderr}")


def _edges(folder: Path, sources: list[Path], variant: Variant, name: str) -> tuple[list[str], list[Path]]:
    edges, built = [], []
    for source in map(Path.resolve, sources):
        target = folder / f"{source.parent.name}-{source.name}.o"
        flags = _compile(source, variant, name)
        edges += [f"build {_escaped(target)}: compile {_escaped(source)}", f"  flags = {flags}"]
        built.append(target)
    return edges, built


def _kernels() -> list[Path]:
    return [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp"))]


class _Folder:
    """A folder for build outputs, locked: several test runs may share it."""

    def __init__(self, name: str):
        self.path = ROOT / "build" / name

    def __enter__(self) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        return self.path

    def __exit__(self, *_) -> None:
        self.lock.close()


def _link(folder: Path, sources: list[Path], variant: Variant, name: str, flags: str = "") -> Path:
    """The shared library of these sources and of the runtime; the folder is locked."""
    edges, built = _edges(folder, [*RUNTIME, *sources], variant, name)
    library = folder / f"{name}.so"
    edge = f"build {_escaped(library)}: link {_escaped(*built)}"
    _ninja(folder, [*edges, edge], [library], f"{LINK_FLAGS[variant]} {flags}")
    return library


def operators() -> Path:
    """Compile the raw operators of the cuda backend with all kernels: a library for torch.ops.load_library.

    Raises RuntimeError with the compiler's messages.
    """
    places = " ".join(f"-L{shlex.quote(place)}" for place in cpp_extension.library_paths())
    with _Folder("emulator-fast") as folder:
        return _link(folder, [*_kernels(), OPERATORS], "fast", "operators", f"{places} -ltorch -ltorch_cpu -lc10")


def build(name: str, sources: list[Path], variant: Variant = "fast") -> ModuleType:
    """Compile kernels (.cu) and a pybind11 module (.cpp, ``PYBIND11_MODULE(SPARSEBWD_MODULE, m)``) with the runtime.

    Returns the module, imported. What is up to date is not compiled again. Raises RuntimeError with the compiler's
    messages.
    """
    name = f"{name}_{variant}"
    with _Folder(f"emulator-{variant}") as folder:
        library = _link(folder, sources, variant, name)
        loader = importlib.machinery.ExtensionFileLoader(name, str(library))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
    return module


@functools.cache
def _module(variant: Variant) -> ModuleType:
    return build("emulator", [*_kernels(), EMULATOR / "bindings.cpp"], variant)


class Device(NamedTuple):
    """What launch shapes depend on."""

    multiprocessors: int = 4
    shared_per_block: int = 227 * 1024  # bytes
    shared_per_multiprocessor: int = 228 * 1024
    cooperative: bool = True  # whether K1 is one launch


@dataclass
class Pruning:
    """How to prune, as struct Pruning of kernels.h.

    key: int64 [2]. sigma_history: None, or int32 [1 + kSigmaHistory], updated in place. scales: None, or float32 [n].
    """

    key: torch.Tensor
    sigma_coefficient: float
    quantile: float
    sigma_history: torch.Tensor | None = None
    scales: torch.Tensor | None = None


class Pruned(NamedTuple):
    """What pruning gives.

    values: like g, or None. nonzeros: uint32 [n * h * w, ceil(c / 32)], or None. stats: float32 tau, sigma, density.
    """

    values: torch.Tensor | None
    nonzeros: torch.Tensor | None
    stats: torch.Tensor


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """The same memory; NumPy has no bfloat16, so that elements of 16 bits are integers there."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def nonzeros_of(g: torch.Tensor) -> torch.Tensor:
    """The bits that pruning emits beside g [n, c, h, w]: uint32 [n * h * w, ceil(c / 32)]; a NaN is a non-zero."""
    n, c, h, w = g.shape
    bits = torch.zeros(n * h * w, -(-c // 32) * 32, dtype=torch.bool)
    bits[:, :c] = (g != 0).permute(0, 2, 3, 1).reshape(n * h * w, c)
    words = np.packbits(bits.numpy().reshape(n * h * w, -(-c // 32), 32), axis=-1, bitorder="little")
    return torch.from_numpy(words.view(np.uint32)[..., 0].copy())


class Emulator:
    """The kernels of csrc/cuda on a CPU.

    ``seed``: what the order of threads and blocks follows from; each launch advances it. ``device``: the emulated GPU.
    A rule that a kernel breaks, and an error that a launch returns, is a RuntimeError.
    """

    def __init__(self, variant: Variant = "fast", seed: int = 0, device: Device = Device()):  # noqa: B008
        self._module = _module(variant)
        self.seed = seed
        self.device = device

    def _call(self, function: str, *arguments):
        self._module.set_seed(self.seed)
        self._module.set_device(*self.device)
        self.seed += 16
        return readable(self._module, getattr(self._module, function), *arguments)

    def prune(
        self,
        g: torch.Tensor,
        pruning: Pruning | None,
        *,
        channels_last: bool,
        values: bool = True,
        nonzeros: bool = False,
        out: torch.Tensor | None = None,
    ) -> Pruned:
        """Prune g [n, c, h, w], dense in the named layout; None as pruning copies it.

        values, nonzeros: whether these are wanted. out: where values go (g itself: in place), else a new tensor.
        """
        n, c, h, w = g.shape
        if not g.is_contiguous(memory_format=_memory_format(channels_last)):
            raise ValueError(f"g: got strides {g.stride()}; accepted: dense with channels_last={channels_last}")
        if out is None and values:
            out = torch.full_like(g, torch.nan)
        words = None
        if nonzeros:
            words = torch.full((n * h * w, -(-c // 32)), 0x5A5A5A5A, dtype=torch.int32).view(torch.uint32)
        stats = torch.full((3,), torch.nan)
        settings = (None, 0.0, 0.0, None, None)
        if pruning is not None:
            arrays = (_array(pruning.sigma_history), _array(pruning.scales))
            settings = (_array(pruning.key), pruning.sigma_coefficient, pruning.quantile, *arrays)
        results = (_array(out), _array(words), _array(stats))
        self._call("prune", _array(g), _DTYPES[g.dtype], g.shape, channels_last, *settings, *results)
        return Pruned(out, words, stats)

    def agb(
        self,
        problem: ConvProblem,
        grad_output: torch.Tensor,
        weight: torch.Tensor,
        nonzeros: torch.Tensor | None = None,
        *,
        channels_last: bool = True,
        result: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of the input, into `result` or a new tensor of that layout. Operands may have any strides."""
        if result is None:
            result = _empty(problem.input_size, grad_output.dtype, channels_last)
        return self._convolution("agb", problem, grad_output, weight, nonzeros, result)

    def wgc(
        self,
        problem: ConvProblem,
        grad_output: torch.Tensor,
        input: torch.Tensor,
        nonzeros: torch.Tensor | None = None,
        *,
        channels_last: bool = True,
        result: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of the weight, into `result` or a new tensor of that layout. Operands may have any strides."""
        if result is None:
            result = _empty(problem.weight_size, grad_output.dtype, channels_last)
        return self._convolution("wgc", problem, grad_output, input, nonzeros, result)

    def _convolution(self, function, problem, grad_output, operand, nonzeros, result):
        result.fill_(torch.nan)
        arrays = (_array(grad_output), _array(nonzeros), _array(operand), _array(result))
        self._call(function, _numbers(problem), _DTYPES[grad_output.dtype], *arrays)
        return result

    def agb_refusal(self, problem: ConvProblem, dtype: torch.dtype) -> str | None:
        return self._module.agb_refusal(_numbers(problem), _DTYPES[dtype])

    def wgc_refusal(self, problem: ConvProblem, dtype: torch.dtype) -> str | None:
        return self._module.wgc_refusal(_numbers(problem), _DTYPES[dtype])


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty(size: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, memory_format=_memory_format(channels_last))


def _numbers(p: ConvProblem) -> tuple[int, ...]:
    return (p.n, p.c, p.h, p.w, p.k, p.r, p.s, *p.stride, *p.padding, *p.dilation, p.groups)


def readable(module: ModuleType, function, *arguments):
    """Call a function of a built module; places in the code, {code 0x...} in messages, become file and line."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        message = re.sub(r"\{code (0x[0-9a-f]+)\}", lambda m: _line(module.__spec__.origin, m[1]), str(error))
        raise RuntimeError(message) from None


@functools.cache
def _line(library: str, offset: str) -> str:
    """File and line of a call that returns to `offset` of the library; of what the emulator inlined, those outside it."""
    call = hex(int(offset, 16) - 1)
    try:
        done = subprocess.run(["addr2line", "-i", "-e", library, call], capture_output=True, text=True)
    except FileNotFoundError:
        return f"{library}+{call}"
    places = [Path(line.split(" ")[0]) for line in done.stdout.splitlines()]
    return next((place.name for place in places if place.parent.resolve() != EMULATOR), f"{library}+{call}")
