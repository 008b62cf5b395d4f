# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures, and how: suites, tensors, times, devices."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from benching import PROBLEM, bench, rows_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsebwd import models, reference
from sparsebwd.bench import devices, operations, suites, timing
from sparsebwd.bench import inputs as inputs_module
from sparsebwd.bench.inputs import KEY, LAYOUTS, Gradient, Inputs, Rotation, skewed_densities
from sparsebwd.bench.timing import Call, interleave
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal

pytestmark = pytest.mark.usefixtures("small_bench")


# ---- suites


@pytest.mark.slow
@pytest.mark.parametrize("form", models.IMAGE_SIZE)
@pytest.mark.parametrize("name", models.names())
def test_suites_are_the_convolutions_of_the_models(name, form):
    layers = suites.load(f"{name}-{form}", batch=2)
    with torch.device("meta"):
        model = models.create(name, num_classes=10, form=form)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(layer.multiplicity for layer in layers) == len(convolutions)
    assert len({(layer.problem, layer.needs_grad_input) for layer in layers}) == len(layers)
    assert [layer.needs_grad_input for layer in layers].count(False) == 1 and not layers[0].needs_grad_input
    assert {layer.problem.n for layer in layers} == {2}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 3, models.IMAGE_SIZE[form], models.IMAGE_SIZE[form], device="meta"))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert sum(2 * layer.problem.macs * layer.multiplicity for layer in layers) == counted


def test_resnet18_by_hand():
    layers = suites.load("resnet18-cifar", batch=32)
    assert [(layer.name, str(layer.problem), layer.multiplicity) for layer in layers[:4]] == [
        ("stem.0", "n32c3h32w32k64r3s3u1p1d1g1", 1),
        ("stages.0.0.conv1", "n32c64h32w32k64r3s3u1p1d1g1", 4),
        ("stages.1.0.conv1", "n32c64h32w32k128r3s3u2p1d1g1", 1),
        ("stages.1.0.conv2", "n32c128h16w16k128r3s3u1p1d1g1", 3),
    ]
    assert len(layers) == 11


def test_imagenet_by_hand():
    def first(suite: str) -> list[str]:
        return [str(layer.problem) for layer in suites.load(suite, batch=32)[:2]]

    assert first("resnet50-imagenet") == ["n32c3h224w224k64r7s7u2p3d1g1", "n32c64h56w56k64r1s1u1p0d1g1"]
    assert first("alexnet-imagenet") == ["n32c3h224w224k64r11s11u4p2d1g1", "n32c64h27w27k192r5s5u1p2d1g1"]
    assert first("mobilenet-imagenet") == ["n32c3h224w224k32r3s3u2p1d1g1", "n32c32h112w112k32r3s3u1p1d1g32"]


def test_layers_are_selected_by_name(tmp_path):
    path = tmp_path / "rows.json"
    result = bench("--suite", "alexnet-cifar,resnet18-cifar", "--batch", "1", "--layer", "features.3,stem.0", "--op", "wgc",
                   "--density", "0.1", "--backend", "dense", "--memory", "1", "--json", path)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [(row["suite"], row["layer"]) for row in rows_of(path)] == [
        ("alexnet-cifar", "features.3"),
        ("resnet18-cifar", "stem.0"),
    ]
    assert "2 rows" in result.output


def test_kernel_size_selects_layers():
    whole = suites.load("resnet50-cifar", batch=4)
    some = suites.load("resnet50-cifar-1x1", batch=4)
    assert [layer.problem for layer in some] == [layer.problem for layer in whole if layer.problem.r == 1]
    assert {layer.suite for layer in some} == {"resnet50-cifar-1x1"}
    assert all(layer.needs_grad_input for layer in some)


def test_mobilenet_has_depthwise_layers():
    groups = {layer.problem.groups for layer in suites.load("mobilenet-cifar", batch=1)}
    assert groups == {1, 32, 64, 128, 256, 512, 1024}


