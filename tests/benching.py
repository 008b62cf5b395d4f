# SPDX-License-Identifier: Apache-2.0
"""What tests of the benchmark share: its command, a GPU that is none, a file of gradients."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparsebwd.bench import cli, devices, gradients, timing
from sparsebwd.bench.gradients import Captured, GradientFile
from sparsebwd.problem import ConvProblem

PROBLEM = "n2c4h6w5k8r3s3u1p1d1g1"


def bench(*arguments: object):
    result = CliRunner().invoke(cli.app, ["--repeats", "3", "--threads", "1", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows_of(path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


class CudaOnCpu(devices.Cuda):
    """A GPU whose tensors and whose time are those of the CPU."""

    type = "cpu"
    cache_bytes = 2**17

    def sampler(self, backend=None):
        return timing.sample_on_cpu

    def describe(self):
        return {"gpu": {"name": "some GPU", "driver": "1.2", "cudnn": 9}}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "cuda", CudaOnCpu())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


GEOMETRIES = {"first": "n2c3h6w6k4r3s3u1p1d1g1", "depthwise": "n2c4h6w6k4r3s3u2p1d1g4"}


@pytest.fixture
def captured_file(tmp_path, generator):
    """Writes gradients of two layers at `steps`, with zeros if the placement is "input"."""

    def write(placement: str = "output", steps: tuple[int, ...] = (7,)):
        found = []
        for step in steps:
            for name, text in GEOMETRIES.items():
                problem = ConvProblem.parse(text)
                gradient = torch.randn(problem.output_size, generator=generator)
                if placement == "input":
                    gradient.relu_()
                found.append(Captured(name, problem, step, name != "first", gradient))
        path = tmp_path / f"{placement}.pt"
        gradients.save(path, GradientFile("resnet18", "digits", 90.0, placement, tuple(found)))
        return path

    return write


