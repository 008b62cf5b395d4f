# SPDX-License-Identifier: Apache-2.0
"""Sizes of the tiles that the Triton kernels compute in: a small fixed table, by the dtype and what the layer has."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..problem import ConvProblem

DEPTHS = (16, 32, 64)
"""What BLOCK_K may be: rows of the gradient have a multiple of the largest, or are all channels of a pixel."""


class Tile(NamedTuple):
    """A tile of a matrix product: m times n, contracted in steps of k; computed by ``warps``, in a pipeline of ``stages``."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """As kernels are given them."""
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip

    def fitted(self, m: int, n: int) -> Tile:
        """No larger than these sides want; a tensor core takes 16 at least. A tile of fewer elements needs fewer warps."""
        small = self._replace(m=min(self.m, _rounded(m)), n=min(self.n, _rounded(n)))
        return small._replace(warps=max(1, min(self.warps, small.m * small.n // 1024)))


def _rounded(size: int) -> int:
    """To the next power of 2, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


# What gather kernels on tensor cores usually end up with; not tuned, as nothing was timed. Best first. In shared memory are the
# operands of two steps less than there are stages (one, from compute capability 9.0 on), as lists are read before what they lead to.
AGB = {
    2: (Tile(128, 128, 64, 8, 4), Tile(128, 128, 32, 4, 5), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4)),
    4: (Tile(128, 128, 16, 8, 6), Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 8, 4), Tile(64, 64, 32, 4, 5)),
}
WGC = {
    2: (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 256, 32, 8, 4), Tile(128, 128, 32, 4, 5)),
    4: (Tile(128, 128, 16, 8, 6), Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 8, 4), Tile(64, 64, 32, 4, 5)),
}
"""By bytes of an element."""


def agb_tiles(problem: ConvProblem, dtype: torch.dtype) -> list[Tile]:
    """Those of the table as this layer takes them, the one that is used first."""
    fitted = [tile.fitted(128, problem.c) for tile in AGB[dtype.itemsize]]
    return _first(chosen.get(("agb", problem, dtype)), fitted)


def wgc_tiles(problem: ConvProblem, dtype: torch.dtype, channels: int) -> list[Tile]:
    """The same; a tile is of one row, of so many channels."""
    fitted = [tile.fitted(channels, problem.c * problem.r * problem.s) for tile in WGC[dtype.itemsize]]
    return _first(chosen.get(("wgc", problem, dtype, channels)), fitted)


chosen: dict[tuple, Tile] = {}
"""By kernel, problem, dtype and channels of a row: what :func:`.triton_tune.tune` found to be the fastest in this process."""


def _first(tile: Tile | None, tiles: list[Tile]) -> list[Tile]:
    return list(dict.fromkeys(tiles if tile is None else [tile, *tiles]))
