# SPDX-License-Identifier: Apache-2.0
"""What became of the CUDA kernels in machine code: sass.py [SOURCE.cu ...] prints a table (`make sass`).

Needs a CUDA compiler and its disassembler, no GPU. tests/test_cuda_compile.py holds the kernels to limits by the
same functions.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import ARCHITECTURES, NVCC_FLAGS, CudaToolkit, find_cuda_toolkit, gencode

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "sass"  # of each source the object file and its disassembly, as last compiled

# Of a multiprocessor of every architecture here.
REGISTERS, MOST_WARPS, WARP_UNIT = 65536, 64, 256


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: ``guard`` is its predicate, such as "@!P0", or empty."""

    guard: str
    opcode: str
    operands: str


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture.

    ``name`` has template arguments but no namespace of ours and no parameters. ``stack`` is in bytes a thread; spilled
    registers are on it. ``threads`` and ``blocks`` are what __launch_bounds__ says: the most threads of a block, and the
    blocks that a multiprocessor shall hold at once; 0 where it says nothing.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    threads: int
    blocks: int
    instructions: tuple[Instruction, ...]

    @property
    def warps(self) -> int:
        """How many warps of it the registers of a multiprocessor are enough for, in whole blocks."""
        of_warp = -(-self.registers * 32 // WARP_UNIT) * WARP_UNIT
        of_block = max(1, -(-self.threads // 32))
        return min(REGISTERS // of_warp, MOST_WARPS) // of_block * of_block

    def select(self, opcode: str) -> list[Instruction]:
        """The instructions whose opcode matches this regular expression from its start."""
        pattern = re.compile(opcode)
        return [instruction for instruction in self.instructions if pattern.match(instruction.opcode)]

    @property
    def local(self) -> int:
        """Instructions that reach for local memory: spilled registers, arrays indexed at run time."""
        return len(self.select(r"(LDL|STL)\b"))

    @property
    def multiply_adds(self) -> list[Instruction]:
        """Fused multiply-adds in float32."""
        return self.select(r"FFMA")

    @property
    def guarded_share(self) -> float:
        """Of the multiply-adds, the share that is issued whether or not a predicate lets it count."""
        return sum(bool(i.guard) for i in self.multiply_adds) / max(1, len(self.multiply_adds))

    @property
    def branches(self) -> int:
        """Branches that depend on data: conditional ones, and jumps through a table (`jump_tables`)."""
        depends = (i.guard or "P" in i.operands.partition(",")[0] for i in self.select(r"BRA\b"))
        return sum(map(bool, depends)) + self.jump_tables

    @property
    def jump_tables(self) -> int:
        return len(self.select(r"BRXU?\b"))

    @property
    def longest_run(self) -> int:
        """The most multiply-adds between two branches."""
        longest = run = 0
        for instruction in self.instructions:
            if re.match(r"(BR|JM|CALL|RET|EXIT|BSYNC)", instruction.opcode):
                run = 0
            elif instruction.opcode.startswith("FFMA"):
                run += 1
                longest = max(longest, run)
        return longest


@functools.cache
def demangle(symbol: str) -> str:
    """The C++ name of a symbol without parameters and our namespaces; what is no C++ symbol comes back as it is."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = library.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    for words in ("(anonymous namespace)::", "sparsebwd::cuda::", "sparsebwd::"):
        name = name.replace(words, "")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ")


def parse(dump: str) -> list[Kernel]:
    """The kernels of what cuobjdump -ptx -sass -res-usage printed, in its order."""
    bounds = {}
    for symbol, body in re.findall(r"^(?:\.visible )?\.entry (\w+)\((.*?)^\{", dump, re.MULTILINE | re.DOTALL):
        threads = re.search(r"^\.maxntid (\d+)(?:, (\d+), (\d+))?", body, re.MULTILINE)
        blocks = re.search(r"^\.minnctapersm (\d+)", body, re.MULTILINE)
        sizes = [int(size or 1) for size in threads.groups()] if threads else [0, 0, 0]
        bounds[symbol] = sizes[0] * sizes[1] * sizes[2], int(blocks[1]) if blocks else 0
    kernels = []
    for part in re.split(r"^arch = ", dump, flags=re.MULTILINE)[1:]:
        usage = re.findall(r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+)", part, re.MULTILINE)
        code = re.split(r"^\s+Function : (\S+)\n", part, flags=re.MULTILINE)
        listings = dict(zip(code[1::2], code[2::2]))
        for symbol, registers, stack in usage:
            instructions = re.findall(
                r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*) ?(.*?)\s*;", listings[symbol], re.MULTILINE
            )
            kernels.append(
                Kernel(
                    demangle(symbol),
                    part.partition("\n")[0].strip(),
                    int(registers),
                    int(stack),
                    *bounds.get(symbol, (0, 0)),
                    tuple(Instruction(*fields) for fields in instructions),
                )
            )
    return kernels


def object_of(source: Path) -> Path:
    """Where `disassemble` leaves the object file of a source."""
    return CACHE / f"{source.stem}-{hashlib.sha256(str(source).encode()).hexdigest()[:8]}.o"


def disassemble(toolkit: CudaToolkit, source: Path, flags: Sequence[str] = ()) -> list[Kernel]:
    """Compiles a .cu file for all architectures, warnings being errors, and returns its kernels.

    Raises RuntimeError with the compiler's words. What was compiled before from the same files with the same compiler
    and flags comes from `CACHE`; of calls at the same time, in other processes too, one compiles and the others wait for it.
    """
    first, *others = gencode(ARCHITECTURES)
    # The PTX of one architecture has the launch bounds.
    first = re.sub(r"code=sm_(\w+)", r"code=[sm_\1,compute_\1]", first)
    command = [toolkit.nvcc, *NVCC_FLAGS, "-Werror=all-warnings", first, *others, *flags, "-c", str(source)]
    headers = sorted(p for folder in ("cuda", "include") for p in (ROOT / "csrc" / folder).rglob("*.*h") if p.is_file())
    key = hashlib.sha256(_words([toolkit.nvcc, "--version"]).encode())
    for part in (*command[1:], *(p.read_bytes() for p in (source, *headers))):
        key.update(b"\0" + (part if isinstance(part, bytes) else part.encode()))
    compiled = object_of(source)
    listing = compiled.with_suffix(".txt")
    heading = f"key {key.hexdigest()}\n"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(compiled.with_suffix(".lock"), "w") as lock, tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if listing.is_file() and compiled.is_file():
            text = listing.read_text("utf-8")
            if text.startswith(heading):
                return parse(text)
        new = Path(folder, "new.o")
        _words([*command, "-o", str(new)])
        dump = "".join(_words([toolkit.cuobjdump, *what, str(new)]) for what in (["-ptx"], ["-res-usage", "-sass"]))
        text = heading + re.sub(r"\s+/\* 0x[0-9a-f]{16} \*/", "", dump)  # the encoding
        new.with_suffix(".txt").write_text(text, "utf-8")
        os.replace(new, compiled)
        os.replace(new.with_suffix(".txt"), listing)
    return parse(text)


def _words(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def disassemble_all(toolkit: CudaToolkit, sources: Sequence[Path]) -> dict[Path, Future[list[Kernel]]]:
    """`disassemble` of each source, done, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {source: pool.submit(disassemble, toolkit, source) for source in sources}


def table(kernels: Sequence[Kernel]) -> str:
    """One line for each kernel and architecture."""
    columns = "regs warps stack local FFMA guarded run branch table LDG128  code".split()
    width = max((len(kernel.name) for kernel in kernels), default=0)
    lines = [f"{'kernel':{width}}  {'arch':7}" + "".join(f"{name:>8}" for name in columns)]
    for k in sorted(kernels, key=lambda k: k.name):
        figures = [k.registers, k.warps, k.stack, k.local, len(k.multiply_adds), f"{k.guarded_share:.0%}", k.longest_run,
                   k.branches, k.jump_tables, len(k.select(r"LDG.*\.128\b")), len(k.instructions)]  # fmt: skip
        lines.append(f"{k.name:{width}}  {k.architecture:7}" + "".join(f"{figure:>8}" for figure in figures))
    return "\n".join(lines)


def main() -> None:
    toolkit = find_cuda_toolkit()
    if toolkit is None or toolkit.cuobjdump is None:
        sys.exit("sparsebwd: no CUDA compiler and disassembler are found; run 'pip install -r requirements-cuda.txt'.")
    sources = [Path(name).resolve() for name in sys.argv[1:]] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    found = []
    for source, kernels in disassemble_all(toolkit, sources).items():
        print(f"\n{source.name}\n{kernels.exception() or table(kernels.result())}")
        found += [] if kernels.exception() else kernels.result()
    print(
        "\nwarps: of a multiprocessor, as its registers allow; stack: bytes a thread; local: LDL and STL; guarded: FFMA that\n"
        "are issued whatever their predicate; run: the most FFMA between two branches; table: jumps through a table;\n"
        "LDG128: loads of 16 bytes from global memory; code: instructions"
    )
    import sass_model  # which needs this module

    print(f"\n{sass_model.predictions(found)}")


if __name__ == "__main__":
    main()
