# SPDX-License-Identifier: Apache-2.0
"""Where the cuda backend runs, and how setup.py decides to build it. That it compiles: test_cuda_compile.py."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

import sparsebwd
from sparsebwd import SparseConv2d, backends
from sparsebwd.backends import cuda

ROOT = Path(__file__).resolve().parent.parent


# ---- what runs where


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["8.0", "9.0a", "10.0+PTX"], (12, 0), True),
        (["10.0+PTX"], (8, 0), False),
    ],
)
def test_code_for_architectures_runs_on_devices(architectures, capability, runs):
    assert cuda.covers(architectures, capability) == runs


def test_each_device_needs_code_of_its_own(monkeypatch):
    capabilities = [(9, 0), (8, 6)]
    monkeypatch.setattr(cuda, "why_not_loaded", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    backend = cuda.CudaBackend()
    backend.operators = SimpleNamespace(build=lambda: ("9.0a 10.0+PTX", 13000, 13000))
    assert backend.available().startswith(
        "device 1 has compute capability 8.6, the kernels are built for 9.0a 10.0+PTX;"
    )
    capabilities.pop()
    assert backend.available() is None
    capabilities.clear()
    assert backend.available() == "PyTorch finds no CUDA device"


def test_module_that_does_not_load_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, "sparsebwd._C_cuda", None)
    monkeypatch.delattr(sparsebwd, "_C_cuda", raising=False)  # there where it was loaded before
    assert cuda.load().startswith("the native module sparsebwd._C_cuda cannot be loaded: ")


def test_cuda_is_refused_where_it_cannot_run(generator):
    backend = backends.get_backend("cuda")
    assert backend.can_run(None, "cuda", torch.float16) is None
    assert backend.can_run(None, "cpu", torch.float32) == "the device is cpu, not cuda"
    assert backend.can_run(None, "cuda", torch.float64) == "torch.float64 is not float32, bfloat16 or float16"
    if backend.available() is not None:
        layer = SparseConv2d(4, 4, 3, backend="cuda")
        with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run .*(no CUDA|cannot be loaded)"):
            layer(torch.ones(1, 4, 5, 5, requires_grad=True))


# ---- the build


@pytest.fixture
def setup_py(monkeypatch):
    """Runs setup.py, which then installs nothing; returns its names."""
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PATH", os.environ.get("PATH", os.defpath))
    for name in ("SPARSEBWD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return lambda: runpy.run_path(str(ROOT / "setup.py"))


def test_build_without_cuda_says_why(setup_py, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"PyTorch {torch.__version__} is built without CUDA"
    assert setup_py()["CUDA"] == reason
    monkeypatch.setenv("SPARSEBWD_CUDA", "1")
    with pytest.raises(SystemExit, match="sparsebwd: SPARSEBWD_CUDA=1, but PyTorch .* is built without CUDA"):
        setup_py()
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    assert setup_py()["CUDA"] == "SPARSEBWD_CUDA=0 was set"
    monkeypatch.setenv("SPARSEBWD_CUDA", "yes")
    with pytest.raises(SystemExit, match="SPARSEBWD_CUDA: got 'yes'; accepted: 0, 1, auto"):
        setup_py()


@pytest.mark.parametrize(
    "listed, devices, known, architectures",
    [
        ("8.0;9.0a 10.0+PTX", [], "", ["8.0", "9.0a", "10.0+PTX"]),
        ("12.0f", [(9, 0)], "", ["12.0f"]),
        ("7.0 7.5 8.6 9.0+PTX", [], "", ["8.6", "9.0+PTX"]),  # as containers set it
        ("7.5", [(9, 0)], "", []),
        (None, [(9, 0), (8, 6), (9, 0)], "", ["8.6", "9.0a"]),
        (None, [(7, 5)], "", []),
        (None, [], "compute_80 compute_90 compute_100", ["8.0", "9.0a", "10.0+PTX"]),
        (None, [], "compute_75\ncompute_80\ncompute_90", ["8.0", "9.0+PTX"]),
    ],
)
def test_architectures(listed, devices, known, architectures, setup_py, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{known}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    names = setup_py()
    assert names["cuda_architectures"](SimpleNamespace(nvcc=str(nvcc))) == architectures
    flags = names["nvcc_flags"](architectures)
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        assert f"-gencode=arch=compute_{number},code=sm_{number}" in flags
        assert (f"-gencode=arch=compute_{number},code=compute_{number}" in flags) == name.endswith("+PTX")


@pytest.mark.parametrize("listed", ["Hopper", "8.0;x", "90"])
def test_unknown_architectures_are_refused(listed, setup_py, monkeypatch):
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: got '(Hopper|x|90)'; accepted: compute"):
        setup_py()["cuda_architectures"](SimpleNamespace(nvcc="nvcc"))
