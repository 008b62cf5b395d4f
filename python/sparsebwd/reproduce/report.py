# SPDX-License-Identifier: Apache-2.0
"""A table of results on the terminal, and as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from ..data import atomic_write, write_text
from .paper import Table
from .results import COLUMNS, Row

NOTES = (
    "Accuracy in %, mean ± standard deviation over the seeds; training accuracy is over the last epoch, as it trained.",
    "Density: non-zeros of the gradients that the convolutions consume, over the whole run: of all elements, as the paper "
    "counts, and weighted by multiply-adds.",
    "Speed-ups: of the whole backward pass and of whole steps timed dense and sparse in turns from the weights at the end of the run. Hours: "
    "steps by the median time of one. How long runs took beside other work is no evidence.",
    "Collapsed: 20 points below dense or more, or a loss that is not finite.",
)


def _number(form: str) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else format(value, form)


def _with_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "p": lambda row: row.kind,
    "settings": lambda row: row.settings,
    "runs": lambda row: str(row.runs),
    "test": lambda row: _with_spread(row.test_accuracy, row.test_spread),
    "to dense": lambda row: _number("+.2f")(row.difference),
    "train": lambda row: _with_spread(row.train_accuracy, row.train_spread),
    "paper": lambda row: _number(".2f")(row.paper_accuracy),
    "density": lambda row: _number(".3f")(row.density),
    "by work": lambda row: _number(".3f")(row.weighted_density),
    "paper's": lambda row: _number(".2f")(row.paper_density),
    "backward": lambda row: _times(row.backward_speedup),
    "step": lambda row: _times(row.step_speedup),
    "hours": lambda row: _number(".2f")(row.hours),
    "note": lambda row: row.note,
}


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def show(console: Console, table: Table, data: str, rows: Sequence[Row]) -> None:
    """Print it."""
    names = _shown(rows)
    view = RichTable(title=_title(table, data), title_justify="left")
    for name in names:
        text = name in ("model", "settings", "note")
        view.add_column(name, justify="left" if text else "right", no_wrap=not text)
    for row, after in zip(rows, [*rows[1:], None]):
        view.add_row(
            *(_COLUMNS[name](row) for name in names), style="red" if row.collapsed else None,
            end_section=after is None or after.model != row.model,
        )  # fmt: skip
    console.print(view)
    for note in NOTES:
        console.print(note, style="dim", markup=False, highlight=False)


def write(stem: Path, table: Table, data: str, rows: Sequence[Row]) -> list[Path]:
    """`stem`.csv, .json and .md, each whole or as it was before."""
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("csv", "json", "md")]
    with atomic_write(paths[0]) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "note"])
        writer.writeheader()
        writer.writerows({**asdict(row), "note": row.note} for row in rows)
    record = {"format": 1, "title": _title(table, data), "notes": NOTES, "rows": [asdict(row) for row in rows]}
    write_text(paths[1], json.dumps(record, indent=1) + "\n")
    write_text(paths[2], markdown(table, data, rows))
    return paths


def markdown(table: Table, data: str, rows: Sequence[Row]) -> str:
    names = _shown(rows)
    lines = [f"## {_title(table, data)}", "", _line(names), _line("---" for _ in names)]
    lines += [_line(_COLUMNS[name](row) for name in names) for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in NOTES)]) + "\n"


def _line(cells) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _shown(rows: Sequence[Row]) -> list[str]:
    """Columns in which any row has something."""
    return [name for name, cell in _COLUMNS.items() if any(cell(row) for row in rows)]


def _title(table: Table, data: str) -> str:
    return table.title if data == table.data else f"As {table.title.partition(':')[0]}, on {data}"
