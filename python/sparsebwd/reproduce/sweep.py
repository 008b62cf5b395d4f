# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a sweep that are not done, beside other processes that do the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..data import write_text
from ..data.files import check_replaceable
from ..opening import open_regular
from ..train.lock import LockedError, locked
from . import claims, estimate, timing
from .runs import FAILED_FILE, OUTPUT_FILE, Run

_NOT_FINITE = re.compile(r"became (nan|-?inf)|is not finite")
_POLL, _WAIT, _REFRESH = 2.0, 10.0, 60.0
"""Seconds between looks at the child, at what others have, and at all runs."""
_PATIENCE = 300.0
"""Seconds that an ended child gets for its checkpoint."""
_LAST_BYTES = 2**16
"""Of what a child printed, where its last line is looked for."""


@dataclass
class Outcome:
    """What a sweep did. failed: what went wrong, by run. elsewhere: runs that others hold."""

    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)


class Sweep:
    """Args:
    runs: in the order in which they are made.
    timing_steps: steps of the measurement after each sparse run; 0: none.
    checkpoint_steps: a checkpoint every so many steps.
    wait: stay until runs that others hold are done, and take over those whose holder has died.
    stale: seconds without a sign of life after which a holder is taken for dead.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        console: Console,
        *,
        timing_steps: int = timing.STEPS,
        checkpoint_steps: int = 200,
        wait: bool = True,
        stale: float = claims.STALE,
    ) -> None:
        self.runs, self.console = runs, console
        self._timing_steps, self._checkpoint_steps, self._wait, self._stale = (
            timing_steps,
            checkpoint_steps,
            wait,
            stale,
        )
        self._outcome = Outcome()
        self._progress: Progress | None = None
        self._estimates: estimate.Estimates | None = None
        self._refresh = 0.0

    def run(self) -> Outcome:
        """Make what is missing. A signal ends it after the child's checkpoint; the same call goes on from there."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._outcome, self._estimates = Outcome(), None
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        with self._progress:
            self._task = self._progress.add_task("all runs", total=1.0)
            while pending := [run for run in self.runs if self._is_pending(run)]:
                self._outcome.elsewhere = {}
                worked = False
                for run in pending:
                    worked |= self._try(run)
                if not worked:
                    if not self._wait or not self._outcome.elsewhere:
                        break
                    self._show()
                    time.sleep(_WAIT)
        return self._outcome

    def measure(self) -> Outcome:
        """Measure all sparse runs that are done and still have their checkpoint; others are left as they are."""
        for run in self.runs:
            if run.config.dense or not run.done() or not run.has_checkpoint():
                continue
            claim = claims.take(run.folder, self._stale)
            if claim is None:
                self._outcome.elsewhere[run.name] = claims.holder(run.folder, self._stale) or "another process"
                continue
            lost = threading.Event()
            with claims.kept(claim, lost.set, self._stale):
                self._time(run, lost)
        return self._outcome

    def _is_pending(self, run: Run) -> bool:
        return run.name not in self._outcome.failed and not self._is_done(run)

    def _is_done(self, run: Run) -> bool:
        return run.done() and (run.timed() or not self._timing_steps or not run.has_checkpoint())

    def _try(self, run: Run) -> bool:
        """Whether the run was ours; otherwise it is noted who has it."""
        claim = claims.take(run.folder, self._stale)
        if claim is None:
            self._outcome.elsewhere[run.name] = claims.holder(run.folder, self._stale) or "another process"
            return False
        lost = threading.Event()
        with claims.kept(claim, lost.set, self._stale):
            try:
                with locked(run.folder):
                    pass
            except LockedError as error:  # by the training command, without a sweep
                self._outcome.elsewhere[run.name] = str(error)
                return False
            if run.other:
                self._fail(run, f"its directory holds another run: {run.other}")
            elif not self._is_done(run):
                self._make(run, lost)
        return True

    def _make(self, run: Run, lost: threading.Event) -> None:
        if not run.done():
            again = "--resume" if run.has_checkpoint() else "--overwrite"
            checkpoints = ["--checkpoint-steps", str(run.config.checkpoint_steps or self._checkpoint_steps)]
            self.console.print(Text(f"{run.name}: {'resumed' if run.has_checkpoint() else 'begun'}"), soft_wrap=True)
            begin = time.monotonic()
            status = self._child(["train", *run.arguments(), *checkpoints, again], run, lost)
            last = _last_line(run.folder / OUTPUT_FILE)
            if lost.is_set():
                self.console.print(Text(f"{run.name}: taken over by another process"), soft_wrap=True)
                return
            if status:
                if _NOT_FINITE.search(last):
                    write_text(run.folder / FAILED_FILE, json.dumps({"step": run.steps_done(), "message": last}) + "\n")
                    self.console.print(Text(f"{run.name}: {last}"), soft_wrap=True)
                    self._outcome.ran.append(run.name)
                else:
                    self._fail(run, _failure(status, last))
                return
            if not run.done():
                self._fail(run, f"ended without results: {last}")
                return
            self._outcome.ran.append(run.name)
            self._refresh = 0.0
            self.console.print(Text(f"{run.name}: done, {estimate.duration(time.monotonic() - begin)}"), soft_wrap=True)
        if self._timing_steps and not run.timed() and run.has_checkpoint():
            self._time(run, lost)

    def _time(self, run: Run, lost: threading.Event) -> None:
        arguments = ["timing", str(run.folder), str(self._timing_steps)]
        if (status := self._child(arguments, run, lost)) and not lost.is_set():
            self._fail(run, f"its times: {_failure(status, _last_line(run.folder / OUTPUT_FILE))}")

    def _child(self, arguments: Sequence[str], run: Run, lost: threading.Event) -> int:
        """Run a command to its end, or to that of the claim, and return its exit status."""
        command = [sys.executable, "-m", "sparsebwd.reproduce.child", *arguments]
        check_replaceable(run.folder / OUTPUT_FILE)
        with open(run.folder / OUTPUT_FILE, "ab") as output:
            # In a session of its own: a signal from the terminal reaches it once, by way of this process.
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while (status := _wait(child, _POLL)) is None:
                    self._show(run)
                    if lost.is_set():
                        child.send_signal(signal.SIGTERM)
                        return child.wait()
                return status
            except BaseException:
                child.send_signal(signal.SIGTERM)
                if _wait(child, _PATIENCE) is None:
                    child.kill()
                    child.wait()
                raise
            finally:
                child.stdin.close()

    def _fail(self, run: Run, text: str) -> None:
        self._outcome.failed[run.name] = text
        self.console.print(Text(f"{run.name}: {text}", "red"), soft_wrap=True)

    def _show(self, running: Run | None = None) -> None:
        """Progress: of the run at hand each time, of all others once in a while."""
        if self._progress is None or self._progress.disable:
            return
        if self._estimates is None or time.monotonic() > self._refresh:
            self._estimates, self._refresh = estimate.Estimates(self.runs), time.monotonic() + _REFRESH
            self._whole = sum(self._estimates.whole(run) for run in self.runs) or 1.0
            pending = [run for run in self.runs if self._is_pending(run)]
            self._pending = {run.name: self._estimates.left(run) for run in pending}
        if running is not None and running.name in self._pending:
            self._pending[running.name] = self._estimates.left(running)
        left = sum(self._pending.values())
        done = len(self.runs) - len(self._pending)
        text = f"{done} of {len(self.runs)} runs, {estimate.duration(left)} of work left"
        self._progress.update(self._task, completed=1.0 - left / self._whole, description=text)


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _failure(status: int, last: str) -> str:
    """Why a child ended, by its exit status and the last line that it printed."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}: {last}"
    return last or f"exit status {status}"


def _last_line(path: Path) -> str:
    with open_regular(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
        lines = file.read(_LAST_BYTES).decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
