# SPDX-License-Identifier: Apache-2.0
"""What tests on a real device share: they are skipped where there is none; operands on it, and calls in strict float32."""

from __future__ import annotations

import os

import pytest
import test_parity as parity
import torch
from torch import Tensor

from sparsebwd.backends import get_backend
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning

# cuBLAS wants it where PyTorch is told to be deterministic; it is read when cuBLAS is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE, BACKEND = "cuda", "cuda"
_missing = get_backend(BACKEND).available()
if _missing is not None:
    pytest.skip(f"backend {BACKEND!r} does not run here: {_missing}", allow_module_level=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER = "n8c64h14w14k64r3s3p1"
PLAIN = "n2c12h9w9k18r5s3p2x1g3"  # what the sparse kernels do not take


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"], name="dtype")
def dtype_fixture(request) -> torch.dtype:
    return request.param


@pytest.fixture
def strict_math():
    """cuDNN in float32, so that it can be compared with."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed


def key_of(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int64, device=DEVICE)


def operands_of(text: str, generator, dtype=torch.float32, memory_format=torch.channels_last, density=1.0):
    """The problem, and input, weight and grad_output on the device."""
    problem = ConvProblem.parse(text)
    return problem, parity._operands(problem, density, dtype, memory_format, generator, device=DEVICE)


def backward(problem, operands, key=None, percentile=90.0, history=None, backend=BACKEND):
    """Gradients of input and weight, as in training."""
    input, weight, grad_output = operands
    key = key_of(1, 2) if key is None else key
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    return torch.ops.sparsebwd.conv2d_backward(
        grad_output, input, weight, *geometry, key, Pruning(percentile=percentile, backend=backend).text, 0, (True, True, False), history
    )[:2]
