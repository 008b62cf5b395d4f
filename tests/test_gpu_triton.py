# SPDX-License-Identifier: Apache-2.0
"""The backend "triton" on a real device; test_triton.py has its kernels on a CPU, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_problems import DTYPES, GRID, backward, operands, oracle
from strategies import problems

from sparsebwd import granularity
from sparsebwd.backends import get_backend, triton_tiles, triton_tune
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, assert_error_bounded

BACKEND, DEVICE = "triton", "cuda"
_missing = get_backend(BACKEND).available()
if _missing is not None:
    pytest.skip(f"backend {BACKEND!r} does not run here: {_missing}", allow_module_level=True)
pytestmark = pytest.mark.gpu

LAYERS = ["n8c64h14w14k64r3s3p1", "n4c64h14w14k128r3s3u2p1", "n8c256h7w7k256r3s3p1", "n2c512h7w7k512r3s3p1", "n4c128h14w14k256r1s1u2"]


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(params=["ieee", "tf32"], autouse=True)
def precision(request):
    """That of float32 in cuDNN."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """To the 10 bits after the point that TF32 has: then products are exact in it."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if tensor.dtype == torch.float32 else tensor


@pytest.mark.smoke
@pytest.mark.parametrize("text", LAYERS)
def test_error_is_at_most_twice_that_of_cudnn(text, dtype, precision, memory_format, generator):
    problem = ConvProblem.parse(text)
    tensors = operands(problem, 0.5, dtype, generator, memory_format, device=DEVICE)
    if precision == "tf32":
        tensors = tuple(map(rounded, tensors))
    dense = convolution_backward(problem, tensors[2], *tensors[:2], (True, True))
    results = backward(BACKEND, problem, *tensors)
    for name, *found in zip(("AGB", "WGC"), results, oracle(problem, *tensors), dense):
        assert_error_bounded(*found, f"{name} of {problem}")


@pytest.mark.parametrize("kept", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("text", [*GRID, *LAYERS])
def test_integers_are_exact(text, kept, dtype, generator):
    problem = ConvProblem.parse(text)
    tensors = operands(problem, kept, dtype, generator, integer=True, device=DEVICE)
    for actual, wanted in zip(backward(BACKEND, problem, *tensors), oracle(problem, *tensors)):
        assert_bit_equal(actual + 0, wanted.to(dtype) + 0, str(problem))


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(problem=problems(max_channels=100), kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 2**32))
def test_integers_are_exact_for_any_geometry(dtype, problem, kept, seed):
    tensors = operands(problem, kept, dtype, torch.Generator().manual_seed(seed), integer=True, device=DEVICE)
    for actual, wanted in zip(backward(BACKEND, problem, *tensors), oracle(problem, *tensors)):
        assert_bit_equal(actual + 0, wanted.to(dtype) + 0, str(problem))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["row", ("row", 512)], ids=str)
def test_pruned_rows_and_twenty_times_the_same_bits(kind, dtype, generator, stats):
    problem = ConvProblem.parse(LAYERS[2])
    input, weight, gradient = operands(problem, 1.0, dtype, generator, device=DEVICE)
    pruning = Pruning(density=0.5, granularity=kind)
    first = backward(BACKEND, problem, input, weight, gradient, pruning)
    pruned = granularity.prune(gradient, torch.tensor([1, 2], device=DEVICE), pruning)
    assert_bit_equal(stats[-1].density, pruned.density)
    dense = convolution_backward(problem, pruned.values, input, weight, (True, True))
    for name, *found in zip(("AGB", "WGC"), first, oracle(problem, input, weight, pruned.values), dense):
        assert_error_bounded(*found, name)
    for _ in range(20):
        for one, two in zip(first, backward(BACKEND, problem, input, weight, gradient, pruning)):
            assert_bit_equal(one, two)


def test_a_captured_graph_prunes_anew(generator):
    problem = ConvProblem.parse(LAYERS[0])
    tensors = operands(problem, 1.0, torch.float32, generator, device=DEVICE)
    key = torch.tensor([1, 2], device=DEVICE)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    text = Pruning(density=0.5, granularity="row", backend=BACKEND).text
    stream = torch.cuda.Stream()

    def call():
        return torch.ops.sparsebwd.conv2d_backward(tensors[2], *tensors[:2], *geometry, key, text, 0, (True, True, False))[:2]

    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for words in ([1, 2], [3, 4]):
        key.copy_(torch.tensor(words))
        graph.replay()
        for one, two in zip(captured, call()):
            assert_bit_equal(one, two)


def test_tuning(monkeypatch):
    monkeypatch.setattr(triton_tiles, "chosen", {})
    problem = ConvProblem.parse(LAYERS[0])
    for dtype in (torch.float32, torch.bfloat16):
        found = triton_tune.tune(problem, dtype)
        assert not any(candidate.wrong for candidate in found)
        assert all(candidate.milliseconds is None or candidate.milliseconds > 0 for candidate in found)
