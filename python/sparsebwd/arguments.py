# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: each returns the value in its plain form, or raises naming the argument, what was got and what
is accepted."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

Pair = tuple[int, int]

MOST = 2**63 - 1  # as tensors and operators count
_SHOWN = 200  # characters


def shown(value: Any) -> str:
    """repr() of a value that may be anything, in one line of bounded length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as of integers of thousands of digits
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def as_int(value: int, name: str, least: int | None = None, most: int = MOST) -> int:
    """Return ``value`` as an int. Raises TypeError if it is not one integer, ValueError if it is below ``least``, above
    ``most`` or needs more than 64 bits. A bool is no integer, one of NumPy's is, and so is a tensor of no dimensions on the CPU."""
    if type(value) is not int:
        try:
            if "bool" in type(value).__name__ or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", 0):
                raise TypeError
            value = value if isinstance(value, int) else operator.index(value)
        except (TypeError, RuntimeError):  # the latter of tensors on meta
            raise TypeError(f"{name}: got {shown(value)}; accepted: an int") from None
    if least is not None and value < least:
        raise ValueError(f"{name}: got {shown(value)}; accepted: at least {least}")
    if not -MOST <= value <= most:
        raise ValueError(f"{name}: got {shown(value)}; accepted: at most {'2^63 - 1' if most == MOST else most}")
    return value


def as_float(value: float, name: str, accepted: str = "a number") -> float:
    """Return ``value`` as a float. Raises TypeError if it is no real number, as a bool is none, ValueError if it is larger
    than any float. What is ``accepted`` is for the message: limits are for the caller to check, of what this returns."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {shown(value)}; accepted: {accepted}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got {shown(value)}; accepted: {accepted}") from None


def as_pair(value: int | Sequence[int], name: str, least: int | None = None) -> Pair:
    """Return ``value`` as a pair of ints (height, width); one int stands for both.

    Raises TypeError if it is not made of ints, ValueError if it is not one or two of them, or as :func:`as_int` does.
    """
    if least is None and type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        if -MOST <= value[0] <= MOST and -MOST <= value[1] <= MOST:
            return value  # as layers have it: nothing to convert
    values = value if isinstance(value, Sequence) and not isinstance(value, _TEXT) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"{name}: got {len(values)} values {shown(value)}; accepted: one or two")
    values = _as_ints(values, value, name, "an int or a pair of ints", least)
    return (values[0], values[-1])


_TEXT = (str, bytes, bytearray, memoryview)  # sequences of characters, or of bytes


def as_size(value: Sequence[int], name: str) -> list[int]:
    """Return ``value`` as four ints. Raises TypeError if it is not a sequence of ints, ValueError if of another length,
    or as :func:`as_int` does."""
    if not isinstance(value, Sequence) or isinstance(value, _TEXT):
        raise TypeError(f"{name}: got {shown(value)}; accepted: four ints")
    if len(value) != 4:
        raise ValueError(f"{name}: got {shown(value)}; accepted: four ints")
    return list(_as_ints(value, value, name, "four ints"))


def _as_ints(
    values: Iterable[int], value: Any, name: str, accepted: str, least: int | None = None
) -> tuple[int, ...]:
    try:
        return tuple(as_int(v, name, least) for v in values)
    except TypeError:
        raise TypeError(f"{name}: got {shown(value)}; accepted: {accepted}") from None


def check_flag(value: bool, name: str) -> bool:
    """Return ``value`` as a bool. Raises TypeError if it is not one, of NumPy or not, nor 0, 1 or None."""
    if value is None or isinstance(value, int) and value in (0, 1) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name}: got {shown(value)}; accepted: True or False")


def check_path(value: str | os.PathLike[str], name: str) -> Path:
    """Return ``value`` as a Path. Raises TypeError if it is neither a string nor a path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: got {shown(value)}; accepted: a path, as a string or a pathlib.Path")
    return Path(value)


def check_choice(name: str, value: str, accepted: Iterable[str]) -> str:
    """Return ``value``. Raises TypeError if it is not a string, ValueError if it is none of those accepted."""
    choices = ", ".join(repr(choice) for choice in accepted)
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {shown(value)}; accepted: {choices}")
    if value not in accepted:
        raise ValueError(f"{name}: got {shown(value)}; accepted: {choices}")
    return value
