# SPDX-License-Identifier: Apache-2.0
"""The sparse kernels for CUDA devices: csrc/cuda behind the raw operators ``torch.ops.sparsebwd_cuda.*``.

Nothing here waits for work that the device has yet to do, so that the host stays ahead of it: threshold, sigma and
density remain on the device.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import importance, reference
from ..problem import ConvProblem
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


def not_pruned() -> _RawPruning:
    """That they are to consume the gradient as it is."""
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


def new_stats(grad: Tensor) -> Tensor:
    """Where the kernels write tau, sigma and density."""
    return torch.empty(3, dtype=torch.float32, device=grad.device)


@lru_cache(maxsize=4096)
def refusals_of(operators, problem: ConvProblem, dtype: torch.dtype) -> tuple[str, str]:
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
        from .cuda_auto import adaptive  # which derives from this class

        return adaptive

    def prune(
        self,
        grad: Tensor,
        key: Tensor,
        pruning: Pruning,
        sigma_history: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PrunedGradient:
        values, stats = torch.empty_like(grad), new_stats(grad)
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
        agb_refusal, wgc_refusal = refusals_of(self.operators, problem, grad.dtype)
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
            raw = not_pruned()

        pays = self.sparse_pays(problem, grad_output, layer_id)
        sparse = (output_mask[0] and pays[0], output_mask[1] and pays[1])
        dense = (output_mask[0] and not pays[0], output_mask[1] and not pays[1])
        if any(sparse):
            stats, gradient, grad_input, grad_weight = self._convolve(problem, grad_output, input, weight, sparse, raw)
            density = stats[2]
        elif prune_output:
            gradient, stats = torch.empty_like(grad_output), new_stats(grad_output)
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
            stats = new_stats(grad_input)
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
        stats = new_stats(grad_output)
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
