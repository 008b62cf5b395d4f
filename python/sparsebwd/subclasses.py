# SPDX-License-Identifier: Apache-2.0
"""Subclasses of nn.Conv2d whose forward does something before or after the convolution: :func:`register_conv`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from .arguments import shown
from .nn import SparseConv2d

_C = TypeVar("_C", bound=type[nn.Conv2d])

_registered: set[type[nn.Conv2d]] = globals().get("_registered", set())  # kept where this module is reloaded


def register_conv(cls: _C) -> _C:
    """Let :func:`sparsebwd.convert` convert layers of the class ``cls``, too; may stand over the class as a decorator.

    By this you say that ``cls.forward``, however it prepares weight and input, and whatever it does with the output, calls
    :func:`torch.nn.functional.conv2d` with a weight of the size of its own, or leaves that to nn.Conv2d. In a converted layer
    that call prunes and skips zeros, and all else is as it was; gradients of the preparation are ordinary ones of what
    they are given. A subclass of ``cls`` is registered by itself, since its forward may be another.

    A converted layer is of a class derived from both ``cls`` and :class:`sparsebwd.SparseConv2d`. One that calls no such
    convolution in a training step warns.

    ::

        sparsebwd.register_conv(timm.layers.ScaledStdConv2d)

    Args:
        cls: a subclass of ``torch.nn.Conv2d``.

    Returns:
        ``cls``.

    Raises:
        TypeError: it is not a subclass of nn.Conv2d, is one of this package's, is lazy, or cannot be derived from.
    """
    accepted = "accepted: a subclass of torch.nn.Conv2d"
    if not isinstance(cls, type) or not issubclass(cls, nn.Conv2d):
        raise TypeError(f"cls: got {shown(cls)}; {accepted}")
    if cls is nn.Conv2d or issubclass(cls, SparseConv2d):
        raise TypeError(f"cls: got {cls.__name__}, which is known; {accepted} of your own")
    if issubclass(cls, LazyModuleMixin):
        raise TypeError(f"cls: got {cls.__name__}, which is lazy; {accepted} whose sizes are known")
    try:
        object.__new__(cls).__class__ = sparse_class(cls)
    except TypeError as error:
        raise TypeError(f"cls: got {cls.__name__}, with which no class can be combined ({error}); {accepted}") from None
    _registered.add(cls)
    return cls


def is_registered(cls: type) -> bool:
    """Whether layers of exactly this class can be converted: nn.Conv2d, and what was registered."""
    return cls is nn.Conv2d or cls in _registered


def original_class(cls: type) -> type[nn.Conv2d] | None:
    """What a class of this package stands for, if layers of it are made by conversion, and None for all others."""
    return vars(cls).get("_original") or (nn.Conv2d if cls is SparseConv2d else None)


def forward_to_follow(module: nn.Module) -> Callable[..., Any] | None:
    """The forward function around the convolution of a layer, converted or not, of a registered class; None for all others."""
    own = own_class(module)
    cls = original_class(own) or (own if own in _registered else nn.Conv2d)
    return None if cls is nn.Conv2d else cls.forward


class CatchConvolution(TorchFunctionMode):
    """Within, and in this thread, calls of torch.nn.functional.conv2d with a weight of the size of ``layer``'s go to ``convolve``.

    Not those of modules inside of the layer, whose weights have other sizes. A weight that is only symbolic is the layer's.
    """

    def __init__(self, layer: nn.Conv2d, convolve: Callable[..., Any]) -> None:
        super().__init__()
        self.size = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        self.convolve = convolve

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if isinstance(weight, fx.Proxy) or weight.shape == self.size:
                return self.convolve(*args, **kwargs)
        return func(*args, **kwargs)


class _Derived(SparseConv2d):
    """What comes between SparseConv2d and a registered class: its forward, with its convolution as SparseConv2d has it."""

    _original: ClassVar[type[nn.Conv2d]]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        convolve = self._convolve
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            if (call := self._symbolic_call(*args, **kwargs)) is not None:
                return call
            convolve = self._symbolic_convolve
        caught = []

        def catch(*args: Any, **kwargs: Any) -> Any:
            caught.append(True)
            return convolve(*args, **kwargs)

        with CatchConvolution(self, catch):
            output = self._original.forward(self, *args, **kwargs)
        if not caught and self.training:
            warnings.warn(
                f"{self._original.__name__} was registered by sparsebwd.register_conv, but its forward did not call "
                "torch.nn.functional.conv2d with a weight of its size: nothing is pruned",
                stacklevel=3,
            )
        return output

    def _conv_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._original._conv_forward(self, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Conv2d:
        super().__prepare_scriptable__()
        return self.to_conv2d()

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, args, *state = super().__reduce_ex__(protocol)
        if original_class(type(self)) is not None:  # nothing on top: pickles find the class by the one that it is made from
            make, args = _empty, (self._original,)
        return make, args, *state


@cache
def sparse_class(cls: type[nn.Conv2d]) -> type[SparseConv2d]:
    """The class of layers of class ``cls`` once they are converted."""
    if cls is nn.Conv2d:
        return SparseConv2d

    @wraps(cls.forward)  # whose arguments tools look at
    def forward(self: _Derived, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    members = {"_original": cls, "forward": forward, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Sparse{cls.__name__}", (_Derived, cls), members)


def _empty(cls: type[nn.Conv2d]) -> SparseConv2d:
    return object.__new__(sparse_class(cls))


_ADDED = {name for name in dir(SparseConv2d) if not name.startswith("__")} - set(dir(nn.Conv2d)) | {"layer_id", "sigma_history"}


def shadowed(module: nn.Conv2d) -> list[str]:
    """The attributes of a layer, or of its class, that would be hidden by those that a SparseConv2d has besides nn.Conv2d's."""
    own = {name for cls in own_class(module).__mro__ if not issubclass(nn.Conv2d, cls) for name in vars(cls)}
    own |= {name for kept in (vars(module), module._parameters, module._buffers, module._modules) for name in kept}
    return sorted(own & _ADDED)


# ---- what torch derives

# How torch names the classes that it derives from that of a module, to put onto the module itself: parametrize, and
# fully_shard and replicate of torch.distributed.
_DERIVED = ("Parametrized", "FSDP", "Replicate")


def _derivation(cls: type) -> str | None:
    """The prefix by which torch derived ``cls`` from the last of its bases, or None if it did not."""
    if cls.__module__.partition(".")[0] == "torch":
        for prefix in _DERIVED:
            if cls.__name__ == prefix + cls.__bases__[-1].__name__:
                return prefix
    return None


def own_class(module: nn.Module) -> type:
    """The class of ``module`` without what torch derived from it."""
    cls = type(module)
    while _derivation(cls) is not None:
        cls = cls.__bases__[-1]
    return cls


def rebased(cls: type, own: type) -> type:
    """``own``, with all on top of it that ``cls`` has on top of its own class."""
    prefix = _derivation(cls)
    if prefix is None:
        return own
    base = rebased(cls.__bases__[-1], own)
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(prefix + base.__name__, (*cls.__bases__[:-1], base), members)
