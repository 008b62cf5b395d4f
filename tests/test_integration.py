# SPDX-License-Identifier: Apache-2.0
"""Together with the rest of PyTorch: compile, autocast, checkpointing. DistributedDataParallel: test_distributed.py."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsebwd import SparseConv2d, grad, prune_gradient
from sparsebwd.backends.dense import is_native
from sparsebwd.functional import sparse_conv2d
from sparsebwd.registration import constant_to_compilers
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, random_tensor


@pytest.fixture(autouse=True)
def _fresh_compiler():
    # Else the tests' layers count as recompilations of one function.
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """A residual block whose input feeds two convolutions, as in a ResNet."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.conv1 = SparseConv2d(4, 8, 3, stride=2, padding=1, bias=False, **settings)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = SparseConv2d(8, 8, 3, padding="same", padding_mode="circular", **settings)
        self.shortcut = SparseConv2d(4, 8, 1, stride=2, **settings)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x))


def _gradients(function, module, x, seed=0):
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    output = function(x)
    output.float().square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return [output.detach(), *gradients]


# ---- torch.compile


# Where nothing is pruned there is no placement.
@pytest.mark.parametrize("percentile, placement", [(90.0, "output"), (90.0, "input"), (None, "output")])
def test_compile_gives_the_same_gradients(percentile, placement, memory_format, backend):
    block = Block(percentile=percentile, placement=placement, backend=backend)
    block.to(memory_format=memory_format)
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=memory_format)
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        for actual, wanted in zip(_gradients(compiled, twin, x, seed), _gradients(block, block, x, seed)):
            assert actual.stride() == wanted.stride()
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_compile_draws_a_key_for_each_convolution(stats):
    """Even for identical layers on the same input, whose keys a compiler could take for equal."""

    def function(x, w1, w2):
        y = sparse_conv2d(x, w1, placement="input") - sparse_conv2d(x, w2, placement="input")
        return y.sum()

    w1 = torch.randn(4, 4, 3, 3)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    torch.manual_seed(0)
    torch.compile(function, fullgraph=True, backend="aot_eager")(x, w1, w1.clone()).backward()
    assert len(stats) == 2
    # With one key the two pruned gradients would cancel.
    assert torch.count_nonzero(x.grad) > 0


def test_compile_with_dynamic_shapes():
    layer = SparseConv2d(4, 6, 3, padding=1, stride=2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 4, 9, 8), (3, 4, 7, 11), (5, 4, 12, 6)):
        x = torch.randn(size)
        for actual, wanted in zip(_gradients(compiled, twin, x), _gradients(layer, layer, x)):
            assert_bit_equal(actual, wanted)


def test_compile_of_evaluation_and_without_gradients():
    layer = SparseConv2d(4, 6, 3)
    x = torch.randn(2, 4, 9, 8)
    expected = layer.to_conv2d()(x).detach()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    layer.eval()
    torch.testing.assert_close(compiled(x), expected)


def test_compile_of_pruning_alone():
    gradient = torch.randn(2, 8, 5, 5)
    torch.manual_seed(0)
    expected = prune_gradient(gradient, 90)
    torch.manual_seed(0)
    actual = torch.compile(prune_gradient, fullgraph=True, backend="aot_eager")(gradient, 90)
    for one, two in zip(actual, expected):
        assert_bit_equal(one, two)


def test_compile_of_the_convolutions_alone():
    input, weight, grad_output = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.randn(2, 6, 5, 4)

    def function(input, weight, grad_output):
        return (
            grad.conv2d_input(input.shape, weight, grad_output, stride=2, padding=1),
            grad.conv2d_weight(input, weight.shape, grad_output, stride=2, padding=1),
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    operands = (input, weight, grad_output)
    for actual, wanted in zip(compiled(*operands), function(*operands)):
        assert_bit_equal(actual, wanted)


def test_constants_are_marked_as_pytorch_marks_them():
    marks = [vars(mark(lambda: None)) for mark in (torch.compiler.assume_constant_result, constant_to_compilers)]
    assert marks[0] == marks[1] != {}


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="inductor needs a C++ compiler",
)
def test_compile_with_inductor():
    layer = SparseConv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(lambda x: F.relu(twin(x)) * 2, fullgraph=True)
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last)
    wanted = _gradients(lambda x: F.relu(layer(x)) * 2, layer, x)
    for actual, expected in zip(_gradients(compiled, twin, x), wanted):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# ---- autocast


