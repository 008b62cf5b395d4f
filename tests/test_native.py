# SPDX-License-Identifier: Apache-2.0
"""The raw operators torch.ops.sparsebwd_cpu.* and the C++ below them, against the reference.

Tests marked "isa" run again for each instruction set (test_isa.py). The form of pruning that the
convolutions call has no operator: a small library compiled here calls it for every instruction set.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import instruction_sets

from sparsebwd import reference
from sparsebwd.backends import available_backends
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, fenced, random_tensor

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

RAW = torch.ops.sparsebwd_cpu
CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
ISA_FLAGS = instruction_sets()
KEYS = [(0, 0), (-1, 2**63 - 1), (0x123456789ABCDEF, -0x76543210FEDCBA98)]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38]


def _gradient(shape, dtype, memory_format, seed, special=False):
    generator = torch.Generator().manual_seed(seed)
    grad = random_tensor(
        shape, generator=generator, dtype=dtype, memory_format=memory_format, density=0.9
    )
    if special and grad.numel() >= len(SPECIAL):
        positions = torch.randperm(grad.numel(), generator=generator)[: len(SPECIAL)]
        index = np.unravel_index(positions.numpy(), shape)
        grad[tuple(map(torch.from_numpy, index))] = torch.tensor(SPECIAL).to(dtype)
    return grad


def _assert_surroundings_kept(tensor):
    """Nothing but the elements of ``tensor`` was written in its storage, which was all NaN."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    written = ~storage.isnan()
    inside = torch.zeros_like(written)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    assert not (written & ~inside).any()


def _rounded(tau, dtype):
    return torch.tensor(tau).to(dtype).float()


# ---- prune

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 4, 1, 1),
    (5, 10, 1, 1),
    (2, 5, 1, 9),
    (1, 8, 2, 33),
    (2, 16, 4, 4),
    (1, 17, 3, 2),
    (1, 31, 2, 15),
    (1, 32, 1, 70),
    (3, 48, 7, 7),
    (2, 64, 8, 8),
    (1, 96, 3, 5),
    (1, 127, 2, 3),
    (2, 130, 2, 2),
    (1, 4, 97, 101),
    (1, 9, 130, 65),
    (2, 260, 4, 4),
    (0, 4, 3, 3),
    (2, 0, 3, 3),
    (2, 4, 0, 3),
]
TAUS = [(shape, tau) for shape in SHAPES for tau in (0.0, 1.25, 3e38)]
# Below the range in which the vector kernels compute.
TAUS += [(shape, tau) for shape in [(2, 5, 1, 9), (2, 64, 8, 8)] for tau in (1e-30, 1e-39)]


@pytest.mark.isa
@pytest.mark.parametrize("shape, tau", TAUS, ids=str)
def test_prune(shape, tau, dtype, memory_format):
    seed = SHAPES.index(shape)
    grad = fenced(_gradient(shape, dtype, memory_format, seed, special=True))
    if 0 < tau < 1e-20:
        grad = (grad.double() * tau).to(dtype)
    threshold = _rounded(tau, dtype)
    key = torch.tensor(KEYS[seed % len(KEYS)])
    expected = reference.prune_at(grad, key, threshold)

    out = fenced(torch.full_like(grad, math.nan))
    nonzeros = RAW.prune(grad, key, threshold.item(), out)
    assert_bit_equal(out, expected)
    assert nonzeros == int(torch.count_nonzero(expected))
    _assert_surroundings_kept(out)

    assert RAW.prune(grad, key, threshold.item(), grad) == nonzeros  # in place
    assert_bit_equal(grad, expected)


@pytest.mark.isa
def test_prune_does_not_depend_on_threads_or_layout(dtype):
    grad = _gradient((3, 72, 45, 37), dtype, torch.contiguous_format, 1)
    key = torch.tensor(KEYS[2])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for layout in (torch.contiguous_format, torch.channels_last):
                out = torch.empty_like(grad, memory_format=layout)
                nonzeros = RAW.prune(grad.contiguous(memory_format=layout), key, 1.25, out)
                results.append((nonzeros, out))
    finally:
        torch.set_num_threads(threads)
    for nonzeros, out in results[1:]:
        assert nonzeros == results[0][0]
        assert_bit_equal(out, results[0][1])


# ---- abs_sum


