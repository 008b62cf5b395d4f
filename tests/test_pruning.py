# SPDX-License-Identifier: Apache-2.0
"""Pruning by every backend that runs here: bits, expectation, second moment, densities.

Statistical tests compare a z-score with LIMIT. Under the hypothesis tested one comparison fails by
chance with probability 5.7e-7, all of them in this file together (fewer than 2000, for each
backend) with less than 0.2 %; seeds are fixed, so a test that passes once always does.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import backends_on

from sparsebwd import prune_gradient, reference
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, fenced, poisoned_memory, random_tensor

LIMIT = 5.0
PERCENTILES = (85.0, 90.0, 95.0, 99.5)
NORMAL = NormalDist()

SHAPES = [
    (2, 3, 5, 7),
    (1, 1, 1, 1),
    (3, 4, 1, 1),
    (2, 5, 1, 9),
    (1, 17, 3, 2),
    (2, 64, 8, 8),
    (2, 30, 17, 33),
    (1, 3, 40, 70),
    (5, 256, 2, 2),
    (0, 4, 3, 3),
]


def _expected(pruned, grad, key):
    """The reference's pruned gradient given the sigma that the backend found."""
    tau = (pruned.sigma.double() * reference.quantile(90)).float()
    if grad.dtype != torch.float64:
        tau = tau.to(grad.dtype).float()
    assert_bit_equal(pruned.tau, tau, "tau")
    return reference.prune_at(grad, key, tau)


def _check_bits(backend, shape, dtype, memory_format, seed):
    generator = torch.Generator().manual_seed(seed)
    grad = fenced(random_tensor(shape, generator=generator, dtype=dtype, memory_format=memory_format, density=0.9))
    key = torch.empty(2, dtype=torch.int64).random_(-(2**63), 2**63 - 1, generator=generator)
    with poisoned_memory():
        result = torch.ops.sparsebwd.prune(grad, key, f"backend={backend}")
    pruned = reference.PrunedGradient(*result)
    mean = grad.double().abs().sum() / max(grad.numel(), 1)
    sigma = (math.sqrt(math.pi / 2) * mean).float()
    # The float64 sum may be taken in any order: equal but for a rounding to float32 at a tie.
    torch.testing.assert_close(pruned.sigma, sigma, rtol=2**-23, atol=0)
    values = _expected(pruned, grad, key)
    assert_bit_equal(pruned.values, values, f"values of shape {shape}")
    assert pruned.values.is_contiguous(memory_format=reference.memory_format(grad))
    assert_bit_equal(pruned.density, reference.density(values), "density")


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_reference(backend, shape, dtype, memory_format):
    _check_bits(backend, shape, dtype, memory_format, 1)


SHAPE = st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20))
CHOICES = {
    "shape": SHAPE,
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "memory_format": st.sampled_from([torch.contiguous_format, torch.channels_last]),
    "seed": st.integers(0, 2**32),
}


@pytest.mark.parametrize("backend", backends_on("cpu"))
@given(**CHOICES)
def test_bits_for_any_shape(backend, shape, dtype, memory_format, seed):
    _check_bits(backend, shape, dtype, memory_format, seed)


@pytest.mark.isa
@given(**CHOICES)
def test_bits_on_each_instruction_set(shape, dtype, memory_format, seed):
    _check_bits(backends_on("cpu")[-1], shape, dtype, memory_format, seed)


@pytest.mark.parametrize("backend", [*backends_on("cpu"), "auto"])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_the_layer_prunes_with_the_bits_of_the_reference(backend, dtype, memory_format, placement, generator):
    """With a 1x1 identity as weight, AGB hands on what was pruned."""
    channels = 24
    grad = random_tensor((3, channels, 5, 6), generator=generator, dtype=dtype, memory_format=memory_format)
    weight = torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1)
    key = torch.tensor([5, -7])
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    grad_input, *_ = torch.ops.sparsebwd.conv2d_backward(
        grad,
        torch.ones_like(grad),
        weight,
        *geometry,
        key,
        Pruning(placement=placement, backend=backend).text,
        0,
        (True, False, False),
    )
    expected = reference.prune(grad, key, Pruning()).values
    assert_bit_equal(grad_input + 0, expected + 0)


