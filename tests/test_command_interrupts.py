# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while a command loads its modules: one line, exit status 130, no traceback. A torch that interrupts stands in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sparsebwd_command

SCRIPT = Path(sys.executable).with_name("sparsebwd")
_TORCH = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"


def run(folder, *command):
    """As from a terminal, also where the tests run in the background, with interrupts ignored."""
    (folder / "torch").mkdir(exist_ok=True)
    (folder / "torch" / "__init__.py").write_text(_TORCH)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=50,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "arguments",
    [("-m", "sparsebwd", "info"), *(("-m", module.removesuffix(".cli"), "--help") for module, _ in sparsebwd_command.COMMANDS.values())],
    ids=lambda arguments: arguments[1],
)
def test_modules_of_the_package(arguments, tmp_path):
    done = run(tmp_path, sys.executable, "-B", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_script(tmp_path):
    if not SCRIPT.exists():
        pytest.skip("the package is not installed")
    done = run(tmp_path, sys.executable, SCRIPT, "train")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_other_programs_keep_their_interrupts(tmp_path):
    """Also those whose package imports this one."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import sparsebwd\n")
    for arguments in (("-m", "other"), ("-c", "import sparsebwd")):
        done = run(tmp_path, sys.executable, "-B", *arguments)
        assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr


def test_interrupts_raise_where_a_command_runs():
    before = signal.getsignal(signal.SIGINT)
    try:
        for own, other in ((signal.default_int_handler, sparsebwd_command._end), (signal.SIG_IGN, signal.SIG_IGN)):
            signal.signal(signal.SIGINT, own)
            sparsebwd_command.interrupts_end()
            assert signal.getsignal(signal.SIGINT) is other
            sparsebwd_command.interrupts_raise()
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
