# SPDX-License-Identifier: Apache-2.0
"""convert(), revert() and conversion_report()."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsebwd import SparseConv2d, conversion_report, convert, models, revert


def conv(*args, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, *args, padding=1, **kwargs)


def placements(model: nn.Module) -> dict[str, str]:
    return {name: m.placement for name, m in model.named_modules() if isinstance(m, SparseConv2d)}


class Branchy(nn.Module):
    """Does not trace: its forward depends on values."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.abs().sum() > 1e9:
                break
        return x


class Calls(nn.Module):
    """One convolution, then whatever ``after`` does with its output."""

    def __init__(self, after) -> None:
        super().__init__()
        self.conv = conv()
        self.after = after

    def forward(self, x):
        return self.after(self.conv(x))


@pytest.mark.parametrize("name", models.names())
def test_models_are_converted_and_reverted(name):
    model = models.create(name, num_classes=10)
    expected = "input" if name == "alexnet" else "output"
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    parameters, state_keys = list(model.parameters()), list(model.state_dict())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert convert(model, percentile=95, where="everywhere") is model
    assert ("depthwise" in str([w.message for w in caught])) == (name == "mobilenet")
    assert placements(model) == dict.fromkeys(convs, expected)
    assert all(m.percentile == 95 for m in convs.values())
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == state_keys

    assert revert(model) is model
    assert {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)} == convs
    assert {type(m) for m in convs.values()} == {nn.Conv2d}
    assert all(vars(m).keys() == vars(nn.Conv2d(1, 1, 1)).keys() for m in convs.values())
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "after, expected",
    [
        (F.relu, "input"),
        (torch.relu, "input"),
        (lambda x: x.relu_(), "input"),
        (lambda x: x.clamp(min=0), "input"),
        (lambda x: F.max_pool2d(x, 2), "input"),
        (lambda x: F.dropout(x + 1).flatten(1).relu(), "input"),
        (lambda x: F.relu(torch.cat([x, x], 1)), "input"),
        (lambda x: F.relu(F.avg_pool2d(x, 2)), "input"),
        (lambda x: F.relu(x.view(x.size(0), x.shape[1], -1) + torch.zeros(x.shape[-1])), "input"),
        (nn.ReLU6(), "input"),
        (nn.Sequential(nn.Dropout2d(), nn.Identity(), nn.ReLU()), "input"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), "output"),
        (nn.Sequential(nn.GroupNorm(3, 3), nn.ReLU()), "output"),
        (lambda x: F.relu(F.batch_norm(x, torch.zeros(3), torch.ones(3))), "output"),
        (lambda x: F.relu(x) + F.gelu(x), "output"),
        (lambda x: F.relu(x) + x, "output"),
        (F.silu, "output"),
        (lambda x: x, "output"),
    ],
)
def test_auto_placement_follows_the_traced_output(after, expected):
    model = convert(Calls(after), where="everywhere")
    assert placements(model) == {"conv": expected}


def test_auto_placement_of_a_convolution_used_twice_takes_both_uses():
    shared = conv()
    model = convert(nn.Sequential(shared, nn.ReLU(), shared, nn.BatchNorm2d(3)), where="everywhere")
    assert model[0] is model[2] is shared
    assert placements(model) == {"0": "output"}


def test_auto_placement_by_registration_where_nothing_traces():
    model = Branchy(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.Dropout(), nn.ReLU(), conv(), conv())
    convert(model, where="everywhere")
    assert placements(model) == {"layers.0": "output", "layers.3": "input", "layers.6": "output", "layers.7": "output"}
    assert "by order of registration" in str(conversion_report(model))


def test_auto_placement_traces_the_parts_of_what_does_not_trace():
    # By registration order the ReLU would come first.
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.bn, self.last = conv(), nn.ReLU(), nn.BatchNorm2d(3), conv()

        def forward(self, x):
            return self.last(self.relu(self.bn(self.conv(x))))

    model = convert(Branchy(Part(), nn.ReLU()), where="everywhere")
    assert placements(model) == {"layers.0.conv": "output", "layers.0.last": "input"}


