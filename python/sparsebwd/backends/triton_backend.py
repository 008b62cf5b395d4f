# SPDX-License-Identifier: Apache-2.0
"""AGB and WGC on tensor cores for gradients of which whole rows are dropped: the kernels of :mod:`.triton_kernels`.

A row is 64 neighbouring channels of a pixel, a multiple, or all of them: ``granularity="row"``. What is kept, and by what it is
multiplied, are the torch operations of :mod:`sparsebwd.granularity`; so are the lists here. Nothing waits for the device: how many
rows are kept is known there only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from . import base, dense, triton_tiles
from .base import Backend, BackwardResult, empty, logger
from .triton_tiles import DEPTHS, Tile

ROW = max(DEPTHS)
"""Channels of a row are a multiple of this, or all."""

MOST_STEPS = 56
"""Bits of the mask of a pixel in AGB: one for each tap and group of rows. What is left of 64 numbers the chunks."""

CHUNK_BYTES = 2**24
"""AGB takes its pixels chunk by chunk, so that the gradient's part stays in the L2 cache, which has 40 MB or more."""

PROGRAMS = 512
"""WGC is cut into about as many, whatever the device: 2 to 4 for each multiprocessor of those with 80 to 148."""

_CUT_ROWS = 512  # of a list for a program of WGC, at least, if all were kept


class Rows(NamedTuple):
    """A gradient of which rows are kept or dropped.

    values: (N, K, P, Q), channels_last; kept: bool (ceil(K / width), N P Q). Of rows that are dropped values have 0 or, unless
    ``zeros``, anything.
    """

    values: Tensor
    kept: Tensor
    width: int
    zeros: bool


def occupied(grad: Tensor, width: int = ROW) -> Rows:
    """The rows of so many channels of a gradient, channels_last, that are not zero."""
    width = min(width, grad.shape[1])
    rows = (grad != 0).permute(0, 2, 3, 1).flatten(0, 2)
    if missing := -rows.shape[1] % width:
        rows = F.pad(rows, (0, missing))
    return Rows(grad, rows.unflatten(1, (-1, width)).any(2).t().contiguous(), width, zeros=True)


