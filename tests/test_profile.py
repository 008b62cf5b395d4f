# SPDX-License-Identifier: Apache-2.0
"""profile(): what it finds, and that nothing of the caller's changes. No test asserts how long anything takes."""

from __future__ import annotations

import copy
import json
import random
import sys

import numpy
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsebwd
from sparsebwd.bench.convolutions import following
from sparsebwd.problem import ConvProblem
from sparsebwd.profiling import Alternative, LayerProfile, kept
from sparsebwd_command import app


class Net(nn.Module):
    """Convolutions of every kind that the report tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 32, 3, padding=1, padding_mode="reflect")
        self.odd = nn.Conv2d(32, 32, (2, 4), padding="same", dilation=1)
        self.unused = nn.Conv2d(32, 32, 1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(32, 5)

    def forward(self, images, scale=None):
        found = torch.relu(self.norm(self.first(images)))
        found = torch.relu(self.odd(input=torch.relu(self.wide(found))))
        found = found if scale is None else found * scale
        random.random(), numpy.random.rand()  # models that draw by themselves
        return self.head(self.dropout(found.mean((2, 3))))


@pytest.fixture(autouse=True)
def as_if_nothing_kept_memory(monkeypatch):
    """Whatever other tests did in this process."""
    monkeypatch.setattr(sparsebwd.memory, "_kept", False)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8)


def quickly(*arguments, **options):
    return sparsebwd.profile(*arguments, **{"steps": 2, "alternatives": False, **options})


def state_of(model, optimizer):
    flat = {name: value.clone() for name, value in model.state_dict().items()}
    flat |= {f"grad {name}": value.grad for name, value in model.named_parameters()}
    flat |= {f"{i} {name}": value for i, state in optimizer.state_dict()["state"].items() for name, value in state.items()}
    return copy.deepcopy(flat)


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name


def test_nothing_of_the_callers_changes(net, images):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    nn.functional.cross_entropy(net(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    before = state_of(net, optimizer), [type(module) for module in net.modules()], images.clone()
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    hooks = [len(module._forward_hooks) for module in net.modules()]
    with torch.no_grad():
        found = quickly(net, (images, torch.tensor([3, 4])), optimizer=optimizer)
        assert not torch.is_grad_enabled()
    assert_same(before[0], state_of(net, optimizer))
    assert before[1] == [type(module) for module in net.modules()] and torch.equal(before[2], images)
    assert hooks == [len(module._forward_hooks) for module in net.modules()]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(generators[0], torch.get_rng_state()) and generators[1] == random.getstate()
    assert (generators[2] == numpy.random.get_state()[1]).all()
    assert found.dense["total"] > 0 and found.sparse["total"] > 0


def test_layers_in_order_with_their_geometry(net, images):
    layers = quickly(net, images).layers
    assert [layer.name for layer in layers] == ["first", "wide", "odd"]
    problems = [ConvProblem.parse(layer.problem) for layer in layers]
    assert [(p.c, p.k, p.p, p.q) for p in problems] == [(3, 16, 8, 8), (16, 32, 8, 8), (32, 32, 8, 8)]
    assert problems[1].input_size == (2, 16, 10, 10) and problems[1].padding == (0, 0)  # reflected before
    for layer in layers:
        assert layer.dense_ms > 0 and layer.sparse_ms > 0 and layer.speedup == layer.dense_ms / layer.sparse_ms


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2)), (2, 4, 9, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), groups=2), (2, 4, 9, 7)),
        (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"), (4, 9, 7)),
        (nn.Conv2d(4, 6, 4, padding="valid"), (2, 4, 9, 7)),
    ],
    ids=str,
)
def test_geometries_give_the_size_of_the_output(conv, size):
    found = []
    with following(conv, lambda convolution, output: found.append((convolution.problem, output))):
        conv(input=torch.randn(size))
    ((problem, output),) = found
    assert problem.output_size[-3:] == output.shape[-3:]


def test_what_each_layer_does_and_why():
    """Percentile, size and break-even decide; a layer of a backend that is named runs on that."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 4, 1))
    for name, settings in (("0", {"backend": "cpu"}), ("2", {"backend": "dense"})):
        sparsebwd.convert(model, 99, where="everywhere", exclude=[n for n in "024" if n != name], **settings)
    first, second, last = quickly(model, torch.randn(2, 8, 8, 8)).layers
    assert (first.decision, first.reason, first.implementation) == ("sparse", "", "cpu") and 0 < first.density < 0.5
    assert (second.decision, second.implementation) == ("dense", "dense") and second.reason == "the backend 'dense' was asked for"
    assert 0 < second.density < 1
    assert (last.decision, last.density, last.implementation) == ("dense", None, "nn.Conv2d")
    assert last.reason.startswith("it would not be faster: ")


