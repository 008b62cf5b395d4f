# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the arguments of the benchmark, or with the machine, is one line."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from sparsebwd.bench.cli import app


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
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert option in result.output and message in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("module", ["info", "bench"])
def test_output_that_cannot_be_written(module):
    arguments = ["-h"] if module == "bench" else []
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", f"sparsebwd.{module}", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.slow
def test_plain_narrow_terminals():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "20", "TERM": "dumb"}
    for arguments in (["info"], ["bench", "-h"]):
        command = [sys.executable, "-m", f"sparsebwd.{arguments[0]}", *arguments[1:]]
        done = subprocess.run(command, capture_output=True, env=environment)
        assert done.returncode == 0 and done.stdout and not done.stderr
        done.stdout.decode("ascii")
