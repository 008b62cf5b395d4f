# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

# Each process of pytest-xdist gets its share of the cores, and so do the programs that tests start; before PyTorch is
# loaded, which reads it once.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))

import hypothesis
import pytest
import torch
from benching import captured_file, gpu  # noqa: F401  fixtures
from strategies import backends_on

from sparsebwd import backends
from sparsebwd.backends import observers
from sparsebwd.bench import environment, terminal

hypothesis.settings.register_profile(
    "sparsebwd",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # it measures time, as the deadline does
)
hypothesis.settings.load_profile("sparsebwd")
hypothesis.settings.register_profile("check", max_examples=10)  # the other settings are those loaded now


def pytest_addoption(parser):
    parser.addoption(
        "--check",
        action="store_true",
        help="each test with each value of each parameter once, without those marked slow, and those marked emulated in "
        "files that are named only (make check)",
    )


def pytest_configure(config):
    if config.getoption("--check"):
        hypothesis.settings.load_profile("check")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--check"):
        return
    named = {Path(argument.partition("::")[0]).resolve() for argument in config.args}
    seen, chosen, others = set(), [], []
    for item in items:
        left_out = item.get_closest_marker("slow") or (item.get_closest_marker("emulated") and item.path not in named)
        function = item.nodeid.partition("[")[0]
        parameters = item.callspec.params if hasattr(item, "callspec") else {"none": None}
        # A value is the same object in all combinations; it may be one that has no hash and no text.
        new = {(function, name, id(value)) for name, value in parameters.items()} - seen
        if new and not left_out:
            seen |= new
            chosen.append(item)
        else:
            others.append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


@pytest.fixture(params=backends_on("cpu"))
def backend(request) -> str:
    """Each backend that runs on this machine's CPU."""
    return request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def memory_format(request) -> torch.memory_format:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20260801)


@pytest.fixture
def stats():
    """The LayerStats of all backward passes within the test."""
    recorded = []
    observers.append(recorded.append)
    yield recorded
    observers.remove(recorded.append)


@pytest.fixture
def register(monkeypatch):
    """backends.register, undone after the test."""
    monkeypatch.setattr(backends.base, "_backends", dict(backends.base._backends))
    yield backends.register
    backends.choose_backend.cache_clear()


@pytest.fixture
def small_bench(monkeypatch):
    """The benchmark with little memory, malloc as it is, and no long look at what the machine can do."""
    monkeypatch.setattr(terminal, "keep_freed_memory", lambda: "as is")
    monkeypatch.setattr(environment, "last_level_cache", lambda: 2**17)
    monkeypatch.setattr(environment, "PRODUCT", 64)
    monkeypatch.setattr(environment, "COPIED", 2**14)


@pytest.fixture(autouse=True, scope="session")
def _compiled_anew(tmp_path_factory):
    """Inductor caches code that is cut for an instruction set under a key that does not name it. What was left by a run
    with another one (ATEN_CPU_CAPABILITY) writes beyond the end of tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _logging_kept():
    """A test that imports the package anew, with another SPARSEBWD_LOG, leaves the log as the next one expects it."""
    log = logging.getLogger("sparsebwd")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def deadline():
    """Ends a test that hangs."""

    def end(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
