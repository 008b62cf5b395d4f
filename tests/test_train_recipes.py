# SPDX-License-Identifier: Apache-2.0
"""Recipes, forms and widths of the training command, the dense model alone, and the log of all steps."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from training import SMALL, refused, saved_state, tiny, train  # noqa: F401

from sparsebwd.train import TrainConfig, checkpoint, cli, log
from sparsebwd.train.recipes import RECIPES


def config_of(folder):
    return json.loads((folder / log.JSON_FILE).read_text())["config"]


def steps_of(folder):
    with open(folder / log.STEPS_FILE, newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == log.STEP_COLUMNS
    return rows


# recipes


def test_recipes_of_the_paper():
    cifar, imagenet = TrainConfig.from_recipe("paper-cifar"), TrainConfig.from_recipe("paper-imagenet")
    assert cifar == TrainConfig(recipe="paper-cifar", form="cifar")
    assert [cifar.learning_rate_at(epoch, 1) for epoch in (99, 100, 299)] == pytest.approx([0.1, 0.01, 0.001])
    assert [imagenet.learning_rate_at(epoch, 1) for epoch in (44, 45, 179)] == pytest.approx([0.1, 0.01, 1e-4])
    assert (imagenet.epochs, imagenet.image_size, imagenet.network_form) == (180, 227, "imagenet")
    assert imagenet.crop == "resized"


def test_the_short_recipe_decays_fully_whatever_its_length():
    for epochs in (2, 15):
        config = TrainConfig.from_recipe("short", epochs=epochs, learning_rate=1.0)
        rates = [config.learning_rate_at(step, 100) for step in range(100 * epochs)]
        assert max(rates) == pytest.approx(1, abs=1e-3) and rates[0] == pytest.approx(1 / 25) and rates[-1] < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 4, 37])
def test_one_cycle_is_that_of_pytorch(steps):
    config = TrainConfig(schedule="one-cycle", learning_rate=0.3, epochs=1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    if steps == 1:  # where PyTorch divides by 0
        assert config.learning_rate_at(0, 1) < 1e-5
        return
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert config.learning_rate_at(step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()


def test_what_is_given_beside_a_recipe_counts(tmp_path):
    train(tmp_path, "--recipe", "short", "--label-smoothing", "0", "--max-steps", "1")
    config = config_of(tmp_path)
    expected = {"recipe": "short", **RECIPES["short"], "label_smoothing": 0, "epochs": 2}
    assert {name: config[name] for name in expected} == expected
    assert TrainConfig.from_recipe("short", epochs=2).epochs == 2
    # The name of a recipe alone makes no other run.
    assert TrainConfig(recipe="paper-cifar", form="cifar").differences({"recipe": None, "form": "cifar"}) == []


def test_a_recipe_beside_the_demo(tmp_path):
    train(tmp_path, "--demo", "--recipe", "short", "--max-steps", "1")
    config = config_of(tmp_path)
    assert (config["schedule"], config["warmup_steps"], config["compare"]) == ("one-cycle", 10, True)


def test_unknown_recipe(capsys):
    assert "recipe: got 'long', accepted are paper-cifar, paper-imagenet, short" in refused(capsys, "--recipe", "long")
    with pytest.raises(ValueError, match="recipe: got 'long'"):
        TrainConfig.from_recipe("long")


def test_label_smoothing_is_in_the_loss_of_training_only(tmp_path):
    for smoothing in ("0", "0.9"):
        train(tmp_path / smoothing, "--label-smoothing", smoothing, "--max-steps", "1", "--dense", "--lr", "1e-9")
    rows = [saved_state(tmp_path / name)["history"][0]["variants"]["dense"] for name in ("0", "0.9")]
    assert abs(rows[0]["train_loss"] - rows[1]["train_loss"]) > 1e-3
    assert rows[0]["test_loss"] == pytest.approx(rows[1]["test_loss"], rel=1e-4)


# forms and widths


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--form", "imagenet", "--width", "8", "--image-size", "64"], "resnet18 in its ImageNet form (0.18 million"),
        (["--form", "cifar", "--width", "8", "--image-size", "113"], "resnet18 in its CIFAR form (0.18 million"),
        (["--width", "8", "--image-size", "113"], "resnet18 in its ImageNet form"),
        (["--width", "8", "--image-size", "32"], "resnet18 in its CIFAR form"),
    ],
)
def test_form_and_width(tmp_path, capsys, arguments, shown):
    run = ["--train-subset", "2", "--test-subset", "2", "--batch-size", "2", "--max-steps", "1"]
    run += ["--output", str(tmp_path)]
    assert cli.main([*run, *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert shown in printed
    large = "imagenet" not in arguments and "113" in arguments and "cifar" in arguments
    assert ("warning: form: the first layers of the CIFAR form have no strides" in printed) == large


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--form", "large"], "form: got 'large', accepted are auto, cifar, imagenet"),
        (["--form", "imagenet"], "form: got 'imagenet' with images of 32 pixels"),
        (["--width", "0"], "width: got 0"),
        (["--label-smoothing", "1"], "label_smoothing: got 1"),
        (["--dense", "--compare"], "dense: got it beside compare"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_another_width_or_form_is_another_run():
    here = TrainConfig(width=8, form="cifar")
    differences = here.differences({"width": None, "form": "auto"})
    assert differences == [
        "form is 'auto' in the checkpoint and 'cifar' here", "width is None in the checkpoint and 8 here"
    ]  # fmt: skip


# the dense model alone


def test_dense_alone_is_the_dense_twin(tmp_path, capsys):
    train(tmp_path / "alone", "--dense")
    assert "parameters), dense, on cpu" in capsys.readouterr().out
    train(tmp_path / "both", "--compare")
    alone, both = (saved_state(tmp_path / name)["twins"] for name in ("alone", "both"))
    assert alone.keys() == {"dense"}
    assert all(torch.equal(tensor, both["dense"]["model"][key]) for key, tensor in alone["dense"]["model"].items())
    rows = list(csv.DictReader(open(tmp_path / "alone" / log.CSV_FILE)))
    assert [row["variant"] for row in rows] == ["dense"] * 2 and all(row["density"] == "" for row in rows)
    train(tmp_path / "alone", "--dense", "--resume")


# the log of all steps


def test_every_step_is_logged(tmp_path):
    train(tmp_path, "--compare")
    rows = steps_of(tmp_path)
    assert [(row["global_step"], row["variant"]) for row in rows] == [
        (str(step), name) for step in range(1, 13) for name in ("sparse", "dense")
    ]
    for row in rows:
        assert math.isfinite(float(row["loss"])) and float(row["learning_rate"]) == 0.1
        assert (row["step_ms"] == "") == (int(row["global_step"]) % 3 == 0)
    # Of as many images each, their mean is that of the epoch.
    mean = sum(float(row["loss"]) for row in rows[12:] if row["variant"] == "sparse") / 6
    assert mean == pytest.approx(saved_state(tmp_path)["history"][1]["variants"]["sparse"]["train_loss"], rel=1e-6)


def test_resumed_steps_are_logged_once(tmp_path, capsys):
    """Rows behind the checkpoint are dropped, as are torn ones and those of nobody; lost ones are said."""

    def without_times(folder):
        return [{**row, "step_ms": None} for row in steps_of(folder)]

    train(tmp_path / "whole")
    train(tmp_path / "parts", "--max-steps", "4")
    with open(tmp_path / "parts" / log.STEPS_FILE, "a") as file:
        file.write("5,sparse,0.1,2.5,1\n4,dense,0.1,2.5,1\n6,sparse,0.")
    train(tmp_path / "parts", "--resume", "--max-steps", "8")
    train(tmp_path / "parts", "--resume")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")
    assert "lacks" not in capsys.readouterr().out
    (tmp_path / "parts" / log.STEPS_FILE).unlink()
    train(tmp_path / "parts", "--resume")
    assert "lacks 12 of the 12 steps before this one" in " ".join(capsys.readouterr().out.split())


def test_the_step_at_which_a_run_diverged_is_logged(tmp_path):
    assert cli.main([*SMALL, "--output", str(tmp_path), "--lr", "1e30"]) == 1
    assert not math.isfinite(float(steps_of(tmp_path)[-1]["loss"]))
    assert (tmp_path / checkpoint.FILE).exists()
