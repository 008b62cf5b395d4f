# SPDX-License-Identifier: Apache-2.0
"""MobileNet v1 (Howard et al. 2017)."""

from __future__ import annotations

from torch import Tensor, nn

# (output channels in units of the width, stride) of each depthwise-separable block
_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1))


class MobileNet(nn.Module):
    """On 32x32 images ("cifar"), the first layer has stride 1, so that the last maps are 2x2 and averaged; on 224x224
    ("imagenet") it has stride 2, and they are 7x7.

    Args:
        num_classes: number of logits.
        width: channels of the first layer: 32 times the width multiplier.
        form: "cifar" or "imagenet".
    """

    def __init__(self, num_classes: int, width: int = 32, form: str = "cifar") -> None:
        super().__init__()
        layers = [_conv(3, width, 3, stride=2 if form == "imagenet" else 1)]
        channels = width
        for multiple, stride in _BLOCKS:
            out_channels = multiple * width
            layers += [_conv(channels, channels, 3, stride, groups=channels), _conv(channels, out_channels, 1)]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
