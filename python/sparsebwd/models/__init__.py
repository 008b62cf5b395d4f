# SPDX-License-Identifier: Apache-2.0
"""The networks of Ye et al. (2019) in their CIFAR form, for 32x32 images.

Every model maps float images [N, 3, 32, 32] to logits [N, num_classes]. They are plain PyTorch modules with dense
convolutions: `sparsebwd.convert` makes the backward pass of their convolutions sparse.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .alexnet import AlexNet
from .mobilenet import MobileNet
from .resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["AlexNet", "MobileNet", "ResNet", "create", "names"]

_BUILDERS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": lambda num_classes: ResNet(BasicBlock, (2, 2, 2, 2), num_classes),
    "resnet34": lambda num_classes: ResNet(BasicBlock, (3, 4, 6, 3), num_classes),
    "resnet50": lambda num_classes: ResNet(Bottleneck, (3, 4, 6, 3), num_classes),
    "resnet101": lambda num_classes: ResNet(Bottleneck, (3, 4, 23, 3), num_classes),
    "resnet152": lambda num_classes: ResNet(Bottleneck, (3, 8, 36, 3), num_classes),
    "alexnet": AlexNet,
    "mobilenet": MobileNet,
}


def names() -> tuple[str, ...]:
    """The names that `create` accepts."""
    return tuple(_BUILDERS)


def create(name: str, num_classes: int) -> nn.Module:
    """A freshly initialised model. Weights are drawn from PyTorch's default generator.

    Args:
        name: one of `names()`.
        num_classes: number of logits, at least 1.

    Raises:
        ValueError: unknown `name`, or `num_classes` below 1.
    """
    if name not in _BUILDERS:
        raise ValueError(f"model: got {name!r}, accepted are {', '.join(_BUILDERS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes: got {num_classes}, accepted are integers from 1")
    return _BUILDERS[name](num_classes)
