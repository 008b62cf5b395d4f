# SPDX-License-Identifier: Apache-2.0
"""The command that repeats the paper's tables: which runs, who makes them, and one small table from beginning to end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import write_classes
from rich.console import Console
from typer.main import get_command

from sparsebwd.data import cifar
from sparsebwd.reproduce import child, claims, cli, estimate, paper, runs, sweep, timing
from sparsebwd.train import cli as train_cli
from sparsebwd.train import log
from sparsebwd.train.lock import locked

SMALL = ["--recipe", "short", "--models", "resnet18", "--width", "8", "--seeds", "0"]


def planned(output, **changes):
    options = {
        "models": ["resnet18"],
        "kinds": ["dense", "90"],
        "seeds": [0],
        "estimators": ["corrected"],
        "recipe": "short",
        "data_set": "cifar10",
        "also": {},
        "data": "digits",
        "width": 8,
    }
    return runs.plan(output, **{**options, **changes})


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


# the runs


def test_names_say_what_a_run_is(tmp_path):
    made = planned(
        tmp_path,
        kinds=["dense", "none", "99.5"],
        estimators=["corrected", "as_printed"],
        also={"threshold": "predicted", "batch_size": 64, "threads": 1},
        train_subset=500,
        epochs=2,
        seeds=[3],
    )
    start = "resnet18-cifar10-w8-short-e2-n500-"
    assert [run.name for run in made] == [
        f"{start}dense-batch_size=64-s3",
        f"{start}pnone-threshold=predicted-batch_size=64-s3",
        f"{start}p99.5-threshold=predicted-batch_size=64-s3",
        f"{start}p99.5-printed-threshold=predicted-batch_size=64-s3",
    ]
    assert [run.config.dense for run in made] == [True, False, False, False]
    assert [run.config.percentile for run in made[1:]] == [None, 99.5, 99.5]
    assert made[3].config.sigma_estimator == "as_printed" and made[3].config.threads == 1


def test_the_training_command_understands_a_run(tmp_path):
    """Its arguments give back its configuration, whatever the options are."""
    also = {"augment": False, "percentile": None, "max_steps": 7, "learning_rate": 0.5, "channels_last": False}
    for run in planned(tmp_path) + planned(tmp_path, also=also, recipe="paper-cifar"):
        options = train_cli.options_of(get_command(train_cli.app).make_context("train", run.arguments()))
        assert train_cli.config_of(options) == run.config
        assert options["output"] == str(run.folder)


@pytest.mark.parametrize("table", paper.TABLES)
def test_every_row_of_the_paper_is_planned(table, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "_rate", lambda: 1e9)
    assert cli.main([table, "--output", str(tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for model in paper.TABLES[table].rows:
        for kind in ("dense", "p85", "p90", "p95", "p99.5"):
            for seed in range(3):
                assert f"{model}-{paper.TABLES[table].data}-paper-{kind}-s{seed} " in shown
    assert f"{15 * len(paper.TABLES[table].rows)} runs" in shown and "roughly" in shown
    assert not list(tmp_path.iterdir())


def test_multiply_adds_are_those_of_the_published_network():
    work = estimate.multiply_adds("resnet18", "imagenet", None, 224)
    assert sum(work.values()) == pytest.approx(1.81e9, rel=0.01) and len(work) == 20
    assert sum(estimate.multiply_adds("resnet18", "imagenet", 32, 224).values()) < sum(work.values()) / 3


def test_wrong_arguments_are_refused(tmp_path, capsys):
    for arguments, text in (
        (["--percentiles", "101"], "accepted: numbers in [50, 100), none, dense"),
        (["--stale", "0"], "'--stale': got '0'; accepted: seconds from 1"),
        (["--stale", "nan"], "'--stale': got 'nan'; accepted: seconds from 1"),
        (["--timing-steps", "-1"], "'--timing-steps': got '-1'; accepted: integers from 0"),
        (["--epochs", "9" * 30], "'--epochs': got '999999999999999999999999999999'; accepted: integers from 1"),
        (["--seeds", "0", "-1"], "'--seeds': got '-1'; accepted: integers from 0 to 2**64 - 1"),
        (["--seeds", str(2**64)], "'--seeds': got '18446744073709551616'; accepted: integers from 0 to 2**64 - 1"),
        (["--also", "noise"], "KEY=VALUE"),
        (["--also", "batch_size=many"], "a number"),
        (["--also", "augment=1"], "true or false"),
        (["--also", "threshold=guessed"], "threshold"),
        (["--epochs", "0"], "integers from 1"),
        (["--models", "vgg"], "vgg"),
    ):
        assert text in refused(capsys, "table1", "--dry-run", "--output", str(tmp_path), *arguments)


def test_several_values_of_an_option(tmp_path, capsys):
    """Between spaces or commas, or by the option repeated; seeds as large as PyTorch's generators take."""
    command = ["table1", "--dry-run", "--output", str(tmp_path), "--models", "resnet18"]
    shown = []
    for words in (
        "--percentiles 90 dense --seeds 0 18446744073709551615",
        "--percentiles 90,dense --seeds=0,18446744073709551615",
        "--percentiles 90 --seeds 0 --percentiles=dense --seeds 18446744073709551615",
    ):
        assert cli.main([*command, *words.split()]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    for name in ("p90-s0", "dense-s0", "p90-s18446744073709551615", "dense-s18446744073709551615"):
        assert f"resnet18-cifar10-paper-{name}" in shown[0]


# claims


def test_one_of_many_gets_a_directory(tmp_path):
    taken = []
    barrier = threading.Barrier(8)

    def race():
        barrier.wait()
        taken.append(claims.take(tmp_path / "run"))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (claim for claim in taken if claim)
    assert f"process {os.getpid()}" in claims.holder(tmp_path / "run")
    winner.release()
    assert claims.holder(tmp_path / "run") is None and claims.take(tmp_path / "run")


def test_a_claim_without_heartbeat_is_taken_over(tmp_path):
    old = claims.take(tmp_path)
    old.path.write_text(old.text.replace(" ", "-elsewhere ", 1))  # a machine whose processes nobody here can see
    old.text = old.path.read_text()
    assert claims.take(tmp_path, stale=60) is None
    os.utime(old.path, (time.time() - 100,) * 2)
    assert old.beat() and claims.take(tmp_path, stale=60) is None
    os.utime(old.path, (time.time() - 100,) * 2)
    new = claims.take(tmp_path, stale=60)
    assert new and not old.beat()
    old.release()
    assert new.beat() and [path.name for path in tmp_path.iterdir()] == [claims.FILE]


def test_a_claim_of_a_dead_process_is_stale_at_once(tmp_path):
    claim = claims.take(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    claim.path.write_text(claim.text.replace(f" {os.getpid()} ", f" {dead.pid} "))
    assert claims.take(tmp_path, stale=1e6)


def test_a_fresh_claim_is_given_back(tmp_path, monkeypatch):
    """Two find the same stale claim; the slower one has the faster one's in its hands."""
    stale = claims.take(tmp_path)
    stale.path.write_text("elsewhere 1 stale\n")
    rename = os.rename

    def late(source, target):
        Path(source).write_text("elsewhere 2 fresh\n")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert claims.take(tmp_path, stale=-1) is None
    assert stale.path.read_text() == "elsewhere 2 fresh\n" and [path.name for path in tmp_path.iterdir()] == [
        claims.FILE
    ]


def test_who_lost_a_claim_hears_of_it(tmp_path):
    claim, lost = claims.take(tmp_path), threading.Event()
    with claims.kept(claim, lost.set, stale=0.1):
        assert not lost.wait(0.05)
        claim.path.write_text("somebody else\n")
        assert lost.wait(10)
    assert claim.path.read_text() == "somebody else\n"


# the sweep


def fake(run, summary=True, **changes):
    """The log of a run that is done."""
    run.folder.mkdir(parents=True, exist_ok=True)
    config = vars(replace(run.config, **changes))
    record = {"config": config, "data": {"train_images": 1540}, "epochs": [], "summary": {} if summary else None}
    (run.folder / log.JSON_FILE).write_text(json.dumps(record))


class Recorded(sweep.Sweep):
    """Notes what it would start, and does it in no time."""

    def __init__(self, planned, **options):
        super().__init__(planned, Console(quiet=True), **options)
        self.started, self.says = [], {}

    def _child(self, arguments, run, lost):
        self.started.append((arguments[0], run.name, arguments[-1]))
        if arguments[0] == "timing":
            (run.folder / timing.FILE).write_text("{}")
            return 0
        (run.folder / runs.OUTPUT_FILE).write_text(self.says.get(run.name, "well\n"))
        if run.name in self.says:
            return {"nothing\n": 0, "crash\n": -11}.get(self.says[run.name], 1)
        fake(run)
        (run.folder / "checkpoint.pt").touch()
        return 0


def test_what_is_done_is_kept_and_what_was_begun_goes_on(tmp_path):
    dense, pruned, begun = planned(tmp_path, kinds=["dense", "90", "95"])
    fake(dense)  # by the training command, say
    fake(begun, summary=False)
    (begun.folder / "checkpoint.pt").touch()
    first = Recorded([dense, pruned, begun])
    assert not first.run().failed
    assert first.started == [
        ("train", pruned.name, "--overwrite"),
        ("timing", pruned.name, "20"),
        ("train", begun.name, "--resume"),
        ("timing", begun.name, "20"),
    ]
    second = Recorded([dense, pruned, begun])
    assert not second.run().ran and not second.started
    again = Recorded([dense, pruned, begun])
    again.measure()
    assert [entry[:2] for entry in again.started] == [("timing", pruned.name), ("timing", begun.name)]


def test_what_others_made_is_timed_too(tmp_path):
    for run in planned(tmp_path, kinds=["dense", "90", "95"]):
        fake(replace(run, folder=tmp_path / f"by-hand-{run.config.percentile}{run.config.dense}"))
    fake(replace(run, folder=tmp_path / "both"), compare=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / log.JSON_FILE).write_text('{"config": {"unknown": 1}}')
    for folder in tmp_path.iterdir():
        (folder / "checkpoint.pt").touch()
    work = Recorded(runs.found(tmp_path))
    work.measure()
    assert [entry[:2] for entry in work.started] == [
        ("timing", "by-hand-90.0False"),
        ("timing", "by-hand-95.0False"),
    ]


def test_dense_at_equal_time_is_planned_from_the_times(tmp_path):
    made = planned(tmp_path, kinds=["dense", "90"], seeds=[0, 1, 2], epochs=10)
    assert runs.at_equal_time(made) == []
    (made[1].folder).mkdir()
    (made[1].folder / timing.FILE).write_text('{"speedup": {"step": 0.9}}')
    assert runs.at_equal_time(made) == []
    for run, speedup in zip([run for run in made if not run.config.dense], (1.2, 1.25, 1.6)):
        fake(run)
        (run.folder / timing.FILE).write_text(json.dumps({"speedup": {"step": speedup}}))
    equal = runs.at_equal_time(made)
    assert [run.name for run in equal] == [f"dense-as-resnet18-cifar10-w8-short-e10-p90-s{seed}" for seed in range(3)]
    steps = round(made[3].steps() / 1.25)
    assert [(run.config.dense, run.config.seed, run.steps()) for run in equal] == [
        (True, seed, steps) for seed in range(3)
    ]
    assert replace(equal[1].config, max_steps=None) == made[2].config
    fake(equal[0], max_steps=7)  # begun after other measurements
    assert [run.steps() for run in runs.at_equal_time(made)] == [7, steps, steps]
    (paper_run,) = planned(tmp_path, kinds=["90"], recipe="paper-cifar")
    paper_run.folder.mkdir()
    (paper_run.folder / timing.FILE).write_text('{"speedup": {"step": 1.5}}')
    (equal_paper,) = runs.at_equal_time([paper_run])
    assert (equal_paper.config.epochs, equal_paper.config.decay_epochs, equal_paper.config.max_steps) == (200, 67, None)


def test_runs_of_others_are_left_alone(tmp_path):
    claimed, locked_run, other, free = planned(tmp_path, kinds=["dense", "90", "95", "99.5"])
    claim = claims.take(claimed.folder)
    fake(other, epochs=3)
    work = Recorded([claimed, locked_run, other, free], wait=False)
    with locked(locked_run.folder):
        outcome = work.run()
    assert outcome.ran == [free.name]
    assert set(outcome.elsewhere) == {claimed.name, locked_run.name} and "in use" in outcome.elsewhere[locked_run.name]
    assert "epochs is 3 there and 15 here" in outcome.failed[other.name]
    claim.release()


def test_failures_end_nothing_and_what_is_not_finite_is_a_result(tmp_path):
    first, second, third, odd, crash = planned(tmp_path, kinds=["dense", "90", "95", "99.5", "none"])
    work = Recorded([first, second, third, odd, crash])
    work.says = {
        odd.name: "nothing\n",
        crash.name: "crash\n",
        first.name: "error: no space left on device\n",
        second.name: "error: the loss of the sparse model became nan in step 7: try\n",
    }
    outcome = work.run()
    assert outcome.failed == {
        first.name: "error: no space left on device",
        odd.name: "ended without results: nothing",
        crash.name: "ended by SIGSEGV: crash",
    }
    assert outcome.ran == [second.name, third.name]
    assert second.done() and not first.done()
    again = Recorded([first, second, third])
    again.run()
    assert again.started == [("train", first.name, "--overwrite")]


@pytest.mark.slow
def test_a_killed_sweep_leaves_a_checkpoint_and_no_process(tmp_path):
    """kill -9: the child notices, writes what it has, and ends; the run can be taken at once."""
    (run,) = planned(tmp_path, kinds=["90"], epochs=200, train_subset=128, test_subset=10)
    command = [sys.executable, "-m", "sparsebwd.reproduce", "table1", *SMALL, "--data", "digits", "--subset", "128"]
    command += ["--epochs", "200", "--percentiles", "90", "--output", str(tmp_path), "--also", "threads=1"]
    with open(tmp_path / "printed", "wb") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
    (found,) = [tmp_path / "resnet18-digits-w8-short-e200-n128-p90-s0"]
    run = replace(run, folder=found)
    deadline = time.monotonic() + 300
    while run.steps_done() < 3:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "printed").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    while (found / ".sparsebwd.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "terminated; the same command with --resume goes on from here" in (found / runs.OUTPUT_FILE).read_text()
    assert run.has_checkpoint() and not run.done() and claims.take(found)


@pytest.fixture
def inside(monkeypatch):
    """Runs are trained in this process, which saves the start of others."""

    def run_here(self, arguments, run, lost):
        with open(run.folder / runs.OUTPUT_FILE, "w") as output, redirect_stdout(output):
            return child.COMMANDS[arguments[0]](arguments[1:])

    monkeypatch.setattr(sweep.Sweep, "_child", run_here)


def test_cifar100_from_its_binary_files(tmp_path, capsys, monkeypatch, inside):
    """Made-up images."""
    small = replace(cifar.ARCHIVES["cifar100"], train_records=32, test_records=8)
    monkeypatch.setitem(cifar.ARCHIVES, "cifar100", small)
    folder = tmp_path / small.folder
    folder.mkdir()
    draws = np.random.default_rng(0)
    for file, count in ((small.train_files[0], 32), (small.test_file, 8)):
        records = draws.integers(0, 256, (count, 2 + 3072), dtype=np.uint8)
        records[:, :2] %= np.array((20, 100), np.uint8)
        (folder / file).write_bytes(records.tobytes())
    (folder / small.names_file).write_text("\n".join(f"class {number}" for number in range(100)))

    measure = timing.measure

    def twice_as_fast(*arguments):
        return {**(measured := measure(*arguments)), "speedup": {**measured["speedup"], "step": 2.0}}

    monkeypatch.setattr(timing, "measure", twice_as_fast)
    command = ["table2", *SMALL, "--epochs", "1", "--percentiles", "dense", "95", "--sigma-estimator", "as_printed"]
    command += ["--data-dir", str(folder), "--output", str(tmp_path / "out"), "--timing-steps", "2", "--equal-time"]
    assert cli.main([*command, "--also", "batch_size=8", "measure_every=2", "threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "Table 2: CIFAR-100" in shown and "76.44" in shown and "0.37" in shown
    assert (tmp_path / "out" / "dense-as-resnet18-cifar100-w8-short-e1-p95-printed-batch_size=8-s0").is_dir()
    record = json.loads((tmp_path / "out" / "table2.json").read_text())
    assert [(row["kind"], row["steps"], row["as_long_as"]) for row in record["rows"]] == [
        ("dense", 4, ""),
        ("95", 4, ""),
        ("dense", 2, "95"),
    ]
    assert "sigma_estimator=as_printed" in record["rows"][1]["settings"]


@pytest.mark.slow
def test_a_small_table_from_beginning_to_end(tmp_path, capsys, inside):
    """Images in folders, dense and pruned, timed, collected; a second call finds all of it done."""
    images = write_classes(
        tmp_path / "images", train=50, test=5, size=(32, 32), classes=[f"class{number}" for number in range(10)]
    )
    command = [
        "table1",
        *SMALL,
        "--data",
        "imagefolder",
        "--data-dir",
        str(images),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    command += ["--subset", "500", "--epochs", "1", "--percentiles", "dense", "90", "--output", str(tmp_path / "out")]
    command += ["--timing-steps", "4", "--also", "measure_every=2", "threads=1"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "95.04" in shown and "0.35" in shown and "Table 1: CIFAR-10" in shown
    with open(tmp_path / "out" / "table1.csv", newline="") as file:
        dense, pruned = csv.DictReader(file)
    assert (dense["kind"], pruned["kind"]) == ("dense", "90") and dense["runs"] == "1"
    assert 0 <= float(pruned["test_accuracy"]) <= 100 and float(pruned["paper_accuracy"]) == 95.04
    assert 0 < float(pruned["density"]) < 0.7 and 0 < float(pruned["weighted_density"]) < 0.7
    assert float(pruned["step_speedup"]) > 0 and float(pruned["backward_speedup"]) > 0
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert names == {f"table1.{end}" for end in ("csv", "json", "md")} | {"table1-time.png", "table1-time.svg"}
    folders = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    assert len(folders) == 2 and cli.main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    capsys.readouterr()
    assert cli.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(" done ") == 2


def test_noise_takes_the_place_of_percentiles(tmp_path):
    also = runs.parse_also(["noise=.1"])
    planned = runs.plan(tmp_path, ["resnet18"], ["dense", "90", "95"], [0], ["corrected"], "short", "cifar10", also)
    assert [run.config.noise for run in planned] == [None, 0.1]
    assert planned[0].config.dense and planned[1].config.percentile is None
    assert planned[1].name == "resnet18-cifar10-short-noise=0.1-s0"
