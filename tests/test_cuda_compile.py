# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels as machine code, for each architecture: they compile, keep in registers what belongs there, and skip
zeros by branches. No GPU is needed. Each limit is first shown to find a fault planted for it (planted.cu)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cuda_toolkit
import gpu_modules
import pytest
import sass
from sass import Kernel
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow  # it compiles

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
PLANTED = ROOT / "tests" / "planted.cu"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
ARCHITECTURES = [f"sm_{name}" for name in cuda_toolkit.ARCHITECTURES]


class Skipping(NamedTuple):
    """What a kernel that skips zeros promises: a non-zero costs a thread ``run`` multiply-adds, chosen among ``cases``
    places in the code."""

    run: int
    cases: int


# By regular expressions that match names of kernels from their start; their groups are numbers.
SKIP_ZEROS: dict[str, Callable[..., Skipping]] = {
    # A non-zero gives all taps of the lane's channels a product. Its place is its pixel among those of a strip.
    r"agb_kernel<Form<\w+, (\d+), (\d+), (\d+), (\d+)>": lambda taps, stride, columns, lane: Skipping(
        run=taps * taps * lane, cases=columns // stride
    ),
    # Its place is its channel, of those of a warp, and the registers, of 4 that take turns, where its column begins.
    r"wgc_kernel<Kernel<\w+, (\d+), \d+, (\d+)>": lambda taps, lane: Skipping(
        run=taps * taps * lane, cases=4 * (8 if taps == 1 else 16 // lane)
    ),
}
# By the same: channels-last gradients, where channels make whole vectors.
LOAD_16_BYTES = [r"prune_kernel<ChannelsLast<(float|BFloat16|Float16), true>"]


def faults(kernel: Kernel) -> list[str]:
    """What no kernel may have."""
    found = []
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} instructions that reach for local memory")
    if not kernel.threads:
        found.append("no __launch_bounds__")
    promised = max(kernel.blocks, 1) * kernel.threads // 32
    if kernel.warps < promised:
        found.append(f"registers for {kernel.warps} warps, of {promised} that __launch_bounds__ promises")
    return found


def skipping_faults(kernel: Kernel, skipping: Skipping) -> list[str]:
    """Why a zero costs as much as another value, or might."""
    found = []
    count = len(kernel.multiply_adds)
    if count < skipping.run * skipping.cases:
        found.append(f"{count} multiply-adds, fewer than {skipping.cases} cases of {skipping.run}")
    if kernel.guarded_share >= 0.05:
        found.append(f"{kernel.guarded_share:.0%} of the multiply-adds have predicates instead of branches around them")
    if kernel.longest_run > skipping.run:
        found.append(f"{kernel.longest_run} multiply-adds without a branch, of which one non-zero needs {skipping.run}")
    if not kernel.jump_tables and kernel.branches < skipping.cases:
        found.append(f"{kernel.branches} branches and no jump table for {skipping.cases} cases")
    if len(kernel.select(r"FMUL\b")) > count * 0.05:
        found.append("products that are not fused with their addition: fmaf is needed")
    return found


def loading_faults(kernel: Kernel) -> list[str]:
    return [] if kernel.select(r"LDG\b.*\.128\b") else ["no load of 16 bytes from global memory"]


@pytest.fixture(scope="session")
def toolkit() -> cuda_toolkit.CudaToolkit:
    found = cuda_toolkit.find_cuda_toolkit()
    if found is None or found.cuobjdump is None:
        what = "compiler" if found is None else "disassembler (cuobjdump)"
        pytest.skip(f"no CUDA {what} is found; requirements-cuda.txt has it for Linux on x86-64 and arm64")
    return found


@pytest.fixture(scope="session")
def compiled(toolkit) -> dict[Path, Future[list[Kernel]]]:
    return sass.disassemble_all(toolkit, [*SOURCES, PLANTED])


@pytest.fixture(scope="session")
def kernels(compiled) -> list[Kernel]:
    """Of all sources that compile; a test of its own tells which do not."""
    return [kernel for source in SOURCES if not compiled[source].exception() for kernel in compiled[source].result()]


@pytest.fixture(scope="session")
def planted(compiled) -> dict[tuple[str, str], Kernel]:
    return {(kernel.name, kernel.architecture): kernel for kernel in compiled[PLANTED].result()}


