# SPDX-License-Identifier: Apache-2.0
"""The layers that are measured: those of the networks in :mod:`sparsebwd.models`, read off the networks themselves, or
those of a file of captured gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsebwd import models
from sparsebwd.problem import ConvProblem

from . import gradients
from .convolutions import Convolution, following

_NAME = re.compile(rf"(?P<model>\w+)-(?P<form>{'|'.join(models.IMAGE_SIZE)})(?:-(?P<r>\d+)x(?P<s>\d+))?")


@dataclass(frozen=True)
class Layer:
    """A convolution to be measured.

    suite, name: where it comes from, a suite or a file, None for a single problem; name is that of the first module
        with this problem, or that of the captured layer.
    multiplicity: how many modules of the network have this problem.
    needs_grad_input: False for the first layer of a network, whose AGB no training step computes.
    captured: its gradient (N, K, P, Q) in training before pruning; None: random ones are used.
    placement: what training prunes, the gradient of the "output" or that of the "input".
    """

    suite: str | None
    name: str
    problem: ConvProblem
    multiplicity: int = 1
    needs_grad_input: bool = True
    captured: Tensor | None = field(default=None, compare=False, repr=False)
    placement: str = "output"


def names() -> tuple[str, ...]:
    """Names of the suites of whole networks; each may be followed by a kernel size such as ``-1x1``."""
    return tuple(f"{model}-{form}" for form in models.IMAGE_SIZE for model in models.names())


def load(name: str, batch: int) -> list[Layer]:
    """The distinct convolutions of a network, in the order of the forward pass.

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
    for layer in _convolutions(match["model"], match["form"], batch):
        problem = layer.problem
        if match["r"] and (problem.r, problem.s) != (int(match["r"]), int(match["s"])):
            continue
        key = (problem, layer.needs_grad_input)
        first = distinct.setdefault(key, replace(layer, suite=name, multiplicity=0))
        distinct[key] = replace(first, multiplicity=first.multiplicity + 1)
    if not distinct:
        raise ValueError(f"suite: got {name!r}; {match['model']} has no convolution of this kernel size")
    return list(distinct.values())


def captured(path: Path) -> list[Layer]:
    """The layers of a file of captured gradients; names end in "@step" if the file has several steps of training.

    Raises:
        ValueError: no such file, another kind of file, or one without gradients.
    """
    file = gradients.load(path)
    if not file.gradients:
        raise ValueError(f"gradients: {path} holds none")
    several = len({found.step for found in file.gradients}) > 1
    return [
        Layer(
            path.name,
            f"{found.layer}@{found.step}" if several else found.layer,
            found.problem,
            needs_grad_input=found.needs_grad_input,
            captured=found.grad_output,
            placement="input" if file.placement == "input" else "output",
        )
        for found in file.gradients
    ]


def select(layers: Sequence[Layer], names: Sequence[str]) -> list[Layer]:
    """Those of `layers` that have one of these names. Raises ValueError for a name that none has."""
    for name in names:
        if not any(layer.name == name for layer in layers):
            accepted = ", ".join(dict.fromkeys(layer.name for layer in layers))
            raise ValueError(f"layer: got {name!r}; accepted: {accepted}")
    return [layer for layer in layers if layer.name in names]


@cache
def _convolutions(model_name: str, form: str, batch: int) -> tuple[Layer, ...]:
    """Every convolution of the network, in the order of the forward pass. Nothing is computed: tensors are meta."""
    found: list[Layer] = []

    def ran(convolution: Convolution, output: Tensor) -> None:
        found.append(Layer("", convolution.name, convolution.problem, needs_grad_input=convolution.needs_grad_input))

    with torch.device("meta"), torch.enable_grad():
        model = models.create(model_name, num_classes=10, form=form)
        with following(model, ran):
            model(torch.empty(batch, 3, models.IMAGE_SIZE[form], models.IMAGE_SIZE[form]))
    return tuple(found)
