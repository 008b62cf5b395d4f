# SPDX-License-Identifier: Apache-2.0
"""Densities up to which the sparse kernels for CPUs are faster than PyTorch's dense convolutions.

They depend on the machine: on the instruction set of our kernels, on that of PyTorch's, and on how PyTorch computes in
bfloat16. So there is a :class:`Table` for each kind of CPU; :func:`tables` says which are in force. docs/performance.md has the
measurements. Those of contiguous tensors are not measured: they are those of channels_last, scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..problem import ConvProblem
from . import dense


class BreakEven(NamedTuple):
    """The densities up to which the sparse AGB and WGC are the faster ones, at most 1; 0 where they never are."""

    agb: float
    wgc: float


@dataclass(frozen=True)
class Table:
    """Break-even densities of one dtype on one kind of CPU.

    name: of the kind. origin: where the numbers of channels_last come from, in words.
    channels_last, contiguous: by the class of a problem, see :func:`classify`; of tensors in that layout against dense
        convolutions in the same. What a table does not have never runs sparse.
    """

    name: str
    origin: str
    channels_last: Mapping[str, BreakEven]
    contiguous: Mapping[str, BreakEven]


CLASSES = {
    "first": "3x3 with up to 5 input channels, the first layer of a network",
    "narrow": "kernel larger than 1x1, fewer than 32 input or output channels",
    "kernel": "kernel from 1x2 to 3x3",
    "large kernel": "kernel of more than 9 elements",
    "1x1 narrow": "1x1, fewer than 32 input or output channels, or at most 64 on both sides",
    "1x1 half narrow": "1x1, at most 64 channels on one side",
    "1x1 strided": "1x1 with a stride",
    "1x1": "any other 1x1",
}
"""The classes of problems, and what they are, in words. Problems that are in none always run dense."""

# Multiply-adds below which estimating the density takes longer than the sparse kernels could save.
_FEWEST_MACS = 2**20


def classify(problem: ConvProblem) -> str | None:
    """The class of a problem, one of CLASSES; None for what always runs dense."""
    fewest = min(problem.c, problem.k)
    # Few channels a group leave the kernels' vectors mostly empty.
    if problem.groups > 1 or problem.k < 16 or problem.macs < _FEWEST_MACS:
        return None
    if problem.c < 16:
        # The one kernel for few input channels takes a whole row of a 3x3 filter as one vector.
        fits = problem.r == problem.s == 3 and problem.c <= 5 and problem.dilation == (1, 1)
        return "first" if fits else None
    if problem.r * problem.s > 1:
        if fewest < 32:
            return "narrow"
        return "kernel" if problem.r * problem.s <= 9 else "large kernel"
    # So little is computed with each element here that finding the zeros may take longer.
    if fewest < 32 or max(problem.c, problem.k) <= 64:
        return "1x1 narrow"
    if problem.stride != (1, 1):
        return "1x1 strided"
    return "1x1 half narrow" if fewest <= 64 else "1x1"


def _classes(*limits: tuple[float, float]) -> dict[str, BreakEven]:
    """In the order of CLASSES."""
    return {name: BreakEven(*pair) for name, pair in zip(CLASSES, limits, strict=True)}


_ZEN5 = "measured on a Zen 5 with AVX-512, one and two threads, on the cautious side"
_ZEN3 = "measured on a Zen 3 with AVX2, two threads, on the cautious side"


def _table(name: str, origin: str, channels_last: dict[str, BreakEven], contiguous: float = 0.85) -> Table:
    """contiguous: what is assumed to be left of a break-even density where tensors are contiguous."""
    scaled = {kind: BreakEven(*(contiguous * limit for limit in limits)) for kind, limits in channels_last.items()}
    return Table(name, origin, channels_last, scaled)


# first, narrow, kernel, large kernel, 1x1 narrow, 1x1 half narrow, 1x1 strided, 1x1; (AGB, WGC) of each.
_FLOAT32 = {
    table.name: table
    for table in (
        _table(
            "avx512",
            _ZEN5 + "; large kernels and fewer than 32 channels: estimated",
            _classes(
                (0, 0.20), (0.15, 0.50), (0.53, 0.65), (0.53, 0.65), (0.10, 0.20), (0.48, 0.48), (0.60, 0.50), (0.46, 0.48)
            ),
        ),
        _table(
            "avx512, 256-bit units",
            "estimated: dense loses more than the sparse kernels by narrower units (a trial on a Zen 4)",
            _classes(
                (0, 0.20), (0.15, 0.50), (0.56, 0.68), (0.56, 0.65), (0.10, 0.20), (0.48, 0.50), (0.60, 0.50), (0.50, 0.50)
            ),
        ),
        _table(
            "avx2",
            _ZEN3,
            _classes(
                (0, 0.12), (0.18, 0.70), (0.47, 0.85), (0.75, 0.70), (0.05, 0.12), (0.48, 0.45), (0.75, 0.48), (0.45, 0.45)
            ),
        ),
        _table(
            "avx2 against avx512",
            "estimated: half of what it is where both have the same vectors",
            _classes((0, 0), (0, 0.20), (0.25, 0.35), (0.25, 0.30), (0, 0), (0.20, 0.20), (0.30, 0.20), (0.20, 0.20)),
        ),
        _table(
            "baseline",
            "measured on a Zen 3, the portable kernels against dense with AVX2; elsewhere estimated to be the same",
            _classes((0, 0), (0, 0.08), (0.12, 0.30), (0.22, 0.20), (0, 0), (0, 0), (0, 0), (0.10, 0.10)),
        ),
    )
}

_BFLOAT16 = {
    table.name: table
    for table in (
        _table(
            "avx512_bf16",
            _ZEN5 + "; without AVX512_BF16 estimated to be the same",
            _classes((0, 0), (0, 0.20), (0.25, 0.38), (0.25, 0.35), (0, 0), (0, 0), (0.18, 0.10), (0.08, 0.17)),
        ),
        _table(
            "amx",
            "estimated: dense at least twice as fast as with AVX512_BF16",
            _classes((0, 0), (0, 0), (0.08, 0.12), (0.08, 0.12), (0, 0), (0, 0), (0, 0), (0, 0)),
        ),
        _table(
            "avx2 against avx512",
            "estimated: dense has twice the vectors, and instructions for bfloat16",
            _classes((0, 0), (0, 0), (0.08, 0.12), (0.08, 0.12), (0, 0), (0, 0), (0, 0), (0, 0)),
        ),
        _table(
            "avx2, dense through float32",
            _ZEN3,
            _classes(
                (0, 0.12), (0.70, 0.80), (0.55, 0.90), (0.75, 0.80), (0.70, 0.60), (0.70, 0.55), (0.85, 0.85), (0.58, 0.56)
            ),
        ),
        Table(
            "baseline, dense through float32",
            "as baseline in float32",
            _FLOAT32["baseline"].channels_last,
            _FLOAT32["baseline"].contiguous,
        ),
    )
}


@cache
def tables() -> dict[torch.dtype, Table]:
    """The tables in force, for float32 and for bfloat16: those of the CPU that this process runs on, with the kernels that
    SPARSEBWD_MAX_ISA allows and those that ONEDNN_MAX_CPU_ISA leaves to PyTorch.

    Raises ValueError if SPARSEBWD_MAX_ISA names no instruction set.
    """
    float32, bfloat16 = _kinds(
        torch.ops.sparsebwd_cpu.isa(),
        dense.is_native(torch.bfloat16),
        torch.cpu._is_amx_tile_supported(),
        _has_256_bit_units(),
    )
    return {torch.float32: _FLOAT32[float32], torch.bfloat16: _BFLOAT16[bfloat16]}


def _kinds(isa: str, native: bool, amx: bool, units_256_bits: bool) -> tuple[str, str]:
    """Names of the tables for float32 and for bfloat16. isa: of our kernels. native: whether oneDNN has kernels for
    bfloat16, on x86 where it may use AVX-512."""
    if isa == "avx512":
        return (
            "avx512, 256-bit units" if units_256_bits else isa,
            "avx2, dense through float32" if not native else "amx" if amx else "avx512_bf16",
        )
    if isa == "avx2" and native:
        return "avx2 against avx512", "avx2 against avx512"
    return isa, "avx2 against avx512" if native else f"{isa}, dense through float32"


def _has_256_bit_units() -> bool:
    """Whether this CPU, which has AVX-512, computes with half a vector at a time: a Zen 4."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return False
    fields = dict(line.replace("\t", "").split(":", 1) for line in first.splitlines() if ":" in line)
    return fields.get("vendor_id", "").strip() == "AuthenticAMD" and fields.get("cpu family", "").strip() == "25"