def test_number_of_threads_does_not_change_bits(backend, memory_format, generator):
    grad = random_tensor((4, 64, 32, 32), generator=generator, memory_format=memory_format)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            key_generator = torch.Generator().manual_seed(1)
            results.append(prune_gradient(grad, 90, key_generator, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name in ("values", "tau", "sigma", "density"):
            assert_bit_equal(getattr(results[0], name), getattr(other, name), name)


def test_channels_share_a_counter_but_not_a_number(backend):
    """Any two neighbours along any dimension draw independently: the survivors do not correlate."""
    grad = torch.full((64, 16, 16, 16), 0.5)
    grad[:, :, ::4] *= 4  # the mean, and with it tau, is above most elements
    generator = torch.Generator().manual_seed(3)
    pruned = prune_gradient(grad, 90, generator, backend=backend)
    probability = 0.5 / pruned.tau.item()
    assert probability < 0.5
    survivors = (pruned.values != 0).double()[:, :, 1::4] - probability
    for dim in range(4):
        for lag in (1, 2, 3, 4):
            if lag >= survivors.shape[dim]:
                continue
            length = survivors.shape[dim] - lag
            products = survivors.narrow(dim, 0, length) * survivors.narrow(dim, lag, length)
            deviation = probability * (1 - probability) * math.sqrt(products.numel())
            assert abs(products.sum().item()) / deviation < LIMIT, (dim, lag)


def unbiased_classes(grad, values, tau):
    """Checks E[pruned] = g, and what single values may be, in sixteen classes of |g| / tau. Yields of each the values, what
    became of them, and the variance of the sum of that."""
    g, v = grad.double().flatten(), values.double().flatten()
    kept = g.abs() >= tau
    assert torch.equal(v[kept], g[kept])
    g, v = g[~kept], v[~kept]
    probability = g.abs() / tau
    assert torch.all((v == 0) | (v == tau * g.sign()))
    classes = (probability * 16).long()
    for i in range(16):
        a, p, outcome = g[classes == i], probability[classes == i], v[classes == i]
        variance = (tau**2 * p * (1 - p)).sum()
        assert abs((outcome - a).sum() / variance.sqrt()) < LIMIT
        yield a, outcome, variance


@pytest.mark.parametrize("percentile", PERCENTILES)
def test_expectation_and_second_moment(backend, dtype, percentile, generator):
    """E[pruned] = g and E[pruned^2] <= tau^2 + g^2, in sixteen classes of |g| / tau each."""
    grad = random_tensor((8, 32, 32, 32), generator=generator, dtype=dtype)
    values, tau, _, _ = prune_gradient(grad, percentile, generator, backend=backend)
    tau = tau.item()
    for a, outcome, variance in unbiased_classes(grad, values, tau):
        # E[v^2] = tau |g| exactly, which is below the bound tau^2 + g^2.
        excess = (outcome**2 - tau * a.abs()).sum()
        assert abs(excess / (tau * variance.sqrt())) < LIMIT
        slack = LIMIT * tau * variance.sqrt()
        assert (outcome**2).sum() <= (tau**2 + a**2).sum() + slack


def test_expectation_of_each_element(backend, generator):
    """The same gradient pruned with 400 keys: the mean of each of 240 elements."""
    grad = random_tensor((2, 6, 4, 5), generator=generator)
    draws = [prune_gradient(grad, 90, generator, backend=backend) for _ in range(400)]
    mean = torch.stack([draw.values for draw in draws]).double().mean(0)
    tau, magnitude = draws[0].tau.double(), grad.double().abs()
    deviation = (magnitude * (tau - magnitude)).clamp(min=0).sqrt() / math.sqrt(len(draws))
    # Rarer events, or rarer exceptions, are not normal enough for a z-score.
    frequent = (magnitude > 0.1 * tau) & (magnitude < 0.9 * tau)
    assert frequent.sum() > 100
    assert torch.all(((mean - grad).abs() / deviation)[frequent] < LIMIT)
    kept = magnitude >= tau
    # A mean of equal numbers, so equal but for the rounding of the sum.
    torch.testing.assert_close(mean[kept], grad.double()[kept], rtol=1e-12, atol=0)


def _density_of_a_normal_gradient(z: float) -> float:
    """P(|g| > tau) + E[|g| / tau; |g| < tau] for tau = z sigma."""
    phi = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return 2 * (1 - NORMAL.cdf(z)) + 2 / z * (1 / math.sqrt(2 * math.pi) - phi)


def _density_limit(numel: int) -> float:
    # A survivor is a Bernoulli variable, so its variance is at most a quarter.
    return LIMIT * 0.5 / math.sqrt(numel)


@pytest.mark.parametrize("percentile, printed", [(85, 0.62), (90, 0.55), (95, 0.46), (99.5, 0.31)])
def test_density_of_normal_gradients(backend, percentile, printed, generator):
    expected = _density_of_a_normal_gradient(reference.quantile(percentile))
    assert expected == pytest.approx(printed, abs=0.006)
    grad = random_tensor((4, 64, 40, 40), generator=generator)
    density = prune_gradient(grad, percentile, generator, backend=backend).density.item()
    # sigma_hat deviates from 1 by about 0.75 / sqrt(numel), which moves the density by less.
    assert density == pytest.approx(expected, abs=2 * _density_limit(grad.numel()))


DISTRIBUTIONS = {
    "constant": lambda u, g: torch.ones_like(u),
    "uniform": lambda u, g: u,
    "Laplace": lambda u, g: -torch.log1p(-u),
    "Cauchy": lambda u, g: torch.tan(math.pi / 2 * u),
    "sparse": lambda u, g: g * (u < 0.05),
    "two levels": lambda u, g: torch.where(u < 0.2, 1.0, 0.2),
    "just below tau": lambda u, g: torch.where(u < 0.99, 0.79, 0.0),
}


@pytest.mark.parametrize("sigma_estimator", ["corrected", "as_printed"])
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_density_bound_of_any_distribution(backend, name, percentile, sigma_estimator, generator):
    """E[density] <= mean|g| / tau, which is sqrt(2/pi) / z for the corrected estimator."""
    uniform = torch.rand((4, 16, 32, 32), generator=generator)
    normal = torch.randn((4, 16, 32, 32), generator=generator)
    grad = DISTRIBUTIONS[name](uniform, normal)
    density = prune_gradient(
        grad, percentile, generator, sigma_estimator=sigma_estimator, backend=backend
    ).density.item()
    coefficient = {"corrected": math.sqrt(math.pi / 2), "as_printed": math.sqrt(2 / math.pi)}
    bound = 1 / (coefficient[sigma_estimator] * reference.quantile(percentile))
    assert density <= bound + _density_limit(grad.numel())


def test_bounds_of_the_paper():
    bounds = [math.sqrt(2 / math.pi) / reference.quantile(p) for p in PERCENTILES]
    assert bounds == pytest.approx([0.77, 0.62, 0.49, 0.31], abs=0.006)
    assert math.sqrt(math.pi / 2) / reference.quantile(99.5) == pytest.approx(0.49, abs=0.005)


def test_sigma_estimators(backend, generator):
    grad = random_tensor((4, 64, 40, 40), generator=generator) * 3
    corrected, printed = (
        prune_gradient(grad, 90, backend=backend, sigma_estimator=name).sigma.item()
        for name in ("corrected", "as_printed")
    )
    # Var|g| = (1 - 2/pi) sigma^2, so the relative deviation of sigma_hat is 0.756 / sqrt(numel).
    assert corrected == pytest.approx(3, rel=LIMIT * 0.756 / math.sqrt(grad.numel()))
    assert printed / corrected == pytest.approx(2 / math.pi, rel=1e-6)


@pytest.mark.parametrize("percentile", [50, 50.0])
def test_percentile_50_prunes_nothing(backend, dtype, percentile, generator):
    grad = random_tensor((2, 8, 3, 3), generator=generator, dtype=dtype, density=0.5)
    pruned = prune_gradient(grad, percentile, backend=backend)
    assert_bit_equal(pruned.values, grad)
    assert pruned.values.data_ptr() != grad.data_ptr()
    assert pruned.tau == 0 and pruned.sigma > 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_gradients_pass_through(backend, dtype, memory_format, value, generator):
    grad = random_tensor((2, 8, 3, 5), generator=generator, dtype=dtype, memory_format=memory_format)
    grad[1, 3, 2, 1] = value
    pruned = prune_gradient(grad, 99, backend=backend)
    assert_bit_equal(pruned.values, grad)
    assert pruned.tau == 0 and not torch.isfinite(pruned.sigma) and pruned.density == 1


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_gradients(backend, dtype, value):
    grad = torch.full((2, 5, 3, 3), value, dtype=dtype)
    pruned = prune_gradient(grad, 90, backend=backend)
    assert_bit_equal(pruned.values, grad)
    assert pruned.tau == 0 and pruned.sigma == 0 and pruned.density == 0


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 4), (2, 0), (2, 3, 0)])
def test_empty_gradients(backend, dtype, shape):
    pruned = prune_gradient(torch.empty(shape, dtype=dtype), 90, backend=backend)
    assert pruned.values.shape == shape
    assert pruned.tau == 0 and pruned.sigma == 0 and pruned.density == 0


