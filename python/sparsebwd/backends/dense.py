# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own dense convolutions on the pruned gradient, where no sparse kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from .base import Backend, empty


class DenseBackend(Backend):
    name = "dense"

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{dtype} is not float32, bfloat16 or float16"
        return None

    # PyTorch reads only the shape and the strides of the operand whose gradient it computes. The strides help to choose
    # the layout that it computes in: with those of an expanded tensor it converts the other operands.

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input = empty(problem.input_size, grad_output, reference.memory_format(grad_output))
        return convolution_backward(problem, grad_output, input, weight, (True, False))[0]

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight = empty(problem.weight_size, input, reference.memory_format(input))
        return convolution_backward(problem, grad_output, input, weight, (False, True))[1]


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
