# SPDX-License-Identifier: Apache-2.0
"""What the commands have in common: what is wrong in one line, limits of arguments, plain terminals."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

import torch
import typer
import typer.core

import sparsebwd_command

from . import backends
from .arguments import shown
from .backends import break_even, cuda

_MOST_THREADS = 1024
MOST_SEED = 2**64 - 1
_LARGEST = 2**63 - 1
_NO_MEMORY = ("not enough memory", "can't allocate memory", "storage size calculation overflowed", "invalid argument to memory allocation")


class _OptionsAreNoValues:
    """Of a command or a group of them: an option that needs a value does not take the next option for it, and of a number that
    is refused it says what was got and what is accepted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        valued = {
            name
            for parameter in self.params
            if parameter.param_type_name == "option" and not (parameter.is_flag or parameter.count)
            for name in parameter.opts
        }
        option = None
        for word in args:
            if option and _is_option(word):
                raise typer.BadParameter(
                    f"got the option {shown(word)}; accepted: a value, and with = before it where it begins with a hyphen",
                    ctx,
                    param_hint=repr(option),
                )
            if word == "--" or not (option or _is_option(word) or ctx.allow_interspersed_args):
                break  # what follows are arguments, or of another command
            option = word if word in valued and not option else None
        words = list(args)  # the parser takes them out
        try:
            rest = super().parse_args(ctx, args)
            for parameter in self.params:
                _check_finite(parameter, ctx.params.get(parameter.name))
            return rest
        except typer.BadParameter as error:
            accepted = error.param and _accepted(error.param)
            if accepted and "accepted:" not in error.message:
                error.message = f"got {shown(_given(error.param.opts, words))}; accepted: {accepted}"
            raise


def _check_finite(parameter: Any, value: Any) -> None:
    """Raises BadParameter for what nothing can be made of, where the limits of a number are said by its option, not elsewhere."""
    if isinstance(value, int | float) and _limits(parameter).min is not None and not value <= _LARGEST:
        raise typer.BadParameter("it is too large", param=parameter)


def _accepted(parameter: Any) -> str | None:
    """The numbers that an option takes, in words; None where it takes something else."""
    kind, low, high = _limits(parameter)
    if kind is None:
        return None
    text = "integers" if kind is int else "numbers"
    if low is None:
        return text
    return f"{text} from {low:g} to {f'{high:g}' if high is not None else '2**63 - 1'}"


class _Limits(NamedTuple):
    """Of an option: its type, None if that is no number, and what it says of its range."""

    kind: type | None
    min: float | None
    max: float | None


def _limits(parameter: Any) -> _Limits:
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is not None:
        kind, limits = descriptor.annotation, descriptor.parameter_info
    else:  # earlier versions of typer
        limits = parameter.type
        kind = {"integer": int, "float": float}.get(limits.name.partition(" ")[0])
    return _Limits(kind if kind in (int, float) else None, *(getattr(limits, name, None) for name in ("min", "max")))


def _given(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The last value of an option."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else following
    return found


class Command(_OptionsAreNoValues, typer.core.TyperCommand):
    """A command as all are, see :func:`new_app`."""


class _Group(_OptionsAreNoValues, typer.core.TyperGroup):
    pass


class _App(typer.Typer):
    def command(self, name: str | None = None, *, cls: type[Command] = Command, **settings: Any) -> Any:
        return super().command(name, cls=cls, **settings)


def new_app(**settings: Any) -> typer.Typer:
    """A command, in the style that all have."""
    return _App(
        cls=_Group,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


class GroupedCommand(Command):
    """One whose help has its options under the names of their `rich_help_panel`, in plain text, and whose options that may be
    repeated take all words up to the next option."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                usual = "Arguments" if parameter.param_type_name == "argument" else "Other"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        words: list[str] = []
        option = None
        for word in args:
            if _is_option(word):
                option = word if word in several else None
            elif option and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)


def _is_option(word: str) -> bool:
    """Whether it begins with a hyphen and is no number below zero."""
    with suppress(ValueError):
        float(word)
        return False
    return word.startswith("-") and word != "-"


def call(app: typer.Typer, arguments: Sequence[str] | None, prog: str) -> int:
    """Run a command. Returns its exit status.

    Raises:
        SystemExit: with status 2 where an argument is refused, or if nobody reads what the command prints.
    """
    try:
        app(arguments, prog_name=prog)
    except SystemExit as ended:
        if ended.code == 2 or isinstance(ended.__context__, BrokenPipeError):
            raise
        return int(ended.code or 0)
    return 0


def fail(text: str, status: int = 1) -> NoReturn:
    """End the command with a line on stderr."""
    with suppress(OSError):
        typer.echo(text, err=True)
    raise typer.Exit(status)


def describe(error: BaseException) -> str:
    """The error in one line; that of the system names its file, and not its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of Python, on a CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a whole command: what goes wrong outside of the program ends it with one line on stderr, not a traceback.

    Raises:
        SystemExit: 1 for an error of the system or too little memory; 130 if interrupted; 141, as shells have it, if
            nobody reads what it prints.
    """
    sparsebwd_command.interrupts_raise()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a replaced stream
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        except SystemExit as ended:  # after --help, or what was wrong
            if isinstance(ended.__context__, BrokenPipeError):  # which typer takes for status 1
                raise ended.__context__ from None
            _flush()
            raise
        _flush()
    except KeyboardInterrupt as error:
        _end(str(error) or "interrupted", getattr(error, "status", 130))
    except BrokenPipeError:
        _end(None, 141)
    except OSError as error:
        text = describe(error)
        # Only what is printed has no name: files are written by `atomic_write`. What was wrong could not be said: its status holds.
        status = getattr(error.__context__, "exit_code", 1)
        _end(f"error: {text}" if error.filename else f"error: standard output: {text}", status)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _end(f"error: not enough memory: {describe(error)}", 1)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _end(text: str | None, status: int) -> None:
    """Say `text` and exit, without a second complaint about what could not be printed."""
    try:
        _flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    if text is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
    raise SystemExit(status)


def check_threads(threads: int) -> int:
    """Return ``threads``. Raises ValueError where there are more than any pool survives."""
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if not 1 <= threads <= most:
        raise ValueError(f"threads: got {threads}; accepted: 1 to {most}")
    return threads


def check_seed(seed: int) -> int:
    """Return ``seed``. Raises ValueError if it is none that PyTorch's generators take."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed: got {seed}; accepted: 0 to 2**64 - 1")
    return seed


def check_environment() -> None:
    """Raises ValueError if a variable of the environment that sparsebwd reads has a value that it does not accept."""
    cuda.cooperative()
    if backends.get_backend("cpu").available() is None:
        break_even.tables()
