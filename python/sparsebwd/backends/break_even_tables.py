# SPDX-License-Identifier: Apache-2.0
"""The break-even densities that come with this package: a :class:`Table` for each dtype and kind of CPU.

Each says where its numbers come from: "measured" (on which CPU, with how many threads), or "estimated", from what. What no
kind fits (other architectures) runs the portable kernels and has the table "baseline", whose densities are
the lowest: where dense convolutions are slower than those it was measured against, sparse kernels could run more often, and none
runs at a loss. :mod:`.break_even` says what the densities are for, and which are in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class BreakEven(NamedTuple):
    """The densities up to which the sparse AGB and WGC are the faster ones, at most 1; 0 where they never are."""

    agb: float
    wgc: float


@dataclass(frozen=True)
class Table:
    """Break-even densities of one dtype on one kind of CPU.

    name: of the kind. origin: where the numbers of channels_last come from, in words; those of contiguous are measured with
        them on the Zen 4 and by :mod:`.calibration`, and estimated from them elsewhere.
    channels_last, contiguous: by the class of a problem, see :func:`.break_even.classify`; of tensors in that layout against dense
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


def _classes(*limits: tuple[float, float]) -> dict[str, BreakEven]:
    """In the order of CLASSES."""
    return {name: BreakEven(*pair) for name, pair in zip(CLASSES, limits, strict=True)}


_ZEN5 = "measured on a Zen 5 with AVX-512 (2026-11-23), one and two threads, on the cautious side"
_ZEN4 = "measured on a Zen 4 with AVX-512 (2026-11-30), one and two threads, twice each, on the cautious side"
_ZEN3 = "measured on a Zen 3 with AVX2 (2026-11-28), two threads, on the cautious side"


def _table(
    name: str, origin: str, channels_last: dict[str, BreakEven], contiguous: float | dict[str, BreakEven] = 0.85
) -> Table:
    """contiguous: measured too, or what is assumed to be left of a break-even density where tensors are contiguous."""
    if not isinstance(contiguous, dict):
        contiguous = {kind: BreakEven(*(contiguous * limit for limit in limits)) for kind, limits in channels_last.items()}
    return Table(name, origin, channels_last, contiguous)


_HALF = _classes((0, 0), (0, 0.20), (0.25, 0.35), (0.25, 0.30), (0, 0), (0.20, 0.20), (0.30, 0.20), (0.20, 0.20))
_MUCH_FASTER = _classes((0, 0), (0, 0), (0.08, 0.12), (0.08, 0.12), (0, 0), (0, 0), (0, 0), (0, 0))
_UNMEASURED = "estimated, as nothing was timed on aarch64: "

# first, narrow, kernel, large kernel, 1x1 narrow, 1x1 half narrow, 1x1 strided, 1x1; (AGB, WGC) of each.
FLOAT32 = {
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
            _ZEN4,
            _classes((0, 0), (0.19, 0.52), (0.72, 0.85), (0.33, 0.36), (0.14, 0.05), (0.50, 0.52), (0.78, 0.40), (0.58, 0.46)),
            _classes((0, 0), (0.12, 0.56), (0.65, 0.84), (0.31, 0), (0.30, 0.45), (0.75, 0.42), (0.85, 0.70), (0.67, 0.36)),
        ),
        _table(
            "avx2",
            _ZEN3 + "; kernels larger than 1x1, and AGB of 1x1: again with later kernels (2026-11-29), one thread",
            _classes(
                (0, 0.12), (0.18, 0.70), (0.72, 0.85), (0.70, 0.58), (0.05, 0.12), (0.70, 0.40), (0.75, 0.48), (0.55, 0.45)
            ),
            contiguous=0.9,
        ),
        _table(
            "avx2 against avx512",
            "estimated: half of what it is where both have the same vectors",
            _HALF,
        ),
        _table("neon", _UNMEASURED + "about half of what it is with AVX2 or less, though both have the same vectors too", _HALF),
        _table(
            "baseline",
            "measured on a Zen 3 (2026-11-28), the portable kernels against dense with AVX2; elsewhere estimated to be the same",
            _classes((0, 0), (0, 0.08), (0.12, 0.30), (0.22, 0.20), (0, 0), (0, 0), (0, 0), (0.10, 0.10)),
        ),
    )
}

BFLOAT16 = {
    table.name: table
    for table in (
        _table(
            "avx512_bf16",
            _ZEN5 + "; without AVX512_BF16 estimated to be the same",
            _classes((0, 0), (0, 0.20), (0.25, 0.38), (0.25, 0.35), (0, 0), (0, 0), (0.18, 0.10), (0.08, 0.17)),
        ),
        _table(
            "avx512_bf16, 256-bit units",
            _ZEN4 + "; without AVX512_BF16 estimated to be the same",
            _classes((0, 0), (0, 0.37), (0.30, 0.40), (0.12, 0), (0, 0), (0.18, 0.05), (0.30, 0.11), (0.16, 0.05)),
            # .11 to .29 in some classes, which is less than a node of its own in autograd costs: a ResNet-18 took 6 % longer.
            _classes(*[(0, 0)] * len(CLASSES)),
        ),
        _table(
            "amx",
            "estimated: dense at least twice as fast as with AVX512_BF16",
            _MUCH_FASTER,
        ),
        _table(
            "avx2 against avx512",
            "estimated: dense has twice the vectors, and instructions for bfloat16",
            _MUCH_FASTER,
        ),
        _table("neon against bf16", _UNMEASURED + "dense has instructions for bfloat16, these kernels have not", _MUCH_FASTER),
        _table(
            "avx2, dense through float32",
            _ZEN3,
            _classes(
                (0, 0.12), (0.70, 0.80), (0.55, 0.90), (0.75, 0.80), (0.70, 0.60), (0.70, 0.55), (0.85, 0.85), (0.58, 0.56)
            ),
        ),
        *(
            Table(
                f"{name}, dense through float32",
                f"as {name} in float32: {FLOAT32[name].origin}",
                FLOAT32[name].channels_last,
                FLOAT32[name].contiguous,
            )
            for name in ("neon", "baseline")
        ),
    )
}
