# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m sparsebwd.bench``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsebwd.backends import registered_backends
from sparsebwd.functional import check_percentile
from sparsebwd.problem import ConvProblem

from . import operations, results, suites
from .environment import OtherProcesses, environment, last_level_cache
from .inputs import DTYPES, LAYOUTS, Rotation
from .runner import Plan, run
from .suites import Layer
from .timing import keep_freed_memory

T = TypeVar("T")

DEFAULT_BATCH = 32
_UNKNOWN_CACHE = 32 * 2**20
# Kinds of tensors that rotate: three operands in two layouts.
_ROTATED = 6


BUSY = 0.1
"""CPUs used by others above which a warning is due."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_FILE = {"dir_okay": False, "metavar": "FILE"}


_OPERATIONS = "\n".join(f"{found.name:<13}{found.description}" for found in operations.ALL)

_HELP = f"""Time the sparse kernels against dense PyTorch.

Lists, as of densities, are separated by commas; options may also be repeated. All combinations are measured. Each
result is checked first: one that is wrong is not timed, and the exit status is 1.

\b
{_OPERATIONS}

Dense is torch.ops.aten.convolution_backward for the same output, the faster of channels_last and contiguous. The AGB of
the first layer of a network is left out, as in training. Candidate and baseline run in turns, on copies of the tensors
that rotate so that the last-level cache does not hold them. Both allocate their results through PyTorch; malloc is told
to keep what is freed, or either would mostly time the system clearing fresh pages. docs/performance.md has the rest."""


@app.command(help=_HELP)
def main(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(suites.names())}: each distinct convolution once. With a kernel size behind it, as in "
            "resnet50-cifar-1x1, only those. Default: resnet18-cifar.",
        ),
    ] = None,
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help="One convolution, as n32c64h32w32k128r3s3u2p1d1g1: batch, input channels, height, width, output "
            "channels, kernel, stride u, padding p, dilation d, groups g; pairs as u2x1.",
        ),
    ] = None,
    op: Annotated[list[str], typer.Option(help=" | ".join(operations.NAMES) + ", see above.")] = ("agb", "wgc"),
    density: Annotated[
        list[str], typer.Option(help="For agb and wgc: fraction of the gradient that is not zero; the zeros are iid.")
    ] = ("0.35", "0.1"),
    percentile: Annotated[
        list[str], typer.Option(help="For prune and backward: the pruning percentile, in [50, 100).")
    ] = ("90",),
    dtype: Annotated[list[str], typer.Option(help=" | ".join(DTYPES))] = ("float32",),
    layout: Annotated[
        list[str], typer.Option(help=" | ".join(LAYOUTS) + ": of the candidate's tensors. Dense runs in both.")
    ] = ("channels_last",),
    backend: Annotated[
        list[str], typer.Option(help=f"{', '.join(registered_backends())}, or auto. cpu is always the sparse kernel.")
    ] = ("cpu",),
    threads: Annotated[list[str] | None, typer.Option(help="Default: as PyTorch chooses.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help=f"Images, for suites. Default: {DEFAULT_BATCH}.")] = None,
    repeats: Annotated[
        int, typer.Option(min=3, help="Samples of which the median is taken, after 2 for warm-up.")
    ] = 15,
    memory: Annotated[int, typer.Option(min=1, help="MiB that copies of the tensors may take, about.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the random tensors.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write environment, rows and summary.", **_FILE)] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows.", **_FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table and the summary.", **_FILE)] = None,
) -> None:
    plan = _plan(**{name: value for name, value in locals().items() if name not in ("json", "csv", "markdown")})
    _check_writable(json=json, csv=csv, markdown=markdown)
    allocator = keep_freed_memory()
    found = environment()
    if found["load"] is not None and found["load"] > BUSY * found["cpu"]["cores"]:
        _warn(f"this machine is busy (load {found['load']}); times may be off")
    others = OtherProcesses()
    rows: list[results.Row] = []
    interrupted = False
    try:
        with _progress() as progress:
            task = progress.add_task("", total=len(plan))
            for row in run(plan, lambda what: progress.update(task, description=what)):
                rows.append(row)
                progress.advance(task)
    except KeyboardInterrupt:
        interrupted = True
    found |= {"other_cpus": others.cpus(), "allocator": allocator, "rotated_bytes": plan.rotation.nbytes}
    if rows:
        results.show(rows, Console())
    if found["other_cpus"] is not None and found["other_cpus"] > BUSY:
        _warn(f"other processes used {found['other_cpus']} CPUs during the measurement; these times are no evidence")
    if interrupted:
        typer.echo("interrupted: no file is written", err=True)
        raise typer.Exit(130)
    try:
        if json:
            results.write_json(json, found, rows)
        if csv:
            results.write_csv(csv, rows)
        if markdown:
            results.write_markdown(markdown, found, rows)
    except OSError as error:
        typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    if any(row.error for row in rows):
        raise typer.Exit(1)


def _plan(
    suite: list[str] | None,
    problem: list[str] | None,
    op: list[str],
    density: list[str],
    percentile: list[str],
    dtype: list[str],
    layout: list[str],
    backend: list[str],
    threads: list[str] | None,
    batch: int | None,
    repeats: int,
    memory: int,
    seed: int,
) -> Plan:
    if problem and batch is not None and not suite:
        raise typer.BadParameter("the batch of a problem is its n; accepted with --suite", param_hint="--batch")
    problems = _parse("problem", problem or [], lambda text: Layer(None, str(_problem(text)), _problem(text)))
    suite = suite or ([] if problem else ["resnet18-cifar"])
    layers = chain(*_parse("suite", suite, lambda name: suites.load(name, batch or DEFAULT_BATCH)))
    rotated = min(2 * (last_level_cache() or _UNKNOWN_CACHE), memory * 2**20 // _ROTATED)
    plan = Plan(
        layers=[*layers, *problems],
        operations=list(chain(*_parse("op", op, operations.named))),
        densities=_parse("density", density, _density),
        percentiles=_parse("percentile", percentile, lambda text: check_percentile(_float("percentile", text))),
        dtypes=_parse("dtype", dtype, lambda text: _one_of("dtype", text, DTYPES)),
        layouts=_parse("layout", layout, lambda text: _one_of("layout", text, LAYOUTS)),
        backends=_parse("backend", backend, str),
        threads=_parse("threads", threads or [str(torch.get_num_threads())], _threads),
        repeats=repeats,
        seed=seed,
        rotation=Rotation(rotated),
    )
    try:
        plan.check_backends()
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint="--backend") from None
    if not len(plan):
        raise typer.BadParameter("training computes none of these for these layers", param_hint="--op")
    return plan


def _parse(option: str, values: Sequence[str], parse: Callable[[str], T]) -> list[T]:
    """Each comma-separated part of each value, parsed, without repetitions."""
    try:
        parts = dict.fromkeys(part.strip() for value in values for part in value.split(","))
        return [parse(part) for part in parts]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"--{option}") from None


def _problem(text: str) -> ConvProblem:
    problem = ConvProblem.parse(text)
    if problem.n == 0:
        raise ValueError(f"problem: got {text!r}, a batch of 0; accepted: at least 1")
    return problem


def _float(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}: got {text!r}; accepted: a number") from None


def _density(text: str) -> float:
    value = _float("density", text)
    if not 0 <= value <= 1:
        raise ValueError(f"density: got {text!r}; accepted: 0 <= density <= 1")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"threads: got {text!r}; accepted: integers from 1")
    return int(text)


def _one_of(name: str, text: str, accepted: Sequence[str]) -> str:
    if text not in accepted:
        raise ValueError(f"{name}: got {text!r}; accepted: {', '.join(accepted)}")
    return text


def _check_writable(**files: Path | None) -> None:
    """Refuse now rather than after the measurement."""
    for name, path in files.items():
        if path is not None:
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise typer.BadParameter(
                    f"{name}: got {str(path)!r}; {folder} is not a folder to write to", param_hint=f"--{name}"
                )


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
