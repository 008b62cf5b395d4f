# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m sparsebwd.reproduce`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from .. import data, models
from ..arguments import shown
from ..commands import GroupedCommand, call, check_environment, check_seed, describe, fail, new_app, one_line_errors
from ..settings import check_percentile
from ..train.recipes import RECIPES
from ..train.stop import Signals
from . import claims, estimate, report, results, runs, timing
from .paper import DENSE, PERCENTILES, TABLES
from .sweep import Outcome, Sweep

_WIDTH = 200  # of tables in a file or pipe
_FIGURE = "figure3"
_FIGURE_MODELS = ("alexnet", "resnet18")
_ESTIMATORS = {"corrected": ("corrected",), "as_printed": ("as_printed",), "both": ("corrected", "as_printed")}
_DIGITS = 18  # of numbers that have 64 bits

app = new_app()


def _kind(text: str) -> str:
    if text in (DENSE, "none"):
        return text
    with suppress(ValueError):
        return f"{check_percentile(float(text)):g}"
    raise typer.BadParameter(f"got {text!r}; accepted: numbers in [50, 100), none, dense")


def _integer(text: str | int, least: int) -> int:
    text = str(text)
    if not text.isdecimal() or len(text) > _DIGITS or int(text) < least:
        raise typer.BadParameter(f"got {shown(text)}; accepted: integers from {least}")
    return int(text)


def _seed(text: str) -> int:
    try:
        return check_seed(int(text))
    except ValueError:
        raise typer.BadParameter(f"got {shown(text)}; accepted: integers from 0 to 2**64 - 1") from None


def _seconds(text: str | float) -> float:
    """A claim whose time is none, or no number, would be taken from a process that lives."""
    with suppress(ValueError):
        if 1 <= float(text) < math.inf:
            return float(text)
    raise typer.BadParameter(f"got {shown(text)}; accepted: seconds from 1")


def _among(text: str, accepted: Sequence[str] | Mapping[str, Any]) -> str:
    if text not in accepted:
        raise typer.BadParameter(f"got {shown(text)}; accepted: {', '.join(accepted)}")
    return text


def _each(parse: Callable[[str], Any]) -> Callable[[Sequence[str] | None], list[Any] | None]:
    """Of an option that has several values: each by itself, also where commas stand between them."""
    return lambda values: [parse(text) for value in values for text in value.split(",")] if values else None


def _option(group: str, metavar: str | None, text: str, parse: Callable[[Any], Any] | None = None, name: str | None = None) -> Any:
    """Of a command that shows it in this group. parse: of a value that was given, returns it or raises typer.BadParameter."""
    callback = None if parse is None else lambda value: value if value is None else parse(value)
    return typer.Option(*([name] if name else []), metavar=metavar, help=text, callback=callback, rich_help_panel=group)


_positive = partial(_integer, least=1)
_runs = partial(_option, "Which runs")
_data = partial(_option, "Data")
_do = partial(_option, "What to do")
_WHATS = (*TABLES, _FIGURE)
_KINDS = (DENSE, *PERCENTILES)


