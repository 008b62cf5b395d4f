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

from ..opening import open_regular
from .files import atomic_write

_LINE = b"\nsha256 %s\n"
_LINE_BYTES = len(_LINE % (b"0" * 64))
_MARK = _LINE[: _LINE.index(b"%")]
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
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size - _LINE_BYTES
        if size < 0 or not _last(file, size).startswith(_MARK):
            raise RecordError(
                "truncated or corrupt, a file of another kind or written by an earlier version: it does not end in its digest"
            )
        if _last(file, size) != _digest_line(file, size):
            raise RecordError("truncated or corrupt: its contents do not have the digest that it was written with")
        file.seek(0)
        try:
            record = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and key errors alike: what is read is not what was written
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise RecordError(f"truncated or corrupt, or a file of another kind ({reason})") from error
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


def _last(file: BinaryIO, size: int) -> bytes:
    """What is behind the first `size` bytes."""
    file.seek(size)
    return file.read(_LINE_BYTES)


def _digest_line(file: BinaryIO, size: int) -> bytes:
    """What the line behind the first `size` bytes has to be."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (chunk := file.read(min(size, _CHUNK))):
        digest.update(chunk)
        size -= len(chunk)
    return _LINE % digest.hexdigest().encode()