def _defined_sum(values: np.ndarray) -> float:
    """The sum as csrc/cpu/prune*.h define it: 32 partial sums in each chunk, chunks in order."""
    total = 0.0
    for chunk in np.split(values, range(16384, len(values), 16384)):
        partial = np.zeros(32)
        for row in np.pad(chunk, (0, -len(chunk) % 32)).reshape(-1, 32):
            partial += row
        while len(partial) > 1:
            partial = partial[: len(partial) // 2] + partial[len(partial) // 2 :]
        total += partial[0]
    return total


@pytest.mark.isa
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000, 16384, 16385, 100_003])
def test_abs_sum_has_the_bits_of_its_definition(count, dtype):
    grad = fenced(_gradient((count,), dtype, torch.contiguous_format, count))
    magnitudes = grad.double().abs().numpy()
    total, nonzeros = RAW.abs_sum(grad)
    assert total == _defined_sum(magnitudes)
    assert nonzeros == np.count_nonzero(magnitudes)
    assert abs(total - math.fsum(magnitudes)) <= 1e-12 * total


@pytest.mark.isa
def test_abs_sum_does_not_depend_on_threads(dtype):
    grad = _gradient((4, 64, 33, 31), dtype, torch.channels_last, 3)
    threads = torch.get_num_threads()
    try:
        results = set()
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.add(RAW.abs_sum(grad))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_abs_sum_shows_what_is_not_finite(value, dtype):
    for position in (0, 40, 69):
        grad = torch.ones(70, dtype=dtype)
        grad[position] = value
        total, nonzeros = RAW.abs_sum(grad)
        assert math.isnan(total) if math.isnan(value) else total == math.inf
        assert nonzeros == 70


# ---- the density to expect