def test_small_layers_say_that_they_are_small(net, images):
    for layer in quickly(net, images).layers:
        assert layer.decision == "dense" and layer.density is None and layer.reason


def test_too_dense_gradients_say_the_break_even(monkeypatch):
    from sparsebwd.backends import break_even, cpu

    monkeypatch.setattr(cpu, "break_even", lambda *_: break_even.BreakEven(1e-6, 1e-6))
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4))
    sparsebwd.convert(model, 60, where="everywhere")
    layer = quickly(model, torch.randn(4, 8, 9, 9)).layers[0]
    assert (layer.decision, layer.implementation) == ("dense", "dense") and layer.density > 0.3
    assert "its gradient is too dense: sparse is faster up to densities of" in layer.reason


def test_a_converted_model_is_profiled_as_it_is(net, images):
    sparsebwd.convert(net, density=0.2, where="everywhere", backend="cpu", exclude="wide")
    found = quickly(net, images)
    assert [layer.decision for layer in found.layers] == ["sparse", "dense", "sparse"]
    assert found.setting["pruning"] == "density 0.2"
    with pytest.raises(ValueError, match="percentile: got 95 for a model that is converted already"):
        quickly(net, images, percentile=95)


def test_inputs_loss_and_mode(net, images):
    calls = []

    def loss(output, target):
        calls.append((output.shape, target, output.requires_grad))
        return (output * target).sum()

    target = torch.randn(2, 5)
    for inputs in ((images, torch.tensor(2.0)), {"images": images, "scale": torch.tensor(2.0)}, images):
        quickly(net, (inputs, target), loss=loss)
    assert {shape for shape, _, _ in calls} == {(2, 5)} and all(torch.equal(given, target) for _, given, _ in calls)
    net.eval()
    net.norm.register_forward_hook(lambda module, *_: calls.append(module.training))
    quickly(net, images)
    assert calls[-1] is True and not net.norm.training
    net.dropout.train()  # statistics frozen
    quickly(net, images)
    assert calls[-1] is False


def test_default_loss_of_pixels_and_without_target():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    images = torch.randn(2, 3, 6, 6)
    for batch in (images, (images, torch.tensor([1, 3])), (images, torch.randint(4, (2, 4, 4))), (images, torch.rand(2, 4, 4, 4))):
        assert len(quickly(model, batch).layers) == 2


def test_frozen_layers_and_autocast(net, images):
    net.first.requires_grad_(False)
    net.norm.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = quickly(net, images)
    assert found.setting["autocast"] == "bfloat16" and [layer.name for layer in found.layers] == ["wide", "odd"]


def test_layout_is_that_of_the_weights(net, images):
    net.to(memory_format=torch.channels_last)
    assert quickly(net, images).setting["layout"] == "channels_last"
    assert quickly(Net(), images).setting["layout"] == "contiguous"


class _Told:
    """In place of a process."""

    def __init__(self, path, keep):
        self.contents, self.keep = torch.load(path, weights_only=False), keep

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self, _):
        model, optimizer, batch, loss, *_ = self.contents
        loss(model(batch[0]), batch[1]).backward()


