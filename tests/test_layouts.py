# SPDX-License-Identifier: Apache-2.0
"""Contiguous and channels_last activations of the CPU kernels, in every combination."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsebwd.backends import available_backends, cpu, get_backend
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, fenced, poisoned_memory, random_tensor

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

FORMATS = (torch.contiguous_format, torch.channels_last)
GRID = [
    "n3c20h9w7k33r3s3p1",
    "n2c17h8w8k40r1s1",
    "n2c40h11w9k20r1s1u2",
    "n5c24h4w4k36r3s3p1",  # tiles and panels of several images
    "n2c3h33w20k16r3s3p1",
    "n2c16h14w15k24r3s3u2p1",
    "n1c5h17w18k16r7s7u2p3",
    "n2c12h13w13k16r3s3p2d2",
    "n2c24h10w10k32r3s3p1g4",
    "n1c2h3w300k6r2s2u1x3p0x2d1x2",
    "n0c4h5w6k4r3s3p1",
]
KEY = torch.tensor([7, -9])


def _operands(problem, density=0.3):
    generator = torch.Generator().manual_seed(3)
    shapes = ((problem.output_size, density), (problem.input_size, 1.0), (problem.weight_size, 1.0))
    return [random_tensor(shape, generator=generator, density=each) for shape, each in shapes]


@pytest.mark.isa
@pytest.mark.parametrize("tau", [None, 0.75, 20.0])
@pytest.mark.parametrize("text", GRID)
def test_results_are_the_same_in_every_layout(text, tau):
    """To the bit: lists are the same, whatever they were built from."""
    problem = ConvProblem.parse(text)
    operands = _operands(problem)
    results = []
    for formats in itertools.product(FORMATS, repeat=4):
        g, input, weight = (
            fenced(tensor.contiguous(memory_format=layout)) for tensor, layout in zip(operands, formats)
        )
        with poisoned_memory():
            results.append(
                cpu._convolve(
                    problem,
                    g,
                    input,
                    weight,
                    None if tau is None else KEY,
                    tau or 0.0,
                    keep_pruned=True,
                    input_format=formats[3],
                    weight_format=formats[2],
                )
            )
        assert results[-1].pruned.is_contiguous(memory_format=formats[0])
        assert results[-1].grad_input.is_contiguous(memory_format=formats[3])
        assert results[-1].density == results[0].density
        for name in ("pruned", "grad_input", "grad_weight"):
            assert_bit_equal(getattr(results[-1], name), getattr(results[0], name), f"{name}, {formats}")
    expected = operands[0] if tau is None else torch.empty_like(operands[0])
    if tau is not None:
        torch.ops.sparsebwd_cpu.prune(operands[0], KEY, tau, expected)
    assert_bit_equal(results[0].pruned, expected)
    assert results[0].density == int(expected.count_nonzero()) / max(expected.numel(), 1)


@pytest.mark.parametrize("output_mask", [(True, False), (False, True)])
def test_density_is_counted_without_pruning(output_mask):
    problem = ConvProblem.parse(GRID[0])
    g, input, weight = _operands(problem)
    result = get_backend("cpu").conv2d_backward(problem, g, input, weight, KEY, Pruning(percentile=None), output_mask)
    assert result.density == int(g.count_nonzero()) / g.numel()


def test_activations_are_not_copied(monkeypatch):
    problem = ConvProblem.parse(GRID[0])
    g, input, weight = _operands(problem)
    copied = []
    in_format = cpu._in_format
    monkeypatch.setattr(cpu, "_in_format", lambda tensor, layout: copied.append(tensor) or in_format(tensor, layout))
    get_backend("cpu").conv2d_backward(problem, g, input, weight, KEY, Pruning(), (True, True))
    assert all(tensor is weight for tensor in copied)


def test_layouts_that_are_refused():
    problem = ConvProblem.parse("n2c4h5w6k4r1s1")
    g, input, _ = _operands(problem)

    def run(grad_output, input, grad_weight):
        torch.ops.sparsebwd_cpu.conv2d_backward(
            grad_output, input, None, problem.input_size, problem.weight_size, (1, 1), (0, 0), (1, 1), 1,
            None, 0.0, None, None, grad_weight,
        )  # fmt: skip

    strided = torch.zeros(2, 4, 5, 12)[..., ::2]
    with pytest.raises(ValueError, match="grad_output: got .*accepted is a channels_last tensor, or a contiguous one"):
        run(strided, input, torch.empty(problem.weight_size))
    with pytest.raises(ValueError, match="input: got BFloat16"):
        run(g, input.bfloat16(), torch.empty(problem.weight_size))
    with pytest.raises(ValueError, match="grad_output: got BFloat16 .*a contiguous one of float32"):
        run(g.bfloat16(), input.bfloat16(), torch.empty(problem.weight_size))
