# SPDX-License-Identifier: Apache-2.0
"""Which tensors the public functions take, and what they say of others."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import SIGMA_HISTORY
from .settings import Pruning

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_sigma_history(sigma_history: Tensor | None, like: Tensor, noise: bool = False) -> None:
    """Raise unless it is None, or a contiguous int32 tensor of the right size on the device of ``like``. noise: with tau / sigma
    at the end."""
    if sigma_history is None:
        return
    size = 1 + SIGMA_HISTORY + noise
    accepted = f"accepted: None, or a contiguous int32 tensor of shape ({size},) on {like.device}"
    if not isinstance(sigma_history, Tensor):
        raise TypeError(f"sigma_history: got {type(sigma_history).__name__}; {accepted}")
    if sigma_history.layout is not torch.strided or sigma_history.is_nested:
        raise TypeError(f"sigma_history: got {_layout(sigma_history)}; {accepted}")
    if sigma_history.dtype != torch.int32:
        raise TypeError(f"sigma_history: got {sigma_history.dtype}; {accepted}")
    if not torch.jit.is_tracing() and (  # sizes are tensors then
        sigma_history.shape != (size,) or not sigma_history.is_contiguous()
    ):
        raise ValueError(
            f"sigma_history: got shape {tuple(sigma_history.shape)}, strides {sigma_history.stride()}; {accepted}"
        )
    if sigma_history.device != like.device:
        raise ValueError(f"sigma_history: got device {sigma_history.device}; {accepted}")


def check_scales(scales: Tensor | None, grad: Tensor, pruning: Pruning) -> None:
    """Raise unless it is as :func:`sparsebwd.importance.scales` returns it for images of ``grad``."""
    accepted = f"accepted: float32 of shape ({len(grad)},) on {grad.device} with importance 'image', else None"
    if (scales is not None) is not pruning.by_image:
        raise ValueError(f"scales: got {'None' if scales is None else 'a tensor'} with {pruning.text or 'the default'}; {accepted}")
    if scales is not None and (
        scales.dtype != torch.float32 or scales.shape != grad.shape[:1] or scales.device != grad.device
    ):
        raise ValueError(f"scales: got {scales.dtype} of shape {tuple(scales.shape)} on {scales.device}; {accepted}")


def _layout(tensor: Tensor) -> str:
    """What a tensor is that is not dense."""
    return "a nested tensor" if tensor.is_nested else f"a tensor with the layout {tensor.layout}"


def check_operands(**tensors: Tensor) -> None:
    """Raise unless all are floating tensors of one dtype (any mix under autocast) and device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}; accepted: a torch.Tensor")
        if tensor.layout is not torch.strided or tensor.is_nested:
            raise TypeError(f"{name}: got {_layout(tensor)}; accepted: a dense tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}; accepted: " + ", ".join(str(dtype) for dtype in DTYPES))
        if tensor.device != first.device:
            raise ValueError(f"{name}: got device {tensor.device}; accepted: {first.device}, that of {first_name}")
        if tensor.dtype != first.dtype and not autocasts(first.device.type):
            raise TypeError(f"{name}: got {tensor.dtype}; accepted: {first.dtype}, the dtype of {first_name}")


def autocasts(device_type: str) -> bool:
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def check_generator(generator: torch.Generator | None, input: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}; accepted: a torch.Generator or None")
    if generator.device.type != input.device.type:
        raise ValueError(f"generator: got one on {generator.device}; accepted: one on {input.device}")
