# SPDX-License-Identifier: Apache-2.0
"""U-Net (Ronneberger et al. 2015), with batch normalisation, maps that keep their size, and half its channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import conv_bn

_CHANNELS = (32, 64, 128, 256, 512)


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(in_channels, out_channels, 3), conv_bn(out_channels, out_channels, 3))


class UNet(nn.Module):
    """Logits of each pixel. Height and width are multiples of 16."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(map(_double, (3, *_CHANNELS), _CHANNELS))
        wide, narrow = _CHANNELS[:0:-1], _CHANNELS[-2::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(*channels, 2, stride=2) for channels in zip(wide, narrow))
        self.merge = nn.ModuleList(map(_double, wide, narrow))
        self.classifier = nn.Conv2d(_CHANNELS[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for index, block in enumerate(self.down):
            x = block(self.pool(x) if index else x)
            skipped.append(x)
        skipped.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skipped.pop(), up(x)], 1))
        return self.classifier(x)
