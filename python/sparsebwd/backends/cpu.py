# SPDX-License-Identifier: Apache-2.0
"""The sparse kernels for CPUs: csrc/cpu behind the raw operators ``torch.ops.sparsebwd_cpu.*``."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import histogram, importance, reference
from ..problem import ConvProblem
from ..ranges import name_of
from ..reference import PrunedGradient
from ..settings import Pruning
from . import depthwise
from .base import Backend, BackwardResult, empty, logger, refusal, until_choices_change
from .break_even import break_even, classify, why_dense, why_not_worth_it
from .dense import DenseBackend, goes_through_float32, gradients

try:
    from .. import _C  # noqa: F401  registers torch.ops.sparsebwd_cpu

    _unavailable = None
except ImportError as error:
    _unavailable = f"the native module sparsebwd._C cannot be loaded: {error}"

_raw = torch.ops.sparsebwd_cpu


class _Convolved(NamedTuple):
    density: float
    pruned: Tensor | None
    grad_input: Tensor | None
    grad_weight: Tensor | None


def _in_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in this memory format, itself if it is."""
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    if tensor.dtype != torch.float32 or not (
        tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor.contiguous(memory_format=memory_format)
    result = empty(tensor.shape, tensor, memory_format)
    _raw.copy_layout(tensor, result)
    return result


def _threshold(
    grad: Tensor, pruning: Pruning, sigma_history: Tensor | None, scales: Tensor | None = None
) -> tuple[float, float]:
    """(sigma, tau) of ``grad``, see :func:`sparsebwd.reference.find_threshold`."""
    measured = reference.looked_at(grad, pruning, scales)
    if pruning.needs_counts:
        sigma, tau = reference.threshold_of_counts(_counts(measured), pruning, grad.dtype)
        return sigma.item(), tau.item()
    abs_sum, _ = _raw.abs_sum(measured)
    return reference.threshold(abs_sum, measured.numel(), pruning, grad.dtype, sigma_history)


def _counts(values: Tensor) -> Tensor:
    """:func:`sparsebwd.histogram.count` of a dense tensor."""
    counts = torch.empty(histogram.BINS, dtype=torch.int64)
    _raw.histogram(values, counts)
    return counts


def _of_images(tau: float, scales: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The threshold of each image, (N,), None where all have tau."""
    return None if scales is None or tau == 0 else reference.thresholds_of_images(tau, scales, dtype).view(-1)


def _prune_at(grad: Tensor, key: Tensor, tau: float, taus: Tensor | None, values: Tensor) -> float:
    """Write ``grad`` pruned at the threshold ``tau``, or its images at ``taus``, to ``values``, which may be ``grad``. Returns
    the density."""
    return _raw.prune(grad, key, tau, values, taus) / max(grad.numel(), 1)


def _convolve(
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor | None = None,
    weight: Tensor | None = None,
    key: Tensor | None = None,
    tau: float = 0.0,
    taus: Tensor | None = None,
    keep_pruned: bool = False,
    input_format: torch.memory_format = torch.contiguous_format,
    weight_format: torch.memory_format = torch.contiguous_format,
) -> _Convolved:
    """Prune if there is a key, at ``tau`` or images at ``taus``, AGB if there is a weight, WGC if there is an input; in one call.

    input_format, weight_format: those of the gradients of the input and of the weight.
    """
    # What the kernels do not read and write as it is: bfloat16 that is contiguous.
    copied = grad_output.dtype != torch.float32
    if copied:
        grad_output = _in_format(grad_output, torch.channels_last)
    pruned = torch.empty_like(grad_output) if keep_pruned else None
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = empty(problem.input_size, grad_output, torch.channels_last if copied else input_format)
        weight = _in_format(weight, torch.channels_last)  # faster than packing it as it is
    if input is not None:
        grad_weight = empty(problem.weight_size, input, weight_format)
        input = _in_format(input, torch.channels_last) if copied else input
    nonzeros = _raw.conv2d_backward(
        grad_output,
        input,
        weight,
        problem.input_size,
        problem.weight_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        key,
        tau,
        pruned,
        grad_input,
        grad_weight,
        taus=taus,
    )
    if grad_input is not None and copied:
        grad_input = _in_format(grad_input, input_format)
    return _Convolved(nonzeros / max(grad_output.numel(), 1), pruned, grad_input, grad_weight)


class CpuBackend(Backend):
    """Always the sparse kernels, whatever the density."""

    name = "cpu"

    def available(self) -> str | None:
        return _unavailable

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"the device is {device_type}, not cpu"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"{dtype} is not float32 or bfloat16"
        return problem and refusal(_raw, problem)

    def for_auto(self) -> Backend:
        return AdaptiveCpuBackend()

    def prune(
        self,
        grad: Tensor,
        key: Tensor,
        pruning: Pruning,
        sigma_history: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PrunedGradient:
        sigma, tau = _threshold(grad, pruning, sigma_history, scales)
        values = torch.empty_like(grad)
        density = _prune_at(grad, key, tau, _of_images(tau, scales, grad.dtype), values)
        scalars = (torch.scalar_tensor(x, dtype=torch.float32, device="cpu") for x in (tau, sigma, density))
        return PrunedGradient(values, *scalars)

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input_format = reference.memory_format(grad_output)
        return _convolve(problem, grad_output, weight=weight, input_format=input_format).grad_input

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight_format = reference.memory_format(input)
        return _convolve(problem, grad_output, input=input, weight_format=weight_format).grad_weight

    def sparse_pays(
        self, problem: ConvProblem, grad: Tensor, pruning: Pruning, wanted: Sequence[bool], layer_id: int = 0
    ) -> tuple[bool, bool]:
        """Whether AGB and WGC of ``grad``, pruned if ``pruning`` says so, run on the sparse kernels. Of one that is not
        wanted it says nothing."""
        return True, True

    def may_pay(self, problem: ConvProblem, grad: Tensor) -> bool:
        """Whether the sparse kernels may run at some density of ``grad``."""
        return True

    def conv2d_backward(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        key: Tensor,
        pruning: Pruning,
        output_mask: Sequence[bool],
        sigma_history: Tensor | None = None,
        layer_id: int = 0,
    ) -> BackwardResult:
        sigma = tau = density = pruned = grad_input = grad_weight = None
        at: tuple[Tensor | None, float, Tensor | None] = None, 0.0, None
        dense_by, dense_gradients = "dense", gradients
        pays = self.sparse_pays(problem, grad_output, pruning, output_mask, layer_id)
        sparse = (output_mask[0] and pays[0], output_mask[1] and pays[1])
        dense = (output_mask[0] and not pays[0], output_mask[1] and not pays[1])
        # That this follows from the gradient alone, not from what is drawn, keeps it without bias.
        prune_output = pruning.prunes_output and (any(sparse) or pruning.where == "everywhere")
        if prune_output:
            scales = importance.scales(input, pruning)
            sigma, tau = _threshold(grad_output, pruning, sigma_history, scales)
            at = (key, tau, _of_images(tau, scales, grad_output.dtype))

        if any(sparse):
            density, pruned, grad_input, grad_weight = _convolve(
                problem,
                grad_output,
                input if sparse[1] else None,
                weight if sparse[0] else None,
                *at,
                keep_pruned=prune_output and any(dense),
                input_format=reference.memory_format(input),
                weight_format=reference.memory_format(weight),
            )
        elif prune_output:
            pruned = torch.empty_like(grad_output)
            density = _prune_at(grad_output, *at, pruned)
        if any(dense):
            gradient = grad_output if pruned is None else pruned
            if depthwise.is_faster(problem, gradient, dense):
                dense_by, dense_gradients = "depthwise", depthwise.gradients
            dense_input, dense_weight = dense_gradients(problem, gradient, input, weight, dense)
            grad_input = dense_input if dense[0] else grad_input
            grad_weight = dense_weight if dense[1] else grad_weight

        if grad_input is not None and pruning.prunes_input and (pruning.where == "everywhere" or self.may_pay(problem, grad_output)):
            sigma, tau = _threshold(grad_input, pruning, sigma_history)
            _prune_at(grad_input, key, tau, None, grad_input)
        implementation = "+".join(name for name, ran in ((self.name, any(sparse)), (dense_by, any(dense))) if ran)
        return BackwardResult(grad_input, grad_weight, tau, sigma, density, implementation)


_dense = DenseBackend()
_UNPRUNED = Pruning(percentile=None)


class AdaptiveCpuBackend(CpuBackend):
    """The sparse kernels where they pay, dense ones on the pruned gradient where not: PyTorch's, or those of
    :mod:`.depthwise`.

    The choice depends on the problem, the dtype, the layout and the density of this very gradient, and on the kind of
    CPU, see :mod:`.break_even`; never on time measured during the run, so that it can be repeated bit for bit.
    """

    @staticmethod
    @until_choices_change
    def why_not_faster(problem: ConvProblem, dtype: torch.dtype, channels_last: bool, pruning: Pruning) -> str | None:
        # PyTorch's own dense convolutions are slower there, or wrong.
        if goes_through_float32(problem, dtype) or depthwise.takes(problem, dtype, channels_last, (True, True)):
            return None
        highest = max(break_even(problem, dtype, channels_last))
        if highest == 0:
            return why_dense(problem, dtype)
        if highest < pruning.lowest_density:
            return (
                f"the sparse kernels for this class of convolutions ({classify(problem)}) are faster up to a density of "
                f"{highest:.2f} here, and {pruning.asked} hardly ever leaves so little"
            )
        return why_not_worth_it(problem, pruning.active)

    def break_even(self, problem: ConvProblem, dtype: torch.dtype, channels_last: bool) -> tuple[float, float]:
        return break_even(problem, dtype, channels_last)

    def may_pay(self, problem: ConvProblem, grad: Tensor) -> bool:
        return any(break_even(problem, grad.dtype, grad.is_contiguous(memory_format=torch.channels_last)))

    def sparse_pays(
        self, problem: ConvProblem, grad: Tensor, pruning: Pruning, wanted: Sequence[bool], layer_id: int = 0
    ) -> tuple[bool, bool]:
        limits = break_even(problem, grad.dtype, grad.is_contiguous(memory_format=torch.channels_last))
        asked = [limit for limit, want in zip(limits, wanted) if want]
        # A sample is read only where it decides: of a gradient that is not in cache that takes longer than all else here.
        if not any(asked):
            at, pays = "", (False, False)
        elif pruning.highest_density <= min(asked):
            at, pays = f" at density {pruning.highest_density:.3f} or less", (True, True)
        else:
            density = _expected_density(grad, pruning)
            at, pays = f" at density {density:.3f}", (density <= limits[0], density <= limits[1])
        if logger.isEnabledFor(logging.DEBUG):
            ran = (f"{name} {'sparse' if pay else 'dense'}" for name, pay, want in zip(("AGB", "WGC"), pays, wanted) if want)
            why = f" (break-even {', '.join(f'{limit:.2f}' for limit in asked)})"
            if not any(limits):
                why = f": {why_dense(problem, grad.dtype)}"
            logger.debug("%s, %s in %s%s: %s%s", name_of(layer_id), problem, grad.dtype, at, ", ".join(ran), why)
        return pays

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        sparse, _ = self.sparse_pays(problem, grad_output, _UNPRUNED, (True, False))
        if not sparse and depthwise.is_faster(problem, grad_output, (True, False)):
            return depthwise.gradients(problem, grad_output, None, weight, (True, False))[0]
        chosen = super() if sparse else _dense
        return chosen.conv2d_input(problem, weight, grad_output)

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        _, sparse = self.sparse_pays(problem, grad_output, _UNPRUNED, (False, True))
        if not sparse and depthwise.is_faster(problem, grad_output, (False, True)):
            return depthwise.gradients(problem, grad_output, input, None, (False, True))[1]
        chosen = super() if sparse else _dense
        return chosen.conv2d_weight(problem, input, grad_output)


# The sample that density is estimated from, as csrc/cpu/prune.cpp has it.
_RUNS = 127
_RUN_LENGTH = 32


def _expected_density(grad: Tensor, pruning: Pruning) -> float:
    """Density of ``grad``, pruned if ``pruning`` says so, from runs of elements spread evenly over its memory: that of
    the whole gradient at its threshold is as that of the sample at its own."""
    if not (pruning.prunes_output and pruning.active):
        return _raw.expected_density(grad, 0.0)
    if not pruning.needs_counts:
        return _raw.expected_density(grad, pruning.sigma_coefficient * float(pruning.quantile))
    if pruning.density is not None:
        return min(pruning.density, _raw.expected_density(grad, 0.0))
    if grad.numel() > _RUNS * _RUN_LENGTH:
        grad = grad.as_strided((_RUNS, _RUN_LENGTH), (grad.numel() // _RUNS, 1)).contiguous()
    found = histogram.Histogram(_counts(grad))
    if not math.isfinite(found.mean):
        return 1.0  # nothing will be pruned
    return found.density(found.tau_for_variance(pruning.variance).clamp(min=1e-45)).item()
