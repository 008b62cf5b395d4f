# SPDX-License-Identifier: Apache-2.0
"""Reads the directories of runs, whoever made them, and puts runs that differ in nothing but the seed into one row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from ..settings import KNOBS
from ..train import log
from ..train.config import TrainConfig
from . import estimate, timing
from .paper import DENSE, Table
from .runs import FAILED_FILE, LENGTH, OF_SPARSE, read_json, read_log, reading

COLLAPSED = 20.0
"""Percentage points below dense from which on a run is called collapsed."""

# Runs that differ in these only are of one row.
_NO_SETTING = {
    "seed", "data_dir", "cache_dir", "workers", "skip_unreadable", "checkpoint_steps", "measure_every", "threads",
    "device", "recipe", "form", "stream", "compare", "tensorboard",
}  # fmt: skip
_AS_LONG = 0.05
"""A dense run is at equal time with a sparse one if its time is within this share of it."""


@dataclass
class Result:
    """One run. Accuracies in %; those of a run that is not finite are None."""

    name: str
    folder: Path
    config: dict[str, Any]
    data: str
    classes: int
    image_size: int
    kind: str  # see kind_of
    steps: int
    finite: bool
    test_accuracy: float | None
    train_accuracy: float | None
    density: float | None  # mean over the run, all elements of the layers that prune
    weighted_density: float | None  # by the multiply-adds of both backward convolutions of all layers
    timing: dict[str, Any] | None

    @property
    def settings(self) -> tuple[tuple[str, Any], ...]:
        """All that a dense run and its sparse ones have in common, but for the length."""
        ignored = _NO_SETTING | OF_SPARSE | set(LENGTH) | {"dense", "model"}
        return tuple(sorted((name, value) for name, value in self.config.items() if name not in ignored))

    @property
    def length(self) -> tuple[tuple[str, Any], ...]:
        return tuple((name, self.config[name]) for name in LENGTH)

    @property
    def label(self) -> str:
        """Of a line in a figure, but for the length."""
        name = {DENSE: "dense", "none": "zeros skipped only"}.get(self.kind) or _equation(self.kind)
        return ", ".join([name, *(f"{key}={value}" for key, value in self.sparsity)])

    @property
    def sparsity(self) -> tuple[tuple[str, Any], ...]:
        """What is not the default of what tells sparse runs apart, but for the percentile."""
        if self.kind == DENSE:
            return ()
        defaults = asdict(TrainConfig())
        names = sorted(OF_SPARSE - set(KNOBS))
        return tuple((name, self.config[name]) for name in names if self.config[name] != defaults[name])


@dataclass
class Row:
    """Runs with all settings in common but for the seed. Accuracies in %, spreads are standard deviations of a sample."""

    model: str
    data: str
    kind: str
    settings: str
    runs: int
    not_finite: int
    steps: int
    hours: float | None  # steps by the median time of a step, measured dense and sparse in turns
    as_long_as: str  # of a dense row: the kinds whose rows take as long
    test_accuracy: float | None
    test_spread: float | None
    difference: float | None  # to the dense row with the same settings, in points
    train_accuracy: float | None
    train_spread: float | None
    density: float | None
    weighted_density: float | None
    backward_speedup: float | None
    step_speedup: float | None
    timed_density: float | None
    timed_quietly: bool | None
    dense_step_ms: float | None
    collapsed: int
    paper_accuracy: float | None
    paper_density: float | None
    names: str

    @property
    def note(self) -> str:
        notes = []
        if self.as_long_as:
            notes.append(f"dense at the time of {', '.join(map(_equation, self.as_long_as.split(', ')))}")
        if self.not_finite:
            notes.append(f"{self.not_finite} of {self.runs} runs ended: loss not finite")
        if self.collapsed:
            notes.append(f"COLLAPSED: {self.collapsed} of {self.runs}")
        if self.timed_quietly is False:
            notes.append("timed beside other work")
        return "; ".join(notes)


COLUMNS = tuple(field.name for field in fields(Row))


def read(output: Path) -> list[Result]:
    """All runs in a folder that are at their end. Raises WrongContents for a file that is no log of one."""
    found = []
    for path in sorted(output.glob(f"*/{log.JSON_FILE}")):
        with reading(path.parent):
            found += _read(path.parent)
    return found


def rows(results: Sequence[Result], table: Table, data: str) -> list[Row]:
    """Those of one data set, by settings, model and percentile; shorter dense ones, as long as sparse ones take, come last."""
    families: dict[tuple, list[Result]] = {}
    for result in results:
        if result.data == data:
            families.setdefault((result.settings, result.config["model"]), []).append(result)
    order = {name: place for place, name in enumerate(table.rows)}
    shown = varying([key[0] for key in families])
    found = []
    for key in sorted(families, key=lambda key: (str(key[0]), order.get(key[1], len(order)), key[1])):
        found += _family(families[key], table if data == table.data else None, shown)
    return found


def _family(family: list[Result], table: Table | None, shown: set[str]) -> list[Row]:
    """Rows of one model with the same settings, whose dense runs all others are compared with."""
    groups: dict[tuple, list[Result]] = {}
    for result in family:
        groups.setdefault((result.length, result.kind, result.sparsity), []).append(result)
    whole = max(result.steps for result in family)
    shown = shown | varying([key[0] for key in groups])
    dense_ms = dense_step_ms(family)

    def order(key: tuple) -> tuple:
        steps = max(result.steps for result in groups[key])
        return key[1] == DENSE and steps < whole, place(key[1]), -steps, str(key)

    longest = max((key for key in groups if key[1] == DENSE), key=lambda key: groups[key][0].steps, default=None)
    found = []
    for key in sorted(groups, key=order):
        same = (key[0], DENSE, ())
        dense = groups.get(longest if key[1] == DENSE or same not in groups else same, [])
        found.append(_row(groups[key], dense, table, shown, dense_ms))
    for row in found:
        if row.kind == DENSE and row.steps < whole and row.hours:
            near = [other for other in found if other.kind != DENSE and other.hours]
            row.as_long_as = ", ".join(
                other.kind for other in near if abs(other.hours - row.hours) <= _AS_LONG * other.hours
            )
    return found


def data_of(record: dict[str, Any]) -> str:
    """The data set of a log. A folder of images that is as large as one of the paper's is taken for it."""
    name, about = record["config"]["data"], record["data"]
    if name != "imagefolder":
        return name
    if about["classes"] == 1000:
        return "imagenet"
    return {10: "cifar10", 100: "cifar100"}.get(about["classes"], name) if about["image_size"] == 32 else name


