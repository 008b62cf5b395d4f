# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/, for a step or two."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsebwd

FOLDER = Path(__file__).resolve().parent.parent / "examples"
# The arguments that make each quick, and what it then says.
TOTAL = r"(?s:.*)\ntotal +0\.\d{3} "
EXAMPLES = {
    "own_loop.py": ("--model mobilenet --epochs 1 --steps 1", r"epoch 1: training loss \d\.\d{3}, test accuracy \d+\.\d%\n"),
    "densities.py": ("--steps 1 --batch-size 4", TOTAL + r"(?s:.*)a step: .* ms sparse, .* ms dense: \d+\.\d\dx\n"),
    "mixed_precision.py": ("--steps 1 --batch-size 4", r"step 1: loss \d\.\d{3}\n" + TOTAL),
    "distributed.py": ("--steps 2 --batch-size 4", r"step 2: loss \d\.\d{3}\n.* one process of 2:\n" + TOTAL),
}


def test_each_is_run():
    assert sorted(EXAMPLES) == sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "distributed.py"])
def test_example(name, monkeypatch, capsys):
    arguments, expected = EXAMPLES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    monkeypatch.setattr(sparsebwd, "keep_memory", lambda: True)  # it would keep that of the tests
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert re.search(expected, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_example_of_several_processes():
    arguments, expected = EXAMPLES["distributed.py"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, FOLDER / "distributed.py", *arguments.split()],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout
