# SPDX-License-Identifier: Apache-2.0
"""Images that stay in their files until a batch needs them, and worker processes that make batches ahead."""

from __future__ import annotations

import atexit
import mmap
import os
import signal
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .dataset import DataError
from .decode import ImageError, decode, fit, shown
from .listing import Listing
from .notes import Notes

View = Callable[[int, Any], Any]
"""Called with the position in a batch and the decoded RGB image; returns the image at the size wanted."""


class ImageFiles:
    """Like an array uint8 [N, size, size, 3], decoded where it is looked at.

    Indexing with a slice or an array of integers selects files; `numpy.asarray` decodes those selected. It is what
    training draws batches from, and cheap to hand to worker processes.

    Args:
        listing: the files.
        size: height and width of the decoded images, in pixels.
        border: share of each side that is cut off before scaling, so that objects are as large as in random crops.
        strict: whether an image that cannot be read is an error; else another takes its place.
        notes: is told of such images.
    """

    def __init__(
        self, listing: Listing, size: int, *, border: float = 0.0, strict: bool = False, notes: Notes | None = None
    ) -> None:
        self.notes = Notes() if notes is None else notes
        self.strict = strict
        self._folder = os.fsencode(listing.folder)
        self._names, self._labels = listing.names, listing.labels
        self._size, self._border = size, border

    def __len__(self) -> int:
        return len(self._names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self._size, self._size, 3

    @property
    def names(self) -> np.ndarray:
        """Paths below the folder, bytes [N]."""
        return self._names

    def __getitem__(self, selection: slice | np.ndarray) -> ImageFiles:
        part = object.__new__(ImageFiles)
        part.__dict__.update(self.__dict__, _names=self._names[selection], _labels=self._labels[selection])
        return part

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: got False, but images are decoded into a new array")
        with ThreadPoolExecutor(available_cores()) as pool:
            found = list(pool.map(self._replaced, range(len(self))))
        self.tell({name: reason for _, _, corrupt in found for name, reason in corrupt.items()})
        images = np.stack([image for image, _, _ in found]) if found else np.empty(self.shape, np.uint8)
        return images.astype(np.uint8 if dtype is None else dtype, copy=False)

    def tell(self, corrupt: dict[str, str]) -> None:
        """Notes which images could not be read, by path. Raises DataError if `strict`."""
        for name, reason in corrupt.items():
            if self.strict:
                raise ImageError(name, reason)
        self.notes.add_corrupt(corrupt)

    def take(
        self, indices: np.ndarray, view: View | None = None, *, replace: bool = True
    ) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
        """Decodes the images of `indices`, int64 [n].

        Args:
            view: makes the part of an image that is wanted; default: all of it but the border.
            replace: whether the next image that can be read takes the place of one that cannot; else it is left out.

        Returns:
            uint8 [n, size, size, 3], the labels int64 [n], and the images that cannot be read, with the reasons.
        """
        images, labels, corrupt = [], [], {}
        for position, index in enumerate(indices):
            if replace:
                image, label, failed = self._replaced(index, position, view)
                corrupt.update(failed)
            else:
                try:
                    image, label = self._read(index, position, view), self._labels[index]
                except ImageError as error:
                    corrupt[error.name] = error.reason
                    continue
            images.append(image)
            labels.append(label)
        stacked = np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)
        return stacked, np.array(labels, np.int64), corrupt

    def _replaced(
        self, index: int, position: int = 0, view: View | None = None
    ) -> tuple[np.ndarray, np.int64, dict[str, str]]:
        corrupt = {}
        for attempt in range(len(self)):
            chosen = (index + attempt) % len(self)
            try:
                return self._read(chosen, position, view), self._labels[chosen], corrupt
            except ImageError as error:
                corrupt[error.name] = error.reason
                if self.strict:
                    raise
        name, reason = next(iter(corrupt.items()))
        raise DataError(f"{shown(self._folder)}: none of the {len(self)} images can be read, such as {name}: {reason}")

    def _read(self, index: int, position: int, view: View | None) -> np.ndarray:
        image = decode(os.path.join(self._folder, self._names[index]))
        return np.asarray(fit(image, self._size, self._border) if view is None else view(position, image))


class Ahead:
    """`make(key)` for one key after the other, made by worker processes before it is asked for.

    The keys are expected in the order of `following`. Any other may be asked for; the workers then start anew from it.

    Args:
        make: a function of the key alone, that can be pickled.
        following: the key after a key; None after the last.
        workers: how many processes; 0 makes everything here, when it is asked for.
    """

    def __init__(self, make: Callable[[Any], Any], following: Callable[[Any], Any], workers: int) -> None:
        self._make, self._following, self._workers = make, following, workers
        self._made: Generator | None = None
        self._next: Hashable = None

    def get(self, key: Any) -> Any:
        if not self._workers:
            return self._make(key)
        if self._made is None or key != self._next:
            self.close()  # before others start, which would inherit what these use
            self._made = load_ahead(self._make, _Keys(key, self._following), self._workers)
        self._next = None  # unless all goes well
        made = next(self._made)
        self._next = self._following(key)
        return made

    def close(self) -> None:
        """Ends the workers."""
        if self._made is not None:
            self._made.close()
        self._made = None


def load_ahead(make: Callable[[Any], Any], keys: Iterable, workers: int) -> Generator:
    """`make(key)` for each of `keys`, in their order, by worker processes where `workers` is not 0."""
    iterator = iter(
        DataLoader(
            _Made(make),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the global one belongs to the training
            worker_init_fn=_outlive_signals,
        )
    )
    while True:
        made = _next(iterator)
        if made is _END:
            return
        if isinstance(made, DataError):
            # An error refers to the frames that it passes, and this one to the error: a cycle. Workers must not wait for
            # a garbage collector, which may be that of a process forked meanwhile, and ends their queues before them.
            try:
                del iterator
                raise made
            finally:
                del made
        yield made


_END = object()


def _next(iterator: Iterator) -> Any:
    """What comes next; a DataError where it is one, or where a worker ended."""
    try:
        return next(iterator)
    except StopIteration:
        return _END
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    return DataError(
        f"workers: a process that decodes images ended ({reason}); try fewer workers, or 0, if memory or /dev/shm is short"
    )


def available_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._make(key)
        except DataError as error:
            return error  # raised in a worker, it would come with the worker's traceback as its message


class _Keys:
    """A sampler: `first`, and those that follow it."""

    def __init__(self, first: Any, following: Callable[[Any], Any]) -> None:
        self._first, self._following = first, following

    def __iter__(self) -> Iterator:
        key = self._first
        while key is not None:
            yield key
            key = self._following(key)


_ENDING = mmap.mmap(-1, 1)
"""One byte that forked workers see too: whether the program is ending, and with it they."""


def _set_ending(program: int) -> None:
    if os.getpid() == program:
        _ENDING[0] = 1


# Called before what multiprocessing has registered, which sends SIGTERM to the workers and waits for them.
atexit.register(_set_ending, os.getpid())


def _outlive_signals(_) -> None:
    """What a terminal or a batch system sends to all processes is the training's: it ends its workers, once it has saved."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if torch.multiprocessing.get_start_method() == "fork":
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(*_) -> None:
    if _ENDING[0]:
        os._exit(0)


def _as_it_is(made: Any) -> Any:
    return made