def kind_of(config: dict[str, Any], variant: str) -> str:
    """How much a run prunes: "dense", "none", a percentile as the paper's tables have it ("90"), or "noise 0.1"."""
    if variant == DENSE:
        return DENSE
    asked = {name: config[name] for name in KNOBS if config[name] is not None}
    return next((f"{value:g}" if name == "percentile" else f"{name} {value:g}" for name, value in asked.items()), "none")


def _equation(kind: str) -> str:
    name, _, value = kind.rpartition(" ")
    return f"{name or 'p'} = {value}"


def _read(folder: Path) -> list[Result]:
    """Of a run with its twin there are two."""
    record, failed = read_log(folder), (folder / FAILED_FILE).exists()
    if record is None or (record.get("summary") is None and not failed):
        return []
    config = {**asdict(TrainConfig()), **record["config"]}
    entries = record["epochs"]
    names = list(entries[-1]["variants"]) if entries else [DENSE if config["dense"] else "sparse"]
    results = []
    for variant in names:
        history = [(entry["global_step"], entry["variants"][variant]) for entry in entries]
        last = history[-1][1] if history and not failed else {}
        times = _read_times(folder)
        if times is None and len(names) > 1 and record["summary"] is not None:
            times = {"speedup": record["summary"]["speedup"], "variants": record["summary"]["variants"], "quiet": None}
        results.append(
            Result(
                folder.name,
                folder,
                config,
                data_of(record),
                record["data"]["classes"],
                record["data"]["image_size"],
                kind_of(config, variant),
                entries[-1]["global_step"] if entries else 0,
                not failed,
                _percent(last.get("test_accuracy")),
                _percent(last.get("train_accuracy")),
                _over_run(history, lambda row: row["density"]),
                _over_run(history, lambda row: _weighted(row["layers"], config)),
                None if variant == DENSE else times,
            )
        )
    return results


def _read_times(folder: Path) -> dict[str, Any] | None:
    """What was measured, with all that rows are made of. Raises KeyError or TypeError where it lacks some of it."""
    times = read_json(folder / timing.FILE)
    for path in (("quiet",), ("speedup", "step"), ("speedup", "backward"), ("variants", "dense", "step_ms")):
        found = times
        for name in path if times is not None else ():
            found = found[name]
    return times


def _over_run(history, value) -> float | None:
    """Mean over the steps of a run of what is known for each epoch."""
    total = weight = before = 0.0
    for step, row in history:
        if (found := value(row)) is not None:
            total += (step - before) * found
            weight += step - before
        before = step
    return total / weight if weight else None


