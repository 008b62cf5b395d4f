# SPDX-License-Identifier: Apache-2.0
"""Break-even densities of this machine, measured: what ``python -m sparsebwd.calibrate`` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sparsebwd.backends.break_even_tables import CLASSES
from sparsebwd.problem import ConvProblem

from .environment import last_level_cache
from .inputs import DTYPES, LAYOUTS, Gradient, Inputs, Operands, Rotation
from .operation import Case
from .operations import Agb, Convolution, Wgc
from .suites import Layer
from .timing import Call, Sampler, interleave

DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.55, 0.85)
"""At which sparse and dense are timed. Up to the last one sparse may be taken, and below the first one it is not worth it."""

REPEATS = 7

# For one or two threads. Two or three of each class, from networks in use.
PROBLEMS = {
    "first": ("n32c3h32w32k64r3s3p1", "n32c3h32w32k32r3s3p1"),
    "narrow": ("n32c16h32w32k16r3s3p1", "n32c96h14w14k24r3s3p1"),
    "kernel": ("n4c64h32w32k64r3s3p1", "n8c128h16w16k256r3s3u2p1", "n8c256h8w8k256r3s3p1"),
    "large kernel": ("n8c64h8w8k192r5s5p2", "n8c32h16w16k64r5s5p2"),
    "1x1 narrow": ("n16c64h32w32k64r1s1", "n16c144h28w28k24r1s1"),
    "1x1 half narrow": ("n8c64h32w32k256r1s1", "n8c256h32w32k64r1s1"),
    "1x1 strided": ("n8c256h32w32k512r1s1u2", "n32c64h32w32k128r1s1u2"),
    "1x1": ("n16c256h8w8k1024r1s1", "n8c512h16w16k256r1s1"),
}
_MOST_IMAGES = 256

_LEAST_CACHE, _MOST_CACHE = 16 * 2**20, 128 * 2**20
_UNKNOWN_CACHE = 32 * 2**20

# Standard deviation of a speed-up above which it is measured again, and how often at most.
_MOST_NOISE, _TRIES = 0.1, 3

# Of the median of n independent samples: its standard deviation / (interquartile range / sqrt(n)), for normal ones.
_MEDIAN = 0.93


@dataclass(frozen=True)
class Found:
    """A break-even density, 0 where sparse was slower at the lowest of DENSITIES, and what chance may have done to it: a
    standard deviation. density is None where times varied too much to tell."""

    density: float | None
    noise: float


@dataclass(frozen=True)
class Measured:
    """Of one operation, "agb" or "wgc", on one problem."""

    dtype: str
    layout: str
    kind: str
    operation: str
    problem: str
    found: Found


class _Decided:
    """An operation as the choice between sparse and dense meets it: dense is what a layer would run then."""

    def baseline(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor]:
        return self.candidate(replace(case, backend="dense"), operands)[:2]


class _Agb(_Decided, Agb):
    pass


class _Wgc(_Decided, Wgc):
    pass


def problems(kind: str, threads: int) -> list[ConvProblem]:
    """Those that a class is measured on; more images for more threads."""
    found = map(ConvProblem.parse, PROBLEMS[kind])
    return [replace(problem, n=min(_MOST_IMAGES, problem.n * max(1, threads // 2))) for problem in found]


def steps(dtypes: Sequence[str], threads: int) -> list[tuple[str, str, ConvProblem]]:
    """What there is to measure: dtype, class, problem."""
    return [(dtype, kind, problem) for dtype in dtypes for kind in CLASSES for problem in problems(kind, threads)]


def measure(dtype: str, kind: str, problem: ConvProblem, sample: Sampler | None = None) -> Iterator[Measured]:
    """Break-even densities of AGB and WGC in both layouts, each result checked before it is timed.

    Raises AssertionError if a result is wrong.
    """
    # Operands and results together are larger than the cache.
    cache = min(max(last_level_cache() or _UNKNOWN_CACHE, _LEAST_CACHE), _MOST_CACHE)
    layer = Layer(None, "", problem, needs_grad_input=kind != "first")
    first = Inputs(problem, DTYPES[dtype], Gradient("iid", 1.0), Rotation(cache // 2))
    inputs: dict[float, Inputs] = {}

    def at(density: float, operation: Convolution, layout: str, checked: list[float]) -> tuple[float, float]:
        if density not in inputs:
            inputs[density] = first.with_gradient(Gradient("iid", density))
        sparse, dense = (Case(layer, DTYPES[dtype], layout, backend, "iid", density) for backend in ("cpu", "dense"))
        if not checked:
            operation.check(sparse, inputs[density])
            checked.append(density)
        calls = {
            "sparse": Call(partial(operation.candidate, sparse), inputs[density].rotating(layout, operation.used)),
            "dense": Call(partial(operation.candidate, dense), inputs[density].rotating(layout, operation.used, True)),
        }
        for _ in range(_TRIES):
            times = interleave(calls, REPEATS, 1, sample)
            noise = _MEDIAN * math.hypot(*(found.spread for found in times.values())) / math.sqrt(REPEATS)
            if noise <= _MOST_NOISE:
                break
        return times["dense"].seconds / times["sparse"].seconds, noise

    for operation in (_Agb(), _Wgc()):
        if operation.applies(layer):
            for layout in LAYOUTS:
                found = break_even(partial(at, operation=operation, layout=layout, checked=[]))
                yield Measured(dtype, layout, kind, operation.name, str(problem), found)


def break_even(speedup: Callable[[float], tuple[float, float]]) -> Found:
    """Where `speedup`, which returns a speed-up and its relative standard deviation, falls to 1; by bisection over
    DENSITIES, and interpolation on logarithmic scales between the last two."""
    known: dict[int, tuple[float, float]] = {}
    low, high = -1, len(DENSITIES)  # faster at low, slower at high
    middle = len(DENSITIES) // 2
    while high - low > 1:
        known[middle] = speedup(DENSITIES[middle])
        if known[middle][1] > _MOST_NOISE:
            return Found(None, math.inf)
        low, high = (middle, high) if known[middle][0] >= 1 else (low, middle)
        middle = (low + high) // 2
    if low < 0:
        return Found(0.0, 0.0)
    if high == len(DENSITIES):
        return Found(DENSITIES[-1], 0.0)
    (fast, noise), (slow, _) = known[low], known[high]
    slope = math.log(DENSITIES[high] / DENSITIES[low]) / math.log(fast / slow)
    density = DENSITIES[low] * fast**slope
    return Found(density, min(1.0, noise * slope) * density)


def densities(measured: Sequence[Measured]) -> dict[str, dict[str, dict[str, tuple[Found, Found]]]]:
    """By dtype, layout and class: the lowest of its problems for AGB and for WGC, 0 where there is none, None where that of
    one is not known."""
    result: dict[str, dict[str, dict[str, tuple[Found, Found]]]] = {}
    for dtype in dict.fromkeys(row.dtype for row in measured):
        for layout in LAYOUTS:
            of_layout = result.setdefault(dtype, {}).setdefault(layout, {})
            for kind in CLASSES:
                rows = [row for row in measured if (row.dtype, row.layout, row.kind) == (dtype, layout, kind)]
                of_layout[kind] = tuple(
                    _lowest([row.found for row in rows if row.operation == name]) for name in (Agb.name, Wgc.name)
                )
    return result


def _lowest(found: Sequence[Found]) -> Found:
    unknown = next((each for each in found if each.density is None), None)
    return unknown or min(found, key=lambda each: each.density, default=Found(0.0, 0.0))
