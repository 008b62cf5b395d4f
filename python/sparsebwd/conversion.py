# SPDX-License-Identifier: Apache-2.0
"""convert() and revert(): exchange the convolutions of a model for sparse ones, in place, and back."""

from __future__ import annotations

import fnmatch
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .arguments import check_choice, shown
from .backends import why_not_faster
from .nn import SparseConv2d, a_parameter
from .operands import DTYPES
from .placement import Placement, decide_placements
from .problem import ConvProblem
from .settings import DEFAULT, KNOBS, PLACEMENTS, Granularity, Pruning
from .subclasses import is_registered, original_class, own_class, rebased, shadowed, sparse_class

log = logging.getLogger("sparsebwd")

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerReport:
    """What one convolution of a model is, and why.

    ``converted``: it is a :class:`sparsebwd.SparseConv2d`; then ``percentile``, ``density``, ``variance``, ``noise``,
    ``granularity``, ``importance``, ``placement``, ``backend`` and ``where`` are its settings, and ``reason`` says what follows
    it in the model. Otherwise these are None, and ``reason`` says why
    :func:`convert` leaves it alone.
    """

    name: str
    converted: bool
    percentile: float | None
    placement: str | None
    backend: str | None
    reason: str
    where: str | None = None
    density: float | None = None
    variance: float | None = None
    granularity: Granularity | None = None
    noise: float | None = None
    importance: str | None = None

    def __str__(self) -> str:
        name = self.name or "the model"
        if not self.converted:
            return f"{name}: not converted: {self.reason}"
        asked = {knob: getattr(self, knob) for knob in KNOBS if getattr(self, knob) is not None} or {"percentile": None}
        if self.granularity != "element":
            asked["granularity"] = self.granularity
        if self.importance == "image":
            asked["importance"] = self.importance
        asked = ", ".join(f"{knob}={value}" for knob, value in asked.items())
        return f"{name}: placement={self.placement!r}, {asked} ({self.reason})"


