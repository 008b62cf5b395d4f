# SPDX-License-Identifier: Apache-2.0
"""This measurement against an earlier one: what has become slower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from sparsebwd.opening import read_json

from .results import SETTING, Row
from .terminal import Table

_KEY = ("suite", "layer", "problem", *SETTING[1:])
"""What identifies a row."""

_ENVIRONMENT = {
    "CPU": ("cpu", "name"),
    "instruction set": ("cpu", "isa", "in_use"),
    "GPU": ("gpu", "name"),
    "driver": ("gpu", "driver"),
    "cuDNN": ("gpu", "cudnn"),
    "torch": ("torch",),
    "environment variables": ("variables",),
}
"""What speed-ups depend on besides this package, and where a record of the environment has it."""


@dataclass(frozen=True)
class Change:
    """A speed-up then and now. regression: it is lower by more than chance explains, or the result is now wrong."""

    what: tuple[str, ...]
    old: float | None
    new: float | None
    regression: bool

    def cells(self) -> list[str]:
        old, new = ("WRONG" if value is None else f"{value:.2f}x" for value in (self.old, self.new))
        both = self.old is not None and self.new is not None
        change = f"{self.new / self.old - 1:+.1%}" if both else "-"
        return [*self.what, old, new, change, "REGRESSION" if self.regression else ""]


@dataclass
class Comparison:
    """rows, summaries: what both have. only_old, only_new: rows that the other one lacks, in words.
    environment: how the machines differ, in words."""

    rows: list[Change] = field(default_factory=list)
    summaries: list[Change] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> int:
        return sum(change.regression for change in (*self.rows, *self.summaries))


def load(path: Path, option: str = "compare") -> dict[str, Any]:
    """The record that ``--json`` wrote: environment and rows. Raises ValueError for anything else."""
    try:
        record = read_json(path)
    except OSError as error:
        raise ValueError(f"{option}: {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option}: {path} is not JSON ({error})") from error
    try:
        for row in record["rows"]:
            for name in ("layer", "problem", "op", "pattern", "dtype", "layout", "backend"):
                if not isinstance(row[name], str):
                    raise TypeError(f"{name} is {row[name]!r}")
            hash(_key(row))
            for name in ("density", "percentile", "speedup", "spread"):
                if row[name] is not None and not (isinstance(row[name], int | float) and row[name] >= 0):
                    raise TypeError(f"{name} is {row[name]!r}")
            if row["speedup"] == 0:
                raise TypeError("speedup is 0")
        if not isinstance(record["environment"], dict):
            raise TypeError("environment is not an object")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{option}: {path} was not written by `python -m sparsebwd.bench --json` ({type(error).__name__}: {error})"
        ) from error
    return record


def compare(
    old: Mapping[str, Any], environment: Mapping[str, Any], rows: Iterable[Row], tolerance: float
) -> Comparison:
    """Match rows of the two measurements and compare their speed-ups, which carry over between machines; times do not.

    A row is a regression if its speed-up is lower by more than the spread of both measurements together and by more
    than `tolerance`, a fraction. So is a summary, the geometric mean over the rows that both have; its spread is that of
    the mean of independent rows.
    """
    before = {_key(row): row for row in old["rows"]}
    now = {_key(row): row for row in map(asdict, rows)}
    found = Comparison(
        only_old=[_words(key) for key in before if key not in now],
        only_new=[_words(key) for key in now if key not in before],
        environment=_differences(old["environment"], environment),
    )
    groups: dict[tuple, list[tuple[float, float, float]]] = {}
    for key, row in now.items():
        if key not in before:
            continue
        then, speedup = before[key]["speedup"], row["speedup"]
        regression = then is not None and speedup is None
        if then is not None and speedup is not None:
            spread = (before[key]["spread"] or 0) + (row["spread"] or 0)
            regression = speedup < then * (1 - max(spread, tolerance))
            groups.setdefault((key[0], *key[3:]), []).append((then, speedup, spread))
        found.rows.append(Change((row["layer"], *_setting(key[3:])), then, speedup, regression))
    for key, group in groups.items():
        olds, news, spreads = zip(*group)
        then, speedup, spread = geometric_mean(olds), geometric_mean(news), math.hypot(*spreads) / len(group)
        what = (f"geometric mean of {len(group)}" + (f", {key[0]}" if key[0] else ""), *_setting(key[1:]))
        found.summaries.append(Change(what, then, speedup, speedup < then * (1 - max(spread, tolerance))))
    return found


def table(comparison: Comparison, path: Path) -> Table:
    """For people: a line for each row, below them one for each summary."""
    changes = [*comparison.rows, *comparison.summaries]
    headings = ["layer", "op", "gradient", "dtype", "layout", "backend", "threads", "old", "new", "change", ""]
    left = [*headings[:6], ""]
    notes = []
    if comparison.environment:
        notes.append(f"the machines differ: {'; '.join(comparison.environment)}")
    for where, missing in (("in this measurement", comparison.only_old), (f"in {path}", comparison.only_new)):
        if missing:
            shown = "; ".join(missing[:3]) + ("; ..." if len(missing) > 3 else "")
            notes.append(f"{len(missing)} of the rows are not {where}: {shown}")
    if not changes:
        notes.append(f"nothing to compare: {path} has none of these rows")
    elif comparison.regressions:
        notes.append(f"{comparison.regressions} REGRESSIONS")
    else:
        notes.append("no regression")
    cells = [change.cells() for change in changes]
    return Table(f"Speed-ups, before ({path}) and now", headings, cells, left, notes)


def _key(row: Mapping[str, Any]) -> tuple:
    """Records of earlier versions have no nominal density, theirs was the density, and no device, theirs was a CPU."""
    missing = {"nominal_density": row["density"] if row["percentile"] is None else None, "device": "cpu", "math": None}
    return tuple(row.get(name, missing[name]) if name in missing else row[name] for name in _KEY)


def _setting(key: Sequence[Any]) -> tuple[str, ...]:
    """Operation, gradient and the rest of the setting, for the table."""
    op, density, percentile, pattern, dtype, layout, backend, device, math, threads = key
    gradient = [pattern]
    if density is not None:
        gradient.append(f"{density:g}")
    if percentile is not None:
        gradient.append(f"percentile {percentile:g}")
    where = device if threads is None else str(threads)
    return op, " ".join(gradient), " ".join(filter(None, (dtype, math))), layout, backend, where


def _words(key: tuple) -> str:
    suite, layer, problem, *setting = key
    return " ".join(part for part in (suite, layer if suite else problem, *_setting(setting)) if part)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for name, path in _ENVIRONMENT.items():
        then, now = old, new
        for part in path:
            then, now = (side.get(part) if isinstance(side, Mapping) else None for side in (then, now))
        if then != now:
            found.append(f"{name} {then or 'unknown'}, now {now or 'unknown'}")
    return found
