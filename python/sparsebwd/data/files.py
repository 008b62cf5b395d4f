# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What locking a file fails with on a file system that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_replaceable(path: Path) -> None:
    """Raises OSError, with its name, if `path` is a device, a pipe or a socket, or a link to one, as /dev/stdout is: it would be
    replaced by a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EEXIST, "it is no regular file, and is not replaced", str(path))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same directory, and renames it to `path` once it is on the disk.

    Whoever reads `path` sees the old file or the whole new one, also after a crash. If the body raises, the temporary
    file is removed and `path` is as it was.

    Raises:
        OSError: the file cannot be written, or `check_replaceable` refuses it; its `filename` is `path`, also where the system call that failed (a write,
            on a full disk) knew of no name.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        _remove(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write the file by `atomic_write`, in UTF-8."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(record: Any) -> str:
    """``record`` as JSON, which has neither NaN nor infinities: they become null."""
    return json.dumps(_finite(record), indent=1, allow_nan=False)


def write_json(path: Path, record: Any) -> None:
    """Write the file by `atomic_write`, as `json_text`."""
    write_text(path, json_text(record) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Delete the temporary files that killed writers of the files `names` have left in `folder`, and no others.

    Nobody else may be writing these files.
    """
    own = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9]+\.[0-9a-f]{{8}}\.tmp")
    for found in folder.iterdir():
        if own.fullmatch(found.name) and not found.is_dir():
            _remove(found)


def _remove(path: Path) -> None:
    """A temporary file that cannot be deleted is no reason to fail, nor to hide why one failed before."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
