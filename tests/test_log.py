# SPDX-License-Identifier: Apache-2.0
"""The log at debug level says what ran: it is compared with what observers are told."""

from __future__ import annotations

import logging

import pytest
import torch

from sparsebwd import Pruning, SparseConv2d, backends, convert, grad, prune_gradient
from sparsebwd.backends import break_even, cpu, why_not_faster
from sparsebwd.functional import sparse_conv2d
from sparsebwd.problem import ConvProblem

pytestmark = pytest.mark.skipif("cpu" not in backends.available_backends(), reason="no CPU kernels")


@pytest.fixture
def log(caplog):
    backends.choose_backend.cache_clear()  # it logs each choice once
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "sparsebwd"]


def _table(monkeypatch, limits: tuple[float, float]) -> None:
    table = break_even.Table("a CPU", "measured", dict.fromkeys(break_even.CLASSES, break_even.BreakEven(*limits)), {})
    table = break_even.Table(table.name, table.origin, table.channels_last, table.channels_last)
    monkeypatch.setattr(break_even, "tables", lambda: {torch.float32: table})
    break_even.break_even.cache_clear()


@pytest.fixture(autouse=True)
def _true_tables_afterwards():
    yield
    break_even.break_even.cache_clear()


@pytest.mark.parametrize(
    "limits, settings, wants_input, sampled",
    [
        ((1.0, 1.0), {}, True, False),
        ((1.0, 0.3), {}, True, True),
        ((0.63, 0.63), {}, True, False),  # percentile 90 leaves .62 at most
        ((0.61, 0.63), {}, True, True),
        ((0.61, 0.63), {}, False, False),  # WGC alone
        ((0.63, 0.63), {"placement": "input"}, True, True),
        ((0.63, 0.63), {"percentile": None}, True, True),
        ((0.2, 0.3), {"density": 0.2}, True, False),
        ((0.2, 0.3), {"density": 0.25}, True, True),
        ((0.0, 0.0), {}, True, False),
        ((0.0, 0.5), {}, False, True),
    ],
)
def test_a_gradient_is_sampled_only_where_that_decides(limits, settings, wants_input, sampled, monkeypatch):
    _table(monkeypatch, limits)
    asked = []
    monkeypatch.setattr(cpu, "_expected_density", lambda grad, pruning: asked.append(grad) or 0.1)
    layer = SparseConv2d(32, 32, 3, padding=1, **settings)
    layer(torch.randn(2, 32, 24, 24, requires_grad=wants_input)).square().sum().backward()
    assert bool(asked) is sampled


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0])
@pytest.mark.parametrize("values", [torch.ones(10_000), torch.randn(10_000), torch.randn(10_000).exp() ** 3])
def test_no_gradient_is_left_with_more_than_the_highest_density(values, percentile):
    pruning = Pruning(percentile)
    density = prune_gradient(values[:, None], percentile).density.item()
    assert density <= pruning.highest_density + 5 * 0.5 / 100


def _backward(layer: SparseConv2d, size: int = 24) -> None:
    layer(torch.randn(2, layer.in_channels, size, size, requires_grad=True)).square().sum().backward()


@pytest.mark.parametrize(
    "limits, implementation, words",
    [
        ((1.0, 1.0), "cpu", "AGB sparse, WGC sparse (break-even 1.00, 1.00)"),
        ((0.0, 1.0), "cpu+dense", "AGB dense, WGC sparse (break-even 0.00, 1.00)"),
        ((0.01, 0.01), "dense", "AGB dense, WGC dense (break-even 0.01, 0.01)"),
        ((0.0, 0.0), "dense", "AGB dense, WGC dense: sparse kernels are faster at no density for the class 'kernel'"),
    ],
)
def test_what_runs_by_density(limits, implementation, words, log, stats, monkeypatch):
    _table(monkeypatch, limits)
    layer = SparseConv2d(32, 32, 3, padding=1)
    _backward(layer)
    assert [record.implementation for record in stats] == [implementation]
    *_, why, ran = log()
    assert words in why
    what = f"layer {layer.layer_id}, {ConvProblem.parse('n2c32h24w24k32r3s3p1')} in torch.float32"
    assert why.startswith(what) and ran == f"{what}: ran {implementation}"


@pytest.mark.parametrize("limits, why", [((0.0, 1.0), "WGC sparse (break-even 1.00)"), ((1.0, 0.01), "WGC dense (break-even 0.01)")])
def test_only_what_is_wanted_is_named(limits, why, log, monkeypatch):
    _table(monkeypatch, limits)
    SparseConv2d(32, 32, 3, padding=1, percentile=None)(torch.randn(2, 32, 24, 24)).square().sum().backward()
    assert why in log()[-2] and "AGB" not in log()[-2]


