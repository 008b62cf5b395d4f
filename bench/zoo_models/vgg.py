# SPDX-License-Identifier: Apache-2.0
"""VGG-16 with batch normalisation (Simonyan and Zisserman 2015)."""

from __future__ import annotations

from torch import nn

from .blocks import conv_bn, head

# channels and layers of each stage, max-pooling behind it
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Sequential):
    """Without its two hidden fully connected layers, which have nothing to do with convolutions."""

    def __init__(self, num_classes: int) -> None:
        layers, channels = [], 3
        for out_channels, depth in _STAGES:
            for _ in range(depth):
                layers.append(conv_bn(channels, out_channels, 3))
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, head(channels, num_classes))
