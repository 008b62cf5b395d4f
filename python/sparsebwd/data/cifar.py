# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their standard files, the binary or the Python version."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..opening import open_regular, read_bytes
from .dataset import DataError, ImageData
from .decode import shown
from .pickled import read_pickle

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """What was published.

    In the binary version a record is `label_bytes` labels, of which the last one counts, then the red, green and blue
    planes. In the Python version a file has the same name without the ending, and is a pickled dictionary: `data`, an
    array of planes, and a list of labels, `labels_key`.
    """

    url: str
    folder: str
    pickled_folder: str
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    pickled_names: tuple[str, bytes]  # file, key
    labels_key: bytes
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
        pickled_names=("batches.meta", b"label_names"),
        labels_key=b"labels",
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
        pickled_names=("meta", b"fine_label_names"),
        labels_key=b"fine_labels",
        num_classes=100,
        label_bytes=2,
        train_records=50_000,
        test_records=10_000,
    ),
}


def load_cifar(name: str, data_dir: Path) -> ImageData:
    """`data_dir` is the unpacked folder of either archive, or the folder that holds it; binary files come first."""
    archive = ARCHIVES[name]
    folder, pickled = _find(archive, data_dir)
    read = _read_pickled if pickled else _read
    train = [read(folder / file, archive, archive.train_records) for file in archive.train_files]
    test_images, test_labels = read(folder / archive.test_file, archive, archive.test_records)
    return ImageData(
        name=name,
        train_images=np.concatenate([images for images, _ in train]),
        train_labels=np.concatenate([labels for _, labels in train]),
        test_images=test_images,
        test_labels=test_labels,
        classes=_class_names(folder, archive, pickled),
    )


def _find(archive: Archive, data_dir: Path) -> tuple[Path, bool]:
    """The folder of the files, and whether they are the Python version."""
    name = Path(archive.test_file)
    for file, below, pickled in ((name, archive.folder, False), (name.with_suffix(""), archive.pickled_folder, True)):
        for folder in (data_dir / below, data_dir):
            try:
                if (folder / file).is_file():
                    return folder, pickled
            except OSError as error:
                raise DataError(f"{shown(folder)}: {error.strerror}") from error
    raise DataError(
        f"data_dir: no {archive.test_file} in {shown(data_dir)} or its {archive.folder}/, and no {name.stem} in its "
        f"{archive.pickled_folder}/; unpack the binary version, {archive.url}, there"
    )


def _read(path: Path, archive: Archive, records: int) -> tuple[np.ndarray, np.ndarray]:
    size = records * (archive.label_bytes + _PIXELS)
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DataError(f"{shown(path)}: got {found} bytes, a whole file has {size}; unpack {archive.url} again")
            data = np.fromfile(file, np.uint8, size).reshape(records, -1)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; unpack {archive.url} again") from error
    labels = data[:, archive.label_bytes - 1].astype(np.int64)
    return _checked(path, archive, data[:, archive.label_bytes :], labels)


def _read_pickled(path: Path, archive: Archive, records: int) -> tuple[np.ndarray, np.ndarray]:
    path = path.with_suffix("")
    again = "unpack the archive again"
    try:
        content = read_pickle(path, 2 * records * _PIXELS + (1 << 20))
        planes, labels = content[b"data"], content[archive.labels_key]
        if not isinstance(planes, np.ndarray) or planes.shape != (records, _PIXELS):
            raise ValueError(f"data is {getattr(planes, 'shape', type(planes).__name__)}, not {(records, _PIXELS)}")
        if not isinstance(labels, list) or len(labels) != records or {type(label) for label in labels} != {int}:
            raise ValueError(f"{archive.labels_key.decode()} is not a list of {records} integers")
        labels = np.array(labels, np.int64)
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror or error}; {again}") from error
    except KeyError as error:
        raise DataError(f"{shown(path)}: corrupt or another file, it has no {error}; {again}") from error
    except Exception as error:  # whatever a pickle's opcodes run into
        raise DataError(f"{shown(path)}: truncated, corrupt or another file: {error}; {again}") from error
    return _checked(path, archive, planes, labels)


def _checked(path: Path, archive: Archive, planes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    wrong = (labels < 0) | (labels >= archive.num_classes)
    if wrong.any():
        record = int(wrong.argmax())
        raise DataError(
            f"{shown(path)}: corrupt, record {record} has the label {labels[record]}, "
            f"accepted are 0 to {archive.num_classes - 1}; unpack {archive.url} again"
        )
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def _class_names(folder: Path, archive: Archive, pickled: bool) -> tuple[str, ...]:
    """The names are for display only, so a folder without them is read all the same."""
    file, key = archive.pickled_names if pickled else (archive.names_file, b"")
    try:
        most = 1 << 20
        lines = read_pickle(folder / file, most)[key] if pickled else read_bytes(folder / file, most).splitlines()
        names = tuple(line.decode("utf-8", "replace").strip() for line in lines)
    except Exception:
        names = ()
    names = tuple(name for name in names if name)
    return names if len(names) == archive.num_classes else tuple(str(label) for label in range(archive.num_classes))