@pytest.mark.parametrize("arguments", [(4, 4, 3), (64, 64, 3, 1, 1, 1, 16), (32, 8, 3)])
def test_what_is_too_small_runs_dense_and_says_so(arguments, log, stats):
    _backward(SparseConv2d(*arguments, percentile=95))
    assert [record.implementation for record in stats] == ["dense"]
    assert "AGB dense, WGC dense: too few" in log()[-2] and log()[-1].endswith(": ran dense")


def test_what_was_asked_for_by_name_runs(log, stats):
    _backward(SparseConv2d(4, 4, 3, backend="cpu"))
    assert [record.implementation for record in stats] == ["cpu"]
    assert log()[-1].endswith(f"{ConvProblem.parse('n2c4h24w24k4r3s3')} in torch.float32: ran cpu")


def test_pruning_alone_is_neither_sparse_nor_dense(log):
    prune_gradient(torch.randn(2, 3, 4, 4))
    assert log()[-1] == "pruning of (2, 3, 4, 4) in torch.float32: ran cpu"
    prune_gradient(torch.randn(2, 3, 4, 4), granularity="row")
    assert log()[-1] == "pruning of (2, 3, 4, 4) in torch.float32: ran plain PyTorch"


def test_the_convolutions_alone(log):
    grad.conv2d_weight(torch.randn(1, 4, 5, 5), (4, 4, 3, 3), torch.randn(1, 4, 3, 3))
    assert log()[-2] == f"WGC of {ConvProblem.parse('n1c4h5w5k4r3s3')} in torch.float32: asked of the backend 'cpu'"
    assert "in torch.float32: WGC dense: too few" in log()[-1]


# ---- where="faster"

SMALL = ConvProblem(2, 4, 9, 9, 4, 3, 3)


def _left_dense(**settings) -> SparseConv2d:
    """A layer of a converted model, which nothing can make faster."""
    model = convert(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)), where="everywhere", **settings)
    model[0].where = "faster"
    return model[0]


@pytest.mark.parametrize(
    "settings, size, dtype",
    [
        ({}, (2, 4, 9, 9), torch.float32),
        ({"percentile": None}, (2, 4, 9, 9), torch.float32),
        ({"noise": 0.1}, (2, 4, 9, 9), torch.float32),
        ({"threshold": "predicted"}, (4, 9, 9), torch.float32),
        ({"density": 0.2, "granularity": "row"}, (2, 4, 9, 9), torch.float32),
        ({}, (2, 4, 9, 9), torch.float64),
    ],
)
def test_layers_that_stay_dense_say_so(settings, size, dtype, log, stats):
    layer = _left_dense(**settings).to(dtype)
    for _ in range(2):
        layer(torch.randn(size, dtype=dtype, requires_grad=True)).sum().backward()
    problem = ConvProblem(size[0] if len(size) == 4 else 1, 4, 9, 9, 4, 3, 3)
    said = [message for message in log() if " in torch." in message and "refuses" not in message]
    assert not stats and 1 <= len(said) <= 2 and len(set(said)) == 1  # ordinary tensors: once for each size
    assert said[0].startswith(f"0, {problem} in {dtype}: dense, and nothing is pruned: ")
    assert said[0].endswith(why_not_faster(layer.pruning, problem, "cpu", dtype, False))
    assert not any("ran" in message or "'cpu'" in message for message in said)


def test_functions_that_stay_dense_say_so(log, stats):
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    sparse_conv2d(torch.randn(2, 4, 9, 9), weight, where="faster", layer_id=7).sum().backward()
    assert not stats and log()[-1].startswith(f"layer 7, {SMALL} in torch.float32: dense, and nothing is pruned: ")


def test_compiled_layers_that_stay_dense_say_so(log, stats):
    """Which is known in the backward pass."""
    layer = _left_dense()
    torch.compile(layer, backend="eager")(torch.randn(2, 4, 9, 9, requires_grad=True)).sum().backward()
    *_, unpruned, why, ran = log()
    assert unpruned.startswith(f"0, {SMALL} in torch.float32: dense, and nothing is pruned: ")
    assert "AGB dense, WGC dense: too few" in why and ran.endswith(": ran dense") and not stats[0].pruning.prunes


def test_conversion_says_what_it_leaves(log, caplog):
    """Without a word of what runs layers of sizes that it takes them to have."""
    caplog.set_level(logging.DEBUG, "sparsebwd")
    convert(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)))
    assert "too few multiply-adds" in log()[-1]  # where dense bfloat16 is slow, it is converted for autocast
    assert not any("ran" in message or "'cpu'" in message for message in log())
