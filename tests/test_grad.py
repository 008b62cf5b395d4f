# SPDX-License-Identifier: Apache-2.0
"""sparsebwd.grad against torch.nn.grad: same arguments, same results."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsebwd import grad
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import random_tensor

PROBLEMS = ["n2c4h7w6k6r3s3", "n2c6h9w8k4r3s2u2x1p1x0d1x2g2", "n0c3h5w5k4r3s3", "n1c8h4w4k8r3s3p1g8"]


def _operands(text, generator):
    problem = ConvProblem.parse(text)
    tensors = [
        random_tensor(size, generator=generator, integer=True, density=density)
        for size, density in (
            (problem.input_size, 1),
            (problem.weight_size, 1),
            (problem.output_size, 0.3),
        )
    ]
    return problem, *tensors


@pytest.mark.parametrize("text", PROBLEMS)
def test_same_arguments_and_results_as_torch(text, backend, generator):
    problem, input, weight, grad_output = _operands(text, generator)
    settings = (problem.stride, problem.padding, problem.dilation, problem.groups)
    named = dict(zip(("stride", "padding", "dilation", "groups"), settings))
    by_input = (problem.input_size, weight, grad_output)
    by_weight = (input, problem.weight_size, grad_output)
    for function, oracle, operands in (
        (grad.conv2d_input, torch.nn.grad.conv2d_input, by_input),
        (grad.conv2d_weight, torch.nn.grad.conv2d_weight, by_weight),
    ):
        expected = oracle(*operands, *settings)
        assert torch.equal(function(*operands, *settings, backend=backend), expected)
        assert torch.equal(function(*operands, **named, backend=backend), expected)
        assert torch.equal(function(*operands, **named), expected)


def test_sizes_may_be_lists_and_settings_ints(generator):
    problem, input, weight, grad_output = _operands("n2c4h7w6k6r3s3u2p1", generator)
    assert torch.equal(
        grad.conv2d_input(list(problem.input_size), weight, grad_output, 2, 1),
        torch.nn.grad.conv2d_input(problem.input_size, weight, grad_output, 2, 1),
    )
    assert torch.equal(
        grad.conv2d_weight(input, weight.shape, grad_output, [2], [1, 1]),
        torch.nn.grad.conv2d_weight(input, weight.shape, grad_output, 2, 1),
    )
    assert torch.equal(
        grad.conv2d_weight(input, tuple(np.array(weight.shape)), grad_output, np.int64(2), np.int32(1), groups=np.int64(1)),
        torch.nn.grad.conv2d_weight(input, weight.shape, grad_output, 2, 1),
    )


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"grad_output": torch.ones(2, 6, 5, 5)}, ValueError, r"grad_output: got shape \(2, 6, 5, 5\); accepted: \(2, 6, 5, 4\)"),
        ({"grad_output": torch.ones(2, 6, 5, 4).half()}, TypeError, "grad_output: got torch.float16; accepted: torch.float32"),
        ({"grad_output": torch.ones(2, 6, 5, 4).bool()}, TypeError, "grad_output: got torch.bool"),
        ({"grad_output": torch.ones(2, 6, 5, 4, device="meta")}, ValueError, "grad_output: got device meta"),
        ({"grad_output": None}, TypeError, "grad_output: got NoneType"),
        ({"stride": "2"}, TypeError, "stride: got '2'"),
        ({"padding": "same"}, TypeError, "padding: got 'same'"),
        ({"dilation": 9}, ValueError, "weight: the kernel .* larger than the input"),
        ({"groups": 3}, ValueError, "weight: got shape"),
        ({"groups": 0}, ValueError, "groups: got 0; accepted: at least 1"),
        ({"groups": 2.0}, TypeError, "groups: got 2.0"),
        ({"backend": "abacus"}, ValueError, "backend: got 'abacus'"),
    ],
)  # fmt: skip
def test_bad_input(changes, error, message):
    arguments = {"grad_output": torch.ones(2, 6, 5, 4), **changes}
    with pytest.raises(error, match=message):
        grad.conv2d_input((2, 4, 7, 6), torch.ones(6, 4, 3, 3), **arguments)
    with pytest.raises(error, match=message):
        grad.conv2d_weight(torch.ones(2, 4, 7, 6), (6, 4, 3, 3), **arguments)


def test_sizes_that_are_no_sizes():
    weight, grad_output = torch.ones(6, 4, 3, 3), torch.ones(2, 6, 5, 4)
    for size, error in (((4, 7, 6), ValueError), (7, TypeError), ((2, 4, 7, "6"), TypeError)):
        with pytest.raises(error, match="input_size: got"):
            grad.conv2d_input(size, weight, grad_output)
    with pytest.raises(ValueError, match="weight_size: got"):
        grad.conv2d_weight(torch.ones(2, 4, 7, 6), (6, 4, 3), grad_output)
