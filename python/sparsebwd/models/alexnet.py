# SPDX-License-Identifier: Apache-2.0
"""AlexNet (Krizhevsky et al. 2012), in one tower (Krizhevsky 2014): Conv-ReLU blocks without batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """On 224x224 images ("imagenet"), the first convolutions are 11x11 with stride 4 and 5x5, all pooling is 3x3 with
    stride 2, and FC-1 is 9216x4096, FC-2 4096x4096. The maps are 55-27, 27-13, 13-6.

    On 32x32 ("cifar"), the first two convolutions are 3x3 with padding 2 and stride 1, FC-1 is 4096x2048 and FC-2
    2048x2048. The paper names no pooling sizes. 2x2 with stride 2 gives the maps 34-17, 19-9, 9-4 and with them the
    256 * 4 * 4 = 4096 inputs of FC-1 that it does name.

    Args:
        num_classes: number of logits.
        width: channels of the first layer; all other layers in proportion.
        form: "cifar" or "imagenet".
    """

    def __init__(self, num_classes: int, width: int = 64, form: str = "cifar") -> None:
        super().__init__()
        large = form == "imagenet"
        pooling, last_maps, hidden = (3, 6, 64 * width) if large else (2, 4, 32 * width)
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 11, 4, padding=2) if large else nn.Conv2d(3, width, 3, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(pooling, 2),
            nn.Conv2d(width, 3 * width, 5 if large else 3, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(pooling, 2),
            nn.Conv2d(3 * width, 6 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6 * width, 4 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(pooling, 2),
        )
        # The identity on images of the size above; others are pooled to fit the classifier.
        self.pool = nn.AdaptiveAvgPool2d(last_maps)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(4 * width * last_maps**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))
