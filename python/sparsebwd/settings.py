# SPDX-License-Identifier: Apache-2.0
"""What a sparse convolution does in its backward pass, as one object: :class:`Pruning`.

It travels whole from the layer to the backend. Only where an operator's schema takes nothing but plain values it is
written as text (:attr:`Pruning.text`), and read back on the other side (:meth:`Pruning.parse`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from .arguments import as_float, as_int, check_choice, shown
from .reference import SIGMA_COEFFICIENT, SIGMA_HISTORY, normal_density, quantile

__all__ = ["DEFAULT", "PLACEMENTS", "THRESHOLDS", "WHERE", "Pruning", "check_backend", "check_percentile"]

PLACEMENTS = ("output", "input")
THRESHOLDS = ("exact", "predicted", "sampled")
WHERE = ("everywhere", "faster")
GRANULARITIES = ("element", "sample", "channel")
IMPORTANCES = ("auto", "none", "image")
ROW = 64
"""Channels of a row where no other number is given."""
KNOBS = ("percentile", "density", "variance", "noise")
"""The ways to say how much is pruned, of which one is used at a time."""


class _Default(float, Enum):  # an Enum, which torch.compile takes for a constant
    PERCENTILE = 90.0

    def __repr__(self) -> str:
        return str(self.value)

    __str__ = __repr__
    __format__ = float.__format__


DEFAULT = _Default.PERCENTILE
"""Percentile 90 where nothing else is asked for: unlike a percentile that is given, it yields to the other :data:`KNOBS`."""


def check_percentile(percentile: float | None, or_none: bool = True) -> float | None:
    """Return ``percentile`` as a float, or None if that is allowed. Raises TypeError, or ValueError
    outside [50, 100)."""
    if percentile is None and or_none:
        return None
    number = as_float(percentile, "percentile", "a number in [50, 100)" + (", or None for no pruning" if or_none else ""))
    if not 50 <= number < 100:
        raise ValueError(f"percentile: got {shown(percentile)}; accepted: 50 <= percentile < 100")
    return number


def check_density(density: float | None) -> float | None:
    """Return ``density`` as a float, or None. Raises TypeError, or ValueError outside (0, 1]."""
    return _check_real("density", density, "0 < density <= 1", lambda value: 0 < value <= 1)


def check_variance(variance: float | None) -> float | None:
    """Return ``variance`` as a float, or None. Raises TypeError, or ValueError below 0 and for what is not finite."""
    return _check_real("variance", variance, "0 <= variance < infinity", lambda value: 0 <= value < math.inf)


def check_noise(noise: float | None) -> float | None:
    """Return ``noise`` as a float, or None. Raises TypeError, or ValueError for 0, below it, and what is not finite."""
    return _check_real("noise", noise, "0 < noise < infinity", lambda value: 0 < value < math.inf)


def _check_real(name: str, value: float | None, accepted: str, accepts: Callable[[float], bool]) -> float | None:
    if value is None:
        return None
    number = as_float(value, name, f"a number, {accepted}, or None")
    if not accepts(number):
        raise ValueError(f"{name}: got {shown(value)}; accepted: {accepted}")
    return number


Granularity = str | tuple[str, int]


def check_granularity(granularity: Granularity) -> Granularity:
    """Return ``granularity`` as "element", "sample", "channel" or a pair ("row", width). Raises TypeError or ValueError."""
    if isinstance(granularity, str) and granularity == "row":
        return ("row", ROW)
    if isinstance(granularity, tuple) and len(granularity) == 2 and isinstance(granularity[0], str) and granularity[0] == "row":
        width = as_int(granularity[1], "granularity", least=1)
        return "element" if width == 1 else ("row", width)
    if isinstance(granularity, str) and granularity in GRANULARITIES:
        return granularity
    error = ValueError if isinstance(granularity, str | tuple) else TypeError
    raise error(f"granularity: got {shown(granularity)}; accepted: 'row', ('row', width), {', '.join(map(repr, GRANULARITIES))}")


def parse_granularity(text: str) -> Granularity:
    """``text`` as it is, but "row:32" as ("row", 32)."""
    kind, colon, width = text.partition(":")
    return ("row", int(width)) if kind == "row" and colon and width.isdecimal() else text


def check_backend(backend: str) -> str:
    """Return ``backend``. Raises TypeError if it is not a string, ValueError if no backend has this name."""
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
    "density": check_density,
    "variance": check_variance,
    "granularity": check_granularity,
    "noise": check_noise,
    "importance": _one_of("importance", *IMPORTANCES),
}


@dataclass(frozen=True, eq=False)
class Pruning:
    """How a convolution prunes its gradients, and what runs its backward pass. Immutable and hashable.

    How much is pruned is said by one of four; where all are None nothing is, and zeros are skipped all the same.

    percentile: in [50, 100), the p of the paper. The default, 90, where none of the others is given.
    density: in (0, 1], the fraction of elements that are kept, on average over the draws. A gradient that has no more
        non-zeros than that stays as it is.
    variance: 0 or more, the V = E||pruned - g||^2 / ||g||^2 of each gradient that is pruned.
    noise: above 0, what pruning the whole network may add to the variance of the weight gradients, as a fraction of what
        minibatches have: .1 is the noise of a batch of 58 instead of 64. Nothing is pruned until a
        :class:`sparsebwd.NoiseController` has measured, which gives each layer its own tau / sigma.

    placement: which gradient is pruned: "output", that of the output, for Conv-BN-ReLU; or "input", that of the
        input, for Conv-ReLU.
    sigma_estimator: "corrected", or "as_printed" for the biased estimate that the paper prints.
    threshold: "exact", that of the very gradient which is pruned; "sampled", that of a fixed sample of its elements; or, with
        a percentile, "predicted" from the last few of the same layer.
    backend: "auto" or the name of one.
    granularity: what is kept or dropped as a whole: "element", as in the paper; "row", the 64 neighbouring channels of a pixel,
        or ("row", width); "sample", all of an image; "channel", all of a channel. ("row", 1) is "element".
    importance: "none", one tau for all images, as in the paper; or "image", for each image tau times a factor that falls with
        the norm of its input, for less noise in the gradient of the weight at the same density. Not with a variance, with
        placement "input" or granularity "channel". "auto": "image" where single elements of the gradient of an output are pruned
        by noise, else "none".
    where: "everywhere", as in the paper, or "faster": what "auto" would compute densely comes out as of an nn.Conv2d, with
        nothing pruned. A backend that is named runs everywhere.

    Derived from these: ``text``, the settings that are not the default, as ``percentile=95.0,placement=input`` (empty
    for the default), which operators take; ``active``, whether a gradient can come out changed; and ``by_image``, whether
    images have thresholds of their own.

    Raises TypeError or ValueError naming the setting that is wrong.

    Examples:
        >>> import sparsebwd
        >>> pruning = sparsebwd.Pruning(95, placement="input")
        >>> pruning.replace(density=0.2).asked
        'density 0.2'
        >>> pruning.text
        'percentile=95.0,placement=input'
    """

    percentile: float | None = DEFAULT
    placement: str = "output"
    sigma_estimator: str = "corrected"
    threshold: str = "exact"
    backend: str = "auto"
    where: str = "everywhere"
    density: float | None = None
    variance: float | None = None
    granularity: Granularity = "element"
    noise: float | None = None
    importance: str = "auto"
    # Derived, and ready for every call of a layer.
    text: str = field(init=False, repr=False, compare=False)
    active: bool = field(init=False, repr=False, compare=False)
    by_image: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.percentile is DEFAULT and any(getattr(self, name) is not None for name in KNOBS[1:]):
            object.__setattr__(self, "percentile", None)
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(getattr(self, name)))
        asked = [name for name in KNOBS if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"got both {asked[0]} and {asked[1]}; accepted: one of {', '.join(KNOBS)}")
        if self.threshold == "predicted" and self.needs_counts:
            raise ValueError(
                f"threshold: got 'predicted' with {asked[0]}; accepted: with a percentile or noise; 'sampled' reads as little of "
                "a gradient"
            )
        if self.threshold == "predicted" and self.granularity != "element":
            raise ValueError(
                f"threshold: got 'predicted' with granularity {self.granularity!r}; accepted: with granularity 'element'"
            )
        if self.importance == "image":
            self._check_importance()
        by_image = self.importance == "image"
        if self.importance == "auto":
            by_image = self.noise is not None and self.prunes_output and self.granularity == "element"
        object.__setattr__(self, "by_image", by_image)
        object.__setattr__(self, "text", self._as_text())
        # At these the threshold is 0.
        object.__setattr__(self, "active", self.prunes and tuple(getattr(self, name) for name in KNOBS) not in _IDLE)

    def _check_importance(self) -> None:
        if self.placement == "input":
            other, why = "placement 'input'", "what is pruned there meets the input of another convolution"
        elif self.granularity == "channel":
            other, why = "granularity 'channel'", "a channel is of all images"
        elif self.variance is not None:
            other, why = f"variance {self.variance:g}", "that counts errors in all images alike"
        else:
            return
        raise ValueError(f"importance: got 'image' with {other}; accepted: 'none' with that, as {why}")

    # The text says all, and keeps its hash.

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if type(other) is Pruning else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def replace(self, **changes: Any) -> Pruning:
        """The same with other values for the settings named; one that says how much is pruned replaces the one that does.
        Raises as construction does."""
        if any(name in changes for name in KNOBS):
            changes = dict.fromkeys(KNOBS) | changes
        return replace(self, **changes)

    @property
    def prunes(self) -> bool:
        """Whether a threshold is determined at all."""
        return any(getattr(self, name) is not None for name in KNOBS)

    @property
    def asked(self) -> str:
        """How much is pruned, in words: "density 0.15"."""
        return next((f"{name} {getattr(self, name):g}" for name in KNOBS if getattr(self, name) is not None), "no pruning")

    @property
    def prunes_output(self) -> bool:
        """Whether the gradient of the output is pruned, before AGB and WGC consume it."""
        return self.prunes and self.placement == "output"

    @property
    def prunes_input(self) -> bool:
        """Whether the gradient of the input is pruned, which AGB has computed."""
        return self.prunes and self.placement == "input"

    @property
    def needs_counts(self) -> bool:
        """Whether the threshold comes from a histogram; else it is sigma times :attr:`quantile`."""
        return self.density is not None or self.variance is not None

    @property
    def state_size(self) -> int:
        """Of the buffer ``sigma_history`` of a layer: tau / sigma is one more with noise. 0: it needs none."""
        noise = self.noise is not None
        return 1 + SIGMA_HISTORY + noise if noise or self.threshold == "predicted" else 0

    @cached_property
    def quantile(self) -> float | Tensor:
        """tau / sigma: the standard normal quantile of the percentile; with noise what :meth:`at` was given, else 0. A
        number, or a 0-dim float64 tensor on the device of the gradient."""
        return 0.0 if self.percentile is None else quantile(self.percentile)

    def at(self, quantile: float | Tensor) -> Pruning:
        """The same, with this tau / sigma, which its text does not say."""
        settings = copy.copy(self)
        settings.__dict__["quantile"] = quantile
        return settings

    @cached_property
    def sigma_coefficient(self) -> float:
        """sigma / mean |g|."""
        return SIGMA_COEFFICIENT[self.sigma_estimator]

    @cached_property
    def unpruned(self) -> Pruning:
        """The same, with nothing pruned."""
        return self.replace(percentile=None)

    @cached_property
    def lowest_density(self) -> float:
        """A density that a pruned gradient hardly ever falls below: a quarter of what normally distributed values would be
        left with. Gradients have heavier tails, and zeros of their own: half of it is usual, a third happens."""
        if self.density is not None:
            # What reaches the next convolution, through a rectifier, has fewer.
            return self.density if self.placement == "output" else self.density / 4
        if self.percentile is None:
            return 0.05 if self.noise is not None else 0.0
        # The threshold in true standard deviations, if what is pruned is normal.
        return normal_density(self.quantile * self.sigma_coefficient / SIGMA_COEFFICIENT["corrected"]) / 4

    @property
    def highest_density(self) -> float:
        """A density that the pruned gradient of an output does not exceed, on average over the draws: 1 where none is pruned.

        With tau = a mean|g|, of any g, mean(min(|g| / tau, 1)) <= mean|g| / tau = 1 / a.
        """
        if self.percentile is not None and self.prunes_output and self.active:
            return min(1.0, 1 / (self.sigma_coefficient * self.quantile))
        return self.density if self.density is not None and self.prunes_output else 1.0

    def _as_text(self) -> str:
        given = {setting.name: getattr(self, setting.name) for setting in fields(self) if setting.init}
        defaults = {setting.name: setting.default for setting in fields(self)}
        if isinstance(self.granularity, tuple):
            given["granularity"] = f"row:{self.granularity[1]}"
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
        if "granularity" in settings:
            settings["granularity"] = parse_granularity(settings["granularity"])
        for name in KNOBS:
            value = settings.get(name)
            if value is not None:
                try:
                    settings[name] = None if value == "None" else float(value)
                except ValueError:
                    raise ValueError(f"{name}: got {shown(value)}; accepted: a number, or None") from None
        return Pruning(**settings)


# As KNOBS.
_IDLE = ((50.0, None, None, None), (None, 1.0, None, None), (None, None, 0.0, None))