@app.command(cls=GroupedCommand)
def command(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="WHAT", help=", ".join(_WHATS) + ".", callback=lambda text: _among(text, _WHATS))],
    models: Annotated[list[str] | None, _runs("NAME ...", "Default: all of the table.", _each(partial(_among, accepted=models.names())))] = None,
    percentiles: Annotated[list[str] | None, _runs("P ...", f"Numbers, dense, and none: only exact zeros are skipped. Default: {' '.join(_KINDS)}.", _each(_kind))] = None,
    seeds: Annotated[list[str] | None, _runs("SEED ...", "Default: 0 1 2; of figure3: 0.", _each(_seed))] = None,
    sigma_estimator: Annotated[str, _runs("NAME", "corrected, as_printed in the paper, or both.", partial(_among, accepted=_ESTIMATORS))] = "corrected",
    recipe: Annotated[str | None, _runs("NAME", f"{', '.join(RECIPES)}. Default: the paper's.", partial(_among, accepted=RECIPES))] = None,
    epochs: Annotated[str | None, _runs("N", "Default: the recipe's.", _positive)] = None,
    width: Annotated[str | None, _runs("N", "Channels of the first layer. Default: as published.", _positive)] = None,
    subset: Annotated[str | None, _runs("N", "Train and test on N images only.", _positive)] = None,
    also: Annotated[list[str] | None, _runs("KEY=VALUE ...", "Other options of sparsebwd.train, with spaces between several, as values may hold commas.")] = None,
    data: Annotated[str | None, _data("NAME", f"{', '.join(data.names())}; the last for images of the table's data set in folders.", partial(_among, accepted=data.names()))] = None,
    data_dir: Annotated[str | None, _data("DIR", "Where the data set's files are.")] = None,
    cache_dir: Annotated[str | None, _data("DIR", "Where decoded images are kept.")] = None,
    output: Annotated[str | None, _do("DIR", "A directory for each run, and the results. Default: runs/WHAT.")] = None,
    dry_run: Annotated[bool, _do(None, "List the runs, their state and the time they would take.", name="--dry-run")] = False,
    collect: Annotated[bool, _do(None, "Show and write the results of what is there, run nothing.", name="--collect")] = False,
    time: Annotated[bool, _do(None, "Train nothing, time (again) what is done in the output folder, by whatever command.", name="--time")] = False,
    equal_time: Annotated[bool, _do(None, "Then train dense for as long as each sparse run takes by its measured steps, schedule compressed to match.", name="--equal-time")] = False,
    timing_steps: Annotated[str, _do("N", "Steps, dense and sparse in turns, that are timed after a run; 0: none.", partial(_integer, least=0))] = str(timing.STEPS),
    checkpoint_steps: Annotated[str, _do("N", "A checkpoint every N steps, besides those after each epoch.", _positive)] = "200",
    no_wait: Annotated[bool, _do(None, "Leave when all that is missing is in other hands.", name="--no-wait")] = False,
    stale: Annotated[str, _do("S", "Seconds without a sign of life after which a run is taken over.", _seconds)] = f"{claims.STALE:.0f}",
) -> None:
    """Repeat a table or the figure of Ye et al. (2019).

    Runs what is missing, keeps what is done, and shows all beside the paper's figures. Any number of processes may do this
    with one output folder; each may be ended at any time. Between several values of an option stand spaces or commas.
    """
    with one_line_errors():
        raise typer.Exit(_reproduce(SimpleNamespace(**context.params)))


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.reproduce") -> int:
    """Parse the arguments and make what is missing. Returns 0, 1 if runs failed, 128 and its number if a signal ended it.

    Raises:
        SystemExit: with status 2 and a message where an argument is refused.
    """
    with one_line_errors():
        return call(app, arguments, prog)


