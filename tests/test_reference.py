# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, against sources independent of it."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from sparsebwd import reference
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, random_tensor

PI_COUNTER = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = (0xA4093822, 0x299F31D0)
ONES = 0xFFFFFFFF


# The known answers of the authors' library, Random123 (kat_vectors).
@pytest.mark.parametrize(
    "rounds, counter, key, expected",
    [
        (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
        (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_known_answers(rounds, counter, key, expected):
    words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)), rounds)
    assert tuple(map(int, words)) == expected


def _philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(7):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 2**32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def test_uniform_is_a_function_of_key_and_position():
    shape, key = (2, 6, 3, 5), torch.tensor([-0x123456789ABCDEF, 0x7FEDCBA987654321])
    numbers = reference.uniform(shape, key)
    assert numbers.shape == shape and numbers.dtype == torch.float32
    low0, high0, low1, high1 = struct.unpack("<4I", struct.pack("<2q", *key.tolist()))
    for n, c, h, w in [(0, 0, 0, 0), (1, 5, 2, 4), (1, 3, 0, 4), (0, 4, 1, 0), (1, 2, 2, 3)]:
        words = _philox_scalar([w ^ low1, h ^ high1, n, c // 4], [low0, high0])
        assert numbers[n, c, h, w].item() == (words[c % 4] >> 8) / 2**24
    # A part of the tensor has the numbers it has in the whole.
    assert_bit_equal(reference.uniform((1, 5, 2, 4), key), numbers[:1, :5, :2, :4])


def _prune_scalar(g: float, tau: float, r: float) -> float:
    threshold = torch.tensor(tau * r, dtype=torch.float64).float().item()
    if abs(g) >= tau:
        return g
    return math.copysign(tau, g) if abs(g) > threshold else 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_prune_element_by_element(dtype, generator):
    grad = random_tensor((2, 5, 3, 4), generator=generator, dtype=dtype, density=0.8)
    key = torch.tensor([1, 2])
    pruned = reference.prune(grad, key, Pruning())
    sigma = math.sqrt(math.pi / 2) * grad.double().abs().sum().item() / grad.numel()
    assert pruned.sigma.item() == torch.tensor(sigma).item()
    tau = torch.tensor(pruned.sigma.item() * 1.2815515655446004)
    assert pruned.tau.item() == (tau if dtype == torch.float64 else tau.to(dtype)).item()
    numbers = reference.uniform(tuple(grad.shape), key)
    expected = [
        _prune_scalar(g, pruned.tau.item(), r)
        for g, r in zip(grad.double().flatten().tolist(), numbers.flatten().tolist())
    ]
    expected = torch.tensor(expected, dtype=torch.float64).view_as(grad).to(dtype)
    assert_bit_equal(pruned.values, expected)
    nonzeros = sum(value != 0 for value in expected.flatten().tolist())
    assert pruned.density.item() == torch.tensor(nonzeros / grad.numel()).item()


def test_pruned_zeros_are_positive_and_the_threshold_itself_is_kept():
    grad = torch.tensor([-1e-30, -0.0, 1.0, -1.0, 0.5]).view(1, 5, 1, 1)
    values = reference.prune_at(grad, torch.tensor([3, 4]), torch.tensor(1.0)).flatten().tolist()
    assert values[:2] == [0.0, 0.0] and all(math.copysign(1, v) == 1 for v in values[:2])
    assert values[2:4] == [1.0, -1.0]
    assert values[4] in (0.0, 1.0)


CASES = [
    "n2c4h7w6k6r3s3",
    "n2c4h7w6k6r3s3p1",
    "n1c4h9w6k6r5s2u2x3p2x1",
    "n2c6h9w9k9r3s3p2d2g3",
    "n2c4h6w6k8r3s3p1g4",
    "n3c5h4w4k2r1s1u2p1",
    "n0c3h4w4k2r3s3",
]


@pytest.mark.parametrize("text", CASES)
def test_convolutions_against_autograd_in_float64(text, generator):
    problem = ConvProblem.parse(text)
    input, weight, grad_output = (
        random_tensor(size, generator=generator, dtype=torch.float64, integer=True)
        for size in (problem.input_size, problem.weight_size, problem.output_size)
    )
    input.requires_grad_(), weight.requires_grad_()
    torch.nn.functional.conv2d(
        input, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups
    ).backward(grad_output)
    with torch.no_grad():
        assert torch.equal(reference.conv2d_input(problem, weight, grad_output), input.grad)
        assert torch.equal(reference.conv2d_weight(problem, input, grad_output), weight.grad)


def test_quantiles():
    table = {85: 1.0364, 90: 1.2816, 95: 1.6449, 99.5: 2.5758, 50: 0.0}
    for percentile, z in table.items():
        assert reference.quantile(percentile) == pytest.approx(z, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_thresholds_of_floats_are_those_of_tensors(dtype, generator):
    exponents = torch.empty(200, dtype=torch.float64).uniform_(-60, 60, generator=generator)
    special = torch.tensor([0.0, math.inf, math.nan, 1e300, 1e-320, 3.4e38], dtype=torch.float64)
    for abs_sum in torch.cat([special, 10.0**exponents]):
        for percentile in (50.0, 90.0, 99.5):
            tensors = reference.threshold(abs_sum, 7, Pruning(percentile), dtype)
            floats = reference.threshold(abs_sum.item(), 7, Pruning(percentile), dtype)
            for tensor, number in zip(tensors, floats):
                assert isinstance(number, float)
                assert_bit_equal(torch.tensor(number, dtype=torch.float64), tensor.double())
