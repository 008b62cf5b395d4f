# SPDX-License-Identifier: Apache-2.0
"""threshold="predicted": the history of sigma, and the thresholds that come from it."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import LENGTH, Model, empty_history, sigmas, tau_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import backends_on

from sparsebwd import prune_gradient, reference
from sparsebwd.functional import sparse_conv2d
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, poisoned_memory, random_tensor

KEY = torch.tensor([3, -4])
LIMIT = 5.0  # of z-scores, see test_pruning.py


# ---- the history


def test_the_kernels_keep_as_many():
    header = Path(__file__).parents[1] / "csrc/include/sparsebwd/prune.h"
    assert int(re.search(r"kSigmaHistory = (\d+);", header.read_text())[1]) == LENGTH


FLOAT32 = st.floats(0, width=32) | st.sampled_from([0.0, math.inf, math.nan, 1e-45, 3.4e38]).map(
    lambda x: float(np.float32(x))
)


@given(values=st.lists(FLOAT32, max_size=3 * LENGTH))
def test_predictions_are_those_of_the_model(values):
    """As floats and as tensors, which is how devices compute them."""
    model, by_floats, by_tensors = Model(), empty_history(), empty_history()
    for sigma in values:
        wanted = model.predict(sigma)
        got = reference.predict(by_floats, sigma), reference.predict(by_tensors, torch.tensor(sigma).double()).item()
        for value in got:
            assert value == wanted or math.isnan(value) and math.isnan(wanted)
        model.check(by_floats)
        model.check(by_tensors)


def test_the_sum_is_rounded_in_the_order_of_places():
    """Which decides on which side of the middle of two float32s the mean lies. In some orders the small values are lost;
    added with compensation, as by sum() from Python 3.12 on, they never would be."""
    means = set()
    for values in itertools.permutations((2.0**24, 1.0, 2.0**-29, 2.0**-29)):
        model, by_floats, by_tensors = Model(), empty_history(), empty_history()
        for sigma in values:
            model.predict(sigma)
            reference.predict(by_floats, sigma)
            reference.predict(by_tensors, torch.tensor(sigma).double())
        mean = model.predict(1.0)
        means.add(mean)
        assert reference.predict(by_floats, 1.0) == mean, values
        assert reference.predict(by_tensors, torch.tensor(1.0).double()) == mean, values
    assert means == {2.0**22, 2.0**22 + 0.5}


# ---- pruning


def gradients(dtype, memory_format, generator) -> list[torch.Tensor]:
    """Of all sizes, and some from which nothing is learnt."""
    grads = [
        random_tensor((2, 9, 5, 6), generator=generator, dtype=dtype, memory_format=memory_format, density=0.8) * scale
        for scale in (0.01, 3.0, 0.0, 40.0, 1e-4, 1.0, 1.0, 0.5, 2.0, 1.0)
    ]
    grads[5][1, 2, 3, 4] = math.inf
    grads[6][0, 8, 4, 5] = math.nan
    return grads


def test_thresholds_follow_the_history(backend, dtype, memory_format, generator):
    model, history = Model(), empty_history()
    for grad in gradients(dtype, memory_format, generator):
        exact = prune_gradient(grad, 90, backend=backend)
        with poisoned_memory():
            result = torch.ops.sparsebwd.prune(grad, KEY, f"backend={backend}", history)
        pruned = reference.PrunedGradient(*result)
        assert_bit_equal(pruned.sigma, exact.sigma, "sigma")
        assert_bit_equal(pruned.tau, tau_of(model.predict(exact.sigma.item()), dtype), "tau")
        assert_bit_equal(pruned.values, reference.prune_at(grad, KEY, pruned.tau), "values")
        assert_bit_equal(pruned.density, reference.density(pruned.values), "density")
        model.check(history)
    assert len(model.recorded) == 7


@pytest.mark.parametrize("backend", [*backends_on("cpu"), "auto"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_the_backward_pass_prunes_at_predicted_thresholds(placement, backend, dtype, memory_format, stats, generator):
    """With a 1x1 identity as weight, AGB hands on what was pruned."""
    channels = 24
    weight = torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1).requires_grad_()
    model, history = Model(), empty_history()
    for scale in (1.0, 0.1, 5.0, 2.0, 1.0, 0.3):
        grad = scale * random_tensor((3, channels, 5, 6), generator=generator, dtype=dtype, memory_format=memory_format)
        x = torch.ones_like(grad, requires_grad=True)
        state = generator.get_state()
        y = sparse_conv2d(
            x, weight, placement=placement, backend=backend, generator=generator, sigma_history=history, layer_id=7
        )
        y.backward(grad)
        key = torch.empty(2, dtype=torch.int64).random_(generator=generator.set_state(state))
        sigma = reference.prune(grad, key, Pruning()).sigma
        tau = tau_of(model.predict(sigma.item()), dtype)
        assert_bit_equal(x.grad + 0, reference.prune_at(grad, key, tau) + 0)
        assert_bit_equal(stats[-1].sigma, sigma)
        assert_bit_equal(stats[-1].tau, tau)
        assert stats[-1].layer_id == 7
        model.check(history)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_elements_pass_through_and_are_not_learnt(value, backend, dtype, generator):
    grad = random_tensor((2, 8, 3, 5), generator=generator, dtype=dtype)
    grad[1, 3, 2, 1] = value
    history = empty_history()
    first = prune_gradient(grad, 90, backend=backend, sigma_history=history)
    assert_bit_equal(first.values, grad)
    assert first.tau == 0 and not history.any()
    prune_gradient(torch.ones(2, 8, 3, 5, dtype=dtype), 90, backend=backend, sigma_history=history)
    before = history.clone()
    second = prune_gradient(grad, 90, backend=backend, sigma_history=history)
    assert second.tau > 0 and not torch.isfinite(second.sigma) and 0 < second.density < 1
    assert_bit_equal(second.values[~torch.isfinite(grad)], grad[~torch.isfinite(grad)])
    assert torch.isfinite(second.values).sum() == grad.numel() - 1
    assert torch.equal(history, before)


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (0, 4, 3, 3)])
def test_gradients_without_a_sigma_are_not_learnt(shape, backend):
    history = empty_history()
    prune_gradient(torch.ones(2, 4, 3, 3), 90, backend=backend, sigma_history=history)
    before = history.clone()
    pruned = prune_gradient(torch.full(shape, -0.0), 90, backend=backend, sigma_history=history)
    assert_bit_equal(pruned.values, torch.zeros(shape))
    assert pruned.tau > 0 and pruned.sigma == 0 and pruned.density == 0 and torch.equal(history, before)


def test_threshold_that_overflows_prunes_nothing():
    history = empty_history()
    prune_gradient(torch.full((1, 4, 2, 2), 1e6), 99, sigma_history=history)
    grad = torch.ones(1, 4, 2, 2, dtype=torch.float16)
    pruned = prune_gradient(grad, 99, sigma_history=history)
    assert pruned.tau == 0 and history[0] == 2
    assert_bit_equal(pruned.values, grad)


def test_percentile_50_prunes_nothing_but_learns(backend, generator):
    history = empty_history()
    grad = random_tensor((2, 8, 3, 3), generator=generator)
    for i in (1, 2):
        assert_bit_equal(prune_gradient(grad, 50, backend=backend, sigma_history=history).values, grad)
        assert history[0] == i


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_expectation_of_each_element(scale, backend, generator):
    """Without bias, also where the gradient has become so many times smaller: 400 draws of each of 240 elements."""
    grad = random_tensor((2, 6, 4, 5), generator=generator)
    history = empty_history()
    prune_gradient(grad * scale, 90, sigma_history=history)
    draws = [prune_gradient(grad, 90, generator, backend=backend, sigma_history=history.clone()) for _ in range(400)]
    mean = torch.stack([draw.values for draw in draws]).double().mean(0)
    tau, magnitude = draws[0].tau.double(), grad.double().abs()
    assert_bit_equal(draws[0].tau, tau_of(sigmas(history)[0], torch.float32))
    deviation = (magnitude * (tau - magnitude)).clamp(min=0).sqrt() / math.sqrt(len(draws))
    # Rarer events, or rarer exceptions, are not normal enough for a z-score.
    frequent = (magnitude > 0.1 * tau) & (magnitude < 0.9 * tau)
    assert frequent.sum() > 80
    assert torch.all(((mean - grad).abs() / deviation)[frequent] < LIMIT)
    kept = magnitude >= tau
    torch.testing.assert_close(mean[kept], grad.double()[kept], rtol=1e-12, atol=0)


BAD_HISTORIES = [
    ([0] * 5, TypeError, r"sigma_history: got list; accepted: None, or a contiguous int32 tensor of shape \(5,\) on"),
    (torch.zeros(5), TypeError, "sigma_history: got torch.float32; accepted: None, or"),
    (torch.zeros(5, dtype=torch.int64), TypeError, "sigma_history: got torch.int64"),
    (empty_history()[:4], ValueError, r"sigma_history: got shape \(4,\), strides \(1,\); accepted"),
    (torch.zeros(10, dtype=torch.int32)[::2], ValueError, r"sigma_history: got shape \(5,\), strides \(2,\)"),
    (empty_history().to("meta"), ValueError, "sigma_history: got device meta; accepted: .* on cpu"),
]


@pytest.mark.parametrize("history, error, message", BAD_HISTORIES)
def test_bad_histories(history, error, message):
    with pytest.raises(error, match=message):
        prune_gradient(torch.ones(2, 3), 90, sigma_history=history)
    with pytest.raises(error, match=message):
        sparse_conv2d(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 1, 1), sigma_history=history)


@pytest.mark.parametrize("recorded", [0, 3])
def test_opcheck(recorded, backend):
    grad_output, input, weight = torch.randn(2, 6, 5, 4), torch.randn(2, 4, 7, 6), torch.randn(6, 4, 3, 3)
    history = empty_history()
    for _ in range(recorded):
        reference.predict(history, 1.0)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    config = (KEY, Pruning(backend=backend).text, 3)
    operands = (grad_output, input, weight)
    torch.library.opcheck(torch.ops.sparsebwd.prune.default, (grad_output, KEY, f"backend={backend}", history))
    torch.library.opcheck(
        torch.ops.sparsebwd.conv2d_backward.default, (*operands, *geometry, *config, (True, True, True), history)
    )
    operands = (input.requires_grad_(), weight.requires_grad_(), None)
    torch.library.opcheck(torch.ops.sparsebwd.conv2d.default, (*operands, *geometry, *config, history))
