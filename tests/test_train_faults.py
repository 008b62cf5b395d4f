# SPDX-License-Identifier: Apache-2.0
"""What may happen to a training run from outside: files of others in its folder, another run there, full disks."""

from __future__ import annotations

import fcntl
import io
import os
import socket
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from training import DRIVER, SMALL, refused, tiny, train  # noqa: F401

from sparsebwd import commands, data
from sparsebwd.data import records
from sparsebwd.train import checkpoint, lock


@pytest.fixture
def driver(tmp_path):
    """The command line of a program that trains the tiny model."""
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return [sys.executable, str(path)]


def program(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


# the folder


def test_only_own_temporary_files_are_deleted(tmp_path):
    mine = [
        ".mynotes.tmp",
        ".checkpoint.pt.tmp",
        ".notes.12.0123abcd.tmp",
        "log.json.12.0123abcd.tmp",
        ".log.json.1.0123abcd.tmp~",
    ]
    left = [".checkpoint.pt.12.0123abcd.tmp", ".log.json.1.deadbeef.tmp", ".epochs.csv.77.00000000.tmp"]
    for name in mine + left:
        (tmp_path / name).write_text("text")
    (tmp_path / ".log.json.2.deadbeef.tmp").mkdir()
    train(tmp_path, "--max-steps", "1")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*mine, ".log.json.2.deadbeef.tmp", "checkpoint.pt", "epochs.csv", "log.json", "steps.csv"}


@pytest.mark.parametrize("name", ["epochs.csv", "log.json"])
@pytest.mark.parametrize("option", [None, "--resume"])
def test_files_with_the_names_of_logs_are_not_replaced(tmp_path, capsys, name, option):
    (tmp_path / name).write_text("of somebody else")
    message = refused(capsys, *SMALL, "--output", str(tmp_path), *filter(None, [option]))
    assert f"{tmp_path} holds a run already ({name}): replace it with --overwrite" in message
    assert (tmp_path / name).read_text() == "of somebody else"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere/checkpoint.pt", path)])
def test_a_checkpoint_that_is_no_file_is_not_replaced(tmp_path, capsys, make):
    """A link to nothing may be one to a disk that is not mounted."""
    make(tmp_path / checkpoint.FILE)
    before = os.lstat(tmp_path / checkpoint.FILE)
    assert "holds a run already (checkpoint.pt): continue it" in refused(capsys, *SMALL, "--output", str(tmp_path))
    assert "got a link to nothing, or what is no file" in refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    assert os.path.samestat(before, os.lstat(tmp_path / checkpoint.FILE))


def test_a_folder_in_use_is_refused_by_name(tmp_path, capsys):
    train(tmp_path, "--max-steps", "1")
    leftover = tmp_path / ".log.json.1.deadbeef.tmp"  # which the other one may be writing
    leftover.write_text("")
    before = (tmp_path / checkpoint.FILE).read_bytes()
    with lock.locked(tmp_path):
        for option in ("--resume", "--overwrite"):
            message = refused(capsys, *SMALL, "--output", str(tmp_path), option)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            assert f"output: {tmp_path} is in use by {holder}: name another folder" in message
    assert leftover.exists() and (tmp_path / checkpoint.FILE).read_bytes() == before
    assert not (tmp_path / lock.FILE).exists()
    train(tmp_path, "--resume")
    assert not leftover.exists()


@pytest.mark.slow
def test_the_lock_goes_with_its_process(tmp_path):
    code = f"""
        from pathlib import Path
        from sparsebwd.train.lock import locked
        with locked(Path({str(tmp_path)!r})):
            print("held", flush=True)
            input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(lock.LockedError, match=f"in use by process {process.pid} on "), lock.locked(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / lock.FILE).exists()
    with lock.locked(tmp_path):
        pass
    assert not (tmp_path / lock.FILE).exists()


def test_a_lock_whose_file_was_deleted_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Its holder deletes it between our open and our lock: a third process would make, and lock, another file."""
    flock, calls = fcntl.flock, []

    def deleted_first(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / lock.FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", deleted_first)
    with lock.locked(tmp_path):
        assert len(calls) == 2
        with pytest.raises(lock.LockedError), lock.locked(tmp_path):
            pass


def test_where_files_cannot_be_locked_a_run_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(tmp_path, "--max-steps", "1")


# full disks


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4096, 20_000], ids=["at once", "after some steps"])
def test_full_disk_in_one_line(tmp_path, driver, limit):
    """A limit on the size of files stands in for the size of the disk: the system call fails at the same place."""
    script = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    script += (
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import runpy, sys; sys.argv = sys.argv[1:]; "
    )
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    output = tmp_path / "run"
    result = program([sys.executable, "-c", script, driver[1], *SMALL, "--output", str(output), "--max-steps", "1"])
    assert result.returncode == 1
    assert result.stderr == f"error: {output / checkpoint.FILE}: File too large\n"
    assert {path.name for path in output.iterdir()} <= {"epochs.csv", "log.json", "checkpoint.pt", "steps.csv"}


@pytest.mark.parametrize(
    "write", [partial(records.save_record, record={"a": torch.zeros(9999)}), partial(data.write_text, text="x")]
)
def test_writes_name_their_file(tmp_path, monkeypatch, write):
    """Those that fail where the system knows of no name."""
    path = tmp_path / "file"
    path.write_text("before")

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda name, mode="r", *_, **__: Full(name, mode.replace("b", "")))
    monkeypatch.setattr(
        io, "open", lambda name, mode="r", *_, **__: io.TextIOWrapper(io.BufferedWriter(Full(name, mode)))
    )
    with pytest.raises(OSError) as caught:
        write(path)
    monkeypatch.undo()
    assert commands.describe(caught.value) == f"{path}: No space left on device"
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)], ids=["pipe", "link to a device"])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    path = tmp_path / "out"
    make(path)
    for write in (partial(records.save_record, record={"a": 1}), partial(data.write_text, text="x")):
        with pytest.raises(OSError) as caught:
            write(path)
        assert commands.describe(caught.value) == f"{path}: it is no regular file, and is not replaced"
        assert os.listdir(tmp_path) == ["out"] and not path.is_file()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_output_that_cannot_be_printed(tmp_path, driver):
    with open("/dev/full", "w") as full:
        command = [*driver, *SMALL, "--output", str(tmp_path / "run"), "--max-steps", "1"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "error: standard output: No space left on device\n")
