# SPDX-License-Identifier: Apache-2.0
"""The networks of Ye et al. (2019), each in two forms: for 32x32 images ("cifar") and for 224x224 ("imagenet").

Every model maps float images [N, 3, H, W] to logits [N, num_classes]. They are plain PyTorch modules with dense
convolutions: `sparsebwd.convert` makes the backward pass of their convolutions sparse. The two forms of a network have
the same modules under the same names; they differ in what brings images down to the size of the first maps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..arguments import as_int, check_choice
from .alexnet import AlexNet
from .mobilenet import MobileNet
from .resnet import BasicBlock, Bottleneck, ResNet

__all__ = ["IMAGE_SIZE", "AlexNet", "MobileNet", "ResNet", "create", "names"]

IMAGE_SIZE = {"cifar": 32, "imagenet": 224}
"""The forms, and the height and width of the images that each is made for; others work. The paper crops ImageNet to
227x227, this package to the usual 224x224."""

_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "alexnet": AlexNet,
    "mobilenet": MobileNet,
}


def names() -> tuple[str, ...]:
    """The names that `create` accepts."""
    return tuple(_BUILDERS)


def create(name: str, num_classes: int, form: str = "cifar", width: int | None = None) -> nn.Module:
    """A freshly initialised model. Weights are drawn from PyTorch's default generator.

    Args:
        name: one of `names()`.
        num_classes: number of logits, at least 1.
        form: "cifar" or "imagenet".
        width: channels of the first layer; all other layers are as much wider or narrower. None: as published, 64, and 32 for
            MobileNet, whose width multiplier is `width` / 32.

    Raises:
        TypeError: a name or form that is no string, `num_classes` or `width` that is no integer.
        ValueError: unknown `name` or `form`, or `num_classes` or `width` below 1.

    Examples:
        >>> from sparsebwd import models
        >>> model = models.create("resnet18", num_classes=10, width=16)
        >>> sum(parameter.numel() for parameter in model.parameters())
        701466
    """
    check_choice("name", name, names())
    num_classes = as_int(num_classes, "num_classes", least=1)
    check_choice("form", form, tuple(IMAGE_SIZE))
    if width is None:
        return _BUILDERS[name](num_classes, form=form)
    return _BUILDERS[name](num_classes, form=form, width=as_int(width, "width", least=1))
