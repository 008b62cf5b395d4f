# SPDX-License-Identifier: Apache-2.0
"""``make zoo``: every network, or those whose names have one of the words given; with all, the table of docs/compatibility.md
is written. A process for each core, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor

import torch

from .architectures import ARCHITECTURES, Architecture
from .checks import Row, check
from .table import table, write


def main(words: list[str]) -> int:
    chosen = [one for one in ARCHITECTURES if not words or any(word in str(one) for word in words)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, torch.set_num_threads, (1,)) as pool:
        rows = [row for row in pool.map(_checked, chosen) if row is not None]
    if len(rows) == len(ARCHITECTURES):
        write(rows)
    else:
        print(table(rows))
    failed = len(chosen) - len(rows)
    print(f"{len(rows)} passed, {failed} failed")
    return 1 if failed or not chosen else 0


def _checked(architecture: Architecture) -> Row | None:
    """None if something is wrong, which is printed."""
    start, row, said = time.perf_counter(), None, "as it should be"
    try:
        row = check(architecture)
    except AssertionError as error:
        said = f"WRONG: {error}"
    except Exception:  # of any library
        said = f"FAILED: {traceback.format_exc()}"
    print(f"{architecture}: {said} ({time.perf_counter() - start:.1f} s)", flush=True)
    return row

