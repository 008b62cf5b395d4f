# SPDX-License-Identifier: Apache-2.0
"""The tensors that are measured on, each in more copies than the last-level cache holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsebwd.problem import ConvProblem
from sparsebwd.testing import random_tensor

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

TAIL = 1.5
"""Standard deviation of the logarithm of the factor that gives heavy-tailed gradients their tail. The density after
pruning at percentile 90 is then 0.31; that of ResNet-18 in training is about 0.30."""

_OPERANDS = ("grad_output", "input", "weight")


class Operands(NamedTuple):
    """What a backward pass works on: (N, K, P, Q), (N, C, H, W) and (K, C/groups, R, S)."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Rotation:
    """How many copies there are of an operand: as many as take `nbytes` bytes, at least two."""

    nbytes: int

    def copies(self, nbytes: int) -> int:
        """Number of copies of a tensor of `nbytes` bytes."""
        return max(2, math.ceil(self.nbytes / nbytes))


class Inputs:
    """Random operands of one problem, made when they are first asked for.

    Args:
        problem: the convolution.
        dtype: of all tensors.
        density: the fraction of ``grad_output`` that is not zero, zeros being independent ("iid"); None for a dense
            gradient with a heavy tail ("heavy-tailed"): normal times log-normal.
        rotation: how many copies.
        seed: of the random numbers.
    """

    def __init__(
        self, problem: ConvProblem, dtype: torch.dtype, density: float | None, rotation: Rotation, seed: int = 0
    ) -> None:
        self.problem = problem
        self._dtype = dtype
        self._density = density
        self._rotation = rotation
        self._generator = torch.Generator().manual_seed(seed)
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._memo: dict[object, object] = {}

    def first(self, layout: str) -> Operands:
        """The first copy of each operand."""
        return Operands(*(self._all(name, layout)[0] for name in _OPERANDS))

    def rotating(self, layout: str, used: tuple[str, ...]) -> Callable[[], Operands]:
        """A function that returns the next copy of each operand in `used`, and the first one of the others."""
        cycles = [itertools.cycle(self._all(name, layout)[: None if name in used else 1]) for name in _OPERANDS]
        return lambda: Operands(*(next(cycle) for cycle in cycles))

    def memo(self, key: object, compute: Callable[[], object]) -> object:
        """What `compute` returned when it was first called for `key`."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def _all(self, name: str, layout: str) -> tuple[Tensor, ...]:
        if (name, layout) not in self._copies:
            made = next((copies for (made, _), copies in self._copies.items() if made == name), None)
            copies = self._make(name) if made is None else made
            self._copies[name, layout] = copies.contiguous(memory_format=LAYOUTS[layout])
        return self._copies[name, layout].split(self._size(name)[0])

    def _size(self, name: str) -> tuple[int, int, int, int]:
        sizes = Operands(self.problem.output_size, self.problem.input_size, self.problem.weight_size)
        return getattr(sizes, name)

    def _make(self, name: str) -> Tensor:
        """All copies in one tensor. Those of a gradient differ, so that branch predictors cannot learn the zeros."""
        size = self._size(name)
        copies = self._rotation.copies(math.prod(size) * self._dtype.itemsize)
        if name != "grad_output":
            return random_tensor(size, generator=self._generator, dtype=self._dtype).repeat(copies, 1, 1, 1)
        size = (copies * size[0], *size[1:])
        if self._density is not None:
            return random_tensor(size, generator=self._generator, dtype=self._dtype, density=self._density)
        normal, logarithm = (random_tensor(size, generator=self._generator) for _ in range(2))
        return (normal * (TAIL * logarithm).exp()).to(self._dtype)
