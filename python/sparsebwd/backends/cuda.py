# SPDX-License-Identifier: Apache-2.0
"""The sparse kernels for CUDA devices: csrc/cuda behind the raw operators ``torch.ops.sparsebwd_cuda.*``.

Nothing here waits for work that the device has yet to do, so that the host stays ahead of it: threshold, sigma and
density remain on the device.
"""

from __future__ import annotations

import importlib.util
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import importance, reference
from ..problem import ConvProblem
from ..ranges import name_of
from ..reference import PrunedGradient
from ..settings import Pruning
from .base import Backend, BackwardResult, empty, logger, refusal, why_not_on_gpu
from .dense import convolution_backward


def load() -> str | None:
    """Load the kernels. None if that worked, else the reason why not."""
    if importlib.util.find_spec("sparsebwd._C_cuda") is None:
        try:
            from .. import _C  # noqa: F401  registers torch.ops.sparsebwd_cpu
        except ImportError:
            return "the kernels of sparsebwd are not compiled"
        return f"this build of sparsebwd has no CUDA kernels: {torch.ops.sparsebwd_cpu.why_no_cuda()}"
    try:
        from .. import _C_cuda  # noqa: F401  registers torch.ops.sparsebwd_cuda
    except ImportError as error:
        return f"the native module sparsebwd._C_cuda cannot be loaded: {error}"
    return None


why_not_loaded = load()


