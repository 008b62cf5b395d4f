# SPDX-License-Identifier: Apache-2.0
"""The cuda backend and its raw operators, on the emulated kernels: what is "on the device" here is a CPU tensor.

csrc/torch/library_cuda.cpp is compiled for the emulator (see tests/emulation.py) and behaves as on a device, but for
the device guard and the stream. That it compiles for CUDA is tested in test_cuda_compile.py; how setup.py decides to, here.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import emulation
import pytest
import setuptools
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import problems
from test_parity import GRID
from torch.utils import cpp_extension

import sparsebwd
from sparsebwd import SparseConv2d, backends, grad, prune_gradient, reference
from sparsebwd.backends import cuda
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]
SPARSE = "n2c16h6w5k24r3s3p1"
LARGE = "n2c16h8w8k24r3s3p1"  # beyond the small maps, for which "auto" expects less
STRIDED = "n2c6h7w8k4r3s2u2x1p1x0d2x1g2"


def _compile(*options: str) -> list[str]:
    """The command that compiles library_cuda.cpp."""
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    return [
        *COMPILER,
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{CSRC / 'include'}",
        f"-I{CSRC / 'cuda'}",
        *options,
        *(f"-isystem{folder}" for folder in folders),
        str(CSRC / "torch" / "library_cuda.cpp"),
    ]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", autouse=True)
def emulated():
    """Registers the backends "emulated", the cuda backend on emulated kernels, as the one that "auto" prefers."""
    objects = [Path(path) for path in emulation.objects("fast")]
    library = ROOT / "build" / "emulator-fast" / f"library_cuda-torch{torch.__version__}.so"
    sources = [*objects, *(CSRC / "torch").glob("*"), *(CSRC / "cuda").glob("*.h"), *(CSRC / "include").rglob("*.h")]
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        folder = Path(torch.__file__).parent / "lib"
        options = ["-O1", "-shared", "-DSPARSEBWD_EMULATOR", f"-I{CSRC / 'emulator'}"]
        links = [*map(str, objects), f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch, library.name)
            _run([*_compile(*options), *links, "-o", str(built)])
            built.replace(library)
    torch.ops.load_library(library)

    class Emulated(cuda.CudaBackend):
        name = "emulated"
        device_type = "cpu"
        operators = torch.ops.sparsebwd_emulated

        def available(self):
            return None

        def for_auto(self):
            return adaptive

    class AdaptiveEmulated(Emulated, cuda.AdaptiveCudaBackend):
        pass

    adaptive = AdaptiveEmulated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.base, "_backends", dict(backends.base._backends))
        backends.register(Emulated())
        yield
    backends.choose_backend.cache_clear()


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def fresh() -> cuda.AdaptiveCudaBackend:
    """What "auto" uses, with nothing remembered."""
    adaptive = backends.get_backend("emulated").for_auto()
    adaptive._layers.clear()
    return adaptive


def _geometry(problem: ConvProblem):
    return problem.stride, problem.padding, problem.dilation, problem.groups


def _operands(problem, generator, dtype=torch.float32, memory_format=FORMATS[0], density=0.3, integer=False):
    """input, weight, grad_output; the latter of the density."""
    settings = {"generator": generator, "dtype": dtype, "memory_format": memory_format, "integer": integer}
    sizes = ((problem.input_size, 1.0), (problem.weight_size, 1.0), (problem.output_size, density))
    return [fenced(random_tensor(size, density=share, **settings), ALIGNED) for size, share in sizes]


# So many elements are a multiple of what the sparse kernels want tensors aligned to.
ALIGNED = 64
KEY = torch.tensor([3, -4])
BOTH = (True, True, False)


def _layer_backward(
    problem,
    operands,
    percentile=None,
    placement="output",
    mask=BOTH,
    backend="emulated",
    layer_id=0,
    sigma_history=None,
):
    input, weight, grad_output = operands
    config = (
        KEY,
        Pruning(percentile=percentile, placement=placement, backend=backend).text,
        layer_id,
        mask,
        sigma_history,
    )
    with poisoned_memory():
        return torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *_geometry(problem), *config)


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
    input, weight, grad_output = operands = _operands(problem, generator, dtype, memory_format)
    with poisoned_memory():
        alone = (
            grad.conv2d_input(problem.input_size, weight, grad_output, *_geometry(problem), backend="emulated"),
            grad.conv2d_weight(input, problem.weight_size, grad_output, *_geometry(problem), backend="emulated"),
        )
    _check_results(problem, operands, alone)
    for one, two in zip(alone, _layer_backward(problem, operands)):
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
    input, weight, grad_output = operands = _operands(problem, generator, dtype, memory_format, density, integer=True)
    grad_input, grad_weight, _ = _layer_backward(problem, operands)
    # Also straight to the kernels: the backend leaves to dense ones what the sparse kernels refuse, and nothing to plain.cu.
    raw = [torch.full_like(tensor, torch.nan) for tensor in (input, weight)]
    torch.ops.sparsebwd_emulated.conv2d_backward(
        *_raw(problem, grad_output, input=input, weight=weight, grad_input=raw[0], grad_weight=raw[1])
    )
    wanted = reference.conv2d_input(problem, weight, grad_output), reference.conv2d_weight(problem, input, grad_output)
    for name, *both, exact in zip(("AGB", "WGC"), (grad_input, grad_weight), raw, wanted):
        for actual in both:
            assert_bit_equal(actual + 0, exact.to(dtype) + 0, f"{name} of {problem}")


def test_weights_of_any_strides(generator):
    problem = ConvProblem.parse(SPARSE)
    input, weight, grad_output = _operands(problem, generator, integer=True)
    exact = reference.conv2d_input(problem, weight, grad_output).float()
    operators = torch.ops.sparsebwd_emulated
    for same in (weight, weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        result = torch.full(problem.input_size, torch.nan)
        operators.conv2d_backward(*_raw(problem, grad_output, weight=same, grad_input=result))
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
    input, weight, grad_output = operands = _operands(problem, generator, dtype, memory_format, density=1.0)
    grad_input, grad_weight, grad_bias = _layer_backward(problem, operands, percentile, placement, (True, True, True))
    (said,) = stats
    consumed = grad_output
    if percentile and placement == "output":
        consumed = reference.prune_at(grad_output, KEY, said.tau)
        torch.testing.assert_close(said.sigma, reference.prune(grad_output, KEY, Pruning(percentile)).sigma)
    assert_bit_equal(said.density, reference.density(consumed), "density")
    assert (said.backend, said.implementation) == ("emulated", "emulated" if text == SPARSE else "dense")
    assert (said.tau is None) == (percentile is None)

    unpruned = _layer_backward(problem, (input, weight, consumed))
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
    operands = _operands(problem, generator)
    everything = _layer_backward(problem, operands, 90.0, placement)
    for result, same, wanted in zip(_layer_backward(problem, operands, 90.0, placement, mask), everything, mask):
        assert_bit_equal(result, same if wanted else result.new_empty(0))


@pytest.mark.parametrize("placement", ["output", "input"])
def test_predicted_threshold_is_that_of_the_reference(placement, generator, stats):
    problem = ConvProblem.parse(SPARSE)
    histories = {name: torch.zeros(5, dtype=torch.int32) for name in ("reference", "emulated")}
    for _ in range(6):
        operands = _operands(problem, generator, integer=True)
        for name, history in histories.items():
            _layer_backward(problem, operands, 90.0, placement, backend=name, sigma_history=history)
        oracle, emulated = stats[-2:]
        torch.testing.assert_close(emulated.tau, oracle.tau, rtol=2**-23, atol=0)
        torch.testing.assert_close(emulated.sigma, oracle.sigma, rtol=2**-23, atol=0)
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
    grad_input, *_ = _layer_backward(problem, _operands(problem, generator))
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
    operands = _operands(problem, generator)
    results = _layer_backward(problem, operands, percentile)
    names = (*(["emulated"] if sparse else []), "dense")
    assert stats[-1].implementation == "+".join(names)
    if sparse:
        _, input, grad_input = spy.activations
        assert (grad_input is not None, input is not None) == ("agb" in sparse, "wgc" in sparse)
    else:
        assert spy.activations is None
    expected = _layer_backward(problem, operands, percentile, backend="reference")
    for one, two in zip(results[:2], expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_sparse_kernels_need_aligned_tensors(generator, spy):
    problem = ConvProblem.parse(SPARSE)
    operands = _operands(problem, generator, memory_format=torch.channels_last)
    moved = [fenced(tensor, ALIGNED + 1) for tensor in operands]
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    results = [_layer_backward(problem, same) for same in (operands, moved)]
    assert [x.data_ptr() % 16 for x in spy.activations] == [0, 0, 0]
    for one, two in zip(*results):
        assert_bit_equal(one, two)


# ---- the choice that "auto" makes


@pytest.fixture
def set_precision():
    """Sets how cuDNN may compute convolutions of float32; undone after the test."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    yield lambda precision: setattr(convolutions, "fp32_precision", precision)
    convolutions.fp32_precision = before


