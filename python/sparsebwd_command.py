# SPDX-License-Identifier: Apache-2.0
"""The command ``sparsebwd``, and ``python -m sparsebwd``: all commands of the package under one name.

Not within the package, as that loads PyTorch: help comes at once, and each command is loaded when it is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Annotated

import typer
import typer.core

COMMANDS = {
    "train": ("sparsebwd.train.cli", "Train a network with pruned gradients."),
    "bench": ("sparsebwd.bench.cli", "Time kernels and whole steps against dense PyTorch."),
    "reproduce": ("sparsebwd.reproduce.cli", "Repeat the tables and the figure of the paper."),
    "info": ("sparsebwd.info.cli", "Say what runs on this machine, and what does not."),
    "profile": ("sparsebwd.profiling.cli", "Show what each layer of a model gains, and why not."),
    "calibrate": ("sparsebwd.calibrate", "Measure where sparse is faster on this machine."),
}
"""The module of each, whose ``main(arguments, prog)`` returns the exit status or raises SystemExit, and what it is for."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("sparsebwd"))
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train convolutional networks faster: pruned activation gradients, sparse backward convolutions.

    sparsebwd COMMAND --help says more. python -m sparsebwd is the same.
    """


class _Unparsed(typer.core.TyperCommand):
    def parse_args(self, ctx, args: list[str]) -> list[str]:
        ctx.args = list(args)  # all of them: the parser would take "--" out
        return ctx.args


def _add(name: str, module: str, text: str) -> None:
    @app.command(name, cls=_Unparsed, help=text)
    def command(context: typer.Context) -> None:
        raise typer.Exit(importlib.import_module(module).main(context.args, context.command_path))


for _name, (_module, _text) in COMMANDS.items():
    _add(_name, _module, _text)


def main(prog: str = "sparsebwd") -> None:
    try:
        app(prog_name=prog)
    except OSError as error:  # of the help; commands see to theirs
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: standard output: {error.strerror}")


if __name__ == "__main__":
    main()
