# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes into a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..data.files import NO_LOCKS

FILE = ".sparsebwd.lock"


class LockedError(ValueError):
    """Another process writes into the folder. The message says which."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder and holds its lock, a file `.sparsebwd.lock` in it, which goes away with the lock.

    The system releases the lock when the process ends in whatever way. It holds between machines as far as their shared
    file system takes locks (flock); on one that does not, nothing is locked.

    Raises:
        LockedError: another process, or this one, holds it.
        OSError: the folder or the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    descriptor = _acquire(path)
    try:
        yield
    finally:
        # Deleted while it is held, so that nobody can hold a lock on a file that others do not see.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock of the file that is at `path` now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _lock(descriptor, path)
            if _same_file(descriptor, path):
                _write_holder(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder deleted it in between


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip() or "another process"
            raise LockedError(f"{path.parent} is in use by {holder}") from None
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _write_holder(descriptor: int) -> None:
    """Who holds it, for those who are refused."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        pass  # on a full disk the lock holds all the same