@pytest.fixture
def ieee(set_precision):
    """The break-even density is 0.25 in channels_last, half of it in contiguous tensors."""
    set_precision("ieee")


def _implementations(
    text, densities, generator, stats, percentile=None, dtype=torch.float32, layer_id=1, memory_format=FORMATS[1]
):
    problem = ConvProblem.parse(text)
    for density in densities:
        operands = _operands(problem, generator, dtype, memory_format, density)
        _layer_backward(problem, operands, percentile, backend="auto", layer_id=layer_id)
    return [said.implementation for said in stats[-len(densities) :]]


def test_auto_takes_the_density_of_two_steps_before(fresh, ieee, generator, stats):
    # Pruning at 51 removes few: the density is close to that before.
    densities = [0.1, 0.9, 0.1, 0.1, 0.9, 0.9]
    ran = _implementations(LARGE, densities, generator, stats, percentile=51.0)
    assert ran == ["dense", "dense", "emulated", "dense", "emulated", "emulated"]
    assert {said.backend for said in stats} == {"emulated"}


@pytest.mark.parametrize(
    "text, reason", [(LARGE, "no density of it is known yet"), (LARGE.replace("r3s3", "r1s1"), "1x1, in groups")]
)
def test_auto_logs_why_it_runs_dense(text, reason, fresh, ieee, generator, stats, caplog):
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        assert _implementations(text, [0.1], generator, stats, 51.0) == ["dense"]
    assert f"AGB dense, WGC dense: {reason}" in caplog.text


