# SPDX-License-Identifier: Apache-2.0
"""What is timed, what it is compared with, and whether its result is right."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsebwd import ops, reference, settings
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded

from .inputs import KEY, LAYOUTS, Gradient, Inputs, Operands, key_on, pruned_at
from .results import COPY
from .suites import Layer

TORCH = "torch"
"""In place of a backend's name: plain PyTorch operations."""

_UNFOLDED = {"cpu": 2**23, "cuda": 2**26}
"""Elements of the unfolded input that the reference makes at once, in float64."""


class Errors(NamedTuple):
    """Of a result and of dense PyTorch's, against float64: norm of the difference / norm. Where there are two results,
    the larger of each. dense is None where there is nothing dense to compare with."""

    result: float
    dense: float | None = None


@dataclass(frozen=True)
class Case:
    """One row to be: an operation on a layer.

    pattern, density: of the gradient, see `inputs.Gradient`.
    percentile: at which the operation prunes, or at which what it consumes was pruned before; None: nothing is.
    """

    layer: Layer
    dtype: torch.dtype
    layout: str
    backend: str
    pattern: str
    density: float | None = None
    percentile: float | None = None

    @cached_property
    def settings(self) -> settings.Pruning:
        return settings.Pruning(self.percentile, self.layer.placement)

    @cached_property
    def pruned(self) -> str:
        """The settings as operators take them, for the backend to be timed; made before the time counts."""
        return self.settings.replace(backend=self.backend).text

    @cached_property
    def unpruned(self) -> str:
        return self.settings.replace(percentile=None, backend=self.backend).text

    def gradient(self, operation: Operation) -> Gradient:
        """What `operation` starts from."""
        return Gradient(self.pattern, self.density, self.layer.captured, None if operation.prunes else self.percentile)


class Operation(ABC):
    """name: as on the command line. description: for its help.

    prunes: whether it starts from a dense gradient and a percentile; else from zeros and a density.
    used: the operands whose values it reads.
    against: "dense", PyTorch's dense convolutions, or "copy".
    backend: None where the choice is the user's. devices: those on which there is such a thing.
    """

    name: str
    description: str
    prunes = False
    used: tuple[str, ...] = ("grad_output",)
    against = "dense"
    backend: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def applies(self, layer: Layer) -> bool:
        """Whether training computes it for this layer."""
        return True

    def baselines(self, case: Case) -> dict[str, str]:
        """The layouts in which the baseline is timed, by the name of each; the fastest counts."""
        return {COPY: case.layout} if self.against == COPY else {layout: layout for layout in LAYOUTS}

    @abstractmethod
    def candidate(self, case: Case, operands: Operands) -> object:
        """What is timed."""

    @abstractmethod
    def baseline(self, case: Case, operands: Operands) -> object:
        """What it is compared with."""

    @abstractmethod
    def check(self, case: Case, inputs: Inputs) -> Errors | None:
        """The error of what `candidate` computes; None if there is nothing to compare with but rules. Raises
        AssertionError if it is wrong."""

    def density(self, case: Case, inputs: Inputs) -> float:
        """That of the gradient which is consumed or, by pruning, made."""
        if not self.prunes or case.layer.placement == "input":
            return inputs.memo("density", lambda: inputs.density(case.layout))
        gradient = inputs.first(case.layout).grad_output
        return reference.density(inputs.pruned(case.layout, _threshold(case, gradient))).item()

    @abstractmethod
    def flops(self, layer: Layer, density: float) -> int:
        """Useful floating-point operations: those with zeros of the gradient are not counted."""

    @abstractmethod
    def elements(self, layer: Layer) -> int:
        """Tensor elements that have to be read or written at least."""


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
        return 3 * _numel(layer.problem.output_size)  # read for the threshold, read again, written


