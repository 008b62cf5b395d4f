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
from sparsebwd.bench.zoo_models import libraries

FOLDER = Path(__file__).resolve().parent.parent / "examples"
# The arguments that make each quick, and what it then says.
TOTAL = r"(?s:.*)\ntotal +0\.\d{3} "
EXAMPLES = {
    "timm_recipe.py": ("--epochs 1 --steps 1 --batch-size 4 --size 32", r"step 1: loss \d\.\d{3}, (?s:.*)\ntotal .*\noutput of the averaged model: \(4, 10\)\n"),
    "own_loop.py": ("--model mobilenet --epochs 1 --steps 1", r"epoch 1: training loss \d\.\d{3}, test accuracy \d+\.\d%\n"),
    "profile_first.py": (
        "--model alexnet --batch-size 4 --before 1 --steps 1 --rounds 2 --least 0 --no-alternatives",
        r"(?s:.*)a step is \d+\.\d\dx as fast: training with pruned gradients\nstep 1: loss \d\.\d{3}\n",
    ),
    "mixed_precision.py": ("--steps 1 --batch-size 4", r"step 1: loss \d\.\d{3}\n" + TOTAL),
    "distributed.py": ("--steps 2 --batch-size 4", r"step 2: loss \d\.\d{3}\n.* one process of 2:\n" + TOTAL),
}


def test_each_is_run():
    assert sorted(EXAMPLES) == sorted(path.name for path in FOLDER.glob("*.py"))


SLOW = {"profile_first.py", "timm_recipe.py"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXAMPLES if name != "distributed.py"],
)
def test_example(name, monkeypatch, capsys):
    if name == "timm_recipe.py":
        try:
            libraries.load("timm")  # also beside a torchvision for another PyTorch, as of `make zoo`
        except RuntimeError as error:
            pytest.skip(str(error))
    arguments, expected = EXAMPLES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    monkeypatch.setattr(sparsebwd, "keep_memory", lambda: True)  # it would keep that of the tests
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert re.search(expected, capsys.readouterr().out)


def test_what_an_example_lacks_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SystemExit, match=r"^this example needs timm, .*: pip install timm$"):
        runpy.run_path(str(FOLDER / "timm_recipe.py"), run_name="__main__")


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
