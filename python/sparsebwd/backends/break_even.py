# SPDX-License-Identifier: Apache-2.0
"""Densities up to which the sparse kernels for CPUs are faster than PyTorch's dense convolutions.

They depend on the machine: on the instruction set of our kernels, on that of PyTorch's, and on how PyTorch computes in
bfloat16. So there is a :class:`.break_even_tables.Table` for each kind of CPU; :func:`tables` says which are in force. A
calibration, measured on this very machine, takes their place where one is asked for. docs/performance.md has the measurements.
"""

from __future__ import annotations

import os

import torch

from ..problem import ConvProblem
from . import calibration, dense, machine
from .base import forget_choices, until_choices_change
from .break_even_tables import BFLOAT16, CLASSES, FLOAT32, BreakEven, Table

__all__ = [
    "CLASSES",
    "BreakEven",
    "Table",
    "break_even",
    "classify",
    "kind_of_cpu",
    "tables",
    "use_calibration",
    "why_dense",
    "why_not_worth_it",
]

VARIABLE = "SPARSEBWD_CALIBRATION"
"""Of the environment: a file that ``python -m sparsebwd.calibrate`` wrote."""

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


_chosen: dict[torch.dtype, Table] | None = None


def use_calibration(path: str | os.PathLike | None) -> None:
    """Take the break-even densities that ``python -m sparsebwd.calibrate`` measured on this machine.

    From now on, in this process, ``backend="auto"`` runs AGB and WGC on the sparse kernels up to the densities in the file, and
    ``where="faster"`` converts by them. The environment variable SPARSEBWD_CALIBRATION=FILE does the same from the start. Call
    it before the first training step: results before and after may differ in their last bits, and compiled code keeps what was
    decided when it was compiled.

    Args:
        path: the file. None: the densities of this kind of CPU, whatever the variable says.

    Raises:
        TypeError: ``path`` is no path.
        ValueError: the file cannot be read, is not a calibration, or not one of this machine and these versions. What was in
            force stays so.
        RuntimeError: the CPU kernels do not run here.
    """
    global _chosen
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"calibration: got {path!r}; accepted: the path of a file, or None")
    calibration.identity()
    _chosen = kind_of_cpu() if path is None else calibration.read(path)
    forget_choices()


@until_choices_change
def tables() -> dict[torch.dtype, Table]:
    """The tables in force, for float32 and for bfloat16: those of the calibration that :func:`use_calibration` or else
    SPARSEBWD_CALIBRATION names, or those of this kind of CPU.

    Raises ValueError if that is no calibration of this machine, or if SPARSEBWD_MAX_ISA names no instruction set.
    """
    if _chosen is not None:
        return _chosen
    path = os.environ.get(VARIABLE)
    return calibration.read(path) if path else kind_of_cpu()


def kind_of_cpu() -> dict[torch.dtype, Table]:
    """The tables of the CPU that this process runs on, with the kernels that SPARSEBWD_MAX_ISA allows and those that
    ONEDNN_MAX_CPU_ISA leaves to PyTorch. Raises ValueError if SPARSEBWD_MAX_ISA names no instruction set."""
    float32, bfloat16 = _kinds(
        torch.ops.sparsebwd_cpu.isa(),
        dense.is_native(torch.bfloat16),
        torch.cpu._is_amx_tile_supported(),
        machine.has_256_bit_units(),
    )
    return {torch.float32: FLOAT32[float32], torch.bfloat16: BFLOAT16[bfloat16]}


def _kinds(isa: str, native: bool, amx: bool, units_256_bits: bool) -> tuple[str, str]:
    """Names of the tables for float32 and for bfloat16. isa: of our kernels. native: whether oneDNN has kernels for
    bfloat16, on x86 where it may use AVX-512, on aarch64 where the CPU has instructions for it."""
    if isa == "avx512":
        units = ", 256-bit units" if units_256_bits else ""
        bfloat16 = "avx2, dense through float32" if not native else "amx" if amx else "avx512_bf16" + units
        return isa + units, bfloat16
    if isa == "neon":
        return isa, "neon against bf16" if native else "neon, dense through float32"
    if isa == "avx2" and native:
        return "avx2 against avx512", "avx2 against avx512"
    return isa, "avx2 against avx512" if native else f"{isa}, dense through float32"


@until_choices_change
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
