# SPDX-License-Identifier: Apache-2.0
"""Batches whose content is a function of (seed, epoch, index), so that a run can be resumed at any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_int, check_choice, check_flag
from .augment import CROPS, draw_padded, draw_resized, mirror, padded_crops, resized_box
from .streaming import Ahead, ImageFiles, load_ahead

_ORDER, _AUGMENTATION = 0, 1  # keep the two random streams apart

_Made = tuple[Tensor, Tensor, dict[str, str]]
"""Images, labels, and the files that could not be read, with the reasons."""


class Batches:
    """Shuffled training batches, augmented by a random crop and a random mirror image.

    The order of an epoch comes from (seed, epoch), the augmentation of a batch from (seed, epoch, index); nothing
    depends on what was drawn before, nor on the number of workers. The last images of an epoch that do not fill a batch
    are left out; another epoch's order takes them in. Over `world_size` processes a batch is the same as in one, each
    taking its share.

    Args:
        images: uint8 [N, H, W, 3]: an array, or files that are decoded as they are needed.
        labels: int64 [N].
        batch_size: images per batch, over all processes.
        seed: any integer from 0.
        augment: whether to augment; mirror images only with `mirror`.
        crop: "padded", out of 4 pixels of padding, or "resized", a part of random size and shape.
        rank, world_size: which share of each batch to produce.
        workers: processes that decode files ahead of their use; arrays need none.

    Raises:
        TypeError: an argument of another type.
        ValueError: a `batch_size` that the images do not fill, or that does not divide over the processes; an unknown
            `crop`, or a number out of range.
    """

    def __init__(
        self,
        images: np.ndarray | ImageFiles,
        labels: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        augment: bool = True,
        mirror: bool = True,
        crop: str = "padded",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ) -> None:
        batch_size, world_size = as_int(batch_size, "batch_size"), as_int(world_size, "world_size", least=1)
        rank = as_int(rank, "rank", least=0, most=world_size - 1)
        seed, workers = as_int(seed, "seed", least=0, most=2**64 - 1), as_int(workers, "workers", least=0)
        augment, mirror = check_flag(augment, "augment"), check_flag(mirror, "mirror")
        check_choice("crop", crop, CROPS)
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch_size: got {batch_size}, accepted are 1 to {len(images)}, the training images")
        if batch_size % world_size:
            raise ValueError(f"batch_size: got {batch_size}, accepted are multiples of {world_size}, the processes")
        share = batch_size // world_size
        self._images = images
        self._count = len(images) // batch_size
        make = _Source(
            images, labels, batch_size, seed, crop if augment else None, mirror, slice(rank * share, (rank + 1) * share)
        )
        self._ahead = Ahead(make, partial(_following, self._count), workers if isinstance(images, ImageFiles) else 0)

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._count

    def batch(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Images as uint8 [share, H, W, 3] and labels as int64 [share] of batch `index` of `epoch`, both from 0.

        Raises:
            DataError: a file cannot be read, and the images are strict about that.
        """
        images, labels, corrupt = self._ahead.get((epoch, index))
        if corrupt:
            self._images.tell(corrupt)
        return images, labels

    def close(self) -> None:
        """Ends the workers; they start again where another batch is asked for."""
        self._ahead.close()


def _following(count: int, key: tuple[int, int]) -> tuple[int, int]:
    """No method of `Batches`: a cycle of references would leave it to the garbage collector to end the workers."""
    epoch, index = key
    return (epoch, index + 1) if index + 1 < count else (epoch + 1, 0)


@dataclass
class _Source:
    """Makes batches; what a worker process gets."""

    images: np.ndarray | ImageFiles
    labels: np.ndarray
    batch_size: int
    seed: int
    crop: str | None
    mirror: bool
    share: slice
    order: tuple[int, np.ndarray] | None = field(default=None, init=False)  # of the latest epoch

    def __call__(self, key: tuple[int, int]) -> _Made:
        epoch, index = key
        start = index * self.batch_size
        chosen = self._epoch_order(epoch)[start : start + self.batch_size][self.share]
        draws = np.random.default_rng([_AUGMENTATION, self.seed, epoch, index])
        if self.crop == "resized":
            uniform = draw_resized(draws, self.batch_size)[self.share]
            images, labels, corrupt = self._take(chosen, partial(_resized, uniform=uniform, size=self.images.shape[1]))
        else:
            images, labels, corrupt = self._take(chosen)
        if self.crop == "padded":
            images = padded_crops(images, draw_padded(draws, self.batch_size)[self.share])
        if self.crop and self.mirror:
            mirror(images, draws.random(self.batch_size)[self.share] < 0.5)
        return torch.from_numpy(images), torch.from_numpy(labels), corrupt

    def _take(self, chosen: np.ndarray, view=None) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        if isinstance(self.images, ImageFiles):
            return self.images.take(chosen, view)
        images = self.images[chosen]
        if view is not None:
            from PIL import Image

            images = np.stack([view(position, Image.fromarray(image)) for position, image in enumerate(images)])
        return images, self.labels[chosen], {}

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.order is None or self.order[0] != epoch:
            draws = np.random.default_rng([_ORDER, self.seed, epoch])
            self.order = (epoch, draws.permutation(len(self.images)))
        return self.order[1]


def _resized(position: int, image: Any, uniform: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    box = resized_box(*image.size, uniform[position])
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


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
    images: np.ndarray | ImageFiles,
    labels: np.ndarray,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in their order and unchanged, the last batch perhaps smaller; over processes, every n-th batch.

    Files that cannot be read are left out, or a DataError where the images are strict; `workers` processes decode.
    """
    starts = range(rank * batch_size, len(images), world_size * batch_size)
    if isinstance(images, ImageFiles):
        for batch, labels, corrupt in load_ahead(partial(_part, images, batch_size), starts, workers):
            images.tell(corrupt)
            if len(labels):
                yield batch, labels
        return
    for start in starts:
        part = slice(start, start + batch_size)
        # A copy, because a memory-mapped array is read-only and a tensor must not be.
        yield torch.from_numpy(np.array(images[part])), torch.from_numpy(labels[part])


def _part(images: ImageFiles, batch_size: int, start: int) -> _Made:
    indices = np.arange(start, min(start + batch_size, len(images)))
    batch, labels, corrupt = images.take(indices, replace=False)
    return torch.from_numpy(batch), torch.from_numpy(labels), corrupt
