# SPDX-License-Identifier: Apache-2.0
"""granularity=: rows, samples and channels that are kept or dropped as a whole. For LIMIT see test_pruning.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

from sparsebwd import Pruning, SparseConv2d, conversion_report, convert, granularity, prune_gradient, reference
from sparsebwd.functional import sparse_conv2d
from sparsebwd.testing import assert_bit_equal, assert_error_bounded

LIMIT = 5.0
ALL = ["row", ("row", 5), "sample", "channel"]


def heavy_tailed(shape, generator, dtype=torch.float32) -> torch.Tensor:
    scale = torch.exp(torch.randn((*shape[:2], 1, 1), generator=generator))
    return (torch.randn(shape, generator=generator) ** 3 * scale).to(dtype)


def groups(grad, kind) -> list[torch.Tensor]:
    """Indices into the flattened gradient (N, C, H, W), group by group, in the order of norms()."""
    n, c, h, w = grad.shape
    places = torch.arange(grad.numel()).view(grad.shape)
    if kind == "sample":
        return [place.flatten() for place in places]
    if kind == "channel":
        return [place.flatten() for place in places.transpose(0, 1)]
    width = 64 if kind == "row" else kind[1]
    return [
        places[i, first : first + width, y, x]
        for i in range(n) for first in range(0, c, width) for y in range(h) for x in range(w)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_norms_are_those_of_the_groups(kind, memory_format, generator):
    grad = heavy_tailed((3, 70, 4, 3), generator)
    found = granularity.norms(grad.contiguous(memory_format=memory_format), Pruning(granularity=kind))
    wanted = torch.stack([grad.double().flatten()[group].norm() for group in groups(grad, kind)])
    torch.testing.assert_close(found.flatten(), wanted.float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_groups_are_kept_and_divided_by_the_probability(kind, memory_format, generator):
    grad = heavy_tailed((8, 70, 4, 3), generator)
    key = torch.tensor([5, -7])
    pruning = Pruning(density=0.5, granularity=kind)
    values, tau, _, density = torch.ops.sparsebwd.prune(grad.contiguous(memory_format=memory_format), key, pruning.text)
    found = granularity.norms(grad, pruning)
    r = reference.uniform(tuple(found.shape), key).flatten()
    assert values.is_contiguous(memory_format=memory_format)
    assert_bit_equal(density, reference.density(values))
    outcomes = set()
    for group, norm, draw in zip(groups(grad, kind), found.flatten(), r):
        before, after = grad.flatten()[group], values.flatten()[group]
        kept = bool(norm >= tau or norm > tau * draw)
        outcomes.add(kept)
        factor = max(1.0, (tau / norm).item()) if kept else 0.0
        torch.testing.assert_close(after, before * factor, rtol=2**-22, atol=0)
    assert outcomes == {True, False}


def test_a_row_has_no_more_channels_than_there_are(generator):
    """Whatever its width, which is not what is reserved."""
    grad, key = heavy_tailed((3, 6, 4, 3), generator), torch.tensor([1, 2])
    whole, wide = (
        torch.ops.sparsebwd.prune(grad, key, Pruning(density=0.4, granularity=("row", width)).text) for width in (6, 2**62)
    )
    assert whole[3] < 1
    for one, other in zip(whole, wide):
        assert_bit_equal(one, other)


def test_one_element_is_algorithm_1(generator):
    """("row", 1) to the bit; a group that happens to have one element but for rounding."""
    assert Pruning(granularity=("row", 1)) == Pruning()
    grad = heavy_tailed((1, 400, 1, 1), generator)
    single, channel = (
        torch.ops.sparsebwd.prune(grad, torch.tensor([1, 2]), Pruning(95, granularity=kind).text)
        for kind in ("element", "channel")
    )
    assert_bit_equal(channel[1], single[1])
    torch.testing.assert_close(channel[0], single[0], rtol=2**-22, atol=0)
    assert 0 < single[3] < 1


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_pruning_is_unbiased_and_has_the_variance(kind, generator):
    """Over 300 draws: the mean of each group's share that is kept, and V as its closed form says."""
    grad = heavy_tailed((6, 20, 3, 3), generator)
    pruning = Pruning(variance=0.5, granularity=kind)
    draws = [prune_gradient(grad, variance=0.5, granularity=kind, generator=generator) for _ in range(300)]
    tau, found = draws[0].tau.double(), granularity.norms(grad, pruning).double().flatten()
    values = torch.stack([draw.values for draw in draws]).double()
    # The first element of each group stands for it: all have the same factor.
    first = torch.stack([group[0] for group in groups(grad, kind)])
    factors = values.flatten(1)[:, first] / grad.double().flatten()[first]
    probability = (found / tau).clamp(max=1)
    drawn = (probability > 0.1) & (probability < 0.9)
    assert drawn.sum() >= 2
    deviation = ((1 / probability - 1) / len(draws)).sqrt()
    assert torch.all(((factors.mean(0) - 1).abs() / deviation)[drawn] < LIMIT)
    errors = (values - grad.double()).square().flatten(1).sum(1) / grad.double().square().sum()
    exact = ((found * (tau - found)).clamp(min=0).sum() / found.square().sum()).item()
    assert exact == pytest.approx(0.5, rel=1 / 8)  # few groups, each at some place of its bin
    assert abs(errors.mean() - exact) < LIMIT * errors.std() / math.sqrt(len(draws))


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("kind", ALL, ids=str)
@pytest.mark.parametrize("groups, backend", [(1, "auto"), (2, "auto"), (1, "reference"), (1, "cpu")])
def test_backward_convolves_the_survivors(groups, backend, kind, placement, memory_format, generator, stats):
    if backend == "cpu":
        pytest.importorskip("sparsebwd._C")
    x = torch.randn((6, 8, 9, 7), generator=generator).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn((20, 8 // groups, 3, 3), generator=generator).requires_grad_()
    grad = heavy_tailed((6, 20, 5, 4), generator).contiguous(memory_format=memory_format)
    geometry = {"stride": 2, "padding": 1, "groups": groups}
    state = generator.get_state()
    settings = {"density": 0.5, "granularity": kind, "placement": placement, "backend": backend}
    sparse_conv2d(x, weight, **geometry, **settings, generator=generator).backward(grad)
    key = torch.empty(2, dtype=torch.int64).random_(generator=generator.set_state(state))
    pruning = Pruning(density=0.5, granularity=kind)
    consumed = grad
    if placement == "output":
        consumed = granularity.prune(grad, key, pruning).values
    assert_bit_equal(stats[-1].density, reference.density(consumed))
    operands = consumed, x.detach(), weight.detach()
    (wanted, dense), weights = (
        [convolve(*(tensor.to(dtype) for tensor in operands)) for dtype in (torch.float64, torch.float32)]
        for convolve in (
            lambda g, _, w: conv2d_input(x.shape, w, g, **geometry),
            lambda g, x, _: conv2d_weight(x, weight.shape, g, **geometry),
        )
    )
    assert_error_bounded(weight.grad, *weights)
    if placement == "output":
        assert_error_bounded(x.grad, wanted, dense)
    else:
        # Groups came out whole: as computed, times one factor each.
        kept = (x.grad != 0) & (wanted.abs() > 1e-3)
        assert 0 < kept.sum() < x.grad.numel()
        assert torch.all(x.grad.double()[kept] / wanted[kept] > 0.99)
    assert stats[-1].tau > 0
    if placement == "output" and (kind == "sample" or (kind == "channel" and groups == 1)):
        assert stats[-1].implementation.startswith("gather+")


@pytest.mark.parametrize("kind", ["sample", "channel"])
def test_nothing_may_survive(kind):
    x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 3, 3, requires_grad=True)
    for seed in range(3):
        x.grad = weight.grad = None
        output = sparse_conv2d(
            x, weight, density=1e-4, granularity=kind, generator=torch.Generator().manual_seed(seed)
        )
        output.backward(torch.ones_like(output))
        assert not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ALL, ids=str)
