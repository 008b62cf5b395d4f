# SPDX-License-Identifier: Apache-2.0
"""Options of the training command that say how a step is computed: by layer, in parts, compiled, by several processes."""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training import SMALL, TINY, assert_same_run, refused, saved_state, tiny, train, train_by_two  # noqa: F401

import sparsebwd
from sparsebwd import NoiseController, models
from sparsebwd.data.records import load_record, save_record
from sparsebwd.train import TrainConfig, checkpoint, cli, twins
from sparsebwd.train.world import World

# Smooth: where rounding takes a value across the bend of a ReLU, weights differ by far more than rounding.
PLAIN = """
def plain(num_classes, form="cifar"):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

def normed(num_classes, form="cifar"):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )

models._BUILDERS["plain"] = plain
models._BUILDERS["normed"] = normed
"""


@pytest.fixture
def plain(tiny):  # noqa: F811
    exec(PLAIN, {"nn": nn, "models": models})


def build(**options):
    return twins.build_twins(TrainConfig(model="tiny", **options), 10, World(torch.device("cpu")), pytest.fail)[0].model


def difference(first, second):
    """The largest of all parameters and statistics, as a share of the largest value of each tensor."""
    models = [saved_state(folder)["twins"]["sparse"]["model"] for folder in (first, second)]
    return max(
        ((values - models[1][name]).abs().max() / values.abs().max()).item() for name, values in models[0].items()
    )


# by layer


def test_excluded_layers_stay_dense():
    model = build(exclude="0")
    assert [type(model[index]) for index in (0, 3)] == [nn.Conv2d, sparsebwd.SparseConv2d]


def test_percentiles_by_layer():
    model = build(layer_percentile="*=95, 3=none")
    assert [model[index].percentile for index in (0, 3)] == [95, None]


def test_density_or_variance_instead_of_a_percentile(tmp_path):
    model = build(density=0.15, threshold="sampled", layer_percentile="3=95")
    assert model[0].pruning.asked == "density 0.15" and model[0].threshold == "sampled"
    assert model[3].pruning.asked == "percentile 95"
    assert build(variance=0.1)[3].pruning.asked == "variance 0.1"
    train(tmp_path / "a", "--density", "0.15", "--max-steps", "1")
    train(tmp_path / "a", "--density", "0.15", "--max-steps", "2", "--resume")
    with pytest.raises(ValueError, match="got both percentile and density"):
        build(percentile=90, density=0.15)


