# SPDX-License-Identifier: Apache-2.0
"""Functional forms: :func:`prune_gradient` and :func:`sparse_conv2d`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decision, ops
from .arguments import as_int, as_pair, check_choice
from .backends.base import logger
from .backends.dense import conv2d
from .operands import autocasts, check_generator, check_operands, check_sigma_history
from .problem import ConvProblem
from .reference import PrunedGradient
from .registration import constant_to_compilers, plain, transformed
from .settings import DEFAULT, THRESHOLDS, Granularity, Pruning, check_percentile
from .symbolic import symbolic

__all__ = ["PrunedGradient", "prune_gradient", "sparse_conv2d"]


@constant_to_compilers
def _settings(
    percentile: float | None,
    placement: str,
    sigma_estimator: str,
    backend: str,
    threshold: str,
    predicted: bool,
    where: str,
    density: float | None,
    variance: float | None,
    granularity: Granularity,
    noise: float | None = None,
    importance: str = "auto",
) -> Pruning:
    """A function for torch.compile, to which settings are constants. predicted: there is a history to predict from."""
    check_choice("threshold", threshold, THRESHOLDS)
    if noise is None:
        if predicted and threshold == "sampled":
            raise ValueError("threshold: got 'sampled' with a sigma_history; accepted: one of both")
        if threshold == "predicted" and not predicted:
            raise ValueError("threshold: got 'predicted'; accepted: with a sigma_history to predict it from")
        threshold = "predicted" if predicted else threshold
    amount = density, variance, granularity, noise, importance
    return Pruning(percentile, placement, sigma_estimator, threshold, backend, where, *amount)


def _dtype(input: Tensor) -> torch.dtype:
    """The dtype that a convolution of ``input`` computes in."""
    device_type = input.device.type
    if autocasts(device_type) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return input.dtype


def _key(
    input: Tensor, weight: Tensor | None, needed: bool, generator: torch.Generator | None, direct: bool = False
) -> Tensor:
    """direct: the tensors are :func:`plain`."""
    if not needed:
        return torch.zeros(2, dtype=torch.int64, device=input.device)
    if generator is None:
        return ops.draw_key_directly(input, weight) if direct else torch.ops.sparsebwd.draw_key.default(input, weight)
    key = torch.empty(2, dtype=torch.int64, device=input.device)
    return key.random_(generator=generator)


@symbolic
def prune_gradient(
    grad: Tensor,
    percentile: float | None = DEFAULT,
    generator: torch.Generator | None = None,
    *,
    density: float | None = None,
    variance: float | None = None,
    granularity: Granularity = "element",
    sigma_estimator: str = "corrected",
    threshold: str = "exact",
    backend: str = "auto",
    sigma_history: Tensor | None = None,
) -> PrunedGradient:
    """Prune an activation gradient stochastically and without bias: E[values] = grad.

    Ye et al. (2019), "Threshold determination" and Algorithm 1, with the corrections described in
    docs/numerics. Elements below tau = sigma * Phi^-1(percentile / 100) in magnitude become 0 or
    +-tau; the others stay as they are.

    With ``density`` or ``variance``, tau is the threshold at which a histogram of |grad| says that E[density], or
    E||values - grad||^2 / ||grad||^2, is that.

    Args:
        grad: (N, C, H, W), (N, C, L) or (N, C); float16, bfloat16, float32 or float64.
        percentile: in [50, 100); 50 prunes nothing. It is not the sparsity. One of the three is given, or percentile is 90.
        density: in (0, 1]; the fraction of elements kept, on average over the draws. 1 prunes nothing.
        variance: 0 or more; 0 prunes nothing.
        granularity: "element"; or "row", ("row", width), "sample" or "channel": groups of elements are kept with probability
            min(1, norm / tau), and divided by it; tau, sigma and what is asked for are those of the norms. See
            :class:`sparsebwd.Pruning`.
        threshold: "exact": that of all of ``grad``; "sampled": that of a fixed sample of at most 16381 elements.
        generator: draws the key of the random numbers, by default PyTorch's own generator.
        sigma_estimator: "corrected", or "as_printed" for the biased estimate that the paper prints.
        backend: "auto" or the name of one.
        sigma_history: None: sigma is that of ``grad``. Else int32[5] on the device of ``grad``, which
            the caller keeps from call to call, to begin with ``torch.zeros(5, dtype=torch.int32)``:
            the threshold is predicted from the values of sigma in it, and that of ``grad`` is
            recorded in it, as described in docs/numerics, "Predicted threshold". With a percentile only.

    Returns:
        (values, tau, sigma, density); see :class:`PrunedGradient`. If the sum of |grad| is not
        finite, and nothing was predicted, values is a copy of grad and tau is 0.

    Raises:
        TypeError: another type or dtype.
        ValueError: another value or number of dimensions.
        RuntimeError: the backend asked for cannot run.

    Examples:
        >>> import torch, sparsebwd
        >>> gradient = torch.randn(64, 64, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> pruned = sparsebwd.prune_gradient(gradient, percentile=90)
        >>> print(f"{pruned.density:.2f}")  # 90 is not 90 % sparsity
        0.55
        >>> large = gradient.abs() >= pruned.tau
        >>> torch.equal(pruned.values[large], gradient[large])
        True
        >>> print(f"{sparsebwd.prune_gradient(gradient, density=0.1).density:.2f}")
        0.10
    """
    check_operands(grad=grad)
    if density is None and variance is None:
        check_percentile(percentile, or_none=False)
    predicted = sigma_history is not None
    pruning = _settings(
        percentile, "output", sigma_estimator, backend, threshold, predicted, "everywhere", density, variance, granularity
    )
    check_sigma_history(sigma_history, grad)
    check_generator(generator, grad)
    if not 2 <= grad.dim() <= 4:
        raise ValueError(f"grad: got shape {tuple(grad.shape)}; accepted: (N, C, H, W), (N, C, L) or (N, C)")
    shape = grad.shape
    if grad.dim() < 4:
        grad = grad.reshape(*shape[:2], 1, shape[2] if len(shape) == 3 else 1)
    key = _key(grad, None, pruning.active, generator, plain(grad))
    values, tau, sigma, density = torch.ops.sparsebwd.prune(grad, key, pruning.text, sigma_history)
    return PrunedGradient(values.reshape(shape), tau, sigma, density)


@symbolic
def sparse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    percentile: float | None = DEFAULT,
    density: float | None = None,
    variance: float | None = None,
    granularity: Granularity = "element",
    placement: str = "output",
    sigma_estimator: str = "corrected",
    threshold: str = "exact",
    backend: str = "auto",
    generator: torch.Generator | None = None,
    layer_id: int = 0,
    sigma_history: Tensor | None = None,
    where: str = "everywhere",
    noise: float | None = None,
    importance: str = "auto",
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` whose backward pass prunes and skips zeros.

    The forward pass is PyTorch's own. In the backward pass, placement "output" (for Conv-BN-ReLU)
    prunes the gradient of the output before both convolutions consume it; placement "input" (for
    Conv-ReLU) lets them consume it as it is and prunes the gradient of the input that they
    produce, including that of padding added here for an asymmetric "same". Zeros of the consumed
    gradient are skipped either way. The gradient of the bias is that of the unpruned gradient.
    Where no gradient is needed this is plain :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W); float16, bfloat16, float32 or float64.
        weight: (K, C / groups, R, S), dtype and device of the input.
        bias: (K,) or None.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`.
        percentile, density, variance, granularity: as in :func:`prune_gradient`; percentile=None: nothing is pruned.
        placement: "output" or "input".
        sigma_estimator, threshold, backend: as in :func:`prune_gradient`.
        generator: draws the key of the random numbers, by default PyTorch's own generator. Not
            traceable by torch.compile.
        layer_id: reported to ``sparsebwd.backends.observers``.
        sigma_history: as in :func:`prune_gradient`; read and written in the backward pass. With ``noise`` int32[6], to begin
            with all 0: the last has the bits of tau / sigma as a float32, at which the gradient is pruned.
        noise: instead of a percentile; see :class:`sparsebwd.Pruning`. Nothing is pruned without a ``sigma_history``.
        importance: "auto", "none", or "image": the threshold of each image follows from its ``input``; see
            :class:`sparsebwd.Pruning`.
        where: "everywhere", or "faster": plain :func:`torch.nn.functional.conv2d` where nothing can be faster, and
            unpruned where this very gradient is too dense; see :class:`sparsebwd.Pruning`.

    Raises:
        TypeError: another type or dtype.
        ValueError: another value, or shapes or devices that do not fit together.
        RuntimeError: the backend asked for cannot run.

    Examples:
        >>> import torch
        >>> from sparsebwd.functional import sparse_conv2d
        >>> images = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> weight = torch.randn(16, 3, 3, 3, requires_grad=True)
        >>> sparse_conv2d(images, weight, padding=1, percentile=90).square().sum().backward()
        >>> images.grad.shape, weight.grad.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([16, 3, 3, 3]))
    """
    return convolve(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        _settings(
            percentile,
            placement,
            sigma_estimator,
            backend,
            threshold,
            sigma_history is not None,
            where,
            density,
            variance,
            granularity,
            noise,
            importance,
        ),
        generator,
        as_int(layer_id, "layer_id"),
        sigma_history,
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    pruning: Pruning,
    generator: torch.Generator | None,
    layer_id: int,
    sigma_history: Tensor | None,
    keep_in_step: bool = False,
) -> Tensor:
    """:func:`sparse_conv2d` with settings made before. keep_in_step: draw a key even where no gradients are recorded."""
    stride, dilation, groups = as_pair(stride, "stride"), as_pair(dilation, "dilation"), as_int(groups, "groups")
    if not isinstance(padding, str):
        padding = as_pair(padding, "padding")
    direct = plain(input, weight) if bias is None else plain(input, weight, bias)
    problem, padding, extra = (_known if direct else _check)(input, weight, bias, stride, padding, dilation, groups)
    check_sigma_history(sigma_history, input, pruning.noise is not None)
    check_generator(generator, input)
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
    if extra is not None:
        input = F.pad(input, extra)
    sparse = input.requires_grad or weight.requires_grad
    inside_transform = not direct and transformed(input, weight, bias)
    if problem is not None and not inside_transform:
        dtype = input.dtype if direct else _dtype(input)
        if sparse and not decision.may_be_faster(pruning, problem, input, dtype):
            sparse = False
            decision.log_dense(pruning, problem, input, dtype, layer_id)

    if inside_transform:
        ops.log_unpruned()
        output = conv2d(input, weight, bias, stride, padding, dilation, groups)
    elif sparse and torch.is_grad_enabled():
        draws = pruning.active and (input.requires_grad or pruning.placement == "output")
        key = _key(input, weight, draws, generator, direct)
        apply = ops.conv2d_directly if direct else torch.ops.sparsebwd.conv2d.default
        output = apply(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            key,
            pruning.text,
            layer_id,
            sigma_history,
        )
    else:
        if sparse and pruning.active and keep_in_step:
            # Reentrant checkpointing runs forward without gradients first. Drawing the key that its replay will draw keeps
            # the generator in step, so that no two layers share one.
            _key(input, weight, True, None, direct)
        output = conv2d(input, weight, bias, stride, padding, dilation, groups)
    return output if batched else output.squeeze(0)


def is_dense(
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    pruning: Pruning,
    layer_id: int = 0,
    other_layout: bool = False,
) -> bool:
    """Whether :func:`convolve` is sure to be no more than F.conv2d; asked first, of what layers are mostly given: ordinary
    float32 tensors (N, C, H, W). Logs so. other_layout: of such a tensor in the other one, which is not logged."""
    dense = (
        pruning.where == "faster"
        and not torch.compiler.is_compiling()
        and type(input) is Tensor
        and type(stride) is type(padding) is type(dilation) is tuple
        and input.dtype is weight.dtype is torch.float32
        and (input.is_cpu and weight.is_cpu or input.device == weight.device)
        and input.dim() == 4
        and not torch._C._is_any_autocast_enabled()
        and torch._C._get_tracing_state() is None
        and not transformed()  # a batched tensor does not tell its layout
        and decision.stays_dense(
            input.shape,
            weight.shape,
            stride,
            padding,
            dilation,
            groups,
            pruning.text,
            "cpu" if input.is_cpu else input.device.type,
            torch.float32,
            input.is_contiguous(memory_format=torch.channels_last) is not other_layout,
        )
    )
    if dense and not other_layout and logger.isEnabledFor(logging.DEBUG):
        problem = decision.problem_of(tuple(input.shape), tuple(weight.shape), stride, padding, dilation, groups)
        decision.log_dense(pruning, problem, input, torch.float32, layer_id)
    return dense


class _Checked(NamedTuple):
    """problem: None where sizes are not numbers yet. padding: in numbers. extra: what F.pad is to add to the input first."""

    problem: ConvProblem | None
    padding: tuple[int, int]
    extra: tuple[int, int, int, int] | None


_checked: dict[tuple, _Checked] = {}
_MOST_CHECKED = 4096


def _known(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> _Checked:
    """:func:`_check`, which asks nothing again that it has asked of tensors of the same sizes, dtypes and devices."""
    call = (
        (input.shape, input.dtype, input.device),
        (weight.shape, weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        geometry,
    )
    found = _checked.get(call)
    if found is None:
        found = _check(input, weight, bias, *geometry)
        if len(_checked) >= _MOST_CHECKED:
            _checked.clear()
        _checked[call] = found
    return found


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> _Checked:
    """Raise unless the operands fit together."""
    check_operands(input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    if input.dim() not in (3, 4):
        raise ValueError(f"input: got shape {tuple(input.shape)}; accepted: (N, C, H, W) or (C, H, W)")
    if weight.dim() != 4:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted: (K, C/groups, R, S)")
    traced = torch.jit.is_tracing()  # sizes are tensors then
    if bias is not None and not traced and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}; accepted: ({weight.shape[0]},), one for each output channel"
        )
    extra = None
    if isinstance(padding, str):
        padding, extra = _as_named(padding, weight, stride, dilation)
    if traced or torch.compiler.is_compiling():
        return _Checked(None, padding, extra)  # to be known in the backward pass
    *leading, c, h, w = input.shape
    _, right, _, below = extra or (0, 0, 0, 0)
    size = (*(leading or (1,)), c, h + below, w + right)
    return _Checked(decision.problem_of(size, tuple(weight.shape), stride, padding, dilation, groups), padding, extra)


def _as_named(
    padding: str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """The numeric padding that "valid" or "same" is, and what F.pad is to add to the input before, if anything."""
    check_choice("padding", padding, ("valid", "same"))
    if padding == "valid":
        return (0, 0), None
    if stride != (1, 1):
        raise ValueError(f"padding: got 'same' with stride {stride}; accepted: with stride 1")
    total = [d * (size - 1) for d, size in zip(dilation, _kernel_size(weight))]
    # What is odd goes to the bottom and to the right, as in PyTorch.
    odd = any(amount % 2 for amount in total)
    return (total[0] // 2, total[1] // 2), (0, total[1] % 2, 0, total[0] % 2) if odd else None


def _kernel_size(weight: Tensor) -> tuple[int, ...]:
    """The size of the kernel, in numbers; where torch.jit.trace runs, other sizes are tensors."""
    if not torch.jit.is_tracing():
        return weight.shape[2:]
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return weight.shape[2:]
    finally:
        torch._C._set_tracing_state(state)
