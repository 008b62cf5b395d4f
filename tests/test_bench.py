# SPDX-License-Identifier: Apache-2.0
"""The microbenchmark, apart from time: no test asserts how long anything takes."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sparsebwd import models
from sparsebwd.backends import DenseBackend, available_backends, choose_backend
from sparsebwd.bench import cli, operations, results, suites
from sparsebwd.bench.inputs import Inputs, Rotation
from sparsebwd.bench.timing import Call, interleave
from sparsebwd.problem import ConvProblem

PROBLEM = "n2c4h6w5k8r3s3u1p1d1g1"
KERNELS = "cpu" in available_backends()
CONTRACT = {
    "suite", "layer", "problem", "multiplicity", "op", "density", "pattern", "dtype", "layout", "backend", "threads",
    "sparse_ms", "dense_ms", "speedup", "rel_error", "bytes", "flops",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Little memory, and malloc as it is."""
    monkeypatch.setattr(cli, "last_level_cache", lambda: 2**14)
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: "as is")


def bench(*arguments: object):
    result = CliRunner().invoke(cli.app, ["--repeats", "3", "--threads", "1", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows_of(path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


# ---- suites


@pytest.mark.parametrize("name", models.names())
def test_suites_are_the_convolutions_of_the_models(name):
    layers = suites.load(f"{name}-cifar", batch=2)
    model = models.create(name, num_classes=10).to("meta")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(layer.multiplicity for layer in layers) == len(convolutions)
    assert len({(layer.problem, layer.needs_grad_input) for layer in layers}) == len(layers)
    assert [layer.needs_grad_input for layer in layers].count(False) == 1 and not layers[0].needs_grad_input
    assert {layer.problem.n for layer in layers} == {2}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 3, 32, 32, device="meta"))
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
    inputs = Inputs(problem, torch.float32, 0.5, Rotation(10_000))
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
    inputs = Inputs(ConvProblem.parse(PROBLEM), torch.bfloat16, None, Rotation(1))
    for one, other in zip(inputs.first("contiguous"), inputs.first("channels_last")):
        assert one.equal(other) and one.dtype == torch.bfloat16


def test_density_of_inputs():
    problem = ConvProblem.parse("n16c1h32w32k16r1s1")
    for density in (0.0, 0.1, 1.0):
        gradient = Inputs(problem, torch.float32, density, Rotation(1)).first("contiguous").grad_output
        # 262144 draws: five standard deviations are 0.003
        assert gradient.count_nonzero().item() / gradient.numel() == pytest.approx(density, abs=0.003)
    case = operations.Case(suites.Layer(None, "", problem), torch.float32, "contiguous", "dense", percentile=90)
    inputs = Inputs(problem, torch.float32, None, Rotation(1))
    assert inputs.first("contiguous").grad_output.count_nonzero() == 16 * 32 * 32 * 16
    assert operations.Prune().density(case, inputs) == pytest.approx(0.31, abs=0.01)


def test_interleaving():
    order = []

    def call(name: str) -> Call:
        arguments = iter(range(100))
        return Call(lambda argument: order.append(name + str(argument)), lambda: next(arguments))

    times = interleave({"a": call("a"), "b": call("b")}, repeats=2, warmup=1)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert all(seconds > 0 and spread >= 0 for seconds, spread in times.values())


# ---- whole runs


@pytest.mark.parametrize("backend", [name for name in available_backends() if name != "reference"])
def test_files(tmp_path, backend):
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("json", "csv", "markdown")}
    result = bench(
        "--problem", PROBLEM, "--op", "prune,agb,wgc,backward", "--density", "0.5,0.1", "--backend", backend,
        *(part for kind, path in files.items() for part in (f"--{kind}", path)),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(files["json"].read_text())
    rows = record["rows"]
    assert [(row["op"], row["backend"]) for row in rows] == [
        *[("agb", backend), ("wgc", backend)] * 2,
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
    assert all(row["rel_error"] < 1e-5 for row in rows if row["backend"] != "torch")
    assert {"torch", "sparsebwd", "cpu", "load", "last_level_cache", "variables"} <= record["environment"].keys()
    assert [entry["op"] for entry in record["summary"]] == ["agb", "wgc", "agb", "wgc", "prune", "prune", "backward"]

    with open(files["csv"], newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["command"] for row in table] == [row["command"] for row in rows]
    assert [float(row["speedup"]) for row in table] == [row["speedup"] for row in rows]
    assert sum(line.startswith(f"| {PROBLEM} |") for line in files["markdown"].read_text().splitlines()) == len(rows)
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


def test_useful_work(tmp_path):
    path = tmp_path / "rows.json"
    assert bench("--problem", "n1c2h3w3k4r1s1", "--op", "agb,wgc,backward,prune", "--density", "0.5", "--backend",
                 "dense", "--json", path).exit_code == 0  # fmt: skip
    agb, wgc, backward, prune, _ = rows_of(path)
    macs, gradient, input, weight = 9 * 8, 36, 18, 8
    assert agb["flops"] == wgc["flops"] == macs
    assert agb["bytes"] == wgc["bytes"] == 4 * (gradient + input + weight)
    assert backward["flops"] == 2 * round(2 * macs * backward["density"])
    assert backward["bytes"] == 4 * (gradient + 2 * (input + weight))
    assert (prune["flops"], prune["bytes"]) == (0, 4 * 3 * gradient)


def test_first_layer_has_no_agb():
    layer = suites.load("alexnet-cifar", batch=1)[0]
    (agb,), (wgc,), (backward,) = map(operations.named, ("agb", "wgc", "backward"))
    assert not agb.applies(layer) and wgc.applies(layer) and backward.applies(layer)
    assert backward.outputs(layer) == (False, True)


def test_command_of_a_row_repeats_it(tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    bench("--problem", PROBLEM, "--op", "backward", "--percentile", "95", "--dtype", "bfloat16", "--layout", "contiguous",
          "--backend", "dense", "--seed", "3", "--json", first)  # fmt: skip
    (row,) = rows_of(first)
    program, *arguments = shlex.split(row["command"].partition("-m ")[2])
    assert program == "sparsebwd.bench"
    assert CliRunner().invoke(cli.app, [*arguments, "--json", str(second)]).exit_code == 0
    (again,) = rows_of(second)
    timed = {"sparse_ms", "dense_ms", "speedup", "gflops", "spread", "baseline"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in row.items() if k not in timed}


@pytest.mark.parametrize("op", ["agb", "wgc", "backward", "prune"])
def test_wrong_results_get_no_speedup(tmp_path, monkeypatch, op):
    def off_by_little(method):
        original = getattr(DenseBackend, method)

        def wrong(self, *args):
            result = original(self, *args)
            if method == "prune":
                return result._replace(values=result.values * (1 + 1e-5))
            return result * (1 + 1e-5)

        monkeypatch.setattr(DenseBackend, method, wrong)

    off_by_little({"agb": "conv2d_input", "wgc": "conv2d_weight", "backward": "conv2d_weight", "prune": "prune"}[op])
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--op", op, "--density", "0.5", "--backend", "dense", "--json", path)
    assert result.exit_code == 1
    row, *others = rows_of(path)
    assert [row[name] for name in ("sparse_ms", "dense_ms", "speedup")] == [None] * 3
    assert row["error"] and row["error"] in result.output
    assert "WRONG" in result.output and row["command"] in result.output
    assert all(other["speedup"] for other in others)
    assert json.loads(path.read_text())["summary"][0]["geometric_mean"] is None


def test_not_a_number_is_wrong_and_json_stays_json(tmp_path, monkeypatch):
    monkeypatch.setattr(DenseBackend, "conv2d_input", lambda self, problem, *_: torch.full(problem.input_size, torch.nan))
    path = tmp_path / "rows.json"
    assert bench("--problem", PROBLEM, "--op", "agb", "--backend", "dense", "--json", path).exit_code == 1
    assert "NaN" not in path.read_text()


def test_threads_are_restored():
    before = torch.get_num_threads()
    assert bench("--problem", PROBLEM, "--backend", "dense", "--threads", "1,2").exit_code == 0
    assert torch.get_num_threads() == before


def test_interrupted_runs_write_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DenseBackend, "conv2d_weight", interrupt)
    path = tmp_path / "rows.json"
    result = bench("--problem", PROBLEM, "--backend", "dense", "--json", path)
    assert result.exit_code == 130 and not path.exists()
    assert "agb" in result.output and "interrupted" in result.output


# ---- summaries


def make_row(**changes) -> results.Row:
    values = dict.fromkeys(results.Row.__dataclass_fields__)
    values |= {"suite": "s", "layer": "a", "problem": PROBLEM, "multiplicity": 1, "op": "agb", "density": 0.1}
    values |= {"dtype": "float32", "layout": "contiguous", "backend": "cpu", "threads": 2, "baseline": "contiguous"}
    values |= {"sparse_ms": 1.0, "dense_ms": 1.0, "speedup": 1.0, **changes}
    return results.Row(**values)


def test_summary():
    rows = [
        make_row(layer="a", sparse_ms=1.0, dense_ms=8.0, speedup=8.0, multiplicity=3),
        make_row(layer="b", sparse_ms=4.0, dense_ms=8.0, speedup=2.0, multiplicity=1),
        make_row(layer="c", sparse_ms=None, dense_ms=None, speedup=None, error="off"),
        make_row(density=0.5),
    ]
    summary, other = results.summarize(rows)
    assert (summary["layers"], summary["wrong"], summary["density"]) == (2, 1, 0.1)
    assert summary["geometric_mean"] == pytest.approx(4)
    assert summary["total_ratio"] == pytest.approx((3 * 8 + 8) / (3 * 1 + 4))
    assert (summary["worst_layer"], summary["worst_speedup"]) == ("b", 2.0)
    assert other["density"] == 0.5
    assert results.summary_line(summary) == (
        "agb at density 0.1 [s, float32, contiguous, cpu, 2 threads]: 1 WRONG; 4.00x (geometric mean of 2 layers), "
        "4.57x in total, worst 2.00x (b)"
    )


def test_summary_of_pruning_counts_copies():
    rows = [make_row(op="prune", percentile=90.0, density=d, baseline="copy", speedup=0.5) for d in (0.3, 0.4)]
    (summary,) = results.summarize(rows)
    assert summary["density"] == pytest.approx(0.35)
    line = results.summary_line(summary)
    assert "density 0.35 (percentile 90)" in line and "costs 2.00 copies (geometric mean of 2 layers)" in line


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "vgg-cifar"], "suite: got 'vgg-cifar'; accepted: resnet18-cifar,"),
        (["--suite", "resnet18"], "suite: got 'resnet18'; accepted"),
        (["--suite", "resnet18-cifar-5x5"], "resnet18 has no convolution of this kernel size"),
        (["--problem", "n1c2"], "got 'n1c2', which lacks h, w, k, r, s"),
        (["--problem", "n0c1h1w1k1r1s1"], "a batch of 0; accepted: at least 1"),
        (["--problem", PROBLEM, "--batch", "3"], "the batch of a problem is its n"),
        (["--op", "agb,dgrad"], "op: got 'dgrad'; accepted: prune, prune+lists, agb, wgc, backward"),
        (["--density", "1.5"], "density: got '1.5'; accepted: 0 <= density <= 1"),
        (["--density", "nan"], "density: got 'nan'"),
        (["--density", "half"], "density: got 'half'; accepted: a number"),
        (["--percentile", "100"], "percentile: got 100.0; accepted: 50 <= percentile < 100"),
        (["--dtype", "float64"], "dtype: got 'float64'; accepted: float32, bfloat16"),
        (["--layout", "nhwc"], "layout: got 'nhwc'; accepted: channels_last, contiguous"),
        (["--backend", "gpu"], "backend: got 'gpu'; accepted: 'auto', 'reference', 'dense', 'cpu'"),
        (["--threads", "0"], "threads: got '0'; accepted: integers from 1"),
        (["--repeats", "2"], "3"),
        (["--suite", "alexnet-cifar", "--json", "/dev/null/rows.json"], "/dev/null is not a folder to write to"),
    ],
)
def test_bad_arguments(arguments, words):
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert words in result.output
    assert arguments[-2].removeprefix("-") in result.output


def test_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(DenseBackend, "available", lambda self: "it is switched off")
    choose_backend.cache_clear()
    result = CliRunner().invoke(cli.app, ["--problem", PROBLEM, "--backend", "dense"])
    choose_backend.cache_clear()
    assert result.exit_code == 2 and "it is switched off" in result.output


def test_module_runs(tmp_path):
    """As users start it, malloc settings included."""
    path = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "sparsebwd.bench", "--problem", PROBLEM, "--op", "agb", "--backend", "dense", "--repeats",
         "3", "--memory", "1", "--json", path],
        capture_output=True, text=True, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["environment"]["allocator"]
    assert record["environment"]["variables"]["ATEN_CPU_CAPABILITY"] == "default"
    assert record["rows"][0]["command"].startswith("ATEN_CPU_CAPABILITY=default python -m sparsebwd.bench ")
    assert PROBLEM in done.stdout