@lru_cache(maxsize=4096)
def break_even(problem: ConvProblem, dtype: torch.dtype, channels_last: bool) -> BreakEven:
    """The densities of ``problem`` up to which sparse is faster. channels_last: the layout of its tensors; else contiguous."""
    table = tables()[dtype]
    return (table.channels_last if channels_last else table.contiguous).get(classify(problem), BreakEven(0.0, 0.0))


# Of where="faster", from the layers of MobileNetV2 at 160 pixels on a Zen 3: 1x1 layers of up to 160 input channels at densities
# of .26 to .36 took 1.3 to 1.8 times as long as dense, one of 320 channels .85 times; and choosing takes half a millisecond of
# a step, which is more than 2% of anything below.
FEWEST_MACS_FASTER = 2**27
LEAST_WORK = 192


def why_not_worth_it(problem: ConvProblem, prunes: bool) -> str | None:
    """Why sparse kernels save less than it takes to prune the gradient, if it is pruned, and to choose; None if they may."""
    if problem.macs < FEWEST_MACS_FASTER:
        return f"{problem.macs / 2**20:.0f} million multiply-adds are too few to save time with ({FEWEST_MACS_FASTER / 2**20:.0f})"
    work = problem.c // problem.groups * problem.r * problem.s
    if prunes and work < LEAST_WORK:
        return f"{work} multiply-adds for each element of the gradient are too few to pay for pruning it ({LEAST_WORK})"
    return None


def why_dense(problem: ConvProblem, dtype: torch.dtype) -> str:
    """Why sparse is never faster for ``problem``, where its :func:`break_even` is (0, 0)."""
    kind = classify(problem)
    if kind is None:
        return "too few multiply-adds, channels, or channels a group, for sparse kernels to be faster at any density"
    return f"sparse kernels are faster at no density for the class {kind!r} on this CPU ({tables()[dtype].name!r})"
