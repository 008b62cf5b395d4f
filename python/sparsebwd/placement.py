# SPDX-License-Identifier: Apache-2.0
"""Which gradient of each convolution to prune: :func:`decide_placements`.

Decided by what the output of a convolution meets first in the model, on every path. Some operations pass a gradient on
(views, sums, smooth functions): its zeros stay zeros, so what comes after them decides. Some put exact zeros into a
large part of it (rectifiers, max-pooling): then the convolution is given a gradient that is sparse by itself, and
"input" is its placement. Everything else, normalisation and the next convolution above all, makes it dense: "output".
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from .rectifiers import (
    ABOVE_ZERO,
    ITSELF,
    LARGE_PART,
    Affine,
    Bounds,
    bounds_of,
    complement,
    passed_by,
    rectifies,
    shrinks,
)
from .tracing import Tracer
from .values import after, argument, constant, mask_of, name_of, note_constant, others

# Names of functions and methods, wherever they are defined, without the last "_" of those that work in place.
_ZEROING = set(
    "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices "
    "fractional_max_pool2d fractional_max_pool2d_with_indices max min amax amin topk fmax fmin "
    "median nanmedian kthvalue mode tril triu".split()
)
_PASSING = set(
    # views and rearrangements
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose t swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze getitem select narrow index_select gather take_along_dim chunk split tensor_split hsplit vsplit "
    "unbind cat concat concatenate stack hstack vstack dstack expand expand_as broadcast_to repeat repeat_interleave "
    "tile roll flip fliplr flipud rot90 pad pixel_shuffle pixel_unshuffle channel_shuffle unfold fold contiguous clone "
    "diagonal column_stack sort msort "
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
_SELECTIONS = {"where", "masked_fill", "masked_scatter"}
_MASKED = {"mul", "imul", "multiply", "getitem", "masked_select"}
_SHRINKS = {"hardshrink", "softshrink"}
_PASSING_MODULES = (
    nn.Identity, _DropoutNd, nn.Flatten, nn.Unflatten, _AvgPoolNd, _AdaptiveAvgPoolNd, nn.Upsample, nn.PixelShuffle,
    nn.PixelUnshuffle, nn.ChannelShuffle, nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd, nn.Unfold, nn.Fold,
    nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
_ZEROING_MODULES = (_MaxPoolNd, _AdaptiveMaxPoolNd, nn.FractionalMaxPool2d)
_POSITIVE_MODULES = (nn.Sigmoid, nn.Softplus, nn.Hardsigmoid)

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
                note_constant(node, tracer.root, root)
        for node in tracer.graph.nodes:
            if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
                if node.target in tracer.untraced and next(_parts(modules[node.target]), None):
                    continue  # what follows the convolution is within
                causes.setdefault(modules[node.target], set()).update(graph.causes(node))
    for name in tracer.opaque:
        for child_name, child in root.get_submodule(name).named_children():
            if next(child.children(), None) is not None:
                _trace_causes(child, _join(prefix, _join(name, child_name)), causes)


class _Graph:
    def __init__(self, modules: dict[str, nn.Module], prefix: str, opaque: set[str]) -> None:
        self.modules, self.prefix, self.opaque = modules, prefix, opaque

    def causes(self, conv: fx.Node) -> list[_Cause]:
        """What comes first on each path from ``conv`` among all that does not pass the gradient on.

        Rectifiers that together pass the whole gradient pass it on.
        """
        joined: dict[fx.Node, Bounds] = {}
        while True:
            found = self._first(conv, joined)
            passed = {node: cause.passed for node, cause in found.items() if cause.kind == "zeroing" and cause.passed}
            if not complement(list(passed.values())):
                return list(found.values())
            joined |= passed

    def _first(self, conv: fx.Node, joined: Container[fx.Node]) -> dict[fx.Node, _Cause]:
        """What comes first behind ``conv`` and those of ``joined``."""
        found: dict[fx.Node, _Cause] = {}
        seen, queue = set(), [(user, conv, ITSELF) for user in conv.users]
        while queue:
            node, source, value = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            cause = self._effect(node, source, value)
            if node in joined:
                value = ABOVE_ZERO if self._is_positive(node, source) else ITSELF
            elif cause.kind == "passing" or cause.kind == "zeroing" and _selects(node, conv):
                value = self._after(node, source, value)
            else:
                if cause.kind != "none":
                    found[node] = cause
                continue
            queue.extend((user, node, value) for user in node.users)
        return found

    def _effect(self, node: fx.Node, source: fx.Node, value: Affine) -> _Cause:
        """What ``node`` does to the gradient of ``source``, which has ``value``. Kinds are those of causes, "passing", and "none"
        if no gradient comes back."""
        if node.op == "output":
            return _Cause("end", self.prefix) if self.prefix else _Cause("other", "the output of the model")
        if node.op == "call_module":
            name = _join(self.prefix, node.target)
            if node.target in self.opaque:
                return _Cause("opaque", name)
            module = self.modules[node.target]
            bounds = bounds_of(module)
            passed = bounds and passed_by(bounds, value)
            return _Cause(_module_kind(module, value), _named(module, name), passed)
        name = name_of(node)
        called = f"{name}()"
        if name in _QUERIES or node.target is getattr and argument(node, 1, "name", "") in _QUERIES:
            return _Cause("none", called)
        if node.target is getattr and argument(node, 1, "name", "") in ("T", "mT", "H", "mH"):
            return _Cause("passing", called)
        if name in _SELECTIONS and source in _masks(node, name):
            return _Cause("none", called)
        if name in _SELECTIONS or name in _MASKED:
            return _selection(node, name, source, value)
        bounds = _bounds(node, name, source)
        if bounds is not None:
            return _Cause("zeroing" if rectifies(bounds, value) else "passing", called, passed_by(bounds, value))
        if name in _SHRINKS:
            size = constant(argument(node, 1, "lambd", 0.5))
            return _Cause("zeroing" if size is None or shrinks(size, value) else "passing", called)
        if name.startswith("max_pool") and _keeps_all(argument(node, 1, "kernel_size", 2), argument(node, 2, "stride", None)):
            return _Cause("passing", called)
        if name == "einsum" and "," not in argument(node, 0, "equation", ","):
            return _Cause("passing", called)
        if name in _ZEROING:
            return _Cause("zeroing", called)
        return _Cause("passing" if name in _PASSING else "other", called)

    def _is_positive(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether the rectifier gives no numbers below zero."""
        bounds = bounds_of(self.modules[node.target]) if node.op == "call_module" else _bounds(node, name_of(node), source)
        return bounds is not None and bounds[0] >= 0

    def _after(self, node: fx.Node, source: fx.Node, value: Affine) -> Affine:
        if node.op == "call_module":
            return ABOVE_ZERO if isinstance(self.modules[node.target], _POSITIVE_MODULES) else value
        return after(node, source, value)