# ---- tensors


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_rotate_over_enough_copies(layout):
    problem = ConvProblem.parse(PROBLEM)
    inputs = Inputs(problem, torch.float32, Gradient("iid", 0.5), Rotation(10_000))
    following = inputs.rotating(layout, ("grad_output", "weight"))
    drawn = [following() for _ in range(9)]
    gradient_bytes = 2 * 8 * 6 * 5 * 4
    assert len({operands.grad_output.data_ptr() for operands in drawn}) == -(-10_000 // gradient_bytes)
    assert len({operands.weight.data_ptr() for operands in drawn}) == -(-10_000 // (8 * 4 * 9 * 4))
    assert len({operands.input.data_ptr() for operands in drawn}) == 1
    assert drawn[0].grad_output.data_ptr() == drawn[6].grad_output.data_ptr()
    assert not drawn[0].grad_output.equal(drawn[1].grad_output)
    for operands in drawn:
        for tensor, size in zip(operands, (problem.output_size, problem.input_size, problem.weight_size)):
            assert tuple(tensor.shape) == size
            assert tensor.is_contiguous(memory_format=getattr(torch, layout.replace("contiguous", "contiguous_format")))


def test_layouts_hold_the_same_numbers():
    inputs = Inputs(ConvProblem.parse(PROBLEM), torch.bfloat16, Gradient("heavy-tailed"), Rotation(1))
    for one, other in zip(inputs.first("contiguous"), inputs.first("channels_last")):
        assert one.equal(other) and one.dtype == torch.bfloat16


@pytest.mark.parametrize("pattern", ["iid", "skewed", "rows"])
def test_density_of_inputs(pattern):
    problem = ConvProblem.parse("n16c1h32w32k16r1s1")
    for density in (0.0, 0.1, 1.0):
        inputs = Inputs(problem, torch.float32, Gradient(pattern, density), Rotation(2**21))
        gradient = inputs.first("contiguous").grad_output
        # 262144 draws: five standard deviations are 0.003
        assert gradient.count_nonzero().item() / gradient.numel() == pytest.approx(density, abs=0.003)
        following = inputs.rotating("contiguous", ("grad_output",))
        counted = sum(following().grad_output.count_nonzero().item() for _ in range(2)) / (2 * gradient.numel())
        assert inputs.density("channels_last") == pytest.approx(counted)


def test_heavy_tailed_gradients_prune_as_those_of_training():
    problem = ConvProblem.parse("n16c1h32w32k16r1s1")
    layer = suites.Layer(None, "", problem)
    case = operations.Case(layer, torch.float32, "contiguous", "dense", "heavy-tailed", percentile=90)
    operation = operations.Prune()
    inputs = Inputs(problem, torch.float32, case.gradient(operation), Rotation(1))
    assert inputs.first("contiguous").grad_output.count_nonzero() == 16 * 32 * 32 * 16
    assert operation.density(case, inputs) == pytest.approx(0.31, abs=0.01)


def test_skewed_densities_differ_between_images_and_channels(generator):
    for density in (0.01, 0.1, 0.35, 0.9):
        densities = skewed_densities(3, 32, 64, density, generator)
        assert torch.allclose(densities.mean((1, 2)), torch.tensor(density))
        assert 0 < densities.min() < density / 2 and density < densities.max() < 1
        log_odds = densities.double().logit()
        images, channels = log_odds.mean(2), log_odds.mean(1)
        # Standard deviation 1 of 96 and of 192 draws; rows and columns add up without interaction.
        assert 0.7 < (images - images.mean(1, keepdim=True)).std() < 1.3
        assert 0.8 < (channels - channels.mean(1, keepdim=True)).std() < 1.2
        rest = log_odds - images[:, :, None] - channels[:, None] + log_odds.mean((1, 2), keepdim=True)
        assert rest.abs().max() < 1e-3


def test_captured_gradients_rotate_with_their_images_in_another_order(generator):
    problem = ConvProblem.parse("n3c2h4w4k2r3s3u1p1d1g1")
    captured = torch.randn(problem.output_size, generator=generator)
    inputs = Inputs(problem, torch.float32, Gradient("captured", captured=captured), Rotation(5 * captured.nbytes))
    following = inputs.rotating("channels_last", ("grad_output",))
    copies = [following().grad_output for _ in range(5)]
    assert copies[0].equal(captured) and copies[3].equal(captured)
    for copy in copies[1:3]:
        assert not copy.equal(captured)
        assert copy[copy[:, 0, 0, 0].argsort()].equal(captured[captured[:, 0, 0, 0].argsort()])
    pruned = Inputs(problem, torch.float32, Gradient("captured", captured=captured, percentile=90.0), Rotation(1))
    expected = reference.prune(captured, KEY, Pruning()).values
    assert pruned.first("contiguous").grad_output.equal(expected)


def test_copies_of_one_side_are_far_from_those_of_the_other():
    inputs = Inputs(ConvProblem.parse(PROBLEM), torch.float32, Gradient("iid", 0.5), Rotation(10_000))
    one, other = (inputs.rotating("contiguous", ("grad_output",), from_middle) for from_middle in (False, True))
    pointers = [(one().grad_output.data_ptr(), other().grad_output.data_ptr()) for _ in range(6)]
    assert len({pointer for pair in pointers for pointer in pair}) == 6
    assert [second for _, second in pointers] == [first for first, _ in pointers[3:] + pointers[:3]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_pruned_in_parts(monkeypatch, generator, layout):
    gradient = torch.randn(5, 3, 4, 5, generator=generator).contiguous(memory_format=LAYOUTS[layout])
    tau = torch.tensor(1.5)
    whole = reference.prune_at(gradient, KEY, tau)
    monkeypatch.setattr(inputs_module, "_BLOCK", 2 * 3 * 4 * 5)
    parts = inputs_module.pruned_at(gradient, tau)
    assert_bit_equal(parts, whole)
    assert parts.stride() == whole.stride()


def test_interleaving():
    order = []

    def call(name: str) -> Call:
        arguments = iter(range(100))
        return Call(lambda argument: order.append(name + str(argument)), lambda: next(arguments))

    times = interleave({"a": call("a"), "b": call("b")}, repeats=2, warmup=1)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert all(seconds > 0 and spread >= 0 for seconds, spread in times.values())


class FakeEvent:
    """On the device of :func:`fake_cuda`."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def record(self) -> None:
        self.time = self._clock[0]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.time - self.time)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A clock in seconds, which stands for what has run on a device that spins 10^9 cycles a second, and the spins."""
    clock, spins = [0.0], []

    def sleep(cycles: int) -> None:
        spins.append(cycles)
        clock[0] += cycles / 1e9

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    timing._spin_rate.cache_clear()
    yield clock, spins
    timing._spin_rate.cache_clear()


def test_samples_of_a_gpu(fake_cuda):
    """Short calls come in bursts; what one takes is the time between events, without that of the spinning before."""
    clock, spins = fake_cuda
    made = []

    def call(seconds: float) -> Call:
        def function(argument: int) -> None:
            made.append(argument)
            clock[0] += seconds

        numbers = iter(range(1000))
        return Call(function, lambda: next(numbers))

    for seconds, burst in ((3e-3, 1), (45e-6, 5), (1e-6, 16)):
        sample, timed = timing.sample_on_cuda(), call(seconds)
        assert sample(timed) == pytest.approx(seconds)
        made.clear()
        spins.clear()
        assert [sample(timed) for _ in range(3)] == pytest.approx([seconds] * 3)
        assert made == list(range(made[0], made[0] + 3 * burst))  # each call gets the next argument
        assert len(spins) == 3 and min(spins) > 0


def test_description_of_a_gpu(monkeypatch):
    found = SimpleNamespace(name="some GPU", major=9, minor=0, total_memory=2**36, multi_processor_count=132, uuid="ab-cd",
                            shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {3: found}.__getitem__)
    asked = []

    def answer(text: str):
        def run(command, **_):
            asked.append(command)
            return SimpleNamespace(stdout=text)

        monkeypatch.setattr(devices.subprocess, "run", run)
        return devices.Cuda().describe()["gpu"]

    gpu = answer("580.1, 1980, 1980, 2619, 41, 300.5, 700\n")
    assert (gpu["capability"], gpu["shared_bytes"], gpu["l2_bytes"]) == ("9.0", 132 * 233472, 50 * 2**20)
    assert (gpu["driver"], gpu["sm_mhz"], gpu["watts"]) == ("580.1", "1980", "300.5")
    assert asked[0][0] == "nvidia-smi" and "--id=GPU-ab-cd" in asked[0]
    assert not {word for word in asked[0] if re.match(r"-(r|pm|pl|ac|lgc|c|mig)\b|--(gpu-reset|lock)", word)}
    assert devices.Cuda().cache_bytes == 50 * 2**20
    json.dumps(gpu)
    # Without an answer the rest is there.
    for text in ("", "N/A\n"):
        gpu = answer(text)
        assert gpu["name"] == "some GPU" and "driver" not in gpu


