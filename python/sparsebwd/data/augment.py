# SPDX-License-Identifier: Apache-2.0
"""Random crops. The random numbers are drawn for a whole batch, whoever makes which part of it."""

from __future__ import annotations

import math

import numpy as np

CROPS = ("padded", "resized")

_PADDING = 4
_AREA = (0.08, 1.0)  # share of the image
_RATIO = (3 / 4, 4 / 3)  # width to height
_TRIES = 10


def draw_padded(draws: np.random.Generator, count: int) -> np.ndarray:
    """Offsets of `count` crops out of the padded image: int64 [count, 2], top and left."""
    return draws.integers(0, 2 * _PADDING + 1, (count, 2))


def draw_resized(draws: np.random.Generator, count: int) -> np.ndarray:
    """What `resized_box` needs for `count` images: float64 [count, tries, 4], uniform in [0, 1)."""
    return draws.random((count, _TRIES, 4))


def padded_crops(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Crops of the same size out of `images`, uint8 [N, H, W, 3], with 4 black pixels on each side."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    crops = np.empty_like(images)
    for crop, source, (top, left) in zip(crops, padded, offsets, strict=True):
        crop[:] = source[top : top + height, left : left + width]
    return crops


def mirror(images: np.ndarray, chosen: np.ndarray) -> None:
    """Mirrors those of `images`, uint8 [N, H, W, 3], that are `chosen`, bool [N], in place."""
    images[chosen] = images[chosen][:, :, ::-1]


def resized_box(width: int, height: int, uniform: np.ndarray) -> tuple[int, int, int, int]:
    """A part of 8 to 100 % of the image's area, 3:4 to 4:3 in shape, to be scaled to the size wanted.

    The random resized crop of Szegedy et al. (2015) as torchvision draws it: the first of ten tries that fits, else as
    much of the middle as the shape allows.

    Args:
        width, height: of the image, in pixels.
        uniform: float64 [tries, 4], in [0, 1).

    Returns:
        left, top, right, bottom, in pixels.
    """
    low, high = map(math.log, _RATIO)
    for area, ratio, top, left in uniform:
        area = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        ratio = math.exp(low + (high - low) * ratio)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            x, y = int(left * (width - across + 1)), int(top * (height - down + 1))
            return x, y, x + across, y + down
    across, down = width, height
    if width / height < _RATIO[0]:
        down = round(width / _RATIO[0])
    elif width / height > _RATIO[1]:
        across = round(height * _RATIO[1])
    x, y = (width - across) // 2, (height - down) // 2
    return x, y, x + across, y + down
