# SPDX-License-Identifier: Apache-2.0
"""The log of a run on disk: `epochs.csv` and `log.json`, rewritten as a whole after each epoch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ..data import atomic_write, write_text

CSV_FILE, JSON_FILE = "epochs.csv", "log.json"

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
        write_text(self.folder / JSON_FILE, json.dumps(record, indent=1) + "\n")
