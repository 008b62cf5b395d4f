# SPDX-License-Identifier: Apache-2.0
"""What calls of a layer save: checks already made, the dispatcher, hashes, calls of PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsebwd.nn
from sparsebwd import Pruning, SparseConv2d, decision, functional
from sparsebwd.backends import base, dense
from sparsebwd.functional import sparse_conv2d
from sparsebwd.problem import ConvProblem
from sparsebwd.registration import plain

INPUT, WEIGHT, BIAS = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4)


@pytest.fixture
def checks(monkeypatch):
    """The arguments of each check that is made, of nothing known before."""
    made, check = [], functional._check
    monkeypatch.setattr(functional, "_check", lambda *args: made.append(args) or check(*args))
    monkeypatch.setattr(functional, "_checked", {})
    return made


def test_the_same_is_checked_once(checks):
    layer = nn.Sequential(SparseConv2d(3, 4, 3, padding="same"), nn.ReLU())
    for _ in range(3):
        layer(torch.randn(2, 3, 5, 5))
    assert len(checks) == 1


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"input": INPUT.double()}, TypeError, "weight: got torch.float32; accepted: torch.float64"),
        ({"input": INPUT.int()}, TypeError, "input: got torch.int32"),
        ({"input": INPUT.to_sparse()}, TypeError, "input: got a tensor with the layout"),
        ({"input": INPUT[0, 0]}, ValueError, "input: got shape"),
        ({"input": INPUT[:, :2]}, ValueError, "weight: got shape .* input has 2"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight: got torch.bfloat16"),
        ({"bias": BIAS.bfloat16()}, TypeError, "bias: got torch.bfloat16"),
        ({"bias": BIAS[:3]}, ValueError, "bias: got shape"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias: got device meta"),
        ({"groups": 3}, ValueError, "weight: got shape .* with groups=3"),
        ({"stride": "1"}, TypeError, "stride: got '1'"),
        ({"padding": "most"}, ValueError, "padding: got 'most'"),
        ({"generator": 1}, TypeError, "generator: got int"),
        ({"sigma_history": torch.zeros(3)}, TypeError, "sigma_history: got torch.float32"),
    ],
)
def test_what_differs_is_checked_again(checks, changed, error, message):
    good = {"input": INPUT, "weight": WEIGHT, "bias": BIAS}
    sparse_conv2d(**good)
    with pytest.raises(error, match=message):
        sparse_conv2d(**{**good, **changed})
    sparse_conv2d(**good)


def test_no_more_is_remembered_than_some(checks, monkeypatch):
    monkeypatch.setattr(functional, "_MOST_CHECKED", 2)
    for size in (5, 6, 7, 8, 5):
        sparse_conv2d(torch.randn(1, 3, size, size), WEIGHT)
        assert len(functional._checked) <= 2
    assert len(checks) == 5


def test_what_is_not_plain():
    assert plain(INPUT, WEIGHT, nn.Parameter(BIAS))
    for tensor in (None, INPUT.to_sparse(), INPUT.to("meta"), torch._neg_view(INPUT), torch.nested.nested_tensor([INPUT, INPUT])):
        assert not plain(tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert not plain(INPUT)
    seen = []
    torch.vmap(lambda tensor: seen.append(plain(tensor)) or tensor)(INPUT)
    output = (INPUT * WEIGHT.sum()).sum((1, 2, 3))
    output.register_hook(lambda gradient: seen.append(plain(gradient)))
    torch.autograd.grad(output, WEIGHT, torch.eye(2), is_grads_batched=True)
    torch.func.grad(lambda tensor: seen.append(tensor) or tensor.sum())(INPUT.detach())
    assert seen[:2] == [False, False] and not plain(seen[2])


def test_both_dense_gradients_are_one_call(monkeypatch):
    masks, backward = [], dense.convolution_backward
    monkeypatch.setattr(dense, "convolution_backward", lambda *args: masks.append(args[-1]) or backward(*args))
    layer = SparseConv2d(3, 4, 3, backend="dense")
    layer(INPUT.clone().requires_grad_()).sum().backward()
    assert masks == [(True, True)]


@pytest.mark.parametrize("value", [Pruning(95.0, where="faster"), ConvProblem.parse("n2c4h5w5k8r3s3")])
def test_equal_values_have_equal_hashes_also_from_elsewhere(value):
    other = pickle.loads(pickle.dumps(value))
    assert other is not value and other == value and hash(other) == hash(value)
    different = value.replace(percentile=80) if isinstance(value, Pruning) else ConvProblem.parse("n2c4h5w5k8r3s1")
    assert different != value and value != str(value)


def test_nothing_known_is_of_other_settings(checks):
    """Sizes were checked for another backend, which can run them."""
    weight = WEIGHT.detach().double().requires_grad_()
    sparse_conv2d(INPUT.double(), weight)
    with pytest.raises(RuntimeError, match="'dense' cannot run"):
        sparse_conv2d(INPUT.double(), weight, backend="dense")


@pytest.fixture
def convolved(monkeypatch):
    """Inputs of the layers that did more than F.conv2d, or had to find out."""
    seen = []
    monkeypatch.setattr(sparsebwd.nn, "convolve", lambda input, *args, **kwargs: seen.append(input) or input)
    return seen


def test_what_stays_dense_is_found_out_by_one_look_up(convolved):
    layer = SparseConv2d(3, 4, 3, where="faster")
    assert layer(INPUT).grad_fn.name() == nn.Conv2d(3, 4, 3)(INPUT).grad_fn.name()
    assert not convolved
    for changed in (INPUT.double(), INPUT[0], INPUT.as_subclass(nn.Parameter), INPUT.to("meta")):
        layer(changed)
        assert convolved.pop() is changed
    with torch.autocast("cpu", torch.bfloat16):
        layer(INPUT)
    layer.stride = [1, 1]
    layer(INPUT)
    layer.stride, layer.where = (1, 1), "everywhere"
    layer(INPUT)
    assert len(convolved) == 3
    with pytest.raises(ValueError, match="weight: got shape .* input has 2"):
        SparseConv2d(3, 4, 3, where="faster")(INPUT[:, :2])


@pytest.fixture
def looked_up(monkeypatch):
    """Sizes of the inputs of which it had to be found out whether they stay dense."""
    seen, ask = [], sparsebwd.nn.is_dense
    monkeypatch.setattr(sparsebwd.nn, "is_dense", lambda input, *args, **layout: seen.append(input.shape) or ask(input, *args, **layout))
    return seen


def test_what_is_known_to_stay_dense_is_not_asked_again(looked_up, convolved):
    layer, plain_layer = SparseConv2d(3, 4, 3, where="faster"), nn.Conv2d(3, 4, 3)
    plain_layer.load_state_dict(layer.state_dict())

    def asked(input, of=layer):
        looked_up.clear()
        assert torch.equal(of(input), plain_layer(input.to(torch.float32)))
        return bool(looked_up)

    channels_last = INPUT.to(memory_format=torch.channels_last)
    assert asked(INPUT) and not asked(INPUT) and not asked(channels_last)
    assert asked(INPUT[:, :, 1:]) and asked(INPUT) and not asked(INPUT)
    layer.padding_mode = plain_layer.padding_mode = "circular"
    assert asked(INPUT) and not asked(INPUT)  # which adds nothing
    for changed in (layer, plain_layer):
        changed.padding = (1, 1)
        changed._reversed_padding_repeated_twice = [1, 1, 1, 1]
    assert asked(INPUT) and asked(INPUT)
    for changed in (layer, plain_layer):
        changed.padding, changed.padding_mode = (0, 0), "zeros"
    assert asked(INPUT) and not asked(INPUT)
    for changed in (INPUT.double(), INPUT[0], INPUT.as_subclass(nn.Parameter)):
        looked_up.clear()
        layer(changed)
        assert looked_up and convolved.pop() is changed
    with torch.autocast("cpu", torch.bfloat16):
        layer(INPUT)
    assert looked_up and convolved.pop() is INPUT
    # Whatever is set, comes or is copied may change it.
    for change in (lambda: setattr(layer, "stride", (1, 1)), lambda: setattr(layer, "percentile", 95), layer.train, base.forget_choices):
        assert not asked(INPUT)
        change()
        assert asked(INPUT)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert asked(INPUT, other) and not asked(INPUT, other)


def test_what_one_layout_may_gain_by_is_asked_each_time(looked_up, monkeypatch):
    monkeypatch.setattr(
        decision, "why_not_faster", lambda pruning, problem, device, dtype, channels_last: None if channels_last else "slower"
    )
    base.forget_choices()
    layer = SparseConv2d(3, 4, 3, where="faster")
    try:
        for _ in range(2):
            looked_up.clear()
            layer(INPUT)
            assert looked_up
    finally:
        base.forget_choices()


def test_choices_are_made_anew_where_a_backend_comes(convolved):
    class Faster(dense.DenseBackend):
        name = "faster"

        def why_not_faster(self, *args):
            return None

    layer = SparseConv2d(3, 4, 3, where="faster")
    layer(INPUT)
    assert not convolved
    base.register(Faster())
    try:
        layer(INPUT)
        assert len(convolved) == 1
    finally:
        del base._backends["faster"]
        base.forget_choices()
    layer(INPUT)
    assert len(convolved) == 1


def test_what_is_converted_to_be_faster_works_inside_transforms():
    for layer in (SparseConv2d(3, 4, 3, where="faster"), SparseConv2d(64, 64, 3, where="faster")):
        input = torch.randn(2, layer.in_channels, 24, 24)
        output = torch.vmap(lambda image, layer=layer: layer(image[None])[0])(input)
        torch.testing.assert_close(output, layer(input))
