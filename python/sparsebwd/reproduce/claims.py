# SPDX-License-Identifier: Apache-2.0
"""Who works on which directory of a folder that several processes, on several machines, may share.

A claim is a file that is created exclusively, which is atomic on shared file systems too, and touched while its holder
lives. One that has not been touched for long is stale, and anybody may take it over. The training command locks the
directory it writes to as well (`sparsebwd.train.lock`), so that a claim lost by accident does no harm.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..opening import read_text

FILE = ".sparsebwd.claim"

STALE = 180.0
"""Seconds without a heartbeat after which a claim is stale."""
_BEATS = 12  # in that time


class Claim:
    """A directory that is ours until `release`, as long as `beat` is called often."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def beat(self) -> bool:
        """Show that the holder lives. False where the claim was taken over."""
        try:
            if read_text(self.path, errors="replace") != self.text:
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except OSError:
            pass  # a shared folder that is away for a moment
        return True

    def release(self) -> None:
        with suppress(OSError):
            if read_text(self.path, errors="replace") == self.text:
                self.path.unlink()


def take(folder: Path, stale: float = STALE) -> Claim | None:
    """Claim a directory, which is created where it does not exist; None where another process holds it.

    Raises:
        OSError: the directory or the file cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / FILE, f"{_here()} {os.getpid()} {secrets.token_hex(8)}\n"
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            if not _removed_stale(path, stale):
                return None
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        return Claim(path, text)
    return None


def holder(folder: Path, stale: float = STALE) -> str | None:
    """Who holds the directory, in words; None where nobody does."""
    path = folder / FILE
    try:
        text = read_text(path, errors="replace")
        if _is_stale(path, text, stale):
            return None
    except FileNotFoundError:
        return None
    machine, process = (text.split() + ["?", "?"])[:2]
    return f"process {process} on {machine.partition('/')[0]}"


@contextmanager
def kept(claim: Claim, lost: Callable[[], None], stale: float = STALE) -> Iterator[None]:
    """Beats in a thread, calls `lost` from it if another process took the claim over, and releases it in the end."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(stale / _BEATS):
            if not claim.beat():
                lost()
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        claim.release()


def _removed_stale(path: Path, stale: float) -> bool:
    """Remove the claim if it is stale, or gone."""
    try:
        text = read_text(path, errors="replace")
        if not _is_stale(path, text, stale):
            return False
        aside = path.with_name(f"{FILE}.{secrets.token_hex(8)}")
        os.rename(path, aside)
    except FileNotFoundError:
        return True
    try:
        if read_text(aside, errors="replace") == text:
            return True
        # Another process was faster, and this is its claim: give it back.
        with suppress(OSError):
            os.link(aside, path)
        return False
    finally:
        aside.unlink(missing_ok=True)


def _is_stale(path: Path, text: str, stale: float) -> bool:
    machine, _, rest = text.partition(" ")
    process = rest.partition(" ")[0]
    if machine == _here() and process.isdecimal() and not _lives(int(process)):
        return True
    # Both by the clock of the file system: those of two machines may differ.
    probe = path.with_name(f"{FILE}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime > stale
    finally:
        probe.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter of what is no number of a process
        return False
    except PermissionError:
        pass
    return True


def _here() -> str:
    """This machine, and what its process numbers are valid in: containers may share a name."""
    places = []
    with suppress(OSError):
        places.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        places.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return "/".join([socket.gethostname().replace(" ", "_") or "?", *places])
