# SPDX-License-Identifier: Apache-2.0
"""``bench zoo``, its networks, and keeping memory. No test asserts how long anything takes."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import torch
import typer
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import sparsebwd
from sparsebwd import SparseConv2d, conversion_report
from sparsebwd.bench import zoo, zoo_models
from sparsebwd.bench.environment import command_line
from sparsebwd.bench.zoo_models import Model

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)  # as that of the benchmark
app.command()(zoo.command)

# parameters with 10 classes, convolutions, depthwise ones
NETWORKS = {
    "resnet18": (11_173_962, 20, 0),
    "resnet50": (23_528_522, 53, 0),
    "vgg16_bn": (14_724_042, 13, 0),
    "alexnet": (14_859_082, 5, 0),
    "mobilenet_v1": (3_217_226, 27, 13),
    "mobilenet_v2": (2_236_682, 52, 17),
    "mobilenet_v3_large": (2_980_402, 62, 15),
    "efficientnet_b0": (4_020_358, 81, 16),
    "densenet121": (6_964_106, 120, 0),
    "convnext_tiny": (27_826_282, 22, 18),
    "regnet_x_400mf": (5_098_986, 71, 0),
    "unet": (7_763_338, 19, 0),
}


class Tiny(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )


class TinyPixels(nn.Sequential):
    """Logits of each pixel."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, num_classes, 1))


