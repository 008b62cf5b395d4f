# SPDX-License-Identifier: Apache-2.0
"""Steps of training on a real device: streams, graphs and devices, whole networks, the benchmark."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from on_gpu import BACKEND, DEVICE, LAYER, PLAIN, backward, dtype_fixture, key_of, operands_of, strict_math  # noqa: F401
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsebwd
from sparsebwd import DensityMonitor, SparseConv2d, models, reference
from sparsebwd.bench import cli, environment, terminal
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, poisoned_memory, random_tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_math")]


# ---- streams, graphs, devices


def test_captured_graphs_take_their_key_from_the_device(dtype, memory_format, generator):
    problem, operands = operands_of(LAYER, generator, dtype, memory_format)
    keys = [key_of(1, 2), key_of(3, 4), key_of(5, 6)]
    expected = [backward(problem, operands, key) for key in keys]
    static = keys[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward(problem, operands, static)  # loads code
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = backward(problem, operands, static)
    for key, wanted in [*zip(keys, expected), (keys[0], expected[0])]:
        static.copy_(key)
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for actual, eager in zip(results, wanted):
            assert_bit_equal(actual, eager, "replayed")
    assert not torch.equal(expected[0][1], expected[1][1])


def test_captured_graphs_predict(generator):
    problem, operands = operands_of(LAYER, generator)
    histories = [torch.zeros(1 + reference.SIGMA_HISTORY, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    key = key_of(1, 2)
    backward(problem, operands, key, history=histories[0].clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = backward(problem, operands, key, history=histories[0])
    for step in range(1, 7):
        operands[2].mul_(1.5)
        graph.replay()
        for actual, eager in zip(results, backward(problem, operands, key, history=histories[1])):
            assert_bit_equal(actual, eager, f"step {step}")
        assert torch.equal(*histories) and histories[0][0] == step


@pytest.mark.smoke
@pytest.mark.parametrize("threshold", ["exact", "predicted"])
def test_layers_can_be_captured(threshold, memory_format):
    layer = SparseConv2d(32, 48, 3, padding=1, backend=BACKEND, threshold=threshold).to(DEVICE, memory_format=memory_format)
    x = torch.randn(4, 32, 12, 12, device=DEVICE).contiguous(memory_format=memory_format).requires_grad_()
    grad_output = torch.randn(4, 48, 12, 12, device=DEVICE).contiguous(memory_format=memory_format)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, layer.weight), grad_output)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([gradient.clone() for gradient in gradients])
    # The generator moves on with each replay.
    assert not any(torch.equal(one, two) for one, two in zip(*replays))
    assert all(gradient.isfinite().all() and gradient.any() for gradients in replays for gradient in gradients)
@pytest.mark.smoke
def test_work_is_on_the_current_stream(generator):
    problem, operands = operands_of(LAYER, generator)
    key = key_of(1, 2)  # to copy it to the device is to wait for it
    expected = backward(problem, operands, key)
    late = [torch.zeros_like(operand) for operand in operands]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward(problem, late, key)  # the stream has memory now
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for target, operand in zip(late, operands):
            target.copy_(operand)
        results = backward(problem, late, key)
    assert not stream.query(), "something waited for the device"
    stream.synchronize()
    for actual, wanted in zip(results, expected):
        assert_bit_equal(actual, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second device")
def test_another_device_than_the_current_one(generator):
    problem, operands = operands_of(LAYER, generator)
    expected = backward(problem, operands)
    results = backward(problem, [operand.to("cuda:1") for operand in operands], key_of(1, 2).to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(results, expected):
        assert actual.device == torch.device("cuda:1")
        assert_bit_equal(actual.to("cuda:0"), wanted)


def test_memory_is_that_of_pytorchs_allocator(generator):
    cases = [operands_of(text, generator) for text in (LAYER, PLAIN, "n32c128h28w28k128r3s3p1", "n8c64h9w9k48r1s1")]
    for case in cases:
        backward(*case)
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    allocated = torch.cuda.memory_allocated()
    for _ in range(10):
        for case in cases:
            backward(*case)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] == torch.cuda.memory_reserved() - reserved
    assert torch.cuda.memory_allocated() == allocated


# ---- training


def small_resnet(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = models.create("resnet18", num_classes=10, form="cifar").to(DEVICE, memory_format=torch.channels_last)
    return sparsebwd.convert(model, percentile=90, **settings, where="everywhere").train()


class Run:
    """Training steps on the same images. loss: of the last one, on the device."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        images = random_tensor((16, 3, 32, 32), generator=generator, memory_format=torch.channels_last)
        self.images = images.to(DEVICE)
        self.labels = torch.randint(10, (16,), generator=generator).to(DEVICE)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss = F.cross_entropy(self.model(self.images), self.labels)
        self.loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("backend", [BACKEND, "auto"])
@pytest.mark.parametrize("threshold", ["exact", "predicted"])
def test_training_steps_do_not_wait_for_the_device(backend, threshold):
    run = Run(small_resnet(backend=backend, threshold=threshold))
    for _ in range(3):
        run.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.loss.isfinite()


