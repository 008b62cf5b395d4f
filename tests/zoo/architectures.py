# SPDX-License-Identifier: Apache-2.0
"""The networks, and how small they may be. All have random weights; nothing is downloaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsebwd import register_conv
from sparsebwd.bench import zoo_models
from sparsebwd.bench.zoo_models import libraries

CLASSES = 10


@dataclass(frozen=True)
class Architecture:
    """source: "own" or a library. image_size: height and width of its images, in pixels. options: of its constructor."""

    source: str
    name: str
    image_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.source}-{self.name}"

    def build(self) -> nn.Module:
        """On the CPU, in training mode, without dropout: its masks are others in float64.

        Raises RuntimeError if the library is not installed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries
            model = self._build()
        for module in model.modules():
            if "drop" in type(module).__name__.lower() or type(module).__name__ == "StochasticDepth":
                for rate in ("p", "drop_prob"):
                    if hasattr(module, rate):
                        setattr(module, rate, 0.0)
        return model.train()

    def _build(self) -> nn.Module:
        if self.source == "own":
            return zoo_models.get(self.name, "own").build(num_classes=CLASSES)
        library = libraries.load(self.source)
        if self.source == "torchvision":
            return library.get_model(self.name, weights=None, num_classes=CLASSES, **self.options)
        if self.source == "timm":
            for name in REGISTERED:
                register_conv(getattr(library.layers, name))
            return library.create_model(self.name, pretrained=False, num_classes=CLASSES, **self.options)
        return library.get_model(self.name, pretrained=False, num_classes=CLASSES, **self.options)

    def images(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(2, 3, self.image_size, self.image_size, generator=generator)


REGISTERED = ("ScaledStdConv2d", "ScaledStdConv2dSame", "StdConv2d", "StdConv2dSame", "Conv2dSame")
"""The subclasses of nn.Conv2d of timm.layers that :func:`sparsebwd.register_conv` is told of."""

OWN = tuple(
    Architecture("own", name, size)
    for name, size in (
        ("mobilenet_v2", 48),
        ("mobilenet_v3_large", 48),
        ("efficientnet_b0", 48),
        ("regnet_x_400mf", 48),
        ("unet", 32),
    )
)


def _of(source: str, text: str, **options: dict[str, Any]) -> Iterator[Architecture]:
    """From "name name:image_size"."""
    for word in text.split():
        name, _, size = word.partition(":")
        yield Architecture(source, name, int(size or 64), options.get(name, {}))


# Small ones, as each is copied and trained several times.
ARCHITECTURES = (
    *OWN,
    *_of("own", "resnet18:32 densenet121"),
    *_of(
        "torchvision",
        "squeezenet1_1 resnet18 densenet121 googlenet mobilenet_v2 mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 "
        "regnet_y_400mf lraspp_mobilenet_v3_large",
        googlenet={"init_weights": False},  # which takes a minute
        lraspp_mobilenet_v3_large={"weights_backbone": None},
    ),
    *_of(
        "timm",
        "resnet10t nf_regnet_b0 test_nfnet tf_efficientnet_lite0 tf_mobilenetv3_small_minimal_100 "
        "mixnet_s ghostnet_050 lcnet_050 fbnetc_100 mobilenetv4_conv_small repvgg_a0 mobileone_s0 rexnet_100 regnetx_002 "
        "dla46_c ese_vovnet19b_dw hgnetv2_b0 convnextv2_atto inception_next_atto edgenext_xx_small efficientvit_b0 "
        "starnet_s1 test_byobnet",
    ),
    *_of(
        "pytorchcv",
        "resnet20_cifar10:32 preresnet20_cifar10:32 seresnet20_cifar10:32 densenet40_k12_cifar10:32 nin_cifar10:32 "
        "diaresnet20_cifar10:32 peleenet:224 shufflenet_g1_wd4:224",
    ),
)
