# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench plot``: pictures of results that were measured before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from . import compare
from .results import Row
from .terminal import check_writable, fail

SUFFIXES = (".png", ".svg")


def command(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="What --json wrote.", show_default=False)],
    pictures: Annotated[list[Path], typer.Argument(metavar="FILE...", help="To draw: .png or .svg.", show_default=False)],
    overview: Annotated[
        bool, typer.Option("--overview", help="One panel, with means and ranges over all layers, not a line for each.")
    ] = False,
) -> None:
    """Draw speed-up against density from results that were measured before."""
    for path in pictures:
        if path.suffix.lower() not in SUFFIXES:
            raise typer.BadParameter(f"plot: got {str(path)!r}; accepted: {' or '.join(SUFFIXES)}", param_hint="FILE")
        check_writable(plot=path)
    try:
        record = compare.load(results, "plot")
        rows = rows_of(record)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS.json") from None
    draw(pictures, record["environment"], rows, overview)


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows of a record, also of one that is older than a column. Raises ValueError."""
    known = {field.name for field in fields(Row)}
    try:
        return [
            Row(**_YOUNGER | {name: value for name, value in row.items() if name in known}) for row in record["rows"]
        ]
    except TypeError as error:
        raise ValueError(f"plot: a row lacks columns: {error}") from None


_YOUNGER: dict[str, Any] = {"device": "cpu", "math": None, "dense_rel_error": None}


def draw(paths: Sequence[Path], environment: Mapping[str, Any], rows: Sequence[Row], overview: bool = False) -> None:
    """Fails in one line where it cannot."""
    try:
        from . import plot
    except ImportError as error:
        fail(f"error: plot: needs matplotlib, which is not installed ({error}); pip install matplotlib", 2)
    for path in paths:
        try:
            (plot.overview if overview else plot.write)(path, environment, rows)
        except OSError as error:
            fail(f"error: {error.filename}: {error.strerror}")
        except ValueError as error:
            fail(f"error: {error}")