def covers(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``architectures``, such as "8.0", "9.0a" or "10.0+PTX", runs on a device of ``capability``."""
    for name in architectures:
        portable = name.endswith("+PTX")
        major, minor = (int(number) for number in name.removesuffix("+PTX").rstrip("af").split("."))
        own = capability[0] == major and capability[1] >= minor
        if own or portable and capability >= (major, minor):
            return True
    return False


class _RawPruning(NamedTuple):
    """How the raw operators are to prune."""

    key: Tensor | None
    sigma_coefficient: float
    quantile: float
    sigma_history: Tensor | None
    scales: Tensor | None
    cooperative: bool


def _not_pruned() -> _RawPruning:
    return _RawPruning(None, 0.0, 0.0, None, None, cooperative())


def _raw_pruning(
    grad: Tensor, key: Tensor, pruning: Pruning, sigma_history: Tensor | None, scales: Tensor | None = None
) -> _RawPruning:
    if _finds_threshold(pruning):
        return _RawPruning(key, pruning.sigma_coefficient, pruning.quantile, sigma_history, scales, cooperative())
    # The kernels find no such threshold. They are given this one as what they predict one from: the only value recorded,
    # of a fresh history. A recorded 0 would be none; below the smallest magnitude there are only zeros, which become +0.
    _, tau = reference.find_threshold(grad, pruning, sigma_history, scales)
    history = torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=grad.device)
    history[:1].fill_(1)
    history[1:2].view(torch.float32).copy_(tau.clamp(min=_SMALLEST))
    if scales is not None:
        scales = torch.where(tau > 0, scales, 1.0)
    return _RawPruning(key, pruning.sigma_coefficient, 1.0, history, scales, cooperative())


_SMALLEST = 2.0**-149


def _finds_threshold(pruning: Pruning) -> bool:
    """Whether the kernels do."""
    return not pruning.needs_counts and pruning.threshold != "sampled" and not isinstance(pruning.quantile, Tensor)


def _tau(tau: Tensor, pruning: Pruning) -> Tensor:
    """What the kernels say it is, without the one that stands for 0."""
    return tau if _finds_threshold(pruning) else torch.where(tau > _SMALLEST, tau, 0.0)


def _new_stats(grad: Tensor) -> Tensor:
    """Where the kernels write tau, sigma and density."""
    return torch.empty(3, dtype=torch.float32, device=grad.device)


@lru_cache(maxsize=4096)
def _refusals(operators, problem: ConvProblem, dtype: torch.dtype) -> tuple[str, str]:
    """Why the sparse kernels of AGB and of WGC do not take the problem; "" where they do. Logged when first asked."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    found = operators.refusals(problem.input_size, problem.weight_size, *geometry, str(dtype).removeprefix("torch."))
    for name, reason in zip(("AGB", "WGC"), found):
        if reason:
            logger.debug("%s in %s: no sparse %s, since %s", problem, dtype, name, reason)
    return found


LAUNCHES = "SPARSEBWD_PRUNE_LAUNCHES"
_LAUNCHES = {"auto": None, "one": True, "several": False}


def cooperative() -> bool:
    """Whether pruning may be one cooperative launch, which waits until it has the whole device; else it is several ordinary ones,
    with the same results. The latter beside the communication of other processes, which it would wait for, unless the environment
    variable SPARSEBWD_PRUNE_LAUNCHES is "one"; that may be "several" too. Where the device refuses one, it is several in any case.

    Raises ValueError for another value of the variable.
    """
    asked = os.environ.get(LAUNCHES, "auto")
    if asked not in _LAUNCHES:
        raise ValueError(f"{LAUNCHES}: got {asked!r}; accepted: {', '.join(_LAUNCHES)}")
    if _LAUNCHES[asked] is not None:
        return _LAUNCHES[asked]
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


_UNPRUNED = Pruning(percentile=None)

_ALIGNMENT = 16


def _for_sparse_kernels(tensor: Tensor) -> Tensor:
    """The tensor in channels_last, at an address that vectors can be loaded from; itself if it is so."""
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone(memory_format=torch.channels_last)


class CudaBackend(Backend):
    """The sparse kernels of csrc/cuda, whatever the density; PyTorch's dense ones on the pruned gradient where they refuse a
    problem."""

    name = "cuda"
    # Tests put the emulated kernels, which take CPU tensors, in the place of these.
    device_type = "cuda"
    operators = torch.ops.sparsebwd_cuda

    def available(self) -> str | None:
        if why_not_loaded is not None:
            return why_not_loaded
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        architectures = self.operators.build()[0]
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            if not covers(architectures.split(), (major, minor)):
                return (
                    f"device {index} has compute capability {major}.{minor}, the kernels are built for {architectures}; "
                    "TORCH_CUDA_ARCH_LIST, when sparsebwd is installed, adds others from 8.0 on"
                )
        return None

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        return why_not_on_gpu(device_type, dtype, self.device_type) or (problem and refusal(self.operators, problem))

    def for_auto(self) -> Backend:
        return _adaptive

    def prune(
        self,
        grad: Tensor,
        key: Tensor,
        pruning: Pruning,
        sigma_history: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PrunedGradient:
        values, stats = torch.empty_like(grad), _new_stats(grad)
        self.operators.prune(grad, *_raw_pruning(grad, key, pruning, sigma_history, scales), values, stats)
        # What an operator returns must not share memory. This copies all three by one kernel.
        tau, sigma, density = torch._foreach_mul(stats.unbind(), 1.0)
        return PrunedGradient(values, _tau(tau, pruning), sigma, density)

    # PyTorch's convolution reads only the shape and the strides of the operand whose gradient it computes.

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input = empty(problem.input_size, grad_output, reference.memory_format(grad_output))
        return self._unpruned(problem, grad_output, input, weight, (True, False)).grad_input

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight = empty(problem.weight_size, input, reference.memory_format(input))
        return self._unpruned(problem, grad_output, input, weight, (False, True)).grad_weight

    def _unpruned(
        self, problem: ConvProblem, grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: tuple[bool, bool]
    ) -> BackwardResult:
        return self.conv2d_backward(problem, grad_output, input, weight, None, _UNPRUNED, output_mask)

    def sparse_pays(self, problem: ConvProblem, grad: Tensor, layer_id: int) -> tuple[bool, bool]:
        """Whether AGB and WGC of ``grad`` run on the kernels of this backend."""
        agb_refusal, wgc_refusal = _refusals(self.operators, problem, grad.dtype)
        return not agb_refusal, not wgc_refusal

    def remember(self, problem: ConvProblem, grad: Tensor, layer_id: int, density: Tensor | None) -> None:
        """Called after each backward pass with the density of ``grad``, after pruning, if it is known."""

    def conv2d_backward(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        key: Tensor | None,
        pruning: Pruning,
        output_mask: Sequence[bool],
        sigma_history: Tensor | None = None,
        layer_id: int = 0,
    ) -> BackwardResult:
        sigma = tau = density = grad_input = grad_weight = None
        gradient = grad_output
        prune_output = pruning.prunes_output
        if prune_output:
            raw = _raw_pruning(grad_output, key, pruning, sigma_history, importance.scales(input, pruning))
        else:
            raw = _not_pruned()

        pays = self.sparse_pays(problem, grad_output, layer_id)
        sparse = (output_mask[0] and pays[0], output_mask[1] and pays[1])
        dense = (output_mask[0] and not pays[0], output_mask[1] and not pays[1])
        if any(sparse):
            stats, gradient, grad_input, grad_weight = self._convolve(problem, grad_output, input, weight, sparse, raw)
            density = stats[2]
        elif prune_output:
            gradient, stats = torch.empty_like(grad_output), _new_stats(grad_output)
            self.operators.prune(grad_output, *raw, gradient, stats)
            density = stats[2]
        if prune_output:
            tau, sigma = _tau(stats[0], pruning), stats[1]
        if any(dense):
            dense_input, dense_weight = convolution_backward(problem, gradient, input, weight, dense)
            grad_input = dense_input if dense[0] else grad_input
            grad_weight = dense_weight if dense[1] else grad_weight
        self.remember(problem, grad_output, layer_id, density)

        if pruning.prunes_input and grad_input is not None:
            stats = _new_stats(grad_input)
            raw = _raw_pruning(grad_input, key, pruning, sigma_history)
            self.operators.prune(grad_input, *raw, grad_input, stats)
            tau, sigma = _tau(stats[0], pruning), stats[1]
        implementation = "+".join(name for name, ran in ((self.name, any(sparse)), ("dense", any(dense))) if ran)
        return BackwardResult(grad_input, grad_weight, tau, sigma, density, implementation)

    def _convolve(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        output_mask: tuple[bool, bool],
        raw: _RawPruning,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Prune, AGB and WGC in one call: stats, the gradient that was consumed, and the results. For problems that the
        sparse kernels take."""
        grad_output = _for_sparse_kernels(grad_output)
        grad_input = grad_weight = None
        if output_mask[0]:
            grad_input = empty(problem.input_size, grad_output, torch.channels_last)
        if output_mask[1]:
            grad_weight = empty(problem.weight_size, grad_output, reference.memory_format(weight))
            input = _for_sparse_kernels(input)
        pruned = None if raw.key is None else torch.empty_like(grad_output)
        stats = _new_stats(grad_output)
        self.operators.conv2d_backward(
            grad_output,
            input if output_mask[1] else None,
            weight if output_mask[0] else None,
            problem.input_size,
            problem.weight_size,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
            *raw,
            pruned,
            grad_input,
            grad_weight,
            stats,
        )
        return stats, grad_output if pruned is None else pruned, grad_input, grad_weight


class _DensityHistory:
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
    history: _DensityHistory


class AdaptiveCudaBackend(CudaBackend):
    """The sparse kernels where they pay, PyTorch's dense ones on the pruned gradient where not.

    The choice depends on the problem, the dtype and the density of an earlier gradient of the same layer (see
    :class:`_DensityHistory`), never on time measured, so that a run can be repeated bit for bit. Dense until there is one.
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
            self._layers[key] = _Layer(may_pay, _DensityHistory(grad.device)) if any(may_pay) else None
        return self._layers[key]

    def _may_pay(self, problem: ConvProblem, dtype: torch.dtype) -> tuple[bool, bool]:
        # So little is computed with each element there that finding the non-zeros takes longer.
        if problem.groups > 1 or problem.r * problem.s == 1:
            return False, False
        agb_refusal, wgc_refusal = _refusals(self.operators, problem, dtype)
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
            stats = _new_stats(grad)
            self.operators.prune(grad, *_not_pruned(), None, stats)
            density = stats[2]
        history.calls += 1
        if density is not None:
            history.record(density)


_adaptive = AdaptiveCudaBackend()
