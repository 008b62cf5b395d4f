# SPDX-License-Identifier: Apache-2.0
"""The layer: an nn.Conv2d in every respect but its backward pass."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import sparsebwd
from sparsebwd import SparseConv2d
from sparsebwd.testing import assert_bit_equal, random_tensor

LAYERS = {
    "plain": ((4, 6, 3), {}),
    "no bias": ((4, 6, 3), {"bias": False, "padding": 1}),
    "stride": ((4, 6, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}),
    "same": ((4, 6, 3), {"padding": "same"}),
    "same, even kernel": ((4, 6, (4, 2)), {"padding": "same"}),
    "same, dilated": ((4, 6, 2), {"padding": "same", "dilation": (1, 3)}),
    "valid": ((4, 6, 3), {"padding": "valid"}),
    "groups": ((4, 6, 3), {"groups": 2}),
    "depthwise": ((4, 8, 3), {"groups": 4, "padding": 1}),
    "dilation": ((4, 6, 3), {"dilation": 2, "padding": 2}),
    "1x1": ((4, 6, 1), {"stride": 2}),
    "reflect": ((4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": ((4, 6, 3), {"padding": 2, "padding_mode": "replicate"}),
    "circular": ((4, 6, 3), {"padding": 1, "padding_mode": "circular", "stride": 2}),
    "reflect, same": ((4, 6, (4, 3)), {"padding": "same", "padding_mode": "reflect"}),
}

each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=list(LAYERS))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def _integer_parameters(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random_tensor(parameter.shape, generator=generator, integer=True))


def _gradients(module, x, grad_output):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad_output)


SIZES = [(2, 4, 8, 7), (1, 4, 8, 7), (0, 4, 8, 7), (4, 8, 7)]


@pytest.mark.parametrize(
    "name, size",
    # Reflecting an empty batch is refused by nn.Conv2d, too.
    [(name, size) for name in LAYERS for size in SIZES if size[0] or "reflect" not in name],
)
def test_output_and_gradients_are_those_of_conv2d(name, size, backend, generator):
    """Exactly: all numbers are small integers."""
    positional, named = LAYERS[name]
    layer = SparseConv2d(*positional, **named, percentile=None, backend=backend)
    _integer_parameters(layer)
    conv = nn.Conv2d(*positional, **named)
    conv.load_state_dict(layer.state_dict())
    x = random_tensor(size, generator=generator, integer=True)
    expected = conv(x)
    assert_bit_equal(layer(x), expected)
    grad_output = random_tensor(tuple(expected.shape), generator=generator, integer=True, density=0.5)
    for actual, wanted in zip(_gradients(layer, x, grad_output), _gradients(conv, x, grad_output)):
        assert torch.equal(actual, wanted)


@each_layer
def test_gradcheck(arguments):
    positional, named = arguments
    positional = (2, 2 if named.get("groups") else 3, positional[2])
    named = {**named, "groups": min(named.get("groups", 1), 2)}
    layer = SparseConv2d(*positional, **named, percentile=None, dtype=torch.float64)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


@each_layer
def test_state_dict_round_trip(arguments):
    positional, named = arguments
    conv, layer = nn.Conv2d(*positional, **named), SparseConv2d(*positional, **named)
    assert list(layer.state_dict()) == list(conv.state_dict())
    layer.load_state_dict(conv.state_dict())
    back = nn.Conv2d(*positional, **named)
    back.load_state_dict(layer.state_dict())
    for name, value in conv.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
        assert torch.equal(layer.state_dict()[name], value)


def test_constructor_takes_what_conv2d_takes():
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, 3, 2, 1, 1, 2, False, "reflect", None, torch.float64)
    torch.manual_seed(1)
    layer = SparseConv2d(4, 6, 3, 2, 1, 1, 2, False, "reflect", None, torch.float64, percentile=95)
    assert isinstance(layer, nn.Conv2d)
    assert torch.equal(layer.weight, conv.weight) and layer.bias is None
    assert layer.percentile == 95.0 and layer.placement == "output" and layer.backend == "auto"
    assert layer.sigma_estimator == "corrected" and layer.threshold == "exact"
    for name in inspect.signature(nn.Conv2d).parameters:
        if name not in ("kernel_size", "device", "dtype", "bias"):
            assert getattr(layer, name) == getattr(conv, name)


def test_training_prunes_and_evaluation_does_not(generator):
    layer = SparseConv2d(4, 6, 3, percentile=90)
    x = random_tensor((2, 4, 8, 7), generator=generator)
    grad_output = random_tensor((2, 6, 6, 5), generator=generator)
    dense = _gradients(layer.to_conv2d(), x, grad_output)
    torch.manual_seed(0)
    pruned = _gradients(layer, x, grad_output)
    assert not torch.allclose(pruned[0], dense[0])
    torch.manual_seed(0)
    x_again = x.clone().requires_grad_()
    output = sparsebwd.functional.sparse_conv2d(x_again, layer.weight, layer.bias, percentile=90)
    assert_bit_equal(torch.autograd.grad(output, x_again, grad_output)[0], pruned[0])
    before = torch.get_rng_state()
    for actual, wanted in zip(_gradients(layer.eval(), x, grad_output), dense):
        assert_bit_equal(actual, wanted)
    assert torch.equal(before, torch.get_rng_state())


def test_settings_may_change_later():
    layer = SparseConv2d(4, 6, 3, percentile=None)
    layer.percentile = 95
    assert layer.percentile == 95.0 and isinstance(layer.percentile, float)
    layer.placement, layer.backend, layer.sigma_estimator = "input", "reference", "as_printed"
    assert repr(layer).endswith("percentile=95.0, placement=input, backend=reference, sigma_estimator=as_printed)")
    assert repr(SparseConv2d(4, 6, 3)).endswith("stride=(1, 1), percentile=90.0, placement=output)")


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("percentile", 49, ValueError),
        ("percentile", 100, ValueError),
        ("percentile", "90", TypeError),
        ("placement", "auto", ValueError),
        ("backend", "abacus", ValueError),
        ("backend", None, TypeError),
        ("sigma_estimator", "exact", ValueError),
    ],
)
def test_bad_settings(name, value, error):
    message = f"{name}: got {value!r}; accepted"
    with pytest.raises(error, match=message):
        SparseConv2d(4, 6, 3, **{name: value})
    with pytest.raises(error, match=message):
        SparseConv2d.from_conv2d(nn.Conv2d(4, 6, 3), **{name: value})
    layer = SparseConv2d(4, 6, 3)
    with pytest.raises(error, match=message):
        setattr(layer, name, value)
    assert layer.percentile == 90.0


def test_bad_input():
    layer = SparseConv2d(4, 6, 3)
    with pytest.raises(ValueError, match="the input has 5"):
        layer(torch.ones(2, 5, 8, 7))
    with pytest.raises(TypeError, match="weight: got torch.float32; accepted: torch.float64"):
        layer(torch.ones(2, 4, 8, 7).double())


# ---- from_conv2d, to_conv2d


@each_layer
def test_conversion_shares_everything(arguments):
    positional, named = arguments
    conv = nn.Conv2d(*positional, **named).eval()
    conv.weight.requires_grad_(False)
    rng = torch.get_rng_state()
    layer = SparseConv2d.from_conv2d(conv, percentile=95, placement="input", backend="dense")
    assert torch.equal(rng, torch.get_rng_state())
    assert type(layer) is SparseConv2d and type(conv) is nn.Conv2d
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    assert (layer.percentile, layer.placement, layer.backend) == (95.0, "input", "dense")
    back = layer.to_conv2d()
    assert type(back) is nn.Conv2d and back.weight is conv.weight and back.bias is conv.bias
    assert back.__dict__.keys() == conv.__dict__.keys() and repr(back) == repr(conv)
    x = torch.randn(2, 4, 8, 7)
    assert_bit_equal(layer(x), conv(x))
    assert_bit_equal(back.train()(x), layer.train()(x))


def test_conversion_keeps_hooks_and_separates_containers():
    conv = nn.Conv2d(4, 6, 3)
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    layer = SparseConv2d.from_conv2d(conv)
    layer(torch.ones(2, 4, 8, 7))
    assert calls == [1]
    layer.register_buffer("extra", torch.ones(1))
    layer.weight = nn.Parameter(torch.zeros(6, 4, 3, 3))
    assert "extra" not in conv._buffers and conv.weight is not layer.weight


def test_conversion_of_a_sparse_layer_changes_its_settings():
    layer = SparseConv2d(4, 6, 3, percentile=95)
    other = SparseConv2d.from_conv2d(layer, percentile=None)
    assert layer.percentile == 95.0 and other.percentile is None
    assert other.weight is layer.weight and other.layer_id != layer.layer_id


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: nn.LazyConv2d(2, 3), lambda: None])
def test_conversion_refuses_other_modules(make):
    with pytest.raises(TypeError, match="conv: got .*; accepted: torch.nn.Conv2d"):
        SparseConv2d.from_conv2d(make())


# ---- copies


def _pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def _saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, copy.copy, _pickled, _saved])
def test_copies_keep_settings_and_get_an_id_of_their_own(copy_of):
    layer = SparseConv2d(4, 6, 3, padding=1, percentile=95, placement="input", backend="reference")
    other = copy_of(layer)
    assert repr(other) == repr(layer) and other.sigma_estimator == layer.sigma_estimator
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    assert len({layer.layer_id, other.layer_id, SparseConv2d(1, 1, 1).layer_id}) == 3
    grad_output = torch.randn(2, 6, 8, 7)
    x = torch.randn(2, 4, 8, 7)
    results = []
    for module in (layer, other):
        torch.manual_seed(1)
        results.append(_gradients(module, x, grad_output))
    for actual, wanted in zip(*results):
        assert_bit_equal(actual, wanted)


def test_layer_id_is_reported(stats):
    layers = [SparseConv2d(4, 4, 3, padding=1) for _ in range(2)]
    nn.Sequential(*layers)(torch.randn(2, 4, 8, 7)).sum().backward()
    assert [record.layer_id for record in stats] == [layer.layer_id for layer in reversed(layers)]


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(frozen, backend):
    layer = SparseConv2d(4, 6, 3, backend=backend)
    tensors = {"input": torch.randn(2, 4, 8, 7, requires_grad=True), **dict(layer.named_parameters())}
    tensors[frozen].requires_grad_(False)
    layer(tensors["input"]).square().sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen)


def test_meta_device():
    layer = SparseConv2d(4, 6, 3, padding=1, device="meta")
    x = torch.empty(2, 4, 8, 7, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
