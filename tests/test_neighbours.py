# SPDX-License-Identifier: Apache-2.0
"""Converted models together with what else PyTorch does to modules: as the dense model, if nothing is pruned."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from sparsebwd import SparseConv2d, convert, revert
from sparsebwd.backends import observers
from sparsebwd.testing import assert_bit_equal

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:.*weight_norm.* is deprecated", "ignore:FSDP2-wrapped module"
)


def dense(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())


def images() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, function: Callable | None = None) -> list[torch.Tensor]:
    """Of all parameters, and of the images."""
    torch.manual_seed(0)
    x = images().requires_grad_()
    model.zero_grad()
    (function or model)(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def assert_as_dense(sparse: nn.Module, model: nn.Module, function: Callable | None = None) -> None:
    for actual, expected in zip(gradients(sparse, function), gradients(model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ---- what changes where the weight comes from

WEIGHTS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm, old": nn.utils.weight_norm,
    "spectral_norm, old": nn.utils.spectral_norm,
    "pruned weights": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "frozen": lambda layer: layer.weight.requires_grad_(False),
    "channels_last": lambda layer: layer.to(memory_format=torch.channels_last),
    "shared": lambda layer: layer.share_memory(),
}


@pytest.mark.parametrize("change", [pytest.param(WEIGHTS[name], id=name) for name in WEIGHTS])
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_come_from_elsewhere(change, before):
    """Set up before or after conversion; reverted, the model is the dense one again."""
    model, sparse = dense(), dense()
    for m in (model, sparse):
        if m is sparse and not before:
            convert(sparse, percentile=None, placement="output", where="everywhere")
        torch.manual_seed(2)
        change(m[0])
    if before:
        torch.manual_seed(2)
        convert(sparse, percentile=None, placement="output", where="everywhere")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert isinstance(sparse[0], SparseConv2d)
    for m in (model, sparse):
        for parameter in m.parameters():
            parameter.grad = None
    if frozen:
        model[0].weight.requires_grad_()
        sparse[0].weight.requires_grad_()
    assert_as_dense(sparse, model)
    revert(sparse)
    assert [type(m).__name__ for m in sparse.modules()] == [type(m).__name__ for m in model.modules()]
    assert list(sparse.state_dict()) == list(model.state_dict())
    assert_as_dense(sparse, model)


def test_removing_what_computed_the_weight():
    everywhere = functools.partial(convert, where="everywhere")
    for first in (everywhere, parametrizations.weight_norm):
        layer = nn.Conv2d(3, 4, 3)
        for step in (first, parametrizations.weight_norm if first is everywhere else everywhere):
            step(layer)
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is SparseConv2d and type(revert(layer)) is nn.Conv2d


# ---- copies


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model):
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    return averaged.module


def _swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved, _averaged, _swapped])
def test_copies_of_whole_models(copied):
    assert_as_dense(copied(convert(dense(), percentile=None, where="everywhere")), copied(dense()))


def _trained(model: nn.Module, averages: list[nn.Module]) -> None:
    """A few steps; averages follow, an AveragedModel by its own method and others with a decay of 0.9."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        for average in averages:
            if isinstance(average, AveragedModel):
                average.update_parameters(model)
            else:
                for mean, value in zip(average.parameters(), model.parameters()):
                    mean.data.lerp_(value.data, 0.1)


def test_averages_of_weights():
    """Of a converted model, made before or after conversion: as those of the dense model, converted themselves or not."""
    model, sparse = dense(), dense()
    expected = [AveragedModel(model), copy.deepcopy(model)]
    averages = [copy.deepcopy(sparse), AveragedModel(convert(sparse, percentile=None, where="everywhere")), copy.deepcopy(sparse)]
    _trained(model, expected)
    _trained(sparse, averages)
    for average, wanted in zip(averages, (expected[1], *expected)):
        assert any(isinstance(module, SparseConv2d) for module in average.modules()) == (average is not averages[0])
        torch.testing.assert_close(average.state_dict(), wanted.state_dict(), rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, SparseConv2d) for module in revert(average).modules())
        x = images()
        torch.testing.assert_close(average.eval()(x), wanted.eval()(x), rtol=1e-4, atol=1e-4)


# ---- what runs modules in other ways


