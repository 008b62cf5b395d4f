# SPDX-License-Identifier: Apache-2.0
"""Data sets for the training command, held as uint8 arrays, and the batches drawn from them."""

from __future__ import annotations

from pathlib import Path

from .batches import Batches, Normalize, ordered_batches
from .dataset import DataError, ImageData
from .files import atomic_write, remove_leftovers, write_text

__all__ = [
    "Batches",
    "DataError",
    "ImageData",
    "Normalize",
    "atomic_write",
    "load",
    "names",
    "ordered_batches",
    "remove_leftovers",
    "write_text",
]

_NAMES = ("digits", "cifar10", "cifar100", "imagefolder")


def names() -> tuple[str, ...]:
    """The names that `load` accepts."""
    return _NAMES


def load(
    name: str, *, data_dir: str | Path | None = None, cache_dir: str | Path | None = None, image_size: int = 32
) -> ImageData:
    """Read a data set.

    Args:
        name: `digits` (scikit-learn's handwritten digits, no download), `cifar10`, `cifar100` (their binary files) or
            `imagefolder` (`train/` and `test/` or `val/`, in each a folder of JPEG or PNG files per class).
        data_dir: where the files are; needed by all but `digits`.
        cache_dir: where `imagefolder` keeps its decoded images; default `$XDG_CACHE_HOME/sparsebwd`.
        image_size: height and width of the images, in pixels; CIFAR images are 32 and stay so.

    Raises:
        ValueError: unknown `name`, a missing `data_dir`, or an `image_size` that does not fit.
        DataError: `data_dir` is no directory, or a file is missing, truncated or corrupt; the message names it.
    """
    if name not in _NAMES:
        raise ValueError(f"data: got {name!r}, accepted are {', '.join(_NAMES)}")
    if not 1 <= image_size <= 1024:
        raise ValueError(f"image_size: got {image_size}, accepted are integers from 1 to 1024")
    if name == "digits":
        from .digits import load_digits

        return load_digits(image_size)
    if data_dir is None:
        raise ValueError(f"data_dir: got none, but {name} is read from files: name the folder that holds them")
    if not Path(data_dir).is_dir():
        problem = "is not a directory" if Path(data_dir).exists() else "does not exist"
        raise DataError(f"data_dir: got {str(data_dir)!r}, which {problem}")
    if name == "imagefolder":
        from .imagefolder import load_imagefolder

        return load_imagefolder(Path(data_dir), image_size, cache_dir)
    if image_size != 32:
        raise ValueError(f"image_size: got {image_size}, but the images of {name} are 32x32")
    from .cifar import load_cifar

    return load_cifar(name, Path(data_dir))
