# SPDX-License-Identifier: Apache-2.0
"""All that is timed: the backward convolutions, here, against dense ones, and pruning, of :mod:`.pruning`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from sparsebwd import ops, reference
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded

from .inputs import Inputs, Operands, key_on, pruned_at
from .operation import Case, Errors, Operation, check_pruned, geometry, history_of, numel, pruned_by
from .pruning import Prune, PruneAndList, PruneInLaunches, PrunePredicted, PruneWithTorch
from .suites import Layer

_UNFOLDED = {"cpu": 2**23, "cuda": 2**26}
"""Elements of the unfolded input that the reference makes at once, in float64."""


class Convolution(Operation):
    """AGB, WGC, or both: the outputs in `wanted`, of grad_input and grad_weight."""

    wanted: tuple[bool, bool]

    def outputs(self, layer: Layer) -> tuple[bool, bool]:
        """Those of `wanted` that training computes."""
        return self.wanted[0] and layer.needs_grad_input, self.wanted[1]

    def applies(self, layer: Layer) -> bool:
        return any(self.outputs(layer))

    def baseline(self, case: Case, operands: Operands) -> tuple[Tensor | None, ...]:
        return convolution_backward(
            case.layer.problem,
            operands.grad_output,
            operands.input,
            operands.weight,
            self.outputs(case.layer),
        )

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
        """As the backward pass of a layer: grad_input, grad_weight and nothing, those that are not wanted empty."""
        device = operands.grad_output.device
        return ops.conv2d_backward_directly(
            *operands,
            *geometry(case.layer.problem),
            key_on(device),
            case.pruned if self.prunes else case.unpruned,
            _layer_id(self, case),
            (*self.outputs(case.layer), False),
            self.history(case, device),
        )

    def history(self, case: Case, device: torch.device) -> Tensor | None:
        """What the threshold is predicted from, if it is."""
        return None

    def results(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor]:
        """(grad_input, grad_weight) as they are timed."""
        if case.backend == "auto":
            for _ in range(_UNDECIDED):
                self.candidate(case, operands)
        return self.candidate(case, operands)[:2]

    def checked(self, case: Case, inputs: Inputs) -> tuple[Operands, Tensor, Tensor]:
        """The operands as both convolutions get them, and (grad_input, grad_weight) as they return them."""
        operands = inputs.first(case.layout)
        return operands, *self.results(case, operands)

    def check(self, case: Case, inputs: Inputs) -> Errors:
        """Every element is compared, some images at a time: the unfolded input of all would take gigabytes."""
        problem, wanted = case.layer.problem, self.outputs(case.layer)
        operands, grad_input, grad_weight = self.checked(case, inputs)
        dense = self.baseline(case, operands)
        errors = []
        if wanted[0]:
            sums = torch.zeros(3, dtype=torch.float64)
            for part, images in _images(problem, inputs.device):
                expected = reference.conv2d_input(part, operands.weight, operands.grad_output[images])
                assert_error_bounded(grad_input[images], expected, dense[0][images], "grad_input")
                sums += _squares(grad_input[images], dense[0][images], expected)
            errors.append(sums)
        if wanted[1]:

            def compute() -> Tensor:
                parts = (
                    reference.conv2d_weight(part, operands.input[images], operands.grad_output[images])
                    for part, images in _images(problem, inputs.device)
                )
                return sum(parts)

            # It does not depend on the number of threads, nor, where nothing is pruned, on anything but the inputs.
            setting = (self.name, case.layout, case.backend, case.percentile) if self.prunes else None
            expected = inputs.memo(("grad_weight", setting), compute)
            assert_error_bounded(grad_weight, expected, dense[1], "grad_weight")
            errors.append(_squares(grad_weight, dense[1], expected))
        return Errors(*(max(math.sqrt(sums[i] / sums[2]) if sums[i] else 0.0 for sums in errors) for i in range(2)))

    def flops(self, layer: Layer, density: float) -> int:
        return round(2 * layer.problem.macs * density) * sum(self.outputs(layer))

    def elements(self, layer: Layer) -> int:
        problem, (grad_input, grad_weight) = layer.problem, self.outputs(layer)
        # AGB reads the weight and writes a gradient of the input's size; WGC the other way round.
        touched = numel(problem.input_size) + numel(problem.weight_size)
        return numel(problem.output_size) + touched * (grad_input + grad_weight)


class Agb(Convolution):
    name = "agb"
    description = "gradient of the input from a gradient with zeros, list building included, against dense"
    wanted = (True, False)
    used = ("grad_output", "weight")


class Wgc(Convolution):
    name = "wgc"
    description = "gradient of the weight from a gradient with zeros, list building included, against dense"
    wanted = (False, True)
    used = ("grad_output", "input")


class Both(Convolution):
    name = "agb+wgc"
    description = "both from a gradient with zeros, which are looked for once, against dense AGB and WGC"
    wanted = (True, True)
    used = ("grad_output", "input", "weight")


class Backward(Convolution):
    name = "backward"
    description = "pruning a dense gradient, AGB and WGC, against dense AGB and WGC"
    prunes = True
    wanted = (True, True)
    used = ("grad_output", "input", "weight")

    def checked(self, case: Case, inputs: Inputs) -> tuple[Operands, Tensor, Tensor]:
        operands = inputs.first(case.layout)
        before = self.history(case, operands.grad_output.device)
        if before is not None:
            before.zero_()
            self.candidate(case, operands)
            # From now on this gradient's sigma is predicted whenever it comes.
            before = before.clone()
        grad_input, grad_weight = self.results(case, operands)

        def prune(gradient: Tensor) -> tuple[Tensor, Tensor]:
            values, tau, *_ = pruned_by(case, gradient, None if before is None else before.clone())
            return values, tau

        if case.layer.placement == "output":
            pruned, tau = prune(operands.grad_output)
            check_pruned(case, operands.grad_output, pruned, tau, inputs.pruned(case.layout, tau), before)
            operands = operands._replace(grad_output=pruned)
        elif self.outputs(case.layer)[0]:
            unpruned, _ = self.results(replace(case, percentile=None), operands)
            pruned, tau = prune(unpruned)
            check_pruned(case, unpruned, pruned, tau, pruned_at(unpruned, tau), before)
            assert_bit_equal(grad_input, pruned, "pruned gradient of the input")
            grad_input = unpruned
        return operands, grad_input, grad_weight


class BackwardPredicted(Backward):
    name = "backward-predicted"
    description = "the same with the threshold predicted from earlier gradients"

    def history(self, case: Case, device: torch.device) -> Tensor | None:
        return history_of(case, device)


ALL: tuple[Operation, ...] = (
    Prune(), PruneWithTorch(), PrunePredicted(), PruneInLaunches(), PruneAndList(), Agb(), Wgc(), Both(), Backward(),
    BackwardPredicted(),
)  # fmt: skip

NAMES = tuple(dict.fromkeys(operation.name for operation in ALL))


def named(name: str) -> list[Operation]:
    """The operations of that name. Raises ValueError if there is none."""
    found = [operation for operation in ALL if operation.name == name]
    if not found:
        raise ValueError(f"op: got {name!r}; accepted: {', '.join(NAMES)}")
    return found


def _images(problem: ConvProblem, device: str) -> Iterator[tuple[ConvProblem, slice]]:
    """The batch in parts small enough for the reference: the problem of each part, and where it is."""
    unfolded = problem.c * problem.r * problem.s * problem.p * problem.q
    size = max(1, _UNFOLDED[device] // unfolded)
    for first in range(0, problem.n, size):
        last = min(first + size, problem.n)
        yield replace(problem, n=last - first), slice(first, last)


def _squares(result: Tensor, dense: Tensor, expected: Tensor) -> Tensor:
    """Sums of squares: of the errors of `result` and of `dense`, and of what is expected."""
    return torch.stack([(t - expected).square().sum() for t in (result, dense)] + [expected.square().sum()]).cpu()


# Calls with the gradients of a layer after which a backend that is free to choose knows what to choose by.
_UNDECIDED = 2

_layer_ids = itertools.count(1)


@lru_cache(maxsize=8)
def _layer_id(operation: Operation, case: Case) -> int:
    """One that nothing else has: what a backend remembers of a layer is that of this row."""
    return -next(_layer_ids)
