# SPDX-License-Identifier: Apache-2.0
"""What SIGINT, SIGTERM and SIGHUP do to a run: end it where it can be resumed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


class Stopped(KeyboardInterrupt):
    """A signal ended the run. status: the exit status that shells give it. saved: a checkpoint of the last step exists."""

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(_WORDS.get(number, f"ended by signal {number}"))
        self.number, self.saved = number, saved

    @property
    def status(self) -> int:
        return 128 + self.number


class Signals:
    """The signals of this process, while `handled`: raised as `Stopped` at once; within `deferred` the first is only
    noted in `received`, and the second raised."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[Signals]:
        """Signals that the process ignores stay ignored (nohup, shells' background jobs). Only the main thread can handle
        signals; in others nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in _WORDS}
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, self._arrived)
        try:
            yield self
        finally:
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _arrived(self, number: int, frame: object) -> None:
        if self._deferred and not self.received:
            self.received = number
            return
        raise Stopped(number)
