# SPDX-License-Identifier: Apache-2.0
"""DensityMonitor."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
from collections import Counter
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import sparsebwd
from sparsebwd import convert, ranges
from sparsebwd.backends import observers
from sparsebwd.monitor import DensityMonitor


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return convert(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU()
        ),
        where="everywhere",
    )


def step(model: nn.Module, batch: int = 4) -> None:
    model(torch.randn(batch, 3, 9, 9)).square().sum().backward()


def test_layers_and_total(model):
    with DensityMonitor(model) as monitor:
        for _ in range(3):
            step(model)
    record = monitor.as_dict()
    assert list(record["layers"]) == ["0", "3"]
    first, second = record["layers"].values()
    for layer in (first, second):
        assert 0 < layer["density"] < 1 and layer["steps"] == 3 and layer["seconds"] > 0
        assert layer["tau"] == pytest.approx(layer["sigma"] * NormalDist().inv_cdf(0.9), rel=1e-5)
        assert sum(layer["implementations"].values()) == 3
    total = record["total"]
    sizes = 8 * 9 * 9, 4 * 4 * 4  # elements of grad_output for one sample
    for quantity in ("density", "sigma", "tau"):
        mean = (first[quantity] * sizes[0] + second[quantity] * sizes[1]) / sum(sizes)
        assert total[quantity] == pytest.approx(mean, rel=1e-9)
    assert total["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert total["steps"] == 3
    assert json.loads(json.dumps(record)) == record


def test_density_is_that_of_the_consumed_gradient():
    layer = sparsebwd.SparseConv2d(1, 1, 1, percentile=None)
    grad_output = torch.zeros(2, 1, 2, 4)
    grad_output[0, 0, 0] = 1
    with DensityMonitor(layer) as monitor:
        layer(torch.randn(2, 1, 2, 4)).backward(grad_output)
        layer(torch.randn(1, 1, 2, 4)).backward(torch.zeros(1, 1, 2, 4))
    record = monitor.as_dict()["layers"]["SparseConv2d"]
    assert record["density"] == pytest.approx(4 / 24)  # by elements, over both steps
    assert record["sigma"] is None and record["tau"] is None


def test_only_the_layers_of_the_model_and_only_while_active(model):
    other = copy.deepcopy(model)
    with DensityMonitor(model) as monitor, DensityMonitor(other) as monitor_of_other:
        step(model)
        step(other)
        step(other)
    step(model)
    assert observers == []
    assert monitor.as_dict()["total"]["steps"] == 1
    assert monitor_of_other.as_dict()["total"]["steps"] == 2


def test_enter_again_goes_on_and_reset_forgets(model):
    monitor = DensityMonitor(model)
    for expected in (1, 2):
        with monitor:
            step(model)
        assert monitor.as_dict()["total"]["steps"] == expected
    monitor.reset()
    assert monitor.as_dict()["total"] == {
        "density": None, "sigma": None, "tau": None, "seconds": 0.0, "steps": 0, "implementations": {}
    }  # fmt: skip


def test_stops_after_an_exception_and_refuses_to_nest(model):
    monitor = DensityMonitor(model)
    with pytest.raises(RuntimeError, match="active already"), monitor:
        with monitor:
            pass
    assert observers == []


def test_table(model):
    monitor = DensityMonitor(model)
    with monitor:
        step(model)
    lines = monitor.table().splitlines()
    assert str(monitor).splitlines() == lines
    assert lines[0].split() == ["layer", "density", "sigma", "tau", "ms/step", "steps", "implementation"]
    assert [line.split()[0] for line in lines if line.strip()] == ["layer", "0", "3", "total"]
    assert f"{monitor.as_dict()['layers']['0']['density']:.3f}" == lines[1].split()[1]
    monitor.reset()
    assert monitor.table().splitlines()[-1].split() == ["total", "-", "-", "-", "-", "0", "-"]


def test_tensorboard(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with DensityMonitor(model) as monitor, SummaryWriter(str(tmp_path)) as writer:
        monitor.add_scalars(writer, 0)  # nothing recorded, nothing written
        step(model)
        monitor.add_scalars(writer, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    layers = ("0", "3", "total")
    tags = {f"{quantity}/{layer}" for quantity in ("density", "sigma", "tau", "backward_ms") for layer in layers}
    assert set(events.Tags()["scalars"]) == tags
    (event,) = events.Scalars("density/total")
    assert event.step == 7 and math.isclose(event.value, monitor.as_dict()["total"]["density"], rel_tol=1e-6)


def test_compiled_model(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with DensityMonitor(compiled) as monitor:
        step(compiled)
        step(compiled)
    record = monitor.as_dict()
    assert list(record["layers"]) == ["_orig_mod.0", "_orig_mod.3"]
    assert all(layer["steps"] == 2 for layer in record["layers"].values())


def test_distributed_data_parallel(model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        with DensityMonitor(parallel) as monitor:
            step(parallel)
        record = monitor.as_dict()
    finally:
        # Freed after its group, it may wait for a thread that waits for the interpreter's lock.
        del parallel, monitor
        gc.collect()
        torch.distributed.destroy_process_group()
    assert list(record["layers"]) == ["module.0", "module.3"]
    assert all(layer["steps"] == 1 for layer in record["layers"].values())


def test_bad_models():
    with pytest.raises(ValueError, match="no SparseConv2d layer to monitor"):
        DensityMonitor(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(TypeError, match="model: got str"):
        DensityMonitor("model")


# ---- names in torch.profiler


def ranges_of(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    return Counter(event.name for event in profiler.events() if event.name.startswith("sparsebwd backward"))


def test_profilers_show_layers_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    sparsebwd.convert(model, 90, where="everywhere", exclude="2.2")
    copied = copy.deepcopy(model)
    images = torch.randn(2, 3, 8, 8)
    for net in (model, copied, pickle.loads(pickle.dumps(model))):
        found = ranges_of(lambda net=net: (net(images) + net(images)).sum().backward())
        assert found == {"sparsebwd backward: 0": 2, "sparsebwd backward: 2.0": 2}
    layer = sparsebwd.SparseConv2d(3, 4, 3)
    assert ranges_of(lambda: layer(images).sum().backward()) == {f"sparsebwd backward: layer {layer.layer_id}": 1}
    assert "layer_name" not in vars(sparsebwd.revert(model)[0])


def test_ranges_cost_nothing_without_a_profiler(monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail("a range was opened"))
    sparsebwd.SparseConv2d(3, 4, 3)(torch.randn(2, 3, 8, 8)).sum().backward()


def test_names_of_layers_that_are_gone_are_forgotten():
    layer = sparsebwd.SparseConv2d(3, 4, 3)
    number = layer.layer_id
    assert ranges._layers[number] is layer
    del layer
    gc.collect()
    assert number not in ranges._layers