def test_alternatives(net, images, monkeypatch):
    monkeypatch.setattr(kept, "_Child", _Told)
    found = sparsebwd.profile(net, images, steps=2)
    last, memory = found.alternatives
    assert (last.name, memory.name) == ("channels_last", "sparsebwd.keep_memory()")
    for alternative in found.alternatives:
        assert alternative.speedup == alternative.against_ms / alternative.dense_ms
    assert last.against_ms == found.dense["total"] and last.sparse_ms > 0 and memory.sparse_ms is None
    monkeypatch.setattr(sparsebwd.memory, "_kept", True)
    (memory,) = sparsebwd.profile(net.to(memory_format=torch.channels_last), images, steps=2).alternatives
    assert memory.speedup is None and "this process has called it already" in memory.note


@pytest.mark.slow
def test_kept_memory_is_measured_in_processes_of_their_own(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = sparsebwd.memory.kept()
    found = kept.measure_kept(model, optimizer, (images, torch.tensor([0, 1])), nn.functional.cross_entropy, 2)
    assert found.note == "" and found.against_ms > 0 and found.dense_ms > 0 and sparsebwd.memory.kept() == before
    local = kept.measure_kept(model, optimizer, (images, None), lambda output, target: output.sum(), 2)
    assert local.speedup is None and "is not to be had in another process" in local.note
    wrong = kept.measure_kept(model, optimizer, (images, torch.tensor([0, 7])), nn.functional.cross_entropy, 2)
    assert wrong.speedup is None and "Target 7 is out of bounds" in wrong.note


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, 4), {}, TypeError, "model: got 3; accepted: an nn.Module"),
        ((nn.ReLU(), torch.ones(1)), {}, ValueError, "model: has no parameters"),
        ((Net(), 5), {}, TypeError, "batch: got 'int'; accepted: inputs or"),
        ((Net(), (torch.ones(1), 2, 3)), {}, TypeError, "batch: got 'tuple' of 3; accepted: inputs or"),
        ((Net(), torch.ones(2, 3, 8, 8)), {"steps": 1}, ValueError, "steps: got 1; accepted: at least 2"),
        ((Net(), torch.ones(2, 3, 8, 8)), {"percentile": 12}, ValueError, "percentile: got 12"),
        ((Net(), torch.ones(2, 3, 8, 8)), {"loss": 12}, TypeError, "loss: got 12; accepted: a function"),
        ((Net(), torch.ones(2, 3, 8, 8)), {"loss": lambda o, t: o}, TypeError, "loss: it returned .* accepted: a scalar"),
        ((Net(), torch.ones(2, 3, 8, 8)), {"optimizer": 0.1}, TypeError, "optimizer: got 0.1"),
        ((nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(0)), torch.ones(2, 3, 8, 8)), {}, TypeError,
         "loss: got none, and the model's output is of shape"),
        ((torch.compile(Net()), torch.ones(2, 3, 8, 8)), {}, TypeError, "accepted: the model within, model._orig_mod"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(arguments, options, error, message):
    with pytest.raises(error, match=message):
        quickly(*arguments, **options)


# ---- what is shown


LAYERS = (
    LayerProfile("stages.0.0.conv1", "n32c64h32w32k64r3s3u1p1d1g1", 0.2, 10.0, 4.0, "sparse", "", "cpu"),
    LayerProfile("a.very.long.name.of.a.layer.that.is.deep.down", "n32c256h112w112k512r11s11u2p1d1g32", 0.45, 100.5, 90.25, "partly", "x", "cpu+dense"),
    LayerProfile("", "n32c64h32w32k64r1s1u1p1d1g1", None, 1.0, 1.5, "dense", "too small for anything, " * 6, "nn.Conv2d"),
)  # fmt: skip
SETTING = {"device": "cpu", "layout": "contiguous", "threads": 2, "steps": 7, "autocast": None, "pruning": "percentile 90"}


def made(spread=0.02, layers=LAYERS, alternatives=()):
    dense = {"total": 120.0, "forward": 40.0, "backward": 70.0, "optimizer": 10.0, "convolutions": 60.0}
    sparse = {"total": 80.0, "forward": 40.0, "backward": 30.0, "optimizer": 10.0, "convolutions": 0.0}
    return sparsebwd.Profile(dense, sparse, spread, layers, alternatives, SETTING)


def test_text_fits_80_columns_and_says_all():
    others = (
        Alternative("channels_last", 120.0, 60.0, 40.0),
        Alternative("sparsebwd.keep_memory()", None, None, None, "why"),
    )
    text = str(made(0.3, alternatives=others))
    assert max(map(len, text.splitlines())) <= 80
    text = " ".join(text.split())
    for words in (
        "A training step: 120.0 ms dense, 80.0 ms converted, 1.50x",
        "0.0.conv1 64>64 32x32 3x3",
        "deep.down",
        "256>512 112x112 11x11/2 g32",
        "2.50x sparse",
        "partly: x",
        "channels_last: dense 120.0 to 60.0 ms, 2.00x; converted 40.0 ms, 3.00x of dense",
        "sparsebwd.keep_memory(): not measured: why",
        "fastest: channels_last, converted, 3.00x",
        "times varied by 30% of their median",
    ):
        assert words in text, words
    assert "fastest" not in str(made()) and "varied" not in str(made())


def test_reasons_of_many_layers_are_said_once():
    layers = tuple(LayerProfile(f"l{i}", LAYERS[0].problem, None, 1.0, 1.0, "dense", "it is small", "nn.Conv2d") for i in range(9))
    assert str(made(layers=layers)).count("it is small (l0, l1, l2 and 6 more)") == 1


def test_dictionary_is_json():
    found = json.loads(json.dumps(made(alternatives=(Alternative("channels_last", 4.0, 2.0, None),)).as_dict()))
    assert found["speedup"] == 1.5 and found["layers"][0]["speedup"] == 2.5 and found["alternatives"][0]["speedup"] == 2.0
    assert found["setting"] == SETTING


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture(tmp_path, suffix):
    path = made().plot(tmp_path / f"layers{suffix}")
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in path.read_bytes()[:600]
    assert len(path.read_bytes()) > 5000


def test_pictures_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="accepted: a name that ends in .png or .svg"):
        made().plot(tmp_path / "layers.pdf")
    with pytest.raises(ValueError, match="nothing to draw"):
        made(layers=()).plot(tmp_path / "layers.png")
    with pytest.raises(OSError):
        made().plot("/dev/null/layers.png")


