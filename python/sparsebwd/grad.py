# SPDX-License-Identifier: Apache-2.0
"""The two convolutions of the backward pass alone, called as those of :mod:`torch.nn.grad`.

They skip zeros of ``grad_output`` and prune nothing. Their results cannot be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import Pair, as_int, as_pair, as_size
from .operands import check_operands
from .settings import check_backend
from .symbolic import symbolic

__all__ = ["conv2d_input", "conv2d_weight"]


@symbolic
def conv2d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """AGB: the gradient of a convolution with respect to its input.

    Args:
        input_size: (N, C, H, W).
        weight: (K, C / groups, R, S).
        grad_output: (N, K, P, Q); dtype and device of the weight.
        stride, padding, dilation, groups: those of the convolution.
        backend: "auto" or the name of one.

    Returns:
        (N, C, H, W), in the memory format of ``grad_output``.

    Raises:
        TypeError: another type or dtype.
        ValueError: another value, or shapes or devices that do not fit together.
        RuntimeError: the backend asked for cannot run.

    Examples:
        >>> import torch, sparsebwd
        >>> weight, gradient = torch.randn(16, 3, 3, 3), torch.randn(2, 16, 8, 8)
        >>> values = sparsebwd.prune_gradient(gradient, percentile=90).values  # whose zeros are skipped
        >>> sparsebwd.grad.conv2d_input((2, 3, 8, 8), weight, values, padding=1).shape
        torch.Size([2, 3, 8, 8])
    """
    check_operands(weight=weight, grad_output=grad_output)
    check_backend(backend)
    geometry = _geometry(stride, padding, dilation, groups)
    return torch.ops.sparsebwd.conv2d_input(as_size(input_size, "input_size"), weight, grad_output, *geometry, backend)


@symbolic
def conv2d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    """WGC: the gradient of a convolution with respect to its weight.

    Args:
        input: (N, C, H, W).
        weight_size: (K, C / groups, R, S).
        grad_output: (N, K, P, Q); dtype and device of the input.
        stride, padding, dilation, groups: those of the convolution.
        backend: "auto" or the name of one.

    Returns:
        (K, C / groups, R, S), in the memory format of ``input``.

    Raises:
        TypeError: another type or dtype.
        ValueError: another value, or shapes or devices that do not fit together.
        RuntimeError: the backend asked for cannot run.

    Examples:
        >>> import torch, sparsebwd
        >>> images, gradient = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 8, 8)
        >>> sparsebwd.grad.conv2d_weight(images, (16, 3, 3, 3), gradient.relu(), padding=1).shape
        torch.Size([16, 3, 3, 3])
    """
    check_operands(input=input, grad_output=grad_output)
    check_backend(backend)
    geometry = _geometry(stride, padding, dilation, groups)
    return torch.ops.sparsebwd.conv2d_weight(input, as_size(weight_size, "weight_size"), grad_output, *geometry, backend)


def _geometry(
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Pair, Pair, Pair, int]:
    return (
        as_pair(stride, "stride"),
        as_pair(padding, "padding"),
        as_pair(dilation, "dilation"),
        as_int(groups, "groups"),
    )
