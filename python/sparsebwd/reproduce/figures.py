# SPDX-License-Identifier: Apache-2.0
"""Figure 3, loss per step, and what the paper does not show: accuracy against time."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data import atomic_write
from ..opening import read_rows
from ..train import log
from .paper import DENSE
from .results import Result, dense_step_ms, place, step_ms, varying
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
        for label, runs in _lines(group).items():
            style = _style(runs[0], group)
            curves = [curve for run in runs if (curve := _loss(run)) is not None]
            for index, (steps, values) in enumerate(curves):
                axes.plot(steps, values, lw=1.1, label=label if index == 0 else None, **style)
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
        dense_ms = dense_step_ms(group)
        if dense_ms is None:
            return False
        for label, runs in _lines(group).items():
            if (time := step_ms(runs, dense_ms)) is None:
                continue
            style = _style(runs[0], group)
            for index, run in enumerate(runs):
                steps, values = _accuracies(run)
                hours = np.asarray(steps) * time / 3.6e6
                axes.plot(hours, values, label=label if index == 0 else None, marker=".", **style)
        axes.set(xlabel="hours of training, steps x time of a step", ylabel="test accuracy, %")
        return True

    return _panels(stem, results, draw, "accuracy against time: no run here was timed")


def _panels(
    stem: Path, results: Sequence[Result], draw: Callable[[Axes, Sequence[Result]], bool], empty: str
) -> list[Path]:
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        common = tuple(pair for pair in result.settings if pair[0] != "data")
        groups.setdefault((result.config["model"], result.data, common), []).append(result)
    shown = {data: varying([key[2] for key in groups if key[1] == data]) for _, data, _ in groups}
    columns = min(3, max(1, len(groups)))
    lines = max(1, -(-len(groups) // columns))
    figure = Figure(figsize=(5 * columns, 3.8 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    drawn = False
    for axes, ((model, data, common), group) in zip(grid, sorted(groups.items(), key=lambda item: str(item[0]))):
        if not draw(axes, group):
            axes.remove()
            continue
        drawn = True
        axes.set_title(", ".join([model, data, *(f"{name}={value}" for name, value in common if name in shown[data])]))
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


def _lines(group: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs by what they are called: dense first, then by percentile, and shorter ones behind those of full length."""
    whole = max(run.steps for run in group)
    lines: dict[str, list[Result]] = {}
    for run in sorted(group, key=lambda run: (place(run.kind), -run.steps, run.label, run.name)):
        label = run.label if run.steps == whole else f"{run.label}, {run.steps} steps"
        lines.setdefault(label, []).append(run)
    return lines


def _loss(run: Result) -> tuple[np.ndarray, np.ndarray] | None:
    variant = DENSE if run.kind == DENSE else "sparse"
    try:
        pairs = [
            (int(row["global_step"]), float(row["loss"]))
            for row in csv.DictReader(read_rows(run.folder / log.STEPS_FILE))
            if row["variant"] == variant
        ]
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
    return [entry["global_step"] for entry in entries], [
        100 * entry["variants"][variant]["test_accuracy"] for entry in entries
    ]


def _style(run: Result, group: Sequence[Result]) -> dict[str, str]:
    known = {DENSE: "black", "none": "grey", "85": "C0", "90": "C2", "95": "C1", "99.5": "C3"}
    shorter = run.steps < max(other.steps for other in group)
    return {
        "color": known.get(run.kind, f"C{sum(map(ord, run.kind)) % 6 + 4}"),
        "linestyle": ":" if shorter else "--" if run.sparsity else "-",
    }
