# SPDX-License-Identifier: Apache-2.0
"""How an operator becomes a citizen of PyTorch: its definition, fake, autocast and autograd, in general.

:mod:`.ops` has the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

library = torch.library.Library("sparsebwd", "DEF")


_PLAIN_TYPES = (Tensor, nn.Parameter)
_transforms = torch._C._functorch.peek_interpreter_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of ``tensors`` has a tangent (forward-mode AD)."""
    if torch.compiler.is_compiling():
        return False
    if _transforms() is not None:
        return True
    # That of torch.autograd.grad(is_grads_batched=True) is another vmap, and tensors tell.
    if any(isinstance(tensor, Tensor) and _is_batched(tensor) for tensor in tensors):
        return True
    return forward_ad._current_level >= 0 and any(
        isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def plain(*tensors: Tensor) -> bool:
    """Whether the dispatcher would go straight to autograd and the implementation, so that a call need not go through it:
    ordinary tensors on a CPU or a CUDA device, and no mode, transform, tracer, autocast or profiler that listens."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _PLAIN_TYPES or tensor.is_neg() or not (tensor.is_cpu or tensor.is_cuda):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch._C._is_any_autocast_enabled()
    )


def define(signature: str, implementation: Callable, fake: Callable, *tags: torch.Tag) -> None:
    name = signature[: signature.index("(")]
    library.define(signature, tags=(torch.Tag.pt2_compliant_tag, *tags))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsebwd::{name}", fake, lib=library)


def register_autocast(name: str, cast: bool) -> None:
    """Run the operator with autocast off, on operands cast to its dtype if ``cast``."""
    operator = getattr(torch.ops.sparsebwd, name).default

    def register(device_type: str, key: torch._C.DispatchKey) -> None:
        def kernel(*args):
            if cast:
                dtype = torch.get_autocast_dtype(device_type)
                args = tuple(_cast(arg, device_type, dtype) for arg in args)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*args)

        library.impl(name, kernel, str(key).removeprefix("DispatchKey."))

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


def register_autograd(
    name: str, implementation: Callable, backward: Callable, setup_context: Callable | None = None
) -> type[torch.autograd.Function]:
    """:func:`torch.library.register_autograd` for our operators; that for any operator takes longer than a small
    convolution.

    Tensors that may need a gradient are among the first three arguments. ``backward(ctx, *grads)`` returns the
    gradients of these three, and None for the others together. ``setup_context(ctx, *args)`` is called before forward.

    Returns the function, for calls that go around the dispatcher (:func:`plain`): its ``apply`` takes the first three
    arguments and ``(None, the others)``.
    """
    operator = getattr(torch.ops.sparsebwd, name).default

    def below_autograd(keyset: torch._C.DispatchKeySet | None, args: tuple) -> object:
        if keyset is None:
            return implementation(*args)
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

    def refuse(*args):
        raise NotImplementedError(
            f"sparsebwd::{name}: called inside a transform of torch.func or under forward-mode AD; accepted: calls "
            "outside of them. sparsebwd.SparseConv2d and sparsebwd.functional.sparse_conv2d work there, without pruning"
        )

    def kernel(keyset: torch._C.DispatchKeySet, *args):
        if transformed(*args[:3]):
            refuse()
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args[:3]):
            # In one, as PyTorch looks at each argument several times.
            return function.apply(*args[:3], (keyset, args[3:]))
        return below_autograd(keyset, args)

    library.impl(name, kernel, "Autograd", with_keyset=True)
    for key in ("FuncTorchBatched", "Batched"):
        library.impl(name, refuse, key)
    return function


def not_differentiable(name: str, implementation: Callable) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"sparsebwd::{name} is not differentiable: gradients through it, and double backward "
            "through a sparse convolution, are not supported"
        )

    register_autograd(name, implementation, backward)
