# SPDX-License-Identifier: Apache-2.0
"""How an operator becomes a citizen of PyTorch: its definition, fake, autocast and autograd, in general.

:mod:`.ops` has the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from torch.utils.flop_counter import register_flop_formula


def begin() -> None:
    """Make the library that the following definitions go into. Where the package was imported before, this forgets the
    operators of that time."""
    namespace = vars(torch.ops.sparsebwd)
    if "library" in namespace:
        namespace["library"]._destroy()
    # Kept there, as that of a module would be lost with the module.
    namespace["library"] = torch.library.Library("sparsebwd", "DEF")


def _library() -> torch.library.Library:
    return vars(torch.ops.sparsebwd)["library"]


_PLAIN_TYPES = (Tensor, nn.Parameter)
_transforms = torch._C._functorch.peek_interpreter_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # also what a transform has left behind


def constant_to_compilers(function):
    """As torch.compiler.assume_constant_result, without loading torch.compile, which takes as long as loading PyTorch."""
    function._dynamo_marked_constant = True
    return function


@constant_to_compilers  # which is guarded: torch.compile looks at both whenever it uses compiled code
def _within_transform() -> bool:
    return _transforms() is not None or forward_ad._current_level >= 0


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func is at work, or one of ``tensors`` has a tangent (forward-mode AD)."""
    if torch.compiler.is_compiling():
        return _within_transform()
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
    ordinary dense tensors on a CPU or a CUDA device, and no mode, transform, tracer, autocast or profiler that listens."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN_TYPES
            or tensor.is_neg()
            or tensor._is_zerotensor()
            or not (tensor.is_cpu or tensor.is_cuda)
            or tensor.layout is not torch.strided
            or tensor.is_nested
            or _is_batched(tensor)
            or _is_wrapped(tensor)
        ):
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


def define(
    signature: str, implementation: Callable, fake: Callable, *tags: torch.Tag, flops: Callable | None = None
) -> None:
    """flops: for FlopCounterMode, as :func:`torch.utils.flop_counter.register_flop_formula` takes it."""
    library = _library()
    name = signature[: signature.index("(")]
    library.define(signature, tags=(torch.Tag.pt2_compliant_tag, *tags))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsebwd::{name}", fake, lib=library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.sparsebwd, name))(flops)


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

        _library().impl(name, kernel, str(key).removeprefix("DispatchKey."))

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


def _checkpoints_selectively() -> bool:
    """Whether torch.utils.checkpoint is to save the outputs of some operators (create_selective_checkpoint_contexts)."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(isinstance(mode, (_CachingTorchDispatchMode, _CachedTorchDispatchMode)) for mode in modes)


def register_autograd(
    name: str,
    implementation: Callable,
    backward: Callable,
    setup_context: Callable | None = None,
    *,
    composed: bool = False,
) -> type[torch.autograd.Function]:
    """:func:`torch.library.register_autograd` for our operators; that for any operator takes longer than a small
    convolution.

    Tensors that may need a gradient are among the first three arguments. ``backward(ctx, *grads)`` returns the
    gradients of these three, and None for the others together. ``setup_context(ctx, *args)`` is called before forward.
    ``composed``: ``implementation`` calls an operator of PyTorch, which policies of selective checkpointing are to find.

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
            if composed and _checkpoints_selectively():
                return implementation(*args)
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

    _library().impl(name, kernel, "Autograd", with_keyset=True)
    for key in ("FuncTorchBatched", "Batched"):
        _library().impl(name, refuse, key)
    return function


def not_differentiable(name: str, implementation: Callable) -> None:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"sparsebwd::{name} is not differentiable: gradients through it, and double backward "
            "through a sparse convolution, are not supported"
        )

    register_autograd(name, implementation, backward)
