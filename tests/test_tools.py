# SPDX-License-Identifier: Apache-2.0
"""Tools that look for operators or for exact types: they find the layers, or are told to call revert()."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from sparsebwd import SparseConv2d, grad
from sparsebwd.testing import assert_bit_equal

LAYERS = {
    "plain": ((4, 6, 3), {}),
    "no bias": ((4, 6, 3), {"bias": False, "padding": 1}),
    "stride": ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}),
    "same": ((4, 6, 3), {"padding": "same"}),
    "groups": ((4, 6, 3), {"groups": 2}),
    "depthwise": ((4, 8, 3), {"groups": 4, "padding": 1}),
    "dilation": ((4, 6, 3), {"dilation": 2, "padding": 2}),
    "1x1": ((4, 6, 1), {"stride": 2}),
    "reflect": ((4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=list(LAYERS))
aten = torch.ops.aten


# ---- counts of operations


@each_layer
@pytest.mark.parametrize("needs_input_gradient, frozen", [(True, False), (False, False), (True, True)])
def test_flop_counter(arguments, needs_input_gradient, frozen):
    """The counts are those of nn.Conv2d, by module and in total."""
    positional, named = arguments
    counts = []
    for cls in (nn.Conv2d, SparseConv2d):
        model = nn.Sequential(cls(*positional, **named))
        model.requires_grad_(not frozen)
        x = torch.randn(2, 4, 9, 8, requires_grad=needs_input_gradient)
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        by_module = counter.get_flop_counts()
        assert sum(by_module["Sequential.0"].values()) == counter.get_total_flops()
        counts.append(sorted(by_module["Global"].values()))
    assert counts[0] == counts[1] and len(counts[0]) == 2 and all(counts[0])


def test_flops_of_single_operators_and_settings():
    x, weight, g = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.randn(2, 6, 7, 6)
    expected = {}
    for mask in ((True, False, False), (False, True, False)):
        with FlopCounterMode(display=False) as counter:
            aten.convolution_backward(g, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
        expected[mask] = counter.get_total_flops()
    for mask, call in zip(
        expected, (lambda: grad.conv2d_input(x.shape, weight, g), lambda: grad.conv2d_weight(x, weight.shape, g))
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected[mask] > 0
    for settings in ({"threshold": "predicted"}, {"placement": "input"}, {"percentile": None}, {"backend": "dense"}):
        layer = SparseConv2d(4, 6, 3, **settings)
        with FlopCounterMode(display=False) as counter:
            layer(x.clone().requires_grad_()).sum().backward()
        assert counter.get_total_flops() == 2 * 7 * 6 * 2 * 6 * 4 * 9 * 3


def _profiled_flops(layer: nn.Module) -> int:
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        layer(torch.randn(2, 4, 9, 8, requires_grad=True)).sum().backward()
    return sum(event.flops for event in profiler.key_averages() if "conv" in event.key)


@pytest.mark.parametrize("training", [True, False])
def test_profiler_with_flops(training):
    """It counts forward convolutions only, those of nn.Conv2d too."""
    layer = SparseConv2d(4, 6, 3).train(training)
    assert _profiled_flops(layer) == _profiled_flops(layer.to_conv2d()) == 2 * 7 * 6 * 2 * 6 * 4 * 9


# ---- selective activation checkpointing


def _save_convolutions(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator == aten.convolution.default else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("policy", [_save_convolutions, [aten.convolution.default]])
@pytest.mark.parametrize("settings", [{}, {"threshold": "predicted"}, {"placement": "input", "backend": "reference"}])
@pytest.mark.parametrize("autocast", [True, False])
def test_selective_checkpointing_finds_the_convolutions(policy, settings, autocast):
    """They are computed once, and gradients are bit for bit those without checkpointing."""
    model = nn.Sequential(
        SparseConv2d(4, 6, 3, **settings), nn.ReLU(), nn.Dropout(), SparseConv2d(6, 4, 3, bias=False, **settings)
    )
    twin = copy.deepcopy(model)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    results, computed = [], []
    for module, function in (
        (model, model),
        (twin, partial(checkpoint, twin, use_reentrant=False, context_fn=contexts)),
    ):
        torch.manual_seed(0)
        x = torch.randn(2, 4, 9, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), profile() as profiler:
            function(x).float().square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in module.parameters()), *module.buffers()])
        computed.append(sum(event.name == "aten::_convolution" for event in profiler.events()))
    for actual, expected in zip(*results, strict=True):
        assert_bit_equal(actual, expected)
    assert computed == [2, 2]


def test_selective_checkpointing_of_everything_or_nothing():
    model = nn.Sequential(SparseConv2d(4, 6, 3), nn.ReLU(), SparseConv2d(6, 4, 3))
    results = []
    for policy in (CheckpointPolicy.PREFER_SAVE, CheckpointPolicy.PREFER_RECOMPUTE):
        contexts = partial(create_selective_checkpoint_contexts, lambda *args, policy=policy, **kwargs: policy)
        torch.manual_seed(0)
        x = torch.randn(2, 4, 9, 8, requires_grad=True)
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
        results.append(x.grad)
    assert_bit_equal(*results)


def test_compiled_selective_checkpointing():
    """Compared without pruning, since keys are drawn in another order there."""
    model = nn.Sequential(SparseConv2d(4, 6, 3, percentile=None), nn.ReLU(), SparseConv2d(6, 4, 3, percentile=None))
    contexts = partial(create_selective_checkpoint_contexts, _save_convolutions)

    def run(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    compiled(x)
    results, computed = [], []
    for function in (model, compiled):
        with profile() as profiler:
            (gradient,) = torch.autograd.grad(function(x).square().sum(), x)
        results.append(gradient)
        computed.append(sum(event.name == "aten::_convolution" for event in profiler.events()))
    torch.testing.assert_close(*results)
    assert computed == [2, 2]
    torch.compiler.reset()


# ---- imported again

AGAIN = """
import importlib, logging, sys
import torch, sparsebwd

