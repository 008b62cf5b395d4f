# SPDX-License-Identifier: Apache-2.0
"""What the benchmark refuses, in one line: arguments, or what is wrong with the machine."""

from __future__ import annotations

import io
import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from benching import PROBLEM
from typer.testing import CliRunner

from sparsebwd.backends import DenseBackend, available_backends, choose_backend
from sparsebwd.bench import cli

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "cpu" in available_backends()
pytestmark = pytest.mark.usefixtures("small_bench")


@pytest.mark.parametrize(
    ("arguments", "option", "message"),
    [
        (["--threads", "100000"], "--threads", "threads: got 100000; accepted: 1 to"),
        (["--seed", str(2**64)], "--seed", "seed: got 18446744073709551616; accepted: 0 to"),
        (["--seed", "-1"], "--seed", "seed: got -1; accepted: 0 to"),
        (["step", "--seed", str(2**64)], "--seed", "seed: got 18446744073709551616"),
        (["zoo", "--threads", "0"], "--threads", "threads: got 0"),
        (["overhead", "--threads", "100000"], "--threads", "threads: got 100000"),
        (["--problem", "n900000c512h300w300k512r3s3"], "--problem", "problem: got n900000c512h300w300k512r3s3"),
        (["--suite", "resnet18-imagenet", "--batch-size", "999999"], "--batch-size", "batch_size: got n999999c"),
    ],
)
def test_arguments_out_of_range(arguments, option, message, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert option in result.output and message in " ".join(result.output.split())


def run_as_a_program(monkeypatch, stdout, module, *arguments) -> int:
    """python -m sparsebwd.MODULE, but within this process. Returns the exit status."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"sparsebwd.{module}", run_name="__main__")
    return ended.value.code or 0


COMMANDS = pytest.mark.parametrize("command", [["info"], ["bench", "-h"]], ids=" ".join)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@COMMANDS
def test_output_that_cannot_be_written(command, monkeypatch, capsys):
    with open("/dev/full", "w") as full:  # to close it would fail if there were still something to write
        assert run_as_a_program(monkeypatch, full, *command) == 1
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


@COMMANDS
def test_plain_narrow_terminals(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    printed = io.BytesIO()
    stdout = io.TextIOWrapper(printed, encoding="ascii")
    assert run_as_a_program(monkeypatch, stdout, *command) == 0
    stdout.flush()
    assert printed.getvalue() and not capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--suite", "resnet18-imagenet-5x5"], "resnet18 has no convolution of this kernel size"),
        (["--layer", "stem.1"], "layer: got 'stem.1'; accepted: stem.0, stages.0.0.conv1,"),
        (["--pattern", "blocks"], "pattern: got 'blocks'; accepted: iid, skewed, rows"),
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
        (["--op", "agb,dgrad"], "op: got 'dgrad'; accepted: prune, prune-predicted, prune-launches, prune+lists, agb, wgc, agb+wgc, backward"),
        (["--density", "1.5"], "density: got '1.5'; accepted: 0 <= density <= 1"),
        (["--density", "nan"], "density: got 'nan'"),
        (["--density", "half"], "density: got 'half'; accepted: a number"),
        (["--percentile", "100"], "percentile: got 100.0; accepted: 50 <= percentile < 100"),
        (["--dtype", "float64"], "dtype: got 'float64'; accepted: float32, bfloat16"),
        (["--layout", "nhwc"], "layout: got 'nhwc'; accepted: channels_last, contiguous"),
        (["--against", "worst"], "against: got 'worst'; accepted: best, same"),
        (["--backend", "gpu"], "backend: got 'gpu'; accepted: 'auto', 'reference', 'dense', 'triton', 'cpu'"),
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
