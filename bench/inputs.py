# SPDX-License-Identifier: Apache-2.0
"""The tensors that are measured on, each in more copies than the last-level cache holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsebwd import reference
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TAIL = 1.5
"""Standard deviation of the logarithm of the factor that gives heavy-tailed gradients their tail. The density after
pruning at percentile 90 is then 0.31; that of ResNet-18 in training is about 0.30."""

SKEW = 1.0
"""Standard deviation, over the images and over the channels, of the log-odds that an element of a skewed gradient is
not zero."""

PATTERNS = ("iid", "skewed", "rows")
"""Of random gradients with zeros."""

KEY_SEED = 1
KEY = torch.empty(2, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(KEY_SEED))
"""Of the random numbers of pruning: what a generator with this seed draws."""

key_on = cache(KEY.to)
"""KEY on a device."""

# Elements of gradients that are drawn at once, because what they are made of takes a multiple of the memory.
_BLOCK = 2**23

_OPERANDS = ("grad_output", "input", "weight")


class Operands(NamedTuple):
    """What a backward pass works on: (N, K, P, Q), (N, C, H, W) and (K, C/groups, R, S)."""

    grad_output: Tensor
    input: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Gradient:
    """What the gradient of a row is like.

    pattern: "iid", zeros are independent; "skewed", their probability differs between images and channels, see
        `skewed_densities`; "rows", all channels of a pixel are zero or none; "heavy-tailed", without zeros, normal times log-normal; "captured", from training.
    density: the expected fraction that is not zero, where there is a choice.
    captured: (N, K, P, Q), for this pattern.
    percentile: at which the reference prunes a captured gradient before it is used; None: as it is.
    """

    pattern: str
    density: float | None = None
    captured: Tensor | None = field(default=None, compare=False, repr=False)
    percentile: float | None = None

    def copies(self, count: int, size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        """(count * N, K, P, Q), on the device of the generator. Copies of a random gradient are drawn anew, those of a
        captured one have its images in another order, by rolling the batch."""
        if self.captured is not None:
            gradient = self.captured.to(generator.device, dtype)
            if self.percentile is not None:
                key = key_on(generator.device)
                gradient = reference.prune(gradient, key, Pruning(self.percentile)).values
            return torch.cat([gradient.roll(copy, 0) for copy in range(count)])
        result = torch.empty((count * size[0], *size[1:]), dtype=dtype, device=generator.device)
        for block in result.split(max(1, _BLOCK // math.prod(size)) * size[0]):
            block.copy_(self._draw(tuple(block.shape), size[0], generator))
        return result

    def _draw(self, shape: tuple[int, ...], n: int, generator: torch.Generator) -> Tensor:
        drawn = {"generator": generator, "device": generator.device}
        normal = torch.randn(shape, **drawn)
        if self.pattern == "heavy-tailed":
            return normal * (TAIL * torch.randn(shape, **drawn)).exp()
        density = self.density
        if self.pattern == "skewed":
            density = skewed_densities(shape[0] // n, n, shape[1], density, generator).view(*shape[:2], 1, 1)
        groups = (shape[0], 1, *shape[2:]) if self.pattern == "rows" else shape
        return normal * (torch.rand(groups, **drawn) < density)


def skewed_densities(copies: int, n: int, k: int, density: float, generator: torch.Generator) -> Tensor:
    """(copies, n, k): the density of each channel of each image. The mean over each copy is `density`.

    The log-odds of an element not being zero are a + b[image] + c[channel], b and c normal with standard deviation
    SKEW, and a such that the mean is right.
    """
    if density in (0, 1):
        return torch.full((copies, n, k), float(density), device=generator.device)
    kind = {"dtype": torch.float64, "device": generator.device}
    images, channels = (
        torch.randn(size, generator=generator, **kind) for size in ((copies, n, 1), (copies, 1, k))
    )
    skew = SKEW * (images + channels)
    low, high = (torch.full((copies, 1, 1), bound, **kind) for bound in (-50.0, 50.0))
    for _ in range(50):  # bisection: the mean grows with a
        middle = (low + high) / 2
        below = (skew + middle).sigmoid().mean((1, 2), keepdim=True) < density
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (skew + high).sigmoid().float()


@dataclass(frozen=True)
class Rotation:
    """How many copies there are of an operand: as many as take `nbytes` bytes, at least two."""

    nbytes: int

    def copies(self, nbytes: int) -> int:
        """Number of copies of a tensor of `nbytes` bytes."""
        return max(2, math.ceil(self.nbytes / nbytes))


def pruned_at(gradient: Tensor, tau: Tensor) -> Tensor:
    """What the reference makes of a gradient at the threshold ``tau``, with KEY, some images at a time."""
    images = max(1, _BLOCK // max(1, gradient[0].numel()))
    parts = [
        reference.prune_at(part, key_on(gradient.device), tau, first=number * images)
        for number, part in enumerate(gradient.split(images))
    ]
    return torch.cat(parts).contiguous(memory_format=reference.memory_format(gradient))


class Inputs:
    """Operands of one problem, made when they are first asked for.

    Args:
        problem: the convolution.
        dtype: of all tensors.
        gradient: what ``grad_output`` is like. Input and weight are normal.
        rotation: how many copies.
        seed: of the random numbers.
        device: of all tensors, as PyTorch names it.
    """

    def __init__(
        self,
        problem: ConvProblem,
        dtype: torch.dtype,
        gradient: Gradient,
        rotation: Rotation,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.problem = problem
        self.device = device
        self._dtype = dtype
        self._gradient = gradient
        self._rotation = rotation
        self._generator = torch.Generator(device).manual_seed(seed)
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._memo: dict[object, object] = {}

    def with_gradient(self, gradient: Gradient) -> Inputs:
        """The same input and weight, with another ``grad_output``."""
        for layout in LAYOUTS:
            for name in _OPERANDS[1:]:
                self._all(name, layout)
        other = Inputs(self.problem, self._dtype, gradient, self._rotation, device=self.device)
        other._copies = {key: copies for key, copies in self._copies.items() if key[0] != _OPERANDS[0]}
        return other

    def first(self, layout: str) -> Operands:
        """The first copy of each operand."""
        return Operands(*(self._all(name, layout)[0] for name in _OPERANDS))

    def rotating(self, layout: str, used: tuple[str, ...], from_middle: bool = False) -> Callable[[], Operands]:
        """A function that returns the next copy of each operand in `used`, and the first one of the others.

        from_middle: begin with the copy in the middle, far from those that another function returns meanwhile.
        """

        def cycle(name: str) -> Iterator[Tensor]:
            copies = self._all(name, layout)[: None if name in used else 1]
            return itertools.islice(itertools.cycle(copies), len(copies) // 2 if from_middle else 0, None)

        cycles = [cycle(name) for name in _OPERANDS]
        return lambda: Operands(*(next(cycle) for cycle in cycles))

    def density(self, layout: str) -> float:
        """The fraction of ``grad_output`` that is not zero, over all copies."""
        copies = self._all("grad_output", layout)
        return sum(copy.count_nonzero().item() for copy in copies) / (len(copies) * copies[0].numel())

    def pruned(self, layout: str, tau: Tensor) -> Tensor:
        """What the reference makes of the first ``grad_output`` at the threshold ``tau``, with KEY. It is slow."""
        gradient = self.first(layout).grad_output
        return self.memo(("pruned", tau.item()), lambda: pruned_at(gradient, tau))

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
        if name == "grad_output":
            return self._gradient.copies(copies, size, self._dtype, self._generator)
        drawn = torch.randn(size, generator=self._generator, device=self._generator.device)
        return drawn.to(self._dtype).repeat(copies, 1, 1, 1)
