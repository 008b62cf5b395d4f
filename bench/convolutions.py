# SPDX-License-Identifier: Apache-2.0
"""The convolutions of a model, as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def following(model: nn.Module, ran: Callable[[Convolution, Tensor], None]) -> Iterator[None]:
    """Call `ran` with each convolution and its output, in the order of the forward pass."""

    def hook(name: str) -> Callable:
        def follow(module: nn.Conv2d, args: tuple, output: Tensor) -> None:
            problem = ConvProblem.from_sizes(
                args[0].shape, module.weight.shape, module.stride, module.padding, module.dilation, module.groups
            )
            ran(Convolution(name, problem, args[0].requires_grad), output)

        return follow

    handles = [
        module.register_forward_hook(hook(name))
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
        output.register_hook(lambda gradient: arrived(convolution, gradient))

    with following(model, watch):
        yield
