# SPDX-License-Identifier: Apache-2.0
"""A folder of images per class: decoded once into an array on disk, or again for each batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from .cache import cached
from .dataset import DataError, ImageData
from .decode import VERSION, ImageError, decode, fit, require_pillow, shown
from .listing import Listing, class_folders, list_images
from .notes import Notes
from .streaming import ImageFiles, available_cores

# Up to here a crop out of some padding is usual, as for CIFAR; above, a crop of random size, as for ImageNet.
_LARGEST_PADDED = 64
# Decoded images beyond this many bytes are not kept.
_LARGEST_CACHE = 8 << 30
# 256 to 224 pixels: random crops of ImageNet show objects larger than the whole images do.
_BORDER = (1 - 224 / 256) / 2
# Decoding runs ahead of writing by so many images at most.
_CHUNK = 512


def load_imagefolder(
    data_dir: Path,
    image_size: int,
    cache_dir: str | Path | None,
    *,
    stream: bool | None = None,
    crop: str = "auto",
    strict: bool = False,
) -> ImageData:
    """Reads `train/CLASS/*` and `test/CLASS/*` (`val/` where there is no `test/`); see `sparsebwd.data.load`.

    Images of another size are scaled and cropped around the centre. Decoded images are kept in `cache_dir` with the
    names, sizes, times and inodes of all files, so that a change of any decodes them again.
    """
    train_dir = data_dir / "train"
    test_dir = next((folder for folder in (data_dir / "test", data_dir / "val") if _is_dir(folder)), None)
    if not _is_dir(train_dir) or test_dir is None:
        raise DataError(
            f"data_dir: {shown(data_dir)} needs the folders train/ and test/ (or val/), in each one per class"
        )
    classes = class_folders(train_dir)
    unknown = set(class_folders(test_dir)) - set(classes)
    if unknown:
        names = ", ".join(shown(name) for name in sorted(unknown))
        raise DataError(f"{shown(test_dir)}: no training images for the classes {names}")
    train, test = list_images(train_dir, classes), list_images(test_dir, classes)
    if crop == "auto":
        crop = "padded" if image_size <= _LARGEST_PADDED else "resized"
    if stream is None:
        decoded = (len(train.names) + len(test.names)) * image_size * image_size * 3
        stream = crop == "resized" or decoded > _LARGEST_CACHE
    border = _BORDER if crop == "resized" else 0.0
    notes = Notes()
    for listing in (train, test):
        if listing.ignored:
            notes.add(listing.ignored)
    if stream:
        require_pillow()
        train_images, test_images = (
            ImageFiles(listing, image_size, border=border, strict=strict, notes=notes) for listing in (train, test)
        )
        train_labels, test_labels = train.labels, test.labels
    else:
        cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        train_images, train_labels = _decoded(train, image_size, border, cache, strict, notes)
        test_images, test_labels = _decoded(test, image_size, border, cache, strict, notes)
        missing = set(range(len(classes))) - set(train_labels.tolist())
        if missing:
            raise DataError(f"{shown(train_dir / classes[min(missing)])}: none of its images can be read")
    return ImageData(
        name="imagefolder",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple(classes),
        crop=crop,
        notes=notes,
    )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sparsebwd`, or `~/.cache/sparsebwd`."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(named or Path.home() / ".cache") / "sparsebwd"
    except RuntimeError as error:
        raise DataError(f"cache_dir: got none, and there is no home directory for it ({error}): name a folder") from error


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from error


def _decoded(
    listing: Listing, size: int, border: float, cache: Path, strict: bool, notes: Notes
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of those that can be read."""
    folder = listing.folder
    place = os.fsencode(os.path.realpath(folder))
    name = hashlib.blake2b(place + f"\0{size}\0{border}".encode(), digest_size=12).hexdigest()
    paths = [os.path.join(os.fsencode(folder), name) for name in listing.names]
    identity = f"{VERSION}-{listing.identity}"
    result = cached(
        cache / f"{folder.name}-{name}.images",
        identity,
        (len(paths), size, size, 3),
        lambda: _decode_all(paths, size, border, strict, f"decoding {folder.name} images"),
        notes,
    )
    corrupt = {shown(paths[position]): reason for position, reason in result.corrupt.items()}
    if strict:
        for path, reason in corrupt.items():
            raise ImageError(path, reason)
    if len(corrupt) == len(paths):
        path, reason = next(iter(corrupt.items()))
        raise DataError(f"{shown(folder)}: none of the {len(paths)} images can be read, such as {path}: {reason}")
    notes.add_corrupt(corrupt)
    return result.images, np.delete(listing.labels, list(result.corrupt))


def _decode_all(
    paths: list[bytes], size: int, border: float, strict: bool, title: str
) -> Iterator[np.ndarray | ImageError]:
    def decode_one(path: bytes) -> np.ndarray | ImageError:
        try:
            return np.asarray(fit(decode(path), size, border))
        except ImageError as error:
            if strict:
                raise
            return error

    console = Console(stderr=True)
    chunks = (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
    with ThreadPoolExecutor(available_cores()) as pool:
        try:
            images = (image for chunk in chunks for image in pool.map(decode_one, chunk))
            yield from track(
                images, title, len(paths), console=console, transient=True, disable=not console.is_terminal
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
