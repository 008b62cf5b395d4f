# SPDX-License-Identifier: Apache-2.0
"""What :func:`sparsebwd.keep_memory` does for a training step. As that cannot be undone, in two processes of their own.

Each takes a step whenever it is told to; the steps of both are timed in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from torch import nn

from .. import memory
from .result import Alternative

NAME = "sparsebwd.keep_memory()"


class _Ended(RuntimeError):
    """A process could not do what it was told to."""


class _Child:
    """A process that takes steps."""

    def __init__(self, path: Path, keep: bool) -> None:
        command = [sys.executable, "-m", __name__, str(path), *(["keep"] if keep else [])]
        self.errors = tempfile.TemporaryFile("w+")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def step(self, _: None = None) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        if self.process.stdout.readline() != "done\n":
            self.process.wait()
            self.errors.seek(0)
            raise _Ended(self.errors.read().strip().rpartition("\n")[2] or f"exit status {self.process.returncode}")


def measure_kept(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss: Any, steps: int) -> Alternative:
    """A dense step with and without kept memory."""
    from ..bench.phases import WARMUP
    from ..bench.timing import Call, interleave

    if memory.kept():
        return Alternative(NAME, None, None, None, "this process has called it already, and all steps above are with it")
    optimizer.zero_grad()
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "step.pt"
        try:
            torch.save((model, optimizer, batch, loss, autocast, torch.get_num_threads()), path)
            children = {name: stack.enter_context(_Child(path, keep=name == "kept")) for name in ("as is", "kept")}
            times = interleave({name: Call(child.step, lambda: None) for name, child in children.items()}, steps, WARMUP)
        except (PicklingError, AttributeError, TypeError, _Ended) as error:
            note = f"{' '.join(str(error).split())}; the model, or its loss, is not to be had in another process"
            return Alternative(NAME, None, None, None, note)
    return Alternative(NAME, *(1e3 * times[name].seconds for name in ("as is", "kept")), None)


def _take_steps(path: str, keep: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the model prints
    if keep and not memory.keep_memory():
        sys.exit("freed memory cannot be kept here")
    from .measure import _loss_of

    model, optimizer, batch, loss, autocast, threads = torch.load(path, weights_only=False)
    torch.set_num_threads(threads)
    for _ in sys.stdin:
        optimizer.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            value = _loss_of(loss, model, batch)
        value.backward()
        optimizer.step()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    _take_steps(sys.argv[1], keep=sys.argv[2:] == ["keep"])
