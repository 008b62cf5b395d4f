# SPDX-License-Identifier: Apache-2.0
"""importance="image": thresholds of single images, and that they keep pruning without bias. For LIMIT see test_pruning.py."""

from __future__ import annotations

import math

import pytest
import torch
from strategies import backends_on
from torch import nn
from torch.nn.grad import conv2d_weight

from sparsebwd import Pruning, SparseConv2d, conversion_report, convert, granularity, importance, reference
from sparsebwd.functional import sparse_conv2d
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor

LIMIT = 5.0
IMAGE = Pruning(importance="image")
KEY = torch.tensor([5, -7])
SHAPES = [(2, 3, 5, 7), (3, 4, 1, 1), (2, 64, 8, 8), (3, 30, 17, 33), (1, 17, 3, 2), (5, 256, 2, 2), (0, 4, 3, 3)]


def inputs(shape, generator, dtype=torch.float32) -> torch.Tensor:
    """Of images that differ."""
    size = torch.exp(torch.randn((shape[0], 1, 1, 1), generator=generator))
    return (torch.randn(shape, generator=generator).relu() * size).to(dtype)


def random_scales(images, generator) -> torch.Tensor:
    return torch.exp(0.5 * torch.randn(images, generator=generator))


# ---- scales


@pytest.mark.parametrize("shape", [(6, 5, 7, 6), (4, 3, 40, 33)], ids=str)
def test_scales_are_powers_of_norms(shape, memory_format, generator):
    x = inputs(shape, generator)
    x[1] *= 1e-3
    seen = x.double()[:, :, 5::10, 4::8] if shape[2] == 40 else x.double()
    squares = seen.square().sum((1, 2, 3))
    wanted = (squares / squares.mean()).pow(-3 / 8).clamp(max=4)
    found = importance.scales(x.contiguous(memory_format=memory_format), IMAGE)
    assert found.dtype == torch.float32 and found[1] == 4
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=0)


