# SPDX-License-Identifier: Apache-2.0
"""The C++ below the raw operators of the CPU: the form of pruning that the convolutions call, which has no operator.

A small library compiled here calls it for every instruction set.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cpu_kernels import instruction_sets
from native import KEYS, assert_surroundings_kept, gradient, rounded

from sparsebwd import reference
from sparsebwd.backends import available_backends
from sparsebwd.testing import assert_bit_equal, fenced

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

RAW = torch.ops.sparsebwd_cpu
CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
ISA_FLAGS = instruction_sets()
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
        grad = gradient((1, channels, 1, pixels), dtype, torch.contiguous_format, channels)
        if tau == 1e-30:
            grad = (grad.double() * tau).to(dtype)
        expected = grad
        if tau is not None:
            # The row as a part of a tensor in which its pixels have these positions.
            whole = grad.new_zeros(n + 1, channels, h + 1, w + pixels)
            whole[n, :, h, w:] = grad[0, :, 0]
            pruned = reference.prune_at(whole, torch.tensor(key), rounded(tau, dtype))
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
                None if tau is None else ctypes.byref(ctypes.c_float(rounded(tau, dtype).item())),
                (ctypes.c_int64 * 2)(*key),
            )
            assert nonzeros == int(torch.count_nonzero(expected))
            for result, values in ((out, expected), (out_f32, expected.float())):
                if result is not None:
                    assert_bit_equal(result[:, :channels], values, f"{isa}, {channels} channels")
                    assert_surroundings_kept(result[:, :channels])


def test_columns_above_2_31(native, isas):
    """Positions are unsigned 32-bit numbers; the last columns of a row carry over from none."""
    channels, pixels, first = 64, 3, 2**32 - 3
    grad = gradient((pixels, channels), torch.float32, torch.contiguous_format, 0)
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
