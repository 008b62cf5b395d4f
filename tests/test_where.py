# SPDX-License-Identifier: Apache-2.0
"""where: nothing is done, and nothing pruned, where sparse kernels cannot be faster."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsebwd
from sparsebwd import Pruning, SparseConv2d, backends, conversion_report, convert, models
from sparsebwd.backends import break_even, dense, depthwise
from sparsebwd.functional import sparse_conv2d
from sparsebwd.problem import ConvProblem
from sparsebwd.reference import normal_density, quantile
from sparsebwd.testing import assert_bit_equal

pytestmark = pytest.mark.skipif("cpu" not in backends.available_backends(), reason="no CPU kernels")


@pytest.fixture
def limits(monkeypatch):
    """Break-even densities, the same on all machines, for 3x3 and 1x1, and bfloat16 that PyTorch has kernels for."""
    values = {"kernel": 0.5, "1x1": 0.3, "first": 0.1}

    def of(problem, dtype, channels_last):
        kind = break_even.classify(problem)
        return break_even.BreakEven(*2 * (values.get(kind, 0.0) if dtype == torch.float32 else 0.0,))

    def forget():
        backends.base.forget_choices()

    monkeypatch.setattr(backends.cpu, "break_even", of)
    monkeypatch.setattr(dense, "is_native", lambda dtype: True)
    monkeypatch.setattr(depthwise, "takes", lambda *args: False)
    monkeypatch.setattr(break_even, "FEWEST_MACS_FASTER", 0)
    monkeypatch.setattr(break_even, "LEAST_WORK", 0)
    forget()
    yield values
    forget()


@pytest.fixture
def stats():
    records = []
    observer = records.append
    backends.observers.append(observer)
    yield records
    backends.observers.remove(observer)


@pytest.mark.parametrize("percentile", [50, 80, 90, 99])
def test_normal_density(percentile, generator):
    values = torch.randn(10**6, generator=generator)
    tau = quantile(percentile)
    expected = (values.abs() / tau).clamp(max=1).mean().item() if tau else 1.0
    assert normal_density(tau) == pytest.approx(expected, abs=0.002)


def step(layer, input, power=1):
    """Gradients of a step whose output gradient has the heavier tails the larger ``power`` is, and its function."""
    output = layer(input)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator) ** power
    return *torch.autograd.grad(output, (input, layer.weight), grad_output), output.grad_fn.name()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_cannot_be_faster_is_an_nn_conv2d(limits, stats, layout):
    """3 input channels: its break-even density is below what percentile 90 leaves. Depthwise: there is none."""
    for conv in (nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding="same", groups=32), nn.Conv2d(32, 8, 1)):
        input = torch.randn(4, conv.in_channels, 20, 20).to(memory_format=layout).requires_grad_()
        layer = SparseConv2d.from_conv2d(conv, where="faster")
        state = torch.get_rng_state()
        *grads, name = step(layer, input)
        assert torch.equal(torch.get_rng_state(), state)
        *expected, expected_name = step(conv, input)
        assert name == expected_name and not stats
        for grad, other in zip(grads, expected):
            assert_bit_equal(grad, other)
        layer.where = "everywhere"
        assert step(layer, input)[-1] != expected_name
        stats.clear()


@pytest.mark.parametrize(("kernel", "power", "prunes"), [(3, 1, False), (3, 5, True), (1, 5, True), (1, 1, False)])
def test_a_gradient_too_dense_is_not_pruned(limits, stats, kernel, power, prunes):
    """Normal values have density .55 at percentile 90; the fifth powers of them less than .2."""
    layer = SparseConv2d(128, 128, kernel, where="faster")
    *grads, _ = step(layer, torch.randn(8, 128, 10, 10, requires_grad=True), power)
    (record,) = stats
    assert record.pruning == layer.pruning
    assert (record.tau is not None) is prunes
    assert record.implementation == ("cpu" if prunes else "dense")
    if not prunes:
        assert record.density > 0.99


def test_the_choice_does_not_depend_on_what_is_drawn(limits, stats):
    layer = SparseConv2d(64, 128, 3, where="faster")
    limits["kernel"] = 0.549  # about that of normal values: draws vary by more than what decides
    input = torch.randn(8, 64, 10, 10, requires_grad=True)
    for seed in range(8):
        torch.manual_seed(seed)
        step(layer, input)
    assert len({record.implementation for record in stats}) == 1


def test_what_saves_less_than_choosing_and_pruning_take(limits, stats, monkeypatch):
    monkeypatch.setattr(break_even, "LEAST_WORK", 192)
    input = torch.randn(8, 128, 10, 10, requires_grad=True)
    for layer, ran in ((SparseConv2d(128, 128, 1, where="faster"), 0), (SparseConv2d(128, 128, 3, where="faster"), 1)):
        step(layer, input)
        assert len(stats) == ran
    monkeypatch.setattr(break_even, "FEWEST_MACS_FASTER", 2**27)
    backends.base.forget_choices()
    step(layer, input)
    assert len(stats) == 1


def test_a_backend_that_is_named_runs_everywhere(limits, stats):
    step(SparseConv2d(4, 16, 3, backend="cpu", where="faster"), torch.randn(2, 4, 9, 9, requires_grad=True))
    assert [record.implementation for record in stats] == ["cpu"]


def test_where_dense_convolutions_go_through_float32_there_is_something_to_gain(limits, stats, monkeypatch):
    monkeypatch.setattr(dense, "is_native", lambda dtype: False)
    conv = nn.Conv2d(16, 16, 3, groups=16)
    layer = SparseConv2d.from_conv2d(conv, where="faster")
    input = torch.randn(2, 16, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(input).sum().backward()
    assert [(record.implementation, record.tau) for record in stats] == [("dense", None)]


@pytest.mark.parametrize("placement", ["output", "input"])
def test_depthwise_layers_run_on_kernels_of_our_own_and_are_not_pruned(limits, stats, monkeypatch, placement):
    monkeypatch.setattr(depthwise, "takes", lambda *args: True)
    layer = convert(nn.Conv2d(16, 16, 3, groups=16), placement=placement)
    step(layer, torch.randn(2, 16, 9, 9, requires_grad=True))
    assert [(record.implementation, record.tau) for record in stats] == [("depthwise", None)]


def test_functional(limits):
    input, weight = torch.randn(2, 8, 9, 9, requires_grad=True), torch.randn(4, 8, 3, 3)
    assert sparse_conv2d(input, weight, where="faster").grad_fn.name() == F.conv2d(input, weight).grad_fn.name()
    with pytest.raises(ValueError, match="where: got 'somewhere'; accepted: 'everywhere', 'faster'"):
        sparse_conv2d(input, weight, where="somewhere")


def test_other_dtypes_have_nothing_faster():
    problem = ConvProblem.parse("n8c64h32w32k64r3s3p1")
    pruning = Pruning(where="faster")
    assert "not faster" in backends.why_not_faster(pruning, problem, "cpu", torch.float64, True)
    assert backends.why_not_faster(pruning.replace(where="everywhere"), problem, "cpu", torch.float64, True) is None


def test_reentrant_checkpointing_keeps_in_step(limits):
    """Its first run draws no key for a layer whose replay draws none."""
    layer = SparseConv2d(4, 8, 3, where="faster")
    state = torch.get_rng_state()
    torch.utils.checkpoint.checkpoint(layer, torch.randn(1, 4, 5, 5, generator=torch.Generator()), use_reentrant=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_convert_leaves_what_cannot_be_faster(limits):
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, groups=64),
        nn.Conv2d(64, 128, 1, 2),
        nn.Conv2d(128, 128, 1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(model) is model
    assert [type(layer) is SparseConv2d for layer in model] == [False, True, False, False, True]
    assert {layer.where for layer in conversion_report(model).layers} == {None, "faster"}
    lines = str(conversion_report(model)).splitlines()
    assert "it would not be faster" in lines[0] and "0.10" in lines[0]
    assert "too few multiply-adds, channels" in lines[2]
    convert(model, where="everywhere")
    assert all(type(layer) is SparseConv2d and layer.where == "everywhere" for layer in model)


class Standardised(nn.Conv2d):
    pass


def test_convert_warns_where_little_is_converted(limits):
    with pytest.warns(UserWarning, match=r"no convolution was converted.*Standardised is a subclass.* \(2\)"):
        convert(nn.Sequential(Standardised(64, 64, 3), Standardised(64, 64, 3)))
    with pytest.warns(UserWarning, match=r"only 5.4% of the weights were converted.*density .*\(1\)"):
        convert(nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(4, 4480, 3), nn.Conv2d(16, 16, 1)), percentile=50)
    with pytest.warns(UserWarning, match='where="everywhere" converts'):
        convert(nn.Conv2d(4, 4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(nn.Sequential(nn.Conv2d(64, 64, 3), Standardised(512, 512, 3)), exclude="1")
        convert(nn.Conv2d(4, 4, 3), where="everywhere")


def test_nothing_is_known_of_the_meta_device(limits):
    assert type(convert(nn.Conv2d(4, 4, 3, device="meta"))) is SparseConv2d


def test_no_warning_of_depthwise_layers_that_are_not_pruned(limits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(models.create("mobilenet", 10))
    with pytest.warns(UserWarning, match="depthwise"):
        convert(models.create("mobilenet", 10), where="everywhere")


def test_it_is_part_of_the_settings():
    assert Pruning.parse(Pruning(where="faster").text) == Pruning(where="faster")
    assert "where=faster" in repr(SparseConv2d(4, 4, 3, where="faster"))
    with pytest.raises(ValueError, match="where"):
        sparsebwd.convert(nn.Conv2d(4, 4, 3), where="slower")