def _reproduce(options: SimpleNamespace) -> int:
    options.percentiles = options.percentiles or _KINDS
    table = TABLES["table1" if options.what == _FIGURE else options.what]
    name = options.data if options.data not in (None, "imagefolder") else table.data
    output = Path(options.output or f"runs/{options.what}")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        check_environment()
        planned = _plan(options, table, name, output)
        if options.dry_run:
            _show_plan(console, planned)
            return 0
        outcome = Outcome()
        if not options.collect:
            with Signals().handled():
                outcome = _sweep(options, planned, output, console)
        _collect(options, table, name, output, planned, console)
    except ValueError as error:
        fail(f"error: {describe(error)}", 2)
    except KeyboardInterrupt as error:
        print(f"{error}" or "interrupted", "the same command goes on from here", sep="; ", file=sys.stderr)
        return getattr(error, "status", 130)
    for run, text in outcome.failed.items():
        print(f"error: {run}: {text}", file=sys.stderr)
    for run, who in outcome.elsewhere.items():
        print(f"left to others: {run}: {who}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _plan(options: SimpleNamespace, table, name: str, output: Path) -> list[runs.Run]:
    chosen = options.models or (_FIGURE_MODELS if options.what == _FIGURE else tuple(table.rows))
    source = options.data or ("imagefolder" if name == "imagenet" else name)
    return runs.plan(
        output,
        chosen,
        options.percentiles,
        options.seeds if options.seeds is not None else (0,) if options.what == _FIGURE else (0, 1, 2),
        _ESTIMATORS[options.sigma_estimator],
        options.recipe or table.recipe,
        name,
        runs.parse_also(options.also or ()),
        data=source,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        epochs=options.epochs,
        width=options.width,
        train_subset=options.subset,
        test_subset=options.subset,
    )


def _sweep(options: SimpleNamespace, planned: Sequence[runs.Run], output: Path, console: Console) -> Outcome:
    if options.time:
        return Sweep(
            _to_time(options, output), console, timing_steps=options.timing_steps, stale=options.stale
        ).measure()
    sweep = Sweep(
        planned,
        console,
        timing_steps=options.timing_steps,
        checkpoint_steps=options.checkpoint_steps,
        wait=not options.no_wait,
        stale=options.stale,
    )
    outcome = sweep.run()
    if options.equal_time and not (outcome.failed or outcome.elsewhere):
        sweep.runs = runs.at_equal_time(planned)
        outcome = sweep.run()
    return outcome


def _to_time(options: SimpleNamespace, output: Path) -> list[runs.Run]:
    """All that is there, planned or not, but for what the options leave out; no option leaves out a density or a noise."""

    def chosen(run: runs.Run) -> bool:
        kind = results.kind_of(asdict(run.config), "sparse")
        return (
            (not options.models or run.config.model in options.models)
            and (options.seeds is None or run.config.seed in options.seeds)
            and (kind in options.percentiles or " " in kind)
        )

    return [run for run in runs.found(output) if chosen(run)]


def _collect(options, table, name: str, output: Path, planned: Sequence[runs.Run], console: Console) -> None:
    found = [
        result for result in results.read(output) if not options.models or result.config["model"] in options.models
    ]
    if options.what == _FIGURE:
        written = _figures().losses(output / _FIGURE, found)
    else:
        rows = results.rows(found, table, name)
        if rows:
            report.show(console, table, name, rows)
        else:
            console.print(f"no finished run on {name} in {output}", highlight=False)
        written = report.write(output / options.what, table, name, rows)
        if any(row.step_speedup for row in rows):
            here = [result for result in found if result.data == name]
            written += _figures().accuracy_against_time(output / f"{options.what}-time", here)
    missing = [run.name for run in planned if not run.done()]
    if missing:
        console.print(f"{len(missing)} of {len(planned)} runs are missing: --dry-run lists them", highlight=False)
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _figures():
    """matplotlib is needed for nothing else.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from . import figures
    except ModuleNotFoundError as error:
        raise ValueError(f"figures need {error.name}: pip install matplotlib") from error
    return figures


def _show_plan(console: Console, planned: Sequence[runs.Run]) -> None:
    view = RichTable()
    for column in ("run", "state", "steps", "time left"):
        view.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=column == "run")
    estimates = estimate.Estimates(planned)
    total = 0.0
    for run in planned:
        left = estimates.left(run)
        total += left
        view.add_row(run.name, _state(run), str(run.steps()), estimate.duration(left) if left else "")
    measured = all(run.done() or estimates.measured(run) for run in planned)
    console.print(view)
    source = (
        "by the steps of runs that are there" if measured else "roughly, by multiply-adds where no run is there yet"
    )
    console.print(f"{len(planned)} runs, {estimate.duration(total)} on this machine ({source})", highlight=False)


def _state(run: runs.Run) -> str:
    if run.other:
        return f"another run is there: {run.other}"
    if (run.folder / runs.FAILED_FILE).exists():
        return "done: not finite"
    if run.done():
        return "done" if run.timed() else "done, not timed"
    if who := claims.holder(run.folder):
        return f"at step {run.steps_done()}, {who}"
    return f"at step {run.steps_done()}" if run.has_checkpoint() else "missing"
