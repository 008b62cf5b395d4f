# SPDX-License-Identifier: Apache-2.0
"""What a run shows on the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .log import CSV_FILE, JSON_FILE, STEPS_FILE

_LINE = "{:>6} {:>7} {:>8} {:>11} {:>10} {:>10} {:>9} {:>9} {:>8} {:>8}"
_HEADINGS = (
    "epoch", "model", "rate", "train loss", "train acc", "test loss", "test acc", "step ms", "density", "speed-up",
)  # fmt: skip


class Reporter:
    """Progress bar, a line per epoch and model, tables at the end. A quiet console shows nothing of it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = None
        self._headings = False

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(Text(f"warning: {text}", "yellow"), soft_wrap=True)

    @contextmanager
    def running(self, step: int, total: int) -> Iterator[None]:
        """Shows the bar; steps are counted from `step`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
        )
        progress = Progress(
            *columns, console=self.console, transient=True, disable=self.console.quiet or not self.console.is_terminal
        )
        with progress:
            self._progress, self._task = progress, progress.add_task("steps", total=total, completed=step, state="")
            yield
        self._progress = self._task = None

    def step(self, losses: dict[str, float], seconds: dict[str, float]) -> None:
        """After each step: loss and latest time of each model."""
        state = "  ".join(
            f"{name}: loss {loss:.3f}" + (f", {1e3 * seconds[name]:.0f} ms" if name in seconds else "")
            for name, loss in losses.items()
        )
        self._progress.update(self._task, advance=1, state=state)

    def epoch(self, entry: dict[str, Any]) -> None:
        """After each epoch: a line for each model."""
        if not self._headings:
            self.console.print(Text(_LINE.format(*_HEADINGS), "bold"), soft_wrap=True)
            self._headings = True
        for name, row in entry["variants"].items():
            cells = (
                f"{entry['epoch']}" + ("" if entry["complete"] else "*"),
                name,
                f"{entry['learning_rate']:.4g}",
                _number(row["train_loss"], ".4f"),
                _percent(row["train_accuracy"]),
                _number(row["test_loss"], ".4f"),
                _percent(row["test_accuracy"]),
                _number(row["step_ms"], ".1f"),
                _number(row["density"], ".3f"),
                _times(entry["speedup"]["step"]) if name == "sparse" else "",
            )
            self.console.print(Text(_LINE.format(*cells)), soft_wrap=True)

    def summary(self, summary: dict[str, Any], folder: Path | None) -> None:
        """At the end: results and times of each model, and the density of each layer."""
        variants, speedup = summary["variants"], summary["speedup"]
        layers = variants.get("sparse", {}).get("layers")
        if layers:
            table = Table("layer", title="Gradients of the convolutions, last epoch", title_justify="left")
            for column in ("density", "sigma", "tau"):
                table.add_column(column, justify="right")
            for name, values in layers.items():
                density = _number(values.get("density"), ".3f")
                table.add_row(name, density, _number(values.get("sigma"), ".3g"), _number(values.get("tau"), ".3g"))
            table.add_section()
            table.add_row("all", _number(variants["sparse"]["density"], ".3f"), "", "")
            self.console.print(table)
        table = Table("", title=f"After {summary['global_step']} steps", title_justify="left")
        for name in variants:
            table.add_column(name, justify="right")
        compare = len(variants) > 1
        if compare:
            table.add_column("speed-up", justify="right")
        results = (
            ("test accuracy", "test_accuracy", _percent),
            ("test loss", "test_loss", lambda value: _number(value, ".4f")),
            ("training loss", "train_loss", lambda value: _number(value, ".4f")),
            ("gradient density", "density", lambda value: _number(value, ".3f")),
        )
        for label, key, form in results:
            table.add_row(label, *(form(row[key]) for row in variants.values()))
        table.add_section()
        times = (
            ("step, ms", "step"),
            ("  forward", "forward"),
            ("  backward", "backward"),
            ("    its convolutions", "conv_backward"),
        )
        for label, key in times:
            cells = [_number(row[f"{key}_ms"], ".1f") for row in variants.values()]
            table.add_row(label, *cells, *([_times(speedup[key])] if compare else []))
        self.console.print(table)
        if folder is not None:
            self.say(f"Logs: {', '.join(str(folder / name) for name in (CSV_FILE, STEPS_FILE, JSON_FILE))}")

    def demo(self, summary: dict[str, Any]) -> None:
        """What the demo has shown, in words, and what to try next."""
        variants, speedup = summary["variants"], summary["speedup"]
        if "dense" in variants and "sparse" in variants:
            sparse = variants["sparse"]
            self.say(
                f"\nA training step with pruned gradients was {_times(speedup['step'])} as fast as with dense PyTorch, the "
                f"backward pass of its convolutions {_times(speedup['conv_backward'])}.\n"
                f"Of the gradients {_percent(sparse['density'])} were not zero. Test accuracy: "
                f"{_percent(sparse['test_accuracy'])} sparse, {_percent(variants['dense']['test_accuracy'])} dense."
            )
        command = f"{_interpreter()} -m sparsebwd.train"
        self.say(
            "Next:\n"
            f"  {command} --demo --data imagefolder --data-dir DIR   (your images, a folder per class)\n"
            f"  {command} --model resnet18 --data cifar10 --data-dir DIR --compare\n"
            f"  {command} --help"
        )


def _interpreter() -> str:
    """The Python that runs this, as one would type it here: another one may lack the package."""
    path = Path(sys.executable)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
