# SPDX-License-Identifier: Apache-2.0
"""noise=: what a layer makes of it, and what is measured.

Statistical tests compare a z-score with LIMIT, see test_pruning.py.
"""

from __future__ import annotations

import copy
import math
import random

import numpy
import pytest
import torch
from noisy import batch, copy_without_pruning, gradients, loss_of, network, set_ratio, sparse_layers, squares
from torch import nn

import sparsebwd
from sparsebwd import NoiseController, Pruning, SparseConv2d, convert, reference
from sparsebwd.noise import allocate
from sparsebwd.noise.measure import RATIOS, Measurement
from sparsebwd.testing import assert_bit_equal

LIMIT = 5.0


# ---- a layer


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("threshold", ["exact", "sampled", "predicted"])
def test_a_layer_prunes_at_its_ratio(placement, threshold, backend, generator, stats):
    """tau is ratio * sigma: as with the percentile of that quantile, to the bit."""
    z = torch.tensor(reference.quantile(99.0)).item()  # of a float32
    layers = [
        SparseConv2d(8, 16, 3, placement=placement, threshold=threshold, backend=backend, importance="none", **asked)
        for asked in ({"noise": 0.1}, {"percentile": 99.0})
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    set_ratio(layers[0], z)
    inputs = torch.randn((4, 8, 9, 9), generator=generator)
    for _ in range(2):
        grads = []
        for layer in layers:
            torch.manual_seed(5)
            x = inputs.clone().requires_grad_()
            layer(x).square().sum().backward()
            grads.append(x.grad)
        assert stats[-1].tau > 0
        torch.testing.assert_close(stats[-2].tau, stats[-1].tau, rtol=2**-22, atol=0)
        torch.testing.assert_close(*grads)
    if threshold == "predicted":
        assert torch.equal(layers[0].sigma_history[:-1], layers[1].sigma_history)
    if placement == "output":
        assert stats[-1].density == stats[-2].density < 0.9


def test_images_have_thresholds_of_their_own(backend, memory_format, generator, stats):
    """By the input, unless they are to have one: as with a percentile of that quantile."""
    z = torch.tensor(reference.quantile(99.0)).item()
    inputs = torch.randn((4, 8, 9, 9), generator=generator) * torch.tensor([0.1, 1.0, 1.0, 3.0]).view(4, 1, 1, 1)
    grads = {}
    for name, asked in {
        "auto": {"noise": 0.1},
        "image": {"percentile": 99.0, "importance": "image"},
        "none": {"noise": 0.1, "importance": "none"},
    }.items():
        torch.manual_seed(5)
        layer = SparseConv2d(8, 16, 3, backend=backend, **asked).to(memory_format=memory_format)
        if layer.noise:
            set_ratio(layer, z)
        layer(inputs.contiguous(memory_format=memory_format)).square().sum().backward()
        grads[name] = layer.weight.grad
    assert stats[-1].tau > 0 and stats[-3].density != stats[-1].density
    torch.testing.assert_close(grads["auto"], grads["image"])
    assert not torch.allclose(grads["auto"], grads["none"], rtol=0.01)


def test_without_a_controller_nothing_is_pruned(memory_format, generator):
    """And without a ratio the gradients are those of dense convolutions."""
    layer, dense = SparseConv2d(8, 16, 3, noise=0.1), nn.Conv2d(8, 16, 3)
    dense.load_state_dict(layer.state_dict())
    assert layer.state_dict().keys() == dense.state_dict().keys()
    grads = []
    for module in (layer, dense):
        x = torch.randn((4, 8, 9, 9), generator=torch.Generator().manual_seed(1)).contiguous(memory_format=memory_format)
        x.requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_tensors_give_the_same_threshold_as_numbers(generator):
    """As on devices, where the ratio stays on the device."""
    grad = torch.randn((3, 8, 5, 5), generator=generator)
    for threshold in ("exact", "predicted", "sampled"):
        pruning = Pruning(noise=0.1, threshold=threshold)
        state = torch.zeros(pruning.state_size, dtype=torch.int32)
        state[-1:].view(torch.float32).fill_(2.5)
        settings, history = reference.resolve(pruning, state)
        by_number = reference.find_threshold(grad, settings, None if history is None else history.clone())
        on_device = pruning.at(state[-1:].view(torch.float32)[0].double())
        for number, tensor in zip(by_number, reference.find_threshold(grad, on_device, history)):
            assert_bit_equal(number, tensor)
        assert by_number[1] / by_number[0] == pytest.approx(2.5)


def test_compiled_code_takes_new_ratios():
    torch._dynamo.reset()
    model = nn.Sequential(SparseConv2d(4, 8, 3, noise=0.1, backend="reference"))
    compiled, counts = torch.compile(model, backend="eager"), []
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ratio in (0.0, 1.0, 3.0):
            set_ratio(model[0], ratio)
            with sparsebwd.DensityMonitor(model) as monitor:
                compiled(x).square().sum().backward()
            counts.append(monitor.as_dict()["total"]["density"])
    assert counts[0] == 1 and counts[0] > counts[1] > counts[2]


def test_cuda_kernels_get_the_threshold_from_the_device(generator):
    """Where the ratio is a tensor: as what they predict from, and the host reads nothing."""
    from sparsebwd.backends import cuda

    grad, ratio = torch.randn((2, 8, 5, 5), generator=generator), torch.tensor(2.5, dtype=torch.float64)
    pruning = Pruning(noise=0.1).at(ratio)
    raw = cuda._raw_pruning(grad, torch.zeros(2, dtype=torch.int64), pruning, None)
    _, tau = reference.find_threshold(grad, pruning)
    assert raw.quantile == 1.0 and raw.sigma_history[0] == 1
    assert_bit_equal(raw.sigma_history[1:2].view(torch.float32)[0], tau)
    by_number = cuda._raw_pruning(grad, torch.zeros(2, dtype=torch.int64), Pruning(noise=0.1).at(2.5), None)
    assert by_number.quantile == 2.5 and by_number.sigma_history is None


def test_settings():
    assert Pruning(noise=0.1) == Pruning.parse("percentile=None,noise=0.1") and Pruning(noise=0.1).percentile is None
    layer = SparseConv2d(4, 4, 3)
    layer.noise = 0.2
    assert layer.percentile is None and layer.sigma_history.shape == (6,)
    assert "noise=0.2" in repr(layer)
    set_ratio(layer, 2.0)
    layer.noise = 0.3
    assert layer.sigma_history[-1] != 0  # another budget is no reason to forget
    assert layer.to_conv2d().state_dict().keys() == {"weight", "bias"}
    layer.density = 0.5
    assert "sigma_history" not in layer._buffers and layer.noise is None


@pytest.mark.parametrize(
    "noise, error, message",
    [
        (0, ValueError, "noise: got 0; accepted: 0 < noise < infinity"),
        (math.inf, ValueError, "noise: got inf"),
        ("much", TypeError, "noise: got 'much'; accepted: a number, 0 < noise < infinity, or None"),
    ],
)
def test_refusals_of_settings(noise, error, message):
    with pytest.raises(error, match=message):
        convert(nn.Conv2d(1, 1, 1), noise=noise)
    with pytest.raises(ValueError, match="got both density and noise; accepted: one of percentile, density, variance, noise"):
        Pruning(density=0.1, noise=0.1)


# ---- measuring


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"percentile": 95},
        {"density": 0.3},
        {"percentile": 90, "placement": "input"},
        {"percentile": 95, "granularity": ("row", 4)},
        {"percentile": 90, "granularity": "sample"},
        {"percentile": 90, "granularity": "channel"},
        {"percentile": 95, "importance": "image"},
        {"density": 0.3, "importance": "image"},
        {"percentile": 95, "importance": "image", "granularity": ("row", 4)},
    ],
    ids=str,
)
def test_noise_is_that_of_many_draws(settings):
    """Of the whole network, one layer's after the other: the mean of ||dW(pruned) - dW||² over many draws, and over random
    signs; that of weights of earlier layers included."""
    norm = nn.BatchNorm2d if settings.get("placement") != "input" else nn.Identity
    model = convert(network(norm=norm), where="everywhere", **settings)
    part = tuple(item[:8] for item in batch())
    layers = sparse_layers(model)
    dense = gradients(copy_without_pruning(model), part)
    # One random sign a weight is little to go by where so few groups are pruned.
    seeds, precision = (40, 0.2) if settings.get("granularity") == "sample" else (8, 0.15)
    for chosen in (layers[1:2], layers):
        for layer in layers:
            layer.pruning = Pruning.parse(layers_text(settings, layer in chosen))
        predicted = []
        for seed in range(seeds):
            measurement = Measurement(model, chosen, loss_of(model), batch(), seed)
            with measurement.opened() as measured:
                measurement.look()
                curves = allocate.curves_of(measured.calls)
                predicted.append(sum(curve.at(curve.fixed)[0] for curve in curves))
        drawn = torch.tensor([squares(gradients(model, part), dense) for _ in range(60)])
        predicted = torch.tensor(predicted)
        error = math.hypot(drawn.std() / math.sqrt(len(drawn)), predicted.std() / math.sqrt(len(predicted)))
        # Curves are straight between ratios, and weights move by a finite step.
        assert abs(predicted.mean() - drawn.mean()) < LIMIT * error + 0.02 * drawn.mean()
        assert error < precision * drawn.mean()


