# SPDX-License-Identifier: Apache-2.0
"""What a sweep starts for each run: a command that ends, with a checkpoint, when the sweep does, in whatever way."""

from __future__ import annotations

import os
import signal
import sys
import threading

from ..train import cli
from . import timing

COMMANDS = {"train": cli.main, "timing": timing.main}


def main() -> int:
    """`train` with arguments of the training command, or `timing` with those of `timing.main`. Standard input is a pipe
    that nothing is written to: its end is that of the sweep."""
    threading.Thread(target=_terminate_at_end_of_input, daemon=True).start()
    return COMMANDS[sys.argv[1]](sys.argv[2:])


def _terminate_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
