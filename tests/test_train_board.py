# SPDX-License-Identifier: Apache-2.0
"""The training command writes for TensorBoard."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from training import SMALL, assert_same_run, refused, tiny, train  # noqa: F401

import sparsebwd
from sparsebwd.train import board, checkpoint


def events_of(folder, variant):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / board.FOLDER / variant), size_guidance={"histograms": 0}).Reload()


def test_a_run_and_what_resumes_it(tmp_path):
    run = ["--tensorboard", "--compare"]
    train(tmp_path / "a", *run, "--max-steps", "8")
    train(tmp_path / "a", *run, "--resume")
    sparse, dense = (events_of(tmp_path / "a", name) for name in ("sparse", "dense"))
    for events in (sparse, dense):
        assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
        assert events.Scalars("learning_rate")[0].value == pytest.approx(0.1)
        assert [event.step for event in events.Scalars("step_ms")] == [step for step in range(1, 13) if step % 3]
        assert [event.step for event in events.Scalars("test_accuracy")] == [6, 8, 12]
    assert [event.step for event in sparse.Scalars("tau/3")] == [3, 6, 9, 12]
    assert 0 < sparse.Scalars("density/total")[0].value < 1
    assert not dense.Tags()["histograms"]
    assert set(sparse.Tags()["histograms"]) == {"gradient_in_tau/0", "gradient_in_tau/3"}
    histograms = sparse.Histograms("gradient_in_tau/3")
    assert [event.step for event in histograms] == [3, 9]
    # Bins are a tenth of tau wide, and both thresholds are edges. Pruning keeps what is beyond, and within a share of |g| / tau.
    value = histograms[0].histogram_value
    edges, counts = (torch.tensor(list(values)) for values in (value.bucket_limit, value.bucket))
    assert all((edges - edge).abs().min() < 1e-6 for edge in (-1, 1))
    density = (counts * (edges - 0.05).abs().clamp(max=1)).sum() / counts.sum()
    assert sparse.Scalars("density/3")[0].value == pytest.approx(density.item(), abs=0.03)
    train(tmp_path / "without", "--compare")
    assert_same_run(tmp_path / "a", tmp_path / "without")


def test_gradients_before_rectifiers_that_work_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    sparsebwd.convert(model, where="everywhere")
    expected = {}
    gradients = board.Gradients(model)
    with gradients.watched():
        hidden = model[0](torch.randn(2, 4, 8, 8))
        hidden.register_hook(lambda gradient: expected.update({"0": gradient}))
        output = model[2](model[1](hidden))
        output.retain_grad()
        model[3](output).square().mul(torch.rand(2, 16, 4, 4)).sum().backward()
    assert gradients.samples["2"].equal(output.grad.flatten())
    assert gradients.samples["0"].equal(expected["0"].flatten()) and (expected["0"] == 0).any()
    gradients.samples.clear()
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    assert not gradients.samples


def test_unpruned_gradients_keep_their_unit(tmp_path):
    train(tmp_path, "--tensorboard", "--percentile", "none", "--max-steps", "3")
    assert set(events_of(tmp_path, "sparse").Tags()["histograms"]) == {"gradient/0", "gradient/3"}


def test_without_tensorboard(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused(capsys, *SMALL, "--output", str(tmp_path), "--tensorboard")
    assert "tensorboard: it needs" in message and "pip install tensorboard" in message
    assert not (tmp_path / checkpoint.FILE).exists()
    train(tmp_path, "--max-steps", "1")