def test_accumulated_gradients(stats):
    """The gradients of parts of a batch add up, and each part is pruned for itself."""
    model, sparse = dense().eval(), convert(dense(), percentile=None, where="everywhere")
    sparse[1].eval()
    for part in images().split(1):
        (sparse(part).square().sum() / 2).backward()
    (model(images()).square().sum() / 2).backward()
    for actual, expected in zip(sparse.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4)
    stats.clear()
    convert(sparse, percentile=80, where="everywhere").zero_grad()
    for part in images().split(1):
        sparse(part).square().sum().backward()
    by_layer = {layer: [record.tau for record in stats if record.layer_id == layer] for layer in {r.layer_id for r in stats}}
    assert all(len(taus) == 2 and taus[0] != taus[1] for taus in by_layer.values()) and len(by_layer) == 2


def test_functional_call_and_its_copies():
    model, sparse = dense(), convert(dense(), percentile=None, where="everywhere")
    state = dict(sparse.named_parameters())
    assert_as_dense(sparse, model, lambda x: torch.func.functional_call(sparse, state, (x,)))
    parameters, buffers = torch.func.stack_module_state(
        [convert(dense(seed), where="everywhere").eval() for seed in range(3)]
    )
    base = convert(dense(), where="everywhere").eval().to("meta")
    x = images()
    ensemble = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for output, seed in zip(ensemble, range(3)):
        torch.testing.assert_close(output, dense(seed).eval()(x))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would ask for a model on a GPU")
def test_data_parallel():
    sparse = convert(dense(), percentile=None, where="everywhere")
    assert_as_dense(sparse, dense(), nn.DataParallel(sparse))


