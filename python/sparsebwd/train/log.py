# SPDX-License-Identifier: Apache-2.0
"""The log of a run: `epochs.csv` and `log.json`, rewritten after each epoch, and `steps.csv`, which grows."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import atomic_write, write_json, write_text
from ..opening import read_rows

CSV_FILE, JSON_FILE, STEPS_FILE = "epochs.csv", "log.json", "steps.csv"

# One row per epoch and variant. Times are medians over the epoch's steps; density is the mean over its measured steps.
COLUMNS = (
    "epoch",  # from 1
    "variant",  # sparse or dense
    "global_step",  # steps since the start of the run
    "complete",  # 0 where the run stopped within the epoch
    "learning_rate",  # of the last step
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "step_ms",
    "forward_ms",
    "backward_ms",
    "conv_backward_ms",
    "density",
)

# One row per step and variant, with the loss that was trained on: label smoothing is in it.
STEP_COLUMNS = (
    "global_step",  # from 1
    "variant",
    "learning_rate",
    "loss",  # mean over the batch, before the update
    "step_ms",  # empty where densities were measured
)


class RunLog:
    """Writes what is known of a run into a folder.

    Args:
        folder: created where it does not exist.
        header: what does not change during the run: configuration, environment, data.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._header = header

    def write(self, history: list[dict[str, Any]], summary: dict[str, Any] | None = None) -> None:
        """Replace both files."""
        with atomic_write(self.folder / CSV_FILE) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            for entry in history:
                for variant, row in entry["variants"].items():
                    complete = int(entry["complete"])
                    writer.writerow({**entry, **row, "variant": variant, "complete": complete})
        record = {"format": 1, **self._header, "epochs": history, "summary": summary}
        write_json(self.folder / JSON_FILE, record)


class StepLog:
    """Appends to `steps.csv` after each step. Rows of steps that a resumed run does again are dropped before.

    Args:
        folder: where it is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STEPS_FILE
        self._file = None

    def begin(self, step: int, variants: Sequence[str]) -> int:
        """Keep the rows of the first `step` steps, those of each variant, and go on behind them.

        Returns:
            how many of those steps are not there.
        """
        kept: dict[tuple[int, str], str] = {}
        if step and self.path.is_file():
            for line in read_rows(self.path):
                number, _, rest = line.partition(",")
                key = int(number) if number.isdecimal() and len(number) < 20 else 0, rest.partition(",")[0]
                if 0 < key[0] <= step and key[1] in variants and line.count(",") == len(STEP_COLUMNS) - 1:
                    kept[key] = line
        write_text(self.path, "".join([",".join(STEP_COLUMNS) + "\n", *kept.values()]))
        with self._naming():
            self._file = open(self.path, "a", encoding="utf-8")  # until `close`
        return step - len(kept) // len(variants)

    def add(self, step: int, rate: float, losses: dict[str, float], seconds: dict[str, float]) -> None:
        """Rows of a step, one for each variant, handed to the system at once. Nothing before `begin`."""
        if self._file is None:
            return
        times = {name: f"{1e3 * value:.3f}" for name, value in seconds.items()}
        with self._naming():
            for name, loss in losses.items():
                self._file.write(f"{step},{name},{rate:.8g},{loss:.8g},{times.get(name, '')}\n")
            self._file.flush()

    def sync(self) -> None:
        """Return when the rows are on the disk."""
        if self._file is not None:
            with self._naming():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        file, self._file = self._file, None
        with self._naming():
            file.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """An error of writing names the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
