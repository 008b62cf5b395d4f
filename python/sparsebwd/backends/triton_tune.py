# SPDX-License-Identifier: Apache-2.0
"""Choice of tiles by time, only where it is asked for: :func:`tune`.

Which tile runs changes in which order sums are taken, hence the last bits of gradients: runs repeat where the choice does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..testing import random_tensor
from . import triton_tiles
from .base import get_backend
from .dense import convolution_backward
from .triton_backend import ROW, TritonBackend, occupied, refusal, tile_channels
from .triton_tiles import Tile


class Candidate(NamedTuple):
    """kernel: "agb" or "wgc". milliseconds: None of one that does not fit on the device, or is ``wrong``: it did not give the
    exact sums of integers, and is never timed."""

    kernel: str
    tile: Tile
    milliseconds: float | None
    wrong: bool


def milliseconds(call: Callable[[], Tensor]) -> float:
    """The median of 9 calls on a CUDA device, after 3 others."""
    times = []
    for repeat in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def tune(
    problem: ConvProblem,
    dtype: torch.dtype = torch.float32,
    kept: float = 0.5,
    width: int = ROW,
    *,
    backend: TritonBackend | None = None,
    device: str = "cuda",
    time: Callable[[Callable[[], Tensor]], float] = milliseconds,
) -> list[Candidate]:
    """Time each tile of the tables on a layer, with a fraction ``kept`` of the rows of ``width`` channels left, at random places,
    and use the fastest for this problem and dtype in this process. Each is verified first.

    Returns what was found, as measured. Raises ValueError for a problem that these kernels do not take, RuntimeError if none of a
    kernel's tiles is right.
    """
    if reason := refusal(problem):
        raise ValueError(f"problem: got {problem}; these kernels do not take it: {reason}")
    backend = backend or get_backend("triton")
    generator = torch.Generator().manual_seed(0)
    input, weight, gradient = (
        random_tensor(size, generator=generator, dtype=dtype, memory_format=torch.channels_last, integer=True).to(device)
        for size in (problem.input_size, problem.weight_size, problem.output_size)
    )
    drawn = torch.rand((problem.n, -(-problem.k // width), problem.p, problem.q), generator=generator) < kept
    gradient *= drawn.repeat_interleave(min(width, problem.k), 1)[:, : problem.k].to(device)
    rows = occupied(gradient, width)
    channels = tile_channels(problem, rows)
    # Sums of these integers are exact in float32, in whatever order; those of 16 bits are rounded once.
    wanted = convolution_backward(problem, *(tensor.float() for tensor in (gradient, input, weight)), (True, True))
    kernels = {
        ("agb", problem, dtype): (triton_tiles.agb_tiles(problem, dtype), lambda tile: backend.agb(problem, rows, weight, tile)),
        ("wgc", problem, dtype, channels): (
            triton_tiles.wgc_tiles(problem, dtype, channels),
            lambda tile: backend.wgc(problem, rows, input, tile),
        ),
    }
    found = []
    for (key, (tiles, run)), exact in zip(kernels.items(), wanted):
        candidates = [_candidate(key[0], tile, run, exact.to(dtype), time) for tile in tiles]
        right = [candidate for candidate in candidates if candidate.milliseconds is not None]
        if not right:
            raise RuntimeError(f"{key[0]} of {problem} in {dtype}: no tile gives the right sums on this device: {candidates}")
        triton_tiles.chosen[key] = min(right, key=lambda candidate: candidate.milliseconds).tile
        found += candidates
    return found


def _candidate(kernel: str, tile: Tile, run: Callable[[Tile], Tensor], exact: Tensor, time) -> Candidate:
    from triton.runtime.errors import OutOfResources

    try:
        wrong = not torch.equal(run(tile), exact)
    except OutOfResources:
        return Candidate(kernel, tile, None, False)
    return Candidate(kernel, tile, None if wrong else time(lambda: run(tile)), wrong)
