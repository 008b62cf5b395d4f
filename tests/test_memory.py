# SPDX-License-Identifier: Apache-2.0
"""sparsebwd.keep_memory(), in processes of their own, since it cannot be undone."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys

import pytest
from training import tiny, train  # noqa: F401  a fixture

from sparsebwd import keep_memory, memory
from sparsebwd.train import cli

FAULTS = """
import ctypes, resource, runpy, sys
if sys.argv[1] == "keep":
    keep_memory = runpy.run_path(sys.argv[2])["keep_memory"]  # alone: importing PyTorch takes seconds
    assert keep_memory() and keep_memory()
libc, size = ctypes.CDLL(None), 40_000_000  # above what glibc's threshold can become
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _glibc() -> bool:
    try:
        return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
    except (OSError, TypeError):
        return False


@pytest.mark.skipif(not _glibc(), reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again():
    faults = {}
    for what in ("keep", "default"):
        command = [sys.executable, "-c", FAULTS, what, memory.__file__]
        faults[what] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # 40 MB are 9766 pages of 4 KiB, or 20 of 2 MiB.
    assert faults["keep"] < faults["default"] / 10


class Libc:
    def __init__(self, result: int | None, is_glibc: bool = True) -> None:
        self.calls = []
        if is_glibc:
            self.gnu_get_libc_version = None
        if result is not None:
            self.mallopt = lambda *arguments: self.calls.append(arguments) or result


@pytest.mark.parametrize(
    "libc, reason",
    [
        (Libc(1, is_glibc=False), "the C library is not glibc"),
        (Libc(None), "the C library is not glibc"),
        (Libc(0), "mallopt refused"),
    ],
)
def test_elsewhere_it_says_so(libc, reason, monkeypatch, caplog):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    with caplog.at_level(logging.WARNING, "sparsebwd"):
        assert keep_memory() is False
    assert caplog.messages == [f"keep_memory: freed memory goes back to the system as before: {reason}"]


def test_no_library_to_load(monkeypatch, caplog):
    def refuse(name):
        raise OSError

    monkeypatch.setattr(memory.ctypes, "CDLL", refuse)
    assert keep_memory() is False and "not glibc" in caplog.text


def test_what_is_set(monkeypatch, caplog):
    libc = Libc(1)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    assert keep_memory() is True and keep_memory() is True
    assert set(libc.calls) == {(-4, 0), (-1, -1)} and not caplog.messages


def test_training_keeps_memory(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(cli, "keep_memory", lambda: calls.append(None))
    train(tmp_path, "--max-steps", "1", "--device", "cpu")
    assert len(calls) == 1
