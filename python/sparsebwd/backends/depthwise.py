# SPDX-License-Identifier: Apache-2.0
"""Dense kernels of our own for depthwise convolutions: csrc/cpu/depthwise.cpp behind
``torch.ops.sparsebwd_cpu.depthwise_backward``. They skip no zeros; "auto" takes them where PyTorch's are slower."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from . import dense
from .base import empty, logger, until_choices_change

_raw = torch.ops.sparsebwd_cpu


def is_faster(problem: ConvProblem, grad_output: Tensor, output_mask: tuple[bool, bool]) -> bool:
    """Whether these kernels are faster than PyTorch's for the gradients that the mask names, those of the input and of
    the weight. It depends on the geometry, the dtype, the layout and the kind of CPU, see docs/performance.md."""
    if problem.groups == 1 or grad_output.device.type != "cpu":
        return False
    channels_last = grad_output.is_contiguous(memory_format=torch.channels_last)
    faster = takes(problem, grad_output.dtype, channels_last, tuple(output_mask))
    if faster:
        logger.debug("%s in %s: the depthwise kernels are faster", problem, grad_output.dtype)
    return faster


# Of 3x3 filters in channels_last.
_FEWEST_MACS, _FEWEST_PIXELS = 2**22, 64


@until_choices_change
def takes(problem: ConvProblem, dtype: torch.dtype, channels_last: bool, output_mask: tuple[bool, bool]) -> bool:
    """:func:`is_faster`, for gradients of that dtype and layout on a CPU."""
    # What was not measured stays PyTorch's.
    filters = problem.r == problem.s and problem.r in (3, 5, 7) and max(*problem.stride, *problem.dilation) <= 2
    if not (problem.groups == problem.c == problem.k and problem.c >= 16 and problem.n and filters):
        return False
    if dtype not in (torch.float32, torch.bfloat16) or (dtype == torch.bfloat16 and dense.is_native(dtype)):
        return False
    isa = _raw.isa()
    if isa not in ("avx2", "avx512") or refusal(problem):
        return False
    large = problem.r > 3
    if channels_last:
        # Of 3x3 filters, PyTorch's are as fast with strides, on small maps and for one of the gradients; and what a layer costs
        # beside its computation is more than is gained with little of that. Measured on a Zen 3 (AVX2) and a Zen 4 (AVX-512).
        worth_it = problem.macs >= _FEWEST_MACS and problem.p * problem.q >= _FEWEST_PIXELS
        faster = large or output_mask[0] and problem.stride == (1, 1) and worth_it
        return output_mask[1] and faster
    return output_mask[0] or large


def refusal(problem: ConvProblem) -> str | None:
    """Why the kernels do not take the problem, None if they do."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    return _raw.depthwise_refusal(problem.input_size, problem.weight_size, *geometry) or None


def gradients(
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input (N, C, H, W) and of the weight (C, 1, R, S), None where the mask says False. All in
    float32 or all in bfloat16; contiguous or channels_last. The first reads no input, the second no weight."""
    grad_input = grad_weight = None
    if output_mask[0]:
        layout = reference.memory_format(grad_output if input is None else input)
        grad_input = empty(problem.input_size, grad_output, layout)
    if output_mask[1]:
        grad_weight = empty(problem.weight_size, grad_output, torch.contiguous_format)
    _raw.depthwise_backward(
        grad_output,
        input if output_mask[1] else None,
        weight if output_mask[0] else None,
        problem.input_size,
        problem.weight_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        grad_input,
        grad_weight,
    )
    return grad_input, grad_weight