def step(layer):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    layer(x).square().sum().backward()
    return x.grad

def names():
    return [name for name in sys.modules if name.partition(".")[0] == "sparsebwd"]

def delete(*names):
    for name in names:
        del sys.modules[name]

def reload(*names):
    for name in names:
        importlib.reload(sys.modules[name])

class Own(torch.nn.Conv2d):
    def forward(self, x):
        return super().forward(x)

old = sparsebwd.SparseConv2d(4, 4, 3)
expected = step(old)
sparsebwd.register_conv(Own)
numbers = [old.layer_id]
for again, reloads in (
    (lambda: reload("sparsebwd"), True),
    (lambda: reload(*names()), True),
    (lambda: reload(*reversed(names())), True),
    (lambda: delete("sparsebwd"), False),
    (lambda: delete(*names()), False),
    (lambda: delete(*names()), False),
):
    again()
    import sparsebwd
    if reloads:
        own = sparsebwd.convert(torch.nn.Sequential(Own(4, 4, 3)), where="everywhere")[0]
        assert type(own).__name__ == "SparseOwn" and own.layer_id not in numbers
        assert sys.modules["sparsebwd.ranges"].name_of(old.layer_id) == f"layer {old.layer_id}"
        assert old.layer_id in sys.modules["sparsebwd.ranges"]._layers
        numbers.append(own.layer_id)
    new = sparsebwd.convert(old.to_conv2d(), placement="output", where="everywhere")
    assert torch.equal(step(new), expected) and torch.equal(step(old), expected)
    assert sparsebwd.prune_gradient(torch.randn(2, 3)).density <= 1
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        step(new)
    assert counter.get_total_flops() > 0
    assert len(logging.getLogger("sparsebwd").handlers) == 1
    print("as before")
"""


@pytest.mark.slow
def test_imported_again():
    environment = {**os.environ, "SPARSEBWD_LOG": "error"}
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "as before\n" * 6, done.stderr