@pytest.mark.parametrize("percentile", [90.0, None])
def test_autocast_in_bfloat16(percentile, stats):
    layer = SparseConv2d(16, 24, 3, padding=1, percentile=percentile)
    conv = copy.deepcopy(layer).to_conv2d()
    x = torch.randn(4, 16, 9, 8)

    def through_float32(x):
        operands = (operand.bfloat16().float() for operand in (x, conv.weight, conv.bias))
        return F.conv2d(*operands, padding=1).bfloat16()

    def run(module, function):
        def autocast(x):
            with torch.autocast("cpu", torch.bfloat16, enabled=function is not through_float32):
                return function(x)

        return _gradients(autocast, module, x)

    # Without instructions for bfloat16 the forward pass is that of float32, rounded.
    actual, dense = run(layer, layer), run(conv, conv if is_native(torch.bfloat16) else through_float32)
    assert actual[0].dtype == torch.bfloat16
    assert_bit_equal(actual[0], dense[0])
    for gradient, like in zip(actual[1:], (x, layer.weight, layer.bias)):
        assert gradient.dtype == torch.float32 and gradient.shape == like.shape
    assert len(stats) == 1
    if percentile is not None:
        assert 0.4 < stats[0].density < 0.7
        return
    # The same bfloat16 operands in float64.
    bf16_operands = [t.detach().bfloat16().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    output = F.conv2d(*bf16_operands, padding=1)
    grad_output = (2 * dense[0].float()).bfloat16().double()
    expected = torch.autograd.grad(output, bf16_operands, grad_output)
    for got, wanted, by_torch in zip(actual[1:3], expected, dense[1:3]):
        assert_error_bounded(got.bfloat16(), wanted, by_torch.bfloat16())
    assert_bit_equal(actual[3], dense[3])


def test_backward_within_autocast(backend):
    layer = SparseConv2d(4, 6, 3, backend=backend)
    x = torch.randn(2, 4, 9, 8)
    grad_output = torch.randn(2, 6, 7, 6)
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(y, tuple(layer.parameters()), grad_output))
    for one, two in zip(*gradients):
        assert_bit_equal(one, two)


def test_compile_with_autocast():
    layer = SparseConv2d(4, 6, 3)
    twin = copy.deepcopy(layer)

    def run(module):
        def function(x):
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)

        return function

    x = torch.randn(2, 4, 9, 8)
    compiled = torch.compile(run(twin), fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(_gradients(compiled, twin, x), _gradients(run(layer), layer, x)):
        assert_bit_equal(actual, wanted)


def test_grad_scaler_sees_overflow():
    layer = SparseConv2d(4, 6, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = layer.weight.detach().clone()
    scaler.scale(layer(torch.randn(2, 4, 9, 8)).square().sum() * 1e3).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before) and scaler.get_scale() < 2.0**127


# ---- activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_checkpointing_replays_the_same_pruning(use_reentrant, placement):
    first, second = Block(placement=placement), nn.Sequential(SparseConv2d(8, 4, 3), nn.ReLU())
    model = nn.Sequential(first, second)
    x = torch.randn(2, 4, 12, 11)

    def checkpointed(x):
        for part in model:
            x = checkpoint(part, x, use_reentrant=use_reentrant)
        return x

    state = copy.deepcopy(model.state_dict())
    plain = _gradients(model, model, x)
    model.load_state_dict(state)  # running statistics of the normalisation
    for actual, wanted in zip(_gradients(checkpointed, model, x), plain):
        assert_bit_equal(actual, wanted)


# ---- training


def test_a_training_step_is_reproducible(memory_format, backend):
    def train():
        torch.manual_seed(0)
        model = nn.Sequential(Block(backend=backend), nn.Flatten(), nn.Linear(8 * 5 * 4, 3))
        model.to(memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = random_tensor((4, 4, 9, 8), generator=generator, memory_format=memory_format)
            F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    first, second = train(), train()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.isfinite(value).all()
