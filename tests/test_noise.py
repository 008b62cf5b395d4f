# SPDX-License-Identifier: Apache-2.0
"""noise=: what is measured, how a budget is shared, and what a controller does to a training run.

Statistical tests compare a z-score with LIMIT, see test_pruning.py.
"""

from __future__ import annotations

import copy
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebwd
from sparsebwd import NoiseController, Pruning, SparseConv2d, convert, reference
from sparsebwd.noise import allocate
from sparsebwd.noise.measure import RATIOS, Measurement, weights_of
from sparsebwd.testing import assert_bit_equal

LIMIT = 5.0


def network(widths=(12, 16, 20), norm=nn.BatchNorm2d, inplace=True) -> nn.Sequential:
    torch.manual_seed(7)
    layers, channels = [], 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5))


def batch(images=16, size=8):
    generator = torch.Generator().manual_seed(3)
    scale = torch.exp(torch.randn(images, 1, 1, 1, generator=generator))
    return torch.randn(images, 3, size, size, generator=generator) * scale, torch.randint(5, (images,), generator=generator)


def loss_of(model):
    return lambda images, labels: F.cross_entropy(model(images), labels)


def sparse_layers(model) -> list[SparseConv2d]:
    return [module for module in model.modules() if isinstance(module, SparseConv2d)]


def set_ratio(layer, ratio) -> None:
    layer.sigma_history[-1:].view(torch.float32).fill_(ratio)


