# SPDX-License-Identifier: Apache-2.0
"""The table of networks in docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .checks import Row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
_BEGIN, _END = "<!-- written by make zoo -->", "<!-- end -->"


def between(page: str) -> list[str]:
    """The lines of the table in a page."""
    return page.partition(_BEGIN)[2].partition(_END)[0].splitlines()


def write(rows: Sequence[Row]) -> None:
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(_BEGIN)
    PAGE.write_text(f"{before}{_BEGIN}\n{table(rows)}\n{_END}{rest.partition(_END)[2]}", "utf-8")


def table(rows: Sequence[Row]) -> str:
    lines = ["| source | network | convolutions | converted | error | density at 90 | remarks |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.source, row.architecture, row.convolutions, row.converted, f"{row.error:.1f}", f"{row.density:.2f}", _remarks(row))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _remarks(row: Row) -> str:
    registered = [f"registered: {', '.join(row.registered)}"] if row.registered else []
    return "; ".join([*registered, *(f"{reason} ({count})" for reason, count in row.left)])
