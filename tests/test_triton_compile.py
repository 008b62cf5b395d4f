# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compiled for GPUs that are not here: on tensor cores, in registers and shared memory as large as there is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparsebwd.backends import triton_kernels, triton_tiles  # noqa: E402
from sparsebwd.backends.triton_tiles import Tile  # noqa: E402

pytestmark = pytest.mark.slow  # it compiles

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may have, by architecture."""
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma"}
DTYPES = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16"}
# A layer of 256 channels with 3x3 filters: numbers that are multiples of 16 are told to the compiler, as at a call.
UNALIGNED = {"P", "Q", "H", "W", "S", "GROUPS", "STEPS", "list_size", "SPLITS"}


class Compiled(NamedTuple):
    ptx: str
    shared: int
    registers: int
    stack: int


@pytest.fixture(autouse=True)
def _cache(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))


def compile_kernel(name: str, arch: int, pointers: dict[str, str], constants: dict, options: dict) -> Compiled:
    kernel = getattr(triton_kernels, name)
    ones = {"stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"}
    constants = dict.fromkeys(ones & set(kernel.arg_names), 1) | constants
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }
    aligned = [i for i, name in enumerate(kernel.arg_names) if name not in UNALIGNED and name not in constants]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = ptxas(arch, compiled.asm["ptx"])
    return Compiled(
        compiled.asm["ptx"],
        compiled.metadata.shared,
        int(re.search(r"Used (\d+) registers", said)[1]),
        sum(int(number) for number in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)),
    )


def ptxas(arch: int, ptx: str) -> str:
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [tool.path, "-v", f"--gpu-name={target}", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(command, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def product(name: str, arch: int, dtype: str, precision: str, tile: Tile) -> Compiled:
    """AGB or WGC with this tile."""
    values = DTYPES[dtype]
    pointers = {"grad": values, "input": values, "weight": values, "output": values, "partial": "*fp32", "masks": "*i64"}
    pointers |= dict.fromkeys(("lists", "counts", "order", "steps"), "*i32")
    sizes = tile.options
    options = {"num_warps": sizes.pop("num_warps"), "num_stages": sizes.pop("num_stages")}
    constants = sizes | {"PRECISION": precision} | ({"ONE_TAP": True} if name == "wgc" else {})
    return compile_kernel(name, arch, pointers, constants, options)


CASES = [
    *((arch, *precision) for arch in TENSOR_CORES for precision in (("fp32", "tf32x3"), ("bf16", "ieee"))),
    *((90, *precision) for precision in (("fp32", "tf32"), ("fp16", "ieee"))),
]


@pytest.mark.parametrize("arch, dtype, precision", CASES)
@pytest.mark.parametrize("name", ["agb", "wgc"])
def test_products_are_on_tensor_cores_without_spills(name, arch, dtype, precision):
    table = {"agb": triton_tiles.AGB, "wgc": triton_tiles.WGC}[name][4 if dtype == "fp32" else 2]
    compiled = product(name, arch, dtype, precision, table[0])
    assert re.search(TENSOR_CORES[arch], compiled.ptx)
    assert compiled.stack == 0
    assert compiled.shared <= SHARED_BYTES[arch]
    # The gradient's rows are gathered 16 bytes at a time, while tensor cores compute.
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .*?0x10", compiled.ptx)) >= 2 or (name, precision) == ("wgc", "tf32")


@pytest.mark.parametrize("name", ["agb", "wgc"])
def test_tf32x3_multiplies_three_times(name):
    table = {"agb": triton_tiles.AGB, "wgc": triton_tiles.WGC}[name][4]
    once, thrice = (product(name, 90, "fp32", precision, table[0]).ptx for precision in ("tf32", "tf32x3"))
    assert len(re.findall(TENSOR_CORES[90], thrice)) == 3 * len(re.findall(TENSOR_CORES[90], once)) > 0


@pytest.mark.parametrize(
    "name, pointers, constants",
    [
        ("scale_rows", {"grad": "*bf16", "scaled": "*bf16", "factors": "*fp32"}, {"ZEROS": False, "BLOCK_M": 32, "BLOCK_K": 64}),
        ("agb_masks", {"kept": "*u8", "masks": "*i64"}, {"BLOCK_M": 128}),
        ("agb_steps", {"order": "*i32", "masks": "*i64", "steps": "*i32", "counts": "*i32"}, {"BLOCK_M": 128}),
    ],
)
def test_what_prepares_them_compiles(name, pointers, constants):
    compiled = compile_kernel(name, 90, pointers, constants, {"num_warps": 4, "num_stages": 3})
    assert compiled.stack == 0


def test_spills_are_found():
    """A tile that is too large for the registers."""
    compiled = product("agb", 80, "fp32", "tf32x3", Tile(128, 128, 32, 8, 3))
    assert compiled.stack > 0
