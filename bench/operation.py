# SPDX-License-Identifier: Apache-2.0
"""An operation that is timed, what it starts from, and what those of the benchmark share: checks against the reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsebwd import reference, settings
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal

from .inputs import LAYOUTS, Gradient, Inputs, Operands, key_on
from .results import COPY
from .suites import Layer

TORCH = "torch"
"""In place of a backend's name: plain PyTorch operations."""

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
        return reference.density(inputs.pruned(case.layout, threshold(case, gradient))).item()

    @abstractmethod
    def flops(self, layer: Layer, density: float) -> int:
        """Useful floating-point operations: those with zeros of the gradient are not counted."""

    @abstractmethod
    def elements(self, layer: Layer) -> int:
        """Tensor elements that have to be read or written at least."""


def geometry(problem: ConvProblem) -> tuple:
    return problem.stride, problem.padding, problem.dilation, problem.groups


def numel(size: tuple[int, ...]) -> int:
    return torch.Size(size).numel()


def pruned_by(
    case: Case, gradient: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient as the case prunes it, tau, sigma and density."""
    key = key_on(gradient.device)
    return torch.ops.sparsebwd.prune(gradient, key, case.pruned, history)


@lru_cache(maxsize=8)
def history_of(case: Case, device: torch.device) -> Tensor:
    """That of the layer, as :func:`sparsebwd.reference.predict` takes it."""
    return torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=device)


def threshold(case: Case, gradient: Tensor, history: Tensor | None = None) -> Tensor:
    abs_sum = gradient.abs().sum(dtype=torch.float64)
    return reference.threshold(abs_sum, gradient.numel(), case.settings, gradient.dtype, history)[1]


def check_pruned(
    case: Case, gradient: Tensor, pruned: Tensor, tau: Tensor, expected: Tensor, history: Tensor | None = None
) -> None:
    """Raise AssertionError unless tau is that of the reference up to the order of its sum, and the pruned gradient is
    `expected` to the bit: that of the reference at tau. history: as it was before, where tau was predicted from it."""
    exact = threshold(case, gradient, history).item()
    if abs(tau.item() - exact) > torch.finfo(gradient.dtype).eps * exact:
        raise AssertionError(f"tau: {tau.item()!r} instead of {exact!r}")
    assert_bit_equal(pruned, expected, "pruned gradient")
