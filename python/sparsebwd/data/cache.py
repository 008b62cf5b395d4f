# SPDX-License-Identifier: Apache-2.0
"""Decoded images on disk: a file that is whole and fits, or is made again.

A file holds the pixels of all images, a description in JSON, the BLAKE2b digest of both, the length of the description
as 8 bytes, and a mark of 8 bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..opening import open_regular
from .dataset import DataError
from .decode import ImageError, shown
from .files import NO_LOCKS
from .notes import Notes

log = logging.getLogger("sparsebwd")

_MARK = b"sbwdimg1"
_TAIL = struct.Struct("<16sQ8s")
_CHUNK = 1 << 22
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Decoded:
    """images: uint8 [M, H, W, 3], a file mapped into memory. corrupt: position and reason of those left out."""

    images: np.ndarray
    corrupt: dict[int, str]


class _Damaged(Exception):
    pass


def cached(
    path: Path,
    identity: str,
    shape: tuple[int, int, int, int],
    decode: Callable[[], Iterable[np.ndarray | ImageError]],
    notes: Notes,
) -> Decoded:
    """What the file at `path` holds, where it was made of `identity`; else what `decode` yields, and the file is made.

    Of several processes that need the same file, one makes it and the others wait for it.

    Args:
        path: the file; its folder is created.
        identity: of the images' files; a file that was made of another is replaced.
        shape: (N, H, W, 3), of all images.
        decode: starts to yield an image [H, W, 3], or why there is none, N times.
        notes: is told of a damaged file.

    Raises:
        DataError: `path` cannot be written, there is no room, or what `decode` raises.
    """
    description = {"identity": identity, "shape": list(shape)}
    try:
        found = _open(path, description)
    except _Damaged as error:
        notes.add(f"cache_dir: {shown(path)} is damaged ({error}) and is made again")
        found = None
    if found is not None:
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(path.with_name(f".{path.name}.tmp")) as temporary:
            try:
                found = _open(path, description)  # another process may have made it meanwhile
            except _Damaged:
                found = None
            if found is None:
                _write(temporary.file, description, decode())
                os.replace(temporary.path, path)
        if found is None:
            found = _open(path, description)
    except OSError as error:
        size = f"{np.prod(shape) / 1e6:,.0f} MB"
        advice = (
            f"the decoded images take {size}: name a folder with more room, or stream them"
            if error.errno in _NO_ROOM
            else "name another folder"
        )
        raise DataError(f"cache_dir: {shown(path.parent)}: {error.strerror or error}; {advice}") from error
    except _Damaged as error:
        raise DataError(f"cache_dir: {shown(path)}: what was just written cannot be read back ({error})") from error
    if found is None:
        raise DataError(f"cache_dir: {shown(path)}: another process replaced what was just written")
    return found


def _open(path: Path, expected: dict) -> Decoded | None:
    """None where there is no such file, or one of other images. Raises _Damaged where the file is not what was written."""
    try:
        file = open_regular(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):
            raise _Damaged(error.strerror) from error
        return None
    with file:
        try:
            description, pixels, digest = _read_tail(file)
            if description["identity"] != expected["identity"] or description["shape"] != expected["shape"]:
                return None
            count, *image = expected["shape"]
            corrupt = {int(position): str(reason) for position, reason in description["corrupt"]}
            images = count - len(corrupt)
            if pixels != images * np.prod(image):
                raise _Damaged(f"got {pixels} bytes of pixels for {images} images")
            if _digest(file, pixels, description) != digest:
                raise _Damaged("the digest differs")
            if not images:
                return Decoded(np.empty((0, *image), np.uint8), corrupt)
            return Decoded(np.memmap(file, np.uint8, "r", 0, (images, *image)), corrupt)
        except OSError as error:
            raise _Damaged(error.strerror) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Damaged("cut short or overwritten") from error


def _read_tail(file: BinaryIO) -> tuple[dict, int, bytes]:
    """The description, how many bytes of pixels are before it, and the digest."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _TAIL.size, 0))
    tail = file.read()
    if len(tail) != _TAIL.size:
        raise _Damaged(f"got {size} bytes")
    digest, length, mark = _TAIL.unpack(tail)
    pixels = size - _TAIL.size - length
    if mark != _MARK or pixels < 0:
        raise _Damaged("cut short or overwritten")
    file.seek(pixels)
    description = json.loads(file.read(length))
    if not isinstance(description, dict):
        raise _Damaged("cut short or overwritten")
    return description, pixels, digest


def _digest(file: BinaryIO, pixels: int, description: dict) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    while pixels and (chunk := file.read(min(_CHUNK, pixels))):
        digest.update(chunk)
        pixels -= len(chunk)
    digest.update(json.dumps(description).encode())
    return digest.digest()


def _write(file: BinaryIO, description: dict, decoded: Iterable[np.ndarray | ImageError]) -> None:
    """By plain writes, since a full disk under a memory-mapped file ends the process. Room is asked for at the start."""
    file.truncate(0)
    try:
        os.posix_fallocate(file.fileno(), 0, int(np.prod(description["shape"])))
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
    corrupt = []
    digest = hashlib.blake2b(digest_size=16)
    for position, image in enumerate(decoded):
        if isinstance(image, ImageError):
            corrupt.append([position, image.reason])
            continue
        pixels = image.tobytes()
        digest.update(pixels)
        file.write(pixels)
    text = json.dumps({**description, "corrupt": corrupt}).encode()
    digest.update(text)
    file.write(text + _TAIL.pack(digest.digest(), len(text), _MARK))
    file.flush()
    file.truncate()
    os.fsync(file.fileno())


class _exclusive:
    """Opens a file to write that no other process writes at the same time, and removes it unless it was renamed.

    It has one name, so that what a killed process left is written over, not left lying about.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _exclusive:
        while True:
            descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
            )
            self.file = os.fdopen(descriptor, "r+b")
            try:
                self._wait()
                if self._is_mine():
                    return self
            except BaseException as error:
                self.file.close()
                if not isinstance(error, OSError) or error.errno not in NO_LOCKS:
                    raise
                self._take_own_name()
                return self
            self.file.close()  # the process before has renamed or removed it

    def __exit__(self, *_) -> None:
        try:
            if self._is_mine():
                os.unlink(self.path)
        finally:
            self.file.close()

    def _take_own_name(self) -> None:
        """Where files cannot be locked, every process writes one of its own."""
        self.path.unlink(missing_ok=True)
        self.path = self.path.with_name(f"{self.path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        self.file = open(self.path, "x+b")  # noqa: SIM115

    def _wait(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: waiting for another process that decodes the same images", shown(self.path.parent))
            fcntl.flock(self.file, fcntl.LOCK_EX)

    def _is_mine(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.lstat(self.path))
        except FileNotFoundError:
            return False
