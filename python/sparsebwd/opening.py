# SPDX-License-Identifier: Apache-2.0
"""How files are opened that others name or leave in a folder: all such files are read by these functions."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

MOST_TEXT = 64 * 2**20
"""Bytes of a text file that is read whole: results, logs, calibrations."""
MOST_ROWS = 4 * 2**30
"""Bytes of a table that is read row by row."""
_LONGEST_ROW = 1000

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | bytes | os.PathLike, most: int | None = None) -> BinaryIO:
    """The file, to read. Does not wait for a writer, as a FIFO would, and wakes no device.

    Args:
        most: bytes that it may have; None for any number.

    Raises:
        OSError: it cannot be opened; EISDIR or EINVAL if it is not a regular file, EFBIG if it is larger.
    """
    _check(os.stat(path), path, most)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check(os.fstat(descriptor), path, most)  # it may have been exchanged in between
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | bytes | os.PathLike, most: int = MOST_TEXT) -> bytes:
    """What the file holds, of `most` bytes or fewer. Raises as :func:`open_regular` does."""
    with open_regular(path, most) as file:
        found = file.read(most + 1) or b""  # files of the system have no size, and need not have an end
    if len(found) > most:
        raise _too_large(path, f"more than {most}", most)
    return found


def read_text(path: str | bytes | os.PathLike, most: int = MOST_TEXT, errors: str = "strict") -> str:
    """The file's text, in UTF-8. Raises as :func:`read_bytes` does, and UnicodeDecodeError, a ValueError, where it is not."""
    return read_bytes(path, most).decode("utf-8", errors)


def read_json(path: str | bytes | os.PathLike, most: int = MOST_TEXT) -> Any:
    """What the file holds as JSON. Raises as :func:`read_bytes` does, and ValueError where it is something else."""
    text = read_text(path, most)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_rows(path: str | bytes | os.PathLike, most: int = MOST_ROWS) -> Iterator[str]:
    """The lines of the file, in UTF-8, those of more than 1,000 bytes in pieces. Raises as :func:`open_regular` does."""
    with open_regular(path, most) as file:
        while line := file.readline(_LONGEST_ROW):
            yield line.decode("utf-8", "replace")


def _check(found: os.stat_result, path: str | bytes | os.PathLike, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, f"not a regular file but {kind}", os.fsdecode(path))
    if most is not None and found.st_size > most:
        raise _too_large(path, str(found.st_size), most)


def _too_large(path: str | bytes | os.PathLike, size: str, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size} bytes, accepted are up to {most}", os.fsdecode(path))