def test_other_dtypes(kind, dtype, generator):
    grad = heavy_tailed((6, 20, 3, 3), generator, dtype)
    pruned = prune_gradient(grad, density=0.5, granularity=kind, generator=generator)
    kept = pruned.values != 0
    assert pruned.values.dtype == dtype and 0 < kept.sum() < grad.numel()
    ratio = (pruned.values.double() / grad.double())[kept]
    assert ratio.min() > 0.99
    x, weight = torch.randn(6, 4, 3, 3, dtype=dtype, requires_grad=True), torch.randn(20, 4, 1, 1, dtype=dtype)
    sparse_conv2d(x, weight, density=0.5, granularity=kind).backward(grad)
    assert x.grad.dtype == dtype and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_special_values(kind):
    for value in (math.inf, math.nan):
        grad = torch.ones(2, 6, 3, 3)
        grad[1, 2, 0, 1] = value
        pruned = prune_gradient(grad, granularity=kind)
        assert_bit_equal(pruned.values, grad)
        assert pruned.tau == 0
    for grad in (torch.zeros(2, 6, 3, 3), torch.empty(0, 6, 3, 3)):
        pruned = prune_gradient(grad, granularity=kind)
        assert_bit_equal(pruned.values, grad)
        assert pruned.tau == 0 and pruned.density == 0


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("pixel", ValueError, r"granularity: got 'pixel'; accepted: 'row', \('row', width\), 'element'"),
        (("row", 0), ValueError, "granularity: got 0; accepted: at least 1"),
        (("row", "64"), TypeError, "granularity: got '64'; accepted: an int"),
        (("column", 64), ValueError, "granularity: got"),
        (64, TypeError, "granularity: got 64"),
    ],
)
def test_refusals(value, error, message):
    with pytest.raises(error, match=message):
        Pruning(granularity=value)
    with pytest.raises(error, match=message):
        convert(nn.Conv2d(1, 1, 1), granularity=value)


def test_settings():
    for kind in ALL:
        assert Pruning.parse(Pruning(granularity=kind).text) == Pruning(granularity=kind)
    assert Pruning(granularity="row").granularity == ("row", 64)
    with pytest.raises(ValueError, match="threshold: got 'predicted' with granularity 'sample'"):
        Pruning(granularity="sample", threshold="predicted")
    layer = SparseConv2d(4, 6, 3, density=0.2, granularity="row")
    assert repr(layer).endswith("density=0.2, placement=output, granularity=('row', 64))")
    # Dense kernels on less can be faster anywhere.
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double(), density=0.5, granularity="sample")
    assert isinstance(model[0], SparseConv2d) and model[0].granularity == "sample"
    assert "density=0.5, granularity=sample" in str(conversion_report(model))
