# SPDX-License-Identifier: Apache-2.0
"""convert() and revert(): exchange the convolutions of a model for sparse ones, in place, and back."""

from __future__ import annotations

import copy
import fnmatch
import logging
import operator
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .nn import SparseConv2d
from .settings import PLACEMENTS, Pruning, check_choice

log = logging.getLogger("sparsebwd")

# What can follow a convolution, seen from its output gradient.
# Normalisation makes that gradient dense; a rectifier or max-pooling puts exact zeros into it;
# the rest of these pass zeros on as they are (or rearrange them), so what comes after them decides.
_DENSE_MODULES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_DENSE_CALLS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.local_response_norm}
_ZEROING_MODULES = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_ZEROING_CALLS = {
    F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, F.threshold, F.hardtanh, torch.clamp,
    F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, "relu", "relu_", "clamp", "clamp_", "clamp_min",
}  # fmt: skip
_PASSING_MODULES = (
    nn.Identity, _DropoutNd, nn.Flatten, nn.Unflatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d,
)  # fmt: skip
_PASSING_CALLS = {
    operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg,
    operator.getitem, torch.add, torch.sub, torch.mul, torch.cat, torch.concat, torch.flatten, torch.reshape,
    torch.permute, torch.transpose, torch.chunk, torch.split, torch.dropout, F.dropout, F.dropout2d, F.pad,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pixel_shuffle,
    "add", "add_", "sub", "mul", "mul_", "div", "view", "reshape", "flatten", "permute", "transpose", "contiguous",
    "chunk", "split", "to", "type_as", "float", "clone",
}  # fmt: skip
# What asks about a tensor without passing a gradient back to it.
_QUERIES = {"size", "dim", "numel", "shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class LayerReport:
    """What one convolution of a model is, and why.

    ``converted``: it is a :class:`sparsebwd.SparseConv2d`; then ``percentile``, ``placement`` and ``backend`` are its
    settings, and ``reason`` says what follows it in the model. Otherwise these are None, and ``reason`` says why
    :func:`convert` leaves it alone.
    """

    name: str
    converted: bool
    percentile: float | None
    placement: str | None
    backend: str | None
    reason: str

    def __str__(self) -> str:
        name = self.name or "the model"
        if not self.converted:
            return f"{name}: not converted: {self.reason}"
        return f"{name}: placement={self.placement!r}, percentile={self.percentile} ({self.reason})"


@dataclass(frozen=True)
class ConversionReport:
    """One :class:`LayerReport` for each convolution, in the order of the model."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers) or "no convolutions"


class _ConvTracer(fx.Tracer):
    """Symbolic tracing with every convolution a leaf, sparse ones included."""

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, _ConvNd) or super().is_leaf_module(m, qualified_name)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    size = () if nn.parameter.is_lazy(tensor) else tensor.size()
    return torch.empty(size, dtype=tensor.dtype, device="meta")


def _shadow(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module tree to trace, with empty meta tensors and no hooks.

    Tracing runs forward(); on a copy, whatever forward() stores in the model, or a hook does, leaves no mark.
    """
    if id(module) in made:
        return made[id(module)]
    twin = made[id(module)] = module.__class__.__new__(module.__class__)
    state = {k: copy.copy(v) if isinstance(v, (list, dict, set, deque)) else v for k, v in vars(module).items()}
    for key in state:
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            state[key] = OrderedDict()
    state["_parameters"] = {
        name: None if parameter is None else nn.Parameter(_meta(parameter), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    state["_buffers"] = {name: None if buffer is None else _meta(buffer) for name, buffer in module._buffers.items()}
    state["_modules"] = {k: None if m is None else _shadow(m, made) for k, m in state["_modules"].items()}
    twin.__dict__.update(state)
    return twin


def _module_kind(module: nn.Module) -> str:
    for kind, types in (("dense", _DENSE_MODULES), ("zeroing", _ZEROING_MODULES), ("passing", _PASSING_MODULES)):
        if isinstance(module, types):
            return kind
    return "other"


def _node_kind(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """(kind, what to call it); kind is one of _module_kind's, or "output" where the traced part ends."""
    if node.op == "output":
        return "output", "the output of the model"
    if node.op == "call_module":
        module = modules[node.target]
        return _module_kind(module), f"{type(module).__name__} {node.target!r}"
    called = node.target if node.op == "call_method" else node.target.__name__
    for kind, calls in (("dense", _DENSE_CALLS), ("zeroing", _ZEROING_CALLS), ("passing", _PASSING_CALLS)):
        if node.target in calls:
            return kind, f"{called}()"
    return "other", f"{called}()"


def _asks_only(node: fx.Node) -> bool:
    asked = node.args[1] if node.target is getattr else node.target
    return (node.op == "call_method" or node.target is getattr) and asked in _QUERIES


def _deciders(conv: fx.Node, modules: dict[str, nn.Module]) -> set[tuple[str, str]]:
    """The first node on each path from ``conv`` that decides what the gradient of its output looks like."""
    found, seen, queue = set(), set(), list(conv.users)
    while queue:
        node = queue.pop()
        if node in seen or _asks_only(node):
            continue
        seen.add(node)
        kind, called = _node_kind(node, modules)
        if kind == "passing":
            queue.extend(node.users)
        else:
            found.add((kind, called))
    return found


def _decide(deciders: set[tuple[str, str]]) -> tuple[str, str]:
    """(placement, reason). The gradient is sparse by itself only if every path passes a rectifier first."""
    placement = "input" if deciders and all(kind == "zeroing" for kind, _ in deciders) else "output"
    return placement, "followed by " + (", ".join(sorted(called for _, called in deciders)) or "nothing")


def _traced_placements(root: nn.Module, whole: bool = True) -> dict[str, tuple[str, str]]:
    """{name of a convolution: (placement, reason)} for all that the graph of ``root`` decides.

    Where ``root`` does not trace, each of its children is tried; a convolution whose output leaves a traced part
    (``whole=False``) is then left undecided.
    """
    try:
        twin = _shadow(root, {})
        graph = _ConvTracer().trace(twin)
    except Exception as error:  # forward() is the user's code on symbolic values: it may raise anything
        log.debug("torch.fx does not trace %s: %s", type(root).__name__, error)
        return {
            f"{child_name}.{name}": decision
            for child_name, child in root.named_children()
            if next(child.children(), None) is not None
            for name, decision in _traced_placements(child, whole=False).items()
        }
    modules = dict(twin.named_modules())
    deciders: dict[str, set[tuple[str, str]]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            deciders.setdefault(node.target, set()).update(_deciders(node, modules))
    return {
        name: _decide(found)
        for name, found in deciders.items()
        if whole or all(kind != "output" for kind, _ in found)
    }


def _ordered_placements(root: nn.Module) -> dict[str, tuple[str, str]]:
    """The same from the order in which modules are registered: a guess, for models that do not trace."""
    leaves = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, _ConvNd) or next(module.children(), None) is None
    ]
    placements = {}
    for i, (name, module) in enumerate(leaves):
        if isinstance(module, nn.Conv2d):
            deciders = {("other", "nothing known")}
            for next_name, follower in leaves[i + 1 :]:
                kind = _module_kind(follower)
                if kind != "passing":
                    deciders = {(kind, f"{type(follower).__name__} {next_name!r}")}
                    break
            placement, reason = _decide(deciders)
            placements[name] = placement, f"{reason}, by order of registration"
    return placements


def _placements(model: nn.Module) -> dict[str, tuple[str, str]]:
    """{name: (placement, reason)} of every convolution of ``model``."""
    return _ordered_placements(model) | _traced_placements(model)


def _why_not(module: _ConvNd) -> str | None:
    """Why ``module`` cannot be converted, or None if it can."""
    if type(module) is not nn.Conv2d:
        if nn.utils.parametrize.is_parametrized(module):
            return "its weight is parametrized"
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return "it is lazy: run one forward pass first"
        if isinstance(module, nn.Conv2d):
            return f"{type(module).__name__} is a subclass of Conv2d, whose forward may differ"
        return f"{type(module).__name__} is not a Conv2d"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    return None


def _become(module: nn.Module, other: nn.Module) -> None:
    """Give ``module`` the class of ``other``, and exactly the attributes and buffers that ``other`` has.

    It stays the same object: hooks, their handles, and references held anywhere remain valid.
    """
    state, wanted = vars(module), vars(other)
    for name in state.keys() - wanted.keys():
        del state[name]
    for name in (wanted.keys() - state.keys()) | {"_buffers", "_non_persistent_buffers_set"}:
        state[name] = wanted[name]
    module.__class__ = type(other)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: an nn.Module")


def _excluded(model: nn.Module, exclude: str | Iterable[str]) -> set[str]:
    """The names of the modules that ``exclude`` names, and of all below them."""
    if not isinstance(exclude, Iterable):
        raise TypeError(f"exclude: got {exclude!r}; accepted: names of modules, as strings")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    names = [name for name, _ in model.named_modules()]
    excluded = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: got an element {pattern!r}; accepted: names of modules, as strings")
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(f"exclude: got {pattern!r}; accepted: names of modules of the model, or patterns of them")
        excluded.update(n for n in names for m in matched if n == m or n.startswith(f"{m}.") or not m)
    return excluded


def convert(
    model: nn.Module,
    percentile: float | None = 90.0,
    placement: str = "auto",
    backend: str = "auto",
    sigma_estimator: str = "corrected",
    threshold: str = "exact",
    *,
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Make every eligible ``nn.Conv2d`` of ``model`` a :class:`sparsebwd.SparseConv2d`, in place.

    Parameters stay the same objects and modules too, so optimisers, hooks and references to layers remain valid.
    Eligible is what is exactly an ``nn.Conv2d``; subclasses, parametrized, lazy and transposed convolutions are left
    alone. A layer that is sparse already gets the new settings. What was decided is logged at level INFO of the logger
    "sparsebwd" and can be had from :func:`conversion_report`. Convert before ``torch.compile``.

    Args:
        model: any module, an ``nn.Conv2d`` itself included.
        percentile: in [50, 100), or None: nothing is pruned, zeros are skipped all the same.
        placement: which gradient is pruned. "output": that of the convolution's output, for Conv-BN-ReLU; "input":
            that of its input, for Conv-ReLU; "auto" chooses for each layer. It follows the output of the convolution
            through the model as torch.fx traces it: where a rectifier or max-pooling comes first on every path, the
            output's gradient is sparse by itself, and the choice is "input"; otherwise "output". In parts that do not
            trace, the order in which modules are registered stands in.
        backend, sigma_estimator, threshold: as in :class:`sparsebwd.SparseConv2d`.
        exclude: names of modules to leave as they are, with all below them, as in ``model.named_modules()``;
            ``fnmatch`` patterns such as "*.downsample*" are understood.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument is wrong; the model is then unchanged.
        RuntimeError: the backend is one that is only planned; likewise.
    """
    _check_model(model)
    check_choice("placement", placement, ("auto", *PLACEMENTS))
    pruning = Pruning(percentile, sigma_estimator=sigma_estimator, threshold=threshold, backend=backend)
    excluded = _excluded(model, exclude)
    placements = _placements(model)
    depthwise = []
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd) or name in excluded:
            continue
        sparse = isinstance(module, SparseConv2d)
        if not sparse and _why_not(module) is not None:
            continue
        chosen = pruning.replace(placement=placements[name][0] if placement == "auto" else placement)
        if sparse:
            module.pruning = chosen
        else:
            _become(module, SparseConv2d.sharing(module, chosen))
        if module.groups == module.in_channels > 1:
            depthwise.append(name)
    for layer in _report(model, placements).layers:
        log.info("%s", layer)
    if depthwise and pruning.active:
        warnings.warn(
            f"the model has depthwise convolutions ({len(depthwise)}, the first is {depthwise[0]!r}). With pruned "
            "gradients, MobileNet lost 15 to 70 percentage points of accuracy in 6 of the 12 runs that the paper "
            "reports (such as 8.7 % instead of 68.2 % on CIFAR-100 at percentile 85, and 28.7 % instead of 92.3 % on "
            "CIFAR-10 at 95): watch the accuracy, or exclude them",
            stacklevel=2,
        )
    return model


def revert(model: nn.Module) -> nn.Module:
    """Make every :class:`sparsebwd.SparseConv2d` of ``model`` a plain ``nn.Conv2d`` again, in place.

    Parameters and modules stay the same objects. Subclasses of SparseConv2d are left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    _check_model(model)
    for module in model.modules():
        if type(module) is SparseConv2d:
            _become(module, module.to_conv2d())
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What each convolution of ``model`` is now, and why; prints one line for each."""
    _check_model(model)
    return _report(model, _placements(model))


def _report(model: nn.Module, placements: dict[str, tuple[str, str]]) -> ConversionReport:
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, SparseConv2d):
            settings = module.percentile, module.placement, module.backend
            layers.append(LayerReport(name, True, *settings, placements[name][1]))
        elif isinstance(module, _ConvNd):
            reason = _why_not(module) or "it is a plain Conv2d that convert() was not asked to convert"
            layers.append(LayerReport(name, False, None, None, None, reason))
    return ConversionReport(tuple(layers))
