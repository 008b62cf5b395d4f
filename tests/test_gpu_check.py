# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check as far as it goes without a GPU: plans, commands, limits, what is made of results."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path

import gpu_workload
import pytest
import torch
from benching import CudaOnCpu
from gpu_check import __main__ as command
from gpu_check import bench as benching
from gpu_check import build as building
from gpu_check import counters, machine, record, report, sanitizer, tiers, units
from gpu_check import steps as whole_steps
from gpu_check import tests as testing
from test_bench_reports import make_row
from typer.testing import CliRunner

from sparsebwd.bench import cli, devices, suites

ROOT = Path(__file__).resolve().parent.parent

GPU = {"name": "Some GPU 80GB", "capability": "9.0", "memory_bytes": 80 * 2**30, "devices": 1, "torch": "2.11.0",
       "cuda": "13.0", "cudnn": 91000, "shared_bytes": 30_000_000}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "WORK", tmp_path / "work")
    monkeypatch.setattr(machine, "SITE", tmp_path / "site")
    monkeypatch.setattr(record, "clocks", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(benching, "clocks", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(record, "nvcc_release", lambda: "13.0")
    monkeypatch.setattr(machine, "find_gpu", lambda: dict(GPU))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the command adds to it
    (tmp_path / "work").mkdir()


# ---- plans


def test_units_are_the_layers_of_the_network_but_the_first():
    for suite, gmacs in units.GMACS.items():
        first, *others = suites.load(suite, 1)
        assert (first.name, [layer.name for layer in others]) == ("stem.0", units.STAGES)
        assert sum(layer.problem.macs for layer in others) == pytest.approx(gmacs * 1e9, rel=1e-3)


@pytest.mark.parametrize("unit", units.UNITS, ids=lambda unit: unit.title)
def test_benchmark_understands_the_commands(unit, tmp_path, monkeypatch):
    """Nothing is measured: rows are asked for, and there are none."""
    monkeypatch.setitem(devices.DEVICES, "cuda", CudaOnCpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "peaks", lambda plan: {"peak_gflops": {}})
    monkeypatch.setattr(cli, "run", lambda *_: iter(()))
    command = [str(word) for word in unit.command(5, 2, 7.5, tmp_path / "rows.json")]
    arguments = [word.replace("cuda", "dense") if word.startswith("cuda,") else word for word in command[3:]]
    arguments = [word if place == 0 or arguments[place - 1] != "--backend" else word.replace("cuda", "dense")
                 for place, word in enumerate(arguments)]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    # "prune" has a row of plain PyTorch operations beside each.
    of_torch = len(unit.layers) * len(unit.modes) if "prune" in unit.operations else 0
    assert f"{unit.rows + of_torch} rows, 5 samples each" in result.output


def test_samples_and_units_are_what_fits():
    every = units.UNITS
    assert units.choose_batch(60, 80 * 2**30) == 256
    assert units.choose_batch(60, 10 * 2**30) == 128  # memory
    assert units.choose_batch(0.1, 80 * 2**30) == units.BATCHES[-1]
    plenty = 1.01 * sum(unit.seconds(15, 256) for unit in every)
    assert units.choose_repeats(every, 256, plenty) == 15
    assert units.choose_repeats(every, 256, plenty, scale=2.0) < 15
    assert units.choose_repeats(every, 256, plenty / 3) == units.REPEATS[-1]
    assert units.choose_repeats(every, 256, units.LEAST_SECONDS - 1) is None
    # One alone may take all that is left.
    assert units.choose_repeats(every[-2:-1], 256, 1.01 * every[-2].seconds(15, 256)) == 15


def test_plan_of_the_whole(capsys):
    assert command.main(["--dry-run", "--minutes", "24"]) == 0
    said = capsys.readouterr().out
    for name, _ in tiers.TIERS["full"].parts:
        assert f"== {name}, at most 4.0 minutes" in said
    for unit in units.UNITS:
        assert said.count(unit.title + "\n") == 1
    assert "pip install" in said and "pytest -q -m gpu" in said and "--tool racecheck" in said and "ncu " in said
    minutes = [float(text) for text in re.findall(r"about ([\d.]+) minutes", said)]
    assert 0 < sum(minutes) <= 4.5 and "left out: resnet18-cifar" in said
    assert command.main(["--dry-run", "--parts", "tests"]) == 0
    assert "bench" not in capsys.readouterr().out


def test_plan_of_the_first_minutes(capsys):
    """What is most worth knowing fits, on an H100, at the batch that the bars are for."""
    assert command.main(["--dry-run", "--tier", "first"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^== ([\w-]+), at most", said, re.MULTILINE) == [
        "build", "smoke", "first-bench", "steps", "counters", "other-tests", "sanitizer",
    ]  # fmt: skip
    assert "Batch 256" in said and "left out" not in said and "-m 'gpu and smoke'" in said and "'gpu and not smoke'" in said
    assert "--pattern iid,skewed" in said and said.count(" step --device cuda ") == len(whole_steps.STEPS)
    limits = dict(tiers.TIERS["first"].parts)
    assert sum(limits[name] for name in ("build", "smoke", "first-bench", "steps", "counters")) < tiers.TIERS["first"].minutes


@pytest.mark.parametrize("step", whole_steps.STEPS, ids=lambda step: step.title)
def test_benchmark_of_steps_understands_the_commands(step, tmp_path, monkeypatch):
    """Up to where it looks for the GPU."""
    result = CliRunner().invoke(cli.app, [str(word) for word in step.command(tmp_path / "step.json")[3:]])
    assert result.exit_code == 2 and "PyTorch finds no CUDA device here" in " ".join(result.output.split())


def test_bad_arguments(tmp_path, capsys):
    for arguments, words in (
        (["--minutes", "0"], "--minutes: got 0.0, accepted are numbers above 0"),
        (["--prebuilt", str(tmp_path)], "has no sparsebwd/_C_cuda*.so"),
        (["--tier", "some"], "invalid choice: 'some'"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2 and words in capsys.readouterr().err


SMOKE_PLUGIN = """
from sparsebwd.backends import get_backend
type(get_backend("cuda")).available = lambda self: None  # for collecting only
"""


def test_smoke_is_some_sixty_tests_of_all_kernels(tmp_path):
    (tmp_path / "pretended.py").write_text(SMOKE_PLUGIN)
    words = [*map(str, testing.tests_command(tmp_path / "report.xml", testing.SMOKE)), "--collect-only", "-p", "pretended"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert 40 <= len(names) <= 80, done.stdout + done.stderr
    for words in ("r3s3p1", "r3s3u2p1", "r1s1", "f32", "bf16", "f16", "nhwc", "captured", "predicted", "stream"):
        assert any(words in name for name in names), words


def test_no_gpu_is_said_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    assert command.main(["--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "finds no NVIDIA GPU" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_target_without_a_gpu():
    done = subprocess.run(["make", "-s", "gpu-check", f"PYTHON={sys.executable}", "PARTS=tests bench"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "gpu-check: PyTorch of" in done.stderr and done.stdout == ""


# ---- parts


def tier(monkeypatch, parts, limits=None) -> None:
    """The tier "full" is of these parts."""
    for place in (command, tiers):
        monkeypatch.setattr(place, "PARTS", parts)
    limits = limits or dict.fromkeys(parts, 8.0)
    monkeypatch.setitem(tiers.TIERS, "full", tiers.Tier(sum(limits.values()), tuple(limits.items())))


def failing(check):
    check.record["parts"]["tests"] = {"ran": 3, "failed": ["one"], "skipped": {"no second device": 2}}
    raise machine.Failed("1 of 3 tests failed: one")


def test_a_failing_part_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    parts = {"build": lambda check: {"seconds": 1}, "tests": failing, "sanitizer": lambda check: {"fine": True}}
    tier(monkeypatch, parts)
    assert command.main(["--output", str(tmp_path / "out")]) == 1
    assert "tests: FAILED: 1 of 3 tests failed: one" in capsys.readouterr().out
    _, path, text = sorted((tmp_path / "out").iterdir())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-some-gpu-80gb\.json", path.name) and text.name == path.stem + ".md"
    record = json.loads(path.read_text())
    assert record["results"] == {"build": "passed", "tests": "FAILED: 1 of 3 tests failed: one", "sanitizer": "passed"}
    assert "| tests | FAILED: 1 of 3 tests failed: one |" in text.read_text()
    assert "- 2 tests skipped (tests): no second device" in text.read_text()
    # Later on the same day, another part goes into the same files, and one that passes now has passed.
    tier(monkeypatch, parts | {"tests": lambda check: {"ran": 3, "failed": [], "skipped": {}}})
    assert command.main(["--parts", "tests", "--output", str(tmp_path / "out")]) == 0
    assert json.loads(path.read_text())["results"] == {"build": "passed", "tests": "passed", "sanitizer": "passed"}
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_parts_have_what_time_is_left(monkeypatch, tmp_path):
    """What one leaves is the next ones'; nothing begins when it is over."""
    clock, given = [0.0], {}
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])

    def part(name, seconds):
        def take(check):
            given[name] = check.minutes
            clock[0] += seconds
            return {}

        return take

    tier(
        monkeypatch,
        {name: part(name, seconds) for name, seconds in (("build", 30), ("smoke", 60), ("tests", 200), ("bench", 1))},
        {"build": 2.0, "smoke": 1.0, "tests": 4.0, "bench": 3.0},
    )
    monkeypatch.setitem(tiers.TIERS, "full", tiers.Tier(4.8, tiers.TIERS["full"].parts))
    assert command.main(["--output", str(tmp_path / "out")]) == 0
    assert given == {"build": 2.0, "smoke": 1.0, "tests": pytest.approx(3.3)}
    path = next((tmp_path / "out").glob("*.json"))
    results = json.loads(path.read_text())["results"]
    assert results == dict.fromkeys(given, "passed") | {"bench": "left out: the time was over"}


def test_logs_come_back_with_the_results(check):
    machine.run([sys.executable, "-c", "print('some words')"], machine.WORK / "some.log", 60)
    check.write()
    with tarfile.open(check.path.with_name(check.path.stem + "-logs.tar.gz")) as archive:
        assert b"some words" in archive.extractfile("some.log").read()


def test_prebuilt_modules_take_the_place_of_a_build_that_fails(check, monkeypatch, tmp_path, capsys):
    prebuilt = tmp_path / "modules"
    (prebuilt / "sparsebwd").mkdir(parents=True)
    (prebuilt / "sparsebwd" / "_C_cuda.abi3.so").touch()
    monkeypatch.setattr(building.importlib.metadata, "version", lambda name: "69.5.1")
    monkeypatch.setattr(building, "require", lambda *_: None)
    info = json.dumps({"backends": {"cuda": None}})
    monkeypatch.setattr(building, "checked", lambda command, log, seconds, **_: f"some warning\n{info}\n")
    assert not check.part("build", building.build)
    assert check.record["results"]["build"] == "FAILED: setuptools 69.5.1 is older than 77"
    check.prebuilt = prebuilt
    assert check.part("build", building.build)
    assert check.record["parts"]["build"] | {"seconds": 0} == {
        "seconds": 0, "prebuilt": True, "why": "setuptools 69.5.1 is older than 77",
    }  # fmt: skip
    assert (machine.SITE / "sparsebwd" / "_C_cuda.abi3.so").exists()


def test_whole_steps_go_into_the_record(check, monkeypatch):
    monkeypatch.setattr(whole_steps, "require", lambda *_: None)
    point = {"density": {"macs": 0.25}, "speedup": {"total": 1.5}} | {
        side: {"total_ms": 30.0 / number, "backward_ms": 20.0 / number} for number, side in ((1, "dense"), (1.5, "sparse"))
    }

    def run(command, log, limit):
        if "resnet50" not in command:
            Path(command[-1]).write_text(json.dumps({"points": [point]}))
        return subprocess.CompletedProcess(command, 0, "first\nout of memory\n")

    monkeypatch.setattr(whole_steps, "run", run)
    assert not check.part("steps", whole_steps.steps)
    assert "resnet50, 160x160, batch 64, strict: exit status 0 and no results" in check.record["results"]["steps"]
    assert [step["name"] for step in check.record["steps"]] == [
        f"resnet18, 32x32, batch 256, {mode}" for mode in ("strict", "bfloat16", "tf32")
    ]
    line = "| resnet18, 32x32, batch 256, tf32 | 0.25 | 30.00 | 20.00 | 20.00 | 13.33 | 1.50 |"
    assert line in check.path.with_suffix(".md").read_text().splitlines()


def test_parts_may_fail_in_any_way(monkeypatch, tmp_path, capsys):
    def broken(check):
        check.record["parts"]["counters"] = {"kernels": [{}]}  # the report cannot be written
        raise KeyError("what no one thought of")

    tier(monkeypatch, {"build": broken, "tests": lambda check: {"ran": 3}})
    assert command.main(["--output", str(tmp_path / "out")]) == 1
    assert "Traceback" in capsys.readouterr().out
    _, path, text = sorted((tmp_path / "out").iterdir())
    results = json.loads(path.read_text())["results"]
    assert results == {"build": "FAILED: KeyError: 'what no one thought of'", "tests": "passed"}
    assert "The report cannot be written" in text.read_text()


def test_tools_need_not_be_on_path(monkeypatch, tmp_path):
    tool = tmp_path / "cuda" / "bin" / "some-tool-of-cuda"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tier(monkeypatch, {"build": lambda check: machine.require([], [tool.name]) or {}})
    assert command.main(["--output", str(tmp_path / "out")]) == 0


def test_what_is_missing_is_named():
    with pytest.raises(machine.Failed, match="missing: the Python module no_such_module, the program no-such-program"):
        machine.require(["json", "no_such_module"], ["sh", "no-such-program"])


def held(path: Path) -> bool:
    """Whether a process has a lock on this file."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("show", [False, True])
def test_processes_have_a_limit(tmp_path, show, capfd):
    log = tmp_path / "log"
    done = machine.run([sys.executable, "-c", "print('out'); raise SystemExit(3)"], log, 60, show=show)
    assert done.returncode == 3 and "out" in log.read_text() and ("out" in capfd.readouterr().out) == show
    # A child and its child hold the lock for as long as one of them lives.
    lock = tmp_path / "lock"
    lock.touch()
    child = (
        "import fcntl, subprocess, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[file.fileno()])"
    )
    start = time.monotonic()
    with pytest.raises(machine.Failed, match="stopped after 0.0 minutes"):
        machine.run([sys.executable, "-c", child, lock], log, 1.0, show=show)
    assert time.monotonic() - start < 300  # the child would take 600
    deadline = time.monotonic() + 300
    while held(lock):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with pytest.raises(machine.Failed, match="(?s)exit status 1 .* ends in.*no luck"):
        machine.checked([sys.executable, "-c", "raise SystemExit('no luck')"], log, 60)


def test_outcomes_of_tests(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_skipped(x): pytest.skip('no device')\n"
    )
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_some.py"],
                   cwd=tmp_path, capture_output=True)  # fmt: skip
    found = testing.outcomes(tmp_path / "report.xml")
    assert (found["ran"], found["skipped"]) == (3, {"no device": 2})
    assert sorted(found["failed"]) == ["test_some::test_bad", "test_some::test_broken"]
    assert found["messages"]["test_some::test_bad"] == "assert False" and len(found["messages"]) == 2


@pytest.mark.slow
def test_tests_that_take_too_long_report_what_ran(check, monkeypatch, tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\n"
        "def test_bad(): assert False\n"
        "def test_slow(): time.sleep(600)\n"
    )  # fmt: skip
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(testing, "require", lambda *_: None)
    monkeypatch.setattr(testing, "tests_command", lambda report, which: [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini",
        f"--junitxml={report}", tmp_path / "test_slow.py",
    ])  # fmt: skip
    # It is interrupted after 15 seconds, and has as long as it takes to end.
    check.minutes = 5.0
    monkeypatch.setattr(machine, "_LAST_SECONDS", 285.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background
    try:
        assert not check.part("tests", testing.tests)
    finally:
        signal.signal(signal.SIGINT, before)
    found = check.record["parts"]["tests"]
    # The one that was interrupted counts as one that ran.
    assert found["ran"] == 2 and len(found["failed"]) == 1 and "1 of 2 tests failed" in check.record["results"]["tests"]
    assert "stopped after 5.0 minutes" in check.record["results"]["tests"]
    assert "test_bad: assert False" in check.path.with_suffix(".md").read_text()


NCU = '''==PROF== Connected to process 12
==PROF== Profiling "prune_kernel": 0%....100% - 30 passes
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","l1tex__t_sector_hit_rate.pct","launch__registers_per_thread","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio"
"","","","","ns","%","%","register/thread","inst","inst","inst","inst"
"0","12","void sparsebwd::cuda::<unnamed>::prune_kernel<float, 2>(Args<T1>)","(132, 1, 1)","41,250","81.5","3.25","40","0.5","1.5","7.25","0.1"
==PROF== Disconnected
'''


def test_counters_of_ncu():
    (kernel,) = counters.kernels_of(NCU)
    assert (kernel["us"], kernel["DRAM %"], kernel["L1 hit %"], kernel["registers"]) == (41.25, 81.5, 3.25, 40)
    assert kernel["FMA pipe %"] is None
    assert kernel["stalls"] == {"long_scoreboard": 7.25, "wait": 1.5, "barrier": 0.5}
    assert report._short(kernel["kernel"]) == "prune_kernel<float, 2>"
    assert counters.kernels_of("==ERROR== nothing\n") == []


@pytest.fixture
def check(tmp_path):
    return record.Check(tmp_path / "out", dict(GPU), 8.0)


@pytest.mark.parametrize("summary, status, clean", [
    ("========= ERROR SUMMARY: 0 errors", 0, True), ("========= ERROR SUMMARY: 2 errors", 9, False), ("Aborted", 0, False),
])  # fmt: skip
def test_sanitizer_results(check, monkeypatch, summary, status, clean):
    monkeypatch.setattr(sanitizer, "require", lambda *_: None)
    monkeypatch.setattr(sanitizer, "run", lambda command, *_, **__: subprocess.CompletedProcess(command, status, summary))
    assert check.part("sanitizer", sanitizer.sanitizer) == clean
    assert {tool: found["clean"] for tool, found in check.record["parts"]["sanitizer"].items()} == dict.fromkeys(
        ("memcheck", "racecheck"), clean
    )


def rows_of(unit, wrong: int = 0, speedup: float = 2.0) -> list[dict]:
    """What the benchmark would measure."""
    rows = []
    layers = {layer.name: layer for layer in suites.load(unit.suite, 256)}
    settings = [(None, 90.0)] if unit.pruning else [(density, None) for density in units.DENSITIES]
    for name in unit.layers:
        for op in unit.operations:
            for mode in unit.modes:
                for backend in unit.backends:
                    for density, percentile in settings:
                        row = make_row(
                            suite=unit.suite, layer=name, problem=str(layers[name].problem), op=op,
                            multiplicity=layers[name].multiplicity, density=density or 0.3, nominal_density=density,
                            percentile=percentile, dtype="bfloat16" if mode == "bfloat16" else "float32",
                            math=None if mode == "bfloat16" else mode, backend=backend, device="cuda", threads=None,
                            sparse_ms=1.0, dense_ms=speedup, speedup=speedup, rel_error=3e-7, dense_rel_error=2e-7,
                            bytes=3 * 4 * layers[name].problem.macs // 10**3,
                            error="off by one" if len(rows) < wrong else None,
                        )  # fmt: skip
                        rows.append(asdict(row))
    return rows


@pytest.fixture
def bench(check, monkeypatch):
    """Runs the part with a benchmark that takes no time; `seconds` of a clock pass with each unit."""
    clock = [0.0]
    monkeypatch.setattr(benching, "require", lambda *_: None)
    monkeypatch.setattr(benching.time, "monotonic", lambda: clock[0])
    environment = {"gpu": {"sm_mhz": "1980"}, "peak_gflops": {"float32": {"strict": 5e4}}, "copy_gbs": {"strict": 3e3}}

    def call(seconds: float, wrong: int = 0, rows: int | None = None, crashing: str = "") -> bool:
        def run(command, log, limit, **_):
            unit = next(unit for unit in units.UNITS if unit.command(0, 256)[6:13] == command[6:13]
                        and unit.command(0, 256)[14:18] == command[14:18] and matches(unit, command))  # fmt: skip
            clock[0] += seconds
            if unit.title != crashing:
                output = Path(command[command.index("--json") + 1])
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps({"environment": environment, "rows": rows_of(unit, wrong)[:rows]}))
            return subprocess.CompletedProcess(command, 0, "some last words\n")

        def matches(unit, command) -> bool:
            wanted = unit.command(0, 256)
            return all(command[command.index(name) + 1] == wanted[wanted.index(name) + 1]
                       for name in ("--dtype", "--backend", "--math") if name in wanted)  # fmt: skip

        monkeypatch.setattr(benching, "run", run)
        return check.part("bench", benching.bench)

    return call


@pytest.mark.slow
def test_bench_part_fills_the_record(check, bench):
    check.minutes = 60
    assert bench(30.0)
    found = check.record["parts"]["bench"]
    assert found["left_out"] == [] and [unit["name"] for unit in found["units"]] == [u.title for u in units.UNITS]
    assert len(check.record["rows"]) == sum(unit.rows for unit in units.UNITS)
    assert all(unit["repeats"] == 15 for unit in found["units"])
    # Measured again, rows take the place of the old ones.
    assert bench(30.0) and len(check.record["rows"]) == sum(unit.rows for unit in units.UNITS)
    assert json.loads(check.path.read_text())["rows"] == check.record["rows"]


def test_bench_part_says_what_it_left_out(check, bench, capsys):
    assert bench(70.0, rows=5)
    found = check.record["parts"]["bench"]
    assert len(found["units"]) == 7  # of 480 seconds
    assert f"{units.UNITS[0].title}: {units.UNITS[0].rows - 5} of {units.UNITS[0].rows} rows: the time was over" in (
        found["left_out"]
    )
    assert f"{units.UNITS[-1].title}: the time was over" in found["left_out"]
    assert f"left out: {units.UNITS[-1].title}" in capsys.readouterr().out
    assert f"- left out of the bench: {units.UNITS[-1].title}" in check.path.with_suffix(".md").read_text()


@pytest.mark.slow
def test_slow_units_are_followed_by_fewer_samples(check, bench):
    check.minutes = 14
    assert bench(60.0)
    repeats = [unit["repeats"] for unit in check.record["parts"]["bench"]["units"]]
    assert repeats[:2] == [units.REPEATS[0], units.REPEATS[-1]]


@pytest.mark.slow
def test_bench_part_fails_with_wrong_rows_and_crashes(check, bench):
    title = units.UNITS[2].title
    assert not bench(10.0, wrong=2, crashing=title)
    result = check.record["results"]["bench"]
    assert "2 rows are WRONG" in result and f"{title}: exit status 0 and no results" in result and "some last words" in result
    assert len(check.record["parts"]["bench"]["units"]) == len(units.UNITS) - 1
    assert check.path.with_suffix(".md").read_text().count("off by one") == 2 * (len(units.UNITS) - 1)


# ---- the report


@pytest.mark.slow
def test_report_answers_the_questions(check):
    rows = [row for unit in units.UNITS for row in rows_of(unit) if row["op"] != "agb+wgc"]
    for row in rows:
        if row["op"] == "prune":
            row["speedup"], row["dense_ms"] = 0.6, 0.6
        if row["op"] == "agb" and row["nominal_density"] == 0.01:
            row["sparse_ms"] = 0.1
        if row["layer"] == "stages.0.0.conv1" and row["op"] == "wgc" and row["nominal_density"] == 0.4:
            row["dense_ms"] = 10.0
    check.record["rows"] = rows
    check.record["parts"]["counters"] = {"kernels": counters.kernels_of(NCU)}
    text = report.report(check.record)
    lines = text.splitlines()
    # By hand: of the 19 convolutions 4 are stages.0.0.conv1. 2 of 1.0 ms each, 10 of 1.0 ms.
    by_hand = (4 * 10 + 15 * 2) / 19
    assert f"| strict | cuda | WGC | {by_hand:.2f} (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) | 2.00 (below) | 2.00 (below) |" in (
        lines
    )
    assert "| strict | cuda | AGB | 2.00 (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) | 2.00 (below) | 20.00 (world class) |" in (
        lines
    )
    assert "| strict | AGB | 1.6 / 1.9 | 1.6 / 2.1 | 1.7 / 2.6 | 2.5 / 3.6 | 4.5 / 6 | 12 / 15 |" in lines
    assert any(line.startswith("| tf32 | auto | AGB | 2.00 (world class)") for line in lines)
    assert any(line.startswith("| exact, beyond | 66% | 60% | 60% | 60% |") for line in lines)
    assert any(line.startswith("| predicted | 93% | 200% |") for line in lines)
    assert any(line.startswith("| strict | AGB | 3.0e-07 | 2.0e-07 | 1.50 |") for line in lines)
    assert any(line.startswith("| prune_kernel<float, 2> | 41.25 | 81.5 | - |") for line in lines)
    assert "compute capability 9.0, 80 GiB" in text and "clocks.sm 1980 MHz" in text
    assert any(line.startswith("| resnet18-imagenet | strict | cuda | backward | 10 | 0.30 | 2.00 |") for line in lines)


def test_time_in_which_nonzeros_are_found_is_taken_off(check):
    def rows(op: str, sparse_ms: float) -> list[dict]:
        unit = next(unit for unit in units.UNITS if op in unit.operations and "strict" in unit.modes)
        return [row | {"sparse_ms": sparse_ms, "dense_ms": 6.0} for row in rows_of(unit) if row["op"] == op]

    # Looking takes 1 ms, AGB 2 and WGC 3; in one call 6.
    check.record["rows"] = rows("agb", 3.0) + rows("wgc", 4.0)
    assert report.without_search(check.record, check.record["rows"]) == []
    assert "| strict | cuda | AGB | 2.00 (world class) |" in report.report(check.record)
    check.record["rows"] += rows("agb+wgc", 6.0)
    text = report.report(check.record)
    assert "| strict | cuda | AGB | 2.00 | 2.00 |" in text
    assert "| strict | cuda, non-zeros known | AGB | 3.00 (world class) | 3.00 (world class) |" in text
    assert "| strict | cuda, non-zeros known | WGC | 2.00 (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) |" in text
    assert "| strict | auto, non-zeros known" not in text


def test_report_of_layers_that_are_missing(check):
    unit = next(unit for unit in units.UNITS if unit.operations == ("agb", "wgc"))
    check.record["rows"] = [row for row in rows_of(unit) if row["layer"] != "stages.3.0.conv2"]
    assert "2.00 (world class), 9 of 10 layers" in report.report(check.record)


def test_report_of_the_first_minutes(check):
    """Rows of even and of skewed images apart, and what is lost between them."""
    for unit in units.FIRST_UNITS:
        for pattern in unit.patterns:
            for row in rows_of(unit, speedup=1.5 if pattern == "skewed" else 2.0):
                if row["nominal_density"] is None or row["nominal_density"] in unit.densities:
                    check.record["rows"].append(row | {"pattern": pattern})
    text = report.report(check.record)
    assert "| strict | cuda | AGB | - | 2.00 | - | 2.00 | - | - |" in text.splitlines()
    assert "| WGC | 0.1 | 2.00 | 1.50 | 25% |" in text.splitlines()


def test_report_of_nothing(check):
    assert report.report(check.record).startswith("# GPU check: Some GPU 80GB, ")


# ---- the workload of sanitizer and profiler


def test_workload_runs(monkeypatch, stats):
    """On the CPU, in the place of a GPU."""
    monkeypatch.setattr(gpu_workload, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_workload, "BACKEND", "dense")
    monkeypatch.setattr(gpu_workload, "LAYER", "n2c4h6w5k8r3s3p1")
    calls = []
    for name in ("synchronize", "profiler.start", "profiler.stop"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append((name, len(stats))))
    gpu_workload.layer()
    assert calls == [("synchronize", 2), ("profiler.start", 2), ("synchronize", 4), ("profiler.stop", 4)]
    stats.clear()
    gpu_workload.small()
    assert len(stats) == len(gpu_workload.SMALL) * 3 * 2 * 4
    assert {stat.problem.stride for stat in stats} == {(1, 1), (2, 2)} and {stat.problem.groups for stat in stats} == {1, 3}
