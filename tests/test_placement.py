# SPDX-License-Identifier: Apache-2.0
"""What decides the placement of a convolution, and that tracing it changes nothing."""

from __future__ import annotations

import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import sparsebwd
from sparsebwd import SparseConv2d, conversion_report, convert, revert
from sparsebwd.placement import decide_placements

_METHODS = nn.Module.__call__, nn.Module.__getattr__


class Calls(nn.Module):
    def __init__(self, after) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 3, 3), after

    def forward(self, x):
        assert (nn.Module.__call__, nn.Module.__getattr__) == _METHODS
        return self.after(self.conv(x))


class Untraceable(nn.Module):
    def __init__(self, part) -> None:
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "after, expected",
    [
        (lambda x: F.relu6(x + 3) / 6, "output"),
        (lambda x: x * F.relu6(x + 3) / 6, "output"),
        (lambda x: x.clamp(-1, 1), "output"),
        (nn.Hardtanh(-20, 20), "output"),
        (lambda x: torch.clamp_min(x, 0), "input"),
        (lambda x: torch.maximum(x, torch.tensor(0.0)), "input"),
        (lambda x: torch.where(x > 0, x, 0), "input"),
        (lambda x: x * (x > 0), "input"),
        (lambda x: F.leaky_relu(x, 0), "input"),
        (lambda x: F.leaky_relu(x, 0.1), "output"),
        (nn.Softshrink(), "input"),
        (lambda x: F.relu(x.squeeze()), "input"),
        (lambda x: F.relu(torch.stack([x, x])), "input"),
        (lambda x: F.relu(torch.einsum("nchw->nhwc", x)), "input"),
        (lambda x: F.max_pool2d(F.silu(x), 2), "input"),
        # Each as a function, a method, in place, and as an operator.
        (lambda x: torch.ops.aten.relu.default(x), "input"),
        (lambda x: F.threshold(x, 0, 0), "input"),
        (lambda x: F.threshold(x, -20, 0), "output"),
        (nn.Threshold(0.1, 20), "input"),
        (lambda x: x.clamp_min_(0), "input"),
        (lambda x: x.clip(min=0.0), "input"),
        (lambda x: x.clamp(min=torch.tensor(0.0)), "input"),
        (lambda x: F.hardtanh(x, 0, 6), "input"),
        (lambda x: F.hardtanh(x), "output"),
        (nn.LeakyReLU(0), "input"),
        (lambda x: F.softshrink(x), "input"),
        (lambda x: F.hardshrink(x), "input"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "input"),
        (lambda x: torch.max(x, x.new_zeros(1)), "input"),
        (lambda x: torch.fmax(x, torch.tensor(0.0)), "input"),
        (lambda x: x.max(1)[0], "input"),
        (lambda x: torch.where(x < 0, torch.zeros_like(x), x), "input"),
        (lambda x: x.where(x > 0, 0), "input"),
        (lambda x: x.masked_fill(x < 0, 0), "input"),
        (lambda x: x[x > 0], "input"),
        (lambda x: (x > 0).float() * x, "input"),
        # What a rectifier is applied to counts.
        (lambda x: F.relu(-x), "input"),
        (lambda x: F.relu(x / 3), "input"),
        (lambda x: F.relu(x + 3), "output"),
        (lambda x: F.relu(torch.add(x, 3, alpha=1)), "output"),
        (lambda x: F.relu(torch.sub(x, -1.5, alpha=2)), "output"),
        (lambda x: F.relu6(x / 0.1), "input"),
        (lambda x: F.relu(x.abs()), "output"),
        (lambda x: F.relu(x * x), "output"),
        (lambda x: F.relu(x**2), "output"),
        (lambda x: F.relu(x.exp()), "output"),
        (lambda x: F.relu(-x.exp()), "input"),
        # Views and rearrangements pass.
        (lambda x: F.relu(x.chunk(3, 1)[0]), "input"),
        (lambda x: F.relu(torch.split(x, 1, 1)[0].movedim(1, -1)), "input"),
        (lambda x: F.relu(x.unflatten(1, (3, 1)).swapaxes(1, 2).flip(0).roll(1)), "input"),
        (lambda x: F.relu(F.interpolate(F.pad(x, (1, 1)), scale_factor=2)), "input"),
        (lambda x: F.relu(x.bfloat16().type_as(x).contiguous()[:, :2].tile(2)), "input"),
        (nn.Sequential(nn.ZeroPad2d(1), nn.ChannelShuffle(3), nn.Upsample(scale_factor=2), nn.ReLU()), "input"),
        (nn.Sequential(nn.LocalResponseNorm(2), nn.ReLU()), "output"),
        (lambda x: F.relu(x + x.detach().round()), "input"),
    ],
)
def test_what_zeroes_a_large_part(after, expected):
    model = convert(Calls(after), where="everywhere")
    assert model.conv.placement == expected, str(conversion_report(model))
    assert "by order" not in str(conversion_report(model))


