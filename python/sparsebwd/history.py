# SPDX-License-Identifier: Apache-2.0
"""The buffer ``sigma_history`` of a layer, which later thresholds are predicted from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .settings import Pruning


class RecordsSigma(nn.Conv2d):
    """An nn.Conv2d with a ``sigma_history``, where its ``pruning`` needs one.

    It is not in the state_dict, so new parameters come without one; whatever brings them begins a new one.
    """

    pruning: Pruning

    def _begin_history(self) -> None:
        if "sigma_history" in self._buffers:
            del self.sigma_history
        if self.pruning.state_size:
            self.register_buffer("sigma_history", self._empty_history(self._device()), persistent=False)

    def _empty_history(self, device: torch.device) -> Tensor:
        """What ``sigma_history`` begins with."""
        with torch.inference_mode(False):  # it is written to in backward passes
            return torch.zeros(self.pruning.state_size, dtype=torch.int32, device=device)

    def _device(self) -> torch.device:
        return a_parameter(self).device

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._forget()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        history = self._buffers.get("sigma_history")
        if history is not None and param is not None and param.device != history.device:
            self._forget()

    def _forget(self) -> None:
        history = self._buffers.get("sigma_history")
        if history is None:
            return
        device = self._device()
        if type(history) is Tensor and history.device == device:
            history.zero_()  # in place, as captured CUDA graphs and other processes may hold its address
        else:
            self._buffers["sigma_history"] = self._empty_history(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._buffers.get("sigma_history")
        super()._apply(fn, recurse)
        after = self._buffers.get("sigma_history")
        if after is not before and type(before) is type(after) is Tensor and not after.is_meta:
            self._buffers["sigma_history"] = _moved(before, after)
        return self

    def _history(self, weight: Tensor) -> Tensor | None:
        """The history for a forward pass with ``weight``: a new one if that has come to another device without it."""
        history = self._buffers.get("sigma_history")
        if history is None or history.device == weight.device:
            return history
        new = self._empty_history(weight.device)
        if not weight.is_meta:  # which would only be shapes, for which what was learnt is not given up
            self._buffers["sigma_history"] = new
        return new


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """The history ``before`` as a module's ``_apply`` has made it ``after``: an empty one where that did not keep what is
    in it, as to_empty() does not."""
    if after.dtype != before.dtype:  # Module.type() converts integers too
        after = before.to(after.device)
    if before.is_meta or not torch.equal(before, after.to(before.device)):
        after.zero_()
    return after


def a_parameter(conv: nn.Conv2d) -> Tensor:
    """Any parameter. Not the weight: it may be computed, by a parametrization that counts its calls. But where FSDP has
    made all parameters one, it is all there is."""
    parameter = next(conv.parameters(), None)
    return conv.weight if parameter is None else parameter
