# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits that come with scikit-learn: 1797 grey images of 8x8, no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from .dataset import DataError, ImageData

# The digits come in runs of 0 to 9: a step without a common factor with 10 takes all classes alike.
_TEST_STEP = 7


def load_digits(image_size: int) -> ImageData:
    """Every seventh image is a test image (257), the others are for training (1540)."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"digits needs scikit-learn ({error}): pip install scikit-learn") from error
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).double().unsqueeze(1) * (255 / 16)
    grey = functional.interpolate(grey, size=(image_size, image_size), mode="bilinear")
    images = grey.round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % _TEST_STEP == 0
    return ImageData(
        name="digits",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        classes=tuple(str(digit) for digit in range(10)),
        mirror=False,
    )
