# SPDX-License-Identifier: Apache-2.0
"""The oracle as a backend: convolutions in float64, rounded once to the dtype of the operands."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from .base import Backend


class ReferenceBackend(Backend):
    name = "reference"

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        if not dtype.is_floating_point:
            return f"{dtype} is not a floating dtype"
        return None

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        return reference.conv2d_input(problem, weight, grad_output).to(grad_output.dtype)

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        return reference.conv2d_weight(problem, input, grad_output).to(grad_output.dtype)
