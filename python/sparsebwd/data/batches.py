# SPDX-License-Identifier: Apache-2.0
"""Batches whose content is a function of (seed, epoch, index), so that a run can be resumed at any of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_PADDING = 4
_ORDER, _AUGMENTATION = 0, 1  # keep the two random streams apart


class Batches:
    """Shuffled training batches, augmented by a random crop out of 4 pixels of padding and a random mirror image.

    The order of an epoch comes from (seed, epoch), the augmentation of a batch from (seed, epoch, index); nothing
    depends on what was drawn before. The last images of an epoch that do not fill a batch are left out; another
    epoch's order takes them in. Over `world_size` processes a batch is the same as in one, each taking its share.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int64 [N].
        batch_size: images per batch, over all processes.
        seed: any integer from 0.
        augment: whether to augment; mirror images only with `mirror`.
        rank, world_size: which share of each batch to produce.

    Raises:
        ValueError: a `batch_size` that the images do not fill, or that does not divide over the processes.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        augment: bool = True,
        mirror: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size: got {batch_size}, accepted are 1 to {len(images)}, the training images")
        if batch_size % world_size:
            raise ValueError(f"batch_size: got {batch_size}, accepted are multiples of {world_size}, the processes")
        self._images, self._labels = images, labels
        self._batch_size, self._seed = batch_size, seed
        self._augment, self._mirror = augment, mirror
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._images) // self._batch_size

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Images as uint8 [share, H, W, 3] and labels as int64 [share] of batch `index` of `epoch`, both from 0."""
        start = index * self._batch_size
        chosen = self._epoch_order(epoch)[start : start + self._batch_size][self._share]
        images = self._images[chosen]
        if self._augment:
            draws = np.random.default_rng([_AUGMENTATION, self._seed, epoch, index])
            offsets = draws.integers(0, 2 * _PADDING + 1, (self._batch_size, 2))[self._share]
            mirrored = draws.random(self._batch_size)[self._share] < 0.5
            images = _crop(images, offsets, mirrored & self._mirror)
        return torch.from_numpy(images), torch.from_numpy(self._labels[chosen])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            draws = np.random.default_rng([_ORDER, self._seed, epoch])
            self._order = (epoch, draws.permutation(len(self._images)))
        return self._order[1]


class Normalize:
    """Turns uint8 [N, H, W, 3] into float32 [N, 3, H, W] of mean 0 and deviation 1, on a device, in a memory format."""

    def __init__(
        self, mean: np.ndarray, deviation: np.ndarray, device: torch.device | str = "cpu", channels_last: bool = True
    ) -> None:
        self._mean = torch.from_numpy(mean).to(device)
        self._scale = (1 / torch.from_numpy(deviation)).to(device)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        pixels = (images.to(self._mean.device).float() - self._mean) * self._scale
        return pixels.permute(0, 3, 1, 2).contiguous(memory_format=self._format)


def ordered_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order and unchanged, the last batch perhaps smaller; over processes, every n-th batch."""
    for start in range(rank * batch_size, len(images), world_size * batch_size):
        part = slice(start, start + batch_size)
        # A copy, because a memory-mapped array is read-only and a tensor must not be.
        yield torch.from_numpy(np.array(images[part])), torch.from_numpy(labels[part])


def _crop(images: np.ndarray, offsets: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)))
    crops = np.empty_like(images)
    for crop, source, (top, left), mirror in zip(crops, padded, offsets, mirrored, strict=True):
        window = source[top : top + height, left : left + width]
        crop[:] = window[:, ::-1] if mirror else window
    return crops
