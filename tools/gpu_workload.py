# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels for tools that watch them: compute-sanitizer and ncu (tools/gpu_check.py).

    gpu_workload.py small    every kernel on small problems with odd sizes, in all dtypes and both layouts
    gpu_workload.py layer    one layer of a network, as large as in training; only one call of each is profiled

Nothing is checked here: the tests do that.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch

from sparsebwd import ops, reference  # noqa: F401  (ops defines torch.ops.sparsebwd)
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import random_tensor

SMALL = ["n2c16h9w7k40r3s3p1", "n2c20h8w9k36r3s3u2p1", "n2c24h7w7k44r1s1", "n1c32h5w6k64r3s3p1", "n2c6h6w5k9r3s3p1g3"]
LAYER, DENSITY = "n256c128h28w28k128r3s3p1", 0.1
DEVICE = BACKEND = "cuda"


def backward(problem: ConvProblem, operands: list[torch.Tensor], percentile: float | None, outputs, history=None) -> None:
    input, weight, grad_output = operands
    key = torch.tensor([1, 2], device=input.device)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    torch.ops.sparsebwd.conv2d_backward(
        grad_output, input, weight, *geometry, key, Pruning(percentile=percentile, backend=BACKEND).text, 0, (*outputs, False), history
    )


def operands_of(problem: ConvProblem, dtype: torch.dtype, memory_format: torch.memory_format, density: float) -> list:
    generator = torch.Generator().manual_seed(1)
    settings = {"generator": generator, "dtype": dtype, "memory_format": memory_format}
    return [
        random_tensor(size, density=share, **settings).to(DEVICE)
        for size, share in ((problem.input_size, 1), (problem.weight_size, 1), (problem.output_size, density))
    ]


def small() -> None:
    for text in SMALL:
        problem = ConvProblem.parse(text)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for memory_format in (torch.channels_last, torch.contiguous_format):
                operands = operands_of(problem, dtype, memory_format, 0.3)
                history = torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=DEVICE)
                for percentile, past in ((None, None), (90.0, None), (90.0, history), (90.0, history)):
                    backward(problem, operands, percentile, (True, True), past)
                key = torch.tensor([1, 2], device=DEVICE)
                torch.ops.sparsebwd.prune(operands[2], key, f"backend={BACKEND}", history)
    torch.cuda.synchronize()


@contextmanager
def profiled():
    """What runs within is seen by a profiler that was told to wait."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def layer() -> None:
    problem = ConvProblem.parse(LAYER)
    operands = operands_of(problem, torch.float32, torch.channels_last, DENSITY)
    dense = torch.randn(problem.output_size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    key = torch.tensor([1, 2], device=DEVICE)
    history = torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=DEVICE)

    def calls():
        torch.ops.sparsebwd.prune(dense, key, f"backend={BACKEND}")
        torch.ops.sparsebwd.prune(dense, key, f"backend={BACKEND}", history)
        backward(problem, operands, None, (True, False))
        backward(problem, operands, None, (False, True))

    calls()
    with profiled():
        calls()


if __name__ == "__main__":
    {"small": small, "layer": layer}[sys.argv[1]]()
