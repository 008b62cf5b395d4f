# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.calibrate``: measure up to which densities sparse kernels are faster on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from sparsebwd.backends import break_even, calibration
from sparsebwd.bench import terminal, training
from sparsebwd.bench.calibration import DENSITIES, Found, Measured, densities, measure, steps
from sparsebwd.commands import describe, new_app, one_line_errors
from sparsebwd.data.files import write_text

_LEAST_CHANGE = 0.02

app = new_app()


@app.command()
def command(
    output: Annotated[Path, typer.Option(help="The file to write, or to replace.", **terminal.FILE)] = Path(calibration.OUTPUT),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, and write no file.")] = False,
    threads: training.Threads = None,
) -> None:
    """Measure up to which densities of the gradient sparse convolutions are faster than dense ones on this machine.

    It takes one to two minutes, on an otherwise idle machine. For each class of convolutions, in float32 and bfloat16, contiguous and
    channels_last, sparse and dense kernels run in turns on cold operands; each result is checked before it is timed. Prints the densities
    beside those in force, and writes a file.

    The file is used only where it is asked for: by the environment variable SPARSEBWD_CALIBRATION=FILE, or
    sparsebwd.use_calibration("FILE").
    """
    if not dry_run:
        terminal.check_writable(output=output)
    try:
        in_force = _in_force()
        calibration.identity()
    except (RuntimeError, ValueError) as error:
        terminal.fail(f"error: {describe(error)}", 2)
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    with terminal.measuring():
        measured = _measure(threads)
    found = densities(measured)
    chosen = {
        dtype: {
            layout: {
                kind: tuple(map(_choose, getattr(in_force[calibration.DTYPES[dtype]], layout)[kind], pair))
                for kind, pair in kinds.items()
            }
            for layout, kinds in layouts.items()
        }
        for dtype, layouts in found.items()
    }
    typer.echo(f"Up to which densities of the gradient sparse is faster than dense; threads: {threads}")
    for table in _tables(in_force, found, chosen):
        table.show(Console())
    if dry_run:
        return
    record = calibration.record(chosen, threads, datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        write_text(output, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        terminal.fail(f"error: {describe(error)}")
    typer.echo(f"\nwritten: {output}. To use it: SPARSEBWD_CALIBRATION={output.absolute()}, or sparsebwd.use_calibration({str(output)!r})")


def _in_force() -> Mapping[torch.dtype, break_even.Table]:
    """A calibration that is outdated is no reason not to make another one."""
    usual = break_even.kind_of_cpu()
    try:
        return break_even.tables()
    except ValueError as error:
        terminal.warn(f"{describe(error)}. What is measured stands beside the densities of this kind of CPU")
        return usual


def _measure(threads: int) -> list[Measured]:
    measured: list[Measured] = []
    todo = steps(tuple(calibration.DTYPES), threads)
    try:
        with terminal.progress_bar() as progress, torch.no_grad():
            task = progress.add_task("", total=len(todo))
            for dtype, kind, problem in todo:
                progress.update(task, description=f"{dtype} {kind}")
                try:
                    measured.extend(measure(dtype, kind, problem))
                except AssertionError as error:
                    terminal.fail(f"error: a result of {problem} in {dtype} is wrong, and nothing is written: {error}")
                progress.advance(task)
    except KeyboardInterrupt:
        terminal.fail("interrupted: no file is written", status=130)
    return measured


def _choose(in_force: float, found: Found) -> float:
    """What is measured, rounded down, unless chance explains the difference to what is in force."""
    if found.density is None:
        return in_force
    kept = abs(in_force - found.density) <= max(2 * found.noise, _LEAST_CHANGE)
    beyond = found.density in (0, DENSITIES[-1]) and (in_force <= DENSITIES[0] if found.density == 0 else in_force >= DENSITIES[-1])
    return in_force if kept or beyond else math.floor(100 * found.density) / 100


def _tables(
    in_force: Mapping[torch.dtype, break_even.Table],
    found: Mapping[str, Mapping[str, Mapping[str, tuple[Found, Found]]]],
    chosen: calibration.Densities,
) -> list[terminal.Table]:
    """One for each dtype and layout; what holds for all stands below the last."""
    tables = []
    changes = noisy = 0
    for dtype, layouts in found.items():
        for layout, kinds in layouts.items():
            rows = []
            for kind, pair in kinds.items():
                cells = [kind]
                before, after = getattr(in_force[calibration.DTYPES[dtype]], layout)[kind], chosen[dtype][layout][kind]
                for old, new, measured in zip(before, after, pair):
                    cells += [f"{old:.2g}", _text(measured), f"{new:.2g}" if new != old else ""]
                    changes += new != old
                    noisy += measured.density is None
                rows.append(cells)
            headings = ("class", *("AGB", "measured", "change to"), *("WGC", "measured", "change to"))
            tables.append(terminal.Table(f"{dtype}, {layout}", headings, rows, ("class",)))
    names = " and ".join(dict.fromkeys(f"{table.name!r} ({table.origin})" for table in in_force.values()))
    notes = (
        f"in force: {names}",
        "measured: the lowest of two or three layers of the class, with the standard deviation of medians; "
        f"sparse and dense in turns at densities from {DENSITIES[0]} to {DENSITIES[-1]}",
        f"{changes} densities would change; others differ by no more than chance explains",
        *([f"{noisy} were not measured, as times varied too much: measure on an idle machine"] if noisy else []),
    )
    return [*tables[:-1], replace(tables[-1], notes=notes)]


def _text(found: Found) -> str:
    if found.density is None:
        return "too noisy"
    if found.density == 0:
        return f"< {DENSITIES[0]}"
    return f"> {DENSITIES[-1]}" if found.density == DENSITIES[-1] else f"{found.density:.2f} ± {found.noise:.2f}"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m sparsebwd.calibrate") -> None:
    with one_line_errors():
        app(arguments, prog_name=prog)


if __name__ == "__main__":
    main()
