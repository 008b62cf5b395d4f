# SPDX-License-Identifier: Apache-2.0
"""register_conv(): subclasses of nn.Conv2d that do something before and after their convolution."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import sparsebwd
from sparsebwd import DensityMonitor, SparseConv2d, conversion_report, convert, register_conv, revert, subclasses


@register_conv
class Standardised(nn.Conv2d):
    """Its weight has zero mean and unit variance, as that of NFNets."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.5))

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, (self.gain * 2).view(-1), training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


@register_conv
class Same(nn.Conv2d):
    """Pads as TensorFlow does, by the size of its input, and leaves the rest to nn.Conv2d."""

    def forward(self, input):
        added = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            added += [total // 2, total - total // 2]
        return super().forward(F.pad(input, added))


@register_conv
class Quantised(nn.Conv2d):
    """Overrides _conv_forward, and calls with keywords and single numbers."""

    def _conv_forward(self, input, weight, bias):
        weight = weight + (weight.mul(8).round().div(8) - weight).detach()
        return F.conv2d(input=input, weight=weight, bias=bias, padding=1, stride=self.stride[0])


@register_conv
class Wrapper(nn.Conv2d):
    """Normalises and rectifies its output, and scales it by what a convolution of its own, of another size, finds."""

    def __init__(self, *args, norm=None, activation=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm or nn.BatchNorm2d(self.out_channels), activation
        self.gate = nn.Conv2d(self.out_channels, self.out_channels, 1)

    def forward(self, x, *, scale=1.0):
        x = self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)) * scale
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return x if self.activation is None else self.activation(x)


class Untraceable(Wrapper):
    def forward(self, x, *, scale=1.0):
        if x.numel() == 0:
            raise ValueError("no pixels")
        return super().forward(x, scale=scale)


register_conv(Untraceable)

