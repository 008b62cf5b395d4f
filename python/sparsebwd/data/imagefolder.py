# SPDX-License-Identifier: Apache-2.0
"""A folder of images per class, decoded once into an array on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from .dataset import DataError, ImageData
from .files import atomic_write

_SUFFIXES = (".jpg", ".jpeg", ".png")


def load_imagefolder(data_dir: Path, image_size: int, cache_dir: str | Path | None) -> ImageData:
    """Reads `train/CLASS/*` and `test/CLASS/*` (`val/` where there is no `test/`).

    Images of another size are scaled and cropped around the centre. The decoded images are kept in `cache_dir`, under
    a name made from the paths, sizes and times of all files, so that a change of any decodes them again.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    train_dir = data_dir / "train"
    test_dir = next((folder for folder in (data_dir / "test", data_dir / "val") if folder.is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        raise DataError(f"data_dir: {data_dir} needs the folders train/ and test/ (or val/), in each one per class")
    classes = _class_folders(train_dir)
    unknown = set(_class_folders(test_dir)) - set(classes)
    if unknown:
        raise DataError(f"{test_dir}: no training images for the classes {', '.join(sorted(unknown))}")
    train_images, train_labels = _load_split(train_dir, classes, image_size, cache)
    test_images, test_labels = _load_split(test_dir, classes, image_size, cache)
    return ImageData(
        name="imagefolder",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=tuple(classes),
    )


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/sparsebwd`, or `~/.cache/sparsebwd`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsebwd"


def _class_folders(split_dir: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(split_dir) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{split_dir}: has no folders, but needs one per class")
    return names


def _load_split(
    split_dir: Path, classes: Sequence[str], image_size: int, cache: Path
) -> tuple[np.ndarray, np.ndarray]:
    paths: list[Path] = []
    labels: list[int] = []
    identity = hashlib.blake2b(f"{split_dir.resolve()}\0{image_size}\0".encode(), digest_size=12)
    for label, name in enumerate(classes):
        folder = split_dir / name
        if not folder.is_dir():
            continue  # a class without test images
        files = [
            entry
            for entry in os.scandir(folder)
            if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(".")
        ]
        if not files:
            raise DataError(f"{folder}: has no images, accepted are the endings {', '.join(_SUFFIXES)}")
        for entry in sorted(files, key=lambda entry: entry.name):
            status = entry.stat()
            identity.update(f"{name}/{entry.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "replace"))
            paths.append(Path(entry.path))
            labels.append(label)
    shape = (len(paths), image_size, image_size, 3)
    path = cache / f"{split_dir.name}-{identity.hexdigest()}.npy"
    images = _open_cached(path, shape)
    if images is None:
        _decode_all(paths, shape, path)
        images = _open_cached(path, shape)
        if images is None:
            raise DataError(f"{path}: what was just written cannot be read back")
    return images, np.array(labels, np.int64)


def _open_cached(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached array, or None where there is none that fits: it can always be made again."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


def _decode_all(paths: Sequence[Path], shape: tuple[int, ...], target: Path) -> None:
    size = shape[1]
    with atomic_write(target) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        try:
            decoded = pool.map(lambda path: decode(path, size), paths)
            console = Console(stderr=True)
            shown = track(
                decoded,
                f"decoding {target.name.split('-')[0]} images",
                len(paths),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            for index, image in enumerate(shown):
                array[index] = image
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        array.flush()


def decode(path: Path, size: int) -> np.ndarray:
    """One image file as uint8 [size, size, 3].

    Raises:
        DataError: the file is truncated or is no image.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError(f"imagefolder needs Pillow ({error}): pip install pillow") from error
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many types on a broken file, SyntaxError among them
        raise DataError(f"{path}: truncated, corrupt or no image: {error}") from error
