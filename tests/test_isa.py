# SPDX-License-Identifier: Apache-2.0
"""The tests marked "isa" again, once for each lower instruction set of this machine.

The instruction set is chosen when the kernels are loaded, so each runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_kernels import instruction_sets

from sparsebwd.backends import available_backends

FILES = (
    "test_depthwise.py",
    "test_fuzz.py",
    "test_isa.py",
    "test_layouts.py",
    "test_lists.py",
    "test_native.py",
    "test_parity.py",
    "test_pruning.py",
)
LIMIT = "SPARSEBWD_MAX_ISA"


def _lower_isas() -> list[str]:
    if "cpu" not in available_backends():
        return []
    isas = torch.ops.sparsebwd_cpu.supported_isas()
    return [isa for isa in isas if isa != torch.ops.sparsebwd_cpu.isa()]


@pytest.mark.isa
@pytest.mark.skipif("cpu" not in available_backends(), reason="the cpu backend is not built")
def test_the_instruction_set_is_the_one_asked_for():
    order = list(instruction_sets())
    allowed = order[: order.index(os.environ.get(LIMIT) or order[-1]) + 1]
    supported = [isa for isa in order if isa in torch.ops.sparsebwd_cpu.supported_isas()]
    assert torch.ops.sparsebwd_cpu.isa() == [isa for isa in supported if isa in allowed][-1]


@pytest.mark.slow
@pytest.mark.skipif(bool(os.environ.get(LIMIT)), reason=f"{LIMIT} is set")
@pytest.mark.parametrize("isa", _lower_isas())
def test_lower_instruction_set(isa):
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "isa", "-p", "no:cacheprovider", *files],
        # Threads are a subject of the tests in this process.
        env={**os.environ, LIMIT: isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
