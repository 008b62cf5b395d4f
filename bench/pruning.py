# SPDX-License-Identifier: Apache-2.0
"""Pruning a gradient, timed against copying it."""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from torch import Tensor

from sparsebwd import reference
from sparsebwd.backends import cuda

from .inputs import KEY, Inputs, Operands
from .operation import TORCH, Case, Errors, Operation, check_pruned, geometry, history_of, numel, pruned_by
from .results import COPY
from .suites import Layer


class Pruning(Operation):
    """From a dense gradient to a pruned one; against copying it."""

    name = "prune"
    prunes = True
    against = COPY

    def applies(self, layer: Layer) -> bool:
        return layer.placement == "output"

    def baseline(self, case: Case, operands: Operands) -> Tensor:
        return torch.empty_like(operands.grad_output).copy_(operands.grad_output)

    def flops(self, layer: Layer, density: float) -> int:
        return 0

    def elements(self, layer: Layer) -> int:
        return 3 * numel(layer.problem.output_size)  # read for the threshold, read again, written


class Prune(Pruning):
    description = "sigma, threshold and stochastic pruning of a dense gradient, against copying it"

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The key is there, as in a backward pass."""
        return pruned_by(case, operands.grad_output)

    def check(self, case: Case, inputs: Inputs) -> Errors:
        operands = inputs.first(case.layout)
        values, tau, *_ = self.candidate(case, operands)
        check_pruned(case, operands.grad_output, values, tau, inputs.pruned(case.layout, tau))
        return Errors(0.0)


class PrunePredicted(Pruning):
    name = "prune-predicted"
    description = "the same with the threshold predicted from earlier gradients, so that one pass is enough"

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return pruned_by(case, operands.grad_output, history_of(case, operands.grad_output.device))

    def check(self, case: Case, inputs: Inputs) -> Errors:
        operands = inputs.first(case.layout)
        history = history_of(case, operands.grad_output.device).zero_()
        self.candidate(case, operands)
        before = history.clone()
        values, tau, *_ = self.candidate(case, operands)
        check_pruned(case, operands.grad_output, values, tau, inputs.pruned(case.layout, tau), before)
        return Errors(0.0)

    def elements(self, layer: Layer) -> int:
        return 2 * numel(layer.problem.output_size)


class PruneInLaunches(Prune):
    name = "prune-launches"
    description = "as prune, in several launches, as it is beside the communication of other processes (device cuda only)"
    devices = ("cuda",)

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with patch.dict(os.environ, {cuda.LAUNCHES: "several"}):
            return super().candidate(case, operands)


class PruneWithTorch(Pruning):
    description = "the same as plain PyTorch operations, as a row of backend 'torch'"
    backend = TORCH

    def candidate(self, case: Case, operands: Operands) -> Tensor:
        gradient = operands.grad_output
        magnitude = gradient.abs()
        sigma = case.settings.sigma_coefficient * magnitude.mean()
        tau = sigma * case.settings.quantile
        kept = torch.where(magnitude > tau * torch.rand_like(gradient), torch.copysign(tau, gradient), 0.0)
        return torch.where(magnitude < tau, kept, gradient)

    def check(self, case: Case, inputs: Inputs) -> None:
        operands = inputs.first(case.layout)
        pruned, gradient = self.candidate(case, operands), operands.grad_output
        changed = pruned[pruned != gradient].abs()
        kept = changed[changed != 0]
        if len(kept) and not (kept.min() == kept.max() and (gradient[pruned == 0].abs() < kept[0]).all()):
            raise AssertionError("pruned gradient: elements other than 0, the threshold and those of the gradient")


class PruneAndList(Pruning):
    name = "prune+lists"
    description = "as prune, and the lists of non-zeros that AGB and WGC read, in one pass (backend cpu only)"
    backend = "cpu"
    devices = ("cpu",)

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, float, int]:
        """The pruned gradient, tau and the number of non-zeros. The lists stay inside."""
        problem = case.layer.problem
        gradient = operands.grad_output.contiguous(memory_format=torch.channels_last)
        abs_sum, _ = torch.ops.sparsebwd_cpu.abs_sum(gradient)
        _, tau = reference.threshold(abs_sum, gradient.numel(), case.settings, gradient.dtype)
        pruned = torch.empty_like(gradient)
        nonzeros = torch.ops.sparsebwd_cpu.conv2d_backward(
            gradient,
            None,
            None,
            problem.input_size,
            problem.weight_size,
            *geometry(problem),
            KEY,
            tau,
            pruned,
            None,
            None,
            lists_only=True,
        )
        return pruned, tau, nonzeros

    def check(self, case: Case, inputs: Inputs) -> Errors:
        """The lists themselves are checked where AGB and WGC are."""
        operands = inputs.first(case.layout)
        pruned, tau, nonzeros = self.candidate(case, operands)
        tau = torch.tensor(tau)
        check_pruned(case, operands.grad_output, pruned, tau, inputs.pruned(case.layout, tau))
        if nonzeros != torch.count_nonzero(pruned).item():
            raise AssertionError(f"lists: {nonzeros} non-zeros instead of {torch.count_nonzero(pruned).item()}")
        return Errors(0.0)