KINDS = {
    "standardised": lambda: Standardised(8, 12, 3, padding=1, groups=2),
    "same": lambda: Same(8, 12, 3, stride=2),
    "same, other padding": lambda: Same(8, 12, 3, padding=1, padding_mode="reflect"),
    "quantised": lambda: Quantised(8, 12, 3, stride=2, bias=False),
    "wrapper": lambda: Wrapper(8, 12, 3, padding="same", activation=F.relu),
    "untraceable": lambda: Untraceable(8, 12, 1, activation=nn.GELU()),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    return convert(KINDS[kind](), **{"where": "everywhere", "exclude": "gate" if kind in ("wrapper", "untraceable") else ()} | settings)


def images() -> torch.Tensor:
    return torch.randn(4, 8, 10, 9, generator=torch.Generator().manual_seed(1))


def gradients(function, module, x, seed=0):
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    output = function(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = [output.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return found


def assert_same(actual, wanted) -> None:
    for one, two in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@kinds
def test_converted_and_reverted(kind):
    plain = layer_of(kind, exclude="")
    original = type(plain)
    parameters, keys, text = list(plain.parameters()), list(plain.state_dict()), repr(plain)
    assert convert(plain, where="everywhere", exclude="gate" if hasattr(plain, "gate") else ()) is plain
    assert isinstance(plain, SparseConv2d) and isinstance(plain, original)
    assert type(plain).__name__ == f"Sparse{original.__name__}" in repr(plain)
    assert list(plain.state_dict()) == keys
    assert all(after is before for after, before in zip(plain.parameters(), parameters, strict=True))
    layer = conversion_report(plain).layers[0]
    assert layer.converted and f"({original.__name__}, followed by" in str(layer)
    assert revert(plain) is plain and type(plain) is original and repr(plain) == text
    assert vars(plain).keys() == vars(KINDS[kind]()).keys()


@kinds
@pytest.mark.parametrize("placement", ["output", "input"])
def test_without_pruning_outputs_and_gradients_are_those_of_the_class(kind, placement, memory_format):
    layer = layer_of(kind, percentile=None, placement=placement)
    plain = revert(copy.deepcopy(layer))
    x = images().contiguous(memory_format=memory_format)
    assert_same(gradients(layer, layer, x), gradients(plain, plain, x))
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@kinds
def test_pruning_is_seen_and_unbiased(kind):
    """The mean over 100 draws is within 5 of its standard errors in every element, and 1.5 on average."""
    layer = layer_of(kind, percentile=95)
    if hasattr(layer, "norm"):
        layer.norm.eval()
    plain = revert(copy.deepcopy(layer))
    with DensityMonitor(layer) as monitor:
        drawn = [gradients(layer, layer, images(), seed)[1:3] for seed in range(100)]
    assert monitor.as_dict()["total"]["steps"] == 100
    assert 0.2 < monitor.as_dict()["total"]["density"] < 0.9
    for samples, wanted in zip(zip(*drawn), gradients(plain, plain, images())[1:3]):
        samples = torch.stack(samples).double()
        error, deviation = (samples.mean(0) - wanted).abs(), samples.std(0) / 10
        assert (deviation > 0).any()
        assert (error <= 5 * deviation + 1e-5).all()
        assert error.mean() <= 1.5 * deviation.mean()


def test_only_the_convolution_with_a_weight_of_its_size_is_sparse(stats):
    layer = layer_of("wrapper")
    layer(images()).sum().backward()
    assert [record.layer_id for record in stats] == [layer.layer_id]
    assert type(layer.gate) is nn.Conv2d


def test_convolutions_within_are_converted_by_themselves(stats):
    layer = layer_of("wrapper", exclude=())
    layer(images()).sum().backward()
    assert {record.layer_id for record in stats} == {layer.layer_id, layer.gate.layer_id}


@kinds
@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(kind, copy_of):
    layer = layer_of(kind, percentile=80)
    if kind == "wrapper":
        layer.activation = nn.ReLU()  # functions of torch.nn.functional do not pickle everywhere
    twin = copy_of(layer)
    assert type(twin) is type(layer) and twin.percentile == 80 and twin.layer_id != layer.layer_id
    assert_same(gradients(twin, twin, images(), 3), gradients(layer, layer, images(), 3))
    assert type(revert(twin)) is subclasses.original_class(type(layer))


def test_saved_and_loaded_whole():
    file = io.BytesIO()
    torch.save(nn.Sequential(layer_of("standardised")), file)
    file.seek(0)
    (layer,) = torch.load(file, weights_only=False)
    assert type(layer) is subclasses.sparse_class(Standardised)


# ---- which layers


@pytest.mark.parametrize(
    "make, after, placement, words",
    [
        (lambda: Standardised(8, 8, 3), nn.ReLU(), "input", "followed by ReLU '1'"),
        (lambda: Standardised(8, 8, 3), nn.BatchNorm2d(8), "output", "followed by BatchNorm2d '1'"),
        (lambda: Wrapper(8, 8, 3), nn.ReLU(), "output", "followed by BatchNorm2d '0.norm'"),
        (lambda: Wrapper(8, 8, 3, norm=nn.Identity(), activation=F.relu), nn.BatchNorm2d(8), "output", "'0.gate'"),
        (lambda: Untraceable(8, 8, 3), nn.ReLU(), "output", "followed by BatchNorm2d '0.norm', by order of registration"),
        (lambda: Same(8, 8, 3), nn.ReLU(), "input", "followed by ReLU '1'"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_placement_looks_into_the_forward(make, after, placement, words, again):
    model = convert(nn.Sequential(make(), after), where="everywhere")
    if again:
        convert(model, where="everywhere")
    assert model[0].placement == placement
    assert words in conversion_report(model).layers[0].reason


def test_where_and_depthwise_are_those_of_conv2d():
    few = convert(nn.Sequential(Standardised(4, 4, 3), Standardised(64, 64, 3)), exclude="1", where="everywhere")
    assert [isinstance(layer, SparseConv2d) for layer in few] == [True, False]
    model = nn.Sequential(Standardised(64, 128, 3), Standardised(3, 4, 1))
    plain = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(3, 4, 1))
    convert(model), convert(plain)
    assert [isinstance(a, SparseConv2d) for a in model] == [isinstance(b, SparseConv2d) for b in plain]
    with pytest.warns(UserWarning, match="depthwise"):
        convert(Standardised(8, 8, 3, groups=8), where="everywhere")


class Unknown(Standardised):
    pass


def test_what_was_not_registered_names_register_conv():
    model = nn.Sequential(Unknown(8, 8, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="Unknown is a subclass of Conv2d, whose forward may differ: see sparsebwd.register_conv"):
        convert(model, where="everywhere")
    assert type(model[0]) is Unknown


def test_attributes_that_would_be_hidden():
    class Has(nn.Conv2d):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.threshold = 3.0

    register_conv(Has)
    layer = Has(8, 8, 3)
    with pytest.warns(UserWarning, match="it has threshold of its own, which mean something else in a SparseConv2d"):
        convert(layer, where="everywhere")
    assert type(layer) is Has and layer.threshold == 3.0


@pytest.mark.parametrize(
    "cls, words",
    [
        (nn.Conv2d, "cls: got Conv2d, which is known"),
        (SparseConv2d, "cls: got SparseConv2d, which is known"),
        (nn.LazyConv2d, "cls: got LazyConv2d, which is lazy"),
        (nn.ConvTranspose2d, "cls: got <class .*ConvTranspose2d'>; accepted: a subclass of torch.nn.Conv2d"),
        (nn.Conv2d(1, 1, 1), r"cls: got Conv2d\(.*; accepted: a subclass of torch.nn.Conv2d"),
    ],
)
def test_refused(cls, words):
    with pytest.raises(TypeError, match=words):
        register_conv(cls)


def test_a_class_that_does_not_convolve_warns():
    @register_conv
    class Other(nn.Conv2d):
        def forward(self, x):
            return torch.ops.aten.convolution(x, self.weight, self.bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    layer = convert(Other(8, 8, 3), where="everywhere")
    with pytest.warns(UserWarning, match="Other was registered .* its forward did not call torch.nn.functional.conv2d"):
        layer(images())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(images())


# ---- with the rest of PyTorch


@pytest.mark.slow
@kinds
def test_compile_gives_the_same_gradients(kind):
    layer = layer_of(kind)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, twin, images()), gradients(layer, layer, images()))
    torch.compiler.reset()


def test_export_and_trace():
    layer, x = layer_of("standardised"), images()
    exported = torch.export.export(layer, (x,))
    assert "sparsebwd.conv2d" in exported.graph_module.code
    assert_same(gradients(exported.module(), layer, x)[:2], gradients(layer, layer, x)[:2])
    assert_same([torch.jit.trace(layer, x, check_trace=False)(x)], [layer(x)])


def test_script():
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile it in training mode"):
        torch.jit.script(layer_of("standardised"))
    layer = layer_of("standardised").eval()
    wanted = layer(images())
    assert_same([torch.jit.script(layer)(images())], [wanted])


def test_fx():
    model = nn.Sequential(layer_of("wrapper"), nn.ReLU())
    graph = fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in graph.graph.nodes][1] == ("call_module", "0")
    assert_same(gradients(graph, model, images()), gradients(model, model, images()))
    root = layer_of("standardised")
    graph = fx.symbolic_trace(root)
    assert sparsebwd.functional.sparse_conv2d in {node.target for node in graph.graph.nodes}
    assert_same(gradients(graph, root, images()), gradients(root, root, images()))
    with pytest.warns(UserWarning, match="torch.fx traces"):
        graph = fx.symbolic_trace(root.eval())
    assert sparsebwd.functional.sparse_conv2d not in {node.target for node in graph.graph.nodes}
    assert_same([graph(images())], [root(images())])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    layer = layer_of("standardised")
    wanted = gradients(layer, layer, images())
    assert_same(gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, images()), wanted)


def test_autocast():
    layer = layer_of("standardised", percentile=None)
    plain = revert(copy.deepcopy(layer))

    def run(module):
        def function(x):
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)

        return gradients(function, module, images())

    for one, two in zip(run(layer), run(plain), strict=True):
        assert one.dtype == two.dtype
        assert (one - two).norm() <= 0.03 * two.norm()  # bfloat16 has 8 bits


def test_parametrized():
    layer = Standardised(8, 12, 3)
    nn.utils.parametrizations.spectral_norm(layer.eval())
    wanted = gradients(layer, layer, images())
    convert(layer, percentile=None, where="everywhere")
    assert isinstance(layer, SparseConv2d) and nn.utils.parametrize.is_parametrized(layer)
    assert_same(gradients(layer, layer, images()), wanted)
    assert type(copy.deepcopy(layer)).__name__ == "ParametrizedSparseStandardised"
    assert type(revert(layer)).__bases__[-1] is Standardised
    assert_same(gradients(layer, layer, images()), wanted)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("before", [True, False])
def test_fully_sharded(before, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = KINDS["standardised"]()
        wanted = gradients(layer, layer, images())
        if before:
            convert(layer, percentile=None, where="everywhere")
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        convert(layer, percentile=None, where="everywhere")
        assert isinstance(layer, SparseConv2d) and type(layer).__name__ == "FSDPSparseStandardised"
        found = gradients(layer, layer, images())
        assert_same([value.full_tensor() if hasattr(value, "full_tensor") else value for value in found], wanted)
        assert type(revert(layer)).__name__ == "FSDPStandardised"
    finally:
        dist.destroy_process_group()


def test_threads_have_convolutions_of_their_own(stats):
    """While one thread is within the forward of a layer, another one's F.conv2d is PyTorch's."""
    within, done = threading.Event(), threading.Event()

    @register_conv
    class Waits(nn.Conv2d):
        def forward(self, x):
            if type(x) is torch.Tensor:
                within.set()
                assert done.wait(60)
            return super().forward(x)

    layer, weight, names = convert(Waits(8, 8, 3), where="everywhere"), torch.randn(8, 8, 3, 3, requires_grad=True), []

    def other():
        assert within.wait(60)
        names.append(F.conv2d(images(), weight).grad_fn.name())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    output = layer(images())
    thread.join()
    output.sum().backward()
    assert names == ["ConvolutionBackward0"] and len(stats) == 1
