# SPDX-License-Identifier: Apache-2.0
"""What backend="auto" chooses on a device, by densities of earlier steps, on the emulated kernels."""

from __future__ import annotations

import logging

import pytest
import torch
from emulated_backend import (
    FORMATS,
    LARGE,
    emulated,  # noqa: F401  a fixture
    layer_backward,
    needs_compiler,
    operands_of,
)

from sparsebwd import backends
from sparsebwd.backends import cuda_auto
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal

pytestmark = [pytest.mark.emulated, needs_compiler, pytest.mark.usefixtures("emulated")]


@pytest.fixture
def fresh() -> cuda_auto.AdaptiveCudaBackend:
    """What "auto" uses, with nothing remembered."""
    adaptive = backends.get_backend("emulated").for_auto()
    adaptive._layers.clear()
    return adaptive


@pytest.fixture
def set_precision():
    """Sets how cuDNN may compute convolutions of float32; undone after the test."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    yield lambda precision: setattr(convolutions, "fp32_precision", precision)
    convolutions.fp32_precision = before


@pytest.fixture
def ieee(set_precision):
    """The break-even density is 0.25 in channels_last, half of it in contiguous tensors."""
    set_precision("ieee")


def _implementations(
    text, densities, generator, stats, percentile=None, dtype=torch.float32, layer_id=1, memory_format=FORMATS[1]
):
    problem = ConvProblem.parse(text)
    for density in densities:
        operands = operands_of(problem, generator, dtype, memory_format, density)
        layer_backward(problem, operands, percentile, backend="auto", layer_id=layer_id)
    return [said.implementation for said in stats[-len(densities) :]]


def test_auto_takes_the_density_of_two_steps_before(fresh, ieee, generator, stats):
    # Pruning at 51 removes few: the density is close to that before.
    densities = [0.1, 0.9, 0.1, 0.1, 0.9, 0.9]
    ran = _implementations(LARGE, densities, generator, stats, percentile=51.0)
    assert ran == ["dense", "dense", "emulated", "dense", "emulated", "emulated"]
    assert {said.backend for said in stats} == {"emulated"}


@pytest.mark.parametrize(
    "text, reason", [(LARGE, "no density of it is known yet"), (LARGE.replace("r3s3", "r1s1"), "1x1, in groups")]
)
def test_auto_logs_why_it_runs_dense(text, reason, fresh, ieee, generator, stats, caplog):
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        assert _implementations(text, [0.1], generator, stats, 51.0) == ["dense"]
    assert f"AGB dense, WGC dense: {reason}" in caplog.text


def test_auto_remembers_each_layer_and_problem_apart(fresh, ieee, generator, stats):
    assert _implementations(LARGE, [0.1] * 3, generator, stats, 51.0, layer_id=1)[-1] == "emulated"
    assert _implementations(LARGE, [0.1], generator, stats, 51.0, layer_id=2) == ["dense"]
    assert _implementations(LARGE.replace("n2", "n1"), [0.1], generator, stats, 51.0, layer_id=1) == ["dense"]


def test_auto_counts_what_is_not_pruned(fresh, ieee, generator, stats):
    assert _implementations(LARGE, [0.1] * 3, generator, stats) == ["dense", "dense", "emulated"]
    assert _implementations(LARGE, [0.9] * 3, generator, stats) == ["emulated", "emulated", "dense"]


def test_auto_counts_seldom_while_it_is_dense(fresh, ieee, generator, stats, monkeypatch):
    recorded = []
    record = cuda_auto.DensityHistory.record

    def noting(self, density):
        recorded.append(self.calls)
        record(self, density)

    monkeypatch.setattr(cuda_auto.DensityHistory, "record", noting)
    monkeypatch.setattr(cuda_auto, "_CALLS_PER_COUNT", 4)
    _implementations("n1c16h3w3k16r3s3p1", [0.9] * 10, generator, stats)
    assert recorded == [1, 2, 5, 9]


@pytest.mark.parametrize(
    "text, precision, dtype, limit",
    [
        (LARGE, "ieee", torch.float32, 0.25),
        (LARGE.replace("h8w8", "h7w7"), "ieee", torch.float32, 0.15),
        ("n2c16h16w16k24r3s3u2p1", "ieee", torch.float32, 0.15),
        (LARGE, "tf32", torch.float32, 0.04),
        (LARGE, "ieee", torch.bfloat16, 0.02),
    ],
)
def test_auto_by_arithmetic_geometry_and_layout(
    text, precision, dtype, limit, memory_format, fresh, generator, stats, set_precision
):
    set_precision(precision)
    if memory_format == torch.contiguous_format:
        limit *= 0.5
    for density, expected in ((0.6 * limit, "emulated"), (1.5 * limit, "dense")):
        ran = _implementations(text, [density] * 3, generator, stats, None, dtype, 1, memory_format)
        assert ran[2] == expected
        fresh._layers.clear()


@pytest.mark.parametrize("text", ["n2c33h6w6k40r1s1", "n2c16h6w6k16r3s3p1g16"])
def test_auto_leaves_to_dense_what_never_pays(text, fresh, ieee, generator, stats):
    assert _implementations(text, [0.05] * 3, generator, stats, percentile=90.0) == ["dense"] * 3


def test_auto_while_a_graph_is_captured(fresh, ieee, generator, stats, monkeypatch):
    """The choice is the last one made, and nothing is waited for or recorded."""
    _implementations(LARGE, [0.1] * 4, generator, stats, 51.0)
    with monkeypatch.context() as capture:
        capture.setattr(cuda_auto, "_capturing", lambda device: True)
        assert _implementations(LARGE, [0.9] * 4, generator, stats, 51.0) == ["emulated"] * 4
        assert _implementations(LARGE, [0.1] * 2, generator, stats, 51.0, layer_id=2) == ["dense"] * 2
        (first, second) = (layer.history._values for layer in fresh._layers.values())
        assert len(first) == 2 and not second  # no memory of the host is taken
    assert _implementations(LARGE, [0.9] * 3, generator, stats, 51.0) == ["emulated", "emulated", "dense"]


def test_auto_prunes_and_convolves_as_dense_or_sparse(fresh, ieee, generator, stats):
    """The same operands three times: the third pass is sparse, and differs by rounding alone."""
    problem = ConvProblem.parse(LARGE)
    operands = operands_of(problem, generator, memory_format=torch.channels_last, integer=True, density=0.2)
    passes = [layer_backward(problem, operands, 50.0, backend="auto") for _ in range(3)]
    assert [said.implementation for said in stats] == ["dense", "dense", "emulated"]
    for other in passes[1:]:
        for one, two in zip(passes[0], other):
            assert_bit_equal(one + 0, two + 0)
    assert [float(said.density) for said in stats] == [float(stats[0].density)] * 3


def test_number_of_layers_remembered_is_bounded(fresh, ieee, generator, stats, monkeypatch):
    monkeypatch.setattr(cuda_auto, "_MOST_LAYERS", 3)
    for layer_id in range(5):
        _implementations("n1c16h3w3k16r3s3p1", [0.1], generator, stats, layer_id=layer_id)
    assert [key[0] for key in fresh._layers] == [2, 3, 4]
