# SPDX-License-Identifier: Apache-2.0
"""Times of functions that are called in turns."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class Call(NamedTuple):
    """What is timed, `function(next_argument())`; getting the argument and freeing the result are not."""

    function: Callable[[T], object]
    next_argument: Callable[[], T]


class Times(NamedTuple):
    """seconds: median; spread: interquartile range / median."""

    seconds: float
    spread: float


def interleave(calls: Mapping[str, Call], repeats: int, warmup: int = 2) -> dict[str, Times]:
    """Call each in turn, `warmup` + `repeats` times, every second round in reverse order.

    Whatever slows the machine for a while slows all of them. `repeats` is at least 2.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name in reversed(calls) if turn % 2 else calls:
            function, next_argument = calls[name]
            argument = next_argument()
            start = time.perf_counter()
            result = function(argument)
            seconds = time.perf_counter() - start
            del result
            if turn >= warmup:
                samples[name].append(seconds)
    return {name: _times(values) for name, values in samples.items()}


def _times(samples: list[float]) -> Times:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(median, (high - low) / median)


def keep_freed_memory() -> str:
    """Have malloc keep what is freed, for this process. Returns what was done, in words.

    By default glibc takes large blocks from the system and gives them back, so that each result is written to fresh
    pages, and clearing these can take longer than computing the result. PyTorch allocates results with malloc, those
    of the sparse kernels as those of its own, so this is for both alike.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "as is: this C library has no mallopt"
    if not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        return "as is: mallopt refused"
    return "freed memory is kept: mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)"
