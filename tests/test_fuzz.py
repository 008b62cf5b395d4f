# SPDX-License-Identifier: Apache-2.0
"""A slice of `make fuzz` (tools/fuzz.py), and what it does where a kernel is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsebwd.backends import available_backends, cpu, depthwise

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import fuzz  # noqa: E402

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)


@pytest.mark.isa
def test_a_slice_of_the_fuzz(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "-n", "300", "--seed", "1"])
    assert fuzz.main() == 0
    assert capsys.readouterr().out == "300 problems, seed 1: 0 failed, 0 refused\n"


def test_a_slice_of_the_fuzz_of_dense_kernels(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "-n", "300", "--seed", "1", "--dense"])
    assert fuzz.main() == 0
    assert capsys.readouterr().out == "300 problems, seed 1: 0 failed, 0 refused\n"


def test_cases_are_functions_of_seed_and_number():
    cases = [fuzz.draw(3, number) for number in range(200)]
    assert cases == [fuzz.draw(3, number) for number in range(200)]
    assert len(set(cases)) == 200
    assert cases[0] != fuzz.draw(4, 0)
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert len({case.formats for case in cases}) == 8
    assert any(case.problem.groups > 1 for case in cases)
    assert any(case.problem.groups == case.problem.c > 1 for case in cases)  # depthwise


def test_what_fails_can_be_run_alone(capsys, monkeypatch):
    right = cpu.CpuBackend.conv2d_backward

    def wrong(self, problem, *args):
        result = right(self, problem, *args)
        if result.grad_weight.numel() % 2 == 0:
            result.grad_weight.view(-1)[-1] += 64
        return result

    _fails_alone(capsys, monkeypatch, cpu.CpuBackend, "conv2d_backward", wrong)


def test_depthwise_kernels_are_in_it(capsys, monkeypatch):
    right = depthwise.gradients

    def wrong(problem, *args):
        grad_input, grad_weight = right(problem, *args)
        return grad_input + 1, grad_weight

    _fails_alone(capsys, monkeypatch, depthwise, "gradients", wrong)


def _fails_alone(capsys, monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "-n", "20"])
    assert fuzz.main() == 1
    *lines, last = capsys.readouterr().out.splitlines()
    commands = [line.split("fuzz.py ")[1] for line in lines if "tools/fuzz.py" in line]
    assert commands and f"{len(commands)} failed" in last
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *commands[0].split()])
    assert fuzz.main() == 1
    assert capsys.readouterr().out.splitlines()[:2] == lines[:2]
