# SPDX-License-Identifier: Apache-2.0
"""The command line of `python -m sparsebwd.reproduce`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from .. import data, models
from ..arguments import shown
from ..commands import Parser, check_environment, describe, one_line_errors
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


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.reproduce") -> int:
    """Parse the arguments and make what is missing. Returns 0, 1 if runs failed, 128 and its number if a signal ended it.

    Raises:
        SystemExit: with status 2 and a message where an argument is refused.
    """
    with one_line_errors():
        parser = _parser(prog)
        options = parser.parse_args(arguments)
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
            parser.error(describe(error))
        except KeyboardInterrupt as error:
            print(f"{error}" or "interrupted", "the same command goes on from here", sep="; ", file=sys.stderr)
            return getattr(error, "status", 130)
    for run, text in outcome.failed.items():
        print(f"error: {run}: {text}", file=sys.stderr)
    for run, who in outcome.elsewhere.items():
        print(f"left to others: {run}: {who}", file=sys.stderr)
    return 1 if outcome.failed else 0


def _plan(options: argparse.Namespace, table, name: str, output: Path) -> list[runs.Run]:
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
        runs.parse_also(options.also),
        data=source,
        data_dir=options.data_dir,
        cache_dir=options.cache_dir,
        epochs=options.epochs,
        width=options.width,
        train_subset=options.subset,
        test_subset=options.subset,
    )


def _sweep(options: argparse.Namespace, planned: Sequence[runs.Run], output: Path, console: Console) -> Outcome:
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


def _to_time(options: argparse.Namespace, output: Path) -> list[runs.Run]:
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


def _kind(text: str) -> str:
    if text in (DENSE, "none"):
        return text
    try:
        return f"{check_percentile(float(text)):g}"
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: numbers in [50, 100), none, dense") from None


def _parser(prog: str = "python -m sparsebwd.reproduce") -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage="%(prog)s table1|table2|table3|figure3 [options]",
        description="Repeat a table or the figure of Ye et al. (2019): run what is missing, keep what is done, show all beside the "
        "paper's figures. Any number of processes may do this with one output folder; each may be ended at any time.",
    )
    parser.add_argument("what", choices=(*TABLES, _FIGURE), metavar="WHAT", help=", ".join((*TABLES, _FIGURE)))
    group = parser.add_argument_group("which runs")
    group.add_argument("--models", nargs="+", choices=models.names(), metavar="NAME", help="default: all of the table")
    kinds = (DENSE, *PERCENTILES)
    text = f"numbers, dense, and none: only exact zeros are skipped (default: {' '.join(kinds)})"
    group.add_argument("--percentiles", nargs="+", type=_kind, default=kinds, metavar="P", help=text)
    group.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 2; of figure3: 0")
    text = "corrected, as_printed in the paper, or both"
    group.add_argument("--sigma-estimator", choices=_ESTIMATORS, default="corrected", metavar="NAME", help=text)
    text = f"{', '.join(RECIPES)} (default: the paper's)"
    group.add_argument("--recipe", choices=RECIPES, metavar="NAME", help=text)
    group.add_argument("--epochs", type=_positive, metavar="N", help="default: the recipe's")
    group.add_argument(
        "--width", type=_positive, metavar="N", help="channels of the first layer (default: as published)"
    )
    group.add_argument("--subset", type=_positive, metavar="N", help="train and test on N images only")
    group.add_argument("--also", nargs="+", default=(), metavar="KEY=VALUE", help="other options of sparsebwd.train")
    group = parser.add_argument_group("data")
    text = f"{', '.join(data.names())}; the last for images of the table's data set in folders"
    group.add_argument("--data", choices=data.names(), metavar="NAME", help=text)
    group.add_argument("--data-dir", metavar="DIR", help="where the data set's files are")
    group.add_argument("--cache-dir", metavar="DIR", help="where decoded images are kept")
    group = parser.add_argument_group("what to do")
    group.add_argument("--output", metavar="DIR", help="a directory for each run, and the results (default: runs/WHAT)")
    group.add_argument("--dry-run", action="store_true", help="list the runs, their state and the time they would take")
    group.add_argument(
        "--collect", action="store_true", help="show and write the results of what is there, run nothing"
    )
    text = "train nothing, time (again) what is done in the output folder, by whatever command"
    group.add_argument("--time", action="store_true", help=text)
    text = "then train dense for as long as each sparse run takes by its measured steps, schedule compressed to match"
    group.add_argument("--equal-time", action="store_true", help=text)
    text = f"steps, dense and sparse in turns, that are timed after a run (default: {timing.STEPS}; 0: none)"
    group.add_argument("--timing-steps", type=partial(_integer, least=0), default=timing.STEPS, metavar="N", help=text)
    text = "a checkpoint every N steps, besides those after each epoch (default: 200)"
    group.add_argument("--checkpoint-steps", type=_positive, default=200, metavar="N", help=text)
    group.add_argument("--no-wait", action="store_true", help="leave when all that is missing is in other hands")
    text = f"seconds without a sign of life after which a run is taken over (default: {claims.STALE:.0f})"
    group.add_argument("--stale", type=_seconds, default=claims.STALE, metavar="S", help=text)
    return parser


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or len(text) > _DIGITS or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {shown(text)}; accepted: integers from {least}")
    return int(text)


_positive = partial(_integer, least=1)
_DIGITS = 18  # of numbers that have 64 bits


def _seconds(text: str) -> float:
    """A claim whose time is none, or no number, would be taken from a process that lives."""
    with suppress(ValueError):
        if 1 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {shown(text)}; accepted: seconds from 1")
