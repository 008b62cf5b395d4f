# SPDX-License-Identifier: Apache-2.0
"""The convolutions of a model, as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from sparsebwd.problem import ConvProblem


@dataclass(frozen=True)
class Convolution:
    """A convolution in one forward pass. needs_grad_input: whether the backward pass computes AGB."""

    name: str
    problem: ConvProblem
    needs_grad_input: bool


def _problem(module: nn.Conv2d, size: Sequence[int]) -> ConvProblem:
    """What it computes of an input of this size, (N, C, H, W) or (C, H, W)."""
    *batch, c, h, w = size
    left, right, above, below = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros":  # "same" may pad by more below and to the right
        h, w, padding = h + below - above, w + right - left, (above, left)
    else:
        h, w, padding = h + above + below, w + left + right, (0, 0)
    size = (*(batch or (1,)), c, h, w)
    return ConvProblem.from_sizes(size, module.weight.shape, module.stride, padding, module.dilation, module.groups)


@contextmanager
def following(model: nn.Module, ran: Callable[[Convolution, Tensor], None]) -> Iterator[None]:
    """Call `ran` with each convolution and its output, in the order of the forward pass."""

    def hook(name: str) -> Callable:
        def follow(module: nn.Conv2d, args: tuple, named: dict, output: Tensor) -> None:
            input = args[0] if args else named["input"]
            ran(Convolution(name, _problem(module, input.shape), input.requires_grad), output)

        return follow

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching(model: nn.Module, arrived: Callable[[Convolution, Tensor], None]) -> Iterator[None]:
    """Call `arrived` with each convolution and the gradient of its output, as it arrives there and before it is pruned,
    just before the convolution's backward pass. The forward pass has to be within, too."""

    def watch(convolution: Convolution, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: arrived(convolution, gradient))

    with following(model, watch):
        yield