@pytest.mark.parametrize("training", [True, False])
def test_the_pass_that_decides_is_that_of_training(training):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.conv(x)) if self.training else self.bn(self.conv(x))

    model = convert(Branches().train(training), where="everywhere")
    assert model.conv.placement == "input" and model.training == model.conv.training == training


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x, *, scale=1.0, mask=None):
        y = self.conv(x) * scale
        return y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        height, width = x.shape[-2:]
        y = F.relu(self.shortcut(x) + self.bn(self.conv(x)))
        return {"features": F.interpolate(y, size=(height * 2, width * 2))}


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, features):
        return [self.relu(self.bn(self.conv(one))) for one in features]


class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.forward(self.conv(x))


@pytest.mark.parametrize(
    "model, expected",
    [
        (Squeezed, ["output", "input", "output"]),
        (Residual, ["output", "input"]),
        (Lists, ["output"]),
        (Endless, ["output"]),
        (lambda: Untraceable(nn.Sequential(Residual(), nn.ReLU())), ["output", "input"]),
    ],
)
def test_structures(model, expected):
    model = convert(model(), where="everywhere")
    assert [layer.placement for layer in model.modules() if isinstance(layer, SparseConv2d)] == expected


def test_a_module_is_not_what_its_name_says():
    model = nn.Sequential()
    for name, module in (("conv", nn.Conv2d(3, 3, 3)), ("abs", nn.Identity()), ("relu", nn.ReLU())):
        model.add_module(name, module)
    assert convert(model, where="everywhere").conv.placement == "input"


def test_what_leaves_a_traced_part_is_not_decided_in_it():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.relu = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.ReLU()

        def forward(self, x):
            return self.conv2(self.relu(self.conv1(x)))

    model = convert(Untraceable(Head()), where="everywhere")
    assert model.part.conv1.placement == "input" and model.part.conv2.placement == "output"
    assert "'part.relu'" in str(conversion_report(model))


def test_no_generator_moves():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return F.relu(self.conv(x)) * random.random() if random.random() > 0.5 else x + torch.rand(1)

    model = nn.Sequential(Calls(F.relu), Draws(), Calls(lambda x: x + torch.rand(1)))
    states = random.getstate(), torch.get_rng_state()
    convert(model, where="everywhere")
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert model[0].conv.placement == "input"


@pytest.mark.parametrize(
    "after, expected",
    [
        (lambda x: torch.where(x > 0, x, 0.1 * x), "output"),
        (lambda x: x.where(x > 0, x.tanh()), "output"),
        (lambda x: torch.where(x > 0, x, 0.1 * x.detach()), "input"),
        (lambda x: F.relu(torch.where(x > 0, x, 0.1 * x)), "input"),
        (lambda x: torch.maximum(x, -x), "output"),
        (lambda x: torch.cat([F.relu(x), F.relu(-x)], 1), "output"),
        (lambda x: F.relu(x) - 0.1 * F.relu(-x), "output"),
        (lambda x: x.clamp(max=0) + 0.5 * x.clamp(min=0), "output"),
        (lambda x: torch.cat([F.relu(x), F.relu(x - 1)], 1), "input"),
        (lambda x: torch.cat([F.relu(x), F.relu(2 * x)], 1), "input"),
        (lambda x: torch.cat([F.relu(x), F.max_pool2d(-x, 3, 1, 1)], 1), "input"),
    ],
)
def test_two_paths_that_pass_different_elements_leave_a_dense_gradient(after, expected):
    model = Calls(after)
    placement, reason = decide_placements(model)["conv"]
    assert placement == expected, reason
    x = torch.randn(4, 3, 12, 12, requires_grad=True)
    after(x).square().sum().backward()
    assert ((x.grad == 0).float().mean() > 0.125) == (expected == "input")


