# SPDX-License-Identifier: Apache-2.0
"""The forward pass in bfloat16 and float16 on a CPU: through float32 where PyTorch has no kernels or wrong ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sparsebwd
from sparsebwd import reference
from sparsebwd.backends import dense
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, random_tensor

SEGFAULT = ConvProblem.parse("n2c61h3w2k32r3s1u1p2x3d3g1")
"""In plain PyTorch 2.13 with AVX512_BF16 its forward pass is a segmentation fault."""

# Rows narrower than the filter, all padding, one pixel; and none of that.
PROBLEMS = [SEGFAULT] + [
    ConvProblem.parse(text)
    for text in (
        "n1c28h37w1k42r3s3u2p1", "n1c28h1w37k42r3s3u2p1", "n2c5h1w1k9r3s3p1", "n2c5h3w3k9r3s3", "n2c6h4w2k6r1s3p0x3g6",
        "n2c5h2w3k9r3s3p2d2", "n0c3h5w5k4r3s3p1", "n2c8h6w7k4r3s3u2p1g2",
    )
]  # fmt: skip


HALVES = [torch.bfloat16, torch.float16]
WAYS = [(dtype, native) for dtype in HALVES for native in {False, dense.is_native(dtype)}]


@pytest.fixture(params=HALVES, ids=["bfloat16", "float16"])
def half(request):
    return request.param


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a CPU whose instructions oneDNN has no kernels for."""
    monkeypatch.setattr(dense, "is_native", lambda dtype: False)


def operands(problem, dtype, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    sizes = problem.input_size, problem.weight_size
    return [random_tensor(size, generator=generator, dtype=dtype, memory_format=memory_format) for size in sizes]


def geometry(problem):
    return problem.stride, problem.padding, problem.dilation, problem.groups


def layer_of(problem, dtype, **settings):
    conv = torch.nn.Conv2d(problem.c, problem.k, (problem.r, problem.s), *geometry(problem), dtype=dtype)
    return sparsebwd.SparseConv2d.from_conv2d(conv, **settings)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["training", "frozen", "eval", "without gradients"])
def test_each_way_forward_is_that_of_float32_rounded(half, mode, memory_format, without_kernels):
    problem = ConvProblem.parse("n2c6h7w8k4r3s3p1")
    input = operands(problem, half, memory_format)[0]
    layer = layer_of(problem, half).to(memory_format=memory_format).train(mode != "eval")
    if mode == "frozen":
        layer.requires_grad_(False)
    with torch.set_grad_enabled(mode != "without gradients"):
        output = layer(input)
    expected = F.conv2d(input.float(), layer.weight.float(), layer.bias.float(), *geometry(problem)).to(half)
    assert_bit_equal(output, expected)
    assert output.stride() == expected.stride()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_rounds_the_operands_first(half, training, grad, without_kernels):
    problem = ConvProblem.parse("n2c6h7w8k4r3s3p1")
    input = operands(problem, torch.float32)[0]
    layer = layer_of(problem, torch.float32).train(training)
    with torch.autocast("cpu", half), torch.set_grad_enabled(grad):
        output = layer(input)
        assert torch.is_autocast_enabled("cpu")
    rounded = (operand.to(half).float() for operand in (input, layer.weight, layer.bias))
    assert_bit_equal(output, F.conv2d(*rounded, *geometry(problem)).to(half))


def test_an_evaluated_layer_has_gradients(half, without_kernels):
    problem = ConvProblem.parse("n2c6h7w8k4r3s3p1")
    input = operands(problem, half)[0].requires_grad_()
    layer = layer_of(problem, half).eval()
    output = layer(input)
    grad_output = torch.randn_like(output)
    grads = torch.autograd.grad(output, (input, layer.weight, layer.bias), grad_output)
    wide = [operand.detach().float().requires_grad_() for operand in (input, layer.weight, layer.bias)]
    expected = torch.autograd.grad(F.conv2d(*wide, *geometry(problem)), wide, grad_output.float())
    for grad, wanted in zip(grads, expected):
        assert_bit_equal(grad, wanted.to(half))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(half, padding, without_kernels):
    input = torch.randn(2, 3, 6, 6).to(half)
    conv = torch.nn.Conv2d(3, 4, 3, padding=padding, dtype=half)
    for training in (True, False):
        output = sparsebwd.SparseConv2d.from_conv2d(conv).train(training)(input)
        expected = F.conv2d(input.float(), conv.weight.float(), conv.bias.float(), padding=padding).to(half)
        assert_bit_equal(output, expected)


@pytest.mark.parametrize("padding, wrong", [("same", False), ("valid", True), ((1, 1), True), ((1, 2), True)])
def test_what_may_be_wrong_goes_through_float32_where_there_are_kernels(half, padding, wrong, monkeypatch):
    monkeypatch.setattr(dense, "is_native", lambda dtype: True)
    width = 3 if padding == "same" else 2
    input, weight = torch.empty(1, 2, 5, width, dtype=half), torch.empty(2, 2, 3, 3, dtype=half)
    assert dense.widens(input, weight, padding, (1, 1)) is wrong


@pytest.mark.parametrize("half, native", WAYS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_of_odd_geometries_are_right(problem, half, training, native, monkeypatch):
    """Whether or not PyTorch has kernels: where it does, they must not be asked for what they are wrong in."""
    monkeypatch.setattr(dense, "is_native", lambda dtype: native)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input = operands(problem, half, memory_format)[0].requires_grad_()
        layer = layer_of(problem, half, percentile=None).train(training)
        output = layer(input)
        exact = [operand.detach().double().requires_grad_() for operand in (input, layer.weight, layer.bias)]
        expected = F.conv2d(*exact, *geometry(problem))
        assert_error_bounded(output.detach(), expected.detach(), expected.detach().to(half))
        grad_output = random_tensor(problem.output_size, generator=torch.Generator().manual_seed(1), dtype=half)
        grads = torch.autograd.grad(output, (input, layer.weight), grad_output)
        for grad, wanted in zip(
            grads,
            (
                reference.conv2d_input(problem, layer.weight.detach(), grad_output),
                reference.conv2d_weight(problem, input.detach(), grad_output),
            ),
        ):
            assert_error_bounded(grad, wanted, wanted.to(half))


def test_batched_gradients_go_through_float32(half, without_kernels):
    problem = ConvProblem.parse("n2c6h7w8k4r3s3p1")
    input = operands(problem, half)[0].requires_grad_()
    layer = layer_of(problem, half)
    output = layer(input)
    grads_output = torch.randn(3, *output.shape).to(half)
    wanted = [input, layer.weight, layer.bias]
    together = torch.autograd.grad(output, wanted, grads_output, is_grads_batched=True, retain_graph=True)
    wide = [operand.detach().float().requires_grad_() for operand in wanted]
    for index in range(3):
        alone = torch.autograd.grad(F.conv2d(*wide, *geometry(problem)), wide, grads_output[index].float())
        for grads, grad in zip(together, alone):
            assert_error_bounded(grads[index], grad.double(), grad.to(half))


@pytest.mark.parametrize("training", [True, False])
def test_compiled(half, training, without_kernels):
    problem = ConvProblem.parse("n2c6h7w8k4r3s3p1")
    input = operands(problem, half)[0]
    layer = layer_of(problem, half, percentile=None).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        assert_bit_equal(compiled(input).detach(), layer(input).detach())
