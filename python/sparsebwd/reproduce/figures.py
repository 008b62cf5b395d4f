# SPDX-License-Identifier: Apache-2.0
"""Figure 3, loss per step, and what the paper does not show: accuracy against time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data import atomic_write
from ..train import log
from .paper import DENSE
from .results import Result
from .runs import read_json

FORMATS = ("png", "svg")
_POINTS = 600  # of a line, at most
_SMOOTHED = 100  # parts of a run that are averaged over


def losses(stem: Path, results: Sequence[Result]) -> list[Path]:
    """The loss of each step, a running mean over 1 % of the run, in a panel for each model and data set.

    Raises:
        ValueError: no run has logged its steps.
    """
    def draw(axes: Axes, group: Sequence[Result]) -> bool:
        drawn = False
        for kind, runs in _by_kind(group).items():
            curves = [curve for run in runs if (curve := _loss(run)) is not None]
            for index, (steps, values) in enumerate(curves):
                axes.plot(steps, values, color=_colour(kind), lw=1.1, label=_label(kind) if index == 0 else None)
            drawn = drawn or bool(curves)
        axes.set(xlabel="step", ylabel="training loss, smoothed", yscale="log")
        return drawn

    return _panels(stem, results, draw, "figure3: no run here has logged the loss of its steps (steps.csv)")


def accuracy_against_time(stem: Path, results: Sequence[Result]) -> list[Path]:
    """Test accuracy against hours: steps times the time of a step, which was measured dense and sparse in turns. The dense
    time of a model is the median over its runs; a sparse one is that, divided by the run's own speed-up.

    Raises:
        ValueError: no run was timed.
    """
    def draw(axes: Axes, group: Sequence[Result]) -> bool:
        times = [run.timing for run in group if run.timing is not None and run.timing["speedup"]["step"]]
        if not times:
            return False
        dense_ms = median(entry["variants"]["dense"]["step_ms"] for entry in times)
        for kind, runs in _by_kind(group).items():
            speedups = [run.timing["speedup"]["step"] for run in runs if run.timing]
            if kind != DENSE and not speedups:
                continue
            step_ms = dense_ms if kind == DENSE else dense_ms / median(speedups)
            for index, run in enumerate(runs):
                steps, values = _accuracies(run)
                hours = np.asarray(steps) * step_ms / 3.6e6
                axes.plot(hours, values, color=_colour(kind), lw=1.2, label=_label(kind) if index == 0 else None)
        axes.set(xlabel="hours of training, steps x time of a step", ylabel="test accuracy, %")
        return True

    return _panels(stem, results, draw, "accuracy against time: no run here was timed")


def _panels(
    stem: Path, results: Sequence[Result], draw: Callable[[Axes, Sequence[Result]], bool], empty: str
) -> list[Path]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.config["model"], result.data), []).append(result)
    columns = min(3, max(1, len(groups)))
    lines = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(5 * columns, 3.8 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    drawn = False
    for axes, ((model, data), group) in zip(grid, sorted(groups.items())):
        if not draw(axes, group):
            axes.remove()
            continue
        drawn = True
        axes.set_title(f"{model}, {data}")
        axes.grid(alpha=0.3)
        axes.legend()
    for unused in grid[len(groups) :]:
        unused.remove()
    if not drawn:
        raise ValueError(empty)
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in FORMATS]
    for path, suffix in zip(paths, FORMATS):
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150)
    return paths


def _by_kind(group: Sequence[Result]) -> dict[str, list[Result]]:
    """Dense first, then by percentile."""
    kinds = sorted({run.kind for run in group}, key=lambda kind: float(kind) if kind[0].isdigit() else 0.0)
    return {kind: [run for run in group if run.kind == kind] for kind in kinds}


def _loss(run: Result) -> tuple[np.ndarray, np.ndarray] | None:
    variant = DENSE if run.kind == DENSE else "sparse"
    try:
        with open(run.folder / log.STEPS_FILE, newline="", encoding="utf-8") as file:
            pairs = [(int(row["global_step"]), float(row["loss"])) for row in csv.DictReader(file) if row["variant"] == variant]
    except (OSError, KeyError, TypeError, ValueError):
        return None
    pairs = [pair for pair in pairs if np.isfinite(pair[1])]
    if not pairs:
        return None
    steps, values = (np.asarray(column, float) for column in zip(*pairs))
    window = max(1, len(values) // _SMOOTHED)
    values = np.convolve(values, np.full(window, 1 / window), "valid")
    steps = steps[window - 1 :]
    thin = max(1, len(steps) // _POINTS)
    return steps[::thin], values[::thin]


def _accuracies(run: Result) -> tuple[list[int], list[float]]:
    variant = DENSE if run.kind == DENSE else "sparse"
    entries = (read_json(run.folder / log.JSON_FILE) or {"epochs": []})["epochs"]
    return [entry["global_step"] for entry in entries], [100 * entry["variants"][variant]["test_accuracy"] for entry in entries]


def _label(kind: str) -> str:
    return {DENSE: "dense", "none": "zeros skipped only"}.get(kind, f"p = {kind}")


def _colour(kind: str) -> str:
    known = {DENSE: "black", "none": "grey", "85": "C0", "90": "C2", "95": "C1", "99.5": "C3"}
    return known.get(kind, f"C{sum(map(ord, kind)) % 6 + 4}")