def _selection(node: fx.Node, name: str, source: fx.Node, value: Affine) -> _Cause:
    """Of what passes the gradient where a mask is true, or false, or multiplies by it. A mask that nothing is known of passes it."""
    called = f"{name}()"
    if name in _SELECTIONS:
        (condition,) = _masks(node, name)
        taken = argument(node, 1 if node.op == "call_function" else 0, "input", None)
        mask = mask_of(condition, source)
        if mask is not None and (name != "where" or taken is not source):
            mask = mask.inverted()
    else:
        operands = [part for other in others(node, source) for part in (other if isinstance(other, tuple) else (other,))]
        mask = next((mask for operand in operands if (mask := mask_of(operand, source))), None)
    if mask is None:
        return _Cause("passing", called)
    if mask.bounds is not None:
        return _Cause("zeroing" if rectifies(mask.bounds, value) else "passing", called, passed_by(mask.bounds, value))
    zeroing = mask.share is None or 1 - mask.share >= LARGE_PART
    return _Cause("zeroing" if zeroing else "passing", called)


def _keeps_all(kernel_size: Any, stride: Any) -> bool:
    """Whether max-pooling takes each element by itself."""
    return all(part in (1, (1,), (1, 1), (1, 1, 1), [1], [1, 1], [1, 1, 1]) for part in (kernel_size, stride or kernel_size))


def _masks(node: fx.Node, name: str) -> tuple[Any, ...]:
    """What a selection is made by; no gradient comes back to that."""
    if name != "where" or node.op != "call_method":
        return (argument(node, 0 if name == "where" else 1, "condition" if name == "where" else "mask", None),)
    return (argument(node, 1, "condition", None),)


def _selects(node: fx.Node, conv: fx.Node) -> bool:
    """Whether ``node`` passes the gradient of each element to one of two values that both come from ``conv``."""
    if name_of(node) not in ("where", "maximum", "minimum", "fmax", "fmin"):
        return False
    masks = _masks(node, "where") if name_of(node) == "where" else ()
    return sum(value not in masks and _comes_from(value, conv) for value in (*node.args, *node.kwargs.values())) > 1


def _comes_from(value: Any, conv: fx.Node) -> bool:
    seen, queue = set(), [value]
    while queue:
        node = queue.pop()
        if node is conv:
            return True
        if isinstance(node, fx.Node) and node not in seen and name_of(node) not in _QUERIES:
            seen.add(node)
            queue.extend(node.all_input_nodes)
    return False


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
        return (0.0, above) if argument(node, 1, "negative_slope", 0.01) == 0 else None
    if name in ("clamp", "clip"):
        return _number(node, 1, "min", below), _number(node, 2, "max", above)
    if name == "clamp_min":
        return _number(node, 1, "min", 0.0), above
    if name == "clamp_max":
        return below, _number(node, 1, "max", 0.0)
    if name in ("maximum", "fmax") and len(others(node, source)) == 1:
        return constant(others(node, source)[0]) or 0.0, above
    if name in ("minimum", "fmin") and len(others(node, source)) == 1:
        return below, constant(others(node, source)[0]) or 0.0
    return None


def _number(node: fx.Node, position: int, name: str, default: float) -> float:
    value = argument(node, position, name, default)
    return default if value is None else constant(value) or 0.0


def _module_kind(module: nn.Module, value: Affine = ITSELF) -> str:
    bounds = bounds_of(module)
    if bounds is not None:
        return "zeroing" if rectifies(bounds, value) else "passing"
    if isinstance(module, nn.Hardshrink | nn.Softshrink):
        return "zeroing" if shrinks(module.lambd, value) else "passing"
    if isinstance(module, _MaxPoolNd) and _keeps_all(module.kernel_size, module.stride):
        return "passing"
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
