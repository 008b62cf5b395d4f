# SPDX-License-Identifier: Apache-2.0
"""The command line of ``python -m sparsebwd.bench``."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Sequence
from itertools import chain, product
from math import inf, prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console

from sparsebwd import models
from sparsebwd.backends import registered_backends
from sparsebwd.commands import check_environment, check_seed, check_threads, new_app, one_line_errors
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import check_percentile

from . import capture, compare, devices, noise, operations, overhead, pictures, results, step, suites, zoo
from .inputs import DTYPES, LAYOUTS, PATTERNS, Rotation
from .runner import AGAINST, Plan, peaks, run
from .suites import Layer
from .terminal import BATCH_SIZE, FILE, check_writable, checked, fail, measuring, progress_bar, warn

T = TypeVar("T")

DEFAULT_BATCH = 32
_DENSITIES = ("0.35", "0.1")
_UNKNOWN_CACHE = 32 * 2**20
# Kinds of tensors that rotate: three operands in two layouts.
_ROTATED = 6

app = new_app()

_OPERATIONS = "\n".join(
    textwrap.fill(f"{found.name:<20}{found.description}", 76, subsequent_indent=" " * 20) for found in operations.ALL
)

_HELP = f"""Time the sparse kernels against dense PyTorch.

Lists, as of densities, are separated by commas; options may also be repeated. All combinations are measured. Each
result is checked first: one that is wrong is not timed, and the exit status is 1.

\b
{_OPERATIONS}

