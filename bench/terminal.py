# SPDX-License-Identifier: Apache-2.0
"""What the commands have in common: files to write, warnings, the state of the machine, tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from sparsebwd import keep_memory
from sparsebwd.commands import fail
from sparsebwd.data.files import check_replaceable, write_json, write_text

from .environment import OtherProcesses, environment

BUSY = 0.1
"""CPUs used by others above which a warning is due."""

FILE = {"dir_okay": False, "metavar": "FILE"}
"""Settings of an option that names a file to write."""

BATCH_SIZE = ("--batch-size", "--batch")
"""Names of the option: that of all commands, and the one that recorded commands have."""


def check_writable(**files: Path | None) -> None:
    """Refuse now rather than after the measurement."""
    for name, path in files.items():
        if path is not None:
            try:
                check_replaceable(path)
            except OSError as error:
                raise typer.BadParameter(f"{name}: got {str(path)!r}; {error.strerror}", param_hint=f"--{name}") from None
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise typer.BadParameter(
                    f"{name}: got {str(path)!r}; {folder} is not a folder to write to", param_hint=f"--{name}"
                )


def checked(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The callback of an option whose value, if there is one, ``check`` refuses by a ValueError."""

    def callback(value: Any) -> Any:
        try:
            return value if value is None else check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return callback


def warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def keep_freed_memory() -> str:
    """:func:`sparsebwd.keep_memory`. Returns what was done, in words."""
    return "freed memory is kept: sparsebwd.keep_memory()" if keep_memory() else "as is"


@contextmanager
def measuring(keep: bool = True) -> Iterator[dict[str, Any]]:
    """Freed memory is kept if `keep`; yields the environment, complete on leaving. Warns if others use the machine."""
    found = environment() | {"allocator": keep_freed_memory() if keep else "as is"}
    if found["load"] is not None and found["load"] > BUSY * found["cpu"]["cores"]:
        warn(f"this machine is busy (load {found['load']}); times may be off")
    others = OtherProcesses()
    yield found
    found["other_cpus"] = others.cpus()
    if found["other_cpus"] is not None and found["other_cpus"] > BUSY:
        warn(f"other processes used {found['other_cpus']} CPUs during the measurement; these times are no evidence")


def progress_bar() -> Progress:
    """A bar on stderr, where that is a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def machine(environment: dict[str, Any]) -> str:
    """The line above a table: what it was measured on."""
    gpu, cpu = environment.get("gpu"), environment["cpu"]
    more = f"driver {gpu.get('driver')}, cuDNN {gpu['cudnn']}" if gpu else f"{cpu['cores']} cores"
    return (
        f"{hardware(environment)}; {more}; torch {environment['torch']}, sparsebwd {environment['sparsebwd']}; "
        f"{environment['time']}."
    )


def hardware(environment: dict[str, Any]) -> str:
    """The GPU that was measured on, or else the CPU and the instruction set in use."""
    if "gpu" in environment:
        return environment["gpu"]["name"]
    return f"{environment['cpu']['name']}, {environment['cpu']['isa']['in_use']}"


def fitting(columns: Mapping[str, Sequence[str]], optional: Sequence[str], width: int) -> list[str]:
    """The headings of the columns that a table of this width has: all, or without those of `optional`, the first first, until
    the rest fits. columns: cells by heading."""
    shown = {heading: max(map(len, (heading, *cells))) for heading, cells in columns.items()}
    for heading in optional:
        if sum(shown.values()) + _GAP * (len(shown) - 1) <= width:
            break
        shown.pop(heading, None)
    return list(shown)


def not_shown(headings: Iterable[str]) -> str:
    """What a table says that has no room for these."""
    return f"not shown for want of width: {', '.join(headings)}; --json and --markdown have all, and so has a wider terminal"


_GAP = 2  # between columns


@dataclass(frozen=True)
class Table:
    """Cells as text. Columns whose heading is in `left` are aligned to the left. `notes` stand below, one a line. On a narrow
    terminal the columns `optional` are left out, the first first, as many as need be."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str]
    notes: Sequence[str] = ()
    optional: Sequence[str] = ()

    def show(self, console: Console) -> None:
        table = RichTable(box=None, pad_edge=False, show_edge=False, header_style="bold")
        shown = list(self.headings)
        if self.optional:
            shown = fitting(dict(zip(self.headings, zip(*self.rows))), self.optional, console.width)
        for heading in shown:
            table.add_column(heading, justify="left" if heading in self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(cell) for heading, cell in zip(self.headings, row) if heading in shown))
        # A cell that is cut off tells nothing; a terminal wraps long lines.
        unlimited = console.options.update(max_width=10_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
        console.print(Text(f"\n{self.title}", "bold"), soft_wrap=True)
        console.print(table)
        left_out = [heading for heading in self.headings if heading not in shown]
        for note in (*self.notes, *([not_shown(left_out)] if left_out else [])):
            console.print(Text(note), soft_wrap=True)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}\n",
            _markdown_line(self.headings),
            _markdown_line(":--" if heading in self.left else "--:" for heading in self.headings),
            *map(_markdown_line, self.rows),
            "",
            *(f"- {note}" for note in self.notes),
        ]
        return "\n".join(lines).rstrip() + "\n"


def report(tables: Sequence[Table], record: dict[str, Any], json: Path | None, markdown: Path | None) -> None:
    """Show the tables, and write files; fails if one cannot be written.

    Args:
        record: what goes into `json`, with "environment" and "setting", of which "command" repeats the measurement.
    """
    console = Console()
    for table in tables:
        table.show(console)
    try:
        if json:
            write_json(json, record)
        if markdown:
            heading = f"{machine(record['environment'])}\n\n`{record['setting']['command']}`\n\n"
            write_text(markdown, heading + "\n".join(table.markdown() for table in tables))
    except OSError as error:
        fail(f"error: {error.filename}: {error.strerror}")


def _markdown_line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
