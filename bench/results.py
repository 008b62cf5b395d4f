# SPDX-License-Identifier: Apache-2.0
"""Rows, what sums them up, and their forms: terminal, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from sparsebwd.data.files import atomic_write, json_text, write_text

from .terminal import Table, fitting, machine, not_shown

COPY = "copy"
"""The baseline of pruning."""


@dataclass(frozen=True)
class Row:
    """One measurement. Fields are the columns of JSON and CSV, in this order.

    suite: or the file of captured gradients; None for a single problem.
    multiplicity: layers of the network that have this problem.
    density: of the gradient that is consumed or, by pruning, made. nominal_density: its expectation as asked for; None
        where it follows from a percentile or from what was captured. percentile: None where nothing is pruned.
    pattern: of the gradient before pruning: "iid" or "skewed" zeros, or "rows" of them, "heavy-tailed", or "captured" in training.
    device: "cpu" or "cuda". math: of float32 on a GPU, "strict" or "tf32"; else None. threads: of PyTorch's pool, on a
        CPU; else None.
    sparse_ms, dense_ms: medians; dense_ms is the time of `baseline`: the faster of two layouts, or "copy".
    speedup: dense_ms / sparse_ms.
    gflops: useful GFLOP/s of the candidate. of_peak: these / those of the fastest dense product, same dtype, math and
        threads.
    rel_error: norm of the error against float64 / norm of the result. dense_rel_error: that of dense PyTorch.
    spread: interquartile range / median of the samples, the larger one of candidate and baseline.
    bytes: read or written at least; flops: useful ones.
    error: what is wrong with the result, in which case it was not timed.
    command: repeats the row.
    """

    suite: str | None
    layer: str
    problem: str
    multiplicity: int
    op: str
    density: float
    nominal_density: float | None
    percentile: float | None
    pattern: str
    dtype: str
    layout: str
    backend: str
    device: str
    math: str | None
    threads: int | None
    sparse_ms: float | None
    dense_ms: float | None
    speedup: float | None
    gflops: float | None
    of_peak: float | None
    rel_error: float | None
    dense_rel_error: float | None
    spread: float | None
    baseline: str | None
    bytes: int
    flops: int
    error: str | None
    command: str


@dataclass(frozen=True)
class Column:
    """A column of the tables for people. It is left out, and said below, where all rows have the same entry."""

    heading: str
    cell: Callable[[Row], str]
    right: bool = True
    may_collapse: bool = False


def _number(form: str, name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = getattr(row, name)
        return "-" if value is None else format(value, form)

    return cell


def _speedup(row: Row) -> str:
    if row.error:
        return "WRONG"
    return ("costs " if row.baseline == COPY else "") + _gain(row.baseline, row.speedup)


def _density(actual: float, nominal: float | None) -> str:
    """The one that was asked for, which random zeros miss by little, or that which resulted."""
    return f"{actual:.3g}" if nominal is None else f"{nominal:g}"


def _gain(baseline: str, speedup: float) -> str:
    """A speed-up in words, "2.31x", and against a copy its inverse, "1.80 copies"."""
    return f"{1 / speedup:.2f} copies" if baseline == COPY else f"{speedup:.2f}x"


COLUMNS = (
    Column("suite", lambda row: row.suite or "-", right=False, may_collapse=True),
    Column("layer", lambda row: row.layer if row.suite else "-", right=False, may_collapse=True),
    Column("problem", lambda row: row.problem, right=False),
    Column("times", _number("d", "multiplicity"), may_collapse=True),
    Column("op", lambda row: row.op, right=False),
    Column("density", lambda row: _density(row.density, row.nominal_density)),
    Column("percentile", _number("g", "percentile"), may_collapse=True),
    Column("pattern", lambda row: row.pattern, right=False, may_collapse=True),
    Column("dtype", lambda row: row.dtype, right=False, may_collapse=True),
    Column("layout", lambda row: row.layout, right=False, may_collapse=True),
    Column("backend", lambda row: row.backend, right=False, may_collapse=True),
    Column("device", lambda row: row.device, right=False, may_collapse=True),
    Column("math", lambda row: row.math or "-", right=False, may_collapse=True),
    Column("threads", _number("d", "threads"), may_collapse=True),
    Column("sparse ms", _number(".3f", "sparse_ms")),
    Column("dense ms", _number(".3f", "dense_ms")),
    Column("against", lambda row: row.baseline or "-", right=False, may_collapse=True),
    Column("speed-up", _speedup),
    Column("GFLOP/s", _number(".1f", "gflops")),
    Column("of peak", _number(".0%", "of_peak")),
    Column("error", _number(".1e", "rel_error")),
    Column("spread", _number(".0%", "spread")),
)


SETTING = (
    "suite", "op", "nominal_density", "percentile", "pattern", "dtype", "layout", "backend", "device", "math", "threads",
)  # fmt: skip
"""What the layers that are summed up have in common."""


def summarize(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each operation and density or percentile (and suite, dtype, layout, backend, device and so on): the geometric
    mean of the speed-ups, the dense total / the sparse total with each layer counted as often as it occurs, the worst layer.

    Rows whose result is wrong are in none of them; `wrong` is how many there are.
    """
    return [_summary(group) for group in _grouped(rows, SETTING).values()]


