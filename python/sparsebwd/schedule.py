# SPDX-License-Identifier: Apache-2.0
"""Percentiles that change while a model trains: :class:`PercentileSchedule`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import nn

from .arguments import as_int, check_choice, shown
from .nn import SparseConv2d
from .settings import check_percentile

__all__ = ["PercentileSchedule"]

_DENSE = 50.0  # the percentile that prunes nothing
_DECIMALS = 2  # of a percentile; each is a setting that is checked, kept and logged as one

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 - math.cos(math.pi * progress)),
    "linear": lambda progress: progress,
}
"""From 0 at 0 to 1 at 1."""


class PercentileSchedule:
    """Warm-up of pruning: takes the percentile of each layer from 50, which prunes nothing, to its own.

    As a scheduler of torch.optim: it is made after :func:`sparsebwd.convert`, takes effect at once, and is told of each step.

    After n calls of :meth:`step` a layer with the percentile p that it had when the schedule was made has
    ``50 + (p - 50) * shape((n - start) / warmup)``, rounded to two decimals: 50 up to ``start``, p from ``start + warmup``
    on. That depends on n alone, so that a run that is resumed with :meth:`load_state_dict` goes on as it would have. Once a
    layer has reached p it is left alone. Layers without a percentile, by density, variance or nothing, are left alone always.

    Under torch.compile the settings of a layer are constants: with each change the model is compiled again, and after
    ``torch._dynamo.config.recompile_limit`` (8) of them no more. Give ``changes`` a small number there, 4 for example.

    Args:
        model: with :class:`sparsebwd.SparseConv2d` layers; wrapped or compiled or not.
        warmup: steps from 50 to the layers' own percentiles; at least 0.
        shape: "cosine", slow at both ends, or "linear".
        start: steps before, in which nothing is pruned.
        changes: how many times percentiles change at the most; None: at each step.

    Raises:
        TypeError: an argument is of another type.
        ValueError: another value, or no layer has a percentile above 50.

    Examples:
        >>> import sparsebwd
        >>> from torch import nn
        >>> model = sparsebwd.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), 90, where="everywhere")
        >>> schedule = sparsebwd.PercentileSchedule(model, warmup=4, shape="linear")
        >>> for step in range(5):
        ...     print(model[0].percentile, end=" ")  # a step of training, then
        ...     schedule.step()
        50.0 60.0 70.0 80.0 90.0
    """

    def __init__(
        self, model: nn.Module, warmup: int, *, shape: str = "cosine", start: int = 0, changes: int | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; accepted: an nn.Module")
        self.warmup, self.start = as_int(warmup, "warmup", least=0), as_int(start, "start", least=0)
        self.changes = None if changes is None else as_int(changes, "changes", least=1)
        self.shape = check_choice("shape", shape, _SHAPES)
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, SparseConv2d) and module.percentile is not None and module.percentile > _DENSE
        }
        if not self._layers:
            raise ValueError("model: no layer has a percentile above 50; call sparsebwd.convert(model, percentile=...) first")
        self.targets = {name: layer.percentile for name, layer in self._layers.items() if layer.percentile is not None}
        self.steps = 0
        self._progress: float | None = None  # that the layers were set to last
        self._apply()

    @property
    def progress(self) -> float:
        """How much of the way from 50 to their own percentiles the layers have gone, in [0, 1]."""
        done = self.steps - self.start
        if done >= self.warmup:
            return 1.0
        if done <= 0:
            return 0.0
        part = done / self.warmup
        if self.changes is not None:
            part = math.floor(part * self.changes) / self.changes
        return _SHAPES[self.shape](part)

    def percentiles(self) -> dict[str, float]:
        """Those of the layers after the steps so far, by their names."""
        progress = self.progress
        return {name: round(_DENSE + (target - _DENSE) * progress, _DECIMALS) for name, target in self.targets.items()}

    def step(self, steps: int | None = None) -> None:
        """After each step of the optimizer. steps: how many there have been, where they are counted elsewhere.

        Raises TypeError or ValueError if that is no integer from 0.
        """
        self.steps = self.steps + 1 if steps is None else as_int(steps, "steps", least=0)
        self._apply()

    def _apply(self) -> None:
        progress = self.progress
        if progress != self._progress:
            for name, percentile in self.percentiles().items():
                if self._layers[name].percentile != percentile:
                    self._layers[name].percentile = percentile
            self._progress = progress

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs, of plain values."""
        return {name: getattr(self, name) for name in _STATE} | {"targets": dict(self.targets)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there: length, shape and targets become those of the schedule that was saved, and layers are set.

        Raises:
            TypeError, ValueError: it is no state of a schedule, or of one for other layers; this one is then unchanged.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != {*_STATE, "targets"}:
            raise ValueError(f"state_dict: got {shown(state_dict)}; accepted: what state_dict() of a PercentileSchedule returned")
        targets = state_dict["targets"]
        if not isinstance(targets, Mapping) or targets.keys() != self.targets.keys():
            raise ValueError(
                f"state_dict: its layers are {shown(list(targets) if isinstance(targets, Mapping) else targets)}; accepted: those "
                f"that have a percentile here, {shown(list(self.targets))}"
            )
        values = {name: as_int(state_dict[name], name, least=0) for name in ("warmup", "start", "steps")}
        shape, changes = check_choice("shape", state_dict["shape"], _SHAPES), state_dict["changes"]
        values |= {"shape": shape, "changes": None if changes is None else as_int(changes, "changes", least=1)}
        checked = {name: cast(float, check_percentile(targets[name], or_none=False)) for name in self._layers}
        for name, value in values.items():
            setattr(self, name, value)
        self.targets = checked
        self._progress = None
        self._apply()


_STATE = ("warmup", "start", "shape", "changes", "steps")