def test_noise_and_its_controller_resume_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Whole, and stopped between two measurements and at one."""
    monkeypatch.setattr("sparsebwd.train.trainer.NoiseController", functools.partial(NoiseController, start=2, every=3))
    noise = ["--noise", "0.2", "--compare", "--backend", "reference"]  # whose time is in proportion to the density
    train(tmp_path / "whole", *noise)
    said = capsys.readouterr().out
    assert "% of SGD's (budget 20 %), density 0." in said
    for stop in (3, 4, 7):
        train(tmp_path / "parts", *noise, "--max-steps", str(stop), "--overwrite")
        train(tmp_path / "parts", *noise, "--resume")
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
        states = [saved_state(tmp_path / name)["twins"]["sparse"]["noise"] for name in ("whole", "parts")]
        assert states[0] == states[1] and any(states[0]["ratios"].values())
    assert "noise" not in saved_state(tmp_path / "whole")["twins"]["dense"]


def test_damaged_states_of_a_controller_are_refused(tmp_path, capsys):
    train(tmp_path, "--noise", "0.2", "--max-steps", "2")
    path = tmp_path / checkpoint.FILE
    record = load_record(path)
    state = record["state"]["twins"]["sparse"]["noise"]
    for name, value, message in (
        ("ratios", {"0": 1.0}, "sparse.noise: ratios: got {'0': 1.0}; accepted: values for 0, 3"),
        ("step", "1", "sparse.noise: step: got '1'; accepted: an int"),
        ("step", None, "sparse.noise: step: got None; accepted: an int"),
        ("rests", 2**60, "sparse.noise: rests: got 1152921504606846976; accepted: at most"),
        ("ratios", {"0": -1.0, "3": 0.0}, "sparse.noise: ratios.0: got -1.0"),
        ("ratios", {"0": math.nan, "3": 0.0}, "sparse.noise: ratios.0: got nan"),
        ("off", {"0": 3}, "sparse.noise: off.0: got 3; accepted: settings, as text"),
        ("off", {"0": "percentile=nan"}, "sparse.noise: percentile: got nan"),
        ("guard", {}, "sparse.noise: guard: got {}; accepted: values for"),
    ):
        record["state"]["twins"]["sparse"]["noise"] = state | {name: value}
        save_record(path, record)
        assert message in refused(capsys, *SMALL, "--noise", "0.2", "--output", str(tmp_path), "--resume")


def test_groups_from_the_command_line(tmp_path):
    assert build(granularity="row:32")[3].granularity == ("row", 32)
    train(tmp_path / "a", "--granularity", "sample", "--noise", "0.5", "--importance", "image", "--max-steps", "1")
    with pytest.raises(ValueError, match="importance: got 'pixel'; accepted"):
        build(importance="pixel")
    with pytest.raises(ValueError, match="granularity: got 'pixel'"):
        build(granularity="pixel")
    with pytest.raises(ValueError, match="noise: got 0.1 with 3 images a step in 2 parts; accepted: with two images"):
        build(noise=0.1, batch_size=3, accumulate=2)


def test_layers_from_the_command_line(tmp_path):
    train(tmp_path / "a", "--exclude", "0", "--layer-percentile", "3=95", "--max-steps", "3", "--measure-every", "1")
    layers = saved_state(tmp_path / "a")["history"][0]["variants"]["sparse"]["layers"]
    assert list(layers) == ["3"]
    train(tmp_path / "a", "--exclude", "0", "--layer-percentile", "3=95", "--max-steps", "4", "--resume")
    train(tmp_path / "b", "--exclude", "0,3", "--max-steps", "3")  # nothing is left to monitor
    assert saved_state(tmp_path / "b")["history"][0]["variants"]["sparse"]["density"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exclude", "10"], "exclude: got '10'; accepted: names of modules"),
        (
            ["--layer-percentile", "9=95"],
            "layer_percentile: got '9', accepted are names of sparse layers of the model, or",
        ),
        (["--layer-percentile", "3"], "layer_percentile: got '3', accepted are a layer and its percentile"),
        (
            ["--layer-percentile", "3=20"],
            "layer_percentile: got '3=20', accepted are a layer and its percentile, in [50, 100)",
        ),
        (["--layer-percentile", "3=x,0=95"], "layer_percentile: got '3=x'"),
        (["--layer-percentile", "=95"], "layer_percentile: got '=95'"),
        (
            ["--exclude", "3", "--layer-percentile", "3=95"],
            "accepted are names of sparse layers of the model, or patterns",
        ),
        (["--accumulate", "0"], "accumulate: got 0"),
        (["--accumulate", "17"], "accumulate: got 17, accepted are 1 to 16, the images of a step"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(capsys, tmp_path, arguments, message):
    assert message in refused(capsys, *SMALL, "--output", str(tmp_path), *arguments)


def test_warnings_of_conversion_are_shown(tmp_path, capsys):
    train(tmp_path, "--placement", "input", "--max-steps", "1")
    assert 'warning: placement="input": the output gradients of 2 convolutions' in capsys.readouterr().out


# in parts


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path, plain, parts):
    """To rounding: 16 images in parts of 8, or of 4, 4, 4, 4 and none."""
    common = ["--model", "plain", "--percentile", "none", "--backend", "cpu", "--measure-every", "2"]
    train(tmp_path / "whole", *common)
    train(tmp_path / "parts", *common, "--accumulate", str(parts))
    assert difference(tmp_path / "whole", tmp_path / "parts") < 1e-5
    rows = [saved_state(tmp_path / name)["history"][1]["variants"]["sparse"] for name in ("whole", "parts")]
    for name in ("train_loss", "train_accuracy", "test_loss", "density"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3), name


# compiled


def test_compiled_models_train(tmp_path, monkeypatch):
    """Without the compiler of a backend: the graphs run as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        train(tmp_path / "compiled", "--compile", "--max-steps", "3")
    train(tmp_path / "eager", "--max-steps", "3")
    assert graphs and difference(tmp_path / "eager", tmp_path / "compiled") < 1e-6


