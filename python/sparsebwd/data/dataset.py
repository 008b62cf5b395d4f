# SPDX-License-Identifier: Apache-2.0
"""What every data set is once it has been read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arguments import as_int
from .notes import Notes

if TYPE_CHECKING:
    from .streaming import ImageFiles

# Enough images for three digits of the mean; a data set on disk is not read as a whole for it.
_STATISTICS_IMAGES = 50_000
# Enough for two digits, where each has to be decoded.
_STATISTICS_FILES = 2048
_CHUNK = 1024
_FINGERPRINT_IMAGES = 256


class DataError(ValueError):
    """A data file is missing, truncated or corrupt. The message names it."""


@dataclass(frozen=True)
class ImageData:
    """Images as uint8 [N, H, W, 3] and labels as int64 [N], split into a training and a test set.

    The arrays may be memory-mapped files, or made from image files as they are used.

    mirror: whether a mirrored image still shows its class.
    crop: which random crops suit training, see `Batches`.
    notes: what the user should be told.
    """

    name: str
    train_images: np.ndarray | ImageFiles
    train_labels: np.ndarray
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    classes: tuple[str, ...]
    mirror: bool = True
    crop: str = "padded"
    notes: Notes = field(default_factory=Notes)

    def subset(self, train: int | None = None, test: int | None = None) -> ImageData:
        """The same data with `train` training and `test` test images, spread evenly over the whole; None keeps all.

        Raises:
            TypeError, ValueError: a number that is no integer from 1.
        """
        train, test = (
            None if count is None else as_int(count, name, least=1) for name, count in (("train", train), ("test", test))
        )
        train_images, train_labels = _spread(self.train_images, self.train_labels, train)
        test_images, test_labels = _spread(self.test_images, self.test_labels, test)
        return replace(
            self,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
        )

    @property
    def description(self) -> dict[str, Any]:
        """Name, numbers of images and classes, and image size in pixels."""
        return {
            "name": self.name,
            "train_images": len(self.train_images),
            "test_images": len(self.test_images),
            "classes": len(self.classes),
            "image_size": self.train_images.shape[1],
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all labels, the classes and some of the images: tells one data set from another.

        Of images that stay in files it is that of all names, for which no file is read: one that can no longer be read
        leaves the data set what it is.
        """
        digest = hashlib.blake2b(repr((self.description, self.classes)).encode(), digest_size=16)
        for images, labels in ((self.train_images, self.train_labels), (self.test_images, self.test_labels)):
            digest.update(labels.tobytes())
            if isinstance(images, np.ndarray):
                images, _ = _spread(images, labels, _FINGERPRINT_IMAGES)
                digest.update(np.ascontiguousarray(images, np.uint8).tobytes())
            else:
                digest.update(images.names.tobytes())
        return digest.hexdigest()

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel of the training images: float32 [3], on the scale 0 to 255."""
        enough = _STATISTICS_IMAGES if isinstance(self.train_images, np.ndarray) else _STATISTICS_FILES
        step = -(-len(self.train_images) // enough)
        count, total, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
        for start in range(0, len(self.train_images), _CHUNK * step):
            images = np.asarray(self.train_images[start : start + _CHUNK * step : step])
            pixels = images.reshape(-1, 3).astype(np.int64)
            count += len(pixels)
            total += pixels.sum(axis=0)
            squares += (pixels * pixels).sum(axis=0)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean * mean, 1.0))
        return mean.astype(np.float32), deviation.astype(np.float32)


def _spread(
    images: np.ndarray | ImageFiles, labels: np.ndarray, count: int | None
) -> tuple[np.ndarray | ImageFiles, np.ndarray]:
    if count is None or count >= len(images):
        return images, labels
    chosen = np.arange(count) * len(images) // count
    return images[chosen], labels[chosen]