def test_auto_remembers_each_layer_and_problem_apart(fresh, ieee, generator, stats):
    assert _implementations(LARGE, [0.1] * 3, generator, stats, 51.0, layer_id=1)[-1] == "emulated"
    assert _implementations(LARGE, [0.1], generator, stats, 51.0, layer_id=2) == ["dense"]
    assert _implementations(LARGE.replace("n2", "n1"), [0.1], generator, stats, 51.0, layer_id=1) == ["dense"]


def test_auto_counts_what_is_not_pruned(fresh, ieee, generator, stats):
    assert _implementations(LARGE, [0.1] * 3, generator, stats) == ["dense", "dense", "emulated"]
    assert _implementations(LARGE, [0.9] * 3, generator, stats) == ["emulated", "emulated", "dense"]


def test_auto_counts_seldom_while_it_is_dense(fresh, ieee, generator, stats, monkeypatch):
    recorded = []
    record = cuda._DensityHistory.record

    def noting(self, density):
        recorded.append(self.calls)
        record(self, density)

    monkeypatch.setattr(cuda._DensityHistory, "record", noting)
    monkeypatch.setattr(cuda, "_CALLS_PER_COUNT", 4)
    _implementations("n1c16h3w3k16r3s3p1", [0.9] * 10, generator, stats)
    assert recorded == [1, 2, 5, 9]


@pytest.mark.parametrize(
    "text, precision, dtype, limit",
    [
        (LARGE, "ieee", torch.float32, 0.25),
        (LARGE.replace("h8w8", "h7w7"), "ieee", torch.float32, 0.15),
        ("n2c16h16w16k24r3s3u2p1", "ieee", torch.float32, 0.15),
        (LARGE, "tf32", torch.float32, 0.04),
        (LARGE, "ieee", torch.bfloat16, 0.02),
    ],
)
def test_auto_by_arithmetic_geometry_and_layout(
    text, precision, dtype, limit, memory_format, fresh, generator, stats, set_precision
):
    set_precision(precision)
    if memory_format == torch.contiguous_format:
        limit *= 0.5
    for density, expected in ((0.6 * limit, "emulated"), (1.5 * limit, "dense")):
        ran = _implementations(text, [density] * 3, generator, stats, None, dtype, 1, memory_format)
        assert ran[2] == expected
        fresh._layers.clear()


