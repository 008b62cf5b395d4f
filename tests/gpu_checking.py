# SPDX-License-Identifier: Apache-2.0
"""What tests of tools/gpu_check share: a GPU that is none, and a check of it that leaves nothing behind."""

from __future__ import annotations

import os

import pytest
from gpu_check import bench as benching
from gpu_check import machine, record

GPU = {"name": "Some GPU 80GB", "capability": "9.0", "memory_bytes": 80 * 2**30, "devices": 1, "torch": "2.11.0",
       "cuda": "13.0", "cudnn": 91000, "shared_bytes": 30_000_000}  # fmt: skip


@pytest.fixture
def gpu_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "WORK", tmp_path / "work")
    monkeypatch.setattr(machine, "SITE", tmp_path / "site")
    monkeypatch.setattr(record, "clocks", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(benching, "clocks", lambda: {"clocks.sm": "1980 MHz"})
    monkeypatch.setattr(record, "nvcc_release", lambda: "13.0")
    monkeypatch.setattr(machine, "find_gpu", lambda: dict(GPU))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the command adds to it
    (tmp_path / "work").mkdir()


@pytest.fixture(name="check")
def check_fixture(tmp_path):
    return record.Check(tmp_path / "out", dict(GPU), 8.0)
