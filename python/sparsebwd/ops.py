# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.sparsebwd.*``: schemas, implementations, fakes, autograd, autocast.

Sizes, strides and so on are as in :mod:`torch.nn.functional`; ``pruning`` is :attr:`sparsebwd.Pruning.text`.
The implementations choose a backend, call it and see to it that memory formats are as the fakes
promise: the gradient of a tensor has the format of that tensor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_backward_flop, conv_flop

from . import granularity, ranges
from .backends import LayerStats, choose_backend, observers
from .backends.base import logger
from .backends.dense import gradients, widens
from .decision import log_dense, may_be_faster, problem_for
from .operands import check_scales
from .problem import ConvProblem
from .reference import density, memory_format, resolve
from .registration import (
    begin,
    constant_to_compilers,
    define,
    not_differentiable,
    plain,
    register_autocast,
    register_autograd,
    transformed,
)
from .settings import Pruning

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
# The settings are text, see Pruning.text.
_PRUNING = "Tensor key, str pruning, int layer_id"

# What reference.predict takes. The forward operator only hands it on, and has it without the "!".
_HISTORY = "Tensor(a!)? sigma_history=None"

begin()


def _unversioned(sigma_history: Tensor | None) -> Tensor | None:
    """The same memory, whose changes autograd does not see. It would call what compiled code saved for backward
    outdated where a layer is used twice before backward; any contents will do."""
    return None if sigma_history is None else sigma_history.data


def _dense(tensor: Tensor) -> Tensor:
    """``tensor``, copied if it is neither contiguous nor channels_last."""
    if tensor.numel() == 0:  # whatever its strides, PyTorch calls it contiguous
        return tensor.new_empty(tensor.shape)
    return tensor.contiguous(memory_format=memory_format(tensor))


# draw_key: the weight is an argument so that a compiler that merges identical calls merges them
# only where it also merges the convolutions; two layers may well share their input.


def draw_key_directly(input: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=input.device).random_()


def _draw_key_fake(input: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=input.device)


define(
    "draw_key(Tensor input, Tensor? weight) -> Tensor",
    draw_key_directly,
    _draw_key_fake,
    torch.Tag.nondeterministic_seeded,
)