class Prune(Pruning):
    description = "sigma, threshold and stochastic pruning of a dense gradient, against copying it"

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The key is there, as in a backward pass."""
        return _prune(case, operands.grad_output)

    def check(self, case: Case, inputs: Inputs) -> Errors:
        operands = inputs.first(case.layout)
        values, tau, *_ = self.candidate(case, operands)
        _check_pruned(case, operands.grad_output, values, tau, inputs.pruned(case.layout, tau))
        return Errors(0.0)


class PrunePredicted(Pruning):
    name = "prune-predicted"
    description = "the same with the threshold predicted from earlier gradients, so that one pass is enough"

    def candidate(self, case: Case, operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _prune(case, operands.grad_output, _history(case, operands.grad_output.device))

    def check(self, case: Case, inputs: Inputs) -> Errors:
        operands = inputs.first(case.layout)
        history = _history(case, operands.grad_output.device).zero_()
        self.candidate(case, operands)
        before = history.clone()
        values, tau, *_ = self.candidate(case, operands)
        _check_pruned(case, operands.grad_output, values, tau, inputs.pruned(case.layout, tau), before)
        return Errors(0.0)

    def elements(self, layer: Layer) -> int:
        return 2 * _numel(layer.problem.output_size)


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
            *_geometry(problem),
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
        _check_pruned(case, operands.grad_output, pruned, tau, inputs.pruned(case.layout, tau))
        if nonzeros != torch.count_nonzero(pruned).item():
            raise AssertionError(f"lists: {nonzeros} non-zeros instead of {torch.count_nonzero(pruned).item()}")
        return Errors(0.0)


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
            *_geometry(case.layer.problem),
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
        touched = _numel(problem.input_size) + _numel(problem.weight_size)
        return _numel(problem.output_size) + touched * (grad_input + grad_weight)


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
            values, tau, *_ = _prune(case, gradient, None if before is None else before.clone())
            return values, tau

        if case.layer.placement == "output":
            pruned, tau = prune(operands.grad_output)
            _check_pruned(case, operands.grad_output, pruned, tau, inputs.pruned(case.layout, tau), before)
            operands = operands._replace(grad_output=pruned)
        elif self.outputs(case.layer)[0]:
            unpruned, _ = self.results(replace(case, percentile=None), operands)
            pruned, tau = prune(unpruned)
            _check_pruned(case, unpruned, pruned, tau, pruned_at(unpruned, tau), before)
            assert_bit_equal(grad_input, pruned, "pruned gradient of the input")
            grad_input = unpruned
        return operands, grad_input, grad_weight


class BackwardPredicted(Backward):
    name = "backward-predicted"
    description = "the same with the threshold predicted from earlier gradients"

    def history(self, case: Case, device: torch.device) -> Tensor | None:
        return _history(case, device)


ALL: tuple[Operation, ...] = (
    Prune(), PruneWithTorch(), PrunePredicted(), PruneAndList(), Agb(), Wgc(), Both(), Backward(),
    BackwardPredicted(),
)  # fmt: skip

NAMES = tuple(dict.fromkeys(operation.name for operation in ALL))


def named(name: str) -> list[Operation]:
    """The operations of that name. Raises ValueError if there is none."""
    found = [operation for operation in ALL if operation.name == name]
    if not found:
        raise ValueError(f"op: got {name!r}; accepted: {', '.join(NAMES)}")
    return found


def _geometry(problem: ConvProblem) -> tuple:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def _numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


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


def _prune(
    case: Case, gradient: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key = key_on(gradient.device)
    return torch.ops.sparsebwd.prune(gradient, key, case.pruned, history)


# Calls with the gradients of a layer after which a backend that is free to choose knows what to choose by.
_UNDECIDED = 2

_layer_ids = itertools.count(1)


@lru_cache(maxsize=8)
def _layer_id(operation: Operation, case: Case) -> int:
    """One that nothing else has: what a backend remembers of a layer is that of this row."""
    return -next(_layer_ids)


@lru_cache(maxsize=8)
def _history(case: Case, device: torch.device) -> Tensor:
    """That of the layer, as :func:`sparsebwd.reference.predict` takes it."""
    return torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=device)


def _threshold(case: Case, gradient: Tensor, history: Tensor | None = None) -> Tensor:
    abs_sum = gradient.abs().sum(dtype=torch.float64)
    return reference.threshold(abs_sum, gradient.numel(), case.settings, gradient.dtype, history)[1]


def _check_pruned(
    case: Case, gradient: Tensor, pruned: Tensor, tau: Tensor, expected: Tensor, history: Tensor | None = None
) -> None:
    """Raise AssertionError unless tau is that of the reference up to the order of its sum, and the pruned gradient is
    `expected` to the bit: that of the reference at tau. history: as it was before, where tau was predicted from it."""
    exact = _threshold(case, gradient, history).item()
    if abs(tau.item() - exact) > torch.finfo(gradient.dtype).eps * exact:
        raise AssertionError(f"tau: {tau.item()!r} instead of {exact!r}")
    assert_bit_equal(pruned, expected, "pruned gradient")
