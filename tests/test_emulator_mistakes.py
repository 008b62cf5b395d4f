# SPDX-License-Identifier: Apache-2.0
"""Kernels with a mistake that the emulator must find."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator_kernels import (  # noqa: F401
    HERE,
    SEEDS,
    Kernels,
    aligned,
    checked_fixture,
    integers,
    kernels_fixture,
    place,
    rng_fixture,
    variant_fixture,
)

pytestmark = pytest.mark.slow  # it compiles


# ---- mistakes that both builds find, whatever the order

FOUND = [
    ("wrong_mask, without the caller", {"block": 32}, "__shfl_sync with mask 0x0000ffff at .*lacks the lane that calls"),
    ("wrong_mask, reads another lane", {"block": 32}, "reads lane 20, which is not in the mask"),
    ("wrong_mask, different masks", {"block": 32}, "waits for lanes that wait for it in|lacks the lane that calls"),
    ("wrong_mask, different calls", {"block": 32}, "waits for lanes that wait for it in"),
    ("wrong_mask, width", {"block": 32}, "width is not a power of two"),
    ("sum_some_lanes, full mask", {"block": 64, "n": 5}, "names lanes that have returned|returns, while others wait"),
    ("divergent_barrier", {"n": 40, "block": 64}, "is at the __syncthreads at .* waits in that at"),
    ("deadlock", {"n": 64, "block": 128}, r"deadlock.*\n.*63 more: waits in __syncthreads at .*\n.*63 more: waits in named_barrier 1"),
    ("hand_over, other number of threads", {"n": 1, "block": 64, "shared": 128}, "is for (32|64) threads here, for"),
    ("number_a_barrier", {"n": 16, "block": 32}, "barriers 1 to 15"),
    ("poll, never set", {"block": 64, "initialised": True}, "no thread gets any further"),
    ("sum_of_grid", {"grid": 1, "block": 64}, "grid_sync at .* in a launch that is not cooperative"),
    ("copy_part", {"block": 1, "n": 17, "shared": 16}, "cp_async16 at .*not in 0 ... 16"),
    ("copy_part", {"block": 1, "n": 16, "shared": 12}, "cp_async16 at .*not in the block's shared memory"),
    ("fill_shared, no bound", {"block": 128, "n": 100, "shared": 400}, "shared memory"),
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, launch, words", FOUND, ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_found(kernels, name, launch, words, seed):
    launch = {"n": 0, "seed": seed} | launch
    with pytest.raises(RuntimeError, match=words) as caught:
        kernels.run(name, aligned(np.arange(-64, 64, dtype=np.int32)), np.zeros(128, np.int32), **launch)
    assert re.match(rf"kernel {re.split('[, ]', name)[0]}\b", str(caught.value))
    # What comes after is not affected.
    assert kernels.run("count", None, np.zeros(1, np.int32), 0, initialised=True) == 256


def test_misaligned_copies(kernels):
    values = aligned(np.zeros(8, np.int32))[1:5]
    with pytest.raises(RuntimeError, match="the global address is not a multiple of 16 bytes"):
        kernels.run("copy_part", values, np.zeros(4, np.int32), 16, block=1, shared=16)


# ---- missing barriers: results differ from the right ones for some order of threads

MISSING = [
    ("sum_in_shared, no barrier in the loop", {"n": 256, "shared": 1024}),
    ("scan, no barrier", {"n": 256, "shared": 32}),
    ("reverse_tiles, no barrier at the end of the loop", {"n": 3, "shared": 1024}),
    ("reverse_warps, no barrier", {"n": 0, "shared": 1024}),
    ("reverse_tiles_async, no wait", {"n": 3, "block": 64, "shared": 2048}),
    ("reverse_tiles_async, no barrier at the end", {"n": 3, "block": 64, "shared": 2048}),
]
EXPECTED = {
    "sum_in_shared": lambda x: x[:1, :256].astype(np.float32).sum(1),
    "scan": lambda x: x[0].cumsum(),
    "reverse_tiles": lambda x: x[:, ::-1],
    "reverse_warps": lambda x: x[0].reshape(8, 32)[:, ::-1].reshape(-1),
    "reverse_tiles_async": lambda x: x[:, ::-1],
}


@pytest.mark.parametrize("name, launch", MISSING, ids=lambda value: value if isinstance(value, str) else "")
def test_missing_barriers_show(rng, name, launch):
    kernels = Kernels("fast")
    right = name.partition(",")[0]
    values = integers(rng, 3, 256)
    expected = EXPECTED[right](values)
    source = values.astype(np.float32) if right == "sum_in_shared" else values

    def correct(kernel, seed):
        out = np.zeros(expected.shape, source.dtype)
        return np.array_equal(kernels.run(kernel, aligned(source.reshape(-1)), out, seed=seed, **launch), expected)

    assert all(correct(right, seed) for seed in range(10))
    assert not all(correct(name, seed) for seed in range(10))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, launch", MISSING, ids=lambda value: value if isinstance(value, str) else "")
def test_missing_barriers_are_found(checked, rng, name, launch, seed):
    values = integers(rng, 3, 256)
    source = values.astype(np.float32) if "sum" in name else values
    out = np.zeros(768, source.dtype)
    # Which of these comes first depends on the order of threads.
    words = "a race with thread .* with no barrier between|nothing was written there|copies to them asynchronously"
    with pytest.raises(RuntimeError, match=words) as caught:
        checked.run(name, aligned(source.reshape(-1)), out, seed=seed, **launch)
    places = re.findall(r"\S+\.(?:cu|h):\d+", str(caught.value))
    assert places and all(re.match(r"emulator_kernels\.cu:", found) for found in places)


# ---- memory, in the checked build

MEMORY = [
    ("write_global, below", {"n": 64}, "writes 4 bytes 4 bytes before out at {}: that is out of bounds", "kBelow) out"),
    ("write_global, above", {"n": 64}, "writes 4 bytes at offset 256 of out, which has 256 bytes, at {}", "kAbove) out"),
    ("write_global, far above", {"n": 64}, "writes 4 bytes at address .* at {}", "kFarAbove) out"),
    ("write_global, null", {"n": 64}, "writes 4 bytes at address 0x0 at {}: that is out of bounds|null pointer", "static_cast<uintptr_t>(a.n - blockDim.x)"),
    ("write_global, input", {"n": 64}, "writes 4 bytes of in at {}: it is an input", "kInput) const"),
    ("copy_global, no bound", {"n": 64, "grid": 2}, "reads 4 bytes at offset (256|3..|4..|5..) of in, which has 256 bytes, at {}", "out<int>(a)[i] = in<int>(a)[i];"),
    ("rotate, no bound", {"n": 64, "shared": 256}, "reads 4 bytes at offset 256 of the block's shared memory, which has 256 bytes, at {}", "next == a.n"),
    ("fill_shared, no bound", {"n": 62, "shared": 248}, "writes 4 bytes at offset (248|252) of the block's shared memory, which has 248 bytes, at {}", "< a.n) shared<int>()[thread] = thread;"),
    ("histogram, not initialised", {"n": 0, "shared": 256}, "updates 4 bytes of shared memory at .*: nothing was written there", ""),
    ("accumulate, not initialised", {"n": 0}, "reads 4 bytes out at {}: nothing was written there", "(a)[threadIdx.x] += in"),
    ("count, not atomic", {"n": 0, "initialised": True}, "bytes out at {}: a race with thread", "(a)[0] += 1"),
    ("count, not atomic", {"n": 0, "initialised": True, "block": 1, "grid": 2}, "bytes out at {}: a race with thread", "(a)[0] += 1"),
    ("copy_vectors", {"n": 2, "block": 8}, "undefined behaviour at {}: a misaligned access", "= from[threadIdx.x]"),
    ("look_up", {"n": 0}, "undefined behaviour at {}: an index is outside its array", "return table[index]"),
    ("shift", {"n": 0}, "undefined behaviour at {}: a shift by too much", "1 << in"),
    ("sum_of_grid, no barrier", {"n": 0, "grid": 4, "block": 16, "cooperative": True}, "reads 4 bytes out at .*: (a race with|nothing was written there)", ""),
]  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, launch, words, line", MEMORY, ids=lambda value: value if isinstance(value, str) else "")
def test_memory_mistakes_are_found(checked, name, launch, words, line, seed):
    launch = {"seed": seed, "block": 64} | launch
    with pytest.raises(RuntimeError, match=words.format(place(line) if line else "")):
        checked.run(name, aligned(np.arange(64, dtype=np.int32)), aligned(np.zeros(64, np.int32)), **launch)


def test_mistakes_of_host_code_are_found(checked):
    with pytest.raises(RuntimeError, match=rf"undefined behaviour at {place('return n + 2')}: a signed sum overflows"):
        checked.run("indices", None, np.zeros(1, np.int32), 2**30, block=1)
    assert checked.run("indices", None, np.ones(1, np.int32), 0, block=1) == 0