def test_reasons_are_few():
    reason = conversion_report(Calls(lambda x: [F.softmax(x, 1), F.normalize(x), x.cumsum(1), x @ x, x.cos()]))
    assert len(reason.layers) == 1
    model = convert(Calls(lambda x: [F.softmax(x, 1), F.normalize(x), x.cumsum(1), x @ x]), where="everywhere")
    assert "1 more" in str(conversion_report(model))


@pytest.mark.filterwarnings("ignore:torch.fx traces")
class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(3, 3, 3), nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return sparsebwd.functional.sparse_conv2d(F.relu(self.conv(x)), weight=self.weight, percentile=None)


def test_functions_are_nodes_of_a_trace():
    """Those of PyTorch are; the trace can be traced, copied and run."""
    model, x = Functions(), torch.randn(2, 3, 8, 8)
    assert decide_placements(model)["conv"] == ("input", "followed by relu()")
    graph_module = fx.symbolic_trace(fx.symbolic_trace(model))
    assert "sparse_conv2d" in [node.name for node in graph_module.graph.nodes]
    assert torch.equal(pickle.loads(pickle.dumps(graph_module))(x), model(x))
    gradients = fx.symbolic_trace(lambda x: (sparsebwd.prune_gradient(x), sparsebwd.grad.conv2d_weight(x, (4, 3, 3, 3), x)))
    assert [node.name for node in gradients.graph.nodes][1:3] == ["prune_gradient", "conv2d_weight"]


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_of_a_converted_model(training):
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), where="everywhere").train(training)
    nodes = [(node.op, node.target) for node in fx.symbolic_trace(model).graph.nodes]
    assert ("call_module", "0") in nodes
    graph_module = convert(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())), where="everywhere")
    assert graph_module.get_submodule("0").placement == "input"


def test_script_in_evaluation_and_not_in_training():
    model = convert(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.ReLU()), where="everywhere")
    with pytest.raises(RuntimeError, match="revert"):
        torch.jit.script(model)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(torch.jit.script(model.eval())(x), model(x)) and type(model[0]) is SparseConv2d


def test_parametrized_layers_convert_and_revert():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))
    attributes = vars(model[0]).keys()
    assert isinstance(convert(model, where="everywhere")[0], SparseConv2d)
    model(torch.randn(1, 3, 5, 5)).sum().backward()
    assert not isinstance(revert(model)[0], SparseConv2d) and vars(model[0]).keys() == attributes


def test_skip_init_and_quantization():
    layer = nn.utils.skip_init(SparseConv2d, 3, 8, 3)
    with pytest.warns(UserWarning, match="revert"):
        layer.qconfig = object()


def test_input_placement_before_a_normalisation_warns():
    """Nothing that such a layer consumes is pruned: density 1, nothing gained."""

    def net(norm):
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    expected = r"output gradients of 1 convolutions \(the first is followed by BatchNorm2d '1'\) are dense"
    with pytest.warns(UserWarning, match=expected):
        convert(net(nn.BatchNorm2d(4)), placement="input", where="everywhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(net(nn.BatchNorm2d(4)), where="everywhere")
        convert(net(nn.BatchNorm2d(4)), percentile=None, placement="input", where="everywhere")
        convert(net(nn.Identity()), placement="input", where="everywhere")
