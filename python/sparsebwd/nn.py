# SPDX-License-Identifier: Apache-2.0
"""The layer: :class:`SparseConv2d`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    check_backend,
    check_percentile,
    check_placement,
    check_sigma_estimator,
    check_threshold,
    convolve,
    prunes,
)
from .reference import SIGMA_HISTORY

__all__ = ["SparseConv2d"]

_layer_ids = itertools.count(1)


def _setting(name: str, check: Callable, doc: str) -> property:
    """An attribute whose value is checked when it is set."""
    private = f"_{name}"

    def get(self):
        return getattr(self, private)

    def set(self, value):
        setattr(self, private, check(value))

    return property(get, set, doc=doc)


class SparseConv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` whose backward pass prunes and skips zeros.

    Arguments, parameters and state_dict keys are those of nn.Conv2d. In training mode it computes
    :func:`sparsebwd.functional.sparse_conv2d`; in eval mode, and where no gradient is needed, it
    is an nn.Conv2d. With a ``padding_mode`` other than "zeros" and placement "input", the gradient
    of the padded input is what is pruned.

    Args:
        percentile: in [50, 100), or None: nothing is pruned, zeros are skipped all the same.
        placement: "output" (Conv-BN-ReLU) or "input" (Conv-ReLU): which gradient is pruned.
        backend: "auto" or the name of one.
        sigma_estimator: "corrected", or "as_printed" for the biased estimate that the paper prints.
        threshold: "exact": that of the very gradient which is pruned; or "predicted" from the last
            few gradients of this layer, so that a GPU reads the gradient only once.

    All five may be set later. Raises TypeError or ValueError naming the one that is wrong, both
    times, and RuntimeError for a backend that is only planned; RuntimeError in forward if the
    backend asked for cannot run.

    What the threshold is predicted from is in the buffer ``sigma_history``, int32[5], which a layer
    has only if its threshold is "predicted". It is not in the state_dict. Setting ``threshold``
    begins a new one, as is advisable after ``placement`` or ``sigma_estimator`` have changed.

    ``layer_id`` is an int unique in the process, fresh for copies, as reported to
    ``sparsebwd.backends.observers``. For torch.compile it is a constant, so that code compiled for
    one layer is not used for another: compile whole models rather than their equal blocks.
    """

    percentile = _setting("percentile", check_percentile, "In [50, 100), or None: nothing is pruned.")
    placement = _setting("placement", check_placement, '"output" or "input".')
    backend = _setting("backend", check_backend, '"auto" or the name of one.')
    sigma_estimator = _setting("sigma_estimator", check_sigma_estimator, '"corrected" or "as_printed".')

    def __init__(
        self,
        *args,
        percentile: float | None = 90.0,
        placement: str = "output",
        backend: str = "auto",
        sigma_estimator: str = "corrected",
        threshold: str = "exact",
        **kwargs,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._configure(percentile, placement, backend, sigma_estimator, threshold)

    def _configure(
        self, percentile: float | None, placement: str, backend: str, sigma_estimator: str, threshold: str
    ) -> None:
        self.percentile = percentile
        self.placement = placement
        self.backend = backend
        self.sigma_estimator = sigma_estimator
        self.threshold = threshold
        self.layer_id = next(_layer_ids)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        percentile: float | None = 90.0,
        placement: str = "output",
        backend: str = "auto",
        sigma_estimator: str = "corrected",
        threshold: str = "exact",
    ) -> SparseConv2d:
        """A layer that shares the parameters of ``conv`` (the same Parameter objects), with its
        settings, hooks and training flag.

        Raises TypeError if ``conv`` is of a subclass of nn.Conv2d: its forward pass may differ.
        """
        if type(conv) not in (nn.Conv2d, cls):
            raise TypeError(f"conv: got {type(conv).__name__}; accepted: torch.nn.Conv2d")
        layer = _share(conv, cls)
        layer._configure(percentile, placement, backend, sigma_estimator, threshold)
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """The plain nn.Conv2d that shares the parameters, hooks and training flag of this layer."""
        conv = _share(self, nn.Conv2d)
        for name in ("_percentile", "_placement", "_backend", "_sigma_estimator", "layer_id"):
            del conv.__dict__[name]
        if self.threshold == "predicted":
            del conv.sigma_history
        return conv

    @property
    def threshold(self) -> str:
        """"exact" or "predicted"."""
        return "exact" if self._buffers.get("sigma_history") is None else "predicted"

    @threshold.setter
    def threshold(self, value: str) -> None:
        check_threshold(value)
        if "sigma_history" in self._buffers:
            del self.sigma_history
        if value == "predicted":
            history = torch.zeros(1 + SIGMA_HISTORY, dtype=torch.int32, device=self.weight.device)
            self.register_buffer("sigma_history", history, persistent=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "sigma_history" in self._buffers:
            self.sigma_history.zero_()

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.training:
            return super()._conv_forward(input, weight, bias)
        if prunes(self.percentile) and not torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            # Reentrant checkpointing runs forward without gradients first. Drawing the key that
            # its replay will draw keeps the generator in step, so that no two layers share one.
            torch.ops.sparsebwd.draw_key(input, weight)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return convolve(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self._percentile,
            self._placement,
            self._sigma_estimator,
            self._backend,
            None,
            self.layer_id,
            self._buffers.get("sigma_history"),
        )

    def __setstate__(self, state: dict) -> None:
        # Called for copies and when unpickling.
        super().__setstate__(state)
        self.layer_id = next(_layer_ids)
        # A shallow copy may have another threshold.
        for name in ("_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = copy.copy(self.__dict__[name])

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, percentile={self.percentile}, placement={self.placement}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        if self.sigma_estimator != "corrected":
            text += f", sigma_estimator={self.sigma_estimator}"
        if self.threshold != "exact":
            text += f", threshold={self.threshold}"
        return text


def _share(conv: nn.Conv2d, cls: type[nn.Conv2d]) -> nn.Conv2d:
    """A module of class ``cls`` with the attributes of ``conv``; containers are copied, what they
    contain is shared. Unlike construction it draws no random numbers."""
    module = cls.__new__(cls)
    for name, value in conv.__dict__.items():
        module.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return module
