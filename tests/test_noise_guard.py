# SPDX-License-Identifier: Apache-2.0
"""The guard of a NoiseController: networks that collapse without it do not with it."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebwd
from sparsebwd import NoiseController, SparseConv2d
from sparsebwd.noise.guard import STEPS, LossGuard

CLASSES = 8


def mobile(blocks=5, width=16) -> nn.Sequential:
    """Depthwise and 1x1 convolutions in turns, each with BatchNorm, as MobileNet has them."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(blocks):
        for size, groups in ((3, width), (1, 1)):
            convolution = nn.Conv2d(width, width, size, padding=size // 2, groups=groups, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def batch(step, size=8, noise=1.5, images=32):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    prototypes = torch.randn(CLASSES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return prototypes[labels] + noise * torch.randn(images, 3, size, size, generator=generator), labels


def train(steps, guarded, seed=1, blocks=5, task=(), **pruning):
    """The mean loss of the last 20 steps, and the controller. task: size and noise of images."""
    torch.manual_seed(seed)
    model = mobile(blocks)
    with pytest.warns(UserWarning, match="depthwise"):
        sparsebwd.convert(model, where="everywhere", **pruning)
    controller = NoiseController(model, lambda images, labels: F.cross_entropy(model(images), labels), guard=guarded)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = controller(*batch(step, *task))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, controller


@pytest.fixture
def one_thread():
    """So few and small tensors take two threads longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_collapse_is_caught(one_thread, caplog):
    """At percentile 99.5 in 33 layers, means of two seeds: without the guard the loss stays near that of guessing, log(8) = 2.08,
    where it is .7 after dense steps."""
    task = dict(blocks=16, task=(4, 0.5), percentile=99.5)
    alone = [train(120, False, seed, **task) for seed in (1, 2)]
    assert all(controller.noise > 10 for _, controller in alone)  # times that of minibatches
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    guarded = [train(120, True, seed, **task) for seed in (1, 2)]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2 and all("of the noise of minibatches; dense until it is less: 0, 3" in message for message in said)
    assert all(controller.noise <= 1 for _, controller in guarded)
    collapsed, kept = (sum(loss for loss, _ in runs) / 2 for runs in (alone, guarded))
    assert collapsed > 1.8 and kept < collapsed - 0.3


def test_little_noise_makes_nothing_dense(one_thread, caplog):
    _, controller = train(22, True, percentile=90)
    assert 0 < controller.noise < 1 and not caplog.records
    assert all(layer.percentile == 90 for layer in controller._layers.values())


def test_layers_become_dense_and_prune_again(one_thread):
    """And nothing but the network decides which: with thresholds so low that it has no reason, all prune again."""
    _, controller = train(21, True, percentile=99.9999999)
    off = set(controller._off)
    assert off and all(controller._layers[name].percentile is None for name in off)
    state = controller.state_dict()
    assert set(state["off"]) == off and "percentile=99.9999999" in state["off"]["0"]
    controller._off = {name: sparsebwd.Pruning(60) for name in off}
    for step in range(controller._next - controller._step + 1):
        controller.step(*batch(step))
    assert not controller._off and all(controller._layers[name].percentile == 60 for name in off)


def noisy_layers(controller):
    return [layer for layer in controller._layers.values() if layer.sigma_history[-1] != 0]


@pytest.mark.slow
def test_the_network_is_dense_for_a_while_where_the_loss_runs_away(one_thread, caplog):
    _, controller = train(45, True, noise=0.1, backend="reference")
    assert noisy_layers(controller) and not caplog.records
    for _ in range(4 * STEPS):
        controller.observe(torch.tensor(9.0))
    assert not noisy_layers(controller) and not any(controller.ratios.values())
    assert [record.getMessage() for record in caplog.records] == [
        "noise: the loss has run away: the network is dense for 40 steps"
    ]
    for step in range(40):
        controller.step(*batch(step))
        assert not noisy_layers(controller)
    controller.step(*batch(40))
    assert noisy_layers(controller)
    # The next time for longer.
    for _ in range(6 * STEPS):
        controller.observe(torch.tensor(1.0))
    for _ in range(4 * STEPS):
        controller.observe(torch.tensor(math.nan))
    assert caplog.records[-1].getMessage().endswith("dense for 80 steps")


def feed(guard, *losses) -> list[bool]:
    return [any([guard.runs_away(torch.tensor(loss)) for _ in range(STEPS)]) for loss in losses]


def test_when_a_loss_has_run_away():
    assert not any(feed(LossGuard(), 2.3, 2.0, 2.6, 2.2, 1.5, 1.2, 1.4, 1.0, 1.2))
    assert feed(LossGuard(), 2.3, *[0.5] * 12, 2.3, 2.3, 2.3)[-1]
    assert feed(LossGuard(), 2.3, math.inf) == [False, True]
    assert not any(feed(LossGuard(), 0.01, 0.001, 0.0011))
    guard = LossGuard()
    feed(guard, 2.3, *[0.5] * 12)
    guard.forget()
    assert not any(feed(guard, 2.3, 2.3))


def test_a_guard_goes_on_where_it_was():
    losses = [2.3, *[0.5] * 12, 2.0, 2.5, 2.5]
    whole, guard = LossGuard(), LossGuard()
    wanted = feed(whole, *losses)
    found = feed(guard, *losses[:12])
    guard.runs_away(torch.tensor(losses[12]))
    other = LossGuard()
    other.load_state_dict(guard.state_dict(), torch.device("cpu"))
    rest = [any([other.runs_away(torch.tensor(losses[12])) for _ in range(STEPS - 1)]), *feed(other, *losses[13:])]
    assert found + rest == wanted and any(wanted)


def test_controllers_without_layers_of_noise_leave_them_alone():
    layer = SparseConv2d(3, 4, 3, percentile=90)
    controller = NoiseController(layer, lambda images: layer(images).square().mean(), guard=False, start=1)
    for _ in range(3):
        controller(torch.randn(4, 3, 6, 6)).backward()
    assert controller.noise > 0 and controller.ratios == {} and layer.percentile == 90
    assert "thresholds are fixed" in str(controller)
