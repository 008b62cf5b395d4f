# SPDX-License-Identifier: Apache-2.0
"""What a sparse convolution does in its backward pass, as one object: :class:`Pruning`.

It travels whole from the layer to the backend. Only where an operator's schema takes nothing but plain values it is
written as text (:attr:`Pruning.text`), and read back on the other side (:meth:`Pruning.parse`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from numbers import Real
from typing import Any

from .arguments import check_choice, shown
from .reference import SIGMA_COEFFICIENT, normal_density, quantile

__all__ = ["PLACEMENTS", "THRESHOLDS", "WHERE", "Pruning", "check_backend", "check_percentile"]

PLACEMENTS = ("output", "input")
THRESHOLDS = ("exact", "predicted")
WHERE = ("everywhere", "faster")


def check_percentile(percentile: float | None, or_none: bool = True) -> float | None:
    """Return ``percentile`` as a float, or None if that is allowed. Raises TypeError, or ValueError
    outside [50, 100)."""
    if percentile is None and or_none:
        return None
    if isinstance(percentile, bool) or not isinstance(percentile, Real):
        accepted = "a number in [50, 100)" + (", or None for no pruning" if or_none else "")
        raise TypeError(f"percentile: got {shown(percentile)}; accepted: {accepted}")
    if not 50 <= percentile < 100:
        raise ValueError(f"percentile: got {shown(percentile)}; accepted: 50 <= percentile < 100")
    return float(percentile)


def check_backend(backend: str) -> str:
    """Return ``backend``. Raises TypeError if it is not a string, ValueError if no backend has this
    name, RuntimeError if it is one that is only planned."""
    if not isinstance(backend, str) or backend != "auto":
        from .backends import get_backend  # backends are given settings, so they import this module

        get_backend(backend)
    return backend


def _one_of(name: str, *accepted: str) -> Callable[[str], str]:
    return lambda value: check_choice(name, value, accepted)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "percentile": check_percentile,
    "placement": _one_of("placement", *PLACEMENTS),
    "sigma_estimator": _one_of("sigma_estimator", *SIGMA_COEFFICIENT),
    "threshold": _one_of("threshold", *THRESHOLDS),
    "backend": check_backend,
    "where": _one_of("where", *WHERE),
}


@dataclass(frozen=True, eq=False)
class Pruning:
    """How a convolution prunes its gradients, and what runs its backward pass. Immutable and hashable.

    percentile: in [50, 100), the p of the paper, or None: nothing is pruned, zeros are skipped all the same.
    placement: which gradient is pruned: "output", that of the output, for Conv-BN-ReLU; or "input", that of the
        input, for Conv-ReLU.
    sigma_estimator: "corrected", or "as_printed" for the biased estimate that the paper prints.
    threshold: "exact", that of the very gradient which is pruned, or "predicted" from the last few of the same layer.
    backend: "auto" or the name of one.
    where: "everywhere", as in the paper, or "faster": what "auto" would compute densely comes out as of an nn.Conv2d, with
        nothing pruned. A backend that is named runs everywhere.

    Derived from these: ``text``, the settings that are not the default, as ``percentile=95.0,placement=input`` (empty
    for the default), which operators take; and ``active``, whether a gradient can come out changed.

    Raises TypeError or ValueError naming the setting that is wrong, RuntimeError for a backend that is only planned.
    """

    percentile: float | None = 90.0
    placement: str = "output"
    sigma_estimator: str = "corrected"
    threshold: str = "exact"
    backend: str = "auto"
    where: str = "everywhere"
    # Derived, and ready for every call of a layer.
    text: str = field(init=False, repr=False, compare=False)
    active: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))
        object.__setattr__(self, "text", self._as_text())
        # At percentile 50 the threshold is 0.
        object.__setattr__(self, "active", self.percentile is not None and self.percentile > 50)

    # The text says all, and keeps its hash.

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if type(other) is Pruning else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def replace(self, **changes: Any) -> Pruning:
        """The same with other values for the settings named. Raises as construction does."""
        return replace(self, **changes)

    @property
    def prunes_output(self) -> bool:
        """Whether the gradient of the output is pruned, before AGB and WGC consume it."""
        return self.percentile is not None and self.placement == "output"

    @property
    def prunes_input(self) -> bool:
        """Whether the gradient of the input is pruned, which AGB has computed."""
        return self.percentile is not None and self.placement == "input"

    @cached_property
    def quantile(self) -> float:
        """tau / sigma, the standard normal quantile of the percentile. Not for percentile None."""
        return quantile(self.percentile)

    @cached_property
    def sigma_coefficient(self) -> float:
        """sigma / mean |g|."""
        return SIGMA_COEFFICIENT[self.sigma_estimator]

    @cached_property
    def unpruned(self) -> Pruning:
        """The same, but for the percentile, which is None."""
        return self.replace(percentile=None)

    @cached_property
    def lowest_density(self) -> float:
        """A density that a pruned gradient hardly ever falls below: a quarter of what normally distributed values would be
        left with. Gradients have heavier tails, and zeros of their own: half of it is usual, a third happens."""
        if self.percentile is None:
            return 0.0
        # The threshold in true standard deviations, if what is pruned is normal.
        return normal_density(self.quantile * self.sigma_coefficient / SIGMA_COEFFICIENT["corrected"]) / 4

    def _as_text(self) -> str:
        given = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}
        defaults = {setting.name: setting.default for setting in fields(self)}
        return ",".join(f"{name}={value}" for name, value in given.items() if value != defaults[name])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Pruning:
        """The settings whose ``text`` this is. Raises ValueError for what no such text is, and as construction does."""
        settings: dict[str, Any] = {}
        for item in filter(None, text.split(",")):
            name, equals, value = item.partition("=")
            if name not in _CHECKS or not equals or name in settings:
                raise ValueError(f"pruning: got {shown(text)}; accepted: settings such as 'percentile=95.0,placement=input'")
            settings[name] = value
        percentile = settings.get("percentile")
        if percentile is not None:
            try:
                settings["percentile"] = None if percentile == "None" else float(percentile)
            except ValueError:
                raise ValueError(f"percentile: got {shown(percentile)}; accepted: a number, or None") from None
        return Pruning(**settings)
