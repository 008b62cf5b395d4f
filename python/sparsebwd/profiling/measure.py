# SPDX-License-Identifier: Apache-2.0
"""Training steps of copies of a model, dense and converted in turns: :func:`profile`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from ..arguments import as_int, shown
from ..backends import break_even, why_not_faster
from ..conversion import conversion_report, convert
from ..nn import SparseConv2d, a_parameter
from ..randomness import generators_kept
from ..settings import DEFAULT, Pruning
from .result import Alternative, LayerProfile, Profile

if TYPE_CHECKING:
    from ..bench.convolutions import Convolution
    from ..bench.sides import Side

Loss = Callable[[Any, Any], Tensor]
Batch = tuple[Any, Any]
"""Inputs and target."""

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def profile(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    percentile: float | None = DEFAULT,
    steps: int = 7,
    alternatives: bool = True,
) -> Profile:
    """Measure what training steps of ``model`` gain by pruned gradients, and what each of its convolutions does and why.

    Copies of the model take steps on the batch, as nn.Conv2d and as converted, in turns. Nothing of the caller's changes:
    parameters, buffers, optimizer and random generators are afterwards what they were. The copies do not learn, so that all
    steps are those of this moment of training. The gradients of a model that has not been trained are not those that it will
    have: profile one that has been, on a batch of your data.

    Takes some hundred milliseconds to minutes, 2 * (steps + 2) steps and more, and as much memory as four models.

    Args:
        model: any module. With :class:`sparsebwd.SparseConv2d` layers it is profiled as it is, otherwise as
            ``sparsebwd.convert(model, percentile)`` makes it. Not compiled, nor wrapped by DistributedDataParallel. It takes
            steps in training mode, or, if part of it is in training mode, as it is.
        batch: on the device of the model, ``inputs`` or ``(inputs, target)``. inputs: a tensor, a tuple of positional or a
            dictionary of named arguments of the model; with several inputs in a tuple a target, or None, has to be there.
        loss: ``loss(output, target)``, a scalar tensor. By default cross entropy of an output (N, classes, ...), with the
            target, (N, ...) class indices or probabilities, or with random classes if there is none.
        optimizer: that of the model; a copy of it takes the steps, at a learning rate of 0. By default SGD with momentum.
        percentile: of a model that is not converted yet.
        steps: measured of each kind, after 2 for warm-up; at least 2.
        alternatives: measure on CPUs, too, what channels_last and :func:`sparsebwd.keep_memory` do for the dense step; the
            latter in two processes of their own, which have to be able to import the classes of the model.

    Returns:
        A :class:`Profile`; ``print`` it, or see its ``as_dict()`` and ``plot(path)``.

    Raises:
        TypeError: an argument is of another type, the model is compiled or wrapped, or there is no ``loss`` and the output is
            no tensor (N, classes, ...).
        ValueError: ``steps`` below 2, a percentile for a model that is converted, or a model without parameters.
        RuntimeError: what the model, the loss or the copying of them raises.

    Examples:
        >>> import sparsebwd
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
        >>> import torch
        >>> batch = torch.randn(4, 16, 12, 12), torch.randint(8, (4,))
        >>> found = sparsebwd.profile(model, batch, loss=lambda output, target: output.square().mean(), steps=2, alternatives=False)
        >>> [layer.name for layer in found.layers]
        ['0', '3']
        >>> found.speedup > 0
        True
    """
    _check(model, optimizer, loss, percentile)
    steps = as_int(steps, "steps", least=2)
    inputs, target = _split(batch)
    from ..bench import sides
    from ..bench.phases import WARMUP, median_ms
    from ..bench.timing import Call, interleave

    device = a_parameter_of(model).device
    with generators_kept(device), torch.enable_grad():
        try:
            converted, copied_optimizer, loss = copy.deepcopy((model, optimizer, loss or cross_entropy))
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(f"model: it cannot be copied by copy.deepcopy, which profile() needs: {error}") from error
        if copied_optimizer is None:
            copied_optimizer = torch.optim.SGD(converted.parameters(), lr=0.0, momentum=0.9)
        if not any(module.training for module in converted.modules()):
            converted.train()
        if not _is_sparse(converted):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say is a reason of each layer
                convert(converted, percentile)
        data = tree_map(_copied, (inputs, target))
        layout = _layout(converted, data)
        step = partial(_loss_of, loss)
        both = {name: sides.Side(name, converted, copied_optimizer, step, device) for name in sides.SIDES}
        others: dict[str, Side] = {}
        if alternatives and layout != "channels_last" and device.type == "cpu":
            last = _in_channels_last(converted, copied_optimizer)
            others = {name: sides.Side(name, *last, step, device) for name in sides.SIDES}
        del copied_optimizer
        everything = {**{(name, layout): side for name, side in both.items()}, **{(n, "channels_last"): s for n, s in others.items()}}
        batches = {name: [_in_layout(data, name)] * (WARMUP + steps) for _, name in everything}
        parts = {(key, part): side for part in ("step", "backward_in_parts") for key, side in everything.items()}
        calls = {
            f"{kind} {of} {part}": Call(partial(getattr(sides.Side, part), side), sides.next_batch(batches[of], 0))
            for ((kind, of), part), side in parts.items()
            if part == "step" or kind in both and of == layout
        }
        interleave(calls, steps, WARMUP)
        looked = _look(both["sparse"], data)
        monitored = both["sparse"].densities([data])
        records = sides.layers(both, monitored, 4)
        spent = {name: sides.times(side) for name, side in both.items()}
        found = [] if not others else [
            Alternative(
                "channels_last",
                spent["dense"]["total_ms"],
                *(median_ms(others[name].phases.seconds["total"]) for name in ("dense", "sparse")),
            )
        ]
        if alternatives and device.type == "cpu":
            from .kept import measure_kept

            found.append(measure_kept(both["dense"].model, both["dense"].optimizer, data, loss, steps))
    reports = {layer.name: layer for layer in conversion_report(converted).layers}
    layers = tuple(
        _layer(record, monitored["layers"].get(record["layer"]), reports, converted, *looked[record["layer"]])
        for record in records
        if record["layer"] in looked
    )
    return Profile(
        *(
            {phase: of[f"{phase}_ms"] for phase in ("total", "forward", "backward", "optimizer")}
            | {"convolutions": of["kinds_ms"]["convolution"]}
            for of in (spent["dense"], spent["sparse"])
        ),
        spread=max(of["iqr_ms"]["total"] / of["total_ms"] for of in spent.values()),
        layers=layers,
        alternatives=tuple(found),
        setting={
            "device": device.type,
            "layout": layout,
            "threads": torch.get_num_threads(),
            "steps": steps,
            "autocast": _autocast(device),
            "pruning": _asked(converted),
        },
    )


def cross_entropy(output: Any, target: Any) -> Tensor:
    """The loss where none is given."""
    if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
        got = f"of shape {tuple(output.shape)}, {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise TypeError(
            f"loss: got none, and the model's output is {got}; accepted without a loss: a tensor (N, classes, ...); "
            "otherwise give loss=lambda output, target: ..."
        )
    if target is None:
        generator = torch.Generator().manual_seed(0)
        shape = (output.shape[0], *output.shape[2:])
        target = torch.randint(output.shape[1], shape, generator=generator).to(output.device)
    elif isinstance(target, Tensor) and target.dim() == 1 and output.dim() > 2:
        target = target.view(-1, *(1 for _ in output.shape[2:])).expand(-1, *output.shape[2:])  # of all pixels
    return F.cross_entropy(output.float(), target)


def _check(model: nn.Module, optimizer: object, loss: object, percentile: float | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {shown(model)}; accepted: an nn.Module")
    if isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner = "model.module" if isinstance(model, DistributedDataParallel) else "model._orig_mod"
        raise TypeError(f"model: got {type(model).__name__}; accepted: the model within, {inner}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {shown(optimizer)}; accepted: a torch.optim.Optimizer, or None")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: got {shown(loss)}; accepted: a function of output and target, or None")
    Pruning(percentile)
    if percentile is not DEFAULT and _is_sparse(model):
        raise ValueError(f"percentile: got {percentile!r} for a model that is converted already, and is profiled as it is")
    a_parameter_of(model)


def a_parameter_of(model: nn.Module) -> Tensor:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model: has no parameters, so there is nothing to train")
    return parameter


def _is_sparse(model: nn.Module) -> bool:
    return any(isinstance(module, SparseConv2d) for module in model.modules())


def _split(batch: Any) -> Batch:
    if isinstance(batch, Tensor | Mapping):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor | tuple | list | Mapping):
        return batch[0], batch[1]
    raise TypeError(
        f"batch: got {shown(type(batch).__name__)}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}; accepted: "
        "inputs or (inputs, target), where inputs is a tensor, a tuple of positional or a dictionary of named arguments"
    )


def _loss_of(loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
    inputs, target = batch
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    value = loss(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError(f"loss: it returned {shown(value)}; accepted: a scalar tensor that depends on the model's parameters")
    return value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _layout(model: nn.Module, data: Batch) -> str:
    """That of the weights, or of the images."""
    tensors = [*(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))]
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, data[0])
    last = (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in tensors
    )
    return "channels_last" if any(last) else "contiguous"


def _in_layout(data: Batch, layout: str) -> Batch:
    """Images (N, C, H, W) among the inputs as they are for "contiguous", else in channels_last."""

    def changed(value: Any) -> Any:
        images = isinstance(value, Tensor) and value.dim() == 4 and layout == "channels_last"
        return value.contiguous(memory_format=_LAYOUTS[layout]) if images else value

    return tree_map(changed, data[0]), data[1]


def _in_channels_last(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Copies, in which the optimizer's state of a weight has the layout of that."""
    model, optimizer = copy.deepcopy((model, optimizer))
    model.to(memory_format=torch.channels_last)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() == 4 and value.shape == parameter.shape:
                state[name] = value.contiguous(memory_format=torch.channels_last)
    return model, optimizer


