# SPDX-License-Identifier: Apache-2.0
"""Whether a convolution is to do more than an nn.Conv2d, by its sizes, dtype, device and settings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import ranges
from .backends import why_not_faster
from .backends.base import logger, until_choices_change
from .problem import ConvProblem
from .settings import Pruning

problem_of = lru_cache(maxsize=4096)(ConvProblem.from_sizes)


def problem_for(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    return problem_of(tuple(input_size), tuple(weight_size), tuple(stride), tuple(padding), tuple(dilation), groups)


def may_be_faster(settings: Pruning, problem: ConvProblem, activation: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a layer with tensors such as ``activation``, in that dtype or another one, is to do more than an nn.Conv2d:
    not where ``where`` is "faster" and nothing can be faster."""
    return settings.where == "everywhere" or _why_dense(settings, problem, activation, dtype or activation.dtype) is None


def _why_dense(settings: Pruning, problem: ConvProblem, activation: Tensor, dtype: torch.dtype) -> str | None:
    channels_last = activation.is_contiguous(memory_format=torch.channels_last)
    return why_not_faster(settings, problem, activation.device.type, dtype, channels_last)


def log_dense(settings: Pruning, problem: ConvProblem, activation: Tensor, dtype: torch.dtype, layer_id: int) -> None:
    """Say that a layer of which :func:`may_be_faster` says no is an nn.Conv2d in this call, and why."""
    if logger.isEnabledFor(logging.DEBUG):
        reason = _why_dense(settings, problem, activation, dtype)
        logger.debug("%s, %s in %s: dense, and nothing is pruned: %s", ranges.name_of(layer_id), problem, dtype, reason)


@until_choices_change
def stays_dense(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pruning: str,
    device_type: str,
    dtype: torch.dtype,
    channels_last: bool,
) -> bool:
    """Whether :func:`may_be_faster` says no of such a call; one look-up where it was asked before."""
    problem = problem_for(input_size, weight_size, stride, padding, dilation, groups)
    return why_not_faster(Pruning.parse(pruning), problem, device_type, dtype, channels_last) is not None
