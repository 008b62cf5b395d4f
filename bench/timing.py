# SPDX-License-Identifier: Apache-2.0
"""Times of functions that are called in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class Call(NamedTuple):
    """What is timed, `function(next_argument())`; getting the argument and freeing the result are not."""

    function: Callable[[T], object]
    next_argument: Callable[[], T]


class Times(NamedTuple):
    """seconds: median; spread: interquartile range / median."""

    seconds: float
    spread: float


Sampler = Callable[[Call], float]
"""Makes a call once or several times. Returns the seconds that one takes."""


def interleave(
    calls: Mapping[str, Call], repeats: int, warmup: int = 2, sample: Sampler | None = None
) -> dict[str, Times]:
    """Sample each in turn, `warmup` + `repeats` times, every second round in reverse order.

    Whatever slows the machine for a while slows all of them. `repeats` is at least 2. `sample` is by default
    :func:`sample_on_cpu`.
    """
    sample = sample or sample_on_cpu
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name in reversed(calls) if turn % 2 else calls:
            seconds = sample(calls[name])
            if turn >= warmup:
                samples[name].append(seconds)
    return {name: _times(values) for name, values in samples.items()}


def _times(samples: list[float]) -> Times:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Times(median, (high - low) / median)


def sample_on_cpu(call: Call) -> float:
    function, next_argument = call
    argument = next_argument()
    start = time.perf_counter()
    result = function(argument)
    seconds = time.perf_counter() - start
    del result
    return seconds


# ---- on a GPU

_SHORT_SECONDS, _LONGEST_BURST = 200e-6, 16
_SPIN_CYCLES, _SPINS = 2**22, 4


class _Burst(NamedTuple):
    """calls: made one after the other. seconds: for which the host is busy with them, about."""

    calls: int
    seconds: float


def sample_on_cuda(longest: int = _LONGEST_BURST) -> Sampler:
    """Device time on the current stream, between two events around a burst of calls that all were queued before the
    first began, so that what the host does for each is not in it, unless it has to wait for the device.

    A spinning kernel keeps the device busy while the host fills the queue. Calls of less than 200 us are made several at
    a time, up to `longest`.
    """
    bursts: dict[Call, _Burst] = {}

    def sample(call: Call) -> float:
        if call not in bursts:
            bursts[call] = _burst(call, longest)
        burst = bursts[call]
        return _device_seconds(lambda: _repeat(call, burst.calls), burst.seconds) / burst.calls

    return sample


def _burst(call: Call, longest: int) -> _Burst:
    """How to sample a call: made for the first time here, it may load code and search for algorithms."""
    _repeat(call, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _repeat(call, 1)
    host = time.perf_counter() - start
    seconds = _device_seconds(lambda: _repeat(call, 1), host)
    calls = min(max(1, math.ceil(_SHORT_SECONDS / seconds)), longest)
    return _Burst(calls, calls * host)


def _repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call.function(call.next_argument())


@cache
def _spin_rate() -> float:
    """Cycles of the spinning kernel in a second, at the highest clock seen."""
    spin = partial(torch.cuda._sleep, _SPIN_CYCLES)
    return max(_SPIN_CYCLES / _between_events(spin, 0) for _ in range(_SPINS))


def _device_seconds(queue: Callable[[], object], host_seconds: float) -> float:
    """What `queue` queues takes on the device, if the host needs up to twice `host_seconds` to do so."""
    return _between_events(queue, round(2 * host_seconds * _spin_rate()))


def _between_events(queue: Callable[[], object], cycles: int) -> float:
    """Seconds on the device between events around what `queue` queues, after spinning for `cycles`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if cycles:
        torch.cuda._sleep(cycles)
    start.record()
    queue()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
