# SPDX-License-Identifier: Apache-2.0
"""The part that builds the package for the GPU at hand."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import time
from typing import Any

from . import machine
from .machine import Failed, checked, require, say
from .record import Check

_OLDEST_SETUPTOOLS = 77  # that pyproject.toml asks for


def build(check: Check) -> dict[str, Any]:
    start = time.monotonic()
    how: dict[str, Any] = {"prebuilt": False}
    try:
        _compile(check)
    except Failed as error:
        if check.prebuilt is None:
            raise
        say(f"  {error}\n  in its place: {check.prebuilt}")
        shutil.rmtree(machine.SITE, ignore_errors=True)
        shutil.copytree(check.prebuilt, machine.SITE)
        how = {"prebuilt": True, "why": str(error).partition("\n")[0]}
    said = checked([sys.executable, "-m", "sparsebwd.info", "--json"], machine.WORK / "info.log", 120)
    info, _ = json.JSONDecoder().raw_decode(said, said.index("\n{") + 1)  # warnings may stand around it
    check.record["environment"] |= info
    reason = info["backends"]["cuda"]
    if reason is not None:
        raise Failed(f"it was built, but the backend 'cuda' does not run: {reason}")
    return {"seconds": round(time.monotonic() - start), **how}


def _compile(check: Check) -> None:
    require(["pip", "setuptools", "ninja", "numpy", "rich", "typer"], [os.environ.get("CXX", "c++").split()[0]])
    version = importlib.metadata.version("setuptools")
    if int(version.partition(".")[0]) < _OLDEST_SETUPTOOLS:
        raise Failed(f"setuptools {version} is older than {_OLDEST_SETUPTOOLS}")
    environment = {"SPARSEBWD_CUDA": "1"}
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # setup.py takes the architecture of the GPU here
    checked(build_command(), machine.WORK / "build.log", 60 * check.minutes, environment=environment)


def build_command() -> list[object]:
    return [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target",
        machine.SITE, machine.ROOT,
    ]  # fmt: skip