def test_threshold_that_overflows_prunes_nothing():
    grad = torch.full((1, 4, 2, 2), 60000.0, dtype=torch.float16)
    pruned = prune_gradient(grad, 99)
    assert pruned.tau == 0
    assert_bit_equal(pruned.values, grad)


def test_extreme_magnitudes(backend):
    """Sums that overflow float32, and products tau * r that underflow in it."""
    key = torch.tensor([9, 9])
    for scale in (1e38, 1e-38, 1e-42):
        grad = torch.linspace(-1, 1, 2 * 8 * 6 * 6).view(2, 8, 6, 6) * scale
        result = torch.ops.sparsebwd.prune(grad, key, f"backend={backend}")
        expected = reference.prune(grad, key, Pruning())
        for actual, wanted in zip(result, expected):
            assert_bit_equal(actual, wanted, f"scale {scale}")


@pytest.mark.parametrize("shape, as_4d", [((6, 10), (6, 10, 1, 1)), ((6, 10, 7), (6, 10, 1, 7))])
def test_fewer_dimensions(backend, dtype, shape, as_4d, generator):
    grad = random_tensor(shape, generator=generator, dtype=dtype)
    flat, full = (
        prune_gradient(g, 90, torch.Generator().manual_seed(4), backend=backend) for g in (grad, grad.view(as_4d))
    )
    assert_bit_equal(flat.values, full.values.view(shape))


def test_layouts_that_are_neither_contiguous_nor_channels_last(backend, dtype, generator):
    grad = random_tensor((4, 10, 6, 8), generator=generator, dtype=dtype)
    views = [
        grad[:, ::2],
        grad.transpose(2, 3),
        grad[:, :, 1:, 1:],
        grad[:1, :1].expand(3, 5, 6, 8),
        grad.flip(0).transpose(0, 1),
    ]
    for view in views:
        strided, dense = (
            prune_gradient(g, 90, torch.Generator().manual_seed(4), backend=backend) for g in (view, view.contiguous())
        )
        assert_bit_equal(strided.values, dense.values)


def test_float64_and_float16_are_pruned_by_auto(generator):
    for dtype, name in ((torch.float64, "reference"), (torch.float16, "dense")):
        grad = random_tensor((2, 8, 5, 5), generator=generator, dtype=dtype)
        auto, named = (
            prune_gradient(grad, 90, torch.Generator().manual_seed(4), backend=backend) for backend in ("auto", name)
        )
        assert_bit_equal(auto.values, named.values)
        assert auto.values.dtype == dtype
