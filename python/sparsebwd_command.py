# SPDX-License-Identifier: Apache-2.0
"""The command ``sparsebwd``, and ``python -m sparsebwd``: all commands of the package under one name.

Not within the package, as that loads PyTorch: help comes at once, and each command is loaded when it is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import signal
import sys
import threading
from typing import Annotated, Any


def _end(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def interrupts_end() -> None:
    """From now on SIGINT ends the process at once: while modules load there is nothing to save, and a traceback says nothing."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def interrupts_raise() -> None:
    """From now on SIGINT raises KeyboardInterrupt again."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_a_command() -> bool:
    """Whether this process was started as the command, or as python -m sparsebwd or a module of it."""
    if os.path.basename(sys.argv[0]) == "sparsebwd":
        return True
    words = iter(sys.orig_argv[1:])
    option = next((word for word in words if word.startswith("-") and not word.startswith("--") and word.endswith("m")), None)
    return sys.argv[0] == "-m" and option is not None and next(words, "").partition(".")[0] == "sparsebwd"


if is_a_command():
    interrupts_end()

import typer  # noqa: E402
import typer.core  # noqa: E402

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
        interrupts_end()
        try:
            found = importlib.import_module(module)
        finally:
            interrupts_raise()
        raise typer.Exit(found.main(context.args, context.command_path))


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
