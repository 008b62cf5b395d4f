# SPDX-License-Identifier: Apache-2.0
"""The layer: :class:`SparseConv2d`."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import ranges
from .arguments import as_int, as_pair, check_choice, check_flag, shown
from .backends import base
from .backends.dense import conv2d
from .functional import convolve, is_dense, sparse_conv2d
from .history import RecordsSigma, a_parameter
from .settings import DEFAULT, KNOBS, Granularity, Pruning

__all__ = ["SparseConv2d"]

_layer_ids = globals().get("_layer_ids", itertools.count(1))  # goes on where this module is reloaded


def _setting(name: str, doc: str) -> Any:
    """An attribute of the layer that is one of its ``pruning``: a property, of the type that the class declares."""

    def get(self):
        return getattr(self.pruning, name)

    def set(self, value):
        self.pruning = self.pruning.replace(**{name: value})

    return property(get, set, doc=doc)


_SETTINGS = {"pruning", *(setting.name for setting in fields(Pruning) if setting.init)}
# What a record of sigma was made with.
_DEFINING_SIGMA = ("threshold", "placement", "sigma_estimator", "state_size")


_PADDINGS = ("valid", "same")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {shown(dtype)}; accepted: a torch.dtype, or None")
    if dtype is not None and not dtype.is_floating_point:
        remedy = "; for complex numbers use torch.nn.Conv2d" if dtype.is_complex else ""
        raise TypeError(f"dtype: got {dtype}; accepted: a floating one{remedy}")
    return dtype


class SparseConv2d(RecordsSigma):
    """:class:`torch.nn.Conv2d` whose backward pass prunes and skips zeros.

    Arguments, parameters and state_dict keys are those of nn.Conv2d. In training mode it computes
    :func:`sparsebwd.functional.sparse_conv2d`; in eval mode, and where no gradient is needed, it
    is an nn.Conv2d. With a ``padding_mode`` other than "zeros" and placement "input", the gradient
    of the padded input is what is pruned.

    Args:
        percentile: in [50, 100), or None: nothing is pruned, zeros are skipped all the same.
        density, variance, noise: instead of a percentile, the fraction of elements that are kept, the variance that pruning may
            add to the gradient, or the noise that it may add to the weight gradients of the whole network, which takes a
            :class:`sparsebwd.NoiseController`; see :class:`sparsebwd.Pruning`.
        granularity: "element", "row" or ("row", width), "sample" or "channel": what is kept or dropped as a whole.
        importance: "image": the threshold of each image follows from its input too; "none"; or "auto", "image" with noise.
        placement: "output" (Conv-BN-ReLU) or "input" (Conv-ReLU): which gradient is pruned.
        backend: "auto" or the name of one.
        sigma_estimator: "corrected", or "as_printed" for the biased estimate that the paper prints.
        threshold: "exact": that of the very gradient which is pruned; "sampled": that of a fixed sample of it; or, with a
            percentile, "predicted" from the last few gradients of this layer, so that a GPU reads the gradient only once.
        where: "everywhere", or "faster": it is an nn.Conv2d where sparse kernels cannot be faster, known by the sizes, dtype
            and device of a call, and prunes nothing where this very gradient is too dense for them to be.

    All may be set later, one by one or as one :class:`sparsebwd.Pruning`, the attribute ``pruning``; of percentile, density,
    variance and noise, setting one resets the others.
    Raises TypeError or ValueError naming the one that is wrong, both times; RuntimeError in forward if the backend asked for
    cannot run.

    What the threshold is predicted from is in the buffer ``sigma_history``, int32[5], which a layer
    has only if its threshold is "predicted"; with ``noise`` it has one of int32[6], where the last is tau / sigma. It is not in
    the state_dict. Setting ``threshold``, or another ``placement`` or ``sigma_estimator``, begins a new one.

    ``layer_id`` is an int unique in the process, fresh for copies, as reported to
    ``sparsebwd.backends.observers``. For torch.compile it is a constant, so that code compiled for
    one layer is not used for another: compile whole models rather than their equal blocks.

    ``layer_name`` is the layer's name in the model that :func:`sparsebwd.convert` was given, "" where it was made by hand.
    torch.profiler shows backward passes of sparse layers as ranges ``sparsebwd backward: NAME``.

    torch.fx traces a layer as one call_module node, and torch.jit.script compiles one in eval mode.
    Tools that look for nn.Conv2d by its exact type (fusion of graphs, quantisation) do not see it: it
    warns where it can tell, and :func:`sparsebwd.revert` gives them an nn.Conv2d. fuse_modules does see it.

    Examples:
        >>> import torch, sparsebwd
        >>> layer = sparsebwd.SparseConv2d(3, 16, 3, padding=1, percentile=95)
        >>> layer(torch.randn(2, 3, 8, 8)).sum().backward()
        >>> layer.percentile = None  # nothing is pruned, zeros are skipped all the same
        >>> layer.to_conv2d()
        Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    # base.generation, and the size of the last input that was found to stay dense in either layout; or None.
    _known_dense = None

    __jit_unused_properties__ = ["percentile", "placement", "backend", "sigma_estimator", "threshold", "where", "pruning"]
    __jit_unused_properties__ += ["density", "variance", "granularity", "noise", "importance"]

    _original: ClassVar[type[nn.Conv2d]] = nn.Conv2d  # what layers are before conversion and after

    percentile: float | None = _setting("percentile", "In [50, 100), or None.")
    density: float | None = _setting("density", "In (0, 1], or None.")
    variance: float | None = _setting("variance", "0 or more, or None.")
    noise: float | None = _setting("noise", "Above 0, or None.")
    granularity: Granularity = _setting("granularity", '"element", ("row", width), "sample" or "channel".')
    importance: str = _setting("importance", '"auto", "none" or "image".')
    placement: str = _setting("placement", '"output" or "input".')
    backend: str = _setting("backend", '"auto" or the name of one.')
    sigma_estimator: str = _setting("sigma_estimator", '"corrected" or "as_printed".')
    where: str = _setting("where", '"everywhere" or "faster".')
    layer_name = ""  # torch.jit.script takes no annotation

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        percentile: float | None = DEFAULT,
        placement: str = "output",
        backend: str = "auto",
        sigma_estimator: str = "corrected",
        threshold: str = "exact",
        where: str = "everywhere",
        density: float | None = None,
        variance: float | None = None,
        granularity: Granularity = "element",
        noise: float | None = None,
        importance: str = "auto",
    ) -> None:
        settings = (threshold, backend, where, density, variance, granularity, noise, importance)
        pruning = Pruning(percentile, placement, sigma_estimator, *settings)
        super().__init__(
            as_int(in_channels, "in_channels", least=0),
            as_int(out_channels, "out_channels", least=0),
            as_pair(kernel_size, "kernel_size", least=1),
            as_pair(stride, "stride", least=1),
            check_choice("padding", padding, _PADDINGS) if isinstance(padding, str) else as_pair(padding, "padding", least=0),
            as_pair(dilation, "dilation", least=1),
            as_int(groups, "groups", least=1),
            check_flag(bias, "bias"),
            check_choice("padding_mode", padding_mode, _PADDING_MODES),
            device,
            _check_dtype(dtype),
        )
        self._configure(pruning)

    def _configure(self, pruning: Pruning) -> None:
        _check_dtype(a_parameter(self).dtype)
        self.__dict__.pop("_pruning", None)  # that of the layer it was made from, whose history is not this one's
        self.pruning = pruning
        self.layer_id = next(_layer_ids)
        ranges.register(self)

    def _unconfigure(self) -> None:
        """Leave only the attributes of an nn.Conv2d."""
        if "sigma_history" in self._buffers:
            del self.sigma_history
        del self._pruning, self.layer_id
        self.__dict__.pop("layer_name", None)
        self.__dict__.pop("_known_dense", None)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        percentile: float | None = DEFAULT,
        placement: str = "output",
        backend: str = "auto",
        sigma_estimator: str = "corrected",
        threshold: str = "exact",
        where: str = "everywhere",
        density: float | None = None,
        variance: float | None = None,
        granularity: Granularity = "element",
        noise: float | None = None,
        importance: str = "auto",
    ) -> SparseConv2d:
        """A layer that shares the parameters of ``conv`` (the same Parameter objects), with its
        settings, hooks and training flag.

        Raises TypeError if ``conv`` is of a subclass of nn.Conv2d, whose forward pass may differ, or complex.
        """
        if type(conv) not in (nn.Conv2d, cls):
            raise TypeError(f"conv: got {type(conv).__name__}; accepted: torch.nn.Conv2d")
        layer = _share(conv, cls)
        settings = (threshold, backend, where, density, variance, granularity, noise, importance)
        layer._configure(Pruning(percentile, placement, sigma_estimator, *settings))
        return layer

    def to_conv2d(self) -> nn.Conv2d:
        """The plain nn.Conv2d that shares the parameters, hooks and training flag of this layer; of a layer of a class
        that was registered by :func:`sparsebwd.register_conv`, one of that class."""
        layer = _share(self, SparseConv2d)
        layer._unconfigure()
        layer.__class__ = self._original
        return layer

    @property
    def pruning(self) -> Pruning:
        """All settings, as one immutable object. Setting another threshold, placement or sigma_estimator begins a new
        ``sigma_history``."""
        return self._pruning

    @pruning.setter
    def pruning(self, value: Pruning) -> None:
        if not isinstance(value, Pruning):
            raise TypeError(f"pruning: got {type(value).__name__}; accepted: a sparsebwd.Pruning")
        before = self.__dict__.get("_pruning")
        self._pruning = value
        if before is None or any(getattr(before, name) != getattr(value, name) for name in _DEFINING_SIGMA):
            self._begin_history()

    @property
    def threshold(self) -> str:
        """"exact" or "predicted"."""
        return self.pruning.threshold

    @threshold.setter
    def threshold(self, value: str) -> None:
        self.pruning = self.pruning.replace(threshold=value)
        self._begin_history()

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._dense_forward(input, self.weight, self.bias)
        else:  # TorchScript does not look in here.
            if isinstance(input, fx.Proxy):
                return self._symbolic_forward(input)
            return self._conv_forward(input, self.weight, self.bias)

    def _dense_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
        """nn.Conv2d._conv_forward, under a name of its own, and types, that TorchScript takes."""
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(input, weight, bias, self.stride, (0, 0), self.dilation, self.groups)
        return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _symbolic_forward(self, input: fx.Proxy) -> fx.Proxy:
        """What torch.fx traces: the call of a module, as for nn.Conv2d, and for the root of the trace that of a
        function."""
        call = self._symbolic_call(input)
        if call is not None:
            return call
        if not self.training:
            return self._dense_forward(input, self.weight, self.bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return self._symbolic_convolve(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def _symbolic_call(self, *args: Any, **kwargs: Any) -> fx.Proxy | None:
        """None for the root of the trace."""
        tracer = next(value.tracer for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy))
        if not self.training:
            warnings.warn(
                "torch.fx traces a model with SparseConv2d layers: passes over its graph that look for nn.Conv2d by "
                "exact type, such as fusion with BatchNorm2d and quantization, skip them; for these, call "
                "sparsebwd.revert(model) first",
                stacklevel=3,
            )
        if self is getattr(tracer, "root", None):
            return None
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

    def _symbolic_convolve(self, input: fx.Proxy, weight: Any, bias: Any = None, *geometry: Any, **kwargs: Any) -> fx.Proxy:
        """What is traced of `_convolve`."""
        if not self.training:
            return F.conv2d(input, weight, bias, *geometry, **kwargs)
        settings = {name: getattr(self, name) for name in ("placement", "sigma_estimator", "backend", "where", *KNOBS)}
        settings |= {"threshold": self.threshold, "granularity": self.granularity, "importance": self.importance}
        settings |= {"layer_id": self.layer_id, "sigma_history": self._buffers.get("sigma_history")}
        args = (input, weight, bias, *geometry)
        return input.tracer.create_proxy("call_function", sparse_conv2d, args, {**kwargs, **settings})

    def __prepare_scriptable__(self) -> SparseConv2d:
        # Called by torch.jit.script, which uses what it returns.
        if self.training:
            raise RuntimeError(
                "SparseConv2d: torch.jit.script cannot compile it in training mode: TorchScript would not prune; "
                "call eval() on the model, or sparsebwd.revert(model), first"
            )
        return self

    def __setattr__(self, name: str, value: object) -> None:
        if name == "qconfig" and value is not None:
            warnings.warn(
                "torch.ao.quantization looks for nn.Conv2d by its exact type and leaves SparseConv2d layers in "
                "floating point: call sparsebwd.revert(model) first",
                stacklevel=2,
            )
        self.__dict__.pop("_known_dense", None)
        if name in _SETTINGS:  # nn.Module would register modules and parameters, whatever there is of that name
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What is_dense() has found out holds for the next ordinary tensor of that size; to ask again would take longer.
        known = self._known_dense
        if (
            not torch.compiler.is_compiling()
            and known is not None
            and type(input) is Tensor
            and input.dtype is weight.dtype is torch.float32
            and input.is_cpu
            and not torch._C._is_any_autocast_enabled()
            and torch._C._get_tracing_state() is None
            and known == (base.generation, input.shape)
        ):
            return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)
        return self._convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _convolve(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """F.conv2d, with the settings of this layer."""
        geometry = stride, padding, dilation, groups
        if not self.training:
            if not isinstance(input, Tensor):
                raise TypeError(f"input: got {type(input).__name__}; accepted: a torch.Tensor")
            return conv2d(input, weight, bias, *geometry)
        if is_dense(input, weight, *geometry, self._pruning, self.layer_id):
            own = geometry == (self.stride, self.padding, self.dilation, self.groups)
            if own and is_dense(input, weight, *geometry, self._pruning, other_layout=True):
                self.__dict__["_known_dense"] = (base.generation, input.shape)
            return F.conv2d(input, weight, bias, *geometry)
        return convolve(
            input,
            weight,
            bias,
            *geometry,
            self._pruning,
            None,
            self.layer_id,
            self._history(weight),
            keep_in_step=True,
        )

    def __setstate__(self, state: dict) -> None:
        # Called for copies and when unpickling.
        super().__setstate__(state)
        self.layer_id = next(_layer_ids)  # and nothing is known: it may come from another machine
        ranges.register(self)
        # A shallow copy may have another threshold.
        for name in ("_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = copy.copy(self.__dict__[name])

    def extra_repr(self) -> str:
        asked = {name: getattr(self, name) for name in KNOBS if getattr(self, name) is not None} or {"percentile": None}
        text = f"{super().extra_repr()}, {', '.join(f'{name}={value}' for name, value in asked.items())}"
        text += f", placement={self.placement}"
        if self.backend != "auto":
            text += f", backend={self.backend}"
        if self.sigma_estimator != "corrected":
            text += f", sigma_estimator={self.sigma_estimator}"
        if self.threshold != "exact":
            text += f", threshold={self.threshold}"
        if self.granularity != "element":
            text += f", granularity={self.granularity}"
        if self.importance != "auto":
            text += f", importance={self.importance}"
        if self.where != "everywhere":
            text += f", where={self.where}"
        return text


def _share(conv: nn.Conv2d, cls: type[nn.Conv2d]) -> nn.Conv2d:
    """A module of class ``cls`` with the attributes of ``conv``; containers are copied, what they
    contain is shared. Unlike construction it draws no random numbers."""
    module = cls.__new__(cls)
    for name, value in conv.__dict__.items():
        module.__dict__[name] = copy.copy(value) if isinstance(value, (dict, set)) else value
    return module
