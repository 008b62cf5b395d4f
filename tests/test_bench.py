# SPDX-License-Identifier: Apache-2.0
"""The microbenchmark, apart from time: no test asserts how long anything takes."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from strategies import backends_on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sparsebwd import backends, models, reference
from sparsebwd.backends import DenseBackend, available_backends, choose_backend
from sparsebwd.bench import cli, compare, devices, environment, gradients, operations, suites, timing
from sparsebwd.bench import inputs as inputs_module
from sparsebwd.bench.gradients import Captured, GradientFile
from sparsebwd.bench.inputs import KEY, LAYOUTS, Gradient, Inputs, Rotation, skewed_densities
from sparsebwd.bench.results import Row
from sparsebwd.bench.timing import Call, interleave
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = "n2c4h6w5k8r3s3u1p1d1g1"
KERNELS = "cpu" in available_backends()
CONTRACT = {
    "suite", "layer", "problem", "multiplicity", "op", "density", "pattern", "dtype", "layout", "backend", "threads",
    "sparse_ms", "dense_ms", "speedup", "rel_error", "bytes", "flops",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_bench")


def bench(*arguments: object):
    result = CliRunner().invoke(cli.app, ["--repeats", "3", "--threads", "1", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows_of(path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


# ---- suites


@pytest.mark.slow
@pytest.mark.parametrize("form", models.IMAGE_SIZE)
@pytest.mark.parametrize("name", models.names())
def test_suites_are_the_convolutions_of_the_models(name, form):
    layers = suites.load(f"{name}-{form}", batch=2)
    with torch.device("meta"):
        model = models.create(name, num_classes=10, form=form)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(layer.multiplicity for layer in layers) == len(convolutions)
    assert len({(layer.problem, layer.needs_grad_input) for layer in layers}) == len(layers)
    assert [layer.needs_grad_input for layer in layers].count(False) == 1 and not layers[0].needs_grad_input
    assert {layer.problem.n for layer in layers} == {2}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 3, models.IMAGE_SIZE[form], models.IMAGE_SIZE[form], device="meta"))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert sum(2 * layer.problem.macs * layer.multiplicity for layer in layers) == counted


def test_resnet18_by_hand():
    layers = suites.load("resnet18-cifar", batch=32)
    assert [(layer.name, str(layer.problem), layer.multiplicity) for layer in layers[:4]] == [
        ("stem.0", "n32c3h32w32k64r3s3u1p1d1g1", 1),
        ("stages.0.0.conv1", "n32c64h32w32k64r3s3u1p1d1g1", 4),
        ("stages.1.0.conv1", "n32c64h32w32k128r3s3u2p1d1g1", 1),
        ("stages.1.0.conv2", "n32c128h16w16k128r3s3u1p1d1g1", 3),
    ]
    assert len(layers) == 11


def test_imagenet_by_hand():
    def first(suite: str) -> list[str]:
        return [str(layer.problem) for layer in suites.load(suite, batch=32)[:2]]

    assert first("resnet50-imagenet") == ["n32c3h224w224k64r7s7u2p3d1g1", "n32c64h56w56k64r1s1u1p0d1g1"]
    assert first("alexnet-imagenet") == ["n32c3h224w224k64r11s11u4p2d1g1", "n32c64h27w27k192r5s5u1p2d1g1"]
    assert first("mobilenet-imagenet") == ["n32c3h224w224k32r3s3u2p1d1g1", "n32c32h112w112k32r3s3u1p1d1g32"]


def test_layers_are_selected_by_name(tmp_path):
    path = tmp_path / "rows.json"
    result = bench("--suite", "alexnet-cifar,resnet18-cifar", "--batch", "1", "--layer", "features.3,stem.0", "--op", "wgc",
                   "--density", "0.1", "--backend", "dense", "--memory", "1", "--json", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [(row["suite"], row["layer"]) for row in rows_of(path)] == [
        ("alexnet-cifar", "features.3"),
        ("resnet18-cifar", "stem.0"),
    ]
    assert "2 rows" in result.output


def test_kernel_size_selects_layers():
    whole = suites.load("resnet50-cifar", batch=4)
    some = suites.load("resnet50-cifar-1x1", batch=4)
    assert [layer.problem for layer in some] == [layer.problem for layer in whole if layer.problem.r == 1]
    assert {layer.suite for layer in some} == {"resnet50-cifar-1x1"}
    assert all(layer.needs_grad_input for layer in some)


def test_mobilenet_has_depthwise_layers():
    groups = {layer.problem.groups for layer in suites.load("mobilenet-cifar", batch=1)}
    assert groups == {1, 32, 64, 128, 256, 512, 1024}


# ---- tensors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_rotate_over_enough_copies(layout):
    problem = ConvProblem.parse(PROBLEM)
    inputs = Inputs(problem, torch.float32, Gradient("iid", 0.5), Rotation(10_000))
    following = inputs.rotating(layout, ("grad_output", "weight"))
    drawn = [following() for _ in range(9)]
    gradient_bytes = 2 * 8 * 6 * 5 * 4
    assert len({operands.grad_output.data_ptr() for operands in drawn}) == -(-10_000 // gradient_bytes)
    assert len({operands.weight.data_ptr() for operands in drawn}) == -(-10_000 // (8 * 4 * 9 * 4))
    assert len({operands.input.data_ptr() for operands in drawn}) == 1
    assert drawn[0].grad_output.data_ptr() == drawn[6].grad_output.data_ptr()
    assert not drawn[0].grad_output.equal(drawn[1].grad_output)
    for operands in drawn:
        for tensor, size in zip(operands, (problem.output_size, problem.input_size, problem.weight_size)):
            assert tuple(tensor.shape) == size
            assert tensor.is_contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format")))


def test_layouts_hold_the_same_numbers():
    inputs = Inputs(ConvProblem.parse(PROBLEM), torch.bfloat16, Gradient("heavy-tailed"), Rotation(1))
    for one, other in zip(inputs.first("contiguous"), inputs.first("channels_last")):
        assert one.equal(other) and one.dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["iid", "skewed"])
def test_density_of_inputs(pattern):
    problem = ConvProblem.parse("n16c1h32w32k16r1s1")
    for density in (0.0, 0.1, 1.0):
        inputs = Inputs(problem, torch.float32, Gradient(pattern, density), Rotation(2**21))
        gradient = inputs.first("contiguous").grad_output
        # 262144 draws: five standard deviations are 0.003
        assert gradient.count_nonzero().item() / gradient.numel() == pytest.approx(density, abs=0.003)
        following = inputs.rotating("contiguous", ("grad_output",))
        counted = sum(following().grad_output.count_nonzero().item() for _ in range(2)) / (2 * gradient.numel())
        assert inputs.density("channels_last") == pytest.approx(counted)


def test_heavy_tailed_gradients_prune_as_those_of_training():
    problem = ConvProblem.parse("n16c1h32w32k16r1s1")
    layer = suites.Layer(None, "", problem)
    case = operations.Case(layer, torch.float32, "contiguous", "dense", "heavy-tailed", percentile=90)
    operation = operations.Prune()
    inputs = Inputs(problem, torch.float32, case.gradient(operation), Rotation(1))
    assert inputs.first("contiguous").grad_output.count_nonzero() == 16 * 32 * 32 * 16
    assert operation.density(case, inputs) == pytest.approx(0.31, abs=0.01)


def test_skewed_densities_differ_between_images_and_channels(generator):
    for density in (0.01, 0.1, 0.35, 0.9):
        densities = skewed_densities(3, 32, 64, density, generator)
        assert torch.allclose(densities.mean((1, 2)), torch.tensor(density))
        assert 0 < densities.min() < density / 2 and density < densities.max() < 1
        log_odds = densities.double().logit()
        images, channels = log_odds.mean(2), log_odds.mean(1)
        # Standard deviation 1 of 96 and of 192 draws; rows and columns add up without interaction.
        assert 0.7 < (images - images.mean(1, keepdim=True)).std() < 1.3
        assert 0.8 < (channels - channels.mean(1, keepdim=True)).std() < 1.2
        rest = log_odds - images[:, :, None] - channels[:, None] + log_odds.mean((1, 2), keepdim=True)
        assert rest.abs().max() < 1e-3


def test_captured_gradients_rotate_with_their_images_in_another_order(generator):
    problem = ConvProblem.parse("n3c2h4w4k2r3s3u1p1d1g1")
    captured = torch.randn(problem.output_size, generator=generator)
    inputs = Inputs(problem, torch.float32, Gradient("captured", captured=captured), Rotation(5 * captured.nbytes))
    following = inputs.rotating("channels_last", ("grad_output",))
    copies = [following().grad_output for _ in range(5)]
    assert copies[0].equal(captured) and copies[3].equal(captured)
    for copy in copies[1:3]:
        assert not copy.equal(captured)
        assert copy[copy[:, 0, 0, 0].argsort()].equal(captured[captured[:, 0, 0, 0].argsort()])
    pruned = Inputs(problem, torch.float32, Gradient("captured", captured=captured, percentile=90.0), Rotation(1))
    expected = reference.prune(captured, KEY, Pruning()).values
    assert pruned.first("contiguous").grad_output.equal(expected)


def test_copies_of_one_side_are_far_from_those_of_the_other():
    inputs = Inputs(ConvProblem.parse(PROBLEM), torch.float32, Gradient("iid", 0.5), Rotation(10_000))
    one, other = (inputs.rotating("contiguous", ("grad_output",), from_middle) for from_middle in (False, True))
    pointers = [(one().grad_output.data_ptr(), other().grad_output.data_ptr()) for _ in range(6)]
    assert len({pointer for pair in pointers for pointer in pair}) == 6
    assert [second for _, second in pointers] == [first for first, _ in pointers[3:] + pointers[:3]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pruned_in_parts(monkeypatch, generator, layout):
    gradient = torch.randn(5, 3, 4, 5, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    tau = torch.tensor(1.5)
    whole = reference.prune_at(gradient, KEY, tau)
    monkeypatch.setattr(inputs_module, "_BLOCK", 2 * 3 * 4 * 5)
    parts = inputs_module.pruned_at(gradient, tau)
    assert_bit_equal(parts, whole)
    assert parts.stride() == whole.stride()


def test_interleaving():
    order = []

    def call(name: str) -> Call:
        arguments = iter(range(100))
        return Call(lambda argument: order.append(name + str(argument)), lambda: next(arguments))

    times = interleave({"a": call("a"), "b": call("b")}, repeats=2, warmup=1)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert all(seconds > 0 and spread >= 0 for seconds, spread in times.values())


class FakeEvent:
    """On the device of :func:`fake_cuda`."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def record(self) -> None:
        self.time = self._clock[0]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.time - self.time)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A clock in seconds, which stands for what has run on a device that spins 10^9 cycles a second, and the spins."""
    clock, spins = [0.0], []

    def sleep(cycles: int) -> None:
        spins.append(cycles)
        clock[0] += cycles / 1e9

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timing._spin_rate.cache_clear()
    yield clock, spins
    timing._spin_rate.cache_clear()


def test_samples_of_a_gpu(fake_cuda):
    """Short calls come in bursts; what one takes is the time between events, without that of the spinning before."""
    clock, spins = fake_cuda
    made = []

    def call(seconds: float) -> Call:
        def function(argument: int) -> None:
            made.append(argument)
            clock[0] += seconds

        numbers = iter(range(1000))
        return Call(function, lambda: next(numbers))

    for seconds, burst in ((3e-3, 1), (45e-6, 5), (1e-6, 16)):
        sample, timed = timing.sample_on_cuda(), call(seconds)
        assert sample(timed) == pytest.approx(seconds)
        made.clear()
        spins.clear()
        assert [sample(timed) for _ in range(3)] == pytest.approx([seconds] * 3)
        assert made == list(range(made[0], made[0] + 3 * burst))  # each call gets the next argument
        assert len(spins) == 3 and min(spins) > 0


class CudaOnCpu(devices.Cuda):
    """A GPU whose tensors and whose time are those of the CPU."""

    type = "cpu"
    cache_bytes = 2**17

    def sampler(self, backend=None):
        return timing.sample_on_cpu

    def describe(self):
        return {"gpu": {"name": "some GPU", "driver": "1.2", "cudnn": 9}}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "cuda", CudaOnCpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_description_of_a_gpu(monkeypatch):
    found = SimpleNamespace(name="some GPU", major=9, minor=0, total_memory=2**36, multi_processor_count=132, uuid="ab-cd",
                            shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: found}.__getitem__)
    asked = []

    def answer(text: str):
        def run(command, **_):
            asked.append(command)
            return SimpleNamespace(stdout=text)

        monkeypatch.setattr(devices.subprocess, "run", run)
        return devices.Cuda().describe()["gpu"]

    gpu = answer("580.1, 1980, 1980, 2619, 41, 300.5, 700\n")
    assert (gpu["capability"], gpu["shared_bytes"], gpu["l2_bytes"]) == ("9.0", 132 * 233472, 50 * 2**20)
    assert (gpu["driver"], gpu["sm_mhz"], gpu["watts"]) == ("580.1", "1980", "300.5")
    assert asked[0][0] == "nvidia-smi" and "--id=GPU-ab-cd" in asked[0]
    assert not {word for word in asked[0] if re.match(r"-(r|pm|pl|ac|lgc|c|mig)\b|--(gpu-reset|lock)", word)}
    assert devices.Cuda().cache_bytes == 50 * 2**20
    json.dumps(gpu)
    # Without an answer the rest is there.
    for text in ("", "N/A\n"):
        gpu = answer(text)
        assert gpu["name"] == "some GPU" and "driver" not in gpu


# ---- whole runs


def test_maths_of_a_gpu(tmp_path, gpu):
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "markdown")}
    seen = []

    class Watched(DenseBackend):
        name = "watched"

        def gradients(self, *arguments):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            assert torch.backends.cudnn.benchmark
            return super().gradients(*arguments)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    backends.register(Watched())
    try:
        result = CliRunner().invoke(cli.app, [
            "--device", "cuda", "--problem", PROBLEM, "--op", "wgc", "--density", "0.5", "--dtype", "float32,bfloat16",
            "--math", "strict,tf32", "--backend", "watched", "--repeats", "3",
            *(str(part) for kind, path in files.items() for part in (f"--{kind}", path)),
        ])  # fmt: skip
    finally:
        del backends.base._backends["watched"]
        choose_backend.cache_clear()
    assert result.exit_code == 0, result.output
    assert list(dict.fromkeys(seen)) == [(False, False), (True, True)]
    assert before == (
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark,
    )  # fmt: skip
    record = json.loads(files["json"].read_text())
    assert [(row["dtype"], row["math"], row["threads"]) for row in record["rows"]] == [
        ("float32", "strict", None), ("float32", "tf32", None), ("bfloat16", None, None),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["rel_error"] > 0 and row["dense_rel_error"] > 0
        assert shlex.split(row["command"]).count("--math") == (row["math"] is not None) and "--threads" not in row["command"]
    peaks = record["environment"]["peak_gflops"]
    assert (peaks["float32"].keys(), peaks["bfloat16"].keys()) == ({"strict", "tf32"}, {"default"})
    assert record["environment"]["copy_gbs"].keys() == {"strict", "tf32", "default"}
    assert len(record["summary"]) == 3
    assert "some GPU; driver 1.2, cuDNN 9; torch" in files["markdown"].read_text()
    assert "wgc at density 0.5 [iid, float32, tf32, channels_last, watched, cpu]" in result.output
    (entry, _, _) = compare.compare(record, record["environment"], [Row(**row) for row in record["rows"]], 0.05).rows
    assert entry.what[3:] == ("float32 strict", "channels_last", "watched", "cpu")


def test_rows_that_the_minutes_do_not_allow(tmp_path):
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--op", "agb,wgc", "--density", "0.5", "--backend", "dense", "--minutes", "0", "--json",
                   path)  # fmt: skip
    assert result.exit_code == 0
    assert [row["op"] for row in rows_of(path)] == ["agb"]
    assert "1 of 2 rows were not measured" in result.output


@pytest.mark.parametrize("backend", [name for name in backends_on("cpu") if name != "reference"])
def test_predicted_thresholds(tmp_path, backend):
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--op", "prune-predicted,backward-predicted", "--backend", backend, "--json", path)
    assert result.exit_code == 0, result.output
    prune, backward = rows_of(path)
    assert prune["baseline"] == "copy" and prune["rel_error"] == 0 and prune["bytes"] == 4 * 2 * 2 * 8 * 6 * 5
    assert backward["percentile"] == 90 and 0 < backward["rel_error"] < 1e-5


@pytest.mark.parametrize("backend", [name for name in backends_on("cpu") if name != "reference"])
def test_files(tmp_path, backend):
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "csv", "markdown")}
    result = bench(
        "--problem", PROBLEM, "--op", "prune,agb,wgc,agb+wgc,backward", "--density", "0.5,0.1", "--backend", backend,
        *(part for kind, path in files.items() for part in (f"--{kind}", path)),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(files["json"].read_text())
    rows = record["rows"]
    assert [(row["op"], row["backend"]) for row in rows] == [
        *[("agb", backend), ("wgc", backend), ("agb+wgc", backend)] * 2,
        ("prune", backend),
        ("prune", "torch"),
        ("backward", backend),
    ]
    for row in rows:
        assert CONTRACT <= row.keys()
        assert row["problem"] == PROBLEM and row["error"] is None
        assert row["sparse_ms"] > 0 and row["dense_ms"] > 0
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert row["baseline"] == "copy" if row["op"] == "prune" else row["baseline"] in ("channels_last", "contiguous")
        assert row["pattern"] == ("iid" if row["percentile"] is None else "heavy-tailed")
        assert 0 < row["density"] < 1
        if row["flops"]:
            peak = record["environment"]["peak_gflops"]["float32"]["1"]
            assert row["of_peak"] == pytest.approx(row["flops"] / row["sparse_ms"] / 1e6 / peak)
    assert all(row["rel_error"] < 1e-5 for row in rows if row["backend"] != "torch")
    assert {"torch", "sparsebwd", "cpu", "load", "last_level_cache", "variables"} <= record["environment"].keys()
    assert record["environment"]["copy_gbs"]["1"] > 0
    assert [entry["op"] for entry in record["summary"]] == [
        *["agb", "wgc", "agb+wgc"] * 2, "prune", "prune", "backward",
    ]  # fmt: skip

    with open(files["csv"], newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["command"] for row in table] == [row["command"] for row in rows]
    assert [float(row["speedup"]) for row in table] == [row["speedup"] for row in rows]
    table, _, break_even = files["markdown"].read_text().partition("## Break-even density")
    assert sum(line.startswith(f"| {PROBLEM} |") for line in table.splitlines()) == len(rows)
    assert sum(line.startswith(f"| {PROBLEM} |") for line in break_even.splitlines()) == 1
    assert [entry["op"] for entry in record["break_even"]] == ["agb", "wgc", "agb+wgc"]
    assert list(tmp_path.iterdir()) and {path.name for path in tmp_path.iterdir()} == {p.name for p in files.values()}
    assert "costs" in result.output and "copies" in result.output


@pytest.mark.skipif(not KERNELS, reason="the sparse kernels do not run here")
def test_prune_and_list(tmp_path):
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--op", "prune+lists", "--dtype", "float32,bfloat16", "--layout",
                   "contiguous,channels_last", "--backend", "dense", "--json", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = rows_of(path)
    assert [(row["dtype"], row["layout"]) for row in rows] == [
        (dtype, layout) for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")
    ]
    assert {(row["op"], row["backend"], row["baseline"]) for row in rows} == {("prune+lists", "cpu", "copy")}


def test_against_dense_in_the_same_layout(tmp_path):
    path = tmp_path / "rows.json"
    arguments = ["--problem", PROBLEM, "--op", "agb", "--density", "0.5", "--layout", "contiguous,channels_last"]
    assert bench(*arguments, "--against", "same", "--json", path).exit_code == 0
    rows = rows_of(path)
    assert [row["baseline"] for row in rows] == ["contiguous", "channels_last"]
    assert all("--against same" in row["command"] for row in rows)


def test_useful_work(tmp_path):
    path = tmp_path / "rows.json"
    assert bench("--problem", "n1c2h3w3k4r1s1", "--op", "agb,wgc,backward,prune", "--density", "0.5", "--backend",
                 "dense", "--json", path).exit_code == 0  # fmt: skip
    agb, wgc, backward, prune, _ = rows_of(path)
    macs, gradient, input, weight = 9 * 8, 36, 18, 8
    assert agb["flops"] == wgc["flops"] == round(2 * macs * agb["density"])
    assert (agb["nominal_density"], agb["density"]) == (0.5, pytest.approx(0.5, abs=0.1))
    assert agb["bytes"] == wgc["bytes"] == 4 * (gradient + input + weight)
    assert backward["flops"] == 2 * round(2 * macs * backward["density"])
    assert backward["bytes"] == 4 * (gradient + 2 * (input + weight))
    assert (prune["flops"], prune["bytes"]) == (0, 4 * 3 * gradient)


def test_first_layer_has_no_agb():
    layer = suites.load("alexnet-cifar", batch=1)[0]
    (agb,), (wgc,), (backward,) = map(operations.named, ("agb", "wgc", "backward"))
    assert not agb.applies(layer) and wgc.applies(layer) and backward.applies(layer)
    assert backward.outputs(layer) == (False, True)


GEOMETRIES = {"first": "n2c3h6w6k4r3s3u1p1d1g1", "depthwise": "n2c4h6w6k4r3s3u2p1d1g4"}


@pytest.fixture
def captured_file(tmp_path, generator):
    """Writes gradients of two layers at `steps`, with zeros if the placement is "input"."""

    def write(placement: str = "output", steps: tuple[int, ...] = (7,)):
        found = []
        for step in steps:
            for name, text in GEOMETRIES.items():
                problem = ConvProblem.parse(text)
                gradient = torch.randn(problem.output_size, generator=generator)
                if placement == "input":
                    gradient.relu_()
                found.append(Captured(name, problem, step, name != "first", gradient))
        path = tmp_path / f"{placement}.pt"
        gradients.save(path, GradientFile("resnet18", "digits", 90.0, placement, tuple(found)))
        return path

    return write


@pytest.mark.parametrize("backend", [name for name in backends_on("cpu") if name != "reference"])
def test_captured_gradients(tmp_path, captured_file, backend):
    path, file = tmp_path / "rows.json", captured_file(steps=(0, 50))
    result = bench("--gradients", file, "--op", "agb,wgc,backward", "--percentile", "50,90", "--backend", backend, "--json",
                   path)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = rows_of(path)
    assert list(dict.fromkeys(row["layer"] for row in rows)) == ["first@0", "depthwise@0", "first@50", "depthwise@50"]
    assert [(row["op"], row["percentile"]) for row in rows[:4]] == [
        ("wgc", 50.0), ("wgc", 90.0), ("backward", 50.0), ("backward", 90.0),
    ]  # fmt: skip
    assert {(row["suite"], row["pattern"], row["nominal_density"]) for row in rows} == {("output.pt", "captured", None)}
    assert rows[0]["density"] == 1  # at percentile 50 the threshold is 0
    for row in (rows[1], rows[3]):  # one gradient, one key
        captured = gradients.load(file).gradients[0].grad_output
        assert row["density"] == pytest.approx(reference.prune(captured, KEY, Pruning()).density.item())


@pytest.mark.parametrize("backend", [name for name in backends_on("cpu") if name != "reference"])
def test_captured_gradients_with_natural_zeros_are_not_pruned(tmp_path, captured_file, backend):
    path, file = tmp_path / "rows.json", captured_file("input")
    result = bench("--gradients", file, "--layer", "depthwise", "--op", "prune,agb,wgc,backward", "--percentile", "80,90",
                   "--backend", backend, "--json", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = rows_of(path)
    assert [(row["op"], row["percentile"]) for row in rows] == [
        ("agb", None), ("wgc", None), ("backward", 80.0), ("backward", 90.0),
    ]  # fmt: skip
    captured = gradients.load(file).gradients[1].grad_output
    assert [row["density"] for row in rows] == pytest.approx([reference.density(captured).item()] * 4)


def repeated(row: dict, path) -> dict:
    program, *arguments = shlex.split(row["command"].partition("-m ")[2])
    assert program == "sparsebwd.bench"
    result = CliRunner().invoke(cli.app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    (again,) = rows_of(path)
    return again


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--problem",
            PROBLEM,
            "--op",
            "backward",
            "--percentile",
            "95",
            "--dtype",
            "bfloat16",
            "--layout",
            "contiguous",
        ],
        ["--problem", PROBLEM, "--op", "agb,wgc", "--pattern", "skewed,iid", "--density", "0.25"],
        ["--suite", "mobilenet-cifar", "--batch", "2", "--layer", "features.0.0,features.1.0", "--op", "backward"],
        ["--gradients", "FILE", "--op", "wgc,backward"],
        ["--gradients", "FILE WITH ZEROS", "--op", "wgc,backward"],
    ],
)
def test_command_of_a_row_repeats_it(tmp_path, captured_file, arguments):
    files = {"FILE": captured_file("output"), "FILE WITH ZEROS": captured_file("input")}
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    bench(*(files.get(argument, argument) for argument in arguments), "--backend", "dense", "--seed", "3", "--memory", "1",
          "--json", first)  # fmt: skip
    timed = {"sparse_ms", "dense_ms", "speedup", "gflops", "of_peak", "spread", "baseline"}
    rows = rows_of(first)
    assert rows
    for row in rows:
        again = repeated(row, second)
        assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in row.items() if k not in timed}


def test_skewed_and_iid_rows_are_summed_up_apart(tmp_path):
    path = tmp_path / "rows.json"
    assert bench("--problem", PROBLEM, "--pattern", "iid,skewed", "--density", "0.5", "--op", "agb", "--backend", "dense",
                 "--json", path).exit_code == 0  # fmt: skip
    summaries = json.loads(path.read_text())["summary"]
    assert [(summary["pattern"], summary["nominal_density"]) for summary in summaries] == [
        ("iid", 0.5),
        ("skewed", 0.5),
    ]


@pytest.fixture
def each_by_itself(monkeypatch):
    """The dense backend computes AGB by conv2d_input and WGC by conv2d_weight, which a test can replace."""
    monkeypatch.setattr(DenseBackend, "gradients", backends.Backend.gradients)


def test_results_are_checked_in_parts(monkeypatch, each_by_itself):
    """As in one piece; an error in the last image is found."""
    problem = ConvProblem.parse("n5c4h6w5k8r3s3u2p1d1g2")
    (backward,) = operations.named("backward")
    case = operations.Case(
        suites.Layer(None, "", problem), torch.float32, "contiguous", "dense", "heavy-tailed", None, 90.0
    )

    def check() -> operations.Errors:
        return backward.check(case, Inputs(problem, torch.float32, case.gradient(backward), Rotation(1)))

    whole = check()
    monkeypatch.setitem(operations._UNFOLDED, "cpu", 2 * 4 * 9 * 3 * 3)
    assert [images.stop for _, images in operations._images(problem, "cpu")] == [2, 4, 5]
    assert check() == pytest.approx(whole) and whole.result == pytest.approx(whole.dense)
    original = DenseBackend.conv2d_input

    def wrong(self, *arguments):
        result = original(self, *arguments)
        result[-1, -1, -1, -1] += 1e-3
        return result

    monkeypatch.setattr(DenseBackend, "conv2d_input", wrong)
    with pytest.raises(AssertionError, match="grad_input: largest error"):
        check()


@pytest.mark.parametrize("op", ["agb", "wgc", "backward", "prune", "prune-predicted"])
def test_wrong_results_get_no_speedup(tmp_path, monkeypatch, each_by_itself, op):
    def off_by_little(method):
        original = getattr(DenseBackend, method)

        def wrong(self, *args):
            result = original(self, *args)
            if method == "prune":
                return result._replace(values=result.values * (1 + 1e-5))
            return result * (1 + 1e-5)

        monkeypatch.setattr(DenseBackend, method, wrong)

    off_by_little({"agb": "conv2d_input", "wgc": "conv2d_weight", "backward": "conv2d_weight"}.get(op, "prune"))
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--op", op, "--density", "0.5", "--backend", "dense", "--json", path)
    assert result.exit_code == 1
    row, *others = rows_of(path)
    assert [row[name] for name in ("sparse_ms", "dense_ms", "speedup")] == [None] * 3
    assert row["error"] and row["error"] in result.output
    assert "WRONG" in result.output and row["command"] in result.output
    assert all(other["speedup"] for other in others)
    assert json.loads(path.read_text())["summary"][0]["geometric_mean"] is None


def test_not_a_number_is_wrong_and_json_stays_json(tmp_path, monkeypatch, each_by_itself):
    monkeypatch.setattr(
        DenseBackend, "conv2d_input", lambda self, problem, *_: torch.full(problem.input_size, torch.nan)
    )
    path = tmp_path / "rows.json"
    assert bench("--problem", PROBLEM, "--op", "agb", "--backend", "dense", "--json", path).exit_code == 1
    assert "NaN" not in path.read_text()


def test_threads_are_restored():
    before = torch.get_num_threads()
    assert bench("--problem", PROBLEM, "--backend", "dense", "--threads", "1,2").exit_code == 0
    assert torch.get_num_threads() == before


def test_interrupted_runs_write_nothing(tmp_path, monkeypatch, each_by_itself):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DenseBackend, "conv2d_weight", interrupt)
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--backend", "dense", "--json", path)
    assert result.exit_code == 130 and not path.exists()
    assert "agb" in result.output and "interrupted" in result.output


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "resnet18-imagenet-5x5"], "resnet18 has no convolution of this kernel size"),
        (["--layer", "stem.1"], "layer: got 'stem.1'; accepted: stem.0, stages.0.0.conv1,"),
        (["--pattern", "blocks"], "pattern: got 'blocks'; accepted: iid, skewed"),
        (["--gradients", "none.pt"], "none.pt: No such file"),
        (["--plot", "rows.pdf"], "plot: got 'rows.pdf'; accepted: .png or .svg"),
        (["--plot", "/dev/null/rows.svg"], "/dev/null is not a folder to write to"),
        (["--op", "prune", "--plot", "rows.svg"], "plot: accepted with agb, wgc or backward"),
        (["--compare", "none.json"], "none.json: No such file"),
        (["--tolerance", "-1"], "0"),
        (["--suite", "vgg-cifar"], "suite: got 'vgg-cifar'; accepted: resnet18-cifar,"),
        (["--suite", "resnet18"], "suite: got 'resnet18'; accepted"),
        (["--suite", "resnet18-cifar-5x5"], "resnet18 has no convolution of this kernel size"),
        (["--problem", "n1c2"], "got 'n1c2', which lacks h, w, k, r, s"),
        (["--problem", "n0c1h1w1k1r1s1"], "a batch of 0; accepted: at least 1"),
        (["--problem", PROBLEM, "--batch", "3"], "the batch of a problem is its n"),
        (["--op", "agb,dgrad"], "op: got 'dgrad'; accepted: prune, prune-predicted, prune+lists, agb, wgc, agb+wgc, backward"),
        (["--density", "1.5"], "density: got '1.5'; accepted: 0 <= density <= 1"),
        (["--density", "nan"], "density: got 'nan'"),
        (["--density", "half"], "density: got 'half'; accepted: a number"),
        (["--percentile", "100"], "percentile: got 100.0; accepted: 50 <= percentile < 100"),
        (["--dtype", "float64"], "dtype: got 'float64'; accepted: float32, bfloat16"),
        (["--layout", "nhwc"], "layout: got 'nhwc'; accepted: channels_last, contiguous"),
        (["--against", "worst"], "against: got 'worst'; accepted: best, same"),
        (["--backend", "gpu"], "backend: got 'gpu'; accepted: 'auto', 'reference', 'dense', 'cpu'"),
        (["--threads", "0"], "threads: got 0; accepted: 1 to"),
        (["--device", "tpu"], "device: got 'tpu'; accepted: cpu, cuda"),
        (["--math", "tf32"], "math: accepted with --device cuda"),
        (["--repeats", "2"], "3"),
        (["--suite", "alexnet-cifar", "--json", "/dev/null/rows.json"], "/dev/null is not a folder to write to"),
    ],
)
def test_bad_arguments(arguments, words):
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert words in result.output
    assert arguments[-2].removeprefix("-") in result.output


@pytest.mark.parametrize("option", ["--suite", "--problem", "--density", "--pattern", "--batch-size"])
def test_gradients_come_with_their_layers(captured_file, option):
    value = "1" if option == "--batch-size" else "iid"
    result = CliRunner().invoke(cli.app, ["--gradients", str(captured_file()), option, value], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert f"{option}: the file of --gradients has its own" in result.output


def test_options_before_a_command_are_refused():
    result = CliRunner().invoke(cli.app, ["--threads", "1", "capture"], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "--threads: accepted without a command; those of capture stand behind it" in result.output


def test_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(DenseBackend, "available", lambda self: "it is switched off")
    choose_backend.cache_clear()
    result = CliRunner().invoke(cli.app, ["--problem", PROBLEM, "--backend", "dense"])
    choose_backend.cache_clear()
    assert result.exit_code == 2 and "it is switched off" in result.output


@pytest.mark.slow
@pytest.mark.skipif(not KERNELS, reason="the sparse kernels do not run here")
def test_commands_of_the_documentation_are_understood(tmp_path, monkeypatch, captured_file, gpu):
    """Nothing is measured: rows are asked for, and there are none. A backend need not run here."""
    monkeypatch.setattr(cli.Plan, "check_backends", lambda self: None)
    monkeypatch.setattr(cli, "peaks", lambda plan: {"peak_gflops": {}})
    monkeypatch.setattr(cli, "run", lambda *_: iter(()))
    monkeypatch.chdir(tmp_path)
    captured_file().rename("gradients.pt")
    commands = [
        line.partition(" -m sparsebwd.bench ")[2]
        for line in (ROOT / "docs" / "performance.md").read_text("utf-8").splitlines()
        if line.startswith("python -m sparsebwd.bench -")
    ]
    assert len(commands) > 5
    for arguments in commands:
        (tmp_path / "densities.json").write_text('{"environment": {}, "rows": []}')
        result = CliRunner().invoke(cli.app, shlex.split(arguments))
        assert result.exit_code != 2 and " rows, " in result.output, f"{arguments}: {result.output}"


@pytest.mark.slow
def test_module_runs(tmp_path):
    """As users start it, malloc settings included."""
    path = tmp_path / "rows.json"
    others = {name: value for name, value in os.environ.items() if name not in environment.CODE_PATH_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "sparsebwd.bench", "--problem", PROBLEM, "--op", "agb", "--backend", "dense", "--repeats",
         "3", "--memory", "1", "--json", path],
        capture_output=True, text=True, env=others | {"ATEN_CPU_CAPABILITY": "default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["environment"]["allocator"]
    assert record["environment"]["variables"]["ATEN_CPU_CAPABILITY"] == "default"
    assert record["rows"][0]["command"].startswith("ATEN_CPU_CAPABILITY=default python -m sparsebwd.bench ")
    assert PROBLEM in done.stdout