@pytest.mark.isa
@pytest.mark.parametrize("taus_per_mean", [0.0, 0.4, 1.6])
@pytest.mark.parametrize("count", [1, 1000, 127 * 32, 127 * 32 + 5, 100_003])
def test_expected_density_is_that_of_a_fixed_sample(count, taus_per_mean, dtype):
    grad = _gradient((1, 1, 1, count), dtype, torch.contiguous_format, count)
    before = grad.clone()
    sampled = grad if count <= 127 * 32 else grad.as_strided((127, 32), (count // 127, 1))
    magnitudes = sampled.double().abs()
    tau = magnitudes.mean() * taus_per_mean
    expected = (magnitudes / tau).clamp(max=1) if taus_per_mean else magnitudes.ne(0).double()
    assert RAW.expected_density(grad, taus_per_mean) == pytest.approx(expected.nan_to_num(0.0).mean().item(), abs=1e-6)
    assert_bit_equal(grad, before)


@pytest.mark.isa
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_expected_density_where_nothing_can_be_pruned(value, dtype):
    grad = torch.zeros(200, dtype=dtype)
    assert RAW.expected_density(grad, 1.0) == RAW.expected_density(grad[:0], 1.0) == 0.0
    grad[3] = value
    assert RAW.expected_density(grad, 1.0) == 1.0
    assert RAW.expected_density(grad, 0.0) == pytest.approx(1 / 200)


# ---- copy_layout


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("to", [torch.channels_last, torch.contiguous_format], ids=["nchw to nhwc", "nhwc to nchw"])
def test_copy_layout(shape, to):
    other = torch.contiguous_format if to is torch.channels_last else torch.channels_last
    source = random_tensor(shape, generator=torch.Generator().manual_seed(0), memory_format=other)
    out = fenced(torch.full(shape, float("nan")).contiguous(memory_format=to))
    RAW.copy_layout(fenced(source), out)
    assert_bit_equal(out, source)
    _assert_surroundings_kept(out)


# ---- conv2d_backward


def _conv2d_backward(problem, grad_output, input=None, weight=None):
    """(grad_input if there is a weight, grad_weight if there is an input) by the raw operator."""
    grad_input = grad_weight = None
    if weight is not None:
        grad_input = torch.empty(problem.input_size, memory_format=torch.channels_last).to(grad_output.dtype)
    if input is not None:
        grad_weight = torch.empty(problem.weight_size, dtype=input.dtype)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    RAW.conv2d_backward(
        grad_output, input, weight, problem.input_size, problem.weight_size, *geometry,
        None, 0.0, None, grad_input, grad_weight,
    )  # fmt: skip
    return grad_input, grad_weight


def _channels_last(size, seed, dtype=torch.float32, density=1.0):
    generator = torch.Generator().manual_seed(seed)
    return random_tensor(
        size, generator=generator, dtype=dtype, density=density, integer=True, memory_format=torch.channels_last
    )


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", ["n2c35h5w6k20r3s3p1", "n2c70h4w4k33r1s1", "n2c12h5w5k10r3s2g2"])
def test_weights_of_any_strides(text, dtype):
    problem = ConvProblem.parse(text)
    grad_output = _channels_last(problem.output_size, 0, dtype, density=0.5)
    weight = _channels_last(problem.weight_size, 1, dtype)
    expected = reference.conv2d_input(problem, weight, grad_output).to(dtype)
    for same in (weight, weight.contiguous(), weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert_bit_equal(_conv2d_backward(problem, grad_output, weight=same)[0], expected)


@pytest.mark.isa
@pytest.mark.parametrize("c, w", [(1, 5459), (3, 1818), (2, 2728)])
def test_packed_panel_that_fills_all_its_bytes(c, w):
    """What gathering the last pixel stores behind the panel is not part of the sums."""
    problem = ConvProblem.parse(f"n1c{c}h6w{w}k4r3s3p1")
    grad_output = _channels_last(problem.output_size, 0, density=0.5)
    input = _channels_last(problem.input_size, 1)
    expected = reference.conv2d_weight(problem, input, grad_output).float()
    assert_bit_equal(_conv2d_backward(problem, grad_output, input=input)[1], expected)


def test_groups_of_images_that_depend_on_threads_do_not_change_results():
    """Lists are about as long here as where their order changes, and chunks are no multiple of tiles."""
    problem = ConvProblem.parse("n24c256h8w8k256r3s3p1")
    generator = torch.Generator().manual_seed(0)
    grad_output, input, weight = (
        random_tensor(size, generator=generator, density=density, memory_format=torch.channels_last)
        for size, density in ((problem.output_size, 0.1875), (problem.input_size, 1.0), (problem.weight_size, 1.0))
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_conv2d_backward(problem, grad_output, input, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert_bit_equal(one, two)


# ---- bad input

GOOD_KEY = torch.tensor([1, 2])
GOOD = torch.ones(2, 4, 3, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RAW.abs_sum(GOOD.double()), "g: got a tensor of dtype Double, accepted"),
        (lambda: RAW.abs_sum(GOOD[..., ::2]), "g: got strides .* accepted are contiguous"),
        (lambda: RAW.abs_sum(GOOD.to("meta")), "g: got a tensor on another device"),
        (lambda: RAW.expected_density(GOOD[..., ::2], 1.0), "g: got strides .* accepted are contiguous"),
        (lambda: RAW.expected_density(GOOD, -1.0), "taus_per_mean: got -1, accepted are finite"),
        (lambda: RAW.copy_layout(GOOD.double(), GOOD), "src: got Double .* accepted is Float"),
        (lambda: RAW.copy_layout(GOOD, GOOD[0]), "out: got Float of shape .* of 4 dimensions"),
        (lambda: RAW.copy_layout(GOOD, GOOD[:1]), r"out: got shape \[1, 4, 3, 5\], accepted is that of src"),
        (lambda: RAW.copy_layout(GOOD, GOOD.clone()), "src, out: got strides .* one contiguous and one channels_last"),
        (lambda: RAW.prune(GOOD.half(), GOOD_KEY, 1.0, GOOD.half()), "g: got a tensor of dtype Half"),
        (lambda: RAW.prune(GOOD[0], GOOD_KEY, 1.0, GOOD[0]), "g: got 3 dimensions, accepted are 4"),
        (lambda: RAW.prune(GOOD[:, ::2], GOOD_KEY, 1.0, GOOD[:, ::2]), "g: got strides"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD[:1]), r"out: got Float of shape \[1, 4, 3, 5\]"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD.bfloat16()), "out: got BFloat16 of shape"),
        (
            lambda: RAW.prune(GOOD, GOOD_KEY, 1.0, GOOD.to(memory_format=torch.channels_last)),
            "out: got Float .* accepted are those of g",
        ),
        (lambda: RAW.prune(GOOD, GOOD_KEY.int(), 1.0, GOOD), "key: got Int of shape"),
        (lambda: RAW.prune(GOOD, GOOD_KEY[:1], 1.0, GOOD), r"key: got Long of shape \[1\], accepted"),
        (lambda: RAW.prune(GOOD, GOOD_KEY.to("meta"), 1.0, GOOD), "key: got a tensor on another"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, -1.0, GOOD), "tau: got -1, accepted are finite"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, math.nan, GOOD), "tau: got nan"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, math.inf, GOOD), "tau: got inf"),
        (lambda: RAW.prune(GOOD, GOOD_KEY, 0.1, GOOD), "tau: got 0.1, .* g's dtype represents"),
        (
            lambda: RAW.prune(GOOD.bfloat16(), GOOD_KEY, 1.001953125, GOOD.bfloat16()),
            "tau: got 1.00195",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_unknown_instruction_set():
    program = "import torch, sparsebwd._C; torch.ops.sparsebwd_cpu.isa()"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SPARSEBWD_MAX_ISA": "avx1024"},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    *others, last = instruction_sets()
    message = f"SPARSEBWD_MAX_ISA: got 'avx1024', accepted are {', '.join(others)} and {last}"
    assert message in process.stderr


# ---- below the operators

LIBRARY = r"""
#include <string.h>
#include "prune_kernels.h"
using namespace sparsebwd;

static const PruneKernels& kernels(const char* isa) {
#ifdef HAVE_avx2
  if (!strcmp(isa, "avx2")) return prune_kernels_avx2;
#endif
#ifdef HAVE_avx512
  if (!strcmp(isa, "avx512")) return prune_kernels_avx512;
#endif
#ifdef HAVE_neon
  if (!strcmp(isa, "neon")) return prune_kernels_neon;
#endif
  return prune_kernels_baseline;
}

extern "C" {
void philox(int rounds, const uint32_t* c, const uint32_t* k, uint32_t* out) {
  const PhiloxCounter counter = {{c[0], c[1], c[2], c[3]}};
  const PhiloxKey key = {{k[0], k[1]}};
  const PhiloxCounter words = rounds == 7 ? philox4x32(counter, key) : philox4x32<10>(counter, key);
  memcpy(out, words.word, sizeof(words.word));
}
void to_bfloat16(const float* in, uint16_t* out, float* back, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bfloat16_of_float(in[i]);
    back[i] = float_of_bfloat16(out[i]);
  }
}
int64_t row(const char* isa, const void* g, int dtype, int64_t pixel_stride, void* out,
            float* out_f32, int64_t f32_stride, uint32_t n, uint32_t h, uint32_t w, int64_t pixels,
            int64_t channels, const float* tau, const int64_t* key) {
  const DType type = static_cast<DType>(dtype);
  if (!tau)
    return kernels(isa).load_pixels_nhwc(g, type, pixel_stride, out, out_f32, f32_stride, pixels,
                                         channels);
  return kernels(isa).prune_pixels_nhwc(g, type, pixel_stride, out, out_f32, f32_stride, n, h, w,
                                        pixels, channels, make_prune_spec(*tau, key[0], key[1]));
}
}
"""


@pytest.fixture(scope="module")
def isas() -> list[str]:
    return RAW.supported_isas()


@pytest.fixture(scope="module")
def native(isas, tmp_path_factory) -> ctypes.CDLL:
    """The kernels of all instruction sets of this machine, with the C functions of LIBRARY."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip(f"no C++ compiler is found as {COMPILER[0]}")
    folder = tmp_path_factory.mktemp("native")
    (folder / "library.cpp").write_text(LIBRARY)
    common = [*COMPILER, "-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra"]
    common += ["-Wno-uninitialized", "-I", str(CSRC / "include"), "-I", str(CSRC / "cpu")]
    sources = {isa: CSRC / "cpu" / f"prune_{isa}.cpp" for isa in isas}
    flags = {isa: ISA_FLAGS[isa] for isa in isas}
    sources["library"], flags["library"] = folder / "library.cpp", [f"-DHAVE_{isa}" for isa in isas]
    objects = []
    for name, source in sources.items():
        objects.append(str(folder / f"{name}.o"))
        command = [*common, *flags[name], "-c", str(source), "-o", objects[-1]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    library = str(folder / "library.so")
    subprocess.run([*COMPILER, "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(library)
    loaded.row.restype = ctypes.c_int64
    loaded.objects = dict(zip(sources, objects))
    return loaded


# The known answers of the authors' library, Random123 (kat_vectors).
@pytest.mark.parametrize(
    "rounds, counter, key, expected",
    [
        (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            7,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(native, rounds, counter, key, expected):
    words = np.zeros(4, np.uint32)
    arguments = [np.array(values, np.uint32) for values in (counter, key)]
    native.philox(rounds, *(a.ctypes.data_as(ctypes.c_void_p) for a in (*arguments, words)))
    assert words.tolist() == expected


def test_bfloat16_conversion(native):
    """Every bfloat16, and the values halfway to its neighbours and next to those."""
    bits = torch.arange(2**16).view(-1, 1) * 2**16 + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001])
    values = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32).flatten()
    out, back = torch.empty(values.shape, dtype=torch.bfloat16), torch.empty(values.shape)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (values, out, back)]
    native.to_bfloat16(*pointers, ctypes.c_int64(values.numel()))
    numbers = ~values.isnan()
    assert_bit_equal(out[numbers], values[numbers].bfloat16())
    assert out[~numbers].isnan().all()
    assert_bit_equal(back, out.float())


def _pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _random_row(rng):
    channels = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 20, 31, 32, 33, 64, 96, 127, 128, 131, 256])
    return channels, rng.choice([1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 65, 130])


@pytest.mark.parametrize("tau", [None, 0.0, 0.75, 1e-30])
def test_rows(native, isas, tau, dtype):
    """Any stride between pixels, and every choice of outputs; gaps stay as they are."""
    rng = random.Random(f"{tau} {dtype}")
    for _ in range(40):
        channels, pixels = _random_row(rng)
        n, h, w = rng.randrange(3), rng.randrange(4), rng.randrange(5)
        stride, f32_stride = channels + rng.choice([0, 0, 5]), channels + rng.choice([0, 0, 3])
        wants_out, wants_f32 = rng.choice([(True, True), (True, False), (False, True)])
        key = rng.choice(KEYS)
        grad = _gradient((1, channels, 1, pixels), dtype, torch.contiguous_format, channels)
        if tau == 1e-30:
            grad = (grad.double() * tau).to(dtype)
        expected = grad
        if tau is not None:
            # The row as a part of a tensor in which its pixels have these positions.
            whole = grad.new_zeros(n + 1, channels, h + 1, w + pixels)
            whole[n, :, h, w:] = grad[0, :, 0]
            pruned = reference.prune_at(whole, torch.tensor(key), _rounded(tau, dtype))
            expected = pruned[n : n + 1, :, h : h + 1, w:]
        expected = expected[0, :, 0].T.contiguous()
        source = fenced(torch.full((pixels, stride), math.nan, dtype=dtype))
        source[:, :channels] = grad[0, :, 0].T
        for isa in isas:
            out = fenced(torch.full_like(source, math.nan)) if wants_out else None
            out_f32 = fenced(torch.full((pixels, f32_stride), math.nan)) if wants_f32 else None
            nonzeros = native.row(
                isa.encode(),
                _pointer(source),
                int(dtype == torch.bfloat16),
                ctypes.c_int64(stride),
                _pointer(out),
                _pointer(out_f32),
                ctypes.c_int64(f32_stride),
                *map(ctypes.c_uint32, (n, h, w)),
                *map(ctypes.c_int64, (pixels, channels)),
                None if tau is None else ctypes.byref(ctypes.c_float(_rounded(tau, dtype).item())),
                (ctypes.c_int64 * 2)(*key),
            )
            assert nonzeros == int(torch.count_nonzero(expected))
            for result, values in ((out, expected), (out_f32, expected.float())):
                if result is not None:
                    assert_bit_equal(result[:, :channels], values, f"{isa}, {channels} channels")
                    _assert_surroundings_kept(result[:, :channels])


def test_columns_above_2_31(native, isas):
    """Positions are unsigned 32-bit numbers; the last columns of a row carry over from none."""
    channels, pixels, first = 64, 3, 2**32 - 3
    grad = _gradient((pixels, channels), torch.float32, torch.contiguous_format, 0)
    results = []
    for isa in isas:
        out = torch.empty_like(grad)
        native.row(
            isa.encode(), _pointer(grad), 0, ctypes.c_int64(channels), _pointer(out), None,
            ctypes.c_int64(0), *map(ctypes.c_uint32, (2**32 - 1, 2**31, first)),
            *map(ctypes.c_int64, (pixels, channels)), ctypes.byref(ctypes.c_float(1.0)),
            (ctypes.c_int64 * 2)(*KEYS[2]),
        )
        results.append(out)
    words = [
        reference.philox4x32(
            (
                torch.tensor((first + x) ^ (KEYS[2][1] & 0xFFFFFFFF)),
                torch.tensor(2**31 ^ (KEYS[2][1] >> 32 & 0xFFFFFFFF)),
                torch.tensor(2**32 - 1),
                torch.arange(channels // 4),
            ),
            (torch.tensor(KEYS[2][0] & 0xFFFFFFFF), torch.tensor(KEYS[2][0] >> 32 & 0xFFFFFFFF)),
        )
        for x in range(pixels)
    ]
    r = torch.stack([torch.stack(w, dim=1).flatten() for w in words]) / 2**32
    pruned = torch.where(grad.abs() > (r * 2**24).floor() / 2**24, grad.sign(), 0.0)
    expected = torch.where(grad.abs() < 1, pruned, grad)
    for isa, result in zip(isas, results):
        assert_bit_equal(result, expected, isa)


def test_objects_of_an_instruction_set_export_their_table_only(native, isas):
    """An inline function emitted here could replace the one that older CPUs must run."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not found")
    for isa in isas:
        listing = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "-j", native.objects[isa]],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        assert [name for name in listing if f"prune_kernels_{isa}" not in name] == []