def layers_text(settings, prunes) -> str:
    pruning = Pruning(**settings)
    return pruning.text if prunes else pruning.unpruned.text


def test_variance_is_that_of_halves():
    model = convert(network(), noise=0.1, where="everywhere")
    images, labels = batch()
    dense = copy_without_pruning(model)
    wanted = squares(gradients(dense, (images[:8], labels[:8])), gradients(dense, (images[8:], labels[8:])))
    measurement = Measurement(model, sparse_layers(model), loss_of(model), (images, labels), 0)
    with measurement.opened() as measured:
        pass
    assert measured.variance == pytest.approx(wanted / 2, rel=1e-4)


def test_density_and_kinds_of_calls():
    """Of a layer that is called twice, of one whose input needs no gradient, of one that draws nothing."""
    model = convert(network((12, 12)), noise=0.1, where="everywhere")
    shared = nn.Sequential(*model[:6], model[3], *model[6:])
    for layer in sparse_layers(shared):
        set_ratio(layer, 1.5)
    measurement = Measurement(shared, sparse_layers(shared), loss_of(shared), batch(), 0)
    with measurement.opened() as measured:
        measurement.look()
        assert [call.layer for call in measured.calls] == [model[0], model[3], model[3]]
        assert [call.needs_grad_input for call in measured.calls] == [False, True, True]
        assert all(call.ratio == pytest.approx(1.5) for call in measured.calls)
        curves = allocate.curves_of(measured.calls)
        assert [curve.layer for curve in curves] == [model[0], model[3]]
        for call in measured.calls:
            assert torch.all(call.noise.diff() >= 0) and call.noise[0] == 0
            assert torch.all(call.density.diff() <= 0) and 0 < call.density[-1] < call.density[0] <= 1
        macs = [call.problem.macs for call in measured.calls]
        assert allocate.dense_work(measured.calls) == macs[0] + 2 * macs[1] + 2 * macs[2]
    assert len(RATIOS) == len(measured.calls[0].noise)


