# SPDX-License-Identifier: Apache-2.0
"""noise=: how a budget is shared, and what a controller does to a training run."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from noisy import batch, copy_without_pruning, gradients, loss_of, network, sparse_layers, squares
from torch import nn

import sparsebwd
from sparsebwd import NoiseController, SparseConv2d, convert
from sparsebwd.noise import allocate
from sparsebwd.noise.measure import RATIOS

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


def test_thresholds_are_means_over_batches():
    """Of four batches in a row at first, and again where noise is further from the budget than chance explains."""
    model = convert(network(), noise=0.1, where="everywhere")
    controller = NoiseController(model, loss_of(model), start=3, every=4)

    def batches(steps):
        seen = []
        for _ in range(steps):
            train(model, controller, 1)
            seen.append(controller.state_dict())
        return [(state["step"], state["known"], state["next"]) for state in seen]

    assert batches(7) == [(1, 0, 3), (2, 0, 3), (3, 0, 3), (4, 1, 4), (5, 2, 5), (6, 3, 6), (7, 4, 10)]
    before = controller.ratios
    train(model, controller, 4)  # the one at step 10 is one more
    after = controller.ratios
    assert controller.state_dict()["known"] == 4 and after != before
    state = controller.state_dict()
    state["ratios"] = {name: 5 * ratio for name, ratio in after.items()}
    controller.load_state_dict(state)
    assert [known for _, known, _ in batches(4)][-1] == 1


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


PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from noisy import loss_of, network
from sparsebwd import NoiseController, convert

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