@pytest.mark.parametrize("text", ["n2c33h6w6k40r1s1", "n2c16h6w6k16r3s3p1g16"])
def test_auto_leaves_to_dense_what_never_pays(text, fresh, ieee, generator, stats):
    assert _implementations(text, [0.05] * 3, generator, stats, percentile=90.0) == ["dense"] * 3


def test_auto_while_a_graph_is_captured(fresh, ieee, generator, stats, monkeypatch):
    """The choice is the last one made, and nothing is waited for or recorded."""
    _implementations(LARGE, [0.1] * 4, generator, stats, 51.0)
    with monkeypatch.context() as capture:
        capture.setattr(cuda, "_capturing", lambda device: True)
        assert _implementations(LARGE, [0.9] * 4, generator, stats, 51.0) == ["emulated"] * 4
        assert _implementations(LARGE, [0.1] * 2, generator, stats, 51.0, layer_id=2) == ["dense"] * 2
        (first, second) = (layer.history._values for layer in fresh._layers.values())
        assert len(first) == 2 and not second  # no memory of the host is taken
    assert _implementations(LARGE, [0.9] * 3, generator, stats, 51.0) == ["emulated", "emulated", "dense"]


def test_auto_prunes_and_convolves_as_dense_or_sparse(fresh, ieee, generator, stats):
    """The same operands three times: the third pass is sparse, and differs by rounding alone."""
    problem = ConvProblem.parse(LARGE)
    operands = _operands(problem, generator, memory_format=torch.channels_last, integer=True, density=0.2)
    passes = [_layer_backward(problem, operands, 50.0, backend="auto") for _ in range(3)]
    assert [said.implementation for said in stats] == ["dense", "dense", "emulated"]
    for other in passes[1:]:
        for one, two in zip(passes[0], other):
            assert_bit_equal(one + 0, two + 0)
    assert [float(said.density) for said in stats] == [float(stats[0].density)] * 3


def test_number_of_layers_remembered_is_bounded(fresh, ieee, generator, stats, monkeypatch):
    monkeypatch.setattr(cuda, "_MOST_LAYERS", 3)
    for layer_id in range(5):
        _implementations("n1c16h3w3k16r3s3p1", [0.1], generator, stats, layer_id=layer_id)
    assert [key[0] for key in fresh._layers] == [2, 3, 4]


# ---- the raw operators


def _raw(problem, grad_output, input_size=None, weight_size=None, stats=None, **tensors):
    """Arguments of the raw conv2d_backward; tensors that are not named are None."""
    return (
        grad_output,
        tensors.get("input"),
        tensors.get("weight"),
        input_size or problem.input_size,
        weight_size or problem.weight_size,
        *_geometry(problem),
        tensors.get("key"),
        1.0,
        1.0,
        tensors.get("sigma_history"),
        tensors.get("pruned"),
        tensors.get("grad_input"),
        tensors.get("grad_weight"),
        torch.empty(3) if stats is None else stats,
    )