# ---- the command


def run(*arguments):
    return CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "80"})


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))\n"
        "def both():\n    model = build()\n    images = torch.randn(2, 3, 6, 6)\n    model(images)\n    return model, (images, torch.tensor([0, 2]))\n"
        "def wrong():\n    return 3\n"
        "def fails():\n    return 1 / 0\n"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("mine", None)


def test_command(mine, tmp_path):
    result = run("mine:both", "--steps", "2", "--no-alternatives", "--json", "out.json", "--plot", "out.png")
    assert result.exit_code == 0, result.output
    assert "A training step: " in result.output and "3>4 6x6 3x3" in result.output
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["model"] == "mine:both" and len(record["layers"]) == 1
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_command_with_a_network_of_the_package():
    result = run("mobilenet", "--batch-size", "2", "--image-size", "8", "--channels-last", "--steps", "2", "--no-alternatives")
    assert result.exit_code == 0, result.output
    assert "channels_last, on cpu" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vgg"], "model: got 'vgg'; accepted: resnet18"),
        (["mine:no"], "model: mine:no cannot be called: AttributeError"),
        (["nowhere:build"], "model: nowhere:build cannot be called: ModuleNotFoundError: No module named 'nowhere'"),
        (["mine:wrong"], "model: mine:wrong returned int; accepted: an nn.Module"),
        (["mine:fails"], "cannot be called: ZeroDivisionError: division by zero"),
        (["mine:both", "--batch-size", "4"], "batch_size, image_size: mine:both has a batch of its own"),
        (["resnet18", "--percentile", "20"], "percentile: got 20.0"),
        (["resnet18", "--plot", "a.pdf"], "plot: got 'a.pdf'; accepted: .png or .svg"),
        (["resnet18", "--json", "/dev/null/a.json"], "json: got '/dev/null/a.json'"),
        (["resnet18", "--device", "tpu"], "device: got 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_refuses(mine, arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
