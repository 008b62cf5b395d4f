# SPDX-License-Identifier: Apache-2.0
"""One command for all: ``sparsebwd``, and ``python -m sparsebwd``."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import sparsebwd
import sparsebwd_command
from sparsebwd import commands
from sparsebwd_command import COMMANDS, app

SCRIPT = Path(sys.executable).with_name("sparsebwd")

PAGES = [(name,) for name in COMMANDS] + [("bench", name) for name in ("step", "capture", "overhead", "zoo", "plot", "noise")]


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, prog_name="sparsebwd", env={"COLUMNS": "80"})


@pytest.fixture(params=PAGES, ids=" ".join)
def page(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = invoke(*request.param, "--help")
    assert result.exit_code == 0
    return request.param, result.output


def test_help_names_the_command_and_fits_the_terminal(page):
    words, text = page
    assert text.lower().startswith(f"usage: sparsebwd {' '.join(words)} ")
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_options_have_the_same_names_everywhere(page):
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page[1]))
    assert not options & {"--batchsize", "--bs", "--images", "--dataset", "--datadir", "--folder", "--root", "--lr-rate"}
    if "--batch" in options:  # of recorded commands
        assert "--batch-size, --batch" in page[1]


def test_batch_size_and_data_dir_are_options_of_what_has_batches_and_data():
    for words, names in {
        ("train",): ("--batch-size", "--data-dir"),
        ("reproduce",): ("--data-dir",),
        ("bench",): ("--batch-size",),
        ("bench", "step"): ("--batch-size", "--data-dir"),
        ("bench", "noise"): ("--batch-size", "--data-dir"),
        ("profile",): ("--batch-size",),
        ("bench", "capture"): ("--batch-size", "--data-dir"),
        ("bench", "zoo"): ("--data-dir",),
    }.items():
        text = invoke(*words, "--help").output
        assert all(name in text for name in names), words


def test_help_lists_all_commands_whole():
    text = invoke("--help").output
    for name, (_, about) in COMMANDS.items():
        assert f"{name} " in text and about in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["--batch-size", "3"], "No such option: --batch-size"),
        (["train", "--epochs", "x"], "Invalid value for '--epochs'"),
        (["train", "--output", "--resume"], "Invalid value for '--output': got the option '--resume'; accepted: a value"),
        (["bench", "step", "--data-dir", "--json"], "Invalid value for '--data-dir': got the option '--json'"),
        (["train", "--momentum", "-1"], "momentum: got -1.0"),
        (["train", "--percentile", "30"], "percentile: got 30.0; accepted: 50 <= percentile < 100"),
        (["reproduce"], "Missing argument 'WHAT'"),
        (["reproduce", "table1", "--output", "--", "x"], "Invalid value for '--output': got the option '--'"),
        (["bench", "--density", "2"], "density: got '2'; accepted: 0 <= density <= 1"),
        (["bench", "step", "--percentile", "3"], "percentile: got 3.0"),
        (["info", "--jason"], "No such option: --jason"),
        (["calibrate", "--threads", "0"], "threads: got 0"),
        (["calibrate", "--output", "/dev/null"], "output: got '/dev/null'; it is no regular file, and is not replaced"),
        (["profile", "resnet18", "--json", "/dev/null"], "json: got '/dev/null'; it is no regular file, and is not replaced"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_with_status_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split()) and "Traceback" not in result.output


def test_arguments_arrive_as_they_are(monkeypatch):
    got = []

    def main(arguments, prog):
        got.append((arguments, prog))
        return 5

    monkeypatch.setattr(importlib.import_module("sparsebwd.train.cli"), "main", main)
    words = ["--model", "vgg16", "-x", "--flag=a b", "--", "--help", "rest", "--", "--version", ""]
    assert invoke("train", *words).exit_code == 5
    assert got == [(words, "sparsebwd train")]


def test_version():
    assert invoke("--version").output == f"{sparsebwd.__version__}\n"


def test_info_as_json():
    text = invoke("info", "--json").output
    assert text.startswith("{") and f'"sparsebwd": "{sparsebwd.__version__}"' in text


@pytest.mark.slow
def test_the_command_is_installed_and_its_help_loads_no_torch():
    script = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert script.returncode == 0 and script.stdout == invoke("--help").output
    loaded = "import sys, sparsebwd_command; print('torch' in sys.modules, 'sparsebwd' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "False False\n"
    module = subprocess.run([sys.executable, "-m", "sparsebwd", "info", "--help"], capture_output=True, text=True)
    assert module.stdout.startswith("Usage: python -m sparsebwd info")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["info"], ["bench", "--help"], ["train", "--help"], ["reproduce", "-h"]], ids=" ".join)
def test_output_that_cannot_be_written(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([SCRIPT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device\n")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["train", "--epochs", "x"], ["train", "--percentile", "30"], ["reproduce"]], ids=" ".join)
def test_what_is_wrong_has_status_2_where_it_cannot_be_said(arguments):
    with open("/dev/full", "w") as full:
        assert subprocess.run([SCRIPT, *arguments], stdout=subprocess.DEVNULL, stderr=full).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["info"], ["bench", "--help"], ["train", "--help"], ["reproduce", "-h"]], ids=" ".join)
def test_a_closed_pipe_ends_it_as_in_shells(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([SCRIPT, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_python_m_runs_each_command():
    for module, _ in sparsebwd_command.COMMANDS.values():
        assert callable(importlib.import_module(module).main), module


def _numbers():
    """(command, option) of all options that take one number."""
    for words in PAGES + [("calibrate",)]:
        module = importlib.import_module(COMMANDS[words[0]][0])
        command = typer.main.get_command(module.app)
        for word in words[1:]:
            command = command.commands[word]
        for parameter in command.params:
            if parameter.param_type_name == "option" and commands._accepted(parameter):
                yield words, parameter.opts[0]


def test_numbers_that_are_none_are_said_with_what_is_accepted():
    found = list(_numbers())
    assert len({words for words, _ in found}) > 8 and len(found) > 40
    values = itertools.cycle(("x", "1e", "", "2 3", "0x"))
    for (words, option), value in zip(found, values, strict=False):
        result = invoke(*words, option, value)
        line = result.stderr.splitlines()[-1]
        assert result.exit_code == 2 and re.search(f"got {value!r}; accepted: (integers|numbers)", line), (words, option, line)


@pytest.mark.parametrize(
    "words, option, value, message",
    [
        (("bench",), "--repeats", "2", "'--repeats': got '2'; accepted: integers from 3 to 2**63 - 1"),
        (("bench", "overhead"), "--layers", "-3", "'--layers': got '-3'; accepted: integers from 1 to 1000"),
        (("bench",), "--tolerance", "nan", "'--tolerance': got 'nan'; accepted: numbers from 0 to 2**63 - 1"),
        (("bench", "zoo"), "--learning-rate", "inf", "'--learning-rate': got 'inf'; accepted: numbers from 0 to 2**63 - 1"),
        (("bench", "capture"), "--max-size", "nan", "'--max-size': got 'nan'; accepted: numbers from 0 to 2**63 - 1"),
        (("profile", "resnet18"), "--batch-size", "9" * 20, "got '99999999999999999999'; accepted: integers from 1 to 2**63 - 1"),
        (("train",), "--epochs", "1.5", "'--epochs': got '1.5'; accepted: integers"),
        (("train",), "--epochs", "1e999", "'--epochs': got '1e999'; accepted: integers"),
    ],
)
def test_numbers_out_of_range(words, option, value, message):
    for arguments in ((option, value), (f"{option}={value}",)):
        result = invoke(*words, *arguments)
        assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("module", ["sparsebwd", "sparsebwd.info"])
def test_an_unknown_log_level_is_one_line(module):
    arguments = ["info"] if module == "sparsebwd" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env={**os.environ, "SPARSEBWD_LOG": "loud"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "error: SPARSEBWD_LOG: got 'loud'; accepted: debug, info, warning, error\n")