Dense is torch.ops.aten.convolution_backward for the same output, the faster of channels_last and contiguous. The AGB of
the first layer of a network is left out, as in training. Candidate and baseline run in turns, on copies of the tensors
that rotate so that the last-level cache does not hold them. Both allocate their results through PyTorch; malloc is told
to keep what is freed, or either would mostly time the system clearing fresh pages. docs/performance.md has the rest."""


@app.callback(help=_HELP, invoke_without_command=True)
def command(
    context: typer.Context,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(models.names())}, with -cifar ({models.IMAGE_SIZE['cifar']}x{models.IMAGE_SIZE['cifar']} "
            f"pixels) or -imagenet ({models.IMAGE_SIZE['imagenet']}x{models.IMAGE_SIZE['imagenet']}) behind it: each "
            "distinct convolution once. With a kernel size behind that, as in resnet50-cifar-1x1, only those. Default: "
            "resnet18-cifar.",
        ),
    ] = None,
    problem: Annotated[
        list[str] | None,
        typer.Option(
            help="One convolution, as n32c64h32w32k128r3s3u2p1d1g1: batch, input channels, height, width, output "
            "channels, kernel, stride u, padding p, dilation d, groups g; pairs as u2x1.",
        ),
    ] = None,
    gradients: Annotated[
        Path | None,
        typer.Option(
            help="Instead: the layers of a file that the command capture wrote, and their gradients.",
            dir_okay=False,
            metavar="FILE",
        ),
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="Of a suite or of --gradients, only layers of this name.")
    ] = None,
    op: Annotated[list[str], typer.Option(help=" | ".join(operations.NAMES) + ", see above.")] = ("agb", "wgc"),
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            help="For agb and wgc: zeros are iid, or skewed, with a density that differs between images and between "
            "channels, or rows, all channels of a pixel or none. Default: iid."
        ),
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(help=f"For the same: fraction of the gradient that is not zero. Default: {','.join(_DENSITIES)}."),
    ] = None,
    percentile: Annotated[
        list[str],
        typer.Option(help="For prune, backward and all of --gradients: the pruning percentile, in [50, 100)."),
    ] = ("90",),
    dtype: Annotated[list[str], typer.Option(help=" | ".join(DTYPES))] = ("float32",),
    math: Annotated[
        list[str] | None,
        typer.Option(
            help=" | ".join(devices.MATHS) + ": how dense kernels of a GPU compute with float32, that is whether cuDNN may "
            "use TF32. Default: strict."
        ),
    ] = None,
    layout: Annotated[
        list[str], typer.Option(help=" | ".join(LAYOUTS) + ": of the candidate's tensors. Dense runs in both.")
    ] = ("channels_last",),
    against: Annotated[
        str,
        typer.Option(help=" | ".join(AGAINST) + ": dense in the layout in which it is faster, or in the candidate's."),
    ] = AGAINST[0],
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(registered_backends())}, or auto. cpu and cuda are always the sparse kernels. Default: that "
            "of the device."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=" | ".join(devices.DEVICES) + ": which one is measured.")] = "cpu",
    threads: Annotated[list[str] | None, typer.Option(help="Of a CPU. Default: as PyTorch chooses.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(*BATCH_SIZE, min=1, help=f"Images, for suites. Default: {DEFAULT_BATCH}.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=3, help="Samples of which the median is taken, after 2 for warm-up.")
    ] = 15,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Begin no row after so many: files have the rows that were measured until then."),
    ] = None,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB that copies of the tensors may take, about. There are always 2 of each.")
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Of the random tensors.", callback=checked(check_seed))] = 0,
    json: Annotated[
        Path | None, typer.Option(help="Write environment, rows, summary and break-even densities.", **FILE)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows.", **FILE)] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table and what sums it up.", **FILE)] = None,
    plot: Annotated[
        list[str] | None,
        typer.Option(help="Draw speed-up against density, a line for each layer: .png or .svg.", metavar="FILE"),
    ] = None,
    compare_with: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            help="Compare with what --json wrote earlier; the exit status is 1 if a speed-up is lower than it was.",
            dir_okay=False,
            metavar="OLD.json",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="For --compare: per cent by which a speed-up may be lower, its spread apart."),
    ] = 5.0,
) -> None:
    if context.invoked_subcommand is not None:
        _refuse_options_before_command(context)
    try:
        check_environment()
    except ValueError as error:
        fail(f"error: {error}", status=2)
    if context.invoked_subcommand is not None:
        return
    old = _checked("compare", compare.load, compare_with) if compare_with else None
    plan = _plan(
        suite=suite,
        problem=problem,
        gradients=gradients,
        layer=layer,
        op=op,
        pattern=pattern,
        density=density,
        percentile=percentile,
        dtype=dtype,
        math=math,
        layout=layout,
        against=against,
        backend=backend,
        device=device,
        threads=threads,
        batch_size=batch_size,
        repeats=repeats,
        memory=memory,
        seed=seed,
    )
    _check_memory(plan, "--problem" if problem else "--batch-size")
    check_writable(json=json, csv=csv, markdown=markdown)
    draw = _pictures(plot or [], plan)
    typer.echo(f"{len(plan)} rows, {repeats} samples each", err=True)
    rows: list[results.Row] = []
    interrupted = False
    end = inf if minutes is None else time.monotonic() + 60 * minutes
    with measuring() as environment:
        try:
            environment |= peaks(plan) | {"rotated_bytes": plan.rotation.nbytes} | plan.device.describe()
            with progress_bar() as progress:
                task = progress.add_task("", total=len(plan))
                for row in run(plan, environment["peak_gflops"], lambda what: progress.update(task, description=what)):
                    rows.append(row)
                    progress.advance(task)
                    if time.monotonic() > end:
                        break
        except KeyboardInterrupt:
            interrupted = True
    if rows:
        results.show(rows, Console())
    if interrupted:
        fail("interrupted: no file is written", status=130)
    if len(rows) < len(plan):
        warn(f"{len(plan) - len(rows)} of {len(plan)} rows were not measured: the {minutes:g} minutes were over")
    try:
        if json:
            results.write_json(json, environment, rows)
        if csv:
            results.write_csv(csv, rows)
        if markdown:
            results.write_markdown(markdown, environment, rows)
        draw(environment, rows)
    except OSError as error:
        fail(f"error: {error.filename}: {error.strerror}")
    except ValueError as error:
        fail(f"error: {error}")
    failed = any(row.error for row in rows)
    if old is not None:
        comparison = compare.compare(old, environment, rows, tolerance / 100)
        compare.table(comparison, compare_with).show(Console())
        failed |= comparison.regressions > 0 or not comparison.rows
    if failed:
        raise typer.Exit(1)


app.command("capture")(capture.command)
app.command("step")(step.command)
app.command("noise")(noise.command)
app.command("overhead")(overhead.command)
app.command("zoo")(zoo.command)
app.command("plot")(pictures.command)


def _refuse_options_before_command(context: typer.Context) -> None:
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE":
            raise typer.BadParameter(
                f"accepted without a command; those of {context.invoked_subcommand} stand behind it",
                param_hint=parameter.opts[0],
            )


def _plan(
    suite: list[str] | None,
    problem: list[str] | None,
    gradients: Path | None,
    layer: list[str] | None,
    op: list[str],
    pattern: list[str] | None,
    density: list[str] | None,
    percentile: list[str],
    dtype: list[str],
    math: list[str] | None,
    layout: list[str],
    against: str,
    backend: list[str] | None,
    device: str,
    threads: list[str] | None,
    batch_size: int | None,
    repeats: int,
    memory: int,
    seed: int,
) -> Plan:
    if gradients is not None:
        for name, value in (
            ("suite", suite),
            ("problem", problem),
            ("batch-size", batch_size),
            ("pattern", pattern),
            ("density", density),
        ):
            if value:
                raise typer.BadParameter("the file of --gradients has its own", param_hint=f"--{name}")
    if problem and batch_size is not None and not suite:
        raise typer.BadParameter("the batch of a problem is its n; accepted with --suite", param_hint="--batch-size")
    measured = _checked("device", devices.named, device)
    for name, value, wanted in (("threads", threads, "cpu"), ("math", math, "cuda")):
        if value and device != wanted:
            raise typer.BadParameter(f"{name}: accepted with --device {wanted}", param_hint=f"--{name}")
    if gradients is not None:
        layers = _checked("gradients", suites.captured, gradients)
    else:
        problems = _parse("problem", problem or [], lambda text: Layer(None, str(_problem(text)), _problem(text)))
        suite = suite or ([] if problem else ["resnet18-cifar"])
        layers = [*chain(*_parse("suite", suite, lambda name: suites.load(name, batch_size or DEFAULT_BATCH))), *problems]
    if layer:
        layers = _checked("layer", suites.select, layers, _parse("layer", layer, str))
    rotated = min(2 * (measured.cache_bytes or _UNKNOWN_CACHE), memory * 2**20 // _ROTATED)
    plan = Plan(
        device=measured,
        layers=layers,
        file=gradients,
        operations=list(chain(*_parse("op", op, operations.named))),
        patterns=_parse("pattern", pattern or PATTERNS[:1], lambda text: _one_of("pattern", text, PATTERNS)),
        densities=_parse("density", density or _DENSITIES, _density),
        percentiles=_parse("percentile", percentile, lambda text: check_percentile(_float("percentile", text))),
        dtypes=_parse("dtype", dtype, lambda text: _one_of("dtype", text, DTYPES)),
        layouts=_parse("layout", layout, lambda text: _one_of("layout", text, LAYOUTS)),
        backends=_parse("backend", backend or [measured.type], str),
        threads=_parse("threads", threads or [str(torch.get_num_threads())], _threads),
        maths=_parse("math", math or devices.MATHS[:1], lambda text: _one_of("math", text, devices.MATHS)),
        against=_checked("against", lambda text: _one_of("against", text, AGAINST), against),
        repeats=repeats,
        seed=seed,
        memory=memory,
        rotation=Rotation(rotated),
    )
    for operation in plan.operations:
        if measured.type not in operation.devices:
            raise typer.BadParameter(
                f"op: {operation.name} is accepted with --device {' or '.join(operation.devices)}", param_hint="--op"
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
    parts = dict.fromkeys(part.strip() for value in values for part in value.split(","))
    return [_checked(option, parse, part) for part in parts]


def _checked(option: str, function: Callable[..., T], *arguments: object) -> T:
    """What `function` returns; its ValueError is one of the option's use."""
    try:
        return function(*arguments)
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