def test_schemas_say_what_is_written():
    problem = ConvProblem.parse("n2c4h5w5k3r3s3p1")
    sizes = problem.output_size
    operators, history = torch.ops.sparsebwd_emulated, torch.zeros(5, dtype=torch.int32)
    arguments = (torch.ones(sizes), KEY, 1.0, 1.0, history, torch.empty(sizes), torch.empty(3))
    torch.library.opcheck(operators.prune.default, arguments, test_utils="test_schema")
    tensors = {
        "input": torch.ones(problem.input_size),
        "weight": torch.ones(problem.weight_size),
        "key": KEY,
        "sigma_history": history,
        "pruned": torch.empty(sizes),
        "grad_input": torch.empty(problem.input_size),
        "grad_weight": torch.empty(problem.weight_size),
    }
    arguments = _raw(problem, torch.ones(sizes), **tensors)
    torch.library.opcheck(operators.conv2d_backward.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("text", [SPARSE, "n0c3h5w5k4r3s3", "n1c1h5w4k1r1s1"])
def test_opcheck(text, memory_format, generator):
    problem = ConvProblem.parse(text)
    input, weight, grad_output = _operands(problem, generator, memory_format=memory_format)
    config = (KEY, Pruning(backend="emulated").text, 3, (True, True, True))
    operators = torch.ops.sparsebwd
    torch.library.opcheck(operators.conv2d_backward.default, (grad_output, input, weight, *_geometry(problem), *config))
    torch.library.opcheck(operators.prune.default, (grad_output, *config[:2]))


def test_refusals():
    operators = torch.ops.sparsebwd_emulated
    for dtype in ("float32", "bfloat16", "float16"):
        assert operators.refusals((2, 16, 6, 5), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1, dtype) == ("", "")
    agb, wgc = operators.refusals((2, 6, 9, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6, "float32")
    assert agb and wgc and not agb.endswith(".")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n": 2**31}, "a size is above 2147483647"),
        ({"stride": (1, 2**31), "padding": (0, 2**31)}, "a stride, padding or dilation is above 2147483647"),
        ({"padding": (2**30, 0)}, "a side of the input with its padding is above"),
        ({"n": 0, "h": 2**20, "w": 2**25, "c": 8}, "more than 2^46 elements"),
    ],
)
def test_what_no_kernel_can_count_is_refused(changes, words):
    problem = replace(BAD, **changes)
    assert words in backends.get_backend("emulated").can_run(problem, "cpu", torch.float32)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    operators = torch.ops.sparsebwd_emulated
    with pytest.raises(ValueError, match="which no kernel takes: "):
        operators.refusals(problem.input_size, problem.weight_size, *geometry, "float32")
    with pytest.raises(ValueError, match="which no kernel takes: "):
        operators.conv2d_backward(
            G, G, G, problem.input_size, problem.weight_size, *geometry, None, 0.0, 0.0, None, None, G, None, STATS
        )


def test_refusals_are_logged(caplog):
    problem = ConvProblem.parse("n2c6h7w8k6r3s3p1g6")
    cuda._refusals.cache_clear()
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        agb, wgc = cuda._refusals(torch.ops.sparsebwd_emulated, problem, torch.float32)
    for name, refusal in (("AGB", agb), ("WGC", wgc)):
        assert f"{problem} in torch.float32: no sparse {name}, since {refusal}" in caplog.text


G = torch.ones(2, 4, 3, 5)
STATS = torch.empty(3)
HISTORY = torch.zeros(5, dtype=torch.int32)
BAD = ConvProblem.parse("n2c6h3w5k4r3s3p1")


def _prune(g=G, key=KEY, coefficient=1.0, quantile=1.0, history=None, out=None, stats=STATS):
    torch.ops.sparsebwd_emulated.prune(g, key, coefficient, quantile, history, out, stats)


def _convolve(grad_output=G, **tensors):
    torch.ops.sparsebwd_emulated.conv2d_backward(*_raw(BAD, grad_output, **tensors))


def _refusals(dtype="float32", groups=1):
    torch.ops.sparsebwd_emulated.refusals((2, 6, 3, 5), (4, 6, 3, 3), (1, 1), (1, 1), (1, 1), groups, dtype)


