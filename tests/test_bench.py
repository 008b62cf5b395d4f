# SPDX-License-Identifier: Apache-2.0
"""Runs of the benchmark, apart from time: no test asserts how long anything takes."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from benching import PROBLEM, bench, rows_of
from strategies import backends_on
from typer.testing import CliRunner

from sparsebwd import backends, reference
from sparsebwd.backends import DenseBackend, available_backends, choose_backend
from sparsebwd.bench import cli, compare, environment, gradients, operations, suites
from sparsebwd.bench.inputs import KEY, Inputs, Rotation
from sparsebwd.bench.results import Row
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning

KERNELS = "cpu" in available_backends()
CONTRACT = {
    "suite", "layer", "problem", "multiplicity", "op", "density", "pattern", "dtype", "layout", "backend", "threads",
    "sparse_ms", "dense_ms", "speedup", "rel_error", "bytes", "flops",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("small_bench")


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
