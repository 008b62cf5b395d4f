# SPDX-License-Identifier: Apache-2.0
"""However a layer that predicts its threshold comes by its parameters, it begins as a freshly built one, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sparsebwd import SparseConv2d, convert, revert
from sparsebwd.testing import assert_bit_equal, poisoned_memory


def layer(device=None, **settings) -> SparseConv2d:
    return SparseConv2d(4, 6, 3, device=device, threshold="predicted", **settings)


def used() -> SparseConv2d:
    module = layer()
    step(module, scale=100)
    return module


def step(module: nn.Module, scale: float = 1.0) -> None:
    (module(torch.randn(2, 4, 9, 8)).square().sum() * scale).backward()


def gradients(module: nn.Module) -> list[torch.Tensor]:
    """Of three steps, which become larger."""
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        module.zero_grad()
        step(module, 10.0**seed)
        results += [parameter.grad for parameter in module.parameters()]
    return results


def materialised(module: nn.Module, state: dict) -> nn.Module:
    with poisoned_memory():
        module.to_empty(device="cpu")
    with torch.no_grad():  # as the broadcast of parameters does, without load_state_dict
        for name, parameter in module.named_parameters():
            parameter.copy_(state[name])
    return module


def assigned(module: nn.Module, state: dict, assign: bool = True) -> nn.Module:
    module.load_state_dict(state, assign=assign)
    return module


def parameters_set(module: nn.Module, state: dict) -> nn.Module:
    module.weight, module.bias = (nn.Parameter(state[name].clone()) for name in ("weight", "bias"))
    return module


def loaded_on_cpu(module: nn.Module, state: dict) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return assigned(torch.load(file, map_location="cpu", weights_only=False), state)


def under_parent(module: nn.Module, state: dict) -> nn.Module:
    materialised(nn.Sequential(nn.Sequential(module)), {f"0.0.{name}": value for name, value in state.items()})
    return module


ROUTES = {
    "to_empty": lambda state: materialised(layer("meta"), state),
    "to_empty of a parent": lambda state: under_parent(layer("meta"), state),
    "to_empty of a used layer": lambda state: materialised(used(), state),
    "to_empty after meta": lambda state: materialised(used().to("meta"), state),
    "to_empty, not recursive": lambda state: materialised(layer("meta").to_empty(device="meta", recurse=False), state),
    "assign": lambda state: assigned(layer("meta"), state),
    "assign to a used layer": lambda state: assigned(used(), state),
    "assign to a used layer that was moved to meta": lambda state: assigned(used().to("meta"), state),
    "assign to a parent": lambda state: assigned(
        nn.Sequential(layer("meta")), {f"0.{name}": value for name, value in state.items()}
    ),
    "parameters set": lambda state: parameters_set(layer("meta"), state),
    "a copy": lambda state: assigned(copy.deepcopy(layer("meta")), state),
    "a copy, later": lambda state: parameters_set(copy.deepcopy(layer("meta")), state),
    "pickled": lambda state: materialised(pickle.loads(pickle.dumps(layer("meta"))), state),
    "saved": lambda state: loaded_on_cpu(layer("meta"), state),
    "loaded into a used layer": lambda state: assigned(used(), state, assign=False),
    "threshold set on meta": lambda state: assigned(
        convert(SparseConv2d(4, 6, 3, device="meta"), threshold="predicted", where="everywhere"), state
    ),
    "converted on meta": lambda state: materialised(convert(nn.Conv2d(4, 6, 3, device="meta"), threshold="predicted", where="everywhere"), state),
    "reverted between": lambda state: convert(
        assigned(revert(layer("meta")), state), threshold="predicted"
    , where="everywhere"),
    "skip_init": lambda state: materialised(
        nn.utils.skip_init(SparseConv2d, 4, 6, 3, threshold="predicted"), state
    ),
    "to_conv2d": lambda state: SparseConv2d.from_conv2d(assigned(layer("meta"), state).to_conv2d(), threshold="predicted"),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
def test_parameters_come_with_an_empty_history(route):
    fresh = layer()
    state = copy.deepcopy(fresh.state_dict())
    module = route(state)
    for actual, expected in zip(gradients(module), gradients(fresh), strict=True):
        assert_bit_equal(actual, expected)
    history = next(module.buffers())
    assert torch.equal(history, fresh.sigma_history) and history[0] == 3
    assert list(module.state_dict()) == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to("cpu"),
        lambda module: module.share_memory(),
        lambda module: module.type(torch.float32),
        lambda module: module.type(torch.float16).float(),
        lambda module: module.double().bfloat16().float(),
        lambda module: module.requires_grad_(True),
        lambda module: module.to(memory_format=torch.channels_last),
        copy.deepcopy,
    ],
)
def test_what_only_moves_a_layer_keeps_its_history(move):
    module = used()
    before = module.sigma_history.clone()
    after = move(module).sigma_history
    assert after.dtype == torch.int32 and torch.equal(after, before) and before[0] == 1


def test_shared_memory_is_that_of_the_layer():
    module = used().share_memory()
    assert module.sigma_history.is_shared()
    other = pickle.loads(pickle.dumps(module))
    step(module)
    assert module.sigma_history[0] == 2 and other.sigma_history[0] == 1


@pytest.mark.parametrize("setting", [assigned, parameters_set])
def test_compiled_layers(setting):
    """What is new is made before they run, not in compiled code, which could not return it and change it."""
    fresh = layer()
    module = setting(layer("meta"), copy.deepcopy(fresh.state_dict()))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    (compiled(torch.randn(2, 4, 9, 8)).square().sum()).backward()
    assert module.sigma_history.device.type == "cpu" and module.sigma_history[0] == 1
    torch.compiler.reset()


def test_shapes_alone_cost_no_history():
    module = used()
    meta = {name: parameter.detach().to("meta").requires_grad_() for name, parameter in module.named_parameters()}
    torch.func.functional_call(module, meta, (torch.empty(2, 4, 9, 8, device="meta"),)).sum().backward()
    assert module.sigma_history[0] == 1 and module.sigma_history.device.type == "cpu"


def test_reset_after_a_load_happens_in_place():
    """As a captured CUDA graph holds its address."""
    module = used()
    history = module.sigma_history
    module.load_state_dict(layer().state_dict())
    assert module.sigma_history is history and history[0] == 0


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fully_shard(one_process):
    """FSDP2: on meta, sharded, then materialised; each of its ways to get parameters."""
    fresh = layer()
    state = copy.deepcopy(fresh.state_dict())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(layer("meta"), mesh=mesh)
    with poisoned_memory():
        sharded.to_empty(device="cpu")
    set_model_state_dict(sharded, state, options=StateDictOptions(full_state_dict=True))
    for actual, expected in zip(gradients(sharded), gradients(fresh), strict=True):
        assert_bit_equal(actual.full_tensor(), expected)
    assert torch.equal(sharded.sigma_history, fresh.sigma_history)
    revert(sharded)
    assert not isinstance(sharded, SparseConv2d) and not hasattr(sharded, "sigma_history")
    step(convert(sharded, threshold="predicted", where="everywhere"))
    assert sharded.sigma_history[0] == 1


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fully_sharded_data_parallel(one_process):
    """FSDP1 materialises by to_empty() and reset_parameters()."""
    with poisoned_memory():
        module = FullyShardedDataParallel(nn.Sequential(layer("meta")), device_id=torch.device("cpu"))
        history = module.module[0].sigma_history
        assert history.device.type == "cpu" and not history.any()
    step(module)
    assert history[0] == 1


def test_a_history_begun_in_inference_mode_can_be_written():
    layer = SparseConv2d(3, 4, 3)
    with torch.inference_mode():
        layer.threshold = "predicted"
    layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert int(layer.sigma_history[0]) == 1
