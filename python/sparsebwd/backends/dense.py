# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own dense convolutions on the pruned gradient, where no sparse kernel runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from ..reference import PrunedGradient
from .base import Backend


class DenseBackend(Backend):
    name = "dense"

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{dtype} is not float32, bfloat16 or float16"
        return None

    def prune(self, grad: Tensor, key: Tensor, percentile: float, sigma_estimator: str) -> PrunedGradient:
        return reference.prune(grad, key, percentile, sigma_estimator)

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input = _unread(problem.input_size, grad_output)
        return convolution_backward(problem, grad_output, input, weight, (True, False))[0]

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight = _unread(problem.weight_size, input)
        return convolution_backward(problem, grad_output, input, weight, (False, True))[1]


def _unread(size: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of which PyTorch reads only shape and strides. These choose the layout that it computes in: were they
    those of neither, it would convert the other operands."""
    memory_format = reference.memory_format(like)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def convolution_backward(
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's gradients of the input and of the weight, None where the mask says False."""
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        weight,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        False,
        (0, 0),
        problem.groups,
        (*output_mask, False),
    )
    return grad_input, grad_weight
