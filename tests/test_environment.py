# SPDX-License-Identifier: Apache-2.0
"""What the environment of a process may do to the commands: one line naming the variable, and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from training import DRIVER, SMALL, refused, tiny  # noqa: F401

from sparsebwd.backends import available_backends
from sparsebwd.data.dataset import DataError
from sparsebwd.data.imagefolder import default_cache_dir

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"MASTER_ADDR": None}, "RANK: got '0', but MASTER_ADDR is not set; accepted are all of RANK, WORLD_SIZE"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "but MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": None}, "RANK: got '0', but WORLD_SIZE is not set; accepted are all of RANK, WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE: got '1', but RANK is not set; accepted are all of RANK, WORLD_SIZE"),
        ({"RANK": "first"}, "RANK: got 'first'; accepted: integers from 0"),
        ({"RANK": "1"}, "RANK: got 1; accepted: 0 to 0, below WORLD_SIZE"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'; accepted: integers from 0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT: got 'http'; accepted: integers from 0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: got 'x'; accepted: integers from 0"),
    ],
)
def test_incomplete_launches(tmp_path, monkeypatch, capsys, changed, message):
    for name, value in {**LAUNCHED, **changed}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    shown = refused(capsys, *SMALL, "--output", str(tmp_path / "run"))
    assert message in shown.splitlines()[-1]
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()


def test_no_home(monkeypatch):
    """Of a user without an entry in the password file, as in containers."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(DataError, match="cache_dir: got none, and there is no home directory for it .*: name a folder"):
        default_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(default_cache_dir()) == "/cache/sparsebwd"


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in available_backends(), reason="the cpu backend is not built")
def test_unknown_instruction_set(tmp_path):
    """It is read once, so by processes of their own."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    environment = {**os.environ, "SPARSEBWD_MAX_ISA": "foo"}
    command = [sys.executable, str(driver), *SMALL, "--output", str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert "error: SPARSEBWD_MAX_ISA: got 'foo', accepted are baseline" in result.stderr.splitlines()[-1]