def _check_memory(plan: Plan, option: str) -> None:
    """Refuse problems whose tensors this machine cannot hold twice in both layouts, as `Rotation` has them."""
    if plan.device.type != "cpu":
        return
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for layer, dtype in product(plan.layers, plan.dtypes):
        problem = layer.problem
        elements = sum(map(prod, (problem.input_size, problem.weight_size, problem.output_size)))
        nbytes = 2 * 2 * elements * DTYPES[dtype].itemsize
        if nbytes > available:
            raise typer.BadParameter(
                f"{option[2:].replace('-', '_')}: got {problem} in {dtype}, whose tensors take {nbytes / 2**30:.0f} GiB at least; "
                f"accepted: what fits into the {available / 2**30:.0f} GiB of this machine",
                param_hint=option,
            )


def _threads(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"threads: got {text!r}; accepted: integers from 1")
    return check_threads(int(text))


def _one_of(name: str, text: str, accepted: Sequence[str]) -> str:
    if text not in accepted:
        raise ValueError(f"{name}: got {text!r}; accepted: {', '.join(accepted)}")
    return text


def _pictures(names: Sequence[str], plan: Plan) -> Callable[[dict[str, Any], Sequence[results.Row]], None]:
    """A function of environment and rows that draws each of them."""
    paths = [Path(name) for name in _parse("plot", names, str)]
    if not paths:
        return lambda environment, rows: None
    for path in paths:
        if path.suffix.lower() not in pictures.SUFFIXES:
            raise typer.BadParameter(
                f"plot: got {str(path)!r}; accepted: {' or '.join(pictures.SUFFIXES)}", param_hint="--plot"
            )
        check_writable(plot=path)
    if all(operation.against == results.COPY for operation in plan.operations):
        raise typer.BadParameter(
            "plot: accepted with agb, wgc or backward, which dense is timed for", param_hint="--plot"
        )
    try:
        from . import plot
    except ImportError as error:
        raise typer.BadParameter(
            f"plot: needs matplotlib, which is not installed ({error}); pip install matplotlib", param_hint="--plot"
        ) from None

    def draw(environment: dict[str, Any], rows: Sequence[results.Row]) -> None:
        for path in paths:
            plot.write(path, environment, rows)

    return draw


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.bench") -> None:
    with one_line_errors():
        app(arguments, prog_name=prog)
