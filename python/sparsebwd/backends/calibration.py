# SPDX-License-Identifier: Apache-2.0
"""Files of break-even densities that were measured on one machine; ``python -m sparsebwd.calibrate`` writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..opening import read_json
from . import dense, machine
from .break_even_tables import CLASSES, BreakEven, Table

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("channels_last", "contiguous")
OUTPUT = "sparsebwd-calibration.json"
"""Where one is written unless another name is given."""

Densities = Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]
"""By dtype, layout and class: those of AGB and of WGC."""


def identity() -> dict[str, str]:
    """What times depend on most: versions, the CPU, the instruction sets of our kernels and of PyTorch's.

    Raises RuntimeError if the CPU kernels do not run here, ValueError if SPARSEBWD_MAX_ISA names no instruction set.
    """
    from .. import __version__
    from .cpu import CpuBackend  # which imports this module

    if reason := CpuBackend().available():
        raise RuntimeError(f"calibration: there is nothing to calibrate: {reason}")
    return {
        "sparsebwd": __version__,
        "torch": str(torch.__version__),
        "cpu": machine.cpu_name(),
        "instruction set": torch.ops.sparsebwd_cpu.isa(),
        "dense bfloat16": "native" if dense.is_native(torch.bfloat16) else "through float32",
    }


def record(densities: Densities, threads: int, time: str) -> dict[str, Any]:
    """What a file holds. time: when it was measured, in words. Raises as :func:`identity` does."""
    return {
        "sparsebwd calibration": FORMAT,
        "machine": identity(),
        "threads": threads,
        "time": time,
        "break_even": {
            dtype: {layout: {kind: list(limits) for kind, limits in kinds.items()} for layout, kinds in layouts.items()}
            for dtype, layouts in densities.items()
        },
    }


def read(path: str | os.PathLike) -> dict[torch.dtype, Table]:
    """The tables in the file. Raises ValueError, and names the file, what is wrong and what to do, where it cannot be read,
    holds anything else, or was measured on another machine or with other versions; RuntimeError if the CPU kernels do not
    run here."""
    here = identity()
    name = os.fsdecode(path)
    try:
        found = read_json(path)
        _check(found)
        for what, value in here.items():
            if found["machine"][what] != value:
                raise ValueError(f"measured with {what} {found['machine'][what]!r}, but here it is {value!r}")
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"calibration: got {name}: {what}; accepted: a file that `python -m sparsebwd.calibrate` wrote on this machine with "
            "these versions; calibrate again, or unset SPARSEBWD_CALIBRATION"
        ) from None
    cpu, threads, time = found["machine"]["cpu"], found["threads"], found["time"]
    origin = f"measured on this machine ({cpu}), threads: {threads}, {time}: {name}"
    return {
        DTYPES[dtype]: Table(
            f"calibrated {time}",
            origin,
            *({kind: BreakEven(*limits) for kind, limits in layouts[layout].items()} for layout in LAYOUTS),
        )
        for dtype, layouts in found["break_even"].items()
    }


def _check(found: Any) -> None:
    """Raises ValueError where it is not what :func:`record` makes."""
    _keys(found, "the file", ("sparsebwd calibration", "machine", "threads", "time", "break_even"))
    if found["sparsebwd calibration"] != FORMAT or isinstance(found["sparsebwd calibration"], bool):
        raise ValueError(f"format {found['sparsebwd calibration']!r} instead of {FORMAT}")
    _keys(found["machine"], "machine", identity())
    for name, value in (*found["machine"].items(), ("time", found["time"])):
        if not (isinstance(value, str) and value and value.isprintable()):
            raise ValueError(f"{name} is {value!r} instead of a text")
    threads = found["threads"]
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r} instead of a whole number from 1")
    _keys(found["break_even"], "break_even", DTYPES)
    for dtype, layouts in found["break_even"].items():
        _keys(layouts, dtype, LAYOUTS)
        for layout, kinds in layouts.items():
            _keys(kinds, f"{dtype} {layout}", CLASSES)
            for kind, limits in kinds.items():
                if not (isinstance(limits, list) and len(limits) == 2 and all(map(_is_density, limits))):
                    raise ValueError(f"{dtype} {layout} {kind!r} is {limits!r} instead of two numbers from 0 to 1")


def _is_density(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _keys(found: Any, what: str, expected: Any) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is not a JSON object")
    missing, unknown = [name for name in expected if name not in found], [name for name in found if name not in expected]
    if missing or unknown:
        raise ValueError(f"{what} {f'lacks {missing[0]!r}' if missing else f'has the unknown entry {unknown[0]!r}'}")