@pytest.mark.parametrize("backend", [BACKEND, "auto"])
@pytest.mark.parametrize("threshold", ["exact", "predicted"])
def test_training_learns_and_repeats(backend, threshold):
    def losses() -> list[float]:
        run = Run(small_resnet(backend=backend, threshold=threshold))
        torch.manual_seed(2)
        found = []
        with DensityMonitor(run.model) as monitor:
            for _ in range(8):
                run.step()
                found.append(run.loss.item())
        assert 0 < monitor.as_dict()["total"]["density"] < 0.8
        if threshold == "predicted":
            counts = {m.sigma_history[0].item() for m in run.model.modules() if isinstance(m, SparseConv2d)}
            assert counts == {8}
        return found

    with poisoned_memory():
        first = losses()
        assert first[-1] < first[0]
        # What is remembered of a layer is of that layer only: a second run of the same begins as the first did.
        assert losses() == first


def test_gradients_of_a_model_are_those_of_dense_where_nothing_is_pruned():
    dense, sparse = (Run(small_resnet()) for _ in range(2))
    sparsebwd.revert(dense.model)
    for module in sparse.model.modules():
        if isinstance(module, SparseConv2d):
            module.percentile, module.backend = None, BACKEND
    for run in (dense, sparse):
        run.step()
    for (name, one), two in zip(sparse.model.named_parameters(), dense.model.parameters()):
        difference = (one.grad - two.grad).norm() / two.grad.norm()
        assert difference < 1e-3, name


def test_grad_scaler_skips_a_step_with_an_infinite_gradient():
    layer = SparseConv2d(16, 32, 3, padding=1, backend=BACKEND).to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x = torch.randn(4, 16, 10, 10, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def step(poison: float | None) -> Tensor:
        """The weight before and after."""
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            output = layer(x)
        assert output.dtype == torch.float16

        def inject(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[2, 7, 3, 5] = poison
            return gradient

        if poison is not None:
            output.register_hook(inject)
        scaler.scale(output.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        return before

    assert not torch.equal(step(None), layer.weight) and scaler.get_scale() == 1024
    for poison, scale in ((float("inf"), 512), (float("nan"), 256)):
        assert torch.equal(step(poison), layer.weight) and scaler.get_scale() == scale
    assert not torch.equal(step(None), layer.weight) and scaler.get_scale() == 256


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low, memory_format):
    layer = SparseConv2d(32, 48, 3, padding=1, percentile=None, backend=BACKEND).to(DEVICE, memory_format=memory_format)
    conv = copy.deepcopy(layer).to_conv2d()
    x = torch.randn(4, 32, 12, 12, device=DEVICE).contiguous(memory_format=memory_format)
    grad_output = torch.randn(4, 48, 12, 12, device=DEVICE)
    found = []
    for module in (layer, conv):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", low):
            output = module(leaf)
        found.append([output, *torch.autograd.grad(output, (leaf, module.weight), grad_output.to(low))])
    assert found[0][0].dtype == low
    operands = [t.detach().to(low).double().requires_grad_() for t in (x, layer.weight)]
    expected = torch.autograd.grad(F.conv2d(*operands, padding=1), operands, grad_output.to(low).double())
    for got, wanted, dense in zip(found[0][1:], expected, found[1][1:]):
        assert got.dtype == torch.float32
        assert_error_bounded(got.to(low), wanted, dense.to(low))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_layers_give_the_same_gradients(compiler):
    if compiler == "inductor" and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor needs Triton")
    layer = SparseConv2d(16, 24, 3, padding=1, backend=BACKEND).to(DEVICE, memory_format=torch.channels_last)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(lambda x: F.relu(twin(x)) * 2, fullgraph=True, backend=compiler)
    x = torch.randn(4, 16, 10, 10, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def gradients(function, module) -> list[Tensor]:
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        return list(torch.autograd.grad(function(leaf).square().sum(), (leaf, module.weight)))

    wanted = gradients(lambda x: F.relu(layer(x)) * 2, layer)
    for actual, expected in zip(gradients(compiled, twin), wanted):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# ---- the benchmark


def test_benchmark(tmp_path, monkeypatch):
    """On a device, with all that it measures there. How long anything takes is not looked at."""
    monkeypatch.setattr(environment, "PRODUCT_CUDA", 512)
    monkeypatch.setattr(environment, "COPIED_CUDA", 2**22)
    monkeypatch.setattr(terminal, "keep_freed_memory", lambda: "as is")
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(cli.app, [
        "--device", DEVICE, "--problem", LAYER, "--op", "prune,prune-predicted,agb,wgc,agb+wgc,backward,backward-predicted",
        "--density", "0.3,0.01", "--dtype", "float32,bfloat16,float16", "--math", "strict,tf32", "--layout",
        "channels_last,contiguous", "--backend", f"{BACKEND},auto", "--repeats", "3", "--json", str(path),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(path.read_text())
    assert all(row["sparse_ms"] > 0 and row["dense_ms"] > 0 and row["error"] is None for row in record["rows"])
    gpu = record["environment"]["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name() and gpu["l2_bytes"] > 2**20 and gpu["shared_bytes"] > 2**20
