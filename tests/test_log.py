# SPDX-License-Identifier: Apache-2.0
"""The log at debug level says what ran: it is compared with what observers are told."""

from __future__ import annotations

import logging

import pytest
import torch

from sparsebwd import Pruning, SparseConv2d, backends, grad, prune_gradient
from sparsebwd.backends import break_even, cpu

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
    _backward(SparseConv2d(32, 32, 3, padding=1))
    assert [record.implementation for record in stats] == [implementation]
    *_, chosen, ran = log()
    assert chosen.endswith("backend 'cpu' runs it, each of AGB and WGC sparse or dense as the density says")
    assert words in ran


@pytest.mark.parametrize("arguments", [(4, 4, 3), (64, 64, 3, 1, 1, 1, 16), (32, 8, 3)])
def test_what_is_too_small_runs_dense_and_says_so(arguments, log, stats):
    _backward(SparseConv2d(*arguments, percentile=95))
    assert [record.implementation for record in stats] == ["dense"]
    assert "AGB dense, WGC dense: too few" in log()[-1]


def test_what_was_asked_for_by_name_runs(log, stats):
    _backward(SparseConv2d(4, 4, 3, backend="cpu"))
    assert [record.implementation for record in stats] == ["cpu"]
    assert log() and all(message.endswith("backend 'cpu' runs it") for message in log())


def test_pruning_alone_is_neither_sparse_nor_dense(log):
    prune_gradient(torch.randn(2, 3, 4, 4))
    assert log()[-1].endswith("backend 'cpu' runs it")


def test_the_convolutions_alone(log):
    grad.conv2d_weight(torch.randn(1, 4, 5, 5), (4, 4, 3, 3), torch.randn(1, 4, 3, 3))
    assert "AGB dense, WGC dense: too few" in log()[-1]
