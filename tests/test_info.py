# SPDX-License-Identifier: Apache-2.0
"""info() and ``python -m sparsebwd.info``."""

from __future__ import annotations

import importlib
import json
import platform
import re
import subprocess
import sys

import pytest
import torch

import sparsebwd
from sparsebwd import backends
from sparsebwd.backends import break_even

info_module = importlib.import_module("sparsebwd.info")


def run(*program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", *program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def elsewhere() -> tuple[dict, str]:
    """What a process that starts now finds, and how it says it."""
    found, _, text = run("-c", "import json, sparsebwd; i = sparsebwd.info(); print(json.dumps(i)); print(i)").partition("\n")
    return json.loads(found), text


def test_says_what_runs_and_why_the_rest_does_not(monkeypatch):
    monkeypatch.setattr(backends.DenseBackend, "available", lambda self: "it is switched off")
    found = sparsebwd.info()
    assert (found["sparsebwd"], found["torch"]) == (sparsebwd.__version__, torch.__version__)
    assert found["python"] == platform.python_version()
    assert list(found["backends"]) == list(backends.registered_backends())
    assert found["backends"]["reference"] is None
    assert found["backends"]["dense"] == "it is switched off"
    assert "backend reference  runs\n" in str(found)
    assert "backend dense      does not run: it is switched off\n" in f"{found}\n"


def test_cpu():
    cpu = sparsebwd.info()["cpu"]
    assert cpu["name"] and cpu["cores"] >= 1 and cpu["threads"] == torch.get_num_threads()
    assert cpu["isa"]["in_use"] in cpu["isa"]["supported"]
    assert cpu["isa"]["supported"][0] == "baseline"


@pytest.mark.slow
def test_instruction_set_limit(monkeypatch):
    monkeypatch.setenv("SPARSEBWD_MAX_ISA", "baseline")
    found, text = elsewhere()
    assert found["cpu"]["isa"]["in_use"] == found["cpu"]["isa"]["limit"] == "baseline"
    assert "SPARSEBWD_MAX_ISA=baseline" in text


@pytest.mark.slow
def test_unknown_instruction_set_is_a_reason(monkeypatch):
    monkeypatch.setenv("SPARSEBWD_MAX_ISA", "sse9")
    found, _ = elsewhere()
    assert found["cpu"]["isa"]["in_use"] is None and found["cpu"]["break_even"] is None
    assert "SPARSEBWD_MAX_ISA: got 'sse9', accepted are baseline" in found["backends"]["cpu"]


@pytest.mark.slow
def test_low_precision_without_instructions(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found, text = elsewhere()
    assert found["cpu"]["dense"] == {"bfloat16": False, "float16": False}
    assert "no kernels for bfloat16 and float16 convolutions on this CPU" in text


def test_low_precision_with_instructions(monkeypatch):
    monkeypatch.setattr(info_module, "is_native", lambda dtype: dtype == torch.bfloat16)
    found = sparsebwd.info()
    assert found["cpu"]["dense"] == {"bfloat16": True, "float16": False}
    assert "no kernels for float16 convolutions" in str(found)
    monkeypatch.setattr(info_module, "is_native", lambda dtype: True)
    assert "convolutions on this CPU" not in str(sparsebwd.info())


def test_break_even_densities_in_force(monkeypatch):
    limits = {"kernel": break_even.BreakEven(0.5, 0.85), "1x1": break_even.BreakEven(0.0, 0.45)}
    table = break_even.Table("a CPU", "measured", limits, {"kernel": break_even.BreakEven(0.25, 0.4)})
    monkeypatch.setattr(break_even, "tables", lambda: {torch.float32: table})
    found = sparsebwd.info()
    assert found["cpu"]["break_even"] == {
        "float32": {
            "name": "a CPU",
            "origin": "measured",
            "channels_last": {"kernel": [0.5, 0.85], "1x1": [0.0, 0.45]},
            "contiguous": {"kernel": [0.25, 0.4]},
        }
    }
    line = "up to these densities, AGB, WGC (a CPU): kernel 0.5, 0.85; 1x1 0, 0.45\n"
    assert line in str(found) and "float32: sparse " in str(found)


def test_cuda_kernels():
    found = sparsebwd.info()
    cuda, reason = found["cuda"], found["backends"]["cuda"]
    if cuda["not_loaded"]:
        assert reason == cuda["not_loaded"] and cuda["architectures"] == []
        assert f"CUDA kernels       none: {reason}\n" in str(found)
    else:
        assert f"CUDA kernels       for {cuda['architectures'][0]}" in str(found)
        assert re.fullmatch(r"1\d\.\d", cuda["version"])
    if torch.version.cuda is None:
        assert reason.startswith("this build of sparsebwd has no CUDA kernels: ")
    elif not torch.cuda.is_available():
        assert reason == "PyTorch finds no CUDA device" or cuda["not_loaded"]


def test_gpus():
    found = sparsebwd.info()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert (found["no_gpu"] is None) == bool(found["gpus"])


@pytest.mark.slow
def test_command_line_prints_the_same():
    found = sparsebwd.info()
    assert json.loads(run("-m", "sparsebwd.info", "--json")) == found
    assert run("-m", "sparsebwd.info") == f"{found}\n"
