# SPDX-License-Identifier: Apache-2.0
"""Speed-up against density, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from sparsebwd.data.files import atomic_write

from .results import COPY, Row, break_even
from .terminal import hardware

_PANEL = ("op", "suite", "pattern", "dtype", "math", "layout", "backend", "device", "threads")
"""Rows that agree in these are in one panel."""

# Of the numbers on the axes: as few as tell enough.
_MANTISSAS = ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9))
_LEAST_TICKS = 6

_STYLES = ("-", "--", ":")
_PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_WIDTH, _COLUMNS = 5.0, 4.0, 2.6, 2


def write(path: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Draw a panel for each operation (and suite, pattern, dtype, math, layout, backend, device, threads), in it a line for each
    layer.

    Break-even densities are crosses on the line of speed-up 1. The suffix names the format. Rows that were not timed, and those against a copy, are left out.

    Raises OSError if the file cannot be written, ValueError if nothing is left to draw.
    """
    rows = _drawable(rows)
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        panels.setdefault(tuple(getattr(row, name) for name in _PANEL), []).append(row)
    panels = dict(sorted(panels.items(), key=lambda item: tuple(map(str, item[0]))))
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    styles = _line_styles(rows)
    legend_columns = math.ceil(len(styles) / (14 * lines))
    figure = Figure(
        figsize=(columns * _PANEL_WIDTH + legend_columns * _LEGEND_WIDTH, lines * _PANEL_HEIGHT + 0.6),
        layout="constrained",
    )
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    varying = [name for position, name in enumerate(_PANEL) if len({key[position] for key in panels}) > 1]
    for axis, (key, group) in zip(axes, panels.items()):
        _draw(axis, group, styles)
        axis.set_title(", ".join(_value(name, key) for name in ("op", *(n for n in varying if n != "op"))), fontsize=11)
    for position, axis in enumerate(axes[: len(panels)]):
        axis.set_ylabel("speed-up over dense" if position % columns == 0 else "")
        last = position + columns >= len(panels)
        axis.set_xlabel("density of the gradient" if last else "")
        axis.tick_params(labelbottom=last)
    _limit(axes[0], rows)
    common = [_value(name, next(iter(panels))) for name in _PANEL[1:] if name not in varying]
    figure.suptitle(f"{hardware(environment)}\n{', '.join(filter(None, common))}", fontsize=11)
    handles = [Line2D([], [], **style, label=layer) for layer, style in styles.items()]
    if len(styles) > 1:
        handles.append(Line2D([], [], **_MEAN, label="geometric mean"))
    handles.append(Line2D([], [], color="0.3", marker="x", linestyle="none", label="break-even"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, ncols=legend_columns)
    save(figure, path)


def overview(path: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Draw one panel: for each operation the geometric mean over all layers, and the range of these as a band.

    Crosses are the break-even densities of layers, where they are among the densities of the rows. Rows are those of one dtype,
    layout, backend and number of threads. Raises as :func:`write` does, and ValueError for rows that differ in these.
    """
    rows = _drawable(rows)
    settings = {tuple(getattr(row, name) for name in ("pattern", "dtype", "layout", "backend", "threads")) for row in rows}
    if len(settings) > 1:
        raise ValueError(f"plot: got rows of {len(settings)} settings; accepted: of one dtype, layout, backend and number of threads")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhline(1, color="0.2", linewidth=1.2)
    for colour, (operation, group) in zip(matplotlib.color_sequences["tab10"], _by(rows, "op").items()):
        # What was asked for: random zeros miss it by little, in each layer by as much as it is small.
        lines = {density: [row.speedup for row in some] for density, some in sorted(_by(group, "nominal_density").items())}
        densities = list(lines)
        axis.fill_between(densities, [min(v) for v in lines.values()], [max(v) for v in lines.values()], color=colour, alpha=0.15)
        axis.plot(densities, [geometric_mean(v) for v in lines.values()], "o-", color=colour, linewidth=2.5, label=_NAMES[operation])
        crossings = [entry["break_even"] for entry in break_even(group) if entry["relation"] == "="]
        axis.plot(crossings, [1] * len(crossings), "x", color=colour, markersize=8, markeredgewidth=2, zorder=3)
    axis.plot([], [], "x", color="0.3", label="break-even of a layer")
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.set_xlabel("density of the gradient")
    axis.set_ylabel("speed-up over dense PyTorch")
    _limit(axis, rows)
    axis.legend(frameon=False)
    ((pattern, dtype, layout, _, threads),) = settings
    layers = len({(row.suite, row.layer) for row in rows})
    networks = " and ".join(sorted({str(row.suite) for row in rows}))
    words = [f"{layers} layers of {networks}", dtype, layout, f"{threads} thread{'s' if threads != 1 else ''}" if threads else ""]
    figure.suptitle(f"{', '.join(filter(None, words))}\n{hardware(environment)}", fontsize=10)
    save(figure, path)


_NAMES = {"agb": "gradient of the input (AGB)", "wgc": "gradient of the weight (WGC)", "agb+wgc": "both", "backward": "pruning and both"}
_NAMES["backward-predicted"] = "pruning at a predicted threshold, and both"


def _by(rows: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return groups


def _drawable(rows: Sequence[Row]) -> list[Row]:
    rows = [row for row in rows if row.speedup is not None and row.baseline != COPY and row.density > 0]
    if not rows:
        raise ValueError("plot: there is no speed-up against dense to draw")
    return rows


def save(figure: Figure, path: Path) -> None:
    """Write it; the suffix names the format. Raises OSError."""
    with atomic_write(path) as temporary:
        # Text in SVG stays text, which can be searched and read aloud.
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            # No date and no creator: the same rows make the same file.
            metadata = {"Creator": None, "Date": None} if path.suffix.lower() == ".svg" else None
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)


_MEAN = {"color": "black", "linewidth": 3.0}


def _line_styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The look of each layer's line, the same in all panels: colours first, then dashes."""
    colours = matplotlib.color_sequences["tab10"]
    layers = dict.fromkeys(row.layer for row in rows)
    return {
        layer: {
            "color": colours[position % len(colours)],
            "linestyle": _STYLES[position // len(colours) % len(_STYLES)],
            "linewidth": 1.2,
            "marker": ".",
        }
        for position, layer in enumerate(layers)
    }


def _draw(axis: Axes, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhline(1, color="0.3", linewidth=1)
    by_layer: dict[str, list[Row]] = {}
    by_setting: dict[tuple, list[Row]] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(row)
        by_setting.setdefault((row.nominal_density, row.percentile), []).append(row)
    for layer, group in by_layer.items():
        points = sorted((row.density, row.speedup) for row in group)
        axis.plot(*zip(*points), **styles[layer])
    if len(by_layer) > 1:
        means = [
            tuple(geometric_mean(getattr(row, name) for row in group) for name in ("density", "speedup"))
            for group in by_setting.values()
        ]
        axis.plot(*zip(*sorted(means)), **_MEAN, marker="o")
    for entry in break_even(rows):
        if entry["relation"] == "=":
            colour = styles[entry["layer"]]["color"]
            axis.plot(entry["break_even"], 1, marker="x", markersize=8, markeredgewidth=2, color=colour, zorder=3)
    axis.grid(color="0.9")
    axis.set_axisbelow(True)


def _limit(axis: Axes, rows: Sequence[Row]) -> None:
    """Show all rows, and speed-up 1, on axes that all panels share."""
    densities, speedups = [row.density for row in rows], [1.0, *(row.speedup for row in rows)]
    for direction, values, space in ((axis.xaxis, densities, 0.1), (axis.yaxis, speedups, 0.05)):
        low, high = min(values) / 1.2, max(values) * 1.2
        direction.set_ticks(_ticks(low, high, space))
        direction.set_minor_locator(NullLocator())
        direction.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        (axis.set_xlim if direction is axis.xaxis else axis.set_ylim)(low, high)


def _ticks(low: float, high: float, space: float) -> list[float]:
    """Numbers from `low` to `high`, the roundest first until there are enough, none nearer to the next than `space`, a share of the
    logarithmic axis."""
    chosen: list[float] = []
    for mantissas in _MANTISSAS:
        for tick in (mantissa * 10.0**exponent for exponent in range(-5, 5) for mantissa in mantissas):
            near = any(abs(math.log(tick / other)) < space * math.log(high / low) for other in chosen)
            if low <= tick <= high and not near:
                chosen.append(tick)
        if len(chosen) >= _LEAST_TICKS:
            break
    return sorted(chosen)


def _value(name: str, key: tuple) -> str:
    value = key[_PANEL.index(name)]
    if name == "threads" and value is not None:
        return f"{value} thread{'s' if value != 1 else ''}"
    # That it is a CPU is said by the number of threads.
    return "" if name == "device" and value == "cpu" else str(value or "")
