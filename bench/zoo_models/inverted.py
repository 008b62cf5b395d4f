# SPDX-License-Identifier: Apache-2.0
"""Networks of inverted residual blocks: MobileNet v2 (Sandler et al. 2018) and v3-large (Howard et al. 2019),
EfficientNet-B0 (Tan and Le 2019)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .blocks import SqueezeExcitation, conv_bn, head

_Activation = Callable[[], nn.Module]


class InvertedResidual(nn.Module):
    """1x1 to `hidden` channels, depthwise, squeeze-and-excitation if there is any, 1x1 to `out_channels`."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel: int,
        stride: int,
        activation: _Activation,
        squeeze: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        if hidden != in_channels:
            self.layers.append(conv_bn(in_channels, hidden, 1, activation=activation))
        self.layers.append(conv_bn(hidden, hidden, kernel, stride, groups=hidden, activation=activation))
        if squeeze is not None:
            self.layers.append(squeeze)
        self.layers.append(conv_bn(hidden, out_channels, 1, activation=None))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def mobilenet_v2(num_classes: int) -> nn.Sequential:
    # expansion, output channels, blocks, stride of the first
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    layers, channels = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)], 32
    for expansion, out_channels, blocks, first_stride in stages:
        for index in range(blocks):
            stride = first_stride if index == 0 else 1
            layers.append(InvertedResidual(channels, expansion * channels, out_channels, 3, stride, nn.ReLU6))
            channels = out_channels
    return nn.Sequential(*layers, conv_bn(channels, 1280, 1, activation=nn.ReLU6), head(1280, num_classes))


def mobilenet_v3_large(num_classes: int) -> nn.Sequential:
    # hidden and output channels, kernel, stride, squeeze-and-excitation, activation
    blocks = (
        (16, 16, 3, 1, False, nn.ReLU), (64, 24, 3, 2, False, nn.ReLU), (72, 24, 3, 1, False, nn.ReLU),
        (72, 40, 5, 2, True, nn.ReLU), (120, 40, 5, 1, True, nn.ReLU), (120, 40, 5, 1, True, nn.ReLU),
        (240, 80, 3, 2, False, nn.Hardswish), (200, 80, 3, 1, False, nn.Hardswish),
        (184, 80, 3, 1, False, nn.Hardswish), (184, 80, 3, 1, False, nn.Hardswish),
        (480, 112, 3, 1, True, nn.Hardswish), (672, 112, 3, 1, True, nn.Hardswish),
        (672, 160, 5, 2, True, nn.Hardswish), (960, 160, 5, 1, True, nn.Hardswish),
        (960, 160, 5, 1, True, nn.Hardswish),
    )  # fmt: skip
    layers, channels = [conv_bn(3, 16, 3, 2, activation=nn.Hardswish)], 16
    for hidden, out_channels, kernel, stride, squeezes, activation in blocks:
        # A quarter of the channels, to the next multiple of 8.
        squeeze = SqueezeExcitation(hidden, (hidden // 4 + 4) // 8 * 8, nn.ReLU, nn.Hardsigmoid) if squeezes else None
        layers.append(InvertedResidual(channels, hidden, out_channels, kernel, stride, activation, squeeze))
        channels = out_channels
    return nn.Sequential(*layers, conv_bn(channels, 960, 1, activation=nn.Hardswish), head(960, num_classes))


def efficientnet_b0(num_classes: int) -> nn.Sequential:
    # expansion, output channels, blocks, stride of the first, kernel
    stages = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    activation = partial(nn.SiLU, inplace=True)
    layers, channels = [conv_bn(3, 32, 3, 2, activation=activation)], 32
    for expansion, out_channels, blocks, first_stride, kernel in stages:
        for index in range(blocks):
            hidden, stride = expansion * channels, first_stride if index == 0 else 1
            squeeze = SqueezeExcitation(hidden, channels // 4, activation, nn.Sigmoid)
            layers.append(InvertedResidual(channels, hidden, out_channels, kernel, stride, activation, squeeze))
            channels = out_channels
    return nn.Sequential(*layers, conv_bn(channels, 1280, 1, activation=activation), head(1280, num_classes))
