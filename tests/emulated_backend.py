# SPDX-License-Identifier: Apache-2.0
"""The cuda backend and its raw operators on the emulated kernels: what is "on the device" here is a CPU tensor.

csrc/torch/library_cuda.cpp is compiled for the emulator (see emulation.py) and behaves as on a device, but for the device
guard and the stream.
"""

from __future__ import annotations

import shutil

import emulation
import pytest
import torch

from sparsebwd import backends
from sparsebwd.backends import cuda, cuda_auto
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import fenced, poisoned_memory, random_tensor

needs_compiler = pytest.mark.skipif(shutil.which(emulation.COMPILER[0]) is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SPARSE = "n2c16h6w5k24r3s3p1"
LARGE = "n2c16h8w8k24r3s3p1"  # beyond the small maps, for which "auto" expects less
STRIDED = "n2c6h7w8k4r3s2u2x1p1x0d2x1g2"
# So many elements are a multiple of what the sparse kernels want tensors aligned to.
ALIGNED = 64
KEY = torch.tensor([3, -4])


@pytest.fixture(scope="module")
def emulated():
    """Registers the backends "emulated", the cuda backend on emulated kernels, as the one that "auto" prefers."""
    torch.ops.load_library(emulation.operators())

    class Emulated(cuda.CudaBackend):
        name = "emulated"
        device_type = "cpu"
        operators = torch.ops.sparsebwd_emulated

        def available(self):
            return None

        def for_auto(self):
            return adaptive

    class AdaptiveEmulated(Emulated, cuda_auto.AdaptiveCudaBackend):
        pass

    adaptive = AdaptiveEmulated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.base, "_backends", dict(backends.base._backends))
        backends.register(Emulated())
        yield
    backends.choose_backend.cache_clear()


def geometry_of(problem: ConvProblem):
    return problem.stride, problem.padding, problem.dilation, problem.groups


def operands_of(problem, generator, dtype=torch.float32, memory_format=FORMATS[0], density=0.3, integer=False):
    """input, weight, grad_output; the latter of the density."""
    settings = {"generator": generator, "dtype": dtype, "memory_format": memory_format, "integer": integer}
    sizes = ((problem.input_size, 1.0), (problem.weight_size, 1.0), (problem.output_size, density))
    return [fenced(random_tensor(size, density=share, **settings), ALIGNED) for size, share in sizes]


def layer_backward(
    problem,
    operands,
    percentile=None,
    placement="output",
    mask=(True, True, False),
    backend="emulated",
    layer_id=0,
    sigma_history=None,
):
    input, weight, grad_output = operands
    config = (
        KEY,
        Pruning(percentile=percentile, placement=placement, backend=backend).text,
        layer_id,
        mask,
        sigma_history,
    )
    with poisoned_memory():
        return torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry_of(problem), *config)


def raw_arguments(problem, grad_output, input_size=None, weight_size=None, stats=None, **tensors):
    """Arguments of the raw conv2d_backward; tensors that are not named are None."""
    return (
        grad_output,
        tensors.get("input"),
        tensors.get("weight"),
        input_size or problem.input_size,
        weight_size or problem.weight_size,
        *geometry_of(problem),
        tensors.get("key"),
        1.0,
        1.0,
        tensors.get("sigma_history"),
        tensors.get("scales"),
        True,
        tensors.get("pruned"),
        tensors.get("grad_input"),
        tensors.get("grad_weight"),
        torch.empty(3) if stats is None else stats,
    )