INPUT, WEIGHT = torch.ones(BAD.input_size), torch.ones(BAD.weight_size)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _prune(G.to("meta")), "g: got a tensor on another device, accepted is"),
        (lambda: _prune(G.double()), "g: got a tensor of dtype Double, accepted are Float .*, BFloat16 and Half"),
        (lambda: _prune(G[0]), "g: got 3 dimensions, accepted are 4"),
        (lambda: _prune(G[:, ::2]), "g: got strides .* accepted are contiguous and channels_last"),
        (
            lambda: _prune(torch.empty(0, 2**31, 1, 1)),
            r"g: got shape \[0, 2147483648, 1, 1\], .* sizes up to 2147483647",
        ),
        (lambda: _prune(key=KEY.int()), "key: got Int of shape"),
        (lambda: _prune(key=KEY[:1]), r"key: got Long of shape \[1\], accepted"),
        (lambda: _prune(key=KEY.to("meta")), "key: got a tensor on another device, accepted is that of g"),
        (lambda: _prune(coefficient=-1.0), "sigma_coefficient: got -1, accepted are finite numbers >= 0"),
        (lambda: _prune(quantile=float("nan")), "quantile: got nan"),
        (lambda: _prune(history=HISTORY[:4]), r"sigma_history: got Int of shape \[4\], accepted is Int of shape \[5\]"),
        (lambda: _prune(history=HISTORY.float()), "sigma_history: got Float of shape"),
        (lambda: _prune(key=None, history=HISTORY), "sigma_history: got a tensor without a key"),
        (lambda: _prune(out=G[:1]), r"out: got Float of shape \[1, 4, 3, 5\]"),
        (lambda: _prune(out=G.to(memory_format=torch.channels_last)), "out: got Float .* accepted are those of g"),
        (lambda: _prune(stats=STATS[:2]), r"stats: got Float of shape \[2\], accepted is Float of shape \[3\]"),
        (lambda: _prune(stats=STATS.double()), "stats: got Double of shape"),
        (lambda: _convolve(G.double()), "grad_output: got a tensor of dtype Double"),
        (lambda: _convolve(G[:1]), r"grad_output: got Float of shape \[1, 4, 3, 5\].* shape \[2, 4, 3, 5\]"),
        (lambda: _convolve(G.to("meta")), "grad_output: got a tensor on another device"),
        (lambda: _convolve(torch.ones(2, 4, 3, 10)[..., ::2]), "grad_output: got strides .* accepted are contiguous"),
        (lambda: _convolve(input_size=(2, 6, 3)), r"input_size: got \[2, 6, 3\], accepted are 4 sizes"),
        (lambda: _convolve(weight_size=(4, 5, 3, 3)), "groups: got 1 for 6 input channels"),
        (lambda: _convolve(weight_size=(4, 6, 9, 3)), "weight_size: got .* not larger than the input"),
        (lambda: _convolve(grad_input=INPUT), "weight: got None, accepted is a tensor if grad_input is wanted"),
        (lambda: _convolve(grad_weight=WEIGHT), "input: got None, accepted is a tensor if grad_weight is wanted"),
        (lambda: _convolve(weight=WEIGHT.half(), grad_input=INPUT), "weight: got Half .* grad_output's dtype, Float"),
        (lambda: _convolve(weight=WEIGHT, grad_input=INPUT[:1]), "grad_input: got Float of shape"),
        (lambda: _convolve(input=INPUT[:1], grad_weight=WEIGHT), "input: got Float of shape"),
        (lambda: _convolve(input=INPUT, grad_weight=WEIGHT[:1]), "grad_weight: got Float of shape"),
        (lambda: _convolve(input=INPUT.to("meta"), grad_weight=WEIGHT), "input: got a tensor on another device"),
        (lambda: _convolve(key=KEY), "pruned: got None, accepted is a tensor if there is a key"),
        (lambda: _convolve(pruned=G.clone()), "pruned: got a tensor, .* if there is a key, else None"),
        (lambda: _convolve(key=KEY, pruned=G.half()), "pruned: got Half of shape"),
        (lambda: _refusals("float64"), "dtype: got 'float64', accepted are 'float32', 'bfloat16' and 'float16'"),
        (lambda: _refusals(groups=3), "groups: got 3 for 6 input channels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- what runs where


@pytest.mark.parametrize(
    "architectures, capability, runs",
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 9), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (9, 0), True),
        (["9.0a"], (9, 0), True),
        (["9.0a"], (10, 0), False),
        (["8.0", "9.0a", "10.0+PTX"], (12, 0), True),
        (["10.0+PTX"], (8, 0), False),
    ],
)
def test_code_for_architectures_runs_on_devices(architectures, capability, runs):
    assert cuda.covers(architectures, capability) == runs