def _prune(
    grad: Tensor,
    key: Tensor,
    pruning: str,
    sigma_history: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_scales(scales, grad, Pruning.parse(pruning))
    settings, history = resolve(Pruning.parse(pruning), _unversioned(sigma_history))
    chosen = choose_backend(settings.backend, None, grad.device.type, grad.dtype)
    if settings.granularity == "element":
        by, (values, tau, sigma, density) = chosen.name, chosen.prune(_dense(grad), key, settings, history, scales)
    else:
        by, (values, tau, sigma, density) = "plain PyTorch", granularity.prune(_dense(grad), key, settings, scales)
    logger.debug("pruning of %s in %s: ran %s", tuple(grad.shape), grad.dtype, by)
    return values.contiguous(memory_format=memory_format(grad)), tau, sigma, density


def _prune_fake(
    grad: Tensor,
    key: Tensor,
    pruning: str,
    sigma_history: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tau, sigma, density = (grad.new_empty((), dtype=torch.float32) for _ in range(3))
    return torch.empty_like(grad, memory_format=memory_format(grad)), tau, sigma, density


define(
    f"prune(Tensor grad, Tensor key, str pruning, {_HISTORY}, Tensor? scales=None)"
    " -> (Tensor values, Tensor tau, Tensor sigma, Tensor density)",
    _prune,
    _prune_fake,
)
not_differentiable("prune", _prune)
register_autocast("prune", cast=False)


# conv2d_input and conv2d_weight: the result has the memory format of the operand that has its
# kind of shape, grad_output or input.


def _check_grad_output(grad_output: Tensor, problem: ConvProblem) -> None:
    if tuple(grad_output.shape) != problem.output_size:
        raise ValueError(
            f"grad_output: got shape {tuple(grad_output.shape)}; accepted: {problem.output_size}, "
            f"the output of {problem}"
        )


def _conv2d_input(
    input_size: Sequence[int],
    weight: Tensor,
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    problem = problem_for(input_size, weight.shape, stride, padding, dilation, groups)
    _check_grad_output(grad_output, problem)
    chosen = choose_backend(backend, problem, grad_output.device.type, grad_output.dtype)
    logger.debug("AGB of %s in %s: asked of the backend %r", problem, grad_output.dtype, chosen.name)
    grad_input = chosen.conv2d_input(problem, _dense(weight), _dense(grad_output))
    return grad_input.contiguous(memory_format=memory_format(grad_output))


def _conv2d_input_fake(input_size, weight, grad_output, stride, padding, dilation, groups, backend) -> Tensor:
    return torch.empty_like(grad_output.new_empty(input_size), memory_format=memory_format(grad_output))


def _conv2d_weight(
    input: Tensor,
    weight_size: Sequence[int],
    grad_output: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    problem = problem_for(input.shape, weight_size, stride, padding, dilation, groups)
    _check_grad_output(grad_output, problem)
    chosen = choose_backend(backend, problem, grad_output.device.type, grad_output.dtype)
    logger.debug("WGC of %s in %s: asked of the backend %r", problem, grad_output.dtype, chosen.name)
    grad_weight = chosen.conv2d_weight(problem, _dense(input), _dense(grad_output))
    return grad_weight.contiguous(memory_format=memory_format(input))


def _conv2d_weight_fake(input, weight_size, grad_output, stride, padding, dilation, groups, backend) -> Tensor:
    return torch.empty_like(input.new_empty(weight_size), memory_format=memory_format(input))


# Operations are counted as PyTorch counts those of its own convolutions, zeros included.


def _backward_flops(grad_output, input, weight, groups, output_mask, out_shape) -> int:
    geometry = (None, (), (), (), False, (), groups)  # PyTorch reads none of it
    return conv_backward_flop(grad_output, input, weight, *geometry, output_mask, out_val=out_shape)


def _conv2d_input_flops(input_size, weight, grad_output, stride, padding, dilation, groups, *_, out_shape) -> int:
    return _backward_flops(grad_output, input_size, weight, groups, (True, False), (out_shape, None))


def _conv2d_weight_flops(input, weight_size, grad_output, stride, padding, dilation, groups, *_, out_shape) -> int:
    return _backward_flops(grad_output, input, weight_size, groups, (False, True), (None, out_shape))


define(
    f"conv2d_input(SymInt[] input_size, Tensor weight, Tensor grad_output, {_GEOMETRY}, str backend) -> Tensor",
    _conv2d_input,
    _conv2d_input_fake,
    flops=_conv2d_input_flops,
)
define(
    f"conv2d_weight(Tensor input, SymInt[] weight_size, Tensor grad_output, {_GEOMETRY}, str backend) -> Tensor",
    _conv2d_weight,
    _conv2d_weight_fake,
    flops=_conv2d_weight_flops,
)
not_differentiable("conv2d_input", _conv2d_input)
not_differentiable("conv2d_weight", _conv2d_weight)
register_autocast("conv2d_input", cast=True)
register_autocast("conv2d_weight", cast=True)


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    key: Tensor,
    pruning: str,
    layer_id: int,
    output_mask: Sequence[bool],
    sigma_history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output = _dense(grad_output)
    # As an operator's outputs must not share memory, there is one for each gradient that is not asked for.
    grad_input, grad_weight, grad_bias = (None if want else grad_output.new_empty(0) for want in output_mask)
    if output_mask[2]:
        grad_bias = _bias_gradient(grad_output)
    if output_mask[0] or output_mask[1]:
        problem = problem_for(input.shape, weight.shape, stride, padding, dilation, groups)
        settings, history = resolve(Pruning.parse(pruning), _unversioned(sigma_history))
        chosen = choose_backend(settings.backend, problem, grad_output.device.type, grad_output.dtype)
        if not may_be_faster(settings, problem, grad_output):
            log_dense(settings, problem, grad_output, grad_output.dtype, layer_id)
            settings = settings.unpruned
        start = time.perf_counter()
        operands = (problem, grad_output, _dense(input), _dense(weight), key, settings, output_mask[:2])
        with ranges.of_layer(layer_id):
            if settings.granularity == "element" or not settings.prunes:
                result = chosen.conv2d_backward(*operands, sigma_history=history, layer_id=layer_id)
            else:
                result = granularity.conv2d_backward(chosen, *operands, layer_id)
        seconds = time.perf_counter() - start
        if logger.isEnabledFor(logging.DEBUG):
            name, dtype = ranges.name_of(layer_id), grad_output.dtype
            logger.debug("%s, %s in %s: ran %s", name, problem, dtype, result.implementation)
        if output_mask[0]:
            grad_input = result.grad_input.contiguous(memory_format=memory_format(input))
        if output_mask[1]:
            grad_weight = result.grad_weight.contiguous(memory_format=memory_format(weight))
        if observers:
            device = grad_output.device
            stats = LayerStats(
                layer_id=layer_id,
                backend=chosen.name,
                implementation=result.implementation,
                problem=problem,
                pruning=settings,
                density=density(grad_output) if result.density is None else _float32(result.density, device),
                sigma=_float32(result.sigma, device),
                tau=_float32(result.tau, device),
                numel=grad_output.numel(),
                seconds=seconds,
            )
            for observer in tuple(observers):
                observer(stats)
    return grad_input, grad_weight, grad_bias


def _float32(scalar: Tensor | float | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else torch.as_tensor(scalar, dtype=torch.float32, device=device)


def _bias_gradient(grad_output: Tensor) -> Tensor:
    if grad_output.shape[1] > 1:
        return grad_output.sum((0, 2, 3))
    # PyTorch splits a sum that is the only one among its threads, which would make its rounding
    # depend on their number. So there are two.
    return grad_output.expand(-1, 2, -1, -1).sum((0, 2, 3))[:1].clone()


def _conv2d_backward_fake(
    grad_output,
    input,
    weight,
    stride,
    padding,
    dilation,
    groups,
    key,
    pruning,
    layer_id,
    output_mask,
    sigma_history=None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = (grad_output.new_empty(0) for _ in range(3))
    if output_mask[0]:
        grad_input = torch.empty_like(input, memory_format=memory_format(input))
    if output_mask[1]:
        grad_weight = torch.empty_like(weight, memory_format=memory_format(weight))
    if output_mask[2]:
        grad_bias = grad_output.new_empty(weight.shape[0])
    return grad_input, grad_weight, grad_bias


def _conv2d_backward_flops(grad_output, input, weight, stride, padding, dilation, groups, *config, out_shape) -> int:
    _, _, _, output_mask, *_ = config
    return _backward_flops(grad_output, input, weight, groups, output_mask, out_shape)


define(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight,"
    f" {_GEOMETRY}, {_PRUNING}, bool[3] output_mask, {_HISTORY}) -> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_fake,
    flops=_conv2d_backward_flops,
)
not_differentiable("conv2d_backward", _conv2d_backward)
register_autocast("conv2d_backward", cast=False)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    key: Tensor,
    pruning: str,
    layer_id: int,
    sigma_history: Tensor | None = None,
) -> Tensor:
    backend = Pruning.parse(pruning).backend
    if backend != "auto" and all(isinstance(size, int) for size in input.shape):
        # Refuse now rather than in the backward pass.
        problem = problem_for(input.shape, weight.shape, stride, padding, dilation, groups)
        choose_backend(backend, problem, input.device.type, input.dtype)
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


def _conv2d_fake(input, weight, bias, stride, padding, dilation, groups, *config) -> Tensor:
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


def _convolution(input, weight, bias, stride, padding, dilation, groups) -> Tensor:
    """As :func:`.backends.dense.conv2d`, below autograd and autocast."""
    if widens(input, weight, padding, dilation):
        operands = (operand if operand is None else operand.float() for operand in (input, weight, bias))
        return _convolution(*operands, stride, padding, dilation, groups).to(input.dtype)
    # Profilers with_flops count conv2d, which takes longer; modes would not see the convolution in it.
    if torch._C._autograd._profiler_enabled() and not torch._C._len_torch_dispatch_stack():
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)


def _conv2d_flops(input, weight, bias, stride, padding, dilation, *_, out_shape) -> int:
    return conv_flop(input, weight, bias, stride, padding, dilation, False, out_val=out_shape)


def _setup_context(
    ctx,
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    key,
    pruning,
    layer_id,
    sigma_history=None,
) -> None:
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.pruning = (pruning, layer_id)
    ctx.save_for_backward(input, weight, key)
    # Not saved, as a tensor that is saved must not change.
    ctx.sigma_history = sigma_history


conv2d_backward_directly = _conv2d_backward
"""The operator ``conv2d_backward`` for plain tensors where gradients are off, as :func:`conv2d_directly`."""


@lru_cache(maxsize=1)
def _log_unpruned() -> None:
    logger.warning("inside torch.func, forward-mode AD and batched gradients, sparse convolutions prune nothing")


@constant_to_compilers  # so that torch.compile logs it, rather than to end its graph there
def log_unpruned() -> None:
    """Once in a process."""
    _log_unpruned()


def _backward(ctx, grad_output: Tensor) -> tuple:
    input, weight, key = ctx.saved_tensors
    output_mask = ctx.needs_input_grad[:3]
    direct = not torch.is_grad_enabled() and plain(grad_output, input, weight)
    # Several gradients at once, as torch.autograd.grad(is_grads_batched=True) has them.
    if not direct and transformed(grad_output):
        log_unpruned()
        grads = gradients(problem_for(input.shape, weight.shape, *ctx.geometry), grad_output, input, weight, output_mask[:2])
        return (*grads, grad_output.sum((0, 2, 3)) if output_mask[2] else None, None)
    backward = _conv2d_backward if direct else torch.ops.sparsebwd.conv2d_backward.default
    grads = backward(grad_output, input, weight, *ctx.geometry, key, *ctx.pruning, output_mask, ctx.sigma_history)
    wanted = (grad if want else None for grad, want in zip(grads, output_mask))
    return (*wanted, None)


define(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, {_PRUNING},"
    " Tensor? sigma_history=None) -> Tensor",
    _conv2d,
    _conv2d_fake,
    flops=_conv2d_flops,
)
_Conv2d = register_autograd("conv2d", _conv2d, _backward, _setup_context, composed=True)
register_autocast("conv2d", cast=True)

# What Function.apply ends in, without what that does first for torch.func, which takes a third of the time.
_apply = super(torch.autograd.Function, _Conv2d).apply


def conv2d_directly(input: Tensor, weight: Tensor, bias: Tensor | None, *others) -> Tensor:
    """The operator ``conv2d``, with all its arguments, for tensors that are :func:`plain` and of which one needs a gradient.
    It is not called through the dispatcher, which would take longer than a small convolution."""
    return _apply(input, weight, bias, (None, others))
