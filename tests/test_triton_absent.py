# SPDX-License-Identifier: Apache-2.0
"""The backend "triton" where it cannot run: what it says, and that nothing else needs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import sparsebwd
from sparsebwd import SparseConv2d, backends
from sparsebwd.train.config import TrainConfig


@pytest.fixture
def missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    backends.base.forget_choices()
    yield
    backends.base.forget_choices()


def test_without_the_package_one_error_names_it(missing):
    words = r"'triton'.* the package triton is not installed; .*pip install 'sparsebwd\[triton\]'"
    layer = SparseConv2d(4, 6, 3, backend="triton", granularity="row")
    with pytest.raises(RuntimeError, match=words):
        layer(torch.ones(2, 4, 5, 5))
    with pytest.raises(RuntimeError, match=words):
        TrainConfig(backend="triton")
    assert "backend triton     does not run: the package triton is not installed" in str(sparsebwd.info())


def test_without_a_gpu_one_error_says_so(monkeypatch):
    backend = backends.get_backend("triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.available() == "PyTorch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert backend.available() == "device 1 has compute capability 7.5; accepted: 8.0 and newer"
    capabilities[1] = (10, 0)
    assert backend.available() is None
    assert backend.can_run(None, "cpu", torch.float32) == "the device is cpu, not cuda"
    assert backend.can_run(None, "cuda", torch.float64) == "torch.float64 is not float32, bfloat16 or float16"


def test_auto_does_not_choose_it(monkeypatch):
    backend = backends.get_backend("triton")
    monkeypatch.setattr(type(backend), "available", lambda self: None)
    for other in ("dense", "cpu", "cuda", "reference"):
        monkeypatch.setattr(type(backends.get_backend(other)), "available", lambda self: "it is switched off")
    backends.base.forget_choices()
    try:
        assert backends.choose_backend("triton", None, "cuda", torch.float32) is backend
        with pytest.raises(RuntimeError, match="'triton': its kernels have not been timed on a GPU yet"):
            backends.choose_backend("auto", None, "cuda", torch.float32)
    finally:
        backends.base.forget_choices()


@pytest.mark.slow
def test_importing_the_package_imports_no_triton():
    """Parts of PyTorch do where there is one; here there is none."""
    program = (
        "import sys; sys.modules['triton'] = None; import sparsebwd; sparsebwd.info();"
        "sys.exit('sparsebwd.backends.triton_kernels' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