def test_each_device_needs_code_of_its_own(monkeypatch):
    capabilities = [(9, 0), (8, 6)]
    monkeypatch.setattr(cuda, "why_not_loaded", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    backend = cuda.CudaBackend()
    backend.operators = SimpleNamespace(build=lambda: ("9.0a 10.0+PTX", 13000, 13000))
    assert backend.available().startswith(
        "device 1 has compute capability 8.6, the kernels are built for 9.0a 10.0+PTX;"
    )
    capabilities.pop()
    assert backend.available() is None
    capabilities.clear()
    assert backend.available() == "PyTorch finds no CUDA device"


def test_module_that_does_not_load_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setitem(sys.modules, "sparsebwd._C_cuda", None)
    monkeypatch.delattr(sparsebwd, "_C_cuda", raising=False)  # there where it was loaded before
    assert cuda.load().startswith("the native module sparsebwd._C_cuda cannot be loaded: ")


def test_cuda_is_refused_where_it_cannot_run(generator):
    backend = backends.get_backend("cuda")
    assert backend.can_run(None, "cuda", torch.float16) is None
    assert backend.can_run(None, "cpu", torch.float32) == "the device is cpu, not cuda"
    assert backend.can_run(None, "cuda", torch.float64) == "torch.float64 is not float32, bfloat16 or float16"
    if backend.available() is not None:
        layer = SparseConv2d(4, 4, 3, backend="cuda")
        with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run .*(no CUDA|cannot be loaded)"):
            layer(torch.ones(1, 4, 5, 5, requires_grad=True))


# ---- the build


@pytest.fixture
def setup_py(monkeypatch):
    """Runs setup.py, which then installs nothing; returns its names."""
    monkeypatch.setattr(setuptools, "setup", lambda **settings: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PATH", os.environ.get("PATH", os.defpath))
    for name in ("SPARSEBWD_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return lambda: runpy.run_path(str(ROOT / "setup.py"))


def test_build_without_cuda_says_why(setup_py, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"PyTorch {torch.__version__} is built without CUDA"
    assert setup_py()["CUDA"] == reason
    monkeypatch.setenv("SPARSEBWD_CUDA", "1")
    with pytest.raises(SystemExit, match="sparsebwd: SPARSEBWD_CUDA=1, but PyTorch .* is built without CUDA"):
        setup_py()
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    assert setup_py()["CUDA"] == "SPARSEBWD_CUDA=0 was set"
    monkeypatch.setenv("SPARSEBWD_CUDA", "yes")
    with pytest.raises(SystemExit, match="SPARSEBWD_CUDA: got 'yes'; accepted: 0, 1, auto"):
        setup_py()


@pytest.mark.parametrize(
    "listed, devices, known, architectures",
    [
        ("8.0;9.0a 10.0+PTX", [], "", ["8.0", "9.0a", "10.0+PTX"]),
        ("12.0f", [(9, 0)], "", ["12.0f"]),
        ("7.0 7.5 8.6 9.0+PTX", [], "", ["8.6", "9.0+PTX"]),  # as containers set it
        ("7.5", [(9, 0)], "", []),
        (None, [(9, 0), (8, 6), (9, 0)], "", ["8.6", "9.0a"]),
        (None, [(7, 5)], "", []),
        (None, [], "compute_80 compute_90 compute_100", ["8.0", "9.0a", "10.0+PTX"]),
        (None, [], "compute_75\ncompute_80\ncompute_90", ["8.0", "9.0+PTX"]),
    ],
)
def test_architectures(listed, devices, known, architectures, setup_py, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{known}'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    names = setup_py()
    assert names["cuda_architectures"](SimpleNamespace(nvcc=str(nvcc))) == architectures
    flags = names["nvcc_flags"](architectures)
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        assert f"-gencode=arch=compute_{number},code=sm_{number}" in flags
        assert (f"-gencode=arch=compute_{number},code=compute_{number}" in flags) == name.endswith("+PTX")


@pytest.mark.parametrize("listed", ["Hopper", "8.0;x", "90"])
def test_unknown_architectures_are_refused(listed, setup_py, monkeypatch):
    monkeypatch.setenv("SPARSEBWD_CUDA", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: got '(Hopper|x|90)'; accepted: compute"):
        setup_py()["cuda_architectures"](SimpleNamespace(nvcc="nvcc"))
