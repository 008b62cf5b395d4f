# SPDX-License-Identifier: Apache-2.0
"""AlexNet (Krizhevsky et al. 2012) for 32x32 images: Conv-ReLU blocks without batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """The first two convolutions are 3x3 with padding 2 and stride 1, FC-1 is 4096x2048 and FC-2 2048x2048.

    The paper names no pooling sizes. 2x2 with stride 2 gives the maps 34-17, 19-9, 9-4 and with them the 256 * 4 * 4
    = 4096 inputs of FC-1 that it does name.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 3, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        # The identity on 32x32 images; other sizes are pooled to fit the classifier.
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(4096, 2048),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(2048, 2048),
            nn.ReLU(inplace=True),
            nn.Linear(2048, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))