class Everything(nn.Module):
    """Draws, remembers, and is called in more than one way."""

    def __init__(self):
        super().__init__()
        self.body, self.dropout = network(), nn.Dropout(0.3)

    def forward(self, x):
        return self.body(self.dropout(x))


def test_measuring_leaves_no_trace():
    model = convert(Everything(), noise=0.1, where="everywhere", threshold="predicted")
    controller = NoiseController(model, loss_of(model), start=1)
    loss_of(model)(*batch()).backward()
    before = copy.deepcopy(model)
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    controller.step(*batch())
    controller.step(*batch())
    assert controller.noise is not None and controller.seconds > 0
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(grad, parameter.grad) for grad, parameter in zip(grads, model.parameters()))
    for one, other in zip(before.modules(), model.modules()):
        assert one.training == other.training and len(other._forward_hooks) == len(other._forward_pre_hooks) == 0
        if isinstance(other, SparseConv2d):
            assert torch.equal(one.sigma_history[:-1], other.sigma_history[:-1])
            assert other.sigma_history[-1:].view(torch.float32) == pytest.approx(controller.ratios[next(
                name for name, module in model.named_modules() if module is other
            )])


class Called(nn.Module):
    """Layers that are called by the name of their argument, and what draws from all generators that there are."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3), nn.Linear(12, 5)

    def forward(self, images):
        features = self.first(input=images).relu()
        if random.random() < 0.5:  # other layers each time, as with stochastic depth
            features = self.second(input=features).relu()
        return self.out(features.mean((2, 3)) * numpy.random.uniform(0.9, 1.1))


@pytest.mark.parametrize("placement", ["output", "input"])
def test_measuring_moves_no_generator_and_knows_arguments_by_name(placement):
    model = convert(Called(), noise=0.1, where="everywhere", placement=placement)
    controller = NoiseController(model, loss_of(model), start=1)
    random.seed(0)
    for _ in range(6):
        random.random()
        before = random.getstate(), str(numpy.random.get_state())
        controller._next = 0
        controller.step(*batch())
        assert (random.getstate(), str(numpy.random.get_state())) == before
    assert controller.noise is not None
