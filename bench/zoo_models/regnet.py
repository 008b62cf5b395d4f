# SPDX-License-Identifier: Apache-2.0
"""RegNetX-400MF (Radosavovic et al. 2020): residual blocks around grouped 3x3 convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import conv_bn, head

_STAGES, _GROUP_WIDTH = ((32, 1), (64, 2), (160, 7), (400, 12)), 16


class Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_bn(in_channels, channels, 1),
            conv_bn(channels, channels, 3, stride, groups=channels // _GROUP_WIDTH),
            conv_bn(channels, channels, 1, activation=None),
        )
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, channels, 1, stride, activation=None)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.layers(x))


class RegNet(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        layers, channels = [conv_bn(3, 32, 3, 2)], 32
        for out_channels, depth in _STAGES:
            for index in range(depth):
                layers.append(Block(channels, out_channels, 2 if index == 0 else 1))
                channels = out_channels
        super().__init__(*layers, head(channels, num_classes))