def lists_of(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(lists, counts): for each row of the bool (rows, pixels) the numbers of the pixels that have it, in order, int32 (rows,
    pixels + 1) with anything behind them, and how many there are, int32 (rows,). By a scan: the same each time."""
    rows, pixels = kept.shape
    ends = kept.cumsum(1)
    places = torch.where(kept, ends - 1, pixels)
    numbers = torch.arange(pixels, dtype=torch.int32, device=kept.device).expand(rows, -1)
    lists = torch.empty(rows, pixels + 1, dtype=torch.int32, device=kept.device).scatter_(1, places, numbers)
    return lists, ends[:, -1].int()


def order_of(masks: Tensor, bits: int, chunks: int) -> Tensor:
    """The pixels of AGB in an order, int32: by chunk, and in a chunk by mask, those beside each other alike. The masks, int64,
    are numbered so that successive ones differ in one bit (a Gray code); pixels of one mask stay in their order."""
    rank = masks
    shift = 1
    while shift < bits:
        rank = rank ^ (rank >> shift)
        shift *= 2
    pixels = len(masks)
    chunk = torch.arange(pixels, device=masks.device) // -(-pixels // chunks)
    return torch.sort(rank | (chunk << bits), stable=True).indices.int()


def refusal(problem: ConvProblem) -> str | None:
    """Why these kernels do not take a convolution, None if they do."""
    if problem.groups > 1:
        return "it has groups"
    if problem.r * problem.s > MOST_STEPS:
        return f"its filter has more than {MOST_STEPS} taps"
    columns = problem.c * problem.r * problem.s
    counted = problem.n * problem.h * problem.w, problem.n * problem.p * problem.q, problem.k * columns
    if max(*counted, *map(max, dense.extents(problem))) >= 2**31 - 2**20 or max(columns, problem.k) >= 2**20:
        return "it is larger than what the kernels count in 32 bits, or a grid of theirs has in 16"
    return None


@lru_cache(maxsize=4096)
def _refusal(problem: ConvProblem, dtype: torch.dtype) -> str | None:
    """:func:`refusal`, logged when first asked."""
    reason = refusal(problem)
    if reason:
        logger.debug("%s in %s: no kernel in Triton, since %s", problem, dtype, reason)
    return reason


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: float32 as PyTorch's settings tell cuDNN to, three times in TF32 where they are strict."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "tf32x3"


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class TritonBackend(Backend):
    """Kernels in Triton for rows; PyTorch's dense convolutions where they refuse a problem."""

    name = "triton"
    only_by_name = "its kernels have not been timed on a GPU yet"
    # Tests put the interpreted kernels, which take CPU tensors, in the place of these.
    device_type = "cuda"

    @cached_property
    def kernels(self) -> ModuleType:
        from . import triton_kernels

        return triton_kernels

    def available(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; PyTorch for CUDA brings it, else: pip install 'sparsebwd[triton]'"
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            if major < 8:
                return f"device {index} has compute capability {major}.{minor}; accepted: 8.0 and newer"
        return None

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        return base.why_not_on_gpu(device_type, dtype, self.device_type)

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input = empty(problem.input_size, grad_output, reference.memory_format(grad_output))
        return self.gradients(problem, grad_output, input, weight, (True, False))[0]

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight = empty(problem.weight_size, input, reference.memory_format(input))
        return self.gradients(problem, grad_output, input, weight, (False, True))[1]

    def gradients(
        self, problem: ConvProblem, grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        if _refusal(problem, grad_output.dtype):
            return dense.gradients(problem, grad_output, input, weight, tuple(output_mask))
        return self._convolve(problem, occupied(_channels_last(grad_output)), input, weight, output_mask)

    def conv2d_backward(self, problem: ConvProblem, grad_output: Tensor, *args, **settings) -> BackwardResult:
        result = super().conv2d_backward(problem, grad_output, *args, **settings)
        return result._replace(implementation="dense") if _refusal(problem, grad_output.dtype) else result

    def rows_backward(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        factors: Tensor,
        width: int,
        output_mask: Sequence[bool],
    ) -> BackwardResult | None:
        if _refusal(problem, grad_output.dtype) or (width % ROW and width < problem.k):
            return None
        grad_output = _channels_last(grad_output)
        by_row = factors.transpose(0, 1).flatten(1).contiguous()
        zeros = _merged(by_row.shape[0], problem) > 1
        scaled = torch.empty_like(grad_output)
        self._launch(
            "scale_rows",
            (_blocks(by_row.shape[1], 32), _blocks(problem.k, ROW)),
            *(grad_output, by_row, scaled, by_row.shape[1], problem.k, width),
            **{"ZEROS": zeros, "BLOCK_M": 32, "BLOCK_K": ROW},
        )
        rows = Rows(scaled, by_row != 0, width, zeros)
        grad_input, grad_weight = self._convolve(problem, rows, input, weight, output_mask)
        density = None
        if base.observers:
            kept = (factors != 0).repeat_interleave(width, 1)[:, : problem.k]
            density = reference.density(torch.where(kept, grad_output, 0.0))
        return BackwardResult(grad_input, grad_weight, None, None, density, self.name)

    def _launch(self, name: str, grid: tuple[int, ...], *arguments, **options) -> None:
        with torch.cuda.device_of(arguments[0]):  # triton launches on the current device
            getattr(self.kernels, name)[grid](*arguments, **options)

    def _convolve(
        self, problem: ConvProblem, rows: Rows, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_input = grad_weight = None
        if output_mask[0]:
            grad_input = self.agb(problem, rows, weight, triton_tiles.agb_tiles(problem, weight.dtype)[0])
        if output_mask[1]:
            tile = triton_tiles.wgc_tiles(problem, input.dtype, tile_channels(problem, rows))[0]
            grad_weight = self.wgc(problem, rows, input, tile)
        return grad_input, grad_weight

    def wgc(self, problem: ConvProblem, rows: Rows, input: Tensor, tile: Tile) -> Tensor:
        """The gradient of the weight, with tiles of this size."""
        values, pixels = rows.values, rows.kept.shape[1]
        columns = problem.c * problem.r * problem.s
        if pixels == 0:
            return values.new_zeros(problem.weight_size)
        lists, counts = lists_of(rows.kept)
        tiles = _blocks(problem.k, tile.m), _blocks(columns, tile.n)
        splits = max(1, min(PROGRAMS // (tiles[0] * tiles[1]), pixels // _CUT_ROWS))
        partial = torch.empty(splits, problem.k, columns, dtype=torch.float32, device=values.device)
        self._launch(
            "wgc",
            (*tiles, splits),
            *(values, _channels_last(input), lists, counts, partial, lists.shape[1]),
            *(problem.k, rows.width, problem.c, problem.h, problem.w, problem.p, problem.q, problem.s, columns),
            *_geometry(problem),
            splits,
            **{"ONE_TAP": problem.c % tile.n == 0, "PRECISION": precision(values.dtype)},
            **tile.options,
        )
        sums = partial[0] if splits == 1 else partial.sum(0)
        return sums.to(values.dtype).view(problem.k, problem.r, problem.s, problem.c).permute(0, 3, 1, 2)

    def agb(self, problem: ConvProblem, rows: Rows, weight: Tensor, tile: Tile) -> Tensor:
        """The gradient of the input, with tiles of this size."""
        values, (groups, pixels) = rows.values, rows.kept.shape
        output = empty(problem.input_size, values, torch.channels_last)
        inputs = problem.n * problem.h * problem.w
        if inputs == 0:
            return output
        merged = _merged(groups, problem)
        kept, width = rows.kept, min(rows.width * merged, problem.k)
        if merged > 1:
            kept = F.pad(kept, (0, 0, 0, -groups % merged)).unflatten(0, (-1, merged)).any(1)
        bits = problem.r * problem.s * len(kept)
        sizes = problem.h, problem.w, problem.p, problem.q, problem.s, len(kept), bits

        masks = torch.empty(inputs, dtype=torch.int64, device=values.device)
        self._launch(
            "agb_masks", (_blocks(inputs, 128),),
            *(kept.view(torch.uint8), masks, inputs, pixels, *sizes, *_geometry(problem)), BLOCK_M=128,
        )  # fmt: skip
        chunks = max(1, min(_blocks(values.nbytes, CHUNK_BYTES), 2 ** (62 - bits) - 1))
        order = order_of(masks, bits, chunks)

        tiles = _blocks(inputs, tile.m)
        steps = torch.empty(tiles, bits, dtype=torch.int32, device=values.device)
        counts = torch.empty(tiles, dtype=torch.int32, device=values.device)
        self._launch("agb_steps", (tiles,), *(order, masks, steps, counts, inputs, bits), BLOCK_M=tile.m)
        self._launch(
            "agb",
            (tiles, _blocks(problem.c, tile.n)),
            *(values, weight.permute(2, 3, 1, 0).contiguous(), output, order, masks, steps, counts, inputs),
            *(problem.k, width, problem.c, *sizes, *_geometry(problem)),
            **{"PRECISION": precision(values.dtype)},
            **tile.options,
        )
        return output


def tile_channels(problem: ConvProblem, rows: Rows) -> int:
    """Output channels that a tile of WGC may have, which is of one row: all, or what all rows are a multiple of."""
    return problem.k if len(rows.kept) == 1 else 2 * ROW if rows.width % (2 * ROW) == 0 else ROW


def _merged(groups: int, problem: ConvProblem) -> int:
    """How many rows share a bit in AGB. If more than one does, rows that are dropped have to be 0."""
    return _blocks(groups, MOST_STEPS // (problem.r * problem.s))


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _geometry(problem: ConvProblem) -> tuple[int, ...]:
    """As the kernels take it."""
    return (*problem.stride, *problem.padding, *problem.dilation)