def test_a_compiler_that_fails_ends_the_run_in_one_line(tmp_path, capsys, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    assert cli.main([*SMALL, "--output", str(tmp_path), "--compile"]) == 1
    assert "No working C++ compiler found; train without --compile" in capsys.readouterr().err


# by several processes


UNPRUNED = ["--percentile", "none", "--backend", "cpu"]
COMPARED = {"whole": ["--distributed"], "parts": ["--max-steps", "8"], "parts again": ["--resume"]}
ALONE = {
    "plain": ["--model", "plain"],
    "accumulated": ["--model", "plain", "--accumulate", "2"],
    "normed": ["--model", "normed", "--sync-bn"],
}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A folder with the runs of two processes, and what these printed: all under one torchrun, which takes long to start."""
    folder = tmp_path_factory.mktemp("two")
    runs = [["--compare", *options, "--output", str(folder / name.split()[0])] for name, options in COMPARED.items()]
    runs += [[*UNPRUNED, *options, "--output", str(folder / name)] for name, options in ALONE.items()]
    return folder, train_by_two(folder, runs, TINY + PLAIN)


@pytest.mark.slow
def test_two_processes(by_two):
    """Under torchrun: process 0 writes and prints, and a resumed run is the same."""
    folder, output = by_two
    assert output.count("processes: 2") == len(COMPARED) + len(ALONE)
    assert saved_state(folder / "whole")["history"][0]["variants"]["sparse"]["train_loss"] > 0
    assert_same_run(folder / "whole", folder / "parts")


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path, plain, capsys, by_two):
    """To rounding: without BatchNorm, and with it where its statistics are shared."""
    for name, options in ALONE.items():
        train(tmp_path / name, "--device", "cpu", *UNPRUNED, *options)
        assert difference(tmp_path / name, by_two[0] / name) < 1e-5, name
    assert "sync_bn: one process alone has nobody" in capsys.readouterr().out


_NUMBERS = {"text": "3", "bool": True, "NaN": float("nan"), "list": [3], "array": np.array([3]), "huge": 10**400, "bytes": b"3"}
_WRONG_TYPES = {
    "int": {**_NUMBERS, "a half": 2.5, "whole, but a float": 3.0, "beyond 64 bits": 2**64},
    "float": {**_NUMBERS, "complex": 1j},
    "bool": {"text": "yes", "number": 2, "float": 1.0, "list": [True]},
    "str": {"number": 3, "bytes": b"x", "list": ["x"], "path": Path("x")},
}


@pytest.mark.parametrize("option", fields(TrainConfig), ids=lambda option: option.name)
def test_types_of_options_are_checked(option):
    """As a library takes them; the command line converts them itself."""
    kind, _, optional = option.type.partition(" | ")
    wrong = dict(_WRONG_TYPES[kind])
    if option.name.endswith("_dir"):
        assert getattr(TrainConfig(**{option.name: wrong.pop("path")}), option.name) == "x"
    if not optional:
        wrong["None"] = None
    for what, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"{option.name}: got .*accepted") as caught:
            TrainConfig(**{option.name: value})
            pytest.fail(f"{option.name}={what} is accepted")
        assert len(str(caught.value)) < 400


def test_options_are_plain_values():
    """Checkpoints and logs hold no others."""
    config = TrainConfig(epochs=np.int64(3), momentum=np.float32(0.5), augment=np.bool_(False), learning_rate=1, seed=2**64 - 1)
    assert (config.epochs, config.momentum, config.augment, config.learning_rate) == (3, 0.5, False, 1.0)
    for name in ("epochs", "momentum", "augment", "learning_rate", "seed"):
        assert type(getattr(config, name)) in (int, float, bool)


def test_networks_whose_gradients_pytorch_corrupts_are_refused():
    """Two to seven channels into a 1x1 convolution with a stride, in channels_last: see backends/dense.py."""

    def made(width, **options):
        config = TrainConfig(model="resnet18", width=width, **options)
        return twins.build_twins(config, 10, World(torch.device("cpu")), lambda text: None)

    for options in ({"dense": True}, {"compare": True}, {"percentile": None, "noise": 0.1}):
        with pytest.raises(ValueError, match=r"width: got 4, .* 'stages.1.0.shortcut.0' .*; accepted: 8 and more, or --no-channels-last"):
            made(4, **options)
        assert made(8, **options) and made(4, channels_last=False, **options)
    assert made(4)