def test_tracing_leaves_no_mark():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.register_buffer("calls", torch.zeros(()))
            self.history = []

        def forward(self, x):
            self.calls += 1
            self.history.append(x)
            self.latest = F.relu(self.conv(x))
            return self.latest

    model = Remembers()
    model.conv.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    random_state = torch.get_rng_state()
    convert(model, where="everywhere")
    assert placements(model) == {"conv": "input"}
    assert model.calls == 0 and model.history == [] and not hasattr(model, "latest")
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("placement", ["input", "output"])
def test_given_placement_holds_for_every_layer(placement):
    model = convert(
        nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(3)), placement=placement, where="everywhere"
    )
    assert placements(model) == {"0": placement, "2": placement}


def test_a_convolution_itself():
    layer = conv()
    assert convert(layer, percentile=None, where="everywhere") is layer
    assert type(layer) is SparseConv2d and layer.percentile is None and layer.placement == "output"
    assert str(conversion_report(layer)).startswith("the model: placement='output'")
    assert revert(layer) is layer and type(layer) is nn.Conv2d


def test_converting_again_updates_the_settings():
    model = convert(nn.Sequential(conv(), nn.ReLU()), percentile=90, where="everywhere")
    layer, layer_id = model[0], model[0].layer_id
    convert(model, percentile=99.5, placement="output", backend="reference", sigma_estimator="as_printed")
    assert model[0] is layer and layer.layer_id == layer_id
    assert (layer.percentile, layer.placement) == (99.5, "output")
    assert (layer.backend, layer.sigma_estimator) == ("reference", "as_printed")


def test_what_is_kept():
    layer = nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="reflect", bias=False)
    layer = layer.to(memory_format=torch.channels_last, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    layer.note = "kept"
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    model = nn.Sequential(layer)
    others = [layer]  # a reference that is no submodule
    convert(model, where="everywhere")
    assert others[0] is model[0] is layer and type(layer) is SparseConv2d
    assert layer.note == "kept" and not layer.training and not layer.weight.requires_grad
    assert layer.weight.is_contiguous(memory_format=torch.channels_last) and layer.weight.dtype == torch.bfloat16
    assert layer.padding_mode == "reflect" and layer.stride == (2, 1) and layer.bias is None
    model(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16))
    handle.remove()
    model(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16))
    assert calls == ["forward"]


def test_shared_weights_and_optimiser_go_on():
    torch.manual_seed(0)
    model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv())
    model[3].weight = model[0].weight
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, where="everywhere")
    assert model[3].weight is model[0].weight
    before = model[0].weight.detach().clone()
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model[3].weight, before)


def test_without_pruning_gradients_equal_the_dense_ones():
    torch.manual_seed(0)
    dense = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(bias=False), nn.ReLU(), nn.Flatten())
    sparse = convert(copy.deepcopy(dense), percentile=None, where="everywhere")
    x = torch.randn(2, 3, 6, 6)
    for model in (dense, sparse):
        model(x).square().sum().backward()
    for p, q in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)


def test_what_is_not_eligible_is_left_alone_and_reported(caplog):
    class Own(nn.Conv2d):
        pass

    overridden = conv()
    overridden.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "own": Own(3, 3, 3),
            "lazy": nn.LazyConv2d(3, 3),
            "transposed": nn.ConvTranspose2d(3, 3, 3),
            "flat": nn.Conv1d(3, 3, 3),
            "overridden": overridden,
            "plain": conv(),
        }
    )
    types = {name: type(module) for name, module in model.items()}
    with caplog.at_level(logging.INFO, logger="sparsebwd"):
        convert(model, where="everywhere")
    assert {name: type(module) for name, module in model.items()} == types | {"plain": SparseConv2d}
    report = {layer.name: layer for layer in conversion_report(model).layers}
    assert report["plain"].converted and report["plain"].percentile == 90
    for name, reason in {
        "own": "subclass",
        "lazy": "lazy",
        "transposed": "ConvTranspose2d is not a Conv2d",
        "flat": "Conv1d is not a Conv2d",
        "overridden": "overridden on the instance",
    }.items():
        assert not report[name].converted and reason in report[name].reason
        assert f"{name}: not converted: {report[name].reason}" in caplog.text
    assert "plain: placement='output', percentile=90.0" in caplog.text