def _autocast(device: torch.device) -> str | None:
    on = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if on else None


def _asked(model: nn.Module) -> str:
    """What the layers prune by, in words: that of most of them."""
    asked = [module.pruning.asked for module in model.modules() if isinstance(module, SparseConv2d)]
    return max(dict.fromkeys(asked), key=asked.count) if asked else "no layer is sparse"


def _look(side: Side, data: Batch) -> dict[str, tuple[Convolution, torch.dtype, bool]]:
    """What the backward pass of each convolution is given: dtype, and whether it is channels_last."""
    from ..bench.convolutions import watching

    found: dict[str, tuple[Convolution, torch.dtype, bool]] = {}

    def arrived(convolution: Convolution, gradient: Tensor) -> None:
        last = gradient.is_contiguous(memory_format=torch.channels_last)
        found[convolution.name] = convolution, gradient.dtype, last

    side.optimizer.zero_grad()
    with watching(side.model, arrived):
        side.loss(data).backward()
    return found


def _layer(
    record: Mapping[str, Any],
    monitored: Mapping[str, Any] | None,
    reports: Mapping[str, Any],
    model: nn.Module,
    convolution: Convolution,
    dtype: torch.dtype,
    channels_last: bool,
) -> LayerProfile:
    """record: as `bench.sides.layers` returns it. monitored: what a DensityMonitor says of it, if it is sparse."""
    module = model.get_submodule(convolution.name)
    ran = bool(monitored and monitored["steps"])
    implementations = record["implementation"] if ran else "nn.Conv2d"
    kinds = {kind for name in implementations.split(", ") for kind in name.split("+")}
    sparse, dense = kinds & {"cpu", "cuda"}, kinds & {"dense", "nn.Conv2d", "depthwise"}
    decision = "dense" if not sparse else "partly" if dense else "sparse"
    reason = ""
    if decision == "sparse":
        pass
    elif not isinstance(module, SparseConv2d):
        reason = reports[convolution.name].reason
    elif not ran:
        settings = module.pruning, convolution.problem, a_parameter(module).device.type, dtype, channels_last
        reason = why_not_faster(*settings) or "no gradient reached it"
    else:
        reason = _too_dense(convolution, dtype, channels_last, a_parameter(module).device.type, module.pruning)
    return LayerProfile(
        name=convolution.name,
        problem=record["problem"],
        density=monitored["density"] if monitored is not None and ran else None,
        dense_ms=record["dense_ms"],
        sparse_ms=record["sparse_ms"],
        decision=decision,
        reason=reason,
        implementation=implementations,
    )


def _too_dense(convolution: Convolution, dtype: torch.dtype, channels_last: bool, device: str, pruning: Pruning) -> str:
    if pruning.backend not in ("auto", "cpu", "cuda"):
        return f"the backend {pruning.backend!r} was asked for"
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return "its gradient is too dense, or of a kind that the sparse kernels do not take"
    agb, wgc = break_even.break_even(convolution.problem, dtype, channels_last)
    return f"its gradient is too dense: sparse is faster up to densities of {agb:.2f} (AGB) and {wgc:.2f} (WGC)"
