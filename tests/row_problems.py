# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose gradients have rows of zeros: what tests of the Triton kernels share, with a GPU and without."""

from __future__ import annotations

import torch

from sparsebwd import reference
from sparsebwd.settings import Pruning
from sparsebwd.testing import fenced, poisoned_memory, random_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = [
    "n2c16h6w5k24r3s3p1",
    "n1c5h7w6k70r3s3u2p1",  # rows of 64 and of 6 channels
    "n2c3h9w8k16r5s3u2x1p2x0d1x2",
    "n1c70h5w4k130r1s1",
    "n2c8h6w6k8r1s1u2",  # pixels that are not seen at all
    "n1c6h5w4k9r1s1p1",  # pixels of padding only
    "n1c128h3w2k16r3s3p1",  # columns of one tap in a tile of WGC
    "n1c4h6w5k140r3s3p1d2",  # three rows
]


def operands(problem, kept, dtype, generator, memory_format=torch.channels_last, integer=False, device="cpu"):
    """input, weight, and a gradient of which about a fraction ``kept`` of the rows is not zero."""
    settings = {"generator": generator, "dtype": dtype, "memory_format": memory_format, "integer": integer}
    sizes = problem.input_size, problem.weight_size, problem.output_size
    input, weight, gradient = (random_tensor(size, **settings) for size in sizes)
    rows = torch.rand((problem.n, -(-problem.k // 64), problem.p, problem.q), generator=generator) < kept
    gradient *= rows.repeat_interleave(64, 1)[:, : problem.k]
    return tuple(fenced(tensor.to(device), 64) for tensor in (input, weight, gradient))


UNPRUNED = Pruning(None)


def backward(backend, problem, input, weight, gradient, pruning=UNPRUNED, key=(1, 2)):
    """Gradients of input and weight, as in training, on poisoned memory."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    key = torch.tensor(key, device=gradient.device)
    with poisoned_memory():
        return torch.ops.sparsebwd.conv2d_backward(
            gradient, input, weight, *geometry, key, pruning.replace(backend=backend).text, 0, (True, True, False)
        )[:2]


def oracle(problem, input, weight, gradient):
    return reference.conv2d_input(problem, weight, gradient), reference.conv2d_weight(problem, input, gradient)
