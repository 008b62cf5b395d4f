# SPDX-License-Identifier: Apache-2.0
"""Lists of non-zeros: the several ways in which they are built give the same ones, so that results are equal to the bit."""

from __future__ import annotations

import pytest
import torch

from sparsebwd.backends import available_backends
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, fenced, poisoned_memory, random_tensor

pytestmark = [
    pytest.mark.isa,
    pytest.mark.skipif("cpu" not in available_backends(), reason="the cpu backend is not built"),
]

GRID = [
    "n2c16h8w8k64r3s3p1",
    "n3c20h14w15k37r3s3u2p1",  # no size is a multiple of anything
    "n2c33h10w10k300r1s1",  # several k-blocks, the last one smaller
    "n2c64h2w400k65r1s1",  # rows longer than a panel of input
    "n2c24h10w10k160r3s3p1g4",
    "n2c12h13w13k16r3s3p2d2",
    "n1c16h3w3k512r3s3p1",
    "n1c3h9w9k130r7s7u2p3",
]


def _backward(problem, input, weight, grad_output, with_agb):
    """The gradients of input (or None) and weight."""
    grad_input = torch.empty_like(input) if with_agb else None
    grad_weight = torch.empty_like(weight)
    torch.ops.sparsebwd_cpu.conv2d_backward(
        grad_output,
        input,
        weight if with_agb else None,
        problem.input_size,
        problem.weight_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        None,
        0.0,
        None,
        grad_input,
        grad_weight,
    )
    return grad_input, grad_weight


@pytest.mark.parametrize("density", [0.3, 0.1, 0.06, 0.01, 0.0])
@pytest.mark.parametrize("text", GRID)
def test_lists_by_channel_are_those_of_the_gradient_and_of_the_lists_by_pixel(
    text, density, memory_format, generator
):
    """Alone WGC transposes the gradient; beside AGB, where there are few non-zeros, it sorts AGB's lists."""
    problem = ConvProblem.parse(text)
    settings = {"generator": generator, "memory_format": memory_format}
    input, weight = (fenced(random_tensor(size, **settings)) for size in (problem.input_size, problem.weight_size))
    grad_output = random_tensor(problem.output_size, density=density, **settings)
    # A part that is full, so that one way gives way to another.
    grad_output[:, : problem.k // 3, : problem.p // 2] = 1.5
    with poisoned_memory():
        together = _backward(problem, input, weight, fenced(grad_output), True)[1]
        alone = _backward(problem, input, weight, fenced(grad_output), False)[1]
    assert_bit_equal(together, alone, f"WGC of {problem}")
