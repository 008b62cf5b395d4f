# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain values that are verified, every bit, before anything in them is used.

A file is what `torch.save` writes, and after it one line, `sha256 ` and the digest of all before. `torch.load` reads it
too, without verifying.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import atomic_write

_LINE = b"\nsha256 %s\n"
_LINE_BYTES = len(_LINE % (b"0" * 64))
_CHUNK = 2**20


class RecordError(ValueError):
    """A file that is truncated or corrupt, or was not written by `save_record`. The message says which, not the path."""


def save_record(path: Path, record: Any) -> None:
    """Write `record`, of tensors and plain values only, whole or not at all.

    Raises:
        OSError: the file cannot be written; its `filename` is `path`.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        writer = _Writer(file)
        torch.save(record, writer)
        if writer.error is not None:
            raise writer.error
        file.write(_LINE % writer.digest.hexdigest().encode())


def load_record(path: Path) -> Any:
    """What `save_record` was given, its tensors on the CPU. No code in the file is run.

    Raises:
        RecordError: the digest is missing or is not that of the file, or the file holds something else.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        line, expected = _digests(file)
        if line is not None and line != expected:
            raise RecordError("truncated or corrupt: its contents do not have the digest that it was written with")
        try:
            record = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and key errors alike: what is read is not what was written
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RecordError(f"truncated or corrupt, or a file of another kind ({reason})") from error
    if line is None:
        raise RecordError("truncated or corrupt, or written by an earlier version: it does not end in its digest")
    return record


class _Writer:
    """Takes the digest of what is written, and keeps the first error of the system for later: `torch.save` would hide
    it behind one of its own ("unexpected pos")."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _digests(file: BinaryIO) -> tuple[bytes | None, bytes]:
    """The last line, None if it is none of ours, and what it has to be. Leaves the file at its start."""
    size = os.fstat(file.fileno()).st_size - _LINE_BYTES
    digest, left = hashlib.sha256(), max(size, 0)
    while left and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    line = file.read()
    file.seek(0)
    ours = size >= 0 and line.startswith(_LINE[: _LINE.index(b"%")])
    return line if ours else None, _LINE % digest.hexdigest().encode()
