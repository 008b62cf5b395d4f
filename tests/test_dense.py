# SPDX-License-Identifier: Apache-2.0
"""Dense convolutions in bfloat16 and float16 on a CPU: PyTorch's own, or through float32."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsebwd import grad, reference
from sparsebwd.backends import dense
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, random_tensor

PROBLEM = ConvProblem.parse("n2c6h7w8k4r3s3p1")
NARROW = ConvProblem.parse("n1c28h37w1k42r3s3u2p1d1")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def half(request):
    return request.param


def operands(problem, dtype, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    sizes = problem.output_size, problem.input_size, problem.weight_size
    return [random_tensor(size, generator=generator, dtype=dtype, memory_format=memory_format) for size in sizes]


def set_native(monkeypatch, native):
    monkeypatch.setattr(dense, "is_native", lambda dtype: native)


@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_through_float32_where_pytorch_has_no_kernels(half, mask, memory_format, monkeypatch):
    set_native(monkeypatch, False)
    tensors = operands(PROBLEM, half, memory_format)
    results = dense.gradients(PROBLEM, *tensors, mask)
    expected = dense.convolution_backward(PROBLEM, *(tensor.float() for tensor in tensors), mask)
    for result, wanted, want in zip(results, expected, mask):
        assert (result is None) == (not want)
        if want:
            assert_bit_equal(result, wanted.to(half))
            assert result.is_contiguous(memory_format=memory_format)


def test_pytorchs_own_where_it_has_kernels(half, monkeypatch):
    set_native(monkeypatch, True)
    tensors = operands(PROBLEM, half)
    results = dense.gradients(PROBLEM, *tensors, (True, True))
    for result, wanted in zip(results, dense.convolution_backward(PROBLEM, *tensors, (True, True))):
        assert_bit_equal(result, wanted)


def test_float32_is_left_alone(monkeypatch):
    set_native(monkeypatch, False)
    assert not dense.goes_through_float32(PROBLEM, torch.float32)
    for shapes in (torch.empty(1), torch.empty(1, dtype=torch.bfloat16, device="meta")):
        assert not dense.widens(shapes, shapes, (0, 0), (1, 1))


@pytest.mark.parametrize(
    "text, wrong",
    [
        (str(NARROW), True),
        ("n2c61h3w2k32r3s1u1p2x3d3g1", True),
        ("n1c28h37w3k42r3s3p1", False),
        ("n1c28h37w4k42r3s3p2d2", True),
        ("n1c28h37w1k42r1s1", False),
        ("n1c28h1w37k42r3s3p1", False),
    ],
)
def test_rows_narrower_than_the_filter_go_through_float32(text, wrong, half, monkeypatch):
    set_native(monkeypatch, True)
    problem = ConvProblem.parse(text)
    assert dense.goes_through_float32(problem, half) is wrong
    _, input, weight = operands(problem, half)
    assert dense.widens(input, weight, problem.padding, problem.dilation) is wrong
    assert dense.widens(input.float(), weight.float(), problem.padding, problem.dilation, half) is wrong


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_narrow_rows_are_right(memory_format):
    """In plain PyTorch 2.13 with AVX512_BF16 the gradient of the weight has an error of 4.7e32."""
    tensors = operands(NARROW, torch.bfloat16, memory_format)
    exact = dense.convolution_backward(NARROW, *(tensor.double() for tensor in tensors), (True, True))
    grad_output, input, weight = tensors
    geometry = {"stride": NARROW.stride, "padding": NARROW.padding}
    for name in ("dense", "auto"):
        results = (
            grad.conv2d_input(input.shape, weight, grad_output, **geometry, backend=name),
            grad.conv2d_weight(input, weight.shape, grad_output, **geometry, backend=name),
        )
        for result, expected in zip(results, exact):
            assert_error_bounded(result, expected, expected.to(torch.bfloat16))


@pytest.mark.slow
def test_limit_of_onednn_counts(monkeypatch):
    program = "import torch; from sparsebwd.backends import dense; print(dense.is_native(torch.bfloat16))"
    for limit, names in (("avx2", "ONEDNN_MAX_CPU_ISA"), ("AVX2_VNNI", "DNNL_MAX_CPU_ISA")):
        monkeypatch.setenv(names, limit)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"
        monkeypatch.delenv(names)


@pytest.mark.parametrize("stride", ["2", "4", "1x2"])
@pytest.mark.parametrize("channels", [2, 3, 5, 7])
@pytest.mark.parametrize("mask", [(True, True), (False, True)])
def test_strided_1x1_with_few_channels_is_computed_of_contiguous_tensors(channels, stride, mask, monkeypatch):
    """Of channels_last tensors PyTorch's gradient of the weight corrupts memory: it must not see any."""
    seen = []
    own = dense.convolution_backward
    monkeypatch.setattr(dense, "convolution_backward", lambda problem, *given: (seen.extend(given[:3]), own(problem, *given))[1])
    problem = ConvProblem.parse(f"n2c{channels}h8w8k6r1s1u{stride}")
    grad_output, input, weight = tensors = operands(problem, torch.float32, torch.channels_last)
    results = dense.gradients(problem, *tensors, mask)
    assert all(tensor.is_contiguous() for tensor in seen) and len(seen) == 3
    wanted = reference.conv2d_input(problem, weight, grad_output), reference.conv2d_weight(problem, input, grad_output)
    for result, exact, want in zip(results, wanted, mask):
        assert (result is None) == (not want)
        if want:
            torch.testing.assert_close(result, exact.float(), rtol=1e-4, atol=1e-4)
            assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("text", ["n2c3h8w8k6r1s1", "n2c8h8w8k6r1s1u2", "n2c3h8w8k6r3s3u2p1"])
def test_others_keep_their_layout(text, monkeypatch):
    seen = []
    monkeypatch.setattr(dense, "convolution_backward", lambda problem, *given: seen.extend(given[:3]))
    problem = ConvProblem.parse(text)
    tensors = operands(problem, torch.float32, torch.channels_last)
    dense.gradients(problem, *tensors, (True, True))
    assert all(one is two for one, two in zip(seen, tensors))
