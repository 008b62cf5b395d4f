# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check as far as it goes without a GPU: plans, commands, limits."""

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
from pathlib import Path

import pytest
import torch
from benching import CudaOnCpu
from gpu_check import __main__ as command
from gpu_check import build as building
from gpu_check import machine, tiers, units
from gpu_check import steps as whole_steps
from gpu_check import tests as testing
from gpu_checking import check_fixture, gpu_that_is_none  # noqa: F401
from typer.testing import CliRunner

from sparsebwd.bench import cli, devices, pruning, suites

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("gpu_that_is_none")


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
    monkeypatch.setattr(pruning.PruneInLaunches, "devices", ("cpu",))
    command = [str(word) for word in unit.command(5, 2, 7.5, tmp_path / "rows.json")]
    arguments = [word.replace("cuda", "dense") if word.startswith("cuda,") else word for word in command[3:]]
    arguments = [word if place == 0 or arguments[place - 1] != "--backend" else re.sub("cuda|triton", "dense", word)
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


@pytest.mark.slow
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
    done = subprocess.run(["make", "-s", "gpu-check", f"PYTHON={sys.executable}", "PARTS=tests bench", "ARGS="], cwd=ROOT,
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


@pytest.mark.slow
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
    running = tmp_path / "running"
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\n"
        "def test_bad(): assert False\n"
        f"def test_slow(): pathlib.Path({str(running)!r}).touch(); time.sleep(600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(testing, "require", lambda *_: None)
    monkeypatch.setattr(testing, "tests_command", lambda report, which: [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini",
        f"--junitxml={report}", tmp_path / "test_slow.py",
    ])  # fmt: skip
    # It is interrupted when its time is over but for the last 285 seconds, in which it can end however slow the machine is.
    check.minutes = 5.0
    monkeypatch.setattr(machine, "_LAST_SECONDS", 285.0)

    class Impatient(subprocess.Popen):
        """The first 15 seconds are over as soon as the second test runs."""

        def wait(self, timeout=None):
            while timeout == 15.0 and self.poll() is None:
                if running.exists():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.01)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Impatient)
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
