# SPDX-License-Identifier: Apache-2.0
"""The cuda backend on the emulated kernels (emulated_backend.py): convolutions, pruning, whole layers, layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulated_backend import (
    ALIGNED,
    DTYPES,
    FORMATS,
    KEY,
    SPARSE,
    STRIDED,
    emulated,  # noqa: F401  a fixture
    geometry_of,
    layer_backward,
    needs_compiler,
    operands_of,
    raw_arguments,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems
from test_parity import GRID

from sparsebwd import SparseConv2d, backends, grad, importance, prune_gradient, reference
from sparsebwd.backends import cuda
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor

pytestmark = [pytest.mark.emulated, needs_compiler, pytest.mark.usefixtures("emulated")]


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


# ---- the two convolutions


def _check_results(problem, operands, results):
    """The gradients of the input and of the weight against float64, with the error of dense kernels as the measure."""
    input, weight, grad_output = operands
    wanted = reference.conv2d_input(problem, weight, grad_output), reference.conv2d_weight(problem, input, grad_output)
    agb, wgc = convolution_backward(problem, grad_output, input, weight, (True, True))
    for name, *each in zip(("AGB", "WGC"), results, wanted, (agb, wgc)):
        assert_error_bounded(*each, f"{name} of {problem}")


def _check_errors(text, dtype, memory_format, generator):
    problem = ConvProblem.parse(text)
    input, weight, grad_output = operands = operands_of(problem, generator, dtype, memory_format)
    with poisoned_memory():
        alone = (
            grad.conv2d_input(problem.input_size, weight, grad_output, *geometry_of(problem), backend="emulated"),
            grad.conv2d_weight(input, problem.weight_size, grad_output, *geometry_of(problem), backend="emulated"),
        )
    _check_results(problem, operands, alone)
    for one, two in zip(alone, layer_backward(problem, operands)):
        assert_bit_equal(one, two, str(problem))


@pytest.mark.parametrize("text, memory_format", [*zip(GRID, itertools.cycle(FORMATS))])
def test_error_is_at_most_twice_that_of_dense(text, memory_format, generator):
    _check_errors(text, torch.float32, memory_format, generator)


@pytest.mark.parametrize("text", [GRID[0], GRID[8], GRID[10]])
@pytest.mark.parametrize("half", DTYPES[1:], ids=["bf16", "f16"])
def test_error_in_16_bits(text, half, memory_format, generator):
    _check_errors(text, half, memory_format, generator)


@settings(max_examples=30)
@given(
    problem=problems(max_channels=12),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from(FORMATS),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_integers_are_exact_for_any_geometry(problem, dtype, memory_format, density, seed):
    generator = torch.Generator().manual_seed(seed)
    input, weight, grad_output = operands = operands_of(problem, generator, dtype, memory_format, density, integer=True)
    grad_input, grad_weight, _ = layer_backward(problem, operands)
    # Also straight to the kernels: the backend leaves to dense ones what the sparse kernels refuse, and nothing to plain.cu.
    raw = [torch.full_like(tensor, torch.nan) for tensor in (input, weight)]
    torch.ops.sparsebwd_emulated.conv2d_backward(
        *raw_arguments(problem, grad_output, input=input, weight=weight, grad_input=raw[0], grad_weight=raw[1])
    )
    wanted = reference.conv2d_input(problem, weight, grad_output), reference.conv2d_weight(problem, input, grad_output)
    for name, *both, exact in zip(("AGB", "WGC"), (grad_input, grad_weight), raw, wanted):
        for actual in both:
            assert_bit_equal(actual + 0, exact.to(dtype) + 0, f"{name} of {problem}")


def test_weights_of_any_strides(generator):
    problem = ConvProblem.parse(SPARSE)
    input, weight, grad_output = operands_of(problem, generator, integer=True)
    exact = reference.conv2d_input(problem, weight, grad_output).float()
    operators = torch.ops.sparsebwd_emulated
    for same in (weight, weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        result = torch.full(problem.input_size, torch.nan)
        operators.conv2d_backward(*raw_arguments(problem, grad_output, weight=same, grad_input=result))
        assert_bit_equal(result + 0, exact + 0)


# ---- pruning

SHAPES = [(2, 3, 5, 7), (1, 1, 1, 1), (2, 64, 8, 8), (2, 30, 7, 9), (0, 4, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pruned_bits_are_those_of_the_reference(shape, dtype, memory_format, generator):
    gradient = fenced(random_tensor(shape, generator=generator, dtype=dtype, memory_format=memory_format, density=0.9))
    key = torch.tensor([2**62 + 5, -7])
    with poisoned_memory():
        pruned = torch.ops.sparsebwd.prune(gradient, key, "backend=emulated", None)
    values, tau, sigma, density = pruned
    expected = reference.prune(gradient, key, Pruning())
    # The float64 sum may be taken in any order: equal but for a rounding to float32 at a tie.
    torch.testing.assert_close(sigma, expected.sigma, rtol=2**-23, atol=0)
    assert_bit_equal(tau, (sigma.double() * reference.quantile(90)).float().to(dtype).float(), "tau")
    assert_bit_equal(values, reference.prune_at(gradient, key, tau), "values")
    assert_bit_equal(density, reference.density(values), "density")
    assert values.is_contiguous(memory_format=reference.memory_format(gradient))


def test_pruning_is_that_of_the_cpu_backend(memory_format, generator):
    gradient = random_tensor((2, 24, 9, 7), generator=generator, memory_format=memory_format)
    results = [
        prune_gradient(gradient, 95, torch.Generator().manual_seed(1), sigma_estimator="as_printed", backend=name)
        for name in ("cpu", "emulated")
    ]
    for name, one, two in zip(results[0]._fields, *results):
        assert_bit_equal(one, two, name)


def test_gradient_that_is_not_finite_is_passed_on(dtype, generator):
    gradient = random_tensor((1, 8, 4, 4), generator=generator, dtype=dtype)
    gradient[0, 3, 2, 1] = torch.inf
    pruned = prune_gradient(gradient, backend="emulated")
    assert_bit_equal(pruned.values, gradient)
    assert pruned.tau == 0


# ---- whole layers


@pytest.mark.parametrize("text", [SPARSE, STRIDED])
@pytest.mark.parametrize("placement, percentile", [("output", 90.0), ("output", None), ("input", 90.0)])
def test_layer_backward(text, placement, percentile, dtype, memory_format, generator, stats):
    problem = ConvProblem.parse(text)
    input, weight, grad_output = operands = operands_of(problem, generator, dtype, memory_format, density=1.0)
    grad_input, grad_weight, grad_bias = layer_backward(problem, operands, percentile, placement, (True, True, True))
    (said,) = stats
    consumed = grad_output
    if percentile and placement == "output":
        consumed = reference.prune_at(grad_output, KEY, said.tau)
        torch.testing.assert_close(said.sigma, reference.prune(grad_output, KEY, Pruning(percentile)).sigma)
    assert_bit_equal(said.density, reference.density(consumed), "density")
    assert (said.backend, said.implementation) == ("emulated", "emulated" if text == SPARSE else "dense")
    assert (said.tau is None) == (percentile is None)

    unpruned = layer_backward(problem, (input, weight, consumed))
    _check_results(problem, (input, weight, consumed), unpruned[:2])
    if placement == "input":
        assert_bit_equal(grad_input, reference.prune_at(unpruned[0], KEY, said.tau), "pruned gradient of the input")
    else:
        assert_bit_equal(grad_input, unpruned[0], "gradient of the input")
    assert_bit_equal(grad_weight, unpruned[1], "gradient of the weight")
    torch.testing.assert_close(grad_bias, grad_output.sum((0, 2, 3)))
    assert grad_input.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False)])
def test_output_mask(mask, placement, generator):
    problem = ConvProblem.parse(SPARSE)
    operands = operands_of(problem, generator)
    everything = layer_backward(problem, operands, 90.0, placement)
    for result, same, wanted in zip(layer_backward(problem, operands, 90.0, placement, mask), everything, mask):
        assert_bit_equal(result, same if wanted else result.new_empty(0))


@pytest.mark.parametrize("placement", ["output", "input"])
def test_predicted_threshold_is_that_of_the_reference(placement, generator, stats):
    problem = ConvProblem.parse(SPARSE)
    histories = {name: torch.zeros(5, dtype=torch.int32) for name in ("reference", "emulated")}
    for _ in range(6):
        operands = operands_of(problem, generator, integer=True)
        for name, history in histories.items():
            layer_backward(problem, operands, 90.0, placement, backend=name, sigma_history=history)
        oracle, found = stats[-2:]
        torch.testing.assert_close(found.tau, oracle.tau, rtol=2**-23, atol=0)
        torch.testing.assert_close(found.sigma, oracle.sigma, rtol=2**-23, atol=0)
    assert [int(history[0]) for history in histories.values()] == [6, 6]
    recorded = (history[1:].view(torch.float32) for history in histories.values())
    torch.testing.assert_close(*recorded, rtol=2**-23, atol=0)


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize(
    "settings",
    [{"density": 0.2}, {"density": 0.9}, {"variance": 0.5}, {"percentile": 95, "threshold": "sampled"}],
    ids=str,
)
def test_threshold_that_the_kernels_do_not_find(settings, placement, dtype, generator, stats):
    """It is found on the device, and given to them as a prediction; 0 where nothing is pruned."""
    grad = random_tensor((2, 16, 6, 5), generator=generator, dtype=dtype, density=0.8)
    weight = torch.eye(16, dtype=dtype).view(16, 16, 1, 1)
    pruning = Pruning(placement=placement, backend="emulated", **settings)
    x, key = torch.ones_like(grad), torch.tensor([5, -7])
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    grad_input, *_ = torch.ops.sparsebwd.conv2d_backward(
        grad, x, weight, *geometry, key, pruning.text, 0, (True, False, False)
    )
    expected = reference.prune(grad, key, pruning)
    assert_bit_equal(grad_input + 0, expected.values + 0)
    assert_bit_equal(stats[-1].tau, expected.tau)
    assert (expected.tau == 0) == (settings == {"density": 0.9})
    result = torch.ops.sparsebwd.prune(grad, key, pruning.text)
    assert_bit_equal(result[0] + 0, expected.values + 0)
    assert_bit_equal(result[1], expected.tau)


@pytest.mark.parametrize(
    "settings",
    [{}, {"threshold": "predicted"}, {"density": 0.2}, {"density": 0.9}, {"percentile": 95, "threshold": "sampled"}],
    ids=str,
)
def test_images_with_thresholds_of_their_own(settings, dtype, memory_format, generator, stats):
    grad = random_tensor((5, 16, 6, 5), generator=generator, dtype=dtype, density=0.8, memory_format=memory_format)
    x = grad * torch.exp(torch.randn((5, 1, 1, 1), generator=generator)).to(dtype)
    weight = torch.eye(16, dtype=dtype).view(16, 16, 1, 1)
    pruning = Pruning(importance="image", backend="emulated", **settings)
    histories = [None, None]
    if pruning.state_size:
        histories = [torch.tensor([1, torch.tensor(0.7).view(torch.int32), 0, 0, 0], dtype=torch.int32) for _ in range(2)]
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    grad_input, *_ = torch.ops.sparsebwd.conv2d_backward(
        grad, x, weight, *geometry, KEY, pruning.text, 0, (True, False, False), histories[0]
    )
    expected = reference.prune(grad, KEY, pruning, histories[1], importance.scales(x, pruning))
    assert_bit_equal(stats[-1].tau, expected.tau)
    assert_bit_equal(grad_input + 0, expected.values + 0)
    assert (expected.tau == 0) == (settings == {"density": 0.9})


def test_training_step_of_a_layer(memory_format):
    torch.manual_seed(0)
    layer = SparseConv2d(16, 24, 3, padding=1, percentile=80, backend="emulated").to(memory_format=memory_format)
    input = torch.randn(2, 16, 6, 7).to(memory_format=memory_format).requires_grad_()
    results = []
    for backend in ("emulated", "cpu"):
        torch.manual_seed(1)
        layer.backend = backend
        results.append(torch.autograd.grad(layer(input).square().sum(), [input, *layer.parameters()]))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two)


# ---- layouts


class _Spy:
    """The raw operators, and the activations that they got."""

    def __init__(self):
        self.refusals = torch.ops.sparsebwd_emulated.refusals
        self.prune = torch.ops.sparsebwd_emulated.prune
        self.activations = None

    def refusal(self, *sizes):
        return torch.ops.sparsebwd_emulated.refusal(*sizes)

    def conv2d_backward(self, grad_output, input, *others):
        grad_input = others[-3]
        self.activations = (grad_output, input, grad_input)
        torch.ops.sparsebwd_emulated.conv2d_backward(grad_output, input, *others)


@pytest.fixture
def spy(monkeypatch) -> _Spy:
    spy = _Spy()
    monkeypatch.setattr(type(backends.get_backend("emulated")), "operators", spy)
    return spy


def test_sparse_kernels_need_channels_last(generator, spy):
    problem = ConvProblem.parse(SPARSE)
    grad_input, *_ = layer_backward(problem, operands_of(problem, generator))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in spy.activations)
    assert grad_input.is_contiguous()


@pytest.mark.parametrize("percentile", [None, 90.0])
@pytest.mark.parametrize(
    "text, sparse",
    [
        ("n2c6h7w8k6r3s3p1g6", ()),
        ("n2c4h9w9k4r7s7p3", ()),
        ("n2c3h6w6k8r3s3p1", ("agb",)),
        ("n2c8h6w6k8r3s3p0", ("wgc",)),
    ],
)
def test_what_sparse_kernels_refuse_is_dense(text, sparse, percentile, generator, spy, stats):
    """Each of AGB and WGC, never by the plain kernels, on the gradient that the other one has."""
    problem = ConvProblem.parse(text)
    operands = operands_of(problem, generator)
    results = layer_backward(problem, operands, percentile)
    names = (*(["emulated"] if sparse else []), "dense")
    assert stats[-1].implementation == "+".join(names)
    if sparse:
        _, input, grad_input = spy.activations
        assert (grad_input is not None, input is not None) == ("agb" in sparse, "wgc" in sparse)
    else:
        assert spy.activations is None
    expected = layer_backward(problem, operands, percentile, backend="reference")
    for one, two in zip(results[:2], expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_sparse_kernels_need_aligned_tensors(generator, spy):
    problem = ConvProblem.parse(SPARSE)
    operands = operands_of(problem, generator, memory_format=torch.channels_last)
    moved = [fenced(tensor, ALIGNED + 1) for tensor in operands]
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    results = [layer_backward(problem, same) for same in (operands, moved)]
    assert [x.data_ptr() % 16 for x in spy.activations] == [0, 0, 0]
    for one, two in zip(*results):
        assert_bit_equal(one, two)


# ---- launches of pruning


@pytest.mark.parametrize("asked, processes, one", [("auto", 1, True), ("auto", 2, False), ("one", 2, True), ("several", 1, False)])
def test_pruning_is_one_launch_unless_others_need_the_device(asked, processes, one, monkeypatch):
    monkeypatch.setenv(cuda.LAUNCHES, asked)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    assert cuda.cooperative() is one


def test_launches_that_nobody_knows_are_refused(monkeypatch):
    monkeypatch.setenv(cuda.LAUNCHES, "two")
    with pytest.raises(ValueError, match="SPARSEBWD_PRUNE_LAUNCHES: got 'two'; accepted: auto, one, several"):
        prune_gradient(torch.ones(2, 4, 3, 3), backend="emulated")


def test_layers_have_the_same_bits_in_several_launches(monkeypatch, generator):
    problem = ConvProblem.parse(SPARSE)
    operands = operands_of(problem, generator, memory_format=torch.channels_last, density=1.0)
    found = []
    for asked in ("one", "several"):
        monkeypatch.setenv(cuda.LAUNCHES, asked)
        torch.manual_seed(0)
        found.append(layer_backward(problem, operands, percentile=90))
    for one, other in zip(*found):
        assert_bit_equal(other, one, str(problem))
