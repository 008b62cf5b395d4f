# SPDX-License-Identifier: Apache-2.0
"""Percentiles that rise from 50 while a model trains."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from training import assert_same_run, refused, saved_state, tiny, train  # noqa: F401

import sparsebwd
from sparsebwd import PercentileSchedule


@pytest.fixture
def model():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    sparsebwd.convert(model, 90, where="everywhere")
    model[3].percentile = 70
    model[5].density = 0.3
    return model


def percentiles(model):
    return [model[i].percentile for i in (0, 3, 5)]


def test_from_50_to_that_of_each_layer(model):
    schedule = PercentileSchedule(model, warmup=4, shape="linear", start=2)
    seen = [percentiles(model)]
    for _ in range(8):
        schedule.step()
        seen.append(percentiles(model))
    rising = [[50, 50, None], [60, 55, None], [70, 60, None], [80, 65, None], [90, 70, None]]
    assert seen == [rising[0]] * 2 + rising + [rising[-1]] * 2


def test_half_a_cosine_and_few_changes(model):
    schedule = PercentileSchedule(model, warmup=100)
    found = []
    for step in range(101):
        schedule.step(step)
        found.append(model[0].percentile)
    assert found == sorted(found) and (found[0], found[50], found[100]) == (50, 70, 90)
    assert found[25] == round(50 + 40 * (1 - 2**-0.5) / 2, 2)
    schedule = PercentileSchedule(model, warmup=100, changes=3, shape="linear")
    found = [schedule.step(step) or model[0].percentile for step in range(120)]
    assert list(dict.fromkeys(found)) == [50, 63.33, 76.67, 90]


def test_no_warmup_changes_nothing(model):
    PercentileSchedule(model, warmup=0)
    assert percentiles(model) == [90, 70, None]
    schedule = PercentileSchedule(model, warmup=0, start=1)
    assert percentiles(model) == [50, 50, None]
    schedule.step()
    assert percentiles(model) == [90, 70, None]


def test_layers_that_have_arrived_are_left_alone(model):
    schedule = PercentileSchedule(model, warmup=1)
    schedule.step()
    model[0].percentile = 60
    schedule.step()
    assert model[0].percentile == 60


def test_50_prunes_nothing(model):
    """A step at the start is bit for bit that of layers that do not prune."""
    images = torch.randn(2, 3, 9, 9)
    gradients = []
    model[5].percentile = None
    plain = copy.deepcopy(model)
    PercentileSchedule(model, warmup=5)
    for net in (model, plain):
        if net is plain:
            net[0].percentile = net[3].percentile = None
        torch.manual_seed(3)
        net(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients))


@pytest.mark.parametrize("at", [0, 3, 7, 12])
def test_resumed_equals_uninterrupted(model, at):
    untouched = copy.deepcopy(model)
    schedule = PercentileSchedule(model, warmup=10, start=1, shape="linear", changes=7)
    for _ in range(at):
        schedule.step()
    state = json.loads(json.dumps(schedule.state_dict()))
    untouched[0].percentile = 85  # whatever it was converted with
    resumed = PercentileSchedule(untouched, warmup=99)
    resumed.load_state_dict(state)
    for _ in range(12):
        assert percentiles(untouched) == percentiles(model)
        schedule.step(), resumed.step()
    assert resumed.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: 5, "state_dict: got 5; accepted: what state_dict"),
        (lambda state: {**state, "more": 1}, "state_dict: got "),
        (lambda state: {**state, "targets": {"0": 90}}, "its layers are"),
        (lambda state: {**state, "targets": {"0": 90, "3": 20}}, "percentile: got 20"),
        (lambda state: {**state, "targets": {"0": 90, "3": None}}, "percentile: got None"),
        (lambda state: {**state, "steps": -1}, "steps: got -1"),
        (lambda state: {**state, "shape": "steep"}, "shape: got 'steep'"),
        (lambda state: {**state, "changes": 0}, "changes: got 0"),
    ],
)
def test_states_of_something_else_change_nothing(model, change, message):
    schedule = PercentileSchedule(model, warmup=10)
    schedule.step(4)
    before = schedule.state_dict(), percentiles(model)
    with pytest.raises((TypeError, ValueError), match=message):
        schedule.load_state_dict(change(schedule.state_dict()))
    assert (schedule.state_dict(), percentiles(model)) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 4), TypeError, "model: got int; accepted: an nn.Module"),
        ((nn.Conv2d(3, 3, 1), 4), ValueError, "no layer has a percentile above 50"),
        ((None, -1), ValueError, "warmup: got -1"),
        ((None, 1.5), TypeError, "warmup: got 1.5"),
    ],
)
def test_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        PercentileSchedule(model if arguments[0] is None else arguments[0], arguments[1])
    with pytest.raises(ValueError, match="shape: got 'steep'; accepted: 'cosine', 'linear'"):
        PercentileSchedule(model, 3, shape="steep")
    with pytest.raises(ValueError, match="changes: got 0"):
        PercentileSchedule(model, 3, changes=0)


@pytest.mark.slow
def test_compiled_models_compile_again_with_each_change(model):
    """And only then."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    schedule = PercentileSchedule(compiled, warmup=9, changes=3)
    images = torch.randn(2, 3, 9, 9)
    with sparsebwd.DensityMonitor(model) as monitor:
        compiled(images).sum().backward()
        before = monitor.as_dict()["layers"]["0"]["density"]
        for _ in range(14):
            schedule.step()
            monitor.reset()
            compiled(images).square().sum().backward()
    assert len(graphs) == 4
    assert monitor.as_dict()["layers"]["0"]["density"] < before  # the setting reaches compiled code


# ---- in training


def test_training_warms_up_and_resumes_to_the_bit(tmp_path):
    options = ["--percentile", "95", "--percentile-warmup", "1", "--where", "everywhere", "--layer-percentile", "3=80"]
    train(tmp_path / "whole", *options)
    train(tmp_path / "parts", *options, "--max-steps", "4")
    train(tmp_path / "parts", *options, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first, second = (saved_state(tmp_path / "whole")["history"][i]["variants"]["sparse"]["density"] for i in (0, 1))
    assert second < first


def test_training_refuses_a_warmup_of_nothing(tmp_path, capsys):
    common = ["--model", "tiny", "--output", str(tmp_path)]
    assert "percentile_warmup: got -1" in refused(capsys, *common, "--percentile-warmup", "-1")
    message = refused(capsys, *common, "--percentile-warmup", "3", "--density", "0.2")
    assert "percentile_warmup: got 3 with density 0.2; accepted: with a percentile" in message
