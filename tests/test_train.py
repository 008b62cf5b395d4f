# SPDX-License-Identifier: Apache-2.0
"""The training command on a tiny model: what a run does, logs, bad input."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn
from training import SMALL, assert_same_run, interrupt, refused, saved_state, tiny, train  # noqa: F401

from sparsebwd import convert, data
from sparsebwd.train import TrainConfig, checkpoint, cli, log, measure
from sparsebwd.train.report import Reporter

# what a run does


def test_it_learns(tmp_path):
    train(tmp_path, "--epochs", "8", "--train-subset", "512", "--no-augment", "--percentile", "90")
    rows = list(csv.DictReader(open(tmp_path / log.CSV_FILE)))
    assert float(rows[-1]["train_loss"]) < 0.6 * float(rows[0]["train_loss"])
    assert float(rows[-1]["test_accuracy"]) > 0.5


def test_logs_of_a_comparison(tmp_path, capsys):
    train(tmp_path, "--compare")
    with open(tmp_path / log.CSV_FILE, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames) == log.COLUMNS
    assert [(row["epoch"], row["variant"]) for row in rows] == [
        (epoch, variant) for epoch in ("1", "2") for variant in ("sparse", "dense")
    ]
    for row in rows:
        dense = row["variant"] == "dense"
        assert row["global_step"] == str(6 * int(row["epoch"])) and row["complete"] == "1"
        for column in log.COLUMNS[4:-1]:
            assert math.isfinite(float(row[column])), column
        assert row["density"] == "" if dense else 0 < float(row["density"]) < 1
        assert 0 <= float(row["test_accuracy"]) <= 1
        parts = float(row["forward_ms"]) + float(row["backward_ms"])
        assert 0 < parts and 0 < float(row["conv_backward_ms"])
    record = json.loads((tmp_path / log.JSON_FILE).read_text())
    assert set(record) == {"format", "config", "environment", "data", "parameters", "epochs", "summary"}
    assert record["config"]["model"] == "tiny" and record["config"]["percentile"] == 90.0
    assert record["data"] == {"name": "digits", "train_images": 96, "test_images": 40, "classes": 10, "image_size": 8}
    assert record["parameters"] == 216 + 16 + 1152 + 32 + 170
    assert len(record["epochs"]) == 2
    summary = record["summary"]
    assert set(summary["variants"]) == {"sparse", "dense"} and summary["global_step"] == 12
    assert set(summary["speedup"]) == {"step", "forward", "backward", "conv_backward"}
    sparse, dense = (summary["variants"][name]["step_ms"] for name in ("sparse", "dense"))
    assert summary["speedup"]["step"] == pytest.approx(dense / sparse)
    layers = summary["variants"]["sparse"]["layers"]
    assert set(layers) == {"0", "3"}
    assert all(set(layer) == {"density", "sigma", "tau"} for layer in layers.values())
    assert not list(tmp_path.glob(".*"))
    shown = capsys.readouterr().out
    for text in (
        "tiny in its CIFAR form (0.00 million parameters), percentile 90, and its dense twin",
        "96 training and 40 test",
        "speed-up",
    ):
        assert text in shown


def test_the_twin_does_not_disturb_the_sparse_model(tmp_path):
    train(tmp_path / "alone")
    train(tmp_path / "both", "--compare")
    alone, both = (saved_state(tmp_path / name)["twins"]["sparse"] for name in ("alone", "both"))
    assert all(torch.equal(alone["model"][key], both["model"][key]) for key in alone["model"])


def test_without_pruning_the_twins_agree(tmp_path):
    train(tmp_path, "--compare", "--percentile", "none", "--max-steps", "4")
    for row in saved_state(tmp_path)["twins"]["sparse"], saved_state(tmp_path)["twins"]["dense"]:
        assert row["tally"]["images"] == 64
    sparse, dense = (saved_state(tmp_path)["twins"][name] for name in ("sparse", "dense"))
    for key, tensor in sparse["model"].items():
        torch.testing.assert_close(tensor, dense["model"][key], rtol=1e-3, atol=1e-5)


def test_a_seed_reproduces_a_run(tmp_path):
    for name in ("first", "second"):
        train(tmp_path / name)
    assert_same_run(tmp_path / "first", tmp_path / "second")
    train(tmp_path / "third", "--seed", "1")
    weights = [saved_state(tmp_path / name)["twins"]["sparse"]["model"]["0.weight"] for name in ("first", "third")]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "bfloat16"],
        ["--no-channels-last"],
        ["--placement", "input"],
        ["--sigma-estimator", "as_printed"],
        ["--threshold", "predicted"],
        ["--backend", "dense"],
        ["--threads", "1"],
        ["--no-augment"],
    ],
    ids=lambda options: options[0].lstrip("-"),
)
def test_options(tmp_path, options):
    train(tmp_path, "--max-steps", "3", *options)
    row = saved_state(tmp_path)["history"][0]["variants"]["sparse"]
    assert math.isfinite(row["train_loss"]) and 0 < row["density"] <= 1


def test_imagefolder(tmp_path):
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    options = ["--data", "imagefolder", "--data-dir", str(tmp_path / "images"), "--cache-dir", str(tmp_path / "cache")]
    train(tmp_path / "run", *options, "--batch-size", "8")
    assert json.loads((tmp_path / "run" / log.JSON_FILE).read_text())["data"]["classes"] == 2


def test_demo(tmp_path, capsys):
    # The demo is a set of defaults: what is given beside it counts.
    train(tmp_path, "--demo", "--epochs", "1")
    shown = capsys.readouterr().out
    assert "A training step with pruned gradients was" in shown and "Next:" in shown
    config = json.loads((tmp_path / log.JSON_FILE).read_text())["config"]
    assert config["compare"] and config["schedule"] == "cosine" and config["epochs"] == 1 and config["batch_size"] == 16


def test_demo_names_the_interpreter_as_one_would_type_it(tmp_path, monkeypatch):
    def shown() -> str:
        console = Console(file=io.StringIO())
        Reporter(console).demo({"variants": {"sparse": {}}, "speedup": {}})
        return console.file.getvalue()

    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert "\n  .venv/bin/python -m sparsebwd.train --help\n" in shown()
    monkeypatch.chdir(tmp_path.parent)
    assert f"\n  {shlex.quote(f'{tmp_path.name}/.venv/bin/python')} -m sparsebwd.train --help\n" in shown()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert f"\n  {shlex.quote(f'{tmp_path}/.venv/bin/python')} -m sparsebwd.train --help\n" in shown()


def test_mobilenet_is_warned_of(capsys, tmp_path):
    arguments = ["--model", "mobilenet", "--image-size", "8", "--batch-size", "2", "--train-subset", "4"]
    arguments += ["--test-subset", "2", "--max-steps", "1", "--output", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "warning: the model has depthwise convolutions" in capsys.readouterr().out


def test_learning_rates():
    paper = TrainConfig()
    rates = [paper.learning_rate_at(epoch * 12, 12) for epoch in (0, 99, 100, 200, 299)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])
    assert TrainConfig(model="alexnet").learning_rate_at(0, 12) == 0.05
    assert (paper.momentum, paper.weight_decay, paper.epochs) == (0.9, 5e-4, 300)
    cosine = TrainConfig(schedule="cosine", learning_rate=1.0, epochs=10, warmup_steps=4)
    rates = [cosine.learning_rate_at(step, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.25) and rates[50] == pytest.approx(0.5) and rates[99] < 1e-3
    assert TrainConfig(epochs=10, max_steps=7).total_steps(10) == 7


def test_backward_timer_tells_kinds_apart(monkeypatch):
    clock = iter(range(1000))
    ticking = SimpleNamespace(perf_counter=lambda: float(next(clock)))  # each operation takes a second
    monkeypatch.setattr(measure, "time", ticking)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        convert(nn.Conv2d(4, 4, 3), where="everywhere"),
        nn.MaxPool2d(4),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2))
    calls = []
    timer = measure.BackwardTimer(lambda: calls.append(1))
    loss = model(torch.randn(2, 3, 8, 8)).square().mean()
    with timer:
        loss.backward()
    other = timer.seconds.pop("other")
    assert timer.seconds == {"convolution": 2, "batch_norm": 1, "relu": 1, "pooling": 1, "linear": 2}
    assert other > 0
    assert len(calls) == 2 * (sum(timer.seconds.values()) + other)  # before and after each


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vgg"], "model: got 'vgg', accepted are resnet18, "),
        (["--data", "mnist"], "data: got 'mnist', accepted are digits, cifar10, cifar100, imagefolder"),
        (["--data", "cifar10"], "data_dir: got none"),
        (
            ["--data", "cifar10", "--data-dir", "/nowhere", "--image-size", "32"],
            "data_dir: got '/nowhere', which does not exist",
        ),
        (["--data", "imagefolder", "--data-dir", "/nowhere"], "data_dir: got '/nowhere', which does not exist"),
        (["--percentile", "49"], "percentile: got 49"),
        (["--percentile", "100"], "percentile: got 100"),
        (["--percentile", "nan"], "percentile: got nan"),
        (["--percentile", "much"], "percentile: got 'much'; accepted: numbers in [50, 100), and none"),
        (["--placement", "middle"], "placement: got 'middle'"),
        (["--backend", "abacus"], "backend: got 'abacus'"),
        (["--sigma-estimator", "guess"], "sigma_estimator: got 'guess'"),
        (["--threshold", "guess"], "threshold: got 'guess'; accepted: 'exact', 'predicted'"),
        (["--dtype", "int8"], "dtype: got 'int8', accepted are float32, bfloat16"),
        (["--schedule", "random"], "schedule: got 'random', accepted are step, cosine, one-cycle"),
        (["--device", "tpu"], "device: got 'tpu', accepted are auto, cpu, cuda"),
        (["--epochs", "0"], "epochs: got 0, accepted are numbers from 1"),
        (["--batch-size", "-1"], "batch_size: got -1"),
        (["--batch-size", "97"], "batch_size: got 97, accepted are 1 to 96, the training images"),
        (["--batch-size", "many"], "--batch-size"),
        (["--max-steps", "0"], "max_steps: got 0"),
        (["--lr", "0"], "learning_rate: got 0"),
        (["--lr", "nan"], "learning_rate: got nan"),
        (["--momentum", "1"], "momentum: got 1"),
        (["--weight-decay", "-1"], "weight_decay: got -1"),
        (["--decay-factor", "2"], "decay_factor: got 2"),
        (["--seed", "-1"], "seed: got -1"),
        (["--image-size", "0"], "image_size: got 0"),
        (["--distributed"], "distributed: start the processes with torchrun"),
    ],
    ids=lambda value: "_".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, *SMALL, "--output", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run" / checkpoint.FILE).exists()


def test_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'}" in refused(capsys, *SMALL, "--output", str(tmp_path / "file" / "run"))


@pytest.mark.slow
def test_module_refuses_without_a_traceback():
    command = [sys.executable, "-m", "sparsebwd.train", "--model", "vgg"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "model: got 'vgg'" in result.stderr


def test_divergence_is_reported(tmp_path, capsys):
    assert cli.main([*SMALL, "--output", str(tmp_path), "--lr", "1e30"]) == 1
    assert "the loss of the sparse model became" in capsys.readouterr().err


def test_interrupt_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.Batches, "batch", interrupt)
    assert cli.main([*SMALL, "--output", str(tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err
