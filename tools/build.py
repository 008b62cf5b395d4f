# SPDX-License-Identifier: Apache-2.0
"""Compile what changed of the C++ parts, with a line for each file, so that a build of minutes does not look hung.

pip, which installs the package afterwards, finds all compiled; it shows nothing of what it runs, or everything.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_DONE = re.compile(r"\[(\d+)/(\d+)\] (.*)")  # as ninja says it
_SOURCE = re.compile(r"\S+\.(?:cpp|cu)\b")


def progress(lines: Iterable[str]) -> Iterator[str]:
    """What to show of the lines that ninja prints: number, of how many, and the source file."""
    start = time.monotonic()
    for line in lines:
        if found := _DONE.match(line):
            number, count, rest = found.groups()
            sources = _SOURCE.findall(rest)
            name = Path(sources[-1]).name if sources else rest.split()[0]
            yield f"  {number:>{len(count)}}/{count}  {name:<30}{time.monotonic() - start:5.0f} s"


def main(command: list[str]) -> int:
    said: list[str] = []

    def output(process: subprocess.Popen[str]) -> Iterator[str]:
        for line in process.stdout or ():
            said.append(line)
            yield line

    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in progress(output(process)):
            print(line, flush=True)
    if process.returncode:
        sys.stderr.writelines(said)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main([sys.executable, "setup.py", "-q", "build_ext"]))
