# SPDX-License-Identifier: Apache-2.0
"""density=, variance= and threshold="sampled": histograms, the thresholds that come from them, and that these keep pruning
without bias.

Statistical tests compare a z-score with LIMIT, see test_pruning.py: fewer than 1000 comparisons, seeds are fixed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pruning import unbiased_classes

import sparsebwd
from sparsebwd import Pruning, SparseConv2d, convert, histogram, prune_gradient, reference
from sparsebwd.functional import sparse_conv2d
from sparsebwd.histogram import BINS, FINITE, SAMPLES, Histogram
from sparsebwd.testing import assert_bit_equal, random_tensor

LIMIT = 5.0
KEY = torch.tensor([3, -4])
KNOBS = [{"density": 0.15}, {"density": 0.6}, {"variance": 0.1}, {"variance": 2.0}]


def heavy_tailed(shape, generator, dtype=torch.float32) -> torch.Tensor:
    """As gradients are: of most elements little, of few much, and images that differ."""
    scale = torch.exp(2 * torch.randn((shape[0], shape[1], 1, 1), generator=generator))
    return (torch.randn(shape, generator=generator) ** 3 * scale * 1e-3).to(dtype)


def exact_density(grad, tau):
    return (grad.double().abs() / tau).clamp(max=1).mean().item()


def exact_variance(grad, tau):
    magnitude = grad.double().abs()
    return ((magnitude * (tau - magnitude)).clamp(min=0).sum() / magnitude.square().sum()).item()


# ---- histograms


def test_the_kernels_have_the_same_bins():
    header = (Path(__file__).parents[1] / "csrc/cpu/prune.h").read_text()
    assert int(re.search(r"kHistogramShift = (\d+);", header)[1]) == histogram.SHIFT
    assert torch.tensor([math.inf]).view(torch.int32).item() >> histogram.SHIFT == FINITE


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1.1754944e-38, 3.4e38, math.inf, -math.inf, math.nan]


@hypothesis.settings(max_examples=30)
@given(
    count=st.integers(0, 40),
    bits=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_kernels_count_as_the_reference(count, bits, dtype):
    pytest.importorskip("sparsebwd._C")
    values = torch.tensor([*bits, *([0] * count)], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, torch.tensor(SPECIAL)]).to(dtype)
    counts = torch.full((BINS,), -1)
    torch.ops.sparsebwd_cpu.histogram(values, counts)
    assert torch.equal(counts[:FINITE], histogram.count(values)[:FINITE]) and counts.sum() == values.numel()


def test_counts_do_not_depend_on_threads_and_layout(dtype, generator):
    pytest.importorskip("sparsebwd._C")
    grad = heavy_tailed((5, 33, 61, 67), generator, dtype)  # more than two tasks
    wanted = histogram.count(grad)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                results.append(torch.empty(BINS, dtype=torch.int64))
                torch.ops.sparsebwd_cpu.histogram(grad.contiguous(memory_format=memory_format), results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(counts, wanted) for counts in results)


@pytest.mark.parametrize("tau", [1e-5, 1e-3, 0.01, 1.0, 100.0])
def test_closed_forms_are_those_of_the_elements(tau, generator):
    """As close as the middle of a bin is to what is in it, at worst; where a bin holds many, much closer."""
    grads = heavy_tailed((4, 16, 20, 20), generator), torch.randn((4, 16, 20, 20), generator=generator) * tau
    for grad, rel in zip(grads, (1 / 32, 1e-3)):
        grad[:, 3] = 0
        found = Histogram(histogram.count(grad))
        assert found.mean.item() == pytest.approx(grad.double().abs().mean().item(), rel=rel)
        assert found.density(tau).item() == pytest.approx(exact_density(grad, tau), rel=rel)
        assert found.variance(tau).item() == pytest.approx(exact_variance(grad, tau), rel=2 * rel, abs=1e-9)


@hypothesis.settings(max_examples=30)
@given(st.lists(st.integers(0, FINITE - 1), min_size=1, max_size=30), st.floats(0.01, 0.99), st.floats(1e-3, 50))
def test_thresholds_solve_the_closed_forms(bins, density, variance):
    counts = torch.zeros(BINS, dtype=torch.int64)
    for bin in bins:
        counts[bin] += 1 + bin % 7
    found = Histogram(counts)
    tau = found.tau_for_density(density)
    nonzeros = counts[1:].sum() / counts.sum()
    if nonzeros <= density:
        assert tau == 0
    else:
        assert found.density(tau).item() == pytest.approx(density, rel=1e-9)
    tau = found.tau_for_variance(variance)
    if any(bins):
        assert found.variance(tau).item() == pytest.approx(variance, rel=1e-9)
    else:
        assert tau == 0


# ---- samples


@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (2, 1024, 16, 16), (5, 7, 31, 33), (1, 3, 128, 128)])
def test_a_sample_is_spread_over_all_dimensions(shape):
    n, c, h, w = shape
    positions = histogram._places(shape, "nchw", SAMPLES, torch.device("cpu"))
    assert positions.numel() == SAMPLES and torch.all(positions.diff() > 0)
    for size, place in ((n, positions // (c * h * w)), (c, positions // (h * w) % c), (w, positions % w)):
        counts = torch.bincount(place, minlength=size).double()
        assert counts.numel() == size
        assert counts.min() > 0.4 * counts.mean(), shape
        assert counts.max() < 1.6 * counts.mean() + 1, shape


def test_a_sample_depends_on_logical_positions_only(dtype, generator):
    grad = heavy_tailed((3, 40, 31, 17), generator, dtype)
    wanted = grad.flatten()[torch.arange(SAMPLES) * grad.numel() // SAMPLES]
    strided = torch.empty((3, 40, 17, 31), dtype=dtype).transpose(2, 3).copy_(grad)
    for view in (grad, grad.contiguous(memory_format=torch.channels_last), strided):
        assert_bit_equal(histogram.sample(view), wanted)
    small = grad[:, :7]
    assert_bit_equal(histogram.sample(small.contiguous(memory_format=torch.channels_last)), small.flatten())


# ---- pruning


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
@pytest.mark.parametrize("knob", [*KNOBS, {"percentile": 95}], ids=str)
def test_thresholds_are_the_same_bits_everywhere(knob, threshold, dtype, memory_format, generator):
    """Counts are integers, and a sample has an order: tau depends on neither layout nor backend."""
    grad = heavy_tailed((3, 24, 17, 19), generator, dtype)  # more than a sample
    wanted = reference.prune(grad, KEY, Pruning(**knob, threshold=threshold))
    for backend in ("auto", *sparsebwd.backends.available_backends()):
        if backend == "cuda":
            continue
        settings = Pruning(**knob, threshold=threshold, backend=backend).text
        result = torch.ops.sparsebwd.prune(grad.contiguous(memory_format=memory_format), KEY, settings)
        for got, expected, name in zip(result, wanted, wanted._fields):
            assert_bit_equal(got, expected, f"{name} of {backend}")


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_what_is_asked_for_is_what_comes_out(knob, threshold, dtype, generator):
    grad = heavy_tailed((8, 32, 16, 16), generator, dtype)
    pruned = prune_gradient(grad, generator=generator, threshold=threshold, **knob)
    measured, tau = histogram.sample(grad) if threshold == "sampled" else grad, pruned.tau.item()
    rel = 0.005 + (0.01 if dtype == torch.bfloat16 else 0)  # tau is rounded to it
    if "density" in knob:
        assert exact_density(measured, tau) == pytest.approx(knob["density"], rel=rel)
        # Of a sample: 16381 elements, which are far from independent here.
        rel = 0.1 if threshold == "sampled" else rel
        assert pruned.density.item() == pytest.approx(knob["density"], rel=rel, abs=LIMIT * 0.5 / math.sqrt(grad.numel()))
    else:
        # Few elements make up ||g||^2: at worst they are all at one end of their bins.
        assert exact_variance(measured, tau) == pytest.approx(knob["variance"], rel=1 / 16 + rel)


@pytest.mark.parametrize("settings", [*KNOBS, {"percentile": 95, "threshold": "sampled"}], ids=str)
def test_pruning_stays_unbiased(settings, generator):
    """E[pruned] = g in sixteen classes of |g| / tau, at any threshold that does not depend on the draw. All backends give
    the same bits."""
    settings = {"threshold": "sampled"} | settings
    grad = heavy_tailed((8, 32, 16, 16), generator)
    values, tau, _, _ = prune_gradient(grad, generator=generator, **settings)
    assert len(list(unbiased_classes(grad, values, tau.item()))) == 16


def test_variance_is_that_of_the_draws(generator):
    grad = heavy_tailed((4, 16, 16, 16), generator)
    draws = [prune_gradient(grad, variance=0.3, generator=generator).values for _ in range(30)]
    errors = torch.stack([(draw - grad).double().square().sum() / grad.double().square().sum() for draw in draws])
    assert abs(errors.mean() - 0.3) < LIMIT * errors.std() / math.sqrt(len(draws)) + 0.005


@pytest.mark.parametrize("settings", [*KNOBS, {"percentile": 95}], ids=str)
@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_the_backward_pass_prunes_at_them(settings, placement, backend, dtype, memory_format, generator, stats):
    """With a 1x1 identity as weight, AGB hands on what was pruned."""
    if backend == "cpu" and backend not in sparsebwd.backends.available_backends():
        pytest.skip("not compiled")
    grad = heavy_tailed((3, 24, 17, 19), generator, dtype).contiguous(memory_format=memory_format)
    weight = torch.eye(24, dtype=dtype).view(24, 24, 1, 1).requires_grad_()
    x = torch.ones_like(grad, requires_grad=True)
    state = generator.get_state()
    settings = {"placement": placement, "threshold": "sampled", **settings}
    sparse_conv2d(x, weight, backend=backend, generator=generator, **settings).backward(grad)
    key = torch.empty(2, dtype=torch.int64).random_(generator=generator.set_state(state))
    expected = reference.prune(grad, key, Pruning(**settings))
    assert_bit_equal(x.grad + 0, expected.values + 0)
    assert_bit_equal(stats[-1].tau, expected.tau)
    assert_bit_equal(stats[-1].sigma, expected.sigma)


# ---- special values


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_non_finite_gradients_pass_through(knob, value, backend, dtype, generator):
    grad = random_tensor((2, 8, 3, 5), generator=generator, dtype=dtype)
    grad[1, 3, 2, 1] = value
    pruned = prune_gradient(grad, backend=backend, **knob)
    assert_bit_equal(pruned.values, grad)
    assert pruned.tau == 0 and pruned.sigma == math.inf and pruned.density == 1


def test_what_a_sample_misses_passes_through(backend, generator):
    """A GradScaler sees it all the same."""
    grad = random_tensor((4, 32, 16, 16), generator=generator)
    missed = set(range(grad.numel())) - set((torch.arange(SAMPLES) * grad.numel() // SAMPLES).tolist())
    place = min(missed)
    grad.view(-1)[place] = math.nan
    for settings in ({"density": 0.2}, {"percentile": 95}):
        pruned = prune_gradient(grad, backend=backend, threshold="sampled", **settings)
        assert pruned.tau > 0 and pruned.values.view(-1)[place].isnan() and pruned.values.isnan().sum() == 1


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
@pytest.mark.parametrize("settings", [*KNOBS, {"percentile": 90}], ids=str)
def test_nothing_to_prune(settings, threshold, backend, dtype):
    for grad in (torch.zeros(2, 5, 3, 3), -torch.zeros(2, 5, 3, 3), torch.empty(0, 4, 3, 3), torch.empty(2, 0)):
        grad = grad.to(dtype)
        pruned = prune_gradient(grad, backend=backend, threshold=threshold, **settings)
        assert_bit_equal(pruned.values, grad)
        assert pruned.tau == 0 and pruned.sigma == 0 and pruned.density == 0


@pytest.mark.parametrize("knob", [{"density": 1}, {"density": 0.5}, {"variance": 0}], ids=str)
def test_gradients_that_meet_it_stay_as_they_are(knob, backend, dtype, generator):
    grad = random_tensor((4, 8, 5, 5), generator=generator, dtype=dtype, density=0.4)
    pruned = prune_gradient(grad, backend=backend, **knob)
    assert_bit_equal(pruned.values, grad)
    assert pruned.tau == 0 and pruned.sigma > 0


def test_extreme_magnitudes(backend):
    for scale in (1e38, 1e-37):
        grad = torch.linspace(-1, 1, 2 * 8 * 6 * 6).view(2, 8, 6, 6) * scale
        pruned = prune_gradient(grad, density=0.3, backend=backend)
        assert exact_density(grad.double() / scale, pruned.tau.double().item() / scale) == pytest.approx(0.3, rel=5e-3)


@pytest.mark.parametrize("dtype, name", [(torch.float64, "reference"), (torch.float16, "dense")])
def test_other_dtypes(dtype, name, generator):
    grad = (heavy_tailed((2, 16, 9, 9), generator).double() * 10).to(dtype)
    pruned = prune_gradient(grad, density=0.2, generator=generator)
    assert pruned.values.dtype == dtype
    assert exact_density(grad, pruned.tau.item()) == pytest.approx(0.2, rel=0.01)


# ---- settings


def test_one_of_them_at_a_time():
    assert Pruning(density=0.15).percentile is None and Pruning(density=0.15).text == "percentile=None,density=0.15"
    assert Pruning.parse(Pruning(variance=0.1).text) == Pruning(variance=0.1)
    assert Pruning().replace(density=0.15) == Pruning(density=0.15)
    assert Pruning(density=0.15).replace(percentile=95) == Pruning(95)
    assert Pruning(density=0.15).unpruned == Pruning(None)
    assert Pruning(density=0.15).active and not Pruning(density=1).active and not Pruning(variance=0).active
    assert [Pruning(p).asked for p in (95, None)] + [Pruning(density=0.15).asked] == [
        "percentile 95",
        "no pruning",
        "density 0.15",
    ]


FORMS = {
    "Pruning": Pruning,
    "prune_gradient": lambda **settings: prune_gradient(torch.ones(1, 1, 2, 2), **settings),
    "sparse_conv2d": lambda **settings: sparse_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), **settings),
    "SparseConv2d": lambda **settings: SparseConv2d(1, 1, 1, **settings),
    "from_conv2d": lambda **settings: SparseConv2d.from_conv2d(torch.nn.Conv2d(1, 1, 1), **settings),
    "convert": lambda **settings: convert(torch.nn.Conv2d(1, 1, 1), **settings),
}


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"percentile": 90, "density": 0.15}, ValueError, "got both percentile and density; accepted: one of"),
        ({"density": 0.15, "variance": 0.1}, ValueError, "got both density and variance; accepted: one of"),
        ({"density": 0}, ValueError, "density: got 0; accepted: 0 < density <= 1"),
        ({"density": 15}, ValueError, "density: got 15; accepted"),
        ({"density": math.nan}, ValueError, "density: got nan; accepted"),
        ({"density": "0.15"}, TypeError, "density: got '0.15'; accepted: a number"),
        ({"density": True}, TypeError, "density: got True; accepted: a number"),
        ({"variance": -0.1}, ValueError, "variance: got -0.1; accepted: 0 <= variance < infinity"),
        ({"variance": math.inf}, ValueError, "variance: got inf; accepted"),
        ({"variance": [0.1]}, TypeError, r"variance: got \[0.1\]; accepted: a number"),
        ({"density": 0.15, "threshold": "guessed"}, ValueError, "threshold: got 'guessed'; accepted: 'exact'"),
        ({"density": 0.15, "threshold": "predicted"}, ValueError, "threshold: got 'predicted'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_refusals_name_the_setting(form, settings, error, message):
    with pytest.raises(error, match=message):
        FORMS[form](**settings)


def test_a_sample_and_a_history_are_two_ways():
    history = torch.zeros(5, dtype=torch.int32)
    for settings in ({"threshold": "sampled"}, {"density": 0.2}):
        with pytest.raises(ValueError, match="threshold: got"):
            prune_gradient(torch.ones(1, 1, 2, 2), sigma_history=history, **settings)
    with pytest.raises(ValueError, match="threshold: got 'predicted'; accepted: with a sigma_history"):
        prune_gradient(torch.ones(1, 1, 2, 2), threshold="predicted")


def test_a_layer_has_them_as_attributes():
    layer = SparseConv2d(4, 6, 3, density=0.2, threshold="sampled")
    assert (layer.percentile, layer.density, layer.variance, layer.threshold) == (None, 0.2, None, "sampled")
    assert repr(layer).endswith("density=0.2, placement=output, threshold=sampled)")
    layer.variance = 0.1
    assert (layer.percentile, layer.density, layer.variance) == (None, None, 0.1)
    layer.percentile = 95
    assert layer.pruning == Pruning(95, threshold="sampled")
    model = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU()), density=0.2, where="everywhere")
    assert "placement='input', density=0.2" in str(sparsebwd.conversion_report(model))
    convert(model, variance=0.1, where="everywhere")
    assert (model[0].density, model[0].variance) == (None, 0.1)


def test_what_stays_dense_of_a_density_is_known_before():
    assert Pruning(density=0.6).lowest_density == 0.6
    assert Pruning(density=0.6, placement="input").lowest_density == 0.15
    assert Pruning(variance=0.1).lowest_density == 0


def test_compiles():
    layer = SparseConv2d(4, 6, 3, density=0.3, threshold="sampled")
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    results = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x.grad = None
        function(x).square().sum().backward()
        results.append(x.grad)
    assert_bit_equal(*results)
