# SPDX-License-Identifier: Apache-2.0
"""The operators ``torch.ops.sparsebwd.*``: schemas, implementations, fakes, autograd, autocast.

Sizes, strides and so on are as in :mod:`torch.nn.functional`; ``pruning`` is :attr:`sparsebwd.Pruning.text`.
The implementations choose a backend, call it and see to it that memory formats are as the fakes
promise: the gradient of a tensor has the format of that tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .backends import LayerStats, choose_backend, observers
from .problem import ConvProblem
from .reference import density, memory_format
from .settings import Pruning

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
# The settings are text, see Pruning.text.
_PRUNING = "Tensor key, str pruning, int layer_id"

# What reference.predict takes. The forward operator only hands it on, and has it without the "!".
_HISTORY = "Tensor(a!)? sigma_history=None"

_library = torch.library.Library("sparsebwd", "DEF")

problem_of = lru_cache(maxsize=4096)(ConvProblem.from_sizes)


def _problem(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    return problem_of(tuple(input_size), tuple(weight_size), tuple(stride), tuple(padding), tuple(dilation), groups)


def _unversioned(sigma_history: Tensor | None) -> Tensor | None:
    """The same memory, whose changes autograd does not see. It would call what compiled code saved for backward
    outdated where a layer is used twice before backward; any contents will do."""
    return None if sigma_history is None else sigma_history.data


def _dense(tensor: Tensor) -> Tensor:
    """``tensor``, copied if it is neither contiguous nor channels_last."""
    if tensor.numel() == 0:  # whatever its strides, PyTorch calls it contiguous
        return tensor.new_empty(tensor.shape)
    return tensor.contiguous(memory_format=memory_format(tensor))


def _define(signature: str, implementation: Callable, fake: Callable, *tags: torch.Tag) -> None:
    name = signature[: signature.index("(")]
    _library.define(signature, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsebwd::{name}", fake, lib=_library)


def _register_autocast(name: str, cast: bool) -> None:
    """Run the operator with autocast off, on operands cast to its dtype if ``cast``."""
    operator = getattr(torch.ops.sparsebwd, name).default

    def register(device_type: str, key: torch._C.DispatchKey) -> None:
        def kernel(*args):
            if cast:
                dtype = torch.get_autocast_dtype(device_type)
                args = tuple(_cast(arg, device_type, dtype) for arg in args)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*args)

        _library.impl(name, kernel, str(key).removeprefix("DispatchKey."))

    register("cpu", torch._C.DispatchKey.AutocastCPU)
    register("cuda", torch._C.DispatchKey.AutocastCUDA)


def _cast(arg: object, device_type: str, dtype: torch.dtype) -> object:
    # As PyTorch's own convolution does, float64 is left alone.
    if (
        isinstance(arg, Tensor)
        and arg.is_floating_point()
        and arg.dtype != torch.float64
        and arg.device.type == device_type
    ):
        return arg.to(dtype)
    return arg


# If one of these keys comes first after autograd, the dispatcher goes on to the implementation, not to a mode or a fake.
_ORDINARY = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def _register_autograd(
    name: str, implementation: Callable, backward: Callable, setup_context: Callable | None = None
) -> None:
    """:func:`torch.library.register_autograd` for our operators; that for any operator takes longer than a small
    convolution.

    Tensors that may need a gradient are among the first three arguments. ``backward(ctx, *grads)`` returns the
    gradients of these three, and None for the others together. ``setup_context(ctx, *args)`` is called before forward.
    """
    operator = getattr(torch.ops.sparsebwd, name).default

    def below_autograd(keyset: torch._C.DispatchKeySet, args: tuple) -> object:
        keyset = keyset & torch._C._after_autograd_keyset
        if keyset.highestPriorityTypeId() in _ORDINARY:
            return implementation(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset, *args)

    def forward(ctx, *args):
        *tensors, (keyset, config) = args
        args = (*tensors, *config)
        if setup_context is not None:
            setup_context(ctx, *args)
        return below_autograd(keyset, args)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(f"sparsebwd_{name}", (torch.autograd.Function,), methods)

    def kernel(keyset: torch._C.DispatchKeySet, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:3]):
            # In one, as PyTorch looks at each argument several times.
            return function.apply(*args[:3], (keyset, args[3:]))
        return below_autograd(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _not_differentiable(name: str, implementation: Callable) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"sparsebwd::{name} is not differentiable: gradients through it, and double backward "
            "through a sparse convolution, are not supported"
        )

    _register_autograd(name, implementation, backward)


# draw_key: the weight is an argument so that a compiler that merges identical calls merges them
# only where it also merges the convolutions; two layers may well share their input.


def _draw_key(input: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=input.device).random_()


def _draw_key_fake(input: Tensor, weight: Tensor | None) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=input.device)


_define(
    "draw_key(Tensor input, Tensor? weight) -> Tensor",
    _draw_key,
    _draw_key_fake,
    torch.Tag.nondeterministic_seeded,
)


def _prune(
    grad: Tensor,
    key: Tensor,
    pruning: str,
    sigma_history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = Pruning.parse(pruning)
    chosen = choose_backend(settings.backend, None, grad.device.type, grad.dtype)
    values, tau, sigma, density = chosen.prune(_dense(grad), key, settings, _unversioned(sigma_history))
    return values.contiguous(memory_format=memory_format(grad)), tau, sigma, density


def _prune_fake(
    grad: Tensor,
    key: Tensor,
    pruning: str,
    sigma_history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tau, sigma, density = (grad.new_empty((), dtype=torch.float32) for _ in range(3))
    return torch.empty_like(grad, memory_format=memory_format(grad)), tau, sigma, density


_define(
    f"prune(Tensor grad, Tensor key, str pruning, {_HISTORY})"
    " -> (Tensor values, Tensor tau, Tensor sigma, Tensor density)",
    _prune,
    _prune_fake,
)
_not_differentiable("prune", _prune)
_register_autocast("prune", cast=False)


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
    problem = _problem(input_size, weight.shape, stride, padding, dilation, groups)
    _check_grad_output(grad_output, problem)
    chosen = choose_backend(backend, problem, grad_output.device.type, grad_output.dtype)
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
    problem = _problem(input.shape, weight_size, stride, padding, dilation, groups)
    _check_grad_output(grad_output, problem)
    chosen = choose_backend(backend, problem, grad_output.device.type, grad_output.dtype)
    grad_weight = chosen.conv2d_weight(problem, _dense(input), _dense(grad_output))
    return grad_weight.contiguous(memory_format=memory_format(input))


def _conv2d_weight_fake(input, weight_size, grad_output, stride, padding, dilation, groups, backend) -> Tensor:
    return torch.empty_like(input.new_empty(weight_size), memory_format=memory_format(input))


_define(
    f"conv2d_input(SymInt[] input_size, Tensor weight, Tensor grad_output, {_GEOMETRY}, str backend) -> Tensor",
    _conv2d_input,
    _conv2d_input_fake,
)
_define(
    f"conv2d_weight(Tensor input, SymInt[] weight_size, Tensor grad_output, {_GEOMETRY}, str backend) -> Tensor",
    _conv2d_weight,
    _conv2d_weight_fake,
)
_not_differentiable("conv2d_input", _conv2d_input)
_not_differentiable("conv2d_weight", _conv2d_weight)
_register_autocast("conv2d_input", cast=True)
_register_autocast("conv2d_weight", cast=True)


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
        problem = _problem(input.shape, weight.shape, stride, padding, dilation, groups)
        settings = Pruning.parse(pruning)
        chosen = choose_backend(settings.backend, problem, grad_output.device.type, grad_output.dtype)
        start = time.perf_counter()
        result = chosen.conv2d_backward(
            problem,
            grad_output,
            _dense(input),
            _dense(weight),
            key,
            settings,
            output_mask[:2],
            sigma_history=_unversioned(sigma_history),
            layer_id=layer_id,
        )
        seconds = time.perf_counter() - start
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


_define(
    "conv2d_backward(Tensor grad_output, Tensor input, Tensor weight,"
    f" {_GEOMETRY}, {_PRUNING}, bool[3] output_mask, {_HISTORY}) -> (Tensor, Tensor, Tensor)",
    _conv2d_backward,
    _conv2d_backward_fake,
)
_not_differentiable("conv2d_backward", _conv2d_backward)
_register_autocast("conv2d_backward", cast=False)


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
    if backend != "auto":
        # Refuse now rather than in the backward pass.
        problem = _problem(input.shape, weight.shape, stride, padding, dilation, groups)
        choose_backend(backend, problem, input.device.type, input.dtype)
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


def _conv2d_fake(input, weight, bias, stride, padding, dilation, groups, *config) -> Tensor:
    return _convolution(input, weight, bias, stride, padding, dilation, groups)


def _convolution(input, weight, bias, stride, padding, dilation, groups) -> Tensor:
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), groups)


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


def _backward(ctx, grad_output: Tensor) -> tuple:
    input, weight, key = ctx.saved_tensors
    output_mask = ctx.needs_input_grad[:3]
    grads = torch.ops.sparsebwd.conv2d_backward.default(
        grad_output, input, weight, *ctx.geometry, key, *ctx.pruning, output_mask, ctx.sigma_history
    )
    wanted = (grad if want else None for grad, want in zip(grads, output_mask))
    return (*wanted, None)


_define(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, {_PRUNING},"
    " Tensor? sigma_history=None) -> Tensor",
    _conv2d,
    _conv2d_fake,
)
_register_autograd("conv2d", _conv2d, _backward, _setup_context)
_register_autocast("conv2d", cast=True)