def test_parametrized_convolutions_convert_and_revert():
    layer = nn.utils.parametrizations.weight_norm(conv())
    kind, keys = type(layer), list(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    expected = layer(x)
    convert(layer, where="everywhere")
    assert isinstance(layer, SparseConv2d) and nn.utils.parametrize.is_parametrized(layer)
    assert layer(x).equal(expected) and list(layer.state_dict()) == keys
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    revert(layer)
    assert not isinstance(layer, SparseConv2d) and isinstance(layer, nn.Conv2d)
    assert layer(x).equal(expected) and list(layer.state_dict()) == keys and type(layer).__name__ == kind.__name__


def test_lazy_convolution_converts_once_it_is_materialised():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    model(torch.randn(1, 2, 5, 5))
    assert type(convert(model, where="everywhere")[0]) is SparseConv2d


@pytest.mark.parametrize(
    "exclude, expected",
    [
        ("head", {"body.0", "body.2"}),
        (["body"], {"head"}),
        (["body.0", "head"], {"body.2"}),
        ("body.*", {"head"}),
        ((), {"body.0", "body.2", "head"}),
    ],
)
def test_exclude(exclude, expected):
    model = nn.ModuleDict({"body": nn.Sequential(conv(), nn.ReLU(), conv()), "head": conv()})
    assert placements(convert(model, exclude=exclude, where="everywhere")).keys() == expected


def test_a_model_without_convolutions(caplog):
    for model in (nn.Linear(2, 2), torch.jit.script(conv())):
        assert revert(convert(model, where="everywhere")) is model
        assert str(conversion_report(model)) == "no convolutions"
        assert "has no convolutions that are modules, so nothing changes" in caplog.text
        caplog.clear()


def test_complex_convolutions_are_left_alone():
    model = nn.Sequential(conv(dtype=torch.complex64), conv())
    assert [type(module) for module in convert(model, where="everywhere")] == [nn.Conv2d, SparseConv2d]
    assert "0: not converted: its weight is torch.complex64" in str(conversion_report(model))
    model[0](torch.randn(1, 3, 4, 4, dtype=torch.complex64)).abs().sum().backward()
    for make in (lambda: SparseConv2d.from_conv2d(model[0]), lambda: SparseConv2d(3, 3, 3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="dtype: got torch.complex64; accepted"):
            make()


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"percentile": 49}, ValueError, "percentile: got 49"),
        ({"percentile": 100}, ValueError, "percentile: got 100"),
        ({"percentile": "90"}, TypeError, "percentile: got '90'"),
        ({"placement": "both"}, ValueError, "placement: got 'both'; accepted: 'auto', 'output', 'input'"),
        ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
        ({"backend": ["cpu"]}, TypeError, r"backend: got \['cpu'\]; accepted: the name of a backend"),
        ({"sigma_estimator": "mean"}, ValueError, "sigma_estimator: got 'mean'"),
        ({"exclude": "hat"}, ValueError, "exclude: got 'hat'"),
        ({"exclude": 3}, TypeError, "exclude: got 3; accepted: names of modules, as strings"),
        ({"exclude": [3]}, TypeError, "exclude: got an element 3"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(arguments, error, words):
    model = nn.Sequential(conv())
    with pytest.raises(error, match=words):
        convert(model, **arguments, where="everywhere")
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("function", [convert, revert, conversion_report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model: got list; accepted: an nn.Module"):
        function([conv()])


def test_what_is_converted_and_has_run_scripts_in_eval_mode():
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), where="everywhere")
    model = nn.Sequential(model, convert(nn.Sequential(nn.Conv2d(8, 4, 3))))
    input = torch.randn(2, 3, 8, 8)
    model(input).sum().backward()
    model.eval()
    assert torch.equal(torch.jit.script(model)(input), model(input))
