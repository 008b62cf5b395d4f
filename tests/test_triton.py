# SPDX-License-Identifier: Apache-2.0
"""The backend "triton" for gradients of which rows are kept or dropped, its kernels interpreted on a CPU, against float64.

How they compile is in test_triton_compile.py. The interpreter multiplies in float32 whatever the precision asked for.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from row_problems import DTYPES, GRID, backward, operands, oracle
from strategies import problems

pytest.importorskip("triton")

from triton_interpreter import InterpretedBackend  # noqa: E402

from sparsebwd import backends, functional, grad, granularity, importance  # noqa: E402
from sparsebwd.backends import triton_backend, triton_tiles, triton_tune  # noqa: E402
from sparsebwd.backends.dense import convolution_backward  # noqa: E402
from sparsebwd.problem import ConvProblem  # noqa: E402
from sparsebwd.settings import Pruning  # noqa: E402
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor  # noqa: E402

pytestmark = pytest.mark.emulated

BACKEND = "interpreted"


@pytest.fixture(scope="module", autouse=True)
def _registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.base, "_backends", dict(backends.base._backends))
        backends.register(InterpretedBackend())
        yield
    backends.base.forget_choices()


@pytest.fixture(params=DTYPES, ids=["f32", "bf16", "f16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def many_splits(monkeypatch):
    """Lists are cut into parts for different programs, short as they are."""
    monkeypatch.setattr(triton_backend, "_CUT_ROWS", 8)


def test_lists_are_the_kept_pixels_in_order(generator):
    kept = torch.rand((5, 300), generator=generator) < 0.4
    kept[1], kept[3] = False, True
    with poisoned_memory():
        lists, counts = triton_backend.lists_of(kept)
    for row, pixels, count in zip(kept, lists, counts):
        assert pixels[:count].tolist() == row.nonzero().flatten().tolist()


def test_occupied_rows(generator):
    gradient = random_tensor((2, 150, 3, 2), generator=generator, density=0.01, memory_format=torch.channels_last)
    gradient[1, 80, 2, 1] = math.nan
    kept = triton_backend.occupied(gradient).kept
    for row, pixel in itertools.product(range(3), range(12)):
        n, p, q = pixel // 6, pixel // 2 % 3, pixel % 2
        assert kept[row, pixel] == (gradient[n, 64 * row : 64 * row + 64, p, q] != 0).any()


def test_pixels_that_need_the_same_are_beside_each_other(generator):
    masks = torch.randint(0, 2**6, (5000,), generator=generator)
    order = triton_backend.order_of(masks, 6, 3).long()
    assert sorted(order.tolist()) == list(range(5000))
    for chunk in range(3):
        first, last = 1667 * chunk, min(1667 * (chunk + 1), 5000)
        part = order[first:last]
        assert part.min() == first and part.max() == last - 1
        changes = masks[part][1:] ^ masks[part][:-1]
        assert (changes != 0).sum() == 2**6 - 1  # each mask once
        assert all(change & (change - 1) == 0 for change in changes.tolist())  # one bit at a time
        same = changes == 0
        assert torch.all(part[1:][same] > part[:-1][same])


@pytest.fixture
def few_bits(monkeypatch):
    """Masks have too few for the rows of some layers, as those of 600 channels have."""
    monkeypatch.setattr(triton_backend, "MOST_STEPS", 20)


CASES = [
    *((text, 0.4, dtype, torch.channels_last) for text in GRID for dtype in DTYPES[:1]),
    *((text, 0.4, dtype, torch.contiguous_format) for text in (GRID[1], GRID[2], GRID[5]) for dtype in DTYPES[1:]),
    *((GRID[1], kept, DTYPES[0], torch.contiguous_format) for kept in (1.0, 0.0)),
]


@pytest.mark.parametrize("text, kept, dtype, memory_format", CASES)
def test_error_is_at_most_twice_that_of_dense(text, kept, dtype, memory_format, generator, many_splits, few_bits):
    problem = ConvProblem.parse(text)
    tensors = operands(problem, kept, dtype, generator, memory_format)
    dense = convolution_backward(problem, tensors[2], *tensors[:2], (True, True))
    for name, *results in zip(("AGB", "WGC"), backward(BACKEND, problem, *tensors), oracle(problem, *tensors), dense):
        assert_error_bounded(*results, f"{name} of {problem}")


@settings(max_examples=12)
@given(
    problem=problems(max_channels=12),
    kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**32),
)
def test_integers_are_exact_for_any_geometry(problem, kept, dtype, memory_format, seed):
    tensors = operands(problem, kept, dtype, torch.Generator().manual_seed(seed), memory_format, integer=True)
    input, weight, gradient = tensors
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    with poisoned_memory():
        single = (
            grad.conv2d_input(problem.input_size, weight, gradient, *geometry, backend=BACKEND),
            grad.conv2d_weight(input, problem.weight_size, gradient, *geometry, backend=BACKEND),
        )
    for both in (single, backward(BACKEND, problem, *tensors)):
        for actual, wanted in zip(both, oracle(problem, *tensors)):
            assert_bit_equal(actual + 0, wanted.to(dtype) + 0, str(problem))


@pytest.mark.parametrize("kind", ["row", ("row", 128), ("row", 4096), ("row", 5)], ids=str)
@pytest.mark.parametrize(
    "text, dtype",
    [("n1c10h5w4k140r3s3p1", DTYPES[0]), ("n2c12h5w6k140r3s3u2p1", DTYPES[1]), ("n1c4h4w5k140r1s1", DTYPES[2])],
)
def test_rows_are_pruned_as_elsewhere(text, kind, dtype, generator, stats, many_splits, few_bits):
    """The same rows are kept, by the same factors; of those that are dropped nothing is read."""
    problem = ConvProblem.parse(text)
    input, weight, gradient = operands(problem, 1.0, dtype, generator)
    scale = torch.exp(torch.randn((problem.n, 1, problem.p, problem.q), generator=generator))
    gradient *= scale.to(dtype)
    pruning = Pruning(density=0.5, granularity=kind)
    results = backward(BACKEND, problem, input, weight, gradient, pruning, key=(3, -4))
    pruned = granularity.prune(gradient, torch.tensor([3, -4]), pruning)
    assert 0 < pruned.density < 1
    assert_bit_equal(stats[-1].density, pruned.density)
    assert_bit_equal(stats[-1].tau, pruned.tau)
    assert stats[-1].implementation == BACKEND
    wanted = oracle(problem, input, weight, pruned.values)
    dense = convolution_backward(problem, pruned.values, input, weight, (True, True))
    for name, *errors in zip(("AGB", "WGC"), results, wanted, dense):
        assert_error_bounded(*errors, f"{name} of {problem}")


def test_rows_of_images_with_thresholds_of_their_own(generator, stats):
    """importance="image": the threshold of an image falls with the norm of its input, for rows as for elements."""
    problem = ConvProblem.parse("n4c6h5w4k70r3s3p1")
    input, weight, gradient = operands(problem, 1.0, DTYPES[0], generator)
    size = torch.tensor([0.02, 1.0, 1.0, 5.0]).view(4, 1, 1, 1)
    input = fenced(input * size, 64)
    gradient *= torch.exp(torch.randn((4, 1, *problem.output_size[2:]), generator=generator))
    pruning = Pruning(density=0.3, granularity="row", importance="image")
    results = backward(BACKEND, problem, input, weight, gradient, pruning, key=(3, -4))
    key, scales = torch.tensor([3, -4]), importance.scales(input, pruning)
    pruned = granularity.prune(gradient, key, pruning, scales)
    assert_bit_equal(stats[-1].density, pruned.density)
    kept = (pruned.values != 0).float().mean((1, 2, 3))
    assert kept[0] < kept[1:3].mean() < kept[3]
    wanted = oracle(problem, input, weight, pruned.values)
    dense = convolution_backward(problem, pruned.values, input, weight, (True, True))
    for name, *errors in zip(("AGB", "WGC"), results, wanted, dense):
        assert_error_bounded(*errors, f"{name} of {problem}")


def test_through_a_layer(generator):
    """Gradients of a training step with rows, in the layout of the layer, against those of the reference."""
    x = torch.randn((2, 6, 7, 5), generator=generator)
    weight = torch.randn((80, 6, 3, 3), generator=generator)
    found = []
    for backend in (BACKEND, "reference"):
        tensors = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        output = functional.sparse_conv2d(
            *tensors, padding=1, density=0.5, granularity="row", backend=backend, generator=torch.Generator().manual_seed(3)
        )
        output.square().sum().backward()
        found.append([tensor.grad for tensor in tensors])
    for one, two in zip(*found):
        assert one.is_contiguous()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_the_same_bits_twice(dtype, generator, many_splits):
    problem = ConvProblem.parse("n2c9h5w4k72r3s3p1")
    tensors = operands(problem, 0.5, dtype, generator)
    first, second = (backward(BACKEND, problem, *tensors, Pruning(granularity="row")) for _ in range(2))
    for one, two in zip(first, second):
        assert_bit_equal(one, two)


def test_chunks_and_tiles_do_not_change_results(generator, monkeypatch, many_splits):
    """Of integers: whatever the order of the pixels, and each tile of the tables."""
    problem = ConvProblem.parse("n2c20h6w5k72r3s1p1")
    input, weight, gradient = operands(problem, 0.5, torch.float32, generator, integer=True)
    rows = triton_backend.occupied(gradient)
    backend = backends.get_backend(BACKEND)
    wanted = [tensor.float() for tensor in oracle(problem, input, weight, gradient)]
    monkeypatch.setattr(triton_backend, "CHUNK_BYTES", 2**12)
    for tile in triton_tiles.AGB[4]:
        assert_bit_equal(backend.agb(problem, rows, weight, tile.fitted(64, problem.c)) + 0, wanted[0] + 0, str(tile))
    for tile in triton_tiles.WGC[4]:
        assert_bit_equal(backend.wgc(problem, rows, input, tile.fitted(64, 60)) + 0, wanted[1] + 0, str(tile))


def test_dropped_rows_are_not_computed(generator, monkeypatch):
    """Their products are what is saved: the lists of a tile have the steps that its pixels need, no others."""
    problem = ConvProblem.parse("n1c16h16w16k64r3s3p1")
    input, weight, gradient = operands(problem, 1.0, torch.float32, generator)
    gradient[:, :, 4:] = 0  # so the lower part of the image needs nothing but at its edge
    seen = {}
    backend = backends.get_backend(BACKEND)
    launch = backend._launch

    def record(name, grid, *arguments, **options):
        launch(name, grid, *arguments, **options)
        seen[name] = arguments

    monkeypatch.setattr(backend, "_launch", record)
    backend.gradients(problem, gradient, input, weight, (True, True))
    assert seen["wgc"][3].tolist() == [4 * 16]
    masks, steps, counts = seen["agb"][4:7]
    # Rows 0 to 4 of 16 see the upper part; the others are in the first tile of two, which has nothing to do.
    assert (masks != 0).sum() == 5 * 16
    assert counts.tolist()[0] == 0 and counts.sum() <= 9


def test_refused_problems_are_dense(generator, stats, caplog):
    problem = ConvProblem.parse("n2c6h5w4k8r3s3p1g2")
    tensors = operands(problem, 1.0, torch.float32, generator)
    with caplog.at_level("DEBUG", "sparsebwd"):
        results = backward(BACKEND, problem, *tensors, Pruning(density=0.5, granularity="row"))
    pruned = granularity.prune(tensors[2], torch.tensor([1, 2]), Pruning(density=0.5, granularity="row")).values
    for actual, expected in zip(results, convolution_backward(problem, pruned, *tensors[:2], (True, True))):
        assert_bit_equal(actual, expected)
    assert stats[-1].implementation == "dense"
    assert f"{problem} in torch.float32: no kernel in Triton, since it has groups" in caplog.text
    for text, reason in (
        ("n2c6h9w9k8r8s8", "its filter has more than 56 taps"),
        ("n65536c2h256w256k8r1s1", "it is larger than what the kernels count in 32 bits"),
    ):
        assert triton_backend.refusal(ConvProblem.parse(text)).startswith(reason)


def test_precision_is_that_of_cudnn():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        assert triton_backend.precision(torch.float32) == "tf32"
        convolutions.fp32_precision = "ieee"
        assert triton_backend.precision(torch.float32) == "tf32x3"
        assert triton_backend.precision(torch.bfloat16) == triton_backend.precision(torch.float16) == "ieee"
    finally:
        convolutions.fp32_precision = before


def test_tuning_verifies_before_it_times(generator, monkeypatch):
    """Only what is right is timed, the fastest is used from then on, and only for this problem."""
    problem = ConvProblem.parse("n2c20h6w5k72r3s1p1")
    monkeypatch.setattr(triton_tiles, "chosen", {})
    backend = InterpretedBackend()
    right, wrong_tile = backend.wgc, triton_tiles.wgc_tiles(problem, torch.float32, 64)[0]
    monkeypatch.setattr(backend, "wgc", lambda *args: right(*args) + (args[-1] == wrong_tile))
    timed = []

    def time(call):
        timed.append(call())
        return 10.0 - len(timed)

    found = triton_tune.tune(problem, kept=0.5, backend=backend, device="cpu", time=time)
    assert [candidate.wrong for candidate in found if candidate.tile == wrong_tile and candidate.kernel == "wgc"] == [True]
    assert [candidate.milliseconds for candidate in found if candidate.milliseconds] == [9.0 - i for i in range(len(timed))]
    for kernel, tiles in (
        ("agb", triton_tiles.agb_tiles(problem, torch.float32)),
        ("wgc", triton_tiles.wgc_tiles(problem, torch.float32, 64)),
    ):
        best = min((c for c in found if c.kernel == kernel and not c.wrong), key=lambda c: c.milliseconds)
        assert tiles[0] == best.tile and len(tiles) == sum(c.kernel == kernel for c in found)
    other = ConvProblem.parse("n3c20h6w5k72r3s1p1")
    assert triton_tiles.agb_tiles(other, torch.float32)[0] == triton_tiles.AGB[4][0].fitted(128, 20)
    monkeypatch.setattr(backend, "agb", lambda *args: torch.zeros(problem.input_size))
    with pytest.raises(RuntimeError, match="agb of n2c20.* no tile gives the right sums"):
        triton_tune.tune(problem, backend=backend, device="cpu", time=time)
    with pytest.raises(ValueError, match="problem: got n2c20.*; these kernels do not take it: it has groups"):
        triton_tune.tune(ConvProblem.parse("n2c20h6w5k72r3s1p1g2"), backend=backend)
