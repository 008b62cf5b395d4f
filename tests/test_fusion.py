# SPDX-License-Identifier: Apache-2.0
"""Fusion and quantization look for modules by exact type: they find the layers, or it is said that they do not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import fx, nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.utils import mkldnn

from sparsebwd import SparseConv2d, convert, revert
from sparsebwd.testing import assert_bit_equal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated", "ignore:must run observer")

FUSED = [["conv", "bn", "relu"], ["conv", "bn"], ["conv", "relu"]]


def dense(names: list[str]) -> nn.Sequential:
    modules = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU(), "last": nn.Conv2d(4, 4, 3)}
    model = nn.Sequential()
    for name in [*names, "last"]:
        model.add_module(name, modules[name])
    return model


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("names", FUSED)
@pytest.mark.parametrize("settings", [{}, {"threshold": "predicted"}])
def test_fuse_modules(names, settings):
    model = dense(names).eval()
    sparse = convert(copy.deepcopy(model), **settings, where="everywhere")
    expected, fused = (quantization.fuse_modules(m, [names]) for m in (model, sparse))
    x = torch.randn(2, 3, 8, 8)
    assert_bit_equal(fused(x), expected(x))
    assert types(revert(fused)) == types(expected) and not list(fused.buffers())
    assert isinstance(sparse.conv, SparseConv2d)  # that was a copy


@pytest.mark.parametrize("names", FUSED)
def test_fuse_modules_for_training(names):
    model = dense(names)
    expected = quantization.fuse_modules_qat(copy.deepcopy(model), [names])
    fused = quantization.fuse_modules_qat(convert(model, where="everywhere"), [names], inplace=True)
    assert types(revert(fused)) == types(expected)
    x = torch.randn(2, 3, 8, 8)
    assert_bit_equal(fused(x), expected(x))


def test_hooks_run_once_after_fusion():
    model, calls = convert(dense(FUSED[2]), where="everywhere").eval(), []
    model.conv.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.relu.register_forward_hook(lambda *_: calls.append("after"))
    quantization.fuse_modules(model, [FUSED[2]], inplace=True)(torch.randn(2, 3, 8, 8))
    assert calls == ["before", "after"]


def test_what_cannot_be_fused_stays_as_it_is():
    model = convert(dense(FUSED[0]), percentile=95, placement="input", where="everywhere")
    nn.utils.parametrizations.weight_norm(model.conv)
    before = model.conv.pruning
    with pytest.raises(NotImplementedError, match="Cannot fuse"):
        quantization.fuse_modules_qat(model, [FUSED[0]], inplace=True)
    assert isinstance(model.conv, SparseConv2d) and model.conv.pruning == before


def _with_qconfig(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qat_qconfig()
    return model


X = torch.zeros(2, 3, 8, 8)
SKIPPING = {
    "prepare_qat": lambda model: quantization.prepare_qat(_with_qconfig(model)),
    "prepare": lambda model: quantization.prepare(_with_qconfig(model.eval())),
    "prepare_fx": lambda model: quantize_fx.prepare_fx(
        model.eval(), quantization.get_default_qconfig_mapping(), (X,)
    ),
    "prepare_qat_fx": lambda model: quantize_fx.prepare_qat_fx(
        model, quantization.get_default_qat_qconfig_mapping(), (X,)
    ),
    "fuse_fx": lambda model: quantize_fx.fuse_fx(model.eval()),
    "optimization.fuse": lambda model: optimization.fuse(model.eval()),
    "symbolic_trace": lambda model: fx.symbolic_trace(model.eval()),
}  # fmt: skip


@pytest.mark.parametrize("tool", SKIPPING.values(), ids=list(SKIPPING))
def test_what_skips_the_layers_warns_and_names_revert(tool):
    with pytest.warns(UserWarning, match=r"sparsebwd.revert\(model\)"):
        result = tool(convert(dense(FUSED[0]), where="everywhere"))
    assert SparseConv2d in types(result)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tool(revert(convert(dense(FUSED[0]), where="everywhere")))
    assert "sparsebwd" not in str([warning.message for warning in caught])


INFERENCE = {
    "script": lambda model: torch.jit.script(model),
    "freeze": lambda model: torch.jit.freeze(torch.jit.script(model)),
    "optimize_for_inference": lambda model: torch.jit.optimize_for_inference(torch.jit.script(model)),
    "of a trace": lambda model: torch.jit.optimize_for_inference(torch.jit.trace(model, X)),
    "to_mkldnn": lambda model: _through_mkldnn(mkldnn.to_mkldnn(model)),
    "export": lambda model: torch.export.export(model, (X,)).module(),
}


def _through_mkldnn(model: nn.Module):
    assert SparseConv2d not in types(model)
    return lambda x: model(x.to_mkldnn()).to_dense()


@pytest.mark.parametrize("tool", INFERENCE)
def test_tools_for_inference(tool):
    if tool == "to_mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN")
    torch.manual_seed(0)
    model = convert(dense(FUSED[0]), where="everywhere").eval()
    x = torch.randn_like(X)
    expected = model(x)  # before: some change the model
    torch.testing.assert_close(INFERENCE[tool](model)(x), expected)


@pytest.mark.parametrize("library", ["mkldnn", "nnpack"])
def test_libraries_of_pytorch_can_be_switched_off(library):
    torch.manual_seed(0)
    layer, x = SparseConv2d(3, 4, 3, percentile=None), torch.randn_like(X)
    plain = layer.to_conv2d()
    gradients = []
    for module, enabled in ((layer, False), (plain, True)):
        with getattr(torch.backends, library).flags(enabled):
            gradients.append(torch.autograd.grad(module(x).square().sum(), [module.weight]))
    torch.testing.assert_close(*gradients)


def test_fusion_of_two_modules_in_place():
    """It keeps the class of the convolution, as for any subclass."""
    conv, bn = SparseConv2d(3, 4, 3).eval(), nn.BatchNorm2d(4).eval()
    bn.running_mean.normal_()
    fused, x = nn.utils.fuse_conv_bn_eval(conv, bn), torch.randn(2, 3, 8, 8)
    assert type(fused) is SparseConv2d and fused.layer_id != conv.layer_id
    torch.testing.assert_close(fused(x), bn(conv(x)))
