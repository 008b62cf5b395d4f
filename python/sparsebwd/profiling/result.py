# SPDX-License-Identifier: Apache-2.0
"""What :func:`sparsebwd.profile` returns: as an object, text, dictionary and picture."""

from __future__ import annotations

import io
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..arguments import check_path
from ..data.files import atomic_write
from ..problem import ConvProblem

_WIDTH = 80
_NOISY = 0.1
"""Interquartile range of a step, as a share of its median, from which on a warning is due."""

_SHORTEST = 8  # name of a layer, in characters
_SHOWN = 3  # layers by name, of those that share a reason


@dataclass(frozen=True)
class LayerProfile:
    """The backward pass of one convolution.

    name: in the model. problem: its geometry with the batch, as ``n32c64h32w32k64r3s3u1p1d1g1``, see docs/develop.
    density: non-zeros / elements of the gradient that AGB and WGC consumed; None if nobody looked, as it ran as an nn.Conv2d.
    dense_ms, sparse_ms: median time, pruning included, as an nn.Conv2d and as converted.
    decision: "sparse", "partly" (one of AGB and WGC), or "dense". reason: why not sparse, else "".
    implementation: the kernels that ran, as :class:`sparsebwd.DensityMonitor` calls them.
    """

    name: str
    problem: str
    density: float | None
    dense_ms: float
    sparse_ms: float
    decision: str
    reason: str
    implementation: str

    @property
    def speedup(self) -> float:
        """dense_ms / sparse_ms."""
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class Alternative:
    """Something else that may make a step faster. name: what. dense_ms, sparse_ms: a step with it; None if not measured.

    against_ms: a dense step without it, from the same measurement. note: why it was not measured, else "".
    """

    name: str
    against_ms: float | None
    dense_ms: float | None
    sparse_ms: float | None
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Of the dense step."""
        return None if self.against_ms is None or self.dense_ms is None else self.against_ms / self.dense_ms


@dataclass(frozen=True)
class Profile:
    """What steps took, dense and converted. str() is a table of 80 columns.

    dense, sparse: median milliseconds of a step, by phase: "total", "forward", "backward", "optimizer"; and of the backward
        passes of its convolutions together, "convolutions", from steps that were measured apart.
    spread: interquartile range / median of the step that varied more.
    layers: in the order of the forward pass; only convolutions that are modules, and that a gradient reached.
    alternatives: what else was tried.
    setting: device, layout, threads, steps, autocast dtype, what was asked of pruning.
    """

    dense: dict[str, float]
    sparse: dict[str, float]
    spread: float
    layers: tuple[LayerProfile, ...]
    alternatives: tuple[Alternative, ...]
    setting: dict[str, Any]

    @property
    def speedup(self) -> float:
        """Of a whole step."""
        return self.dense["total"] / self.sparse["total"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as json.dumps() takes them: the fields, and "speedup" of the step, of layers and of alternatives."""
        with_speedup = {
            name: [asdict(part) | {"speedup": part.speedup} for part in getattr(self, name)] for name in ("layers", "alternatives")
        }
        steps = {"dense": dict(self.dense), "sparse": dict(self.sparse), "speedup": self.speedup, "spread": self.spread}
        return {**steps, **with_speedup, "setting": dict(self.setting)}

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self.__rich__())
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        dense, sparse = self.dense["total"], self.sparse["total"]
        title = f"A training step: {dense:.1f} ms dense, {sparse:.1f} ms converted, {self.speedup:.2f}x"
        parts: list[RenderableType] = [Text(title, "bold"), Text(self._how())]
        parts += [Text(), self._phases(), Text(), self._by_layer()]
        notes = [*self._reasons(), *map(_alternative, self.alternatives), *self._fastest(), *self._warnings()]
        return Group(*parts, *([Text()] if notes else []), *map(Text, notes))

    def _how(self) -> str:
        words = [f"{self.setting['pruning']}, {self.setting['layout']}, on {self.setting['device']}"]
        words += [f"threads: {self.setting['threads']}"] if self.setting["device"] == "cpu" else []
        words += [f"autocast to {self.setting['autocast']}"] if self.setting["autocast"] else []
        return ", ".join([*words, f"medians of {self.setting['steps']} steps, in turns"])

    def _phases(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("", "dense ms", "converted ms", "speed-up"):
            table.add_column(column, justify="left" if not column else "right")
        for phase, title in _PHASES.items():
            dense, sparse = self.dense[phase], self.sparse[phase]
            table.add_row(title, f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}x" if sparse else "-")
        return table

    def _by_layer(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        columns = ("layer", "C>K size filter", "density", "dense ms", "sparse ms", "ratio", "runs")
        for column in columns:
            left = column in ("layer", "C>K size filter", "runs")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        cells = [
            (
                layer.name or "the model",
                _shape(ConvProblem.parse(layer.problem)),
                "-" if layer.density is None else f"{layer.density:.3f}",
                f"{layer.dense_ms:.2f}",
                f"{layer.sparse_ms:.2f}",
                f"{layer.speedup:.2f}x",
                layer.decision,
            )
            for layer in self.layers
        ]
        others = sum(max(map(len, column)) + 1 for column in list(zip(columns, *cells))[1:])
        for name, *rest in cells:
            table.add_row(_shortened(name, max(_WIDTH - others, _SHORTEST)), *rest)
        return table

    def _reasons(self) -> list[str]:
        by_reason: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.reason:
                by_reason.setdefault(f"{layer.decision}: {layer.reason}", []).append(layer.name or "the model")
        return [
            _wrapped(f"{reason} ({', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''})")
            for reason, names in by_reason.items()
        ]

    def _fastest(self) -> list[str]:
        """Which of all that was measured."""
        gains = {"converted": self.speedup}
        for found in self.alternatives:
            if found.speedup is not None and found.against_ms is not None:
                gains[f"{found.name} alone"] = found.speedup
                if found.sparse_ms is not None:
                    gains[f"{found.name}, converted"] = found.against_ms / found.sparse_ms
        best = max(gains, key=lambda name: gains[name])
        if gains[best] <= 1:
            return ["nothing that was measured is faster than the dense step"]
        return [f"fastest: {best}, {gains[best]:.2f}x"] if len(gains) > 1 else []

    def _warnings(self) -> list[str]:
        noisy = f"times varied by {self.spread:.0%} of their median: measure on an idle machine, or take more steps"
        return [_wrapped(noisy)] if self.spread > _NOISY else []

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw times and densities of the layers into a file; the suffix, .png or .svg, names the format. Needs matplotlib.

        Returns:
            The path.

        Raises:
            ValueError: another suffix, no layers to draw, or matplotlib is not installed.
            OSError: the file cannot be written.
        """
        path = check_path(path, "path")
        if path.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"path: got {str(path)!r}; accepted: a name that ends in .png or .svg")
        if not self.layers:
            raise ValueError("plot: no gradient reached a convolution, so there is nothing to draw")
        try:
            import matplotlib.figure
        except ModuleNotFoundError as error:
            raise ValueError(f"plot: needs {error.name}: pip install matplotlib") from error
        picture = matplotlib.figure.Figure(figsize=(9, 1.6 + 0.22 * len(self.layers)), layout="constrained")
        known = [(place, layer.density) for place, layer in enumerate(self.layers) if layer.density is not None]
        times, *rest = picture.subplots(1, 2 if known else 1, sharey=True, width_ratios=(3, 1)[: 2 if known else 1], squeeze=False)[0]
        places = range(len(self.layers))
        for shift, name, colour in ((-0.2, "dense", "tab:grey"), (0.2, "sparse", "tab:blue")):
            widths = [getattr(layer, f"{name}_ms") for layer in self.layers]
            label = "converted" if name == "sparse" else name
            times.barh([place + shift for place in places], widths, height=0.4, color=colour, label=label)
        times.set_yticks(places, [_shortened(layer.name or "the model", 32) for layer in self.layers], fontsize=8)
        times.invert_yaxis()
        times.margins(y=0.01)
        times.set_xlabel("backward pass of the layer, ms")
        times.legend(loc="best")
        for densities in rest:
            densities.plot([density for _, density in known], [place for place, _ in known], "o", color="tab:blue", markersize=4)
            densities.set_xlim(0, 1)
            densities.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
            densities.grid(axis="x", alpha=0.4)
            densities.set_xlabel("density of its gradient")
        picture.suptitle(
            f"A training step: {self.dense['total']:.0f} ms dense, {self.sparse['total']:.0f} ms converted, {self.speedup:.2f}x"
        )
        with atomic_write(path) as temporary:
            picture.savefig(temporary, format=path.suffix.lower()[1:], dpi=120)
        return path


_PHASES = {
    "total": "step",
    "forward": "  forward",
    "backward": "  backward",
    "convolutions": "    its convolutions",
    "optimizer": "  optimizer",
}


def _alternative(found: Alternative) -> str:
    if found.speedup is None:
        return _wrapped(f"{found.name}: not measured: {found.note}")
    text = f"{found.name}: dense {found.against_ms:.1f} to {found.dense_ms:.1f} ms, {found.speedup:.2f}x"
    if found.sparse_ms is not None:
        text += f"; converted {found.sparse_ms:.1f} ms, {found.against_ms / found.sparse_ms:.2f}x of dense without"
    return _wrapped(text)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")


def _shortened(name: str, most: int) -> str:
    """The end of a name tells more than its beginning."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _shape(problem: ConvProblem) -> str:
    """Channels in and out, height and width of the input, filter, stride, groups: ``64>128 32x32 3x3/2``."""
    text = f"{problem.c}>{problem.k} {problem.h}x{problem.w} {problem.r}x{problem.s}"
    if max(problem.stride) > 1:
        text += f"/{max(problem.stride)}"
    return text + (f" g{problem.groups}" if problem.groups > 1 else "")

