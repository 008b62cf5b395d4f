# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt-T (Liu et al. 2022): depthwise 7x7 convolutions, layer normalisation, linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import head

_STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))
_LAYER_SCALE = 1e-6


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.layers = nn.Sequential(
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), _LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * self.layers(self.depthwise(x).permute(0, 2, 3, 1))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        layers, channels = [], 3
        for index, (out_channels, depth) in enumerate(_STAGES):
            if index:
                layers += [_ChannelNorm(channels, eps=1e-6), nn.Conv2d(channels, out_channels, 2, 2)]
            else:
                layers += [nn.Conv2d(channels, out_channels, 4, 4), _ChannelNorm(out_channels, eps=1e-6)]
            channels = out_channels
            layers += [Block(channels) for _ in range(depth)]
        super().__init__(*layers, head(channels, num_classes))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
