# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own dense convolutions: the forward pass, and gradients where no sparse kernel runs.

On CPUs those in bfloat16 and float16 are oneDNN's where the CPU has the instructions, and else a path without it that takes 5 to
70 times as long as float32. There, and where oneDNN's are known to be wrong, operands are converted to float32 and
results back: sums are in float32 either way, and rounded once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..problem import ConvProblem
from ..registration import constant_to_compilers
from .base import Backend, empty

_convolution_backward = torch.ops.aten.convolution_backward.default


class DenseBackend(Backend):
    name = "dense"

    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{dtype} is not float32, bfloat16 or float16"
        if problem is not None and max(map(max, extents(problem))) >= _LARGEST_EXTENT:
            return "strides, dilation or padding take it beyond 32 bits, in which oneDNN counts: it would end the process"
        return None

    # PyTorch reads only the shape and the strides of the operand whose gradient it computes. The strides help to choose
    # the layout that it computes in: with those of an expanded tensor it converts the other operands.

    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        input = empty(problem.input_size, grad_output, reference.memory_format(grad_output))
        return gradients(problem, grad_output, input, weight, (True, False))[0]

    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        weight = empty(problem.weight_size, input, reference.memory_format(input))
        return gradients(problem, grad_output, input, weight, (False, True))[1]

    def gradients(
        self, problem: ConvProblem, grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        return gradients(problem, grad_output, input, weight, output_mask)


_LARGEST_EXTENT = 2**31


def extents(problem: ConvProblem) -> tuple[tuple[int, int], ...]:
    """Heights and widths that kernels count in: those of the padded input, of all strides, of the filter as dilated."""
    sizes, filters, outputs = (problem.h, problem.w), (problem.r, problem.s), (problem.p, problem.q)
    return (
        tuple(size + 2 * padding for size, padding in zip(sizes, problem.padding)),
        tuple(stride * output for stride, output in zip(problem.stride, outputs)),
        tuple(dilation * size for dilation, size in zip(problem.dilation, filters)),
    )


def convolution_backward(
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's gradients of the input and of the weight, None where the mask says False; as it computes them, which
    may be slow or wrong, see :func:`gradients`."""
    grad_input, grad_weight, _ = _convolution_backward(
        grad_output,
        input,
        weight,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        False,
        (0, 0),
        problem.groups,
        (*output_mask, False),
    )
    return grad_input, grad_weight


def gradients(
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output_mask: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """What :func:`convolution_backward` returns; computed in float32 where that is faster, or where PyTorch's is wrong, and
    of contiguous tensors where it would corrupt memory."""
    if grad_output.is_cpu and output_mask[1] and corrupts_memory((problem.r, problem.s), problem.stride, problem.c):
        wanted = reference.memory_format(input)
        grad_output, input, weight = (operand.contiguous() for operand in (grad_output, input, weight))
        if wanted != torch.contiguous_format:
            results = gradients(problem, grad_output, input, weight, output_mask)
            return tuple(None if result is None else result.contiguous(memory_format=wanted) for result in results)
    if not grad_output.is_cpu or not goes_through_float32(problem, grad_output.dtype):
        return convolution_backward(problem, grad_output, input, weight, output_mask)
    # Of the operand whose gradient is the only one wanted PyTorch reads nothing but shape and strides.
    operands = (
        torch.empty_like(operand, dtype=torch.float32) if output_mask == unread else operand.float()
        for operand, unread in ((input, (True, False)), (weight, (False, True)))
    )
    results = convolution_backward(problem, grad_output.float(), *operands, output_mask)
    return tuple(None if result is None else result.to(grad_output.dtype) for result in results)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d`; in float32, like its gradients, where those of :func:`gradients` are."""
    dtype = input.dtype
    autocasts = input.is_cpu and dtype != torch.float64 and torch.is_autocast_enabled("cpu")
    if autocasts:
        dtype = torch.get_autocast_dtype("cpu")
    if not widens(input, weight, padding, dilation, dtype):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if autocasts:
        input, weight, bias = (operand if operand is None else operand.to(dtype) for operand in (input, weight, bias))
    operands = (operand if operand is None else operand.float() for operand in (input, weight, bias))
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(*operands, stride, padding, dilation, groups).to(dtype)


def goes_through_float32(problem: ConvProblem, dtype: torch.dtype) -> bool:
    """Whether dense convolutions on CPUs are computed in float32 and rounded."""
    return dtype in _NATIVE and (not is_native(dtype) or _is_wrong(problem.w, problem.s, problem.padding[1], problem.dilation[1]))


def widens(
    input: Tensor, weight: Tensor, padding: Sequence[int] | str, dilation: Sequence[int], dtype: torch.dtype | None = None
) -> bool:
    """:func:`goes_through_float32`, of operands as they are, or as autocast makes them ``dtype``."""
    dtype = input.dtype if dtype is None else dtype
    if dtype not in _NATIVE or not input.is_cpu:
        return False
    if not is_native(dtype):
        return True
    if padding == "same":
        padding = (0, dilation[1] * (weight.shape[3] - 1) // 2)
    return _is_wrong(input.shape[-1], weight.shape[3], 0 if padding == "valid" else padding[1], dilation[1])


def _is_wrong(width: int, kernel_width: int, padding: int, dilation: int) -> bool:
    """Whether oneDNN in bfloat16 may be wrong: where the filter is wider than a row, or all of a row's width is padding.

    Of PyTorch 2.13 with AVX512_BF16: the gradient of the weight of n1c28h37w1k42r3s3u2p1d1g1 has an error of 4.7e32, and
    the forward pass of n2c61h3w2k32r3s1u1p2x3d3g1 is a segmentation fault.
    """
    return width < (kernel_width - 1) * dilation + 1 or width <= padding


def corrupts_memory(kernel_size: tuple[int, int], stride: tuple[int, int], channels: int) -> bool:
    """Whether oneDNN's gradient of the weight may write where it must not, of channels_last tensors.

    Of PyTorch 2.13 with AVX2: n16c3h16w16k8r1s1u2 ends in "free(): invalid size" or has a wrong gradient, with 2 to 7 input
    channels and strides of 2 or 4 in either direction; contiguous tensors, and 8 channels and more, are right.
    """
    return tuple(kernel_size) == (1, 1) and max(stride) > 1 and 1 < channels < 8


_NATIVE = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}

# Values of ONEDNN_MAX_CPU_ISA that leave oneDNN without kernels for bfloat16 and float16.
_WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")


@constant_to_compilers
@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether PyTorch's dense convolutions on this CPU are oneDNN's in this dtype, bfloat16 or float16."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.backends.mkldnn.is_available() and limit.upper() not in _WITHOUT and _NATIVE[dtype]()
