# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their standard binary files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import DataError, ImageData

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """A record is `label_bytes` labels, of which the last one counts, then the red, green and blue planes."""

    url: str
    folder: str
    pickled_folder: str
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    num_classes: int
    label_bytes: int
    train_records: int  # in each training file
    test_records: int


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        pickled_folder="cifar-10-batches-py",
        train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test_file="test_batch.bin",
        names_file="batches.meta.txt",
        num_classes=10,
        label_bytes=1,
        train_records=10_000,
        test_records=10_000,
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        pickled_folder="cifar-100-python",
        train_files=("train.bin",),
        test_file="test.bin",
        names_file="fine_label_names.txt",
        num_classes=100,
        label_bytes=2,
        train_records=50_000,
        test_records=10_000,
    ),
}


def load_cifar(name: str, data_dir: Path) -> ImageData:
    """`data_dir` is the unpacked folder of the binary archive, or the folder that holds it."""
    archive = ARCHIVES[name]
    folder = _find(archive, data_dir)
    train = [_read(folder / file, archive, archive.train_records) for file in archive.train_files]
    test_images, test_labels = _read(folder / archive.test_file, archive, archive.test_records)
    return ImageData(
        name=name,
        train_images=np.concatenate([images for images, _ in train]),
        train_labels=np.concatenate([labels for _, labels in train]),
        test_images=test_images,
        test_labels=test_labels,
        classes=_class_names(folder / archive.names_file, archive.num_classes),
    )


def _find(archive: Archive, data_dir: Path) -> Path:
    for folder in (data_dir / archive.folder, data_dir):
        if (folder / archive.test_file).is_file():
            return folder
    found = ""
    if (data_dir / archive.pickled_folder).is_dir() or data_dir.name == archive.pickled_folder:
        found = ", which holds the Python version (pickles are not read, because loading one can run any code)"
    raise DataError(
        f"data_dir: no {archive.test_file} in {data_dir} or its {archive.folder}/{found}; "
        f"unpack the binary version, {archive.url}, there"
    )


def _read(path: Path, archive: Archive, records: int) -> tuple[np.ndarray, np.ndarray]:
    size = records * (archive.label_bytes + _PIXELS)
    try:
        found = path.stat().st_size
        if found != size:
            raise DataError(f"{path}: got {found} bytes, a whole file has {size}; unpack {archive.url} again")
        data = np.fromfile(path, np.uint8).reshape(records, -1)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; unpack {archive.url} again") from error
    labels = data[:, archive.label_bytes - 1].astype(np.int64)
    if labels.max() >= archive.num_classes:
        record = int(labels.argmax())
        raise DataError(
            f"{path}: corrupt, record {record} has the label {labels[record]}, "
            f"accepted are 0 to {archive.num_classes - 1}; unpack {archive.url} again"
        )
    images = data[:, archive.label_bytes :].reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _class_names(path: Path, count: int) -> tuple[str, ...]:
    """The names are for display only, so a folder without them is read all the same."""
    if path.is_file():
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
        names = tuple(line for line in lines if line)
        if len(names) == count:
            return names
    return tuple(str(label) for label in range(count))