def _grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple, list[Row]]:
    """Rows that agree in these fields, in the order in which they came."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups


def _summary(group: Sequence[Row]) -> dict[str, Any]:
    first = group[0]
    summary = {name: getattr(first, name) for name in SETTING}
    summary["density"] = fmean(row.density for row in group)
    timed = [row for row in group if row.error is None]
    summary |= {"layers": len(timed), "wrong": len(group) - len(timed)}
    if not timed:
        return summary | dict.fromkeys(("geometric_mean", "total_ratio", "worst_layer", "worst_speedup", "baseline"))
    worst = min(timed, key=lambda row: row.speedup)
    dense, sparse = (sum(row.multiplicity * getattr(row, name) for row in timed) for name in ("dense_ms", "sparse_ms"))
    return summary | {
        "geometric_mean": geometric_mean(row.speedup for row in timed),
        "total_ratio": dense / sparse,
        "worst_layer": worst.layer,
        "worst_speedup": worst.speedup,
        "baseline": COPY if worst.baseline == COPY else "dense",
    }


BREAK_EVEN_SETTING = (
    "suite", "layer", "problem", "op", "pattern", "dtype", "layout", "backend", "device", "math", "threads",
)  # fmt: skip


def break_even(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each layer and operation (and pattern, dtype, layout, backend and so on) with several densities: up to which
    density sparse is faster than dense.

    `break_even` is the lowest density at which the speed-up falls below 1, by interpolation between the measured ones
    on logarithmic scales, on which a speed-up that goes with 1/density is a straight line. `relation` is "="; ">" where
    every measured speed-up is at least 1 (`break_even` is then the highest density that was measured); or "<" where
    that at the lowest density is not (the lowest). Rows against a copy have none, and density 0 does not count.
    """
    timed = [row for row in rows if row.speedup is not None and row.baseline != COPY and row.density > 0]
    found = []
    for group in _grouped(timed, BREAK_EVEN_SETTING).values():
        points = sorted((row.density, row.speedup) for row in group)
        if points[0][0] < points[-1][0]:
            relation, density = _break_even(points)
            setting = {name: getattr(group[0], name) for name in BREAK_EVEN_SETTING}
            found.append(setting | {"relation": relation, "break_even": density})
    return found


def _break_even(points: Sequence[tuple[float, float]]) -> tuple[str, float]:
    """Of (density, speed-up) by rising density."""
    if points[0][1] < 1:
        return "<", points[0][0]
    for (below, fast), (above, slow) in pairwise(points):
        if slow < 1:
            share = math.log(fast) / math.log(fast / slow)
            return "=", below * (above / below) ** share
    return ">", points[-1][0]


def break_even_table(rows: Iterable[Row]) -> Table | None:
    """A line for each layer, a column for each operation and whatever else differs; None without entries."""
    found = break_even(rows)
    if not found:
        return None
    names = ("op", "suite", "pattern", "dtype", "math", "layout", "backend", "threads")
    varying = [name for name in names if name == "op" or len({entry[name] for entry in found}) > 1]
    cells: dict[str, dict[str, str]] = {}
    for entry in found:
        heading = " ".join(str(entry[name] or "-") + (" threads" if name == "threads" else "") for name in varying)
        relation = "" if entry["relation"] == "=" else f"{entry['relation']} "
        cells.setdefault(entry["layer"], {})[heading] = f"{relation}{entry['break_even']:.2g}"
    headings = sorted({heading for line in cells.values() for heading in line})
    lines = [[layer, *(line.get(heading, "-") for heading in headings)] for layer, line in cells.items()]
    return Table("Break-even density: sparse is faster below it", ["layer", *headings], lines, left=["layer"])


