# SPDX-License-Identifier: Apache-2.0
"""Which gradient of each convolution to prune: :func:`decide_placements`.

Decided by what the output of a convolution meets first in the model, on every path. Some operations pass a gradient on
(views, sums, smooth functions): its zeros stay zeros, so what comes after them decides. Some put exact zeros into a
large part of it (rectifiers, max-pooling): then the convolution is given a gradient that is sparse by itself, and
"input" is its placement. Everything else, normalisation and the next convolution above all, makes it dense: "output".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from .rectifiers import ABOVE_ZERO, ITSELF, Affine, Bounds, bounds_of, complement, passed_by, rectifies
from .tracing import Tracer

# Names of functions and methods, wherever they are defined, without the last "_" of those that work in place.
_ZEROING = set(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices "
    "fractional_max_pool2d fractional_max_pool2d_with_indices hardshrink softshrink max min amax amin topk fmax fmin "
    "where masked_fill masked_scatter".split()
)
_PASSING = set(
    # views and rearrangements
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze getitem select narrow index_select gather take_along_dim chunk split tensor_split hsplit vsplit "
    "unbind cat concat concatenate stack hstack vstack dstack expand expand_as broadcast_to repeat repeat_interleave "
    "tile roll flip fliplr flipud rot90 pad pixel_shuffle pixel_unshuffle channel_shuffle unfold fold contiguous clone "
    "diagonal column_stack "
    # other types, places, and what does nothing
    "to type type_as float double half bfloat16 cpu cuda dropout dropout1d dropout2d dropout3d alpha_dropout "
    "feature_alpha_dropout feature_dropout requires_grad identity "
    # arithmetic with each element
    "add iadd sub isub subtract rsub mul imul multiply div divide truediv itruediv true_divide neg negative pow ipow "
    "square sqrt rsqrt abs exp log log1p sin cos addcmul addcdiv lerp "
    # smooth functions of each element, and those whose slope is zero only far from zero
    "leaky_relu rrelu prelu elu selu celu gelu silu mish sigmoid logsigmoid tanh softplus softsign tanhshrink hardsigmoid "
    "hardswish nan_to_num "
    # means over pixels, and their like
    "avg_pool2d adaptive_avg_pool2d mean sum upsample interpolate upsample_bilinear upsample_nearest".split()
)
# What asks about a tensor without passing a gradient back to it.
_QUERIES = set(
    "size dim numel shape ndim dtype device is_cuda requires_grad stride is_contiguous detach gt ge lt le eq ne "
    "data greater greater_equal less less_equal isnan isinf isfinite argmax argmin argsort nonzero count_nonzero any all "
    "item tolist bool int long zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full "
    "new_empty new_tensor round floor ceil trunc sign sgn heaviside".split()
)
_POSITIVE = set("abs exp square sqrt rsqrt sigmoid softplus hardsigmoid".split())  # whatever of
_COMPARISONS = {"gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"}
_PASSING_MODULES = (
    nn.Identity, _DropoutNd, nn.Flatten, nn.Unflatten, _AvgPoolNd, _AdaptiveAvgPoolNd, nn.Upsample, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd, nn.Unfold, nn.Fold,
    nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
_ZEROING_MODULES = (_MaxPoolNd, _AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.Hardshrink, nn.Softshrink)

_CAUSES = 3


class Placement(NamedTuple):
    """placement: "output" or "input". reason: what the output of the convolution meets first."""

    placement: str
    reason: str


class _Cause(NamedTuple):
    """Something that decides. kind: "zeroing" or "other", or "end" where the traced part ends. passed: of a rectifier, between
    which values of the output of the convolution it passes the gradient."""

    kind: str
    called: str
    passed: Bounds | None = None


def decide_placements(model: nn.Module) -> dict[str, Placement]:
    """{name: placement and reason} of every ``nn.Conv2d`` of ``model``, by its graph.

    In modules that do not trace, and where a traced part ends, the order in which modules are registered stands in.
    """
    causes: dict[nn.Module, set[_Cause]] = {}
    _trace_causes(model, "", causes)
    order = _Order(model)
    placements = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found = causes.get(module, set())
            within = max((cause.called for cause in found if cause.kind == "end"), key=len, default=None)
            guessed = not found or within is not None
            if guessed:
                found = {cause for cause in found if cause.kind != "end"} | {order.cause_after(name, within)}
            for cause in [cause for cause in found if cause.kind == "opaque"]:
                found, guessed = found - {cause} | {order.first_cause_of(cause.called)}, True
            placements[name] = _decide(found, guessed)
    return placements


def _decide(causes: set[_Cause], guessed: bool) -> Placement:
    sparse = causes and all(cause.kind == "zeroing" for cause in causes)
    called = sorted({cause.called for cause in causes})
    if len(called) > _CAUSES:
        called[_CAUSES:] = [f"{len(called) - _CAUSES} more"]
    reason = "followed by " + (", ".join(called) or "nothing")
    if sparse and complement([cause.passed for cause in causes]):
        sparse, reason = False, f"{reason}, which pass the gradient of different elements"
    return Placement("input" if sparse else "output", f"{reason}, by order of registration" if guessed else reason)


# ---- by the graph


def _trace_causes(root: nn.Module, prefix: str, causes: dict[nn.Module, set[_Cause]]) -> None:
    """Add to ``causes`` what decides each convolution in ``root``, whose name in the model is ``prefix``.

    Where the graph ends before anything has decided, the cause is an "end" with the name of the part that was traced
    (none for the whole model, whose output decides); where it meets a module that does not trace, an "opaque" with the
    name of that.
    """
    tracer = Tracer(root)
    if tracer.graph is not None:
        modules = dict(root.named_modules())
        graph = _Graph(modules, prefix, tracer.opaque)
        for node in tracer.graph.nodes:
            if node.op == "get_attr":
                _note_constant(node, tracer.root)
        for node in tracer.graph.nodes:
            if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
                if node.target in tracer.untraced and next(_parts(modules[node.target]), None):
                    continue  # what follows the convolution is within
                causes.setdefault(modules[node.target], set()).update(graph.causes(node))
    for name in tracer.opaque:
        for child_name, child in root.get_submodule(name).named_children():
            if next(child.children(), None) is not None:
                _trace_causes(child, _join(prefix, _join(name, child_name)), causes)


def _note_constant(node: fx.Node, owner: nn.Module) -> None:
    """Keep the value of a tensor that forward() made, if it is one number."""
    tensor = getattr(owner, node.target, None)
    if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.numel() == 1:
        node.meta["constant"] = float(tensor)


class _Graph:
    def __init__(self, modules: dict[str, nn.Module], prefix: str, opaque: set[str]) -> None:
        self.modules, self.prefix, self.opaque = modules, prefix, opaque

    def causes(self, conv: fx.Node) -> Iterator[_Cause]:
        """What comes first on each path from ``conv`` among all that does not pass the gradient on."""
        seen, queue = set(), [(user, conv, Affine()) for user in conv.users]
        while queue:
            node, source, value = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            kind, called = self._kind(node, source, value)
            if kind == "passing" or kind == "zeroing" and _selects(node, conv):
                value = _after(node, source, value)
                queue.extend((user, node, value) for user in node.users)
            elif kind != "none":
                yield _Cause(kind, called, self._passed_by(node, source, value) if kind == "zeroing" else None)

    def _passed_by(self, node: fx.Node, source: fx.Node, value: Affine) -> Bounds | None:
        """Between which values of the output of the convolution ``node`` passes the gradient, if it is a rectifier."""
        called = node.op == "call_module"
        bounds = bounds_of(self.modules[node.target]) if called else _bounds(node, _name(node), source)
        return bounds and passed_by(bounds, value)

    def _kind(self, node: fx.Node, source: fx.Node, value: Affine) -> tuple[str, str]:
        """(kind, what to call it) of ``node``, which uses ``source``, which has ``value``. Kinds are those of causes,
        "passing", and "none" if no gradient comes back."""
        if node.op == "output":
            return ("end", self.prefix) if self.prefix else ("other", "the output of the model")
        if node.op == "call_module":
            name = _join(self.prefix, node.target)
            if node.target in self.opaque:
                return "opaque", name
            module = self.modules[node.target]
            return _module_kind(module, value), _named(module, name)
        name = _name(node)
        called = f"{name}()"
        if name in _QUERIES or node.target is getattr and _argument(node, 1, "name", "") in _QUERIES:
            return "none", called
        if node.target is getattr and _argument(node, 1, "name", "") in ("T", "mT", "H", "mH"):
            return "passing", called
        if name in ("where", "masked_fill", "masked_scatter") and source in _masks(node, name):
            return "none", called
        if name in ("mul", "imul", "multiply", "getitem", "masked_select") and any(
            _is_comparison(other) for other in _others(node, source)
        ):
            return "zeroing", called
        bounds = _bounds(node, name, source)
        if bounds is not None:
            return "zeroing" if rectifies(bounds, value) else "passing", called
        if name == "einsum" and "," not in _argument(node, 0, "equation", ","):
            return "passing", called
        if name in _ZEROING:
            return "zeroing", called
        return "passing" if name in _PASSING else "other", called


def _name(node: fx.Node) -> str:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    # relu.default is an overload, _threshold what torch.nn.functional.threshold is called.
    return name.partition(".")[0].strip("_") if not name.startswith("__") else name


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _masks(node: fx.Node, name: str) -> tuple[Any, ...]:
    """What a selection is made by; no gradient comes back to that."""
    if name != "where" or node.op != "call_method":
        return (_argument(node, 0 if name == "where" else 1, "condition" if name == "where" else "mask", None),)
    return (_argument(node, 1, "condition", None),)


def _others(node: fx.Node, source: fx.Node) -> list[Any]:
    return [value for value in (*node.args, *node.kwargs.values()) if value is not source]


def _selects(node: fx.Node, conv: fx.Node) -> bool:
    """Whether ``node`` passes the gradient of each element to one of two values that both come from ``conv``."""
    if _name(node) not in ("where", "maximum", "minimum", "fmax", "fmin"):
        return False
    masks = _masks(node, "where") if _name(node) == "where" else ()
    return sum(value not in masks and _comes_from(value, conv) for value in (*node.args, *node.kwargs.values())) > 1


def _comes_from(value: Any, conv: fx.Node) -> bool:
    seen, queue = set(), [value]
    while queue:
        node = queue.pop()
        if node is conv:
            return True
        if isinstance(node, fx.Node) and node not in seen and _name(node) not in _QUERIES:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False


def _is_comparison(value: Any) -> bool:
    while isinstance(value, fx.Node) and _name(value) in ("to", "float", "type_as", "type", "half", "bfloat16"):
        value = value.args[0]
    return isinstance(value, fx.Node) and _name(value) in _COMPARISONS


def _after(node: fx.Node, source: fx.Node, value: Affine) -> Affine:
    """What ``node`` makes of ``value``, where it adds or multiplies constants."""
    if node.op == "call_module":
        return value
    name, others = _name(node), _others(node, source)
    scale, shift = value
    squares = not others if name in ("mul", "imul", "multiply") else name in ("pow", "ipow") and others in ([2], [4])
    if name in _POSITIVE or squares:
        return ABOVE_ZERO
    if name in ("add", "sub", "subtract") and "alpha" in node.kwargs:
        others = [_argument(node, 1, "other", None)] if node.args and node.args[0] is source else []
    if name in ("neg", "negative"):
        return Affine(-scale, -shift)
    number = _constant(others[0]) if len(others) == 1 else None
    if number is None:
        return value
    number *= _constant(node.kwargs.get("alpha", 1)) or 1.0
    first = bool(node.args) and node.args[0] is source
    if name in ("add", "iadd"):
        return Affine(scale, shift + number)
    if name in ("sub", "isub", "subtract", "rsub"):
        from_it = first != (name == "rsub")
        return Affine(scale, shift - number) if from_it else Affine(-scale, number - shift)
    if number and name in ("mul", "imul", "multiply"):
        return Affine(scale * number, shift * number)
    if number and first and name in ("div", "divide", "truediv", "itruediv", "true_divide"):
        return Affine(scale / number, shift / number)
    return value


def _bounds(node: fx.Node, name: str, source: fx.Node) -> Bounds | None:
    """Between which values the function that ``node`` calls passes the gradient; None if it is none of those."""
    below, above = -math.inf, math.inf
    if name == "relu":
        return 0.0, above
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return _number(node, 1, "min_val", -1.0), _number(node, 2, "max_val", 1.0)
    if name == "threshold":
        return _number(node, 1, "threshold", 0.0), above
    if name == "leaky_relu":
        return (0.0, above) if _argument(node, 1, "negative_slope", 0.01) == 0 else None
    if name in ("clamp", "clip"):
        return _number(node, 1, "min", below), _number(node, 2, "max", above)
    if name == "clamp_min":
        return _number(node, 1, "min", 0.0), above
    if name == "clamp_max":
        return below, _number(node, 1, "max", 0.0)
    if name in ("maximum", "fmax") and len(_others(node, source)) == 1:
        return _constant(_others(node, source)[0]) or 0.0, above
    if name in ("minimum", "fmin") and len(_others(node, source)) == 1:
        return below, _constant(_others(node, source)[0]) or 0.0
    return None


def _number(node: fx.Node, position: int, name: str, default: float) -> float:
    value = _argument(node, position, name, default)
    return default if value is None else _constant(value) or 0.0


def _constant(value: Any) -> float | None:
    """A constant as a number; None where it is not known."""
    if isinstance(value, (int, float)):
        return float(value)
    return value.meta.get("constant") if isinstance(value, fx.Node) else None


def _module_kind(module: nn.Module, value: Affine = ITSELF) -> str:
    bounds = bounds_of(module)
    if bounds is not None:
        return "zeroing" if rectifies(bounds, value) else "passing"
    if isinstance(module, _ZEROING_MODULES):
        return "zeroing"
    return "passing" if isinstance(module, _PASSING_MODULES) else "other"


# ---- by order of registration


class _Order:
    """The modules that do something themselves, in the order in which they are registered: a guess at what follows."""

    def __init__(self, model: nn.Module) -> None:
        self.leaves = list(_leaves(model, ""))

    def cause_after(self, name: str, part: str | None) -> _Cause:
        """What follows the convolution ``name``, or, if that is the end of a ``part``, what follows the part."""
        names = [leaf for leaf, _ in self.leaves]
        at = names.index(name) if part is None else max(i for i, leaf in enumerate(names) if _in(leaf, part))
        return self._first(self.leaves[at + 1 :])

    def first_cause_of(self, part: str) -> _Cause:
        """What comes first in the module ``part``, or after it."""
        at = next((i for i, (leaf, _) in enumerate(self.leaves) if _in(leaf, part)), len(self.leaves))
        return self._first(self.leaves[at:])

    @staticmethod
    def _first(leaves: Iterable[tuple[str, nn.Module]]) -> _Cause:
        for name, module in leaves:
            if (kind := _module_kind(module)) != "passing":
                return _Cause(kind, _named(module, name))
        return _Cause("other", "nothing known")


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all that have no children, and of convolutions."""
    children = list(_parts(module))
    if isinstance(module, _ConvNd) or not children:
        yield name, module
    for child_name, child in children:
        yield from _leaves(child, _join(name, child_name))


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the children, without what computes the parameters of a convolution."""
    for name, child in module.named_children():
        if not (isinstance(module, _ConvNd) and name == "parametrizations"):
            yield name, child


def _in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _named(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} {name!r}"
