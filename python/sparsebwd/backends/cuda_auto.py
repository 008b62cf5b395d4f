# SPDX-License-Identifier: Apache-2.0
"""What ``backend="auto"`` takes on CUDA devices: the sparse kernels at densities at which they are estimated to be faster."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import ConvProblem
from ..ranges import name_of
from ..settings import Pruning
from .base import logger
from .cuda import CudaBackend, new_stats, not_pruned, refusals_of


class DensityHistory:
    """Densities of one layer, which the host sees two calls later: then it need not wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Made when they are needed: pinned memory may not be to be had while a graph is captured.
        self._values: Sequence[Tensor] = ()
        self._events: list[torch.cuda.Event] = []
        self._recorded = 0
        self._seen: float | None = None
        self.calls = 0

    def latest(self) -> float | None:
        """The density recorded before the last one, whether the device is fast or slow, so that runs repeat; while a
        graph is captured the one returned before. None if there is none yet."""
        if self._recorded >= 2 and not _capturing(self._device):
            place = self._recorded % 2
            if self._events:
                self._events[place].synchronize()
            self._seen = self._values[place].item()
        return self._seen

    def record(self, density: Tensor) -> None:
        if not self._values:
            on_cuda = self._device.type == "cuda"
            self._values = torch.empty(2, dtype=torch.float32, pin_memory=on_cuda).unbind()
            self._events = [torch.cuda.Event() for _ in range(2)] if on_cuda else []
        place = self._recorded % 2
        self._values[place].copy_(density, non_blocking=True)
        if self._events:
            self._events[place].record(torch.cuda.current_stream(self._device))
        self._recorded += 1


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Estimates, from the instructions of the kernels and the latencies that few warps do not hide; not measured yet.
_BREAK_EVEN_FLOAT32 = 0.25  # the dense convolution in float32 throughout
_BREAK_EVEN_FLOAT32_SMALL = 0.15  # the same with a stride, or on maps of few pixels
_BREAK_EVEN_TF32 = 0.04  # the dense one of float32 tensors in TF32, as PyTorch allows by default
_BREAK_EVEN_HALF = 0.02  # bfloat16 and float16
_SMALL_MAP = 49  # pixels of grad_output
_CONTIGUOUS = 0.5  # of these densities, where tensors are copied to channels_last first

_NEVER = "1x1, in groups, or refused by the sparse kernels"


def _break_even(problem: ConvProblem, dtype: torch.dtype, channels_last: bool) -> float:
    """The density up to which the sparse kernels are the faster ones, where they may be at all."""
    if dtype != torch.float32:
        limit = _BREAK_EVEN_HALF
    elif torch.backends.cudnn.conv.fp32_precision == "tf32":
        limit = _BREAK_EVEN_TF32
    else:
        small = max(problem.stride) > 1 or problem.p * problem.q <= _SMALL_MAP
        limit = _BREAK_EVEN_FLOAT32_SMALL if small else _BREAK_EVEN_FLOAT32
    return limit if channels_last else _CONTIGUOUS * limit


# Of a gradient that is not pruned the density has to be counted, which takes a pass over it.
_CALLS_PER_COUNT = 32
_MOST_LAYERS = 4096


class _Layer(NamedTuple):
    may_pay: tuple[bool, bool]  # whether the sparse AGB and WGC are the faster ones at some density
    history: DensityHistory


class AdaptiveCudaBackend(CudaBackend):
    """The sparse kernels where they pay, PyTorch's dense ones on the pruned gradient where not.

    The choice depends on the problem, the dtype and the density of an earlier gradient of the same layer (see
    :class:`DensityHistory`), never on time measured, so that a run can be repeated bit for bit. Dense until there is one.
    """

    def __init__(self) -> None:
        self._layers: OrderedDict[tuple, _Layer | None] = OrderedDict()

    def _layer(self, problem: ConvProblem, grad: Tensor, layer_id: int) -> _Layer | None:
        """What is known of the layer, None if the sparse kernels never pay there."""
        key = (layer_id, problem, grad.dtype, grad.device)
        if key not in self._layers:
            if len(self._layers) >= _MOST_LAYERS:
                self._layers.popitem(last=False)
            may_pay = self._may_pay(problem, grad.dtype)
            self._layers[key] = _Layer(may_pay, DensityHistory(grad.device)) if any(may_pay) else None
        return self._layers[key]

    def _may_pay(self, problem: ConvProblem, dtype: torch.dtype) -> tuple[bool, bool]:
        # So little is computed with each element there that finding the non-zeros takes longer.
        if problem.groups > 1 or problem.r * problem.s == 1:
            return False, False
        agb_refusal, wgc_refusal = refusals_of(self.operators, problem, dtype)
        return not agb_refusal, not wgc_refusal

    def why_not_faster(
        self, problem: ConvProblem, dtype: torch.dtype, channels_last: bool, pruning: Pruning
    ) -> str | None:
        if not any(self._may_pay(problem, dtype)):
            return _NEVER
        highest = _break_even(problem, dtype, channels_last)
        if highest < pruning.lowest_density:
            tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
            return (
                f"the sparse kernels are faster up to a density of {highest:.2g} here, where PyTorch computes in "
                f"{'TF32' if tf32 else dtype}{'' if channels_last else ' and tensors are copied to channels_last'}, and "
                f"{pruning.asked} hardly ever leaves so little"
            )
        return None

    def break_even(self, problem: ConvProblem, dtype: torch.dtype, channels_last: bool) -> tuple[float, float]:
        limit = _break_even(problem, dtype, channels_last)
        agb, wgc = self._may_pay(problem, dtype)
        return limit * agb, limit * wgc

    def sparse_pays(self, problem: ConvProblem, grad: Tensor, layer_id: int) -> tuple[bool, bool]:
        layer = self._layer(problem, grad, layer_id)
        density = None if layer is None else layer.history.latest()
        if density is None:
            reason = _NEVER if layer is None else "no density of it is known yet"
            logger.debug("%s, %s in %s: AGB dense, WGC dense: %s", name_of(layer_id), problem, grad.dtype, reason)
            return False, False
        limit = _break_even(problem, grad.dtype, grad.is_contiguous(memory_format=torch.channels_last))
        pays = tuple(may_pay and density <= limit for may_pay in layer.may_pay)
        logger.debug(
            "%s, %s in %s at density %.3f: AGB %s, WGC %s (break-even %.2f)",
            name_of(layer_id),
            problem,
            grad.dtype,
            density,
            *("sparse" if pay else "dense" for pay in pays),
            limit,
        )
        return pays

    def remember(self, problem: ConvProblem, grad: Tensor, layer_id: int, density: Tensor | None) -> None:
        layer = self._layer(problem, grad, layer_id)
        if layer is None or _capturing(grad.device):
            return
        history = layer.history
        if density is None and (history.calls < 2 or history.calls % _CALLS_PER_COUNT == 0):
            stats = new_stats(grad)
            self.operators.prune(grad, *not_pruned(), None, stats)
            density = stats[2]
        history.calls += 1
        if density is not None:
            history.record(density)


adaptive = AdaptiveCudaBackend()