def _weighted(layers: dict[str, dict[str, float]] | None, config: dict[str, Any]) -> float | None:
    """The share of the multiply-adds that is left of both backward convolutions. Layers that were not converted count
    as dense; the first layer has no AGB."""
    densities = {name: values["density"] for name, values in (layers or {}).items() if "density" in values}
    if not densities:
        return None
    trained = TrainConfig(**{name: config[name] for name in ("model", "form", "width", "image_size")})
    work = estimate.multiply_adds(trained.model, trained.network_form, trained.width, trained.image_size)
    weights = {name: value * (1 if index == 0 else 2) for index, (name, value) in enumerate(work.items())}
    return sum(weight * densities.get(name, 1.0) for name, weight in weights.items()) / sum(weights.values())


def dense_step_ms(group: Sequence[Result]) -> float | None:
    """Median over the measurements beside sparse runs."""
    return _median([entry["variants"]["dense"]["step_ms"] for entry in _times(group)])


def step_ms(group: Sequence[Result], dense_ms: float | None) -> float | None:
    """Of runs of one kind: the dense time, divided by their own speed-up, since the two were measured in turns."""
    if group[0].kind == DENSE or dense_ms is None:
        return dense_ms
    speedup = _median([entry["speedup"]["step"] for entry in _times(group)])
    return dense_ms / speedup if speedup else None


def _times(group: Sequence[Result]) -> list[dict[str, Any]]:
    """Measurements; those beside other work only where there are no others."""
    times = [result.timing for result in group if result.timing is not None]
    return [entry for entry in times if entry["quiet"] is not False] or times


def _row(group: list[Result], dense: list[Result], table: Table | None, shown: set[str], dense_ms: float | None) -> Row:
    first = group[0]
    reference = _mean([result.test_accuracy for result in dense])
    accuracy = _mean([result.test_accuracy for result in group])
    times = _times(group)
    steps = max(result.steps for result in group)
    time = step_ms(group, dense_ms)
    collapsed = sum(_collapsed(result, reference) for result in group)
    paper = table.figures(first.config["model"], first.kind) if table else None
    described = [f"{name}={value}" for name, value in (*first.settings, *first.length) if name in shown]
    described += [f"{name}={value}" for name, value in first.sparsity]
    return Row(
        model=first.config["model"],
        data=first.data,
        kind=first.kind,
        settings=" ".join(described),
        runs=len(group),
        not_finite=sum(not result.finite for result in group),
        steps=steps,
        hours=steps * time / 3.6e6 if time else None,
        as_long_as="",
        test_accuracy=accuracy,
        test_spread=_spread([result.test_accuracy for result in group]),
        difference=accuracy - reference if accuracy is not None and reference is not None and dense != group else None,
        train_accuracy=_mean([result.train_accuracy for result in group]),
        train_spread=_spread([result.train_accuracy for result in group]),
        density=_mean([result.density for result in group]),
        weighted_density=_mean([result.weighted_density for result in group]),
        backward_speedup=_median([entry["speedup"]["backward"] for entry in times]),
        step_speedup=_median([entry["speedup"]["step"] for entry in times]),
        timed_density=_median([entry.get("density") for entry in times]),
        timed_quietly=None if not times else all(entry["quiet"] for entry in times),
        dense_step_ms=_median([entry["variants"]["dense"]["step_ms"] for entry in times]),
        collapsed=collapsed,
        paper_accuracy=paper[0] if paper else None,
        paper_density=paper[1] if paper else None,
        names=" ".join(sorted(result.name for result in group)),
    )


def _collapsed(result: Result, reference: float | None) -> bool:
    if result.test_accuracy is None:
        return not result.finite
    return reference is not None and result.test_accuracy < reference - COLLAPSED


def varying(settings: Sequence[tuple[tuple[str, Any], ...]]) -> set[str]:
    """Names of the settings that not all have in common."""
    values: dict[str, set[str]] = {}
    for entry in settings:
        for name, value in entry:
            values.setdefault(name, set()).add(json.dumps(value))
    return {name for name, found in values.items() if len(found) > 1}


def place(kind: str) -> tuple[str, float]:
    """Dense first, then by percentile, then by what else was asked for."""
    name, _, value = kind.rpartition(" ")
    return name, {DENSE: -2.0, "none": -1.0}.get(kind) or float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else 100 * value


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return mean(known) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return median(known) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = _known(values)
    return stdev(known) if len(known) > 1 else None
