# SPDX-License-Identifier: Apache-2.0
"""The layers that are measured: those of the networks in :mod:`sparsebwd.models`, read off the networks themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from sparsebwd import models
from sparsebwd.problem import ConvProblem

IMAGE_SIZE = 32

_NAME = re.compile(r"(?P<model>\w+)-cifar(?:-(?P<r>\d+)x(?P<s>\d+))?")


@dataclass(frozen=True)
class Layer:
    """A convolution to be measured.

    suite, name: where it comes from; name is that of the first module with this problem.
    multiplicity: how many modules of the network have this problem.
    needs_grad_input: False for the first layer of a network, whose AGB no training step computes.
    """

    suite: str
    name: str
    problem: ConvProblem
    multiplicity: int = 1
    needs_grad_input: bool = True


def names() -> tuple[str, ...]:
    """Names of the suites of whole networks; each may be followed by a kernel size such as ``-1x1``."""
    return tuple(f"{model}-cifar" for model in models.names())


def load(name: str, batch: int) -> list[Layer]:
    """The distinct convolutions of a network at 32x32 pixels, in the order of the forward pass.

    Args:
        name: one of `names()`; with a kernel size behind it, as in ``resnet50-cifar-1x1``, only those of this size.
        batch: number of images.

    Raises:
        ValueError: no such suite, or one without layers.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["model"] not in models.names():
        raise ValueError(
            f"suite: got {name!r}; accepted: {', '.join(names())}; each also with a kernel size, as resnet50-cifar-1x1"
        )
    distinct: dict[tuple[ConvProblem, bool], Layer] = {}
    for layer in _convolutions(match["model"], batch):
        problem = layer.problem
        if match["r"] and (problem.r, problem.s) != (int(match["r"]), int(match["s"])):
            continue
        key = (problem, layer.needs_grad_input)
        first = distinct.setdefault(key, replace(layer, suite=name, multiplicity=0))
        distinct[key] = replace(first, multiplicity=first.multiplicity + 1)
    if not distinct:
        raise ValueError(f"suite: got {name!r}; {match['model']} has no convolution of this kernel size")
    return list(distinct.values())


def _convolutions(model_name: str, batch: int) -> list[Layer]:
    """Every convolution of the network, in the order of the forward pass. Nothing is computed: tensors are meta."""
    found: list[Layer] = []

    def hook(name: str):
        def record(module: nn.Conv2d, args: tuple, output: torch.Tensor) -> None:
            problem = ConvProblem.from_sizes(
                args[0].shape, module.weight.shape, module.stride, module.padding, module.dilation, module.groups
            )
            found.append(Layer("", name, problem, needs_grad_input=args[0].requires_grad))

        return record

    with torch.device("meta"), torch.enable_grad():
        model = models.create(model_name, num_classes=10)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(hook(name))
        model(torch.empty(batch, 3, IMAGE_SIZE, IMAGE_SIZE))
    return found
