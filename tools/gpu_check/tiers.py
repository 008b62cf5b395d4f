# SPDX-License-Identifier: Apache-2.0
"""What runs in which order, and for how long at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import machine
from .bench import bench
from .build import build, build_command
from .counters import counters, counters_command
from .record import Check
from .sanitizer import SANITIZER_TOOLS, sanitizer, sanitizer_command
from .steps import STEPS, steps
from .tests import ALL, OTHERS, SMOKE, tests, tests_command
from .units import FIRST_UNITS, UNITS

PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "build": build,
    "smoke": partial(tests, name="smoke", which=SMOKE),
    "first-bench": partial(bench, name="first-bench", units=FIRST_UNITS),
    "steps": steps,
    "counters": counters,
    "other-tests": partial(tests, name="other-tests", which=OTHERS),
    "tests": tests,
    "bench": bench,
    "sanitizer": sanitizer,
}
"""By name, with what each adds to the record."""


@dataclass(frozen=True)
class Tier:
    """parts: names, in the order in which they run, each with its limit in minutes; minutes: of all together."""

    minutes: float
    parts: tuple[tuple[str, float], ...]

    def scaled(self, minutes: float) -> Tier:
        """The same in `minutes`."""
        return Tier(minutes, tuple((name, limit * minutes / self.minutes) for name, limit in self.parts))

    def only(self, names: Sequence[str]) -> Tier:
        """Those of its parts; where it lacks one, with the limit that the tier "full" has for it, or 8 minutes."""
        limits = dict(TIERS["full"].parts) | dict(self.parts)
        parts = tuple((name, limits.get(name, 8.0)) for name in PARTS if name in names)
        return Tier(sum(limit for _, limit in parts), parts)


TIERS = {
    # Does it build, does each kernel compute what it should?
    "smoke": Tier(4.0, (("build", 3.0), ("smoke", 1.0))),
    # The first minutes on a borrowed GPU. What is most worth knowing comes first, and what one part leaves of its time is
    # the next ones'.
    "first": Tier(
        11.0,
        (
            ("build", 3.0),
            ("smoke", 1.0),
            ("first-bench", 3.0),
            ("steps", 2.0),
            ("counters", 1.0),
            ("other-tests", 4.0),
            ("sanitizer", 4.0),
        ),
    ),
    "full": Tier(
        48.0,
        tuple((name, 8.0) for name in ("build", "tests", "sanitizer", "bench", "steps", "counters")),
    ),
}


def commands(part: str) -> list[list[object]]:
    """What a part starts; of the benchmark, `__main__` knows more."""
    if part in ("smoke", "other-tests", "tests"):
        which = {"smoke": SMOKE, "other-tests": OTHERS, "tests": ALL}[part]
        return [tests_command(machine.WORK / f"{part}.xml", which)]
    return {
        "build": lambda: [build_command()],
        "sanitizer": lambda: [sanitizer_command(tool) for tool in SANITIZER_TOOLS],
        "counters": lambda: [counters_command()],
        "steps": lambda: [step.command(machine.WORK / "step.json") for step in STEPS],
    }.get(part, list)()


def units(part: str):
    """Of the benchmark, in this part; none in others."""
    return {"first-bench": FIRST_UNITS, "bench": UNITS}.get(part, ())
