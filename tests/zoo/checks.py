# SPDX-License-Identifier: Apache-2.0
"""What is asked of every network."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsebwd import DensityMonitor, SparseConv2d, conversion_report, convert, revert

from .architectures import Architecture

STEPS = 3
LEARNING_RATE = 1e-4  # normalisation over the few pixels of small images has steep gradients

# Of a converted network against the same one in float64, relative to the error of the dense one: two ways to round, each as
# good as the other, which normalisation over few pixels then enlarges alike.
WORSE = 8.0
LEAST = 2e-6  # in relation to the norm of all gradients, or outputs


@dataclass(frozen=True)
class Row:
    """One network. error: the largest ratio of errors, as above. density: over all layers at percentile 90. left: why
    convolutions were not converted, and how many."""

    architecture: str
    source: str
    convolutions: int
    converted: int
    registered: tuple[str, ...]
    error: float
    density: float
    left: tuple[tuple[str, int], ...]


def check(architecture: Architecture) -> Row:
    """Convert, train and revert; AssertionError says what is wrong."""
    torch.manual_seed(0)
    dense = architecture.build()
    kinds = {name: type(module) for name, module in dense.named_modules()}
    keys = list(dense.state_dict())
    generator = torch.Generator().manual_seed(1)
    batches = [architecture.images(generator) for _ in range(STEPS)]

    unpruned = _converted(copy.deepcopy(dense), None)
    report = conversion_report(unpruned)
    assert any(layer.converted for layer in report.layers), "nothing was converted"
    assert list(unpruned.state_dict()) == keys, "the keys of the state_dict changed"
    error = _error(dense, unpruned, batches)

    pruned = _converted(dense, 90)  # in place: what revert() gives back has to be the model itself
    with DensityMonitor(pruned) as monitor:
        for gradients, outputs in _train(pruned, batches):
            assert gradients.isfinite().all() and outputs.isfinite().all(), "not finite at percentile 90"
    density = monitor.as_dict()["total"]["density"]
    assert 0 < density < 0.99, f"a density of {density} at percentile 90"

    state = copy.deepcopy(pruned.state_dict())
    assert revert(pruned) is dense
    assert {name: type(module) for name, module in dense.named_modules()} == kinds, "not of the types that it was of"
    torch.manual_seed(0)
    fresh = architecture.build()
    fresh.load_state_dict(state)
    with torch.no_grad():
        reverted, wanted = (_flat(model.eval()(batches[0])) for model in (dense, fresh))
    assert wanted.isfinite().all(), "outputs are not finite in evaluation mode"
    assert torch.equal(reverted, wanted), "after revert(), outputs are not those of a network that was never converted"
    layers = [module for module in unpruned.modules() if isinstance(module, SparseConv2d)]
    return Row(
        architecture.name,
        architecture.source,
        sum(isinstance(module, _ConvNd) for module in dense.modules()),
        len(layers),
        tuple(sorted({kinds[name].__name__ for name, kind in kinds.items() if issubclass(kind, nn.Conv2d)} - {"Conv2d"})),
        error,
        density,
        tuple(Counter(layer.reason for layer in report.layers if not layer.converted).most_common()),
    )


def _converted(model: nn.Module, percentile: float | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of depthwise layers, and where little is converted
        return convert(model, percentile, where="everywhere")


def _error(dense: nn.Module, sparse: nn.Module, batches: list[Tensor]) -> float:
    """The largest error of `sparse` relative to that of `dense`, over all steps, gradients and outputs."""
    exact = _train(copy.deepcopy(dense).double(), [batch.double() for batch in batches])
    largest = 0.0
    for truth, by_dense, by_sparse in zip(exact, _train(copy.deepcopy(dense), batches), _train(sparse, batches)):
        for what, wanted, plain, found in zip(("gradients", "outputs"), truth, by_dense, by_sparse):
            error, norm = float((found - wanted).norm()), float(wanted.norm())
            ratio = error / max(float((plain - wanted).norm()), LEAST * norm)
            assert math.isfinite(ratio) and ratio <= WORSE, f"{what}: an error of {error:.2g} in {norm:.2g}, {ratio:.1f} times as large as dense"
            largest = max(largest, ratio)
    return largest


def _train(model: nn.Module, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """After each step: all gradients, and the outputs, in float64."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        optimizer.zero_grad()
        outputs = _flat(model(batch))
        outputs.square().mean().add(outputs[::3].sum() / len(outputs)).backward()
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        yield torch.cat(gradients), outputs.detach().double()


def _flat(output: object) -> Tensor:
    """All that a network returns as one vector: some have auxiliary outputs."""
    if isinstance(output, Tensor):
        return output.flatten()
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([_flat(value) for value in values if value is not None])
