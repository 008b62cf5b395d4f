# SPDX-License-Identifier: Apache-2.0
"""The networks of ``python -m sparsebwd.bench zoo``: plain PyTorch, in the form that users have them in.

Each maps float images [N, 3, H, W] to logits [N, classes], the U-Net to [N, classes, H, W]. Small forms: the convolutions
are those of the papers, what follows them is one linear layer on the averages of the last maps. Those of
:mod:`sparsebwd.models` are taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from sparsebwd import models

from . import libraries
from .convnext import ConvNeXt
from .densenet import DenseNet
from .inverted import efficientnet_b0, mobilenet_v2, mobilenet_v3_large
from .regnet import RegNet
from .unet import UNet
from .vgg import VGG16

SOURCES = ("own", "torchvision", "timm")

_Builder = Callable[..., nn.Module]


@dataclass(frozen=True)
class Model:
    """A network as it is measured.

    image_size: height and width of the images, in pixels. batch: images a step.
    build: makes it for a number of classes, named `num_classes`, with random weights.
    """

    name: str
    image_size: int
    batch: int
    build: _Builder


def _ours(name: str, form: str) -> _Builder:
    return partial(models.create, name, form=form)


_OWN = (
    Model("resnet18", 32, 64, _ours("resnet18", "cifar")),
    Model("resnet50", 160, 8, _ours("resnet50", "imagenet")),
    Model("vgg16_bn", 64, 16, VGG16),
    Model("alexnet", 32, 64, _ours("alexnet", "cifar")),
    Model("mobilenet_v1", 32, 64, _ours("mobilenet", "cifar")),
    Model("mobilenet_v2", 160, 16, mobilenet_v2),
    Model("mobilenet_v3_large", 160, 16, mobilenet_v3_large),
    Model("efficientnet_b0", 128, 8, efficientnet_b0),
    Model("densenet121", 96, 8, DenseNet),
    Model("convnext_tiny", 96, 8, ConvNeXt),
    Model("regnet_x_400mf", 128, 16, RegNet),
    Model("unet", 64, 8, UNet),
)

# Those of the libraries are for images of 224x224.
_LARGE = {"resnet18": (128, 16), "alexnet": (128, 32), "mobilenet_v1": (128, 16)}

_TIMM = {
    "mobilenet_v1": "mobilenetv1_100",
    "mobilenet_v2": "mobilenetv2_100",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "regnet_x_400mf": "regnetx_004",
}
_MISSING = {"torchvision": ("mobilenet_v1", "unet"), "timm": ("alexnet", "unet")}


def names(source: str) -> tuple[str, ...]:
    """The networks that a source has. Raises ValueError for one that is unknown."""
    if source not in SOURCES:
        raise ValueError(f"source: got {source!r}; accepted: {', '.join(SOURCES)}")
    return tuple(model.name for model in _OWN if model.name not in _MISSING.get(source, ()))


def get(name: str, source: str) -> Model:
    """One of `names(source)`.

    Raises:
        ValueError: unknown name or source.
        RuntimeError: the library is not installed.
    """
    if name not in names(source):
        raise ValueError(f"models: got {name!r}; accepted: {', '.join(names(source))}")
    own = next(model for model in _OWN if model.name == name)
    if source == "own":
        return own
    library = libraries.load(source)
    if source == "torchvision":
        build = partial(library.get_model, name, weights=None)
    else:
        build = partial(library.create_model, _TIMM.get(name, name), pretrained=False)
    return Model(name, *_LARGE.get(name, (own.image_size, own.batch)), build)


def select(wanted: Sequence[str] | None, source: str) -> list[Model]:
    """Those that are wanted, in their order; all if it is None. Raises as `get`."""
    return [get(name, source) for name in dict.fromkeys(names(source) if wanted is None else wanted)]
