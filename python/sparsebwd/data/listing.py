# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are images, which are left out, and what tells one state of the folder from another."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .dataset import DataError
from .decode import SUFFIXES, shown

_EXAMPLES = 3
_KINDS = 6


@dataclass(frozen=True)
class Listing:
    """The images of `train/` or `test/`, sorted by class and name.

    folder: holds a folder for each class.
    names: bytes [N], paths below `folder`. One array, since worker processes would copy a list of Python objects.
    labels: int64 [N].
    identity: changes with every file that is added, removed, renamed, exchanged or written to.
    ignored: a sentence about everything that is not taken; None where there is nothing.
    """

    folder: Path
    names: np.ndarray
    labels: np.ndarray
    identity: str
    ignored: str | None


def class_folders(split_dir: Path) -> list[str]:
    """The names of the folders in `split_dir`, sorted; hidden ones do not count."""
    names = sorted(entry.name for entry in _entries(split_dir) if _is_class(entry))
    if not names:
        raise DataError(f"{shown(split_dir)}: has no folders, but needs one per class")
    return names


def list_images(split_dir: Path, classes: Sequence[str]) -> Listing:
    """The images `split_dir/CLASS/*` of those `classes` that have a folder; a class's label is its position.

    Raises:
        DataError: a folder cannot be read, or has no images.
    """
    ignored: Counter[str] = Counter()
    examples: list[str] = []

    def ignore(path: str, why: str) -> None:
        ignored[why] += 1
        if len(examples) < _EXAMPLES:
            examples.append(os.path.relpath(path, split_dir))

    folders = set()
    for entry in _entries(split_dir):
        if _is_class(entry):
            folders.add(entry.name)
        else:
            ignore(entry.path, "beside the folders of classes")
    names: list[bytes] = []
    labels: list[int] = []
    digest = hashlib.blake2b(digest_size=16)
    for label, name in enumerate(classes):
        folder = split_dir / name
        if name not in folders:
            continue  # a class without test images
        before = len(names)
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            why = _why_ignored(entry)
            if why:
                ignore(entry.path, why)
                continue
            names.append(os.fsencode(os.path.join(name, entry.name)))
            labels.append(label)
            digest.update(names[-1] + b"\0" + _state(entry))
        if len(names) == before:
            raise DataError(f"{shown(folder)}: has no images, accepted are the endings {', '.join(SUFFIXES)}")
    sentence = None
    if ignored:
        total = ignored.total()
        kinds = ", ".join(f"{count} {why}" for why, count in ignored.most_common(_KINDS))
        if len(ignored) > _KINDS:
            kinds += ", and others"
        sentence = (
            f"{shown(split_dir)}: {len(names)} images, and {total} other {'entry' if total == 1 else 'entries'} ignored: "
            f"{kinds} (such as {', '.join(map(shown, examples))}); images are files that end in {', '.join(SUFFIXES)}, "
            "in a folder for each class"
        )
    return Listing(split_dir, np.array(names, np.bytes_), np.array(labels, np.int64), digest.hexdigest(), sentence)


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{shown(folder)}: {error.strerror}") from error


def _is_class(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and _is(entry.is_dir)


def _why_ignored(entry: os.DirEntry) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    if _is(entry.is_dir):
        return "folders within a class"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in SUFFIXES:
        return f"that end in {shown(suffix)}" if suffix else "without an ending"
    if _is(entry.is_symlink) and not os.path.exists(entry.path):
        return None  # a link to nothing: an image that should be there, and reading it will say why it is not
    return None if _is(entry.is_file) else "not regular files"


def _is(question) -> bool:
    """A loop of symbolic links is none of what is asked."""
    try:
        return question()
    except OSError:
        return False


def _state(entry: os.DirEntry) -> bytes:
    """Time of change and inode follow a file that is renamed onto another of the same size and time."""
    try:
        status = entry.stat()
    except OSError as error:
        return f"{error.errno}\0".encode()
    return f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}\0".encode()
