# SPDX-License-Identifier: Apache-2.0
"""A training run that was stopped, killed or ended by a signal goes on as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from training import (  # noqa: F401
    DRIVER,
    SMALL,
    assert_same_run,
    interrupt,
    saved_state,
    signals,
    tiny,
    train,
    without_times,
)

from sparsebwd import data
from sparsebwd.train import TrainConfig, checkpoint, cli, log, stop, trainer

# resuming


@pytest.mark.parametrize("stop", [2, 6, 8])
def test_resume_after_a_stop(tmp_path, stop):
    """Within the first epoch, between epochs, within the second."""
    train(tmp_path / "whole", "--compare")
    train(tmp_path / "parts", "--compare", "--max-steps", str(stop))
    rows = list(csv.DictReader(open(tmp_path / "parts" / log.CSV_FILE)))
    assert rows[-1]["complete"] == str(int(stop == 6)) and rows[-1]["global_step"] == str(stop)
    train(tmp_path / "parts", "--compare", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    records = [json.loads((tmp_path / name / log.JSON_FILE).read_text()) for name in ("whole", "parts")]
    assert without_times(records[0]["epochs"]) == without_times(records[1]["epochs"])


def test_resume_with_predicted_thresholds(tmp_path, capsys):
    """They depend on earlier steps, too."""
    options = ["--threshold", "predicted"]
    train(tmp_path / "whole", *options)
    assert "percentile 90 with predicted thresholds" in capsys.readouterr().out
    train(tmp_path / "parts", *options, "--max-steps", "5")
    train(tmp_path / "parts", *options, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    histories = [saved_state(tmp_path / name)["twins"]["sparse"]["sigma_histories"] for name in ("whole", "parts")]
    assert histories[0].keys() == {"0.sigma_history", "3.sigma_history"}
    for name, history in histories[0].items():
        assert history[0] == 12 and torch.equal(history, histories[1][name])


def test_resume_from_before_an_option_existed(tmp_path):
    config = TrainConfig()
    saved = asdict(config)
    del saved["threshold"]
    assert config.differences(saved) == []
    predicted = TrainConfig(threshold="predicted")
    assert predicted.differences(saved) == ["threshold is 'exact' in the checkpoint and 'predicted' here"]


def test_resume_of_a_finished_run(tmp_path, capsys):
    train(tmp_path)
    before = saved_state(tmp_path)
    train(tmp_path, "--resume")
    assert "resumed after step 12" in capsys.readouterr().out
    assert without_times(saved_state(tmp_path)["history"]) == without_times(before["history"])
    assert json.loads((tmp_path / log.JSON_FILE).read_text())["summary"]["global_step"] == 12


@pytest.mark.slow
def test_resume_killed(tmp_path):
    """SIGKILL at two arbitrary moments, found by watching the checkpoint; the rest of the run is as if uninterrupted."""
    arguments = [*SMALL, "--compare", "--epochs", "40", "--threads", "1"]
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), *arguments, "--checkpoint-steps", "1", "--output"]
    file = tmp_path / "killed" / checkpoint.FILE
    for saves, options in ((1, []), (10, ["--resume"])):
        process = subprocess.Popen([*command, str(tmp_path / "killed"), *options], stdout=subprocess.DEVNULL)
        try:
            seen = set()
            started = file.stat().st_mtime_ns if file.exists() else None
            deadline = time.monotonic() + 120
            while len(seen - {started}) < saves:
                assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
                if file.exists():
                    seen.add(file.stat().st_mtime_ns)
                time.sleep(0.0005)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == -signal.SIGKILL
    step = saved_state(tmp_path / "killed")["step"]
    assert 1 < step < 240
    rest = [*arguments[len(SMALL) :], "--max-steps", str(step + 8)]  # the end of an epoch is among them
    train(tmp_path / "killed", *rest, "--resume")
    train(tmp_path / "whole", *rest)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    files = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert files == ["checkpoint.pt", "epochs.csv", "log.json", "steps.csv"]


def test_resume_without_a_checkpoint_starts(tmp_path, capsys):
    train(tmp_path, "--resume", "--max-steps", "1")
    assert "no checkpoint in" in capsys.readouterr().out


# signals


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("number", "word"), [("SIGTERM", "terminated"), ("SIGINT", "interrupted"), ("SIGHUP", "hung up")]
)
def test_a_signal_in_the_first_epoch_leaves_what_can_be_resumed(tmp_path, monkeypatch, capsys, number, word):
    number = getattr(signal, number)
    before = signal.getsignal(number)
    train(tmp_path / "whole")
    batch = data.Batches.batch

    def signalled(self, epoch, index):
        if (epoch, index) == (0, 2):
            os.kill(os.getpid(), number)
        return batch(self, epoch, index)

    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "batch", signalled)
        assert cli.main([*SMALL, "--output", str(tmp_path / "parts")]) == 128 + number
    assert capsys.readouterr().err == f"{word}; the same command with --resume goes on from here\n"
    assert saved_state(tmp_path / "parts")["step"] == 3
    assert signal.getsignal(number) is before
    train(tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("signals")
def test_a_signal_in_the_test_of_an_epoch(tmp_path, monkeypatch):
    """The epoch is closed by the run that takes it up."""
    train(tmp_path / "whole")
    evaluate = trainer.Trainer._evaluate

    def signalled(self, twin):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, twin)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_evaluate", signalled)
        assert cli.main([*SMALL, "--output", str(tmp_path / "parts")]) == 143
    state = saved_state(tmp_path / "parts")
    assert state["step"] == 6 and state["history"] == []
    train(tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("signals")
def test_a_signal_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main([*SMALL, "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted before the first step\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("signals")
def test_a_second_signal_ends_the_run_at_once(tmp_path, monkeypatch, capsys):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(data.Batches, "batch", twice)
    assert cli.main([*SMALL, "--output", str(tmp_path)]) == 143
    assert capsys.readouterr().err == "terminated; the same command with --resume goes on from the last checkpoint\n"
    assert saved_state(tmp_path)["step"] == 0


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.Signals().handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_killed_at_its_first_step_can_be_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "batch", interrupt)
        assert cli.main([*SMALL, "--output", str(tmp_path / "parts")]) == 130
    assert json.loads((tmp_path / "parts" / "log.json").read_text())["epochs"] == []
    train(tmp_path / "parts", "--resume")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
