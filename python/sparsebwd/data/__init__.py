# SPDX-License-Identifier: Apache-2.0
"""Data sets for the training command, as uint8 arrays or as files, and the batches drawn from them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..arguments import as_int, check_choice, check_flag, check_path
from .augment import CROPS
from .batches import Batches, Normalize, ordered_batches
from .dataset import DataError, ImageData
from .decode import shown
from .files import atomic_write, remove_leftovers, write_json, write_text
from .streaming import available_cores

__all__ = [
    "CROPS",
    "Batches",
    "DataError",
    "ImageData",
    "Normalize",
    "atomic_write",
    "available_cores",
    "load",
    "names",
    "ordered_batches",
    "remove_leftovers",
    "write_json",
    "write_text",
]

_NAMES = ("digits", "cifar10", "cifar100", "imagefolder")


def names() -> tuple[str, ...]:
    """The names that `load` accepts."""
    return _NAMES


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    image_size: int = 32,
    stream: bool | None = None,
    crop: str = "padded",
    strict: bool = True,
) -> ImageData:
    """Read a data set.

    Args:
        name: `digits` (scikit-learn's handwritten digits, no download), `cifar10`, `cifar100` (their binary or Python
            files) or `imagefolder` (`train/` and `test/` or `val/`, in each a folder of JPEG or PNG files per class).
        data_dir: where the files are; needed by all but `digits`.
        cache_dir: where `imagefolder` keeps its decoded images; default `$XDG_CACHE_HOME/sparsebwd`.
        image_size: height and width of the images, in pixels; CIFAR images are 32 and stay so.
        stream: whether the files of `imagefolder` are decoded for each batch, instead of once for all; None does so for
            crops "resized", and where the decoded images would take more than 8 GiB.
        crop: how training images are to be cropped at random: "padded", out of 4 pixels of padding, as is usual for
            CIFAR; "resized", 8 to 100 % of the area, as is usual for ImageNet; "auto" is "resized" for an `imagefolder`
            of more than 64 pixels. With "resized", the middle 7/8 of an image is what is tested.
        strict: whether an image of `imagefolder` that cannot be read is an error. Otherwise it is left out, and
            `ImageData.notes` names it; when streaming, the next image takes its place in training.

    Raises:
        TypeError: an argument of another type.
        ValueError: unknown `name` or `crop`, a missing `data_dir`, an `image_size` that does not fit, or `stream` for
            data that is not in files.
        DataError: `data_dir` is no directory, or a file is missing, truncated or corrupt; the message names it.
    """
    check_choice("name", name, _NAMES)
    data_dir, cache_dir = (
        None if path is None else check_path(path, which)
        for which, path in (("data_dir", data_dir), ("cache_dir", cache_dir))
    )
    image_size = as_int(image_size, "image_size", least=1, most=1024)
    stream = None if stream is None else check_flag(stream, "stream")
    strict = check_flag(strict, "strict")
    check_choice("crop", crop, ("auto", *CROPS))
    if stream and name != "imagefolder":
        raise ValueError(f"stream: got {stream}, but only imagefolder is streamed; {name} fits into memory")
    if name == "digits":
        from .digits import load_digits

        images = load_digits(image_size)
    else:
        folder = _directory(name, data_dir)
        if name == "imagefolder":
            from .imagefolder import load_imagefolder

            return load_imagefolder(folder, image_size, cache_dir, stream=stream, crop=crop, strict=strict)
        if image_size != 32:
            raise ValueError(f"image_size: got {image_size}, but the images of {name} are 32x32")
        from .cifar import load_cifar

        images = load_cifar(name, folder)
    return replace(images, crop="padded" if crop == "auto" else crop)


def _directory(name: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise ValueError(f"data_dir: got none, but {name} is read from files: name the folder that holds them")
    try:
        is_directory, exists = data_dir.is_dir(), os.path.lexists(data_dir)
    except OSError as error:
        raise DataError(f"data_dir: got '{shown(data_dir)}': {error.strerror}") from error
    if not is_directory:
        problem = "is not a directory" if exists else "does not exist"
        raise DataError(f"data_dir: got '{shown(data_dir)}', which {problem}")
    return data_dir