def refuse(faulty: Callable[[Kernel], list[str]], kernels: list[Kernel]) -> None:
    found = [f"{kernel.architecture} {kernel.name}: {fault}" for kernel in kernels for fault in faulty(kernel)]
    assert kernels
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def named(kernels: list[Kernel], name: str, architecture: str) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.architecture == architecture and re.match(name, kernel.name)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_sources_compile_without_warnings_for_every_architecture(compiled, source):
    assert {kernel.architecture for kernel in compiled[source].result()} == set(ARCHITECTURES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_keep_to_registers_and_to_their_launch_bounds(compiled, source):
    refuse(faults, compiled[source].result())


@pytest.mark.parametrize("name", SKIP_ZEROS, ids=lambda name: name.partition("<")[0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeros_are_branched_around(kernels, name, architecture):

    def faulty(kernel: Kernel) -> list[str]:
        numbers = map(int, re.match(name, kernel.name).groups())
        return skipping_faults(kernel, SKIP_ZEROS[name](*numbers))

    refuse(faulty, named(kernels, name, architecture))


@pytest.mark.parametrize("name", LOAD_16_BYTES, ids=lambda name: name.partition("<")[0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_read_16_bytes_at_a_time(kernels, name, architecture):
    refuse(loading_faults, named(kernels, name, architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestPlantedFaults:
    @pytest.mark.parametrize(
        "name, words",
        [
            ("spilling", "bytes of stack"),
            ("indexed", "reach for local memory"),
            ("unbounded", "no __launch_bounds__"),
        ],
    )
    def test_of_any_kernel(self, planted, architecture, name, words):
        (fault,) = faults(planted[name, architecture])
        assert words in fault

    @pytest.mark.parametrize(
        "form, words",
        [
            ("Guarded", "100% of the multiply-adds have predicates"),
            ("Selected", "48 multiply-adds without a branch, of which one non-zero needs 6"),
        ],
    )
    def test_of_kernels_that_skip_zeros(self, planted, architecture, form, words):
        kernel = planted[f"convolution<{form}>", architecture]
        assert not faults(kernel)
        assert any(words in fault for fault in skipping_faults(kernel, Skipping(run=6, cases=8)))

    def test_cured(self, planted, architecture):
        kernel = planted["convolution<Branched>", architecture]
        assert not faults(kernel) and not skipping_faults(kernel, Skipping(run=6, cases=8))
        assert skipping_faults(kernel, Skipping(run=6, cases=9)) and skipping_faults(kernel, Skipping(run=5, cases=8))

    def test_of_loads(self, planted, architecture):
        assert not loading_faults(planted["wide", architecture])
        assert loading_faults(planted["narrow", architecture])

    def test_products_apart_from_their_additions(self, planted, architecture):
        kernel = planted["unfused", architecture]
        assert any("fmaf" in fault for fault in skipping_faults(kernel, Skipping(run=0, cases=0)))

    def test_of_registers(self, planted, architecture):
        kernel = planted["convolution<Branched>", architecture]
        (fault,) = faults(replace(kernel, registers=136))  # 15 warps' worth
        assert fault == "registers for 8 warps, of 16 that __launch_bounds__ promises"
        assert not faults(replace(kernel, registers=128))


@pytest.mark.parametrize("body, words", [("int unused = 1;", "never referenced"), ("missing();", "undefined")])
def test_warnings_and_errors_are_refused(toolkit, tmp_path, body, words):
    source = tmp_path / "kernel.cu"
    source.write_text(f"__global__ void kernel() {{ {body} }}\n")
    with pytest.raises(RuntimeError, match=words):
        sass.disassemble(toolkit, source)


def test_what_did_not_change_is_not_compiled_again(toolkit, tmp_path, monkeypatch):
    commands = []
    words = sass._words
    monkeypatch.setattr(sass, "_words", lambda command: (commands.append(command), words(command))[1])
    monkeypatch.setattr(sass, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(sass, "ARCHITECTURES", cuda_toolkit.ARCHITECTURES[:1])
    source = tmp_path / "kernel.cu"

    def compilations(code: str, *flags: str) -> int:
        commands.clear()
        source.write_text(code)
        assert {k.architecture for k in sass.disassemble(toolkit, source, flags)} == set(ARCHITECTURES[:1])
        return sum("-c" in command for command in commands)

    code = "__global__ void kernel(int* result) { *result = 1; }"
    assert compilations(code) == 1
    assert compilations(code) == 0
    assert compilations(code, "-O2") == 1
    assert compilations(code + "\n", "-O2") == 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".o", ".txt"]


def test_operators_of_cuda_compile_and_link(compiled, toolkit, tmp_path):
    """Against this PyTorch, with or without CUDA: only the function that needs PyTorch's CUDA is missing."""
    objects = []
    for source in SOURCES:
        compiled[source].result()
        objects.append(sass.object_of(source))
    for source in ("cuda/device.cpp", "torch/library_cuda.cpp"):
        objects.append(tmp_path / f"{Path(source).stem}.o")
        folders = [ROOT / "csrc" / "include", ROOT / "csrc" / "cuda"]
        systems = [*toolkit.includes, *cpp_extension.include_paths(), sysconfig.get_path("include")]
        definitions = ["TORCH_TARGET_VERSION=0x020b000000000000", 'SPARSEBWD_CUDA_ARCHITECTURES="8.0"']
        compile = [*COMPILER, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
        compile += ["-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror"]
        compile += [*(f"-D{words}" for words in definitions), *(f"-I{folder}" for folder in folders)]
        compile += [*(f"-isystem{folder}" for folder in systems), "-c", ROOT / "csrc" / source, "-o", objects[-1]]
        done = subprocess.run(compile, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    libraries = [f"-L{folder}" for folder in (*toolkit.libraries, *cpp_extension.library_paths())]
    libraries += [f"-l{name}" for name in ("torch", "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread")]
    link = [*COMPILER, "-shared", "-Wl,-z,defs", *objects, *libraries, "-o", tmp_path / "_C_cuda.so"]
    done = subprocess.run(link, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    missing = set(re.findall(r"undefined (?:reference to `|symbol: )([^'\n]+)", done.stderr))
    assert {name for name in missing if not name.startswith("Py")} == {"aoti_torch_get_current_cuda_stream"}
    # For a machine with a GPU it is linked all the same, and asks there for the library that has it.
    module = gpu_modules.link(toolkit, objects, tmp_path)
    assert b"libtorch_cuda.so\0" in module.read_bytes()


def test_architectures_as_pytorch_writes_them():
    assert gpu_modules.listed(["80", "90a", "100"]) == "8.0 9.0a 10.0"


class TestToolkit:
    """Where the compiler is looked for, with scripts in its place."""

    @pytest.fixture
    def places(self, tmp_path, monkeypatch) -> dict[str, Path]:
        folders = {"package": tmp_path / "nvidia" / "cu13", "home": tmp_path / "home", "path": tmp_path / "path"}
        for folder in folders.values():
            (folder / "bin").mkdir(parents=True)
            (folder / "include").mkdir()
            (folder / "lib").mkdir()
        namespace = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
        monkeypatch.setattr(cuda_toolkit.importlib.util, "find_spec", {"nvidia": namespace}.get)
        monkeypatch.setenv("CUDA_HOME", str(folders["home"]))
        monkeypatch.setenv("PATH", str(folders["path"] / "bin"))
        return folders

    @staticmethod
    def write(home: Path, script: str = "", name: str = "nvcc") -> Path:
        program = home / "bin" / name
        said = f'#$ TOP={home}/bin/..\n#$ INCLUDES="-I{home}/bin/../include"  \n#$ LIBRARIES=  "-L{home}/lib64"\n'
        program.write_text("#!/bin/sh\n" + (script or f"printf '{said}' >&2\n"))
        program.chmod(0o755)
        return program

    def test_packages_come_before_cuda_home_before_path(self, places):
        found = []
        programs = [self.write(home) for home in places.values()]
        for program in programs:
            found.append(cuda_toolkit.find_cuda_toolkit())
            program.unlink()
        assert [toolkit.nvcc for toolkit in found] == [str(program) for program in programs]
        assert [toolkit.includes for toolkit in found] == [(str(home / "include"),) for home in places.values()]
        assert [toolkit.libraries for toolkit in found] == [(str(home / "lib"),) for home in places.values()]
        assert cuda_toolkit.find_cuda_toolkit() is None

    @pytest.mark.parametrize("script", ["exit 1", "echo no plan >&2"])
    def test_what_is_no_compiler_is_passed_over(self, places, script):
        self.write(places["package"], script)
        assert cuda_toolkit.find_cuda_toolkit() is None
        program = self.write(places["path"])
        assert cuda_toolkit.find_cuda_toolkit().nvcc == str(program)

    def test_the_disassembler_may_be_elsewhere(self, places):
        self.write(places["home"])
        assert cuda_toolkit.find_cuda_toolkit().cuobjdump is None
        program = self.write(places["package"], name="cuobjdump")
        assert cuda_toolkit.find_cuda_toolkit().cuobjdump == str(program)
