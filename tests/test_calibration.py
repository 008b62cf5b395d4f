# SPDX-License-Identifier: Apache-2.0
"""Files of measured break-even densities, and ``python -m sparsebwd.calibrate`` with a clock of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sparsebwd
from sparsebwd import backends, calibrate, commands
from sparsebwd.backends import base, break_even, calibration
from sparsebwd.backends.break_even_tables import CLASSES
from sparsebwd.bench import calibration as measurement
from sparsebwd.bench import terminal, timing
from sparsebwd.bench.cli import app as bench
from sparsebwd.problem import ConvProblem
from sparsebwd.train.cli import main as train

pytestmark = pytest.mark.skipif("cpu" not in backends.available_backends(), reason="no CPU kernels")

PROBLEM = ConvProblem.parse("n32c64h32w32k64r3s3p1")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    monkeypatch.delenv(break_even.VARIABLE, raising=False)
    _forget()
    yield
    _forget()


def _forget() -> None:
    break_even._chosen = None
    base.forget_choices()


def _record(agb: float = 0.31, wgc: float = 0.62) -> dict:
    kinds = {kind: (agb, wgc) for kind in CLASSES}
    densities = {dtype: {layout: kinds for layout in calibration.LAYOUTS} for dtype in calibration.DTYPES}
    return calibration.record(densities, 2, "2026-11-29")


def _write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


# ---- use


def test_a_calibration_is_in_force_from_when_it_is_asked_for(tmp_path):
    usual = break_even.break_even(PROBLEM, torch.float32, True)
    why = backends.cpu.AdaptiveCpuBackend.why_not_faster
    settings = (PROBLEM, torch.float32, True, sparsebwd.Pruning(where="faster"))
    file = _write(tmp_path / "one.json", _record())
    sparsebwd.use_calibration(file)
    assert break_even.break_even(PROBLEM, torch.float32, True) == (0.31, 0.62)
    assert why(*settings) is None
    sparsebwd.use_calibration(str(_write(tmp_path / "never.json", _record(0, 0))))
    assert break_even.break_even(PROBLEM, torch.bfloat16, False) == (0, 0)
    assert "faster at no density" in why(*settings) and "calibrated 2026-11-29" in why(*settings)
    sparsebwd.use_calibration(None)
    assert break_even.break_even(PROBLEM, torch.float32, True) == usual


def test_the_variable_names_one_and_the_call_counts_more(tmp_path, monkeypatch):
    monkeypatch.setenv(break_even.VARIABLE, str(_write(tmp_path / "one.json", _record())))
    assert break_even.tables()[torch.float32].channels_last["kernel"] == (0.31, 0.62)
    sparsebwd.use_calibration(_write(tmp_path / "two.json", _record(0.2, 0.4)))
    assert break_even.tables()[torch.float32].channels_last["kernel"] == (0.2, 0.4)
    sparsebwd.use_calibration(None)
    assert break_even.tables() == break_even.kind_of_cpu()


def test_an_empty_variable_names_none(monkeypatch):
    monkeypatch.setenv(break_even.VARIABLE, "")
    assert break_even.tables() == break_even.kind_of_cpu()


def test_info_says_which_is_in_force_and_where_it_comes_from(tmp_path, monkeypatch):
    assert "(2026-11-" in str(sparsebwd.info()) or "estimated" in str(sparsebwd.info())
    file = _write(tmp_path / "one.json", _record())
    monkeypatch.setenv(break_even.VARIABLE, str(file))
    _forget()
    found = sparsebwd.info()
    table = found["cpu"]["break_even"]["float32"]
    assert table["name"] == "calibrated 2026-11-29" and table["channels_last"]["1x1"] == [0.31, 0.62]
    assert table["origin"] == f"measured on this machine ({found['cpu']['name']}), threads: 2, 2026-11-29: {file}"
    assert f"{table['origin']}\n" in str(found)


# ---- bad files


def _changed(**changes: object) -> dict:
    return _record() | changes


def _with(limits: object) -> dict:
    record = _record()
    record["break_even"]["bfloat16"]["contiguous"]["1x1"] = limits
    return record


def _without(*path: str) -> dict:
    record = inner = _record()
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return record


def _elsewhere(name: str, value: object = "another") -> dict:
    record = _record()
    record["machine"][name] = value
    return record


BAD = [
    (lambda: [], "the file is not a JSON object"),
    (lambda: _changed(more=1), "the file has the unknown entry 'more'"),
    (lambda: _without("threads"), "the file lacks 'threads'"),
    (lambda: _changed(**{"sparsebwd calibration": 2}), "format 2 instead of 1"),
    (lambda: _changed(**{"sparsebwd calibration": True}), "format True instead of 1"),
    (lambda: _changed(threads=0), "threads is 0 instead of a whole number from 1"),
    (lambda: _changed(threads=1.5), "threads is 1.5 instead of"),
    (lambda: _changed(time=["now"]), "time is ['now'] instead of a text"),
    (lambda: _changed(machine=None), "machine is not a JSON object"),
    (lambda: _without("machine", "cpu"), "machine lacks 'cpu'"),
    (lambda: _elsewhere("cpu", 7), "cpu is 7 instead of a text"),
    (lambda: _without("break_even", "float32"), "break_even lacks 'float32'"),
    (lambda: _without("break_even", "float32", "contiguous"), "float32 lacks 'contiguous'"),
    (lambda: _without("break_even", "float32", "contiguous", "1x1"), "float32 contiguous lacks '1x1'"),
    (lambda: _with(0.5), "bfloat16 contiguous '1x1' is 0.5 instead of two numbers from 0 to 1"),
    (lambda: _with([0.5]), "is [0.5] instead of two numbers"),
    (lambda: _with([0.5, 1.5]), "is [0.5, 1.5] instead of two numbers"),
    (lambda: _with([0.5, float("nan")]), "is [0.5, nan] instead of two numbers"),
    (lambda: _with([0.5, "0.4"]), "is [0.5, '0.4'] instead of two numbers"),
    (lambda: _with([True, 0.4]), "is [True, 0.4] instead of two numbers"),
    *((lambda name=name: _elsewhere(name), f"measured with {name} 'another', but here it is ") for name in calibration.identity()),
]  # fmt: skip


@pytest.mark.parametrize("make, words", BAD, ids=[words for _, words in BAD])
def test_what_is_no_calibration_of_this_machine_is_refused(make, words, tmp_path):
    file = _write(tmp_path / "bad.json", make())
    with pytest.raises(ValueError) as caught:
        sparsebwd.use_calibration(file)
    text = str(caught.value)
    assert text.startswith(f"calibration: got {file}: ") and words in text and "calibrate again" in text and "\n" not in text
    assert break_even.tables() == break_even.kind_of_cpu()  # what was in force stays so


@pytest.mark.parametrize(
    "content, words", [(None, "No such file"), (b"{", "Expecting property name"), (b"\xff", "decode"), (b"[" * 100_000, "nested too deeply")]
)
def test_what_is_no_json_is_refused(content, words, tmp_path):
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        sparsebwd.use_calibration(file)
    with pytest.raises(ValueError, match="not a regular file but a directory"):
        sparsebwd.use_calibration(tmp_path)


def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="calibration: got 7; accepted: the path of a file, or None"):
        sparsebwd.use_calibration(7)


def test_a_bad_variable_is_an_error_wherever_densities_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(break_even.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="absent.json: No such file"):
        commands.check_environment()
    layer = sparsebwd.SparseConv2d(64, 64, 3, padding=1)
    with pytest.raises(ValueError, match="absent.json: No such file"):
        layer(torch.randn(8, 64, 16, 16)).sum().backward()
    found = sparsebwd.info()
    assert found["cpu"]["break_even"] is None and "absent.json: No such file" in found["backends"]["cpu"]


def test_commands_refuse_a_bad_variable_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(break_even.VARIABLE, str(tmp_path / "absent.json"))
    words = f"calibration: got {tmp_path / 'absent.json'}: No such file or directory; accepted: "
    for arguments in ([], ["overhead"]):
        result = CliRunner().invoke(bench, arguments)
        assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        train(["--output", str(tmp_path / "run")])
    assert ended.value.code == 2 and words in capsys.readouterr().err


# ---- the measurement


@pytest.mark.parametrize(
    "at, expected",
    [(0.3, 0.3), (0.06, 0.06), (0.7, 0.7), (0.01, 0.0), (1.0, 0.85), (0.35, 0.35)],
)
def test_break_even_is_where_the_speedup_falls_to_1(at, expected):
    asked = []

    def speedup(density: float) -> tuple[float, float]:
        asked.append(density)
        return (at / density) ** 0.8, 0.02

    found = measurement.break_even(speedup)
    assert found.density == pytest.approx(expected) and len(asked) == len(set(asked)) <= 3
    assert found.noise == (pytest.approx(0.02 / 0.8 * expected) if 0 < expected < 0.85 else 0)


def test_what_varies_too_much_is_measured_again_and_then_left(clock, monkeypatch, tmp_path):
    calls = []

    def interleave(timed, repeats, warmup, sample):
        calls.append(timed)
        spread = 0.01 if len(calls) % 3 == 0 and quiet else 2.0
        return {name: timing.Times(1.0 if name == "dense" else 0.9, spread) for name in timed}

    monkeypatch.setattr(measurement, "interleave", interleave)
    problem = measurement.problems("first", 1)[0]
    quiet = True
    assert {row.found.density for row in measurement.measure("float32", "first", problem)} == {0.85}
    assert len(calls) == 2 * 3 * 3  # two layouts, three densities, three times each
    quiet = False
    assert {row.found.density for row in measurement.measure("float32", "first", problem)} == {None}
    result = _run("--output", str(tmp_path / "file.json"))
    assert result.exit_code == 0 and "too noisy" in result.output
    usual = break_even.kind_of_cpu()[torch.float32]
    assert calibration.read(tmp_path / "file.json")[torch.float32].contiguous["kernel"] == usual.contiguous["kernel"]
    # One for AGB of the first layer less, in two dtypes and layouts; classes without problems are measured as 0.
    assert "12 were not measured, as times varied too much" in result.output


def test_lowest_of_a_class_is_unknown_where_one_is():
    low, high, unknown = measurement.Found(0.3, 0.1), measurement.Found(0.4, 0.0), measurement.Found(None, 1.0)
    assert measurement._lowest([high, low]) == low and measurement._lowest([low, unknown]) == unknown
    assert measurement._lowest([]) == measurement.Found(0.0, 0.0)


def test_problems_are_of_the_class_they_stand_for():
    for kind in CLASSES:
        for threads in (1, 2, 64):
            found = measurement.problems(kind, threads)
            assert len(found) >= 2 and all(break_even.classify(problem) == kind for problem in found)
    assert measurement.problems("1x1", 8)[0].n == 4 * measurement.problems("1x1", 2)[0].n


@pytest.fixture
def clock(monkeypatch):
    """Sparse takes its density / 0.4 of what dense takes; problems small and few; nothing is set of the process."""
    monkeypatch.setattr(terminal, "keep_freed_memory", lambda: "as is")
    monkeypatch.setattr(measurement, "_LEAST_CACHE", 2**10)
    monkeypatch.setattr(measurement, "_MOST_CACHE", 2**10)
    small = {"kernel": ("n1c32h8w8k32r3s3p1",), "first": ("n1c3h8w8k16r3s3p1",)}
    monkeypatch.setattr(measurement, "PROBLEMS", {kind: small.get(kind, ()) for kind in CLASSES})

    def sample(call) -> float:
        case = call.function.args[0]
        call.next_argument()
        return 1.0 if case.backend == "dense" else case.density / 0.4

    monkeypatch.setattr(timing, "sample_on_cpu", sample)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _run(*arguments: str):
    return CliRunner().invoke(calibrate.app, arguments)


@pytest.mark.usefixtures("clock")
def test_the_command_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _run("--threads", "1")
    assert result.exit_code == 0, result.output
    file = tmp_path / "sparsebwd-calibration.json"
    assert f"SPARSEBWD_CALIBRATION={file}" in result.output
    sparsebwd.use_calibration(file)
    tables = break_even.tables()
    for dtype in calibration.DTYPES.values():
        for layout in calibration.LAYOUTS:
            for limit in getattr(tables[dtype], layout)["kernel"]:
                assert limit == pytest.approx(0.4, abs=0.021)
            # Nothing was measured of it, which is less than the lowest density.
            assert max(getattr(tables[dtype], layout)["1x1"]) <= 0.05
    assert tables[torch.float32].channels_last["first"].agb == 0
    assert json.loads(file.read_text())["threads"] == 1
    assert "0.40 ± 0.00" in result.output and "in force:" in result.output


@pytest.mark.usefixtures("clock")
def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _run("--dry-run", "--output", "/dev/null/file")
    assert result.exit_code == 0 and "0.40 ± 0.00" in result.output and "written" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("clock")
def test_an_outdated_calibration_is_no_reason_not_to_calibrate(tmp_path, monkeypatch):
    file = _write(tmp_path / "old.json", _elsewhere("torch"))
    monkeypatch.setenv(break_even.VARIABLE, str(file))
    result = _run("--output", str(file))
    assert result.exit_code == 0 and "measured with torch 'another'" in result.output
    sparsebwd.use_calibration(file)


@pytest.mark.usefixtures("clock")
def test_a_wrong_result_is_not_timed_and_nothing_is_written(tmp_path, monkeypatch):
    right = backends.cpu.CpuBackend.conv2d_backward

    def wrong(self, *arguments, **options):
        result = right(self, *arguments, **options)
        return result._replace(grad_weight=None if result.grad_weight is None else result.grad_weight * 1.5)

    monkeypatch.setattr(backends.cpu.CpuBackend, "conv2d_backward", wrong)
    result = _run("--output", str(tmp_path / "file.json"))
    assert result.exit_code == 1 and list(tmp_path.iterdir()) == []
    assert "error: a result of n1c3h8w8k16r3s3u1p1d1g1 in float32 is wrong, and nothing is written: grad_weight" in result.output


def test_refused(tmp_path, monkeypatch):
    result = _run("--output", "/dev/null/file")
    assert result.exit_code == 2 and "output: got '/dev/null/file'" in " ".join(result.output.split())
    result = _run("--threads", "0")
    assert result.exit_code == 2 and "threads: got 0; accepted: 1 to" in " ".join(result.output.split())


@pytest.mark.parametrize(
    "in_force, density, noise, chosen",
    [
        (0.5, 0.6, 0.01, 0.6),
        (0.5, 0.6, 0.06, 0.5),
        (0.5, 0.519, 0.0, 0.5),
        (0.5, 0.4567, 0.0, 0.45),
        (0.04, 0.0, 0.0, 0.04),
        (0.3, 0.0, 0.0, 0.0),
        (0.9, 0.85, 0.0, 0.9),
        (0.7, 0.85, 0.0, 0.85),
        (0.5, None, 0.0, 0.5),
    ],
)
def test_what_chance_explains_is_left_as_it_is(in_force, density, noise, chosen):
    assert calibrate._choose(in_force, measurement.Found(density, noise)) == chosen
