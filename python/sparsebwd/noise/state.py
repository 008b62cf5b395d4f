# SPDX-License-Identifier: Apache-2.0
"""What a NoiseController says of itself for a checkpoint, checked before anything of it is used."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable
from typing import Any

from ..arguments import as_float, as_int, shown
from ..settings import Pruning
from .guard import STEPS

_LARGEST = 2.0**64  # that tau / sigma may be
_MOST_STEPS = 2**53  # which floats count exactly


def check(state: Any, like: dict[str, Any], layers: Collection[str]) -> None:
    """Raise TypeError or ValueError, naming the entry, unless ``state`` is of the form of ``like``, that of the controller which
    is to take it up. layers: the names of all that are sparse."""
    if not isinstance(state, dict) or state.keys() != like.keys():
        raise ValueError("state: accepted: what state_dict() of a NoiseController has returned")
    for name in ("step", "next", "rests", "known"):
        as_int(state[name], name, least=0, most=_MOST_STEPS)
    _check_bool("resting", state["resting"])
    _check_keys("ratios", state["ratios"], like["ratios"])
    for name, ratio in state["ratios"].items():
        _check_number(f"ratios.{name}", ratio, 0.0, _LARGEST)
    if not isinstance(state["off"], dict) or not state["off"].keys() <= set(layers):
        raise ValueError(f"off: got {shown(state['off'])}; accepted: layers of this model and their settings")
    for name, text in state["off"].items():
        if not isinstance(text, str):
            raise TypeError(f"off.{name}: got {shown(text)}; accepted: settings, as text")
        Pruning.parse(text)
    for name in ("noise", "density", "speedup"):  # noise may be infinite, or no number
        most = sys.float_info.max if name != "noise" else None
        if state[name] is not None:
            _check_number(name, state[name], 0.0, most)
    if (state["guard"] is None) != (like["guard"] is None):
        raise ValueError("guard: got a state with another guard=")
    if state["guard"] is not None:
        _check_guard(state["guard"], like["guard"])


def _check_guard(guard: Any, like: dict[str, Any]) -> None:
    _check_keys("guard", guard, like)
    as_int(guard["count"], "guard.count", least=0, most=STEPS - 1)
    if (guard["total"] is None) != (guard["count"] == 0):
        raise ValueError(f"guard: got the total {shown(guard['total'])} of {guard['count']} losses")
    means = [guard[name] for name in ("first", "recent", "smooth", "lowest")]
    if len({mean is None for mean in means}) > 1:
        raise ValueError(f"guard: got the means {shown(means)}; accepted: all of them, or none")
    for name, value in guard.items():
        if name != "count" and value is not None:
            _check_number(f"guard.{name}", value)


def _check_keys(where: str, got: Any, expected: Iterable[str]) -> None:
    if not isinstance(got, dict) or got.keys() != set(expected):
        raise ValueError(f"{where}: got {shown(got)}; accepted: values for {', '.join(expected) or 'nothing'}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {shown(value)}; accepted: True or False")


def _check_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
    number = as_float(value, name)
    if least is not None and number < least or most is not None and not number <= most:
        raise ValueError(f"{name}: got {shown(value)}; accepted: numbers from {least:g}{f' to {most:g}' if most else ''}")