def test_scales_have_the_same_bits_whatever_the_layout_and_the_threads(dtype, generator):
    x = inputs((33, 20, 65, 31), generator, dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [importance.scales(x, IMAGE), importance.scales(x.to(memory_format=torch.channels_last), IMAGE)]
            # As any other order of sums would have it.
            order = torch.randperm(20, generator=generator)
            results.append(importance.scales(x[:, order], IMAGE))
    finally:
        torch.set_num_threads(threads)
    for scales in results[1:]:
        assert_bit_equal(scales, results[0])


def test_degenerate_inputs(generator):
    x = inputs((3, 4, 9, 9), generator)
    ones = torch.ones(3)
    x[1] = 0  # a black image
    assert importance.scales(x, IMAGE)[1] == 4
    assert torch.isfinite(importance.scales(x, IMAGE)).all()
    assert_bit_equal(importance.scales(x[:1], IMAGE), ones[:1])
    assert_bit_equal(importance.scales(x[:1].expand(3, -1, -1, -1), IMAGE), ones)
    assert_bit_equal(importance.scales(torch.zeros_like(x), IMAGE), ones)
    for value in (math.inf, math.nan):
        broken = x.clone()
        broken[2, 1, 3, 3] = value
        assert_bit_equal(importance.scales(broken, IMAGE), ones)
    for scale in (1e-38, 1e38):
        torch.testing.assert_close(importance.scales(x * scale, IMAGE), importance.scales(x, IMAGE), rtol=1e-3, atol=0)
    assert importance.scales(x[:0], IMAGE).shape == (0,)
    assert_bit_equal(importance.scales(x[:, :, :0], IMAGE), ones)
    assert importance.scales(x, Pruning()) is importance.scales(x, IMAGE.unpruned) is None


# ---- bits


def check_bits(grad, scales, settings, history=None):
    """Returns the result; given its tau, its bits are those of the definition."""
    given = None if history is None else history.clone()
    with poisoned_memory():
        result = reference.PrunedGradient(*torch.ops.sparsebwd.prune(grad, KEY, settings.text, given, scales))
    taus = reference.thresholds_of_images(result.tau, scales, grad.dtype)
    expected = reference.prune_at(grad, KEY, taus)
    assert_bit_equal(result.values, expected, "values")
    assert_bit_equal(result.density, reference.density(expected), "density")
    wanted = reference.prune(grad, KEY, settings, None if history is None else history.clone(), scales)
    torch.testing.assert_close(result.tau, wanted.tau, rtol=2**-7 if grad.dtype == torch.bfloat16 else 2**-22, atol=0)
    return result


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_reference(backend, shape, dtype, memory_format, generator):
    grad = fenced(random_tensor(shape, generator=generator, dtype=dtype, memory_format=memory_format, density=0.9))
    check_bits(grad, random_scales(shape[0], generator), IMAGE.replace(backend=backend))


@pytest.mark.parametrize(
    "settings",
    [{"density": 0.3}, {"density": 0.3, "threshold": "sampled"}, {"threshold": "sampled"}, {"threshold": "predicted"}],
    ids=str,
)
def test_other_thresholds(backend, settings, dtype, memory_format, generator):
    grad = random_tensor((6, 40, 20, 9), generator=generator, dtype=dtype, memory_format=memory_format)
    settings = Pruning(importance="image", backend=backend, **settings)
    history = None
    if settings.threshold == "predicted":
        history = torch.tensor([1, torch.tensor(0.7).view(torch.int32), 0, 0, 0], dtype=torch.int32)
    result = check_bits(grad, random_scales(6, generator), settings, history)
    if settings.density:
        assert result.density.item() == pytest.approx(0.3, rel=0.03)


def test_thresholds_that_are_no_numbers_prune_nothing_of_their_image(backend, dtype, memory_format):
    grad = torch.full((3, 40, 5, 8), 2e38).to(dtype).contiguous(memory_format=memory_format)
    grad[:, ::2] = 0.25
    scales = torch.tensor([0.5, 4.0, 1e-45])
    result = check_bits(grad, scales, Pruning(99, importance="image", backend=backend))
    assert result.tau > 1.5e38
    for image in (1, 2):
        assert_bit_equal(result.values[image], grad[image])
    assert torch.count_nonzero(result.values[0, ::2]) == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("backend", [*backends_on("cpu"), "auto"])
def test_the_layer_prunes_with_the_bits_of_the_reference(backend, dtype, memory_format, threads, generator):
    """With a 1x1 identity as weight, AGB hands on what was pruned; WGC has consumed the same."""
    channels = 24
    grad = random_tensor((6, channels, 5, 6), generator=generator, dtype=dtype, memory_format=memory_format)
    x = inputs((6, channels, 5, 6), generator, dtype).contiguous(memory_format=memory_format)
    weight = torch.eye(channels, dtype=dtype).view(channels, channels, 1, 1)
    settings = IMAGE.replace(backend=backend)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        grad_input, grad_weight, _ = torch.ops.sparsebwd.conv2d_backward(
            grad, x, weight, (1, 1), (0, 0), (1, 1), 1, KEY, settings.text, 0, (True, True, False)
        )
    finally:
        torch.set_num_threads(before)
    scales = importance.scales(x, settings)
    assert scales.std() > 0.1
    expected = reference.prune(grad, KEY, settings, None, scales).values
    assert_bit_equal(grad_input + 0, expected + 0)
    assert not torch.equal(expected, reference.prune(grad, KEY, Pruning()).values)
    dense, wanted = (conv2d_weight(x.to(d), weight.shape, expected.to(d)) for d in (dtype, torch.float64))
    assert_error_bounded(grad_weight, wanted, dense)


@pytest.mark.parametrize("backend", [*backends_on("cpu"), "auto"])
def test_a_batch_of_one_is_as_without(backend, memory_format, generator):
    x = inputs((1, 8, 9, 7), generator).contiguous(memory_format=memory_format)
    weight = torch.randn((12, 8, 3, 3), generator=generator)
    grad = torch.randn((1, 12, 9, 7), generator=generator).contiguous(memory_format=memory_format)
    results = []
    for kind in ("none", "image"):
        leaf, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = sparse_conv2d(
            leaf, parameter, padding=1, backend=backend, importance=kind, generator=torch.Generator().manual_seed(3)
        )
        output.backward(grad)
        results.append((leaf.grad, parameter.grad))
    for one, other in zip(*results):
        assert_bit_equal(one, other)


# ---- what it is for


@pytest.mark.parametrize("settings", [{}, {"density": 0.3}, {"density": 0.4, "granularity": ("row", 4)}], ids=str)
def test_pruning_is_unbiased(settings, generator):
    """The mean of each element over 400 draws, also of images with nothing in their input."""
    grad = torch.randn((6, 8, 5, 5), generator=generator) ** 3
    x = inputs((6, 4, 5, 5), generator)
    x[2] = 0
    settings = Pruning(importance="image", **settings)
    scales = importance.scales(x, settings)
    draws, total = 400, torch.zeros(grad.shape, dtype=torch.float64)
    for _ in range(draws):
        key = torch.empty(2, dtype=torch.int64).random_(generator=generator)
        values, tau, *_ = torch.ops.sparsebwd.prune(grad, key, settings.text, None, scales)
        total += values.double() - grad.double()
    sizes = grad.abs()
    if settings.granularity != "element":
        sizes = granularity.norms(grad, settings).repeat_interleave(4, 1)
    probability = (sizes / reference.thresholds_of_images(tau, scales, torch.float32)).double().clamp(max=1)
    drawn = (probability > 0.1) & (probability < 0.9)
    assert all(image.any() for image in drawn)
    deviation = grad.abs() * ((1 / probability - 1) / draws).sqrt()
    assert torch.all(((total / draws).abs() / deviation)[drawn] < LIMIT)


def test_the_weight_gradient_has_less_noise_at_the_same_density(generator):
    x = inputs((16, 8, 9, 9), generator)
    grad = torch.randn((16, 12, 7, 7), generator=generator) ** 3
    weight = torch.randn((12, 8, 3, 3), generator=generator)
    exact = conv2d_weight(x, weight.shape, grad)
    noise, kept = {}, {}
    for kind in ("none", "image"):
        errors, densities = [], []
        for seed in range(30):
            key = torch.tensor([seed, 1])
            settings = Pruning(density=0.3, importance=kind)
            pruned = torch.ops.sparsebwd.prune(grad, key, settings.text, None, importance.scales(x, settings))
            errors.append((conv2d_weight(x, weight.shape, pruned[0]) - exact).square().sum().item())
            densities.append(pruned[3].item())
        noise[kind], kept[kind] = sum(errors) / 30, sum(densities) / 30
    assert kept["image"] == pytest.approx(kept["none"], rel=0.02)
    assert noise["image"] < 0.6 * noise["none"]


@pytest.mark.parametrize("kind", [("row", 4), "sample"], ids=str)
def test_groups(kind, memory_format, generator, stats):
    """Each group at the threshold of its image."""
    x = inputs((6, 8, 9, 7), generator).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.eye(8).view(8, 8, 1, 1).requires_grad_()
    grad = torch.randn((6, 8, 9, 7), generator=generator).contiguous(memory_format=memory_format)
    settings = {"density": 0.5, "granularity": kind, "importance": "image"}
    sparse_conv2d(x, weight, **settings, generator=torch.Generator().manual_seed(2)).backward(grad)
    scales = importance.scales(x.detach(), Pruning(**settings))
    taus = reference.thresholds_of_images(stats[-1].tau, scales, torch.float32).view(-1)
    outcomes = set()
    groups = (grad if kind == "sample" else grad.view(6, 2, 4, 9, 7).permute(0, 1, 3, 4, 2)).reshape(6, -1, 4)
    found = (x.grad if kind == "sample" else x.grad.view(6, 2, 4, 9, 7).permute(0, 1, 3, 4, 2)).reshape(6, -1, 4)
    for image in range(6):
        norms = groups[image].norm().expand(groups.shape[1]) if kind == "sample" else groups[image].norm(dim=1)
        factors = (found[image] / groups[image]).mean(1)
        outcomes |= set((factors > 0).tolist())
        kept = factors > 0
        torch.testing.assert_close(factors[kept], (taus[image] / norms).clamp(min=1)[kept], rtol=1e-4, atol=0)
    assert outcomes == {True, False}


# ---- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"placement": "input"}, "importance: got 'image' with placement 'input'; accepted: 'none' with that"),
        ({"granularity": "channel"}, "importance: got 'image' with granularity 'channel'; accepted: 'none'"),
        ({"variance": 0.1}, "importance: got 'image' with variance 0.1; accepted: 'none'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        Pruning(importance="image", **settings)
    with pytest.raises(ValueError, match="importance: got 'pixel'; accepted"):
        Pruning(importance="pixel")
    grad = torch.ones(3, 4, 2, 2)
    for text, scales, message in (
        (IMAGE.text, None, "scales: got None with importance=image"),
        ("", torch.ones(3), "scales: got a tensor with the default"),
        (IMAGE.text, torch.ones(2), r"scales: got torch.float32 of shape \(2,\)"),
        (IMAGE.text, torch.ones(3).double(), "scales: got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.sparsebwd.prune(grad, KEY, text, None, scales)


def test_settings():
    assert Pruning.parse(IMAGE.text) == IMAGE and IMAGE.text == "importance=image"
    layer = SparseConv2d(4, 6, 3, importance="image")
    assert layer.importance == "image" and repr(layer).endswith("placement=output, importance=image)")
    layer.importance = "auto"
    assert layer.pruning == Pruning() and not layer.pruning.by_image
    # By itself with noise, where it can be.
    assert Pruning(noise=0.1).by_image and not Pruning(noise=0.1, importance="none").by_image
    for other in ({"placement": "input"}, {"granularity": "row"}, {"granularity": "channel"}):
        assert not Pruning(noise=0.1, **other).by_image
    assert not Pruning(noise=0.1).unpruned.by_image and Pruning(noise=0.1).at(2.0).by_image
    assert Pruning(noise=0.1).text == "percentile=None,noise=0.1"
    # Where the gradient that is pruned is another layer's, there is none.
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.ReLU())
    convert(model, importance="image", where="everywhere")
    assert [model[0].importance, model[3].importance] == ["image", "auto"]
    assert "percentile=90.0, importance=image" in str(conversion_report(model))
    with pytest.raises(ValueError, match="importance: got 'image' with placement 'input'"):
        model[3].importance = "image"