# ---- a layer


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("threshold", ["exact", "sampled", "predicted"])
def test_a_layer_prunes_at_its_ratio(placement, threshold, backend, generator, stats):
    """tau is ratio * sigma: as with the percentile of that quantile, to the bit."""
    z = torch.tensor(reference.quantile(99.0)).item()  # of a float32
    layers = [
        SparseConv2d(8, 16, 3, **{"placement": placement, "threshold": threshold, "backend": backend}, **asked)
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


def gradients(model, part):
    return torch.autograd.grad(loss_of(model)(*part), weights_of(model))


def squares(ones, others) -> float:
    return sum((one.double() - other.double()).square().sum().item() for one, other in zip(ones, others))


@pytest.mark.parametrize(
    "settings",
    [
        {"percentile": 95},
        {"density": 0.3},
        {"percentile": 90, "placement": "input"},
        {"percentile": 95, "granularity": ("row", 4)},
        {"percentile": 90, "granularity": "sample"},
        {"percentile": 90, "granularity": "channel"},
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


def copy_without_pruning(model):
    return sparsebwd.revert(copy.deepcopy(model))


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
    before = random.getstate(), numpy.random.get_state()[1].tolist()
    measured = 0
    for seed in range(6):
        controller._seed, controller._next = seed, 0
        controller.step(*batch())
        measured += controller.noise is not None
    assert measured == 6 and (random.getstate(), numpy.random.get_state()[1].tolist()) == before


def test_a_batch_of_one_image_is_waited_out(caplog):
    model = convert(network((4,)), noise=0.1, where="everywhere")
    controller = NoiseController(model, loss_of(model), start=1)
    for _ in range(3):
        controller.step(torch.randn(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    assert controller.noise is None
    assert [record.getMessage() for record in caplog.records] == [
        "noise: a batch of one image cannot be measured, which takes two halves: waiting for a larger one"
    ]
    controller.step(*batch())
    assert controller.noise is not None


def test_other_parameters_are_measured_anew(caplog):
    """Loading makes layers dense, until the next measurement otherwise; what a controller says of them would be wrong."""
    model = convert(network(), noise=0.3, where="everywhere", backend="reference")
    controller = NoiseController(model, loss_of(model), start=1, every=1000)
    for _ in range(4):
        controller(*batch()).backward()
    controller._next = 1000
    before, seconds = controller.ratios, controller.seconds
    assert any(before.values())
    controller(*batch())
    assert controller.seconds == seconds
    model.to("cpu", memory_format=torch.channels_last)
    controller(*batch())
    assert controller.ratios == before and controller.seconds == seconds
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not any(layer.sigma_history.any() for layer in sparse_layers(model))
    controller(*batch())
    assert controller.seconds > seconds and any(controller.ratios.values())
    assert [layer.sigma_history[-1:].view(torch.float32).item() for layer in sparse_layers(model)] == pytest.approx(
        list(controller.ratios.values())
    )


def test_layers_that_have_no_noise_any_more():
    for change in (lambda model: setattr(model[0], "percentile", 90), sparsebwd.revert):
        model = convert(network(), noise=0.3, where="everywhere")
        controller = NoiseController(model, loss_of(model))
        change(model)
        with pytest.raises(RuntimeError, match="noise: the layer '0' has no noise= any more; make a new NoiseController"):
            controller.step(*batch())


WRONG = [None, "1", b"1", True, [], {}, {"0": 1.0}, -1, 0.5, 2**70, math.nan, math.inf, -math.inf, torch.tensor(1.0), 10**400]


def test_states_are_checked_before_anything_of_them_is_used():
    """Each entry, and each within it, with each of WRONG: refused, or what could have been."""
    model = convert(network(), noise=0.1, where="everywhere")
    controller = NoiseController(model, loss_of(model), start=1, every=5)
    for _ in range(3):
        controller(*batch()).backward()
    good = controller.state_dict()
    accepted = []

    def places(value, at=()):
        yield at
        if isinstance(value, dict):
            for name in value:
                yield from places(value[name], (*at, name))

    for at in places(good):
        for wrong in WRONG:
            state = copy.deepcopy(good)
            if at:
                owner = state
                for name in at[:-1]:
                    owner = owner[name]
                owner[at[-1]] = wrong
            else:
                state = wrong
            try:
                controller.load_state_dict(state)
            except (TypeError, ValueError):
                assert controller.state_dict() == good
            else:
                accepted.append((".".join(at), wrong))
                controller._next = 0
                for _ in range(2):
                    controller.step(*batch())
                    controller.observe(torch.tensor(1.0))
                controller.load_state_dict(good)
    names = {name for name, _ in accepted}
    numbers = {"noise", "density", "speedup", *(f"guard.{name}" for name in ("total", "late", "first", "recent", "smooth", "lowest"))}
    assert names <= {"resting", "off", "ratios.0", "ratios.3", "ratios.6", *numbers}
    assert all(value in (True, {}, 0.5) for name, value in accepted if name not in numbers)


# ---- sharing


def curves(*pairs) -> list[allocate.Curves]:
    """noise = a z², time = b / (1 + z)."""
    return [
        allocate.Curves(SparseConv2d(1, 1, 1), RATIOS, a * RATIOS**2, b / (1 + RATIOS), b / (1 + RATIOS), b, 1.0)
        for a, b in pairs
    ]


def test_a_bit_of_noise_buys_as_much_time_everywhere():
    found = curves((1.0, 1.0), (4.0, 1.0), (1.0, 10.0))
    ratios = allocate.share(found, 5.0)
    noise = sum(curve.at(ratio)[0] for curve, ratio in zip(found, ratios))
    assert noise == pytest.approx(5.0, rel=0.01) and noise <= 5.0
    worth = [b / (1 + z) ** 2 / (2 * a * z) for z, (a, b) in zip(ratios, ((1, 1), (4, 1), (1, 10)))]
    assert max(worth) / min(worth) < 1.25  # as far as neighbouring ratios are apart
    time = sum(curve.at(ratio)[1] for curve, ratio in zip(found, ratios))
    for _ in range(300):  # no other ratios of that noise take less time
        other = torch.tensor(ratios) * torch.exp(0.3 * torch.randn(3))
        other *= math.sqrt(5.0 / sum(curve.at(ratio.item())[0] for curve, ratio in zip(found, other)))
        assert sum(curve.at(ratio.item())[1] for curve, ratio in zip(found, other)) > time * 0.997


def test_what_gains_nothing_is_not_pruned():
    assert allocate.share(curves((1.0, 0.0), (1.0, 1.0)), 2.0)[0] == 0
    assert allocate.share(curves((0.0, 1.0)), 1.0) == [RATIOS[-1]]
    assert allocate.share(curves((1.0, 1.0)), 0.0) == [0.0]
    assert allocate.share([], 1.0) == []


# ---- the controller


def train(model, controller, steps, rate=0.05, size=16):
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(5, (size,), generator=generator)
        images = torch.randn(size, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1).float() - 2
        optimiser.zero_grad()
        loss = controller(images, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_noise_comes_to_the_budget():
    """Over draws, on other batches than those that were measured."""
    model = convert(network((16, 24, 32)), noise=0.2, where="everywhere")
    controller = NoiseController(model, loss_of(model), start=5, every=20)
    assert str(controller) == "noise not measured yet (budget 20 %)"
    train(model, controller, 45, size=32)
    assert controller.noise == pytest.approx(0.2, rel=0.5)
    assert 0 < controller.density < 0.6 and controller.speedup > 1.5
    assert "% of SGD's (budget 20 %), density 0." in str(controller) and str(controller).endswith("x (expected)")
    dense, ratios = copy_without_pruning(model), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(5, (32,), generator=generator)
        images = torch.randn(32, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1).float() - 2
        exact = gradients(dense, (images, labels))
        halves = [gradients(dense, (images[part], labels[part])) for part in (slice(16), slice(16, 32))]
        noise = sum(squares(gradients(model, (images, labels)), exact) for _ in range(8)) / 8
        ratios.append(noise / (squares(*halves) / 4))
    assert 0.5 * 0.2 < sum(ratios) / 4 < 1.6 * 0.2


def test_a_run_that_is_resumed_has_the_same_bits():
    def begin():
        torch.manual_seed(0)
        model = convert(network(), noise=0.1, where="everywhere")
        return model, NoiseController(model, loss_of(model), start=4, every=6)

    whole, controller = begin()
    train(whole, controller, 12)
    states = copy.deepcopy((whole.state_dict(), controller.state_dict()))
    parts = [(whole, controller)]
    for model_first in (True, False):
        model, other = begin()
        if not model_first:
            other.load_state_dict(states[1])
        model.load_state_dict(states[0])
        if model_first:
            other.load_state_dict(states[1])
        parts.append((model, other))
    for model, other in parts:
        train(model, other, 12)  # the optimiser begins anew in all of them
        assert other.state_dict() == controller.state_dict()
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())
    assert any(controller.ratios.values())


def test_refusals():
    model = convert(network(), noise=0.1, where="everywhere")
    with pytest.raises(TypeError, match="model: got int"):
        NoiseController(3, loss_of(model))
    with pytest.raises(TypeError, match="loss: got int; accepted: a function of a batch"):
        NoiseController(model, 3)
    with pytest.raises(ValueError, match="model: has no SparseConv2d layer"):
        NoiseController(nn.Linear(2, 2), loss_of(model))
    with pytest.raises(ValueError, match="every: got 0; accepted: at least 1"):
        NoiseController(model, loss_of(model), every=0)
    controller = NoiseController(model, lambda *_: 3.0, start=1)
    controller.step(*batch())
    with pytest.raises(TypeError, match="loss: returned float; accepted: a tensor of one element"):
        controller.step(*batch())
    controller = NoiseController(model, loss_of(model), start=1)
    for wrong in (2.5, None, torch.zeros(2)):
        with pytest.raises(TypeError, match="loss: got .*; accepted: a tensor of one element"):
            controller.observe(wrong)
    controller.step()
    with pytest.raises(TypeError, match="batch: got a sparse or nested tensor"):
        controller.step(torch.randn(4, 3, 8, 8), torch.eye(4).to_sparse())
    with pytest.raises(ValueError, match="batch: got no tensor of images; accepted: batches that can be cut in half"):
        controller.step({"images": torch.randn(4, 3, 8, 8)})
    with pytest.raises(ValueError, match="state: accepted: what state_dict"):
        controller.load_state_dict({})
    other = convert(network((4,)), noise=0.1, where="everywhere")
    with pytest.raises(ValueError, match="ratios: got .*; accepted: values for 0, 3, 6"):
        controller.load_state_dict(NoiseController(other, loss_of(other)).state_dict())
    sparse_layers(model)[0].noise = 0.2
    with pytest.raises(ValueError, match="noise: got layers with 0.1, 0.2; accepted: one for the whole network"):
        NoiseController(model, loss_of(model))


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


PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from test_noise import convert, loss_of, network, NoiseController

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = convert(network(), noise=0.2, where="everywhere", backend="reference")
parallel = DistributedDataParallel(model)
controller = NoiseController(parallel, loss_of(parallel), start=2, every=3)
generator = torch.Generator().manual_seed(rank)
for _ in range(6):
    images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
    controller(images, labels).backward()
states = [None, None]
distributed.all_gather_object(states, (controller.ratios, controller.noise, controller.density))
assert states[0] == states[1] and any(states[0][0].values()), states
grads = [None, None]
distributed.all_gather_object(grads, [parameter.grad.sum().item() for parameter in model.parameters()])
assert grads[0] == grads[1]
print("the same", states[0][0])
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_have_the_same_thresholds(tmp_path):
    program = tmp_path / "processes.py"
    program.write_text(PROCESSES.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2