def summary_line(summary: dict[str, Any]) -> str:
    """One line for people."""
    gradient = f"density {_density(summary['density'], summary['nominal_density'])}"
    if summary["percentile"] is not None:
        gradient += f" (percentile {summary['percentile']:g})"
    names = ("suite", "pattern", "dtype", "math", "layout", "backend")
    setting = ", ".join(part for part in (*(summary[name] for name in names), place(summary)) if part)
    wrong = f"{summary['wrong']} WRONG; " if summary["wrong"] else ""
    if not summary["layers"]:
        return f"{summary['op']} at {gradient} [{setting}]: {wrong}nothing was timed"
    mean, total, worst = (
        _gain(summary["baseline"], summary[name]) for name in ("geometric_mean", "total_ratio", "worst_speedup")
    )
    line = f"{summary['op']} at {gradient} [{setting}]: {wrong}{'costs ' if summary['baseline'] == COPY else ''}{mean}"
    if summary["layers"] > 1:
        line += f" (geometric mean of {summary['layers']} layers), {total} in total, worst {worst} ({summary['worst_layer']})"
    return line


def place(setting: Mapping[str, Any]) -> str:
    """Where it ran: "2 threads", or the device that has none."""
    threads = setting["threads"]
    return setting["device"] if threads is None else f"{threads} thread" + ("s" if threads > 1 else "")


# ---- terminal


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table, a line for each summary, and the break-even densities."""
    columns, common = _visible(rows)
    cells = {column.heading: [column.cell(row) for row in rows] for column in columns}
    shown = fitting(cells, _OPTIONAL if "layer" in cells else _OPTIONAL[1:], console.width)
    left_out = [heading for heading in cells if heading not in shown]
    columns = [column for column in columns if column.heading in shown]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(column.cell(row), "bold red" if row.error else "") for column in columns))
    unlimited = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
    if common:
        console.print(Text(f"all rows: {common}"), soft_wrap=True)
    if left_out:
        console.print(Text(not_shown(left_out)), soft_wrap=True)
    for row in rows:
        if row.error:
            console.print(Text(f"WRONG RESULT, not timed: {row.command}\n  {row.error}", "bold red"), soft_wrap=True)
    console.print()
    for summary in summarize(rows):
        console.print(Text(summary_line(summary)), soft_wrap=True)
    table = break_even_table(rows)
    if table is not None:
        table.show(console)


_OPTIONAL = ("problem", "times", "error", "GFLOP/s", "against", "of peak")
"""Columns that are left out where there is no room for them, the first first."""


def _visible(rows: Sequence[Row]) -> tuple[list[Column], str]:
    """The columns to be shown, and what is to be said of the others."""
    columns, common = [], []
    for column in COLUMNS:
        entries = {column.cell(row) for row in rows}
        if not column.may_collapse or len(entries) > 1:
            columns.append(column)
        elif entries != {"-"}:
            common.append(f"{column.heading} {entries.pop()}")
    return columns, ", ".join(common)


# ---- files


def write_json(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    record = {
        "environment": environment,
        "rows": [asdict(row) for row in rows],
        "summary": summarize(rows),
        "break_even": break_even(rows),
    }
    write_text(path, json_text(record) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_markdown(path: Path, environment: dict[str, Any], rows: Sequence[Row]) -> None:
    columns, common = _visible(rows)
    lines = [
        machine(environment) + (f" All rows: {common}." if common else ""),
        "",
        _markdown_line(column.heading for column in columns),
        _markdown_line("--:" if column.right else ":--" for column in columns),
        *(_markdown_line(column.cell(row) for column in columns) for row in rows),
        "",
        *(f"- {summary_line(summary)}" for summary in summarize(rows)),
    ]
    table = break_even_table(rows)
    if table is not None:
        lines += ["", table.markdown().rstrip()]
    write_text(path, "\n".join(lines) + "\n")


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