def test_hooks_of_all_kinds():
    model, calls = dense(), []
    layer = model[0]
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    layer.register_full_backward_hook(lambda _, got, out: calls.append(("backward", got[0].shape, out[0].shape)))
    layer.weight.register_hook(lambda _: calls.append("weight"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    expected = gradients(model)
    seen = calls.copy()
    calls.clear()
    for actual, wanted in zip(gradients(convert(model, percentile=None, where="everywhere")), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert calls == seen and len(seen) == 6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", ["exact", "predicted"])
def test_trace_prunes_with_fresh_numbers(training, threshold):
    """torch.jit.trace keeps the operators; what it has traced can be saved, and draws a key at each call."""
    model = convert(nn.Sequential(*dense()[0:4:3]), percentile=95, threshold=threshold, where="everywhere").train(
        training
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, images(), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(images()), model(images()))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loaded.zero_grad()
        for history in loaded.buffers():
            history.zero_()
        loaded(images()).square().sum().backward()
        results.append(next(loaded.parameters()).grad)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]) == (not training)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "named",
    [
        {"padding": "same"},
        {"padding": "same", "padding_mode": "reflect"},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
    ],
)
def test_trace_of_any_padding_takes_other_sizes(named):
    model = convert(
        nn.Sequential(nn.Conv2d(4, 4, (2, 3), **named)), percentile=None, placement="output", where="everywhere"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(1, 4, 6, 6), check_trace=False)
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    torch.testing.assert_close(traced(x), model(x))
    results = [torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())) for module in (traced, model)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export(training, strict):
    model = convert(dense(), where="everywhere").train(training)
    program = torch.export.export(model, (images(),), strict=strict)
    operators = [str(node.target) for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert operators == ["sparsebwd.conv2d.default" if training else "aten.conv2d.default"] * 2
    torch.testing.assert_close(program.module()(images()), copy.deepcopy(model)(images()))


@pytest.mark.slow
@pytest.mark.parametrize("compile_it", [lambda m: torch.compile(m, backend="aot_eager"), nn.Module.compile])
def test_a_compiled_model_may_be_converted_later(compile_it):
    model = dense()
    compiled = model if compile_it is nn.Module.compile else compile_it(model)
    if compiled is model:
        model.compile(backend="aot_eager")
    compiled(images())
    convert(compiled, percentile=None, where="everywhere")
    seen = []
    observers.append(seen.append)
    try:
        assert_as_dense(model, dense(), compiled)
    finally:
        observers.remove(seen.append)
    assert {stats.layer_id for stats in seen} == {model[0].layer_id, model[3].layer_id}
    revert(compiled)
    assert_as_dense(model, dense(), compiled)
    torch.compiler.reset()


def test_second_derivatives():
    """In training mode one clear error, in evaluation mode those of the dense model."""

    def hessian(module):
        return torch.autograd.functional.hessian(lambda x: module(x).square().sum(), images()[:1, :, :5, :5])

    with pytest.raises(RuntimeError, match="double backward through a sparse convolution"):
        hessian(convert(dense(), where="everywhere"))
    torch.testing.assert_close(hessian(convert(dense(), where="everywhere").eval()), hessian(dense().eval()))


def test_inference_mode():
    model = convert(dense(), where="everywhere")
    with torch.inference_mode():
        output = model(images())
    assert output.is_inference() and not output.requires_grad
    gradients(model)


# ---- torch.fx


class FeatureTracer(fx.Tracer):
    """As create_feature_extractor of torchvision: modules of torch.nn are leaves, and each node has the name of its."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[fx.Node, str] = {}

    def call_module(self, m, forward, args, kwargs):
        result = super().call_module(m, forward, args, kwargs)
        self.names[result.node] = self.path_of_module(m)
        return result


def extract(model: nn.Module, name: str) -> fx.GraphModule:
    tracer = FeatureTracer()
    graph = tracer.trace(model)
    found = next(node for node, called in tracer.names.items() if called == name)
    (output,) = (node for node in graph.nodes if node.op == "output")
    graph.erase_node(output)
    graph.output(found)
    module = fx.GraphModule(tracer.root, graph)
    graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    return module


@pytest.mark.filterwarnings("ignore:torch.fx traces")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["0", "2", "3"])
def test_feature_extraction(training, name):
    """By name of a layer, before or after conversion, and in either mode after it."""
    expected = extract(dense().train(training), name)
    sparse = extract(convert(dense(), percentile=None, where="everywhere").train(training), name)
    later = convert(extract(dense().train(training), name), percentile=None, where="everywhere")
    for module in (sparse, later):
        assert any(isinstance(layer, SparseConv2d) for layer in module.modules())
        assert_as_dense(module, expected)
        module.train(not training)
        module(images())
    assert [type(m) for m in revert(later).modules()][1:] == [type(m) for m in expected.modules()][1:]


def test_graph_modules_keep_placements():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    graph_module = convert(fx.symbolic_trace(model), where="everywhere")
    layers = [layer.placement for layer in graph_module.modules() if isinstance(layer, SparseConv2d)]
    assert layers == ["input", "output"]


# ---- FSDP2


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    gc.collect()  # freed after its group, DistributedDataParallel may wait for a thread that waits for the interpreter
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fully_sharded_data_parallel(mesh, use_orig_params):
    """FSDP1: without use_orig_params, the weights of layers are parts of one parameter."""
    wrapped = [
        FullyShardedDataParallel(dense(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        for _ in range(2)
    ]
    convert(wrapped[0], percentile=None, threshold="predicted", where="everywhere")
    assert isinstance(wrapped[0].module[0], SparseConv2d)
    assert_as_dense(*wrapped)
    revert(wrapped[0])
    assert type(wrapped[0].module[0]) is nn.Conv2d
    assert_as_dense(*wrapped)


@pytest.mark.parametrize("predicted", [True, False])
def test_conversion_after_data_parallel(mesh, predicted):
    model, wrapped = dense(), nn.parallel.DistributedDataParallel(dense())
    convert(wrapped, percentile=None, threshold="predicted" if predicted else "exact", where="everywhere")
    assert_as_dense(wrapped, model)
    assert_as_dense(revert(wrapped), model)


@pytest.mark.parametrize("before", [True, False])
def test_fully_sharded_layers(mesh, before):
    """Layers and the whole, sharded before or after conversion."""
    model, sharded = dense(), dense()
    if before:
        convert(sharded, percentile=None, where="everywhere")
    for module in (sharded[0], sharded[3], sharded):
        fully_shard(module, mesh=mesh)
    if not before:
        convert(sharded, percentile=None, where="everywhere")
    expected = gradients(model)
    for turn in range(2):
        assert isinstance(sharded[0], SparseConv2d) == (turn == 0)
        for actual, wanted in zip(gradients(sharded), expected, strict=True):
            actual = actual.full_tensor() if hasattr(actual, "full_tensor") else actual
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
        revert(sharded)
    assert type(sharded[0]).__name__ == "FSDPConv2d"


def test_bits_are_those_of_the_layer_alone(mesh):
    """Sharding changes nothing of what is pruned."""
    sharded, alone = convert(dense(), where="everywhere"), convert(dense(), where="everywhere")
    fully_shard(sharded, mesh=mesh)
    for actual, expected in zip(gradients(sharded), gradients(alone), strict=True):
        assert_bit_equal(actual.full_tensor() if hasattr(actual, "full_tensor") else actual, expected)
