# SPDX-License-Identifier: Apache-2.0
"""threshold="predicted": the layer that keeps a history of sigma, together with the rest of PyTorch."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from histories import Model, empty_history, sigmas, tau_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsebwd import DensityMonitor, SparseConv2d, convert, prune_gradient, revert
from sparsebwd.testing import assert_bit_equal, random_tensor


def layer(**settings) -> SparseConv2d:
    return SparseConv2d(4, 6, 3, padding=1, **{"threshold": "predicted", **settings})


def step(module: nn.Module, scale: float = 1.0, dtype=torch.float32) -> None:
    y = module(torch.randn(2, 4, 8, 7, dtype=dtype))
    y.backward(scale * torch.randn_like(y))


def test_each_step_predicts_from_the_steps_before(stats):
    module = layer()
    for scale in (1.0, 10.0, 0.1, 0.1, 0.1, 0.1):
        step(module, scale)
    model = Model()
    for record in stats:
        assert_bit_equal(record.tau, tau_of(model.predict(record.sigma.item()), torch.float32))
    model.check(module.sigma_history)
    assert len(model.recorded) == 6


def test_a_monitor_shows_the_sigma_found_and_the_threshold_used():
    module = layer()
    step(module)
    with DensityMonitor(module) as monitor:
        step(module, 0.01)
    record = monitor.as_dict()["layers"]["SparseConv2d"]
    first, second = sigmas(module.sigma_history)
    assert record["sigma"] == second < 0.1 * first
    assert record["tau"] == tau_of(first, torch.float32).item()
    assert record["density"] < 0.1  # the threshold is far too high for it


def test_only_the_layer_that_predicts_has_a_history():
    exact, predicted = SparseConv2d(4, 6, 3), layer()
    assert exact.threshold == "exact" and predicted.threshold == "predicted"
    assert not list(exact.buffers()) and not hasattr(exact, "sigma_history")
    assert torch.equal(predicted.sigma_history, empty_history())
    assert [name for name, _ in predicted.named_buffers()] == ["sigma_history"]
    assert list(predicted.state_dict()) == ["weight", "bias"]
    assert repr(predicted).endswith("placement=output, threshold=predicted)") and "threshold" not in repr(exact)
    predicted.load_state_dict(exact.to_conv2d().state_dict() | {"weight": torch.ones(6, 4, 3, 3)})


def test_setting_the_threshold_begins_anew():
    module = layer()
    step(module)
    assert module.sigma_history[0] == 1
    module.threshold = "predicted"
    assert module.sigma_history[0] == 0
    module.threshold = "exact"
    assert not list(module.buffers())
    step(module)
    module.threshold = "predicted"
    assert list(module.state_dict()) == ["weight", "bias"] and module.sigma_history[0] == 0


@pytest.mark.parametrize("value", ["fixed", None, 3])
def test_bad_thresholds(value):
    message = f"threshold: got {value!r}; accepted: 'exact', 'predicted'"
    error = ValueError if isinstance(value, str) else TypeError
    for make in (
        lambda: layer(threshold=value),
        lambda: SparseConv2d.from_conv2d(nn.Conv2d(4, 6, 3), threshold=value),
        lambda: convert(nn.Conv2d(4, 6, 3), threshold=value, where="everywhere"),
    ):
        with pytest.raises(error, match=message):
            make()
    module = layer()
    with pytest.raises(error, match=message):
        module.threshold = value
    assert module.threshold == "predicted"


def test_the_history_is_no_number_and_moves_along():
    module = layer()
    step(module)
    before = module.sigma_history.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        assert torch.equal(module.to(dtype).sigma_history, before)
        step(copy.deepcopy(module), dtype=dtype)
    assert module.to("meta").sigma_history.device.type == "meta"
    assert layer(device="meta").sigma_history.device.type == "meta"


def test_new_parameters_begin_anew():
    """However they come, see test_clean_history.py."""
    module = layer()
    step(module)
    module.reset_parameters()
    assert torch.equal(module.sigma_history, empty_history())


@pytest.mark.parametrize("prepare", [lambda module: module.eval(), lambda module: setattr(module, "percentile", None)])
def test_where_nothing_is_pruned_nothing_is_recorded(prepare):
    module = layer()
    step(module)
    with torch.no_grad():
        module(torch.randn(2, 4, 8, 7))
    prepare(module)
    step(module)
    assert module.sigma_history[0] == 1


def test_without_the_input_gradient_that_placement_prunes_nothing_is_recorded():
    module = layer(placement="input")
    step(module)
    assert module.sigma_history[0] == 0


def _pickled(module):
    return pickle.loads(pickle.dumps(module))


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, _pickled, _saved])
def test_copies_go_on_by_themselves(copy_of):
    module = layer()
    step(module)
    other = copy_of(module)
    assert other.threshold == "predicted" and torch.equal(other.sigma_history, module.sigma_history)
    step(other)
    assert other.sigma_history[0] == 2 and module.sigma_history[0] == 1
    assert list(other.state_dict()) == ["weight", "bias"]


def test_a_shallow_copy_may_have_another_threshold():
    module = layer()
    other = copy.copy(module)
    other.threshold = "exact"
    assert module.threshold == "predicted" and other.threshold == "exact"
    copy.copy(other).threshold = "predicted"
    assert other.threshold == "exact" and list(module.state_dict()) == ["weight", "bias"]


def test_conversions_keep_the_history_to_themselves():
    conv = nn.Conv2d(4, 6, 3)
    conv.register_buffer("own", torch.ones(1), persistent=False)
    module = SparseConv2d.from_conv2d(conv, threshold="predicted")
    assert "sigma_history" not in conv._buffers and "own" in module._buffers
    step(module)
    other = SparseConv2d.from_conv2d(module, threshold="predicted")
    assert other.sigma_history[0] == 0 and module.sigma_history[0] == 1
    assert SparseConv2d.from_conv2d(module).threshold == "exact" and module.threshold == "predicted"
    back = module.to_conv2d()
    assert back._buffers.keys() == conv._buffers.keys() and module.threshold == "predicted"
    assert back.__dict__.keys() == conv.__dict__.keys()
    assert back._non_persistent_buffers_set == conv._non_persistent_buffers_set == {"own"}


def test_convert_and_revert():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    keys = [list(vars(module)) for module in model]
    buffers = [name for name, _ in model.named_buffers()]
    convert(model, threshold="predicted", where="everywhere")
    assert [model[i].threshold for i in (0, 3)] == ["predicted", "predicted"]
    step(model)
    assert [model[i].sigma_history[0] for i in (0, 3)] == [1, 1]
    convert(model, placement="input", threshold="predicted", where="everywhere")
    assert [model[i].sigma_history[0] for i in (0, 3)] == [0, 0]  # of another gradient now
    assert (
        convert(model, where="everywhere")[0].threshold == "exact"
        and [name for name, _ in model.named_buffers()] == buffers
    )
    revert(convert(model, threshold="predicted", where="everywhere"))
    assert [list(vars(module)) for module in model] == keys
    assert [name for name, _ in model.named_buffers()] == buffers
    assert not model[0]._non_persistent_buffers_set


# ---- together with the rest of PyTorch


def test_a_layer_that_is_used_twice():
    module = SparseConv2d(4, 4, 3, padding=1, threshold="predicted")
    module(module(torch.randn(2, 4, 8, 7))).square().sum().backward()
    assert module.sigma_history[0] == 2
    first, second = module(torch.randn(2, 4, 8, 7)), module(torch.randn(2, 4, 8, 7))
    (first + second).square().sum().backward()
    assert module.sigma_history[0] == 4


def model_of_blocks(**settings) -> nn.Sequential:
    settings = {"threshold": "predicted", **settings}
    return nn.Sequential(
        SparseConv2d(4, 8, 3, stride=2, padding=1, **settings),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        SparseConv2d(8, 8, 3, padding=1, **settings),
        nn.ReLU(),
        SparseConv2d(8, 4, 1, **{**settings, "threshold": "exact"}),
    )


def train(function, model, steps: int = 6) -> list[torch.Tensor]:
    """The gradients of some steps, in which they become smaller; the histories at the end."""
    results = []
    for seed in range(steps):
        torch.manual_seed(seed)
        x = torch.randn(2, 4, 9, 8, requires_grad=True)
        (function(x).float().square().sum() * 0.5**seed).backward()
        results += [x.grad, *(parameter.grad for parameter in model.parameters())]
        model.zero_grad()
    return results + [module.sigma_history for module in model if getattr(module, "threshold", "") == "predicted"]


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_checkpointing_predicts_the_same(use_reentrant, placement):
    model = model_of_blocks(placement=placement)
    twin = copy.deepcopy(model)

    def checkpointed(x):
        x = checkpoint(twin[:3], x, use_reentrant=use_reentrant)
        return checkpoint(twin[3:], x, use_reentrant=use_reentrant)

    for actual, wanted in zip(train(checkpointed, twin), train(model, model), strict=True):
        assert_bit_equal(actual, wanted)
    assert [twin[i].sigma_history[0] for i in (0, 3)] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("enabled", [False, True], ids=["f32", "bf16"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_compile_predicts_the_same(placement, enabled):
    model = model_of_blocks(placement=placement)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        for actual, wanted in zip(train(compiled, twin), train(model, model), strict=True):
            assert_bit_equal(actual, wanted)
    torch.compiler.reset()


def test_compile_of_pruning_alone():
    histories = empty_history(), empty_history()
    compiled = torch.compile(prune_gradient, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        grad = torch.randn(2, 8, 5, 5) * 0.1**seed
        results = []
        for function, history in zip((compiled, prune_gradient), histories):
            torch.manual_seed(seed)
            results.append(function(grad, 90, sigma_history=history))
        for one, two in zip(*results):
            assert_bit_equal(one, two)
    assert histories[0][0] == 3 and torch.equal(*histories)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="inductor needs a C++ compiler",
)
def test_compile_with_inductor():
    """Within one graph, over graph breaks, and with two forward passes before the first backward pass."""
    shared = SparseConv2d(4, 4, 3, padding=1, threshold="predicted")
    twin = copy.deepcopy(shared)
    compiled = torch.compile(twin, fullgraph=True)

    @torch.compile
    def broken(x):
        x = twin(x)
        torch._dynamo.graph_break()
        return twin(x).relu()

    def gradients_of(module, twice):
        torch.manual_seed(0)
        x = torch.randn(2, 4, 9, 8)
        module(x).square().sum().backward()
        (module(x) * module(-x)).sum().backward()
        twice(x).sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    wanted = gradients_of(shared, lambda x: shared(shared(x)).relu())
    for actual, expected in zip(gradients_of(compiled, broken), wanted):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    assert twin.sigma_history[0] == shared.sigma_history[0] == 5
    torch.testing.assert_close(torch.tensor(sigmas(twin.sigma_history)), torch.tensor(sigmas(shared.sigma_history)))
    torch.compiler.reset()


def test_grad_scaler_sees_overflow():
    module = layer()
    step(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weight, history = module.weight.detach().clone(), module.sigma_history.clone()
    optimizer.zero_grad()
    scaler.scale(module(torch.randn(2, 4, 9, 8)).square().sum() * 1e3).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(module.weight, weight) and scaler.get_scale() < 2.0**127
    assert torch.equal(module.sigma_history, history)


def test_training_goes_as_with_exact_thresholds(generator):
    """Three classes of images told apart by a pattern in noise."""
    patterns = 2 * random_tensor((3, 4, 8, 8), generator=generator)

    def run(threshold):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3),
        )  # fmt: skip
        convert(model, threshold=threshold, where="everywhere")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        with DensityMonitor(model) as monitor:
            for _ in range(40):
                labels = torch.randint(3, (32,))
                loss = F.cross_entropy(model(patterns[labels] + torch.randn(32, 4, 8, 8)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        density = monitor.as_dict()["layers"]["0"]["density"]
        return sum(losses[:5]) / 5, sum(losses[-5:]) / 5, density

    exact, predicted = run("exact"), run("predicted")
    for first, last, density in (exact, predicted):
        assert last < 0.3 * first and 0 < density < 1
    # Gradients shrink as the loss does, so the threshold is a little high.
    assert 0.5 * exact[2] < predicted[2] < 1.2 * exact[2]
