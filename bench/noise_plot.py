# SPDX-License-Identifier: Apache-2.0
"""Time and density against the noise of the whole network, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .plot import save

_LABELS = {
    "percentile": "one percentile for all layers (the paper)",
    "image": "the same, and a threshold for each image",
    "density": "one density for all layers",
    "variance": "one variance for all layers",
    "noise": "noise=, a threshold for each layer and image",
    "noise-none": "noise=, a threshold for each layer",
    "row": "rows of 64 channels, by density",
    "sample": "whole images, by density",
}
_MARKERS = "oPs^DdvX"


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Draw, for each moment of the run, the time of a step and the multiply-adds that are left; a curve for each way. The suffix
    names the format. Raises OSError."""
    points = record["points"]
    panels = [("density", "multiply-adds of the backward convolutions left")]
    if all(row["speedup"] for point in points for row in point["rows"]):
        panels.insert(0, ("total", "time of a step, dense = 1"))
    figure = Figure(figsize=(5.2 * len(points), 3.8 * len(panels) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), len(points), squeeze=False, sharex=True, sharey="row")
    colours = matplotlib.color_sequences["tab10"]
    for line, (part, label) in enumerate(panels):
        for axis, point in zip(grid[line], points):
            for number, (way, name) in enumerate(_LABELS.items()):
                rows = sorted((row for row in point["rows"] if row["way"] == way), key=lambda row: row["noise"])
                if rows:
                    values = [row["density"] if part == "density" else 1 / row["speedup"][part] for row in rows]
                    look = {"marker": _MARKERS[number], "color": colours[number], "linewidth": 2.5 if way == "noise" else 1.2}
                    axis.plot([100 * row["noise"] for row in rows], values, label=name, **look)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
            axis.set_title(f"after {point['step']} steps", fontsize=10)
            axis.set_xlabel("noise added to the weight gradients, % of that of minibatches", fontsize=8)
        grid[line][0].set_ylabel(label, fontsize=8)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False, ncols=min(3, 1 + len(points)))
    save(figure, path)