TINY = (Model("tiny", 12, 4, Tiny), Model("pixels", 8, 2, TinyPixels))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny networks, measured in this process; the number of threads is left as it is."""
    monkeypatch.setattr(zoo_models, "_OWN", TINY)
    monkeypatch.setattr(zoo, "in_process_of_its_own", lambda function, job: function(job))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: object):
    small = ["--steps", 1, "--repeats", 2, "--threads", 1]
    result = CliRunner().invoke(app, [*map(str, small), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words_of(result) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(8):
                image = Image.new("RGB", (32, 32), (40 * number % 256, 100 * label, 50))
                image.save(tmp_path / "images" / split / name / f"{number}.png")
    return tmp_path / "images"


def test_contract(tmp_path):
    files = tmp_path / "zoo.json", tmp_path / "zoo.md"
    result = bench("--json", files[0], "--markdown", files[1])
    assert result.exit_code == 0, result.output
    record = json.loads(files[0].read_text())
    assert set(record) == {"environment", "setting", "rows"}
    assert record["environment"]["allocator"] == "as is"
    assert [(row["layout"], row["model"]) for row in record["rows"]] == [
        (layout, model) for layout in ("channels_last", "contiguous") for model in ("tiny", "pixels")
    ]
    for row in record["rows"]:
        for side in ("dense", "sparse"):
            assert set(row[side]) == {"total_ms", "forward_ms", "backward_ms", "optimizer_ms", "iqr_ms"}
            assert all(row[side][f"{phase}_ms"] > 0 for phase in ("total", "forward", "backward"))
            assert row["page_faults"][side] is None or row["page_faults"][side] >= 0
        assert row["speedup"]["total"] == pytest.approx(row["dense"]["total_ms"] / row["sparse"]["total_ms"])
        assert "layers" not in row
    markdown = files[1].read_text()
    assert f"`{record['setting']['command']}`" in markdown
    for layout in ("channels_last", "contiguous"):
        for text in (result.output, markdown):
            assert f"{layout}, float32, percentile 90, threads 1, after 1 steps on digits" in text
    assert "| tiny | 4x12 |" in markdown and "| pixels | 2x8 |" in markdown
    assert max(map(len, result.output.splitlines())) <= 100


def test_counts_and_density_follow_from_the_model():
    row = zoo.measure(zoo.Job("tiny", "contiguous", setting()))
    network = sparsebwd.convert(Tiny(10))
    converted = {layer.name for layer in conversion_report(network).layers if layer.converted}
    pruned = {name for name in converted if network.get_submodule(name).percentile is not None}
    assert row["convolutions"] == {
        "pruned": len(pruned - {"3"}),
        "dense": 2 - len(pruned - {"3"}),
        "depthwise": 1,
        "depthwise_pruned": int("3" in pruned),
    }
    assert row["density"] is None if not converted else 0 < row["density"] <= 1


def setting(**changes) -> dict[str, object]:
    return {
        "source": "own", "percentile": 90.0, "dtype": "float32", "steps": 1, "repeats": 2, "learning_rate": 0.02,
        "data_dir": None, "cache_dir": None, "threads": 1, "seed": 0, "keep_memory": False, "layers": False, "cpu_time": False,
    } | changes  # fmt: skip


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--layouts", "contiguous", "--quick"]])
def test_images_of_a_folder(options, folder, tmp_path):
    path = tmp_path / "zoo.json"
    result = bench(*options, "--data-dir", folder, "--cache-dir", tmp_path / "cache", "--json", path, "--models", "tiny")
    assert result.exit_code == 0, result.output
    steps = 3 if "--quick" in options else 1
    assert f"after {steps} steps on an image folder" in result.output
    record = json.loads(path.read_text())
    assert record["setting"]["steps"] == steps and record["setting"]["data_dir"] == str(folder)


def test_a_command_repeats_its_row(tmp_path):
    path = tmp_path / "zoo.json"
    bench("--models", "pixels", "--layouts", "contiguous", "--layers", "--json", path)
    record = json.loads(path.read_text())
    words = record["rows"][0]["command"].split()
    assert words[:4] == ["python", "-m", "sparsebwd.bench", "zoo"] and words == record["setting"]["command"].split()
    context = typer.main.get_command(app).make_context("zoo", words[4:])
    wanted = {"models": "pixels", "layouts": "contiguous", "layers": True, "keep_memory": False, "repeats": 2}
    assert wanted.items() <= context.params.items()


def test_layers_are_timed():
    row = zoo.measure(zoo.Job("tiny", "channels_last", setting(layers=True)))
    assert [layer["layer"] for layer in row["layers"]] == ["0", "3", "6"]
    assert row["kinds_ms"]["dense"]["convolution"] > 0 and row["kinds_ms"]["sparse"]["convolution"] > 0
    titles = [table.title for table in zoo.tables(setting(), [row])]
    assert titles[1] == "Backward convolutions of tiny, channels_last"


def test_processor_time(monkeypatch):
    """What passes while another process has the processor does not count."""
    shown = iter(range(10**6))
    monkeypatch.setattr(zoo.time, "process_time", lambda: float(next(shown)))
    row = zoo.measure(zoo.Job("tiny", "contiguous", setting(cpu_time=True)))
    assert {row[side][f"{phase}_ms"] for side in ("dense", "sparse") for phase in ("forward", "backward")} == {1e3}
    assert "processor time" in str(list(zoo.tables(setting(cpu_time=True), [row])))
    result = bench("--cpu-time", "--layers")
    assert result.exit_code == 2 and "cpu-time: accepted with --threads 1 and without --layers" in words_of(result)


def test_sides_have_the_same_trained_weights(monkeypatch):
    seen = {}

    def take_turns(both, parts, batches, seed):
        seen.update(both)
        taken(both, parts, batches, seed)

    taken = zoo.sides.take_turns
    monkeypatch.setattr(zoo.sides, "take_turns", take_turns)
    zoo.measure(zoo.Job("tiny", "channels_last", setting()))
    dense, sparse = (dict(seen[name].model.named_parameters()) for name in ("dense", "sparse"))
    torch.manual_seed(0)
    before = dict(Tiny(10).named_parameters())
    for name, parameter in sparse.items():
        assert torch.equal(parameter, dense[name]) and not torch.equal(parameter, before[name])
    assert not any(isinstance(module, SparseConv2d) for module in seen["dense"].model.modules())


@pytest.mark.parametrize("layout, model", [("channels_last", TINY[0]), ("contiguous", TINY[1])])
def test_batches(layout, model):
    images = zoo._images(setting())
    inputs, labels = next(zoo._batches(images, model, zoo.Job(model.name, layout, setting())))
    assert inputs.shape == (model.batch, 3, model.image_size, model.image_size) and labels.shape == (model.batch,)
    assert inputs.is_contiguous(memory_format=zoo.LAYOUTS[layout])


def test_each_pixel_has_the_class_of_its_image():
    labels = torch.tensor([1, 0])
    logits = torch.zeros(2, 2, 3, 3)
    logits[0, 1] = logits[1, 0] = 50.0
    loss = zoo._loss(torch.float32)
    assert loss(lambda inputs: logits, (None, labels)) < 1e-6 < 1 < loss(lambda inputs: logits, (None, 1 - labels))


def test_a_network_that_diverges_is_left_out(tmp_path):
    path = tmp_path / "zoo.json"
    options = ["--models", "tiny", "--learning-rate", 1e30, "--steps", 3]
    result = bench(*options, "--json", path)
    assert result.exit_code == 1 and "tiny, contiguous: not measured: the loss became nan in step" in words_of(result)
    assert json.loads(path.read_text())["rows"] == []


def test_interrupted(tmp_path, monkeypatch):
    def interrupted(function, job):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "in_process_of_its_own", interrupted)
    result = bench("--json", tmp_path / "zoo.json")
    assert result.exit_code == 130 and "interrupted: no file is written" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "tiny,vgg19"], "models: got 'vgg19'; accepted: tiny, pixels"),
        (["--source", "hub"], "source: got 'hub'; accepted: own, torchvision, timm"),
        (["--layouts", "nchw"], "layouts: got 'nchw'; accepted: channels_last, contiguous"),
        (["--dtype", "float16"], "dtype: got 'float16'; accepted: float32, bfloat16"),
        (["--percentile", "49"], "percentile: got 49.0; accepted: 50 <= percentile < 100"),
        (["--data-dir", "/nowhere"], "data_dir: got '/nowhere', which does not exist"),
        (["--json", "/dev/null/file"], "json: got '/dev/null/file'; /dev/null is not a folder to write to"),
    ],
)
def test_refused(arguments, words):
    result = bench(*arguments)
    assert result.exit_code == 2 and words in words_of(result)


# ---- processes


@pytest.mark.slow
def test_a_job_has_a_process_of_its_own(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="of tiny in process") as caught:
        zoo.in_process_of_its_own(_fails, zoo.Job("tiny", "contiguous", setting()))
    assert not str(caught.value).endswith(f" {os.getpid()}")


def _fails(job: zoo.Job) -> None:
    raise RuntimeError(f"of {job.model} in process {os.getpid()}")


# ---- networks


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, monkeypatch):
    monkeypatch.undo()
    assert zoo_models.names("own") == tuple(NETWORKS)
    model = zoo_models.get(name, "own")
    with torch.device("meta"):
        network = model.build(num_classes=10)
        logits = network(torch.empty(2, 3, model.image_size, model.image_size))
    pixels = (model.image_size, model.image_size) if name == "unet" else ()
    assert logits.shape == (2, 10, *pixels)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    depthwise = [module for module in convolutions if module.groups == module.in_channels > 1]
    assert (sum(p.numel() for p in network.parameters()), len(convolutions), len(depthwise)) == NETWORKS[name]


@pytest.mark.parametrize(
    "source, module, maker, names",
    [
        ("torchvision", "torchvision.models", "get_model", {"resnet18": "resnet18", "mobilenet_v2": "mobilenet_v2"}),
        ("timm", "timm", "create_model", {"mobilenet_v1": "mobilenetv1_100", "regnet_x_400mf": "regnetx_004"}),
    ],
)
def test_networks_of_libraries(source, module, maker, names, monkeypatch):
    monkeypatch.undo()
    library = types.ModuleType(module)
    setattr(library, maker, lambda name, num_classes, **options: (name, num_classes, options))
    monkeypatch.setitem(sys.modules, module.partition(".")[0], types.ModuleType(module.partition(".")[0]))
    monkeypatch.setitem(sys.modules, module, library)
    for ours, theirs in names.items():
        name, classes, options = zoo_models.get(ours, source).build(num_classes=7)
        assert (name, classes) == (theirs, 7) and not any(options.values())
    assert zoo_models.get("resnet18", source).image_size == 128
    with pytest.raises(ValueError, match="models: got 'unet'; accepted: resnet18, resnet50"):
        zoo_models.get("unet", source)


@pytest.mark.parametrize("source, module", [("torchvision", "torchvision.models"), ("timm", "timm")])
def test_libraries_need_not_be_installed(source, module, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, module, None)
    result = bench("--source", source, "--models", "resnet18")
    assert result.exit_code == 2 and f"source: {source} is not installed" in words_of(result)


def test_flags_of_a_command():
    assert command_line({"one": True, "two": False, "three": None, "four": 4}).endswith(" --one --four 4")