@dataclass(frozen=True)
class ConversionReport:
    """One :class:`LayerReport` for each convolution, in the order of the model."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        return "\n".join(str(layer) for layer in self.layers) or "no convolutions"


def _why_not(module: _ConvNd) -> str | None:
    """Why ``module`` cannot be converted, or None if it can."""
    own = own_class(module)
    if not is_registered(own):
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return "it is lazy: run one forward pass first"
        if isinstance(module, nn.Conv2d):
            return f"{own.__name__} is a subclass of Conv2d, whose forward may differ: see sparsebwd.register_conv"
        return f"{own.__name__} is not a Conv2d"
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    dtype = a_parameter(module).dtype
    if dtype not in DTYPES:
        return f"its weight is {dtype}"
    if names := shadowed(module):
        return f"it has {', '.join(names)} of its own, which mean something else in a SparseConv2d"
    return None


# Of what is converted it is not known yet how large its images will be: they are taken to be large.
_OUTPUT = 64
_BATCH = 64


def _why_not_faster(module: nn.Conv2d, pruning: Pruning, autocast: torch.dtype | None = None) -> str | None:
    """Why no kernel here can make ``module`` faster, in the dtype of its weight or in that of autocast, whatever its input;
    None if one may, or if nothing is known of its device."""
    parameter = a_parameter(module)
    if parameter.device.type not in ("cpu", "cuda"):
        return None
    spans = (dilation * (size - 1) + 1 for size, dilation in zip(module.kernel_size, module.dilation))
    h, w = (stride * (_OUTPUT - 1) + span for stride, span in zip(module.stride, spans))
    sizes = (_BATCH, module.in_channels, h, w, module.out_channels, *module.kernel_size)
    problem = ConvProblem(*sizes, module.stride, (0, 0), module.dilation, module.groups)
    dtype = parameter.dtype if autocast is None else autocast
    layouts = (True, False)
    reasons = [why_not_faster(pruning, problem, parameter.device.type, dtype, layout) for layout in layouts]
    return reasons[0] if all(reasons) else None


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted: an nn.Module")


def _excluded(model: nn.Module, exclude: str | Iterable[str]) -> set[str]:
    """The names of the modules that ``exclude`` names, and of all below them."""
    # Arrays of no dimensions, and nested tensors, only say that they are iterable.
    if not isinstance(exclude, Iterable) or isinstance(exclude, torch.Tensor) or not getattr(exclude, "ndim", 1):
        raise TypeError(f"exclude: got {shown(exclude)}; accepted: names of modules, as strings")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    names = [name for name, _ in model.named_modules()]
    excluded = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"exclude: got an element {shown(pattern)}; accepted: names of modules, as strings")
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(f"exclude: got {shown(pattern)}; accepted: names of modules of the model, or patterns of them")
        excluded.update(n for n in names for m in matched if n == m or n.startswith(f"{m}.") or not m)
    return excluded


def convert(
    model: _Model,
    percentile: float | None = DEFAULT,
    placement: str = "auto",
    backend: str = "auto",
    sigma_estimator: str = "corrected",
    threshold: str = "exact",
    where: str = "faster",
    *,
    density: float | None = None,
    variance: float | None = None,
    noise: float | None = None,
    granularity: Granularity = "element",
    importance: str = "auto",
    exclude: str | Iterable[str] = (),
) -> _Model:
    """Make every eligible ``nn.Conv2d`` of ``model`` a :class:`sparsebwd.SparseConv2d`, in place.

    Parameters stay the same objects and modules too, so optimisers, hooks and references to layers remain valid.
    Eligible is what is exactly an ``nn.Conv2d``, or of a class that :func:`sparsebwd.register_conv` was told of, parametrized
    or wrapped by FSDP2 or not; other subclasses, lazy, complex and transposed convolutions are left alone. A layer that is sparse already gets the new settings. What was
    decided is logged at level INFO of the logger "sparsebwd" and can be had from :func:`conversion_report`. Convert
    before ``torch.compile``. Random generators stay as they are (Python's and NumPy's as far as forward functions name
    what draws from them), and threads may convert models of their own at the
    same time.

    Args:
        model: any module, an ``nn.Conv2d`` itself included.
        percentile: in [50, 100), or None: nothing is pruned, zeros are skipped all the same.
        density, variance: instead of a percentile, for each layer the fraction of elements that are kept, or the variance
            that pruning may add; see :class:`sparsebwd.Pruning`.
        noise: instead of these, the noise that pruning may add to the weight gradients of the whole network, as a fraction of
            what minibatches have. Nothing is pruned before a :class:`sparsebwd.NoiseController` has measured.
        placement: which gradient is pruned. "output": that of the convolution's output, for Conv-BN-ReLU; "input":
            that of its input, for Conv-ReLU; "auto" chooses for each layer. It follows the output of the convolution
            through the model as torch.fx traces it: where a rectifier or max-pooling comes first on every path, the
            output's gradient is sparse by itself, and the choice is "input"; otherwise "output". In parts that do not
            trace, the order in which modules are registered stands in. Parts that would draw random numbers while
            they are traced do not trace.
        backend, sigma_estimator, threshold, granularity: as in :class:`sparsebwd.SparseConv2d`.
        importance: "image": each image has a threshold of its own, by the norm of its input, in layers with the placement
            "output"; "none": all images have one, as in the paper; "auto": "image" with noise, else "none". See
            :class:`sparsebwd.Pruning`.
        where: "faster": what no kernel here can make faster stays an nn.Conv2d, judged by its weight and device, which are
            those it will have if you move the model to its device first; and layers decide again by what they are given, see
            :class:`sparsebwd.SparseConv2d`. "everywhere": all that is eligible is converted and pruned, as in the paper.
            With a backend that is named, "faster" is the same as "everywhere".
        exclude: names of modules to leave as they are, with all below them, as in ``model.named_modules()``;
            ``fnmatch`` patterns such as "*.downsample*" are understood.

    Returns:
        ``model``.

    Raises:
        TypeError, ValueError: an argument is wrong; the model is then unchanged.

    Examples:
        >>> import sparsebwd
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
        >>> model = sparsebwd.convert(model, percentile=90, where="everywhere", exclude="3")
        >>> model[0].percentile, model[0].placement
        (90.0, 'output')
        >>> type(model[3]).__name__
        'Conv2d'
        >>> model[0].density = 0.2  # layers may be set apart afterwards
    """
    _check_model(model)
    check_choice("placement", placement, ("auto", *PLACEMENTS))
    pruning = Pruning(
        percentile,
        sigma_estimator=sigma_estimator,
        threshold=threshold,
        backend=backend,
        where=where,
        density=density,
        variance=variance,
        granularity=granularity,
        noise=noise,
        importance=importance,
    )
    excluded = _excluded(model, exclude)
    placements = decide_placements(model) if placement == "auto" else None
    depthwise, left = [], Counter()
    converted = total = 0  # in weights
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd) or name in excluded:
            continue
        sparse = isinstance(module, SparseConv2d)
        weights = module.in_channels * module.out_channels // module.groups * math.prod(module.kernel_size)
        total += weights
        reason = None if sparse else _why_not(module)
        dense = reason or _why_not_faster(module, pruning)
        if dense is None:
            converted += weights
        else:
            left[dense] += 1
        # Where autocast to bfloat16 has something to gain, the layer decides by what it is given.
        if not sparse and (reason or dense and _why_not_faster(module, pruning, torch.bfloat16)):
            continue
        placed = placement if placements is None else placements[name].placement
        chosen = pruning.replace(placement=placed, importance=importance if placed == "output" else "auto")
        if sparse:
            module.pruning = chosen
        else:
            # The same object: hooks, their handles, and references held anywhere remain valid.
            module.__class__ = rebased(type(module), sparse_class(own_class(module)))
            module._configure(chosen)
            module.layer_name = name
        if module.groups == module.in_channels > 1:
            depthwise.append(name)
    report = _report(model, placements)
    for layer in report.layers:
        log.info("%s", layer)
    if not report.layers:
        log.warning(
            "convert: %s has no convolutions that are modules, so nothing changes; what is scripted, exported, or calls "
            "torch.nn.functional.conv2d is not seen",
            type(model).__name__,
        )
    if left and converted < total * _FEW:
        _warn_of_few(left, converted / total, where)
    if placement == "input" and pruning.active:
        _warn_of_dense(model)
    if depthwise and pruning.active and (where == "everywhere" or backend != "auto"):
        warnings.warn(
            f"the model has depthwise convolutions ({len(depthwise)}, the first is {depthwise[0]!r}). With pruned "
            "gradients, MobileNet lost 15 to 70 percentage points of accuracy in 6 of the 12 runs that the paper "
            "reports (such as 8.7 % instead of 68.2 % on CIFAR-100 at percentile 85, and 28.7 % instead of 92.3 % on "
            "CIFAR-10 at 95): watch the accuracy, or exclude them",
            stacklevel=2,
        )
    return model


def _warn_of_dense(model: nn.Module) -> None:
    """Of layers that consume a gradient nobody has pruned, since a normalisation mixes what the next layer pruned."""
    reasons = [
        reason
        for name, (_, reason) in decide_placements(model).items()
        if "Norm" in reason and isinstance(model.get_submodule(name), SparseConv2d)
    ]
    if reasons:
        warnings.warn(
            f'placement="input": the output gradients of {len(reasons)} convolutions (the first is {reasons[0]}) are dense and '
            'stay so, so that their backward passes have no zeros to skip; placement="auto" prunes what they consume',
            stacklevel=3,
        )


# Of all weights of convolutions. Less than this hardly shows in the time of a step.
_FEW = 0.1


def _warn_of_few(left: Counter[str], share: float, where: str) -> None:
    reasons = "; ".join(f"{reason} ({count})" for reason, count in left.most_common(3))
    more = "" if len(left) <= 3 else f"; {len(left) - 3} more reasons in sparsebwd.conversion_report(model)"
    remedy = '; where="everywhere" converts what is only not faster' if where == "faster" else ""
    converted = f"convolutions with only {share:.1%} of the weights were" if share else "no convolution was"
    warnings.warn(f"{converted} converted. Left as they are: {reasons}{more}{remedy}", stacklevel=3)


@overload
def revert(model: SparseConv2d) -> nn.Conv2d: ...
@overload
def revert(model: _Model) -> _Model: ...
def revert(model: nn.Module) -> nn.Module:
    """Make every :class:`sparsebwd.SparseConv2d` of ``model`` a plain ``nn.Conv2d`` again, or what else it was, in place.

    Parameters and modules stay the same objects. Subclasses of SparseConv2d are left alone.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.

    Examples:
        >>> import sparsebwd
        >>> from torch import nn
        >>> model = sparsebwd.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), where="everywhere")
        >>> type(sparsebwd.revert(model)[0]).__name__
        'Conv2d'
    """
    _check_model(model)
    for module in model.modules():
        if (original := original_class(own_class(module))) is not None:
            module._unconfigure()
            module.__class__ = rebased(type(module), original)
    return model


_FASTER = Pruning(where="faster")


def conversion_report(model: nn.Module) -> ConversionReport:
    """What each convolution of ``model`` is now, and why; prints one line for each.

    Examples:
        >>> import sparsebwd
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
        >>> print(sparsebwd.conversion_report(sparsebwd.convert(model, 95, where="everywhere", exclude="3")))
        0: placement='output', percentile=95.0 (followed by BatchNorm2d '1')
        3: not converted: ...
    """
    _check_model(model)
    return _report(model, decide_placements(model))


def _report(model: nn.Module, placements: dict[str, Placement] | None) -> ConversionReport:
    """placements: None if it was given for all layers."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, SparseConv2d):
            settings = module.percentile, module.placement, module.backend
            by = "image" if module.pruning.by_image else "none"
            amount = module.where, module.density, module.variance, module.granularity, module.noise, by
            reason = "as asked for" if placements is None else placements[name].reason
            if (original := original_class(own_class(module))) not in (None, nn.Conv2d):
                reason = f"{original.__name__}, {reason}"
            if dense := _why_not_faster(module, module.pruning):
                reason += f"; but as an nn.Conv2d, except under autocast to bfloat16: {dense}"
            layers.append(LayerReport(name, True, *settings, reason, *amount))
        elif isinstance(module, _ConvNd):
            reason = _why_not(module)
            if reason is None and (dense := _why_not_faster(module, _FASTER)):
                reason = f"it would not be faster: {dense}"
            reason = reason or "it is a plain Conv2d that convert() was not asked to convert"
            layers.append(LayerReport(name, False, None, None, None, reason))
    return ConversionReport(tuple(layers))
