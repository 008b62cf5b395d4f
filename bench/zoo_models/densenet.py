# SPDX-License-Identifier: Apache-2.0
"""DenseNet-121 (Huang et al. 2017): normalisation and rectifier stand in front of each convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import conv_bn, head

_STAGES, _GROWTH, _BOTTLENECK = (6, 12, 24, 16), 32, 128


def _bn_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
    )


class DenseLayer(nn.Module):
    """Adds channels made of all that there are so far."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_bn_conv(in_channels, _BOTTLENECK, 1), _bn_conv(_BOTTLENECK, _GROWTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class DenseNet(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        layers, channels = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)], 64
        for index, depth in enumerate(_STAGES):
            if index:
                layers.append(nn.Sequential(_bn_conv(channels, channels // 2, 1), nn.AvgPool2d(2)))
                channels //= 2
            for _ in range(depth):
                layers.append(DenseLayer(channels))
                channels += _GROWTH
        super().__init__(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), head(channels, num_classes))
