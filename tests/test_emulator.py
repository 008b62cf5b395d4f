# SPDX-License-Identifier: Apache-2.0
"""The emulator itself: kernels that must give the right result, those of the package, and the compiler's sanitizers."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import emulation
import numpy as np
import pytest
import torch
from emulator_kernels import (  # noqa: F401
    DEVICE,
    HERE,
    SEEDS,
    Kernels,
    aligned,
    integers,
    kernels_fixture,
    rng_fixture,
    variant_fixture,
)

from sparsebwd.problem import ConvProblem

pytestmark = pytest.mark.slow  # it compiles


# ---- right kernels


@pytest.mark.parametrize("seed", SEEDS)
def test_sums(kernels, rng, seed):
    values = rng.integers(-9, 9, 1000).astype(np.float32)
    out = np.full(1, np.nan, np.float32)
    assert kernels.run("sum_by_shuffles", values, out, 1000, shared=32, seed=seed) == values.sum()
    assert kernels.run("sum_in_shared", values, out, 200, shared=1024, seed=seed) == values[:200].sum()
    zero = np.zeros(1, np.float32)
    assert kernels.run("sum_by_atomics", values, zero, 1000, grid=3, block=96, seed=seed, initialised=True) == values.sum()
    count = np.zeros(1, np.int32)
    assert kernels.run("count", None, count, 0, grid=3, block=96, seed=seed, initialised=True) == 3 * 96


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 100, 256])
def test_scan(kernels, rng, n, seed):
    values = integers(rng, n)
    out = np.zeros(n, np.int32)
    np.testing.assert_array_equal(kernels.run("scan", values, out, n, shared=32, seed=seed), values.cumsum())


@pytest.mark.parametrize("seed", SEEDS)
def test_tiles(kernels, rng, seed):
    values = integers(rng, 5, 256)
    out = kernels.run("reverse_tiles", values, np.zeros_like(values), 5, shared=1024, seed=seed)
    np.testing.assert_array_equal(out, values[:, ::-1])
    out = kernels.run("reverse_tiles_async", values, np.zeros_like(values), 5, block=64, shared=2048, seed=seed)
    np.testing.assert_array_equal(out, values[:, ::-1])
    out = kernels.run("reverse_warps", values, np.zeros_like(values[0]), 0, shared=1024, seed=seed)
    np.testing.assert_array_equal(out, values[0].reshape(8, 32)[:, ::-1].reshape(-1))


@pytest.mark.parametrize("size", [0, 4, 12, 16])
def test_asynchronous_copies_fill_with_zeros(kernels, rng, size):
    values = integers(rng, 8)[:4]
    aligned = np.zeros(8, np.int32)
    start = -aligned.ctypes.data % 16 // 4
    aligned[start : start + 4] = values
    out = kernels.run("copy_part", aligned[start : start + 4], np.full(4, -1, np.int32), size, block=1, shared=16)
    np.testing.assert_array_equal(out, np.where(np.arange(4) < size // 4, values, 0))


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers(kernels, rng, seed):
    values = integers(rng, 6, 64)
    out = kernels.run("hand_over", values, np.zeros_like(values), 6, block=128, shared=256, seed=seed)
    np.testing.assert_array_equal(out, values[:, ::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_votes(kernels, rng, seed):
    values = rng.integers(-3, 4, 64, dtype=np.int32)
    values[:32] = np.maximum(values[:32], 1)
    names = "ballot match match_all sum least most and or xor any all count or_ and_ from_seven signed_least".split()
    out = kernels.run("vote", values, np.zeros((64, 16), np.uint32), 0, block=64, seed=seed)
    found = {name: out[:, i] for i, name in enumerate(names)}
    lanes = values.reshape(2, 32)
    bits = lanes.view(np.uint32)

    def mask(which):
        return (which.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(-1).astype(np.uint32)

    def for_each_lane(of_warp):
        return np.repeat(np.asarray(of_warp).astype(np.uint32), 32)

    expected = {
        "ballot": for_each_lane(mask(lanes > 0)),
        "match": np.concatenate([mask(warp[:, None] == warp) for warp in lanes]),
        "match_all": for_each_lane([0, 0]),
        "sum": for_each_lane(bits.sum(1, dtype=np.uint32)),
        "least": for_each_lane(bits.min(1)),
        "most": for_each_lane(bits.max(1)),
        "and": for_each_lane(np.bitwise_and.reduce(bits, 1)),
        "or": for_each_lane(np.bitwise_or.reduce(bits, 1)),
        "xor": for_each_lane(np.bitwise_xor.reduce(bits, 1)),
        "any": for_each_lane((lanes > 2).any(1)),
        "all": for_each_lane((lanes > 0).all(1)),
        "count": np.full(64, (values > 0).sum()),
        "or_": np.full(64, (values > 2).any()),
        "and_": np.full(64, (values > 0).all()),
        "from_seven": np.repeat(values.reshape(8, 8)[:, 7], 8).view(np.uint32),
        "signed_least": for_each_lane(lanes.min(1).view(np.uint32)),
    }
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    same = kernels.run("vote", np.full(64, 7, np.int32), np.zeros((64, 16), np.uint32), 0, block=64, seed=seed)
    assert (same[:, 2] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_of_warps(kernels, rng, seed):
    values = integers(rng, 64)
    out = kernels.run("sum_some_lanes", values, np.zeros(64, np.int32), 5, block=64, seed=seed)
    expected = np.zeros((2, 32), np.int32)
    expected[:, :5] = values.reshape(2, 32)[:, :5].sum(1, keepdims=True)
    np.testing.assert_array_equal(out, expected.reshape(-1))
    out = kernels.run("sum_halves", values, np.zeros(64, np.int32), 0, block=64, seed=seed)
    np.testing.assert_array_equal(out, np.repeat(values.reshape(4, 16).sum(1), 16))


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_returned_are_not_waited_for(kernels, rng, seed):
    values = integers(rng, 100)
    out = kernels.run("some_return", values, np.zeros(100, np.int32), 100, shared=1024, seed=seed)
    np.testing.assert_array_equal(out, values[::-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_polling(kernels, seed):
    assert kernels.run("poll", None, np.zeros(1, np.uint32), 0, block=64, seed=seed, initialised=True) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_grids(kernels, rng, seed):
    values = rng.integers(0, 2, (4, 64), dtype=np.int32)
    sizes = {"grid": 4, "block": 64, "seed": seed}
    out = kernels.run("sum_of_grid", values, np.zeros(8, np.int32), 0, cooperative=True, **sizes)
    np.testing.assert_array_equal(out, [*[values.sum()] * 4, *values.sum(1)])
    out = kernels.run("last_block_sums", values, np.zeros(6, np.int32), 0, initialised=True, **sizes)
    np.testing.assert_array_equal(out, [values.sum(), 0, *values.sum(1)])


def test_memory(kernels, rng):
    values = integers(rng, 100)
    sizes = {"block": 100, "shared": 400}
    np.testing.assert_array_equal(kernels.run("copy_global", values, np.zeros(100, np.int32), 100, grid=2, block=64), values)
    np.testing.assert_array_equal(kernels.run("rotate", values, np.zeros(100, np.int32), 100, **sizes), np.roll(values, -1))
    filled = kernels.run("fill_shared", None, np.zeros(100, np.int32), 100, shared=400)
    np.testing.assert_array_equal(filled, np.arange(100)[::-1])
    bins = kernels.run("histogram", np.abs(values) % 8, np.zeros(8, np.int32), 0, block=100, shared=32)
    np.testing.assert_array_equal(bins, np.bincount(np.abs(values) % 8, minlength=8))
    np.testing.assert_array_equal(kernels.run("accumulate", values, np.zeros(100, np.int32), 0, block=100), values)
    floats = aligned(rng.normal(size=64).astype(np.float32))
    out = aligned(np.zeros(48, np.float32))
    np.testing.assert_array_equal(kernels.run("copy_vectors", floats, out, 4, block=12), floats[4:52])
    index = np.arange(4, dtype=np.int32)
    np.testing.assert_array_equal(kernels.run("look_up", index, np.zeros(4, np.int32), 0, block=4), [3, 1, 4, 1])
    np.testing.assert_array_equal(kernels.run("shift", index, np.zeros(4, np.int32), 0, block=4), [1, 2, 4, 8])


def test_indices(kernels):
    grid, block = (2, 3, 2), (4, 2, 3)
    out = kernels.run("indices", None, np.full((12, 24), -1, np.int32), 0, grid=grid, block=block)
    x, y, z = (np.arange(size) for size in block)
    thread = (x[None, None] + 10 * y[None, :, None] + 100 * z[:, None, None]).reshape(-1)
    x, y, z = (np.arange(size) for size in grid)
    of_block = (x[None, None] + 10 * y[None, :, None] + 100 * z[:, None, None]).reshape(-1)
    np.testing.assert_array_equal(out, 1000 * of_block[:, None] + thread)


def test_arithmetic(kernels):
    x, y = 0x00F0A55A, 0x9234567B
    out = kernels.run("arithmetic", np.array([x, y], np.uint32), np.zeros(13, np.uint32), 0, block=1)
    both = y << 32 | x
    permuted = (y & 0xFF) << 8 | x & 0xFF | (x >> 8 & 0xFF) << 16 | (y >> 8 & 0xFF) << 24
    expected = [
        x.bit_count(), 2, 8, int(f"{x:032b}"[::-1], 2), x * y >> 32, (both << 5 >> 32) & 0xFFFFFFFF,
        both >> 5 & 0xFFFFFFFF, permuted, 0x9234A55A, x, y, np.float32(2.5).view(np.uint32), 3,
    ]  # fmt: skip
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))


def test_random_order_follows_from_the_seed(kernels):
    def order(seed):
        return kernels.run("order", None, np.zeros((2, 64), np.uint32), 0, grid=2, block=64, shared=4, seed=seed)

    first = order(1)
    np.testing.assert_array_equal(np.sort(first, 1), [range(64)] * 2)
    np.testing.assert_array_equal(first, order(1))
    assert not np.array_equal(first, order(2)) and not np.array_equal(first[0], first[1])


def test_any_thread_of_the_host_may_launch(kernels, rng):
    values = rng.integers(-9, 9, 1000).astype(np.float32)
    failed = []

    def launch():
        for seed in range(5):
            out = np.full(1, np.nan, np.float32)
            if kernels.run("sum_by_shuffles", values, out, 1000, shared=32, seed=seed) != values.sum():
                failed.append(seed)

    threads = [threading.Thread(target=launch) for _ in range(3)]
    for thread in threads:
        thread.start()
    launch()
    for thread in threads:
        thread.join()
    assert not failed


# ---- launches


def test_limits_of_launches(kernels):
    def fails(words, **launch):
        with pytest.raises(RuntimeError, match=words):
            kernels.run("count", None, np.zeros(1, np.int32), 0, initialised=True, **launch)

    fails("cudaErrorInvalidConfiguration", block=1025)
    fails("cudaErrorInvalidConfiguration", block=0)
    fails("cudaErrorInvalidConfiguration", block=(1, 1, 65))
    fails("cudaErrorInvalidConfiguration", grid=(1, 65536))
    fails("cudaErrorInvalidValue", shared=DEVICE.shared_per_block + 1)
    fails("cudaErrorCooperativeLaunchTooLarge", grid=2 * DEVICE.multiprocessors + 1, block=1024, cooperative=True)
    small = emulation.Device(1, 1000, 3000)
    fails("cudaErrorInvalidValue", shared=1001, device=small)
    fails("cudaErrorCooperativeLaunchTooLarge", grid=2, shared=600, cooperative=True, device=small)
    kernels.run("count", None, one := np.zeros(1, np.int32), 0, block=1024, shared=1000, initialised=True, device=small)
    assert one == 1024
    empty = kernels.run("count", None, np.zeros(1, np.int32), 0, grid=0, initialised=True)
    assert empty == 0


def test_resident_blocks(kernels):
    kernels.module.set_device(4, 100_000, 100_000, True)
    assert kernels.module.resident_blocks(1024, 0) == 2
    assert kernels.module.resident_blocks(33, 0) == 32
    assert kernels.module.resident_blocks(256, 24_000) == 3
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        kernels.module.resident_blocks(256, 100_001)


def test_the_documented_kernel_runs(tmp_path, monkeypatch):
    page = (HERE.parent / "docs" / "emulator.md").read_text("utf-8")
    for name, source in re.findall(r"^```cpp\n// (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(program, {})


# ---- the compiler's sanitizers, in a process of their own


def in_sanitized_process(call: str) -> subprocess.CompletedProcess:
    environment = emulation.sanitized_environment()
    if environment is None:
        pytest.skip("the compiler has no sanitizers")
    code = f"import test_emulator; test_emulator.{call}"
    return subprocess.run([*emulation.fixed_addresses(), sys.executable, "-c", code], env=environment, cwd=HERE, capture_output=True, text=True)


def run_all_right():
    kernels = Kernels("sanitized")
    values = np.arange(256, dtype=np.int32)
    assert kernels.run("fill_local", None, np.zeros(32, np.int32), 8, block=32)[9] == 1
    assert kernels.run("copy_global", values, np.zeros(256, np.int32), 256, grid=2, block=200)[255] == 255
    # Threads whose stacks are left behind by a failure do not matter to what comes later.
    with pytest.raises(RuntimeError, match="lacks the lane that calls"):
        kernels.run("wrong_mask, without the caller", None, np.zeros(32, np.int32), 0, block=32)
    assert kernels.run("fill_local", None, np.zeros(32, np.int32), 8, block=32)[9] == 1


def run_mistake(name: str, block: int):
    Kernels("sanitized").run(name, np.arange(64, dtype=np.int32), np.zeros(65, np.int32), 20, block=block)


def test_sanitizers():
    done = in_sanitized_process("run_all_right()")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, block, words",
    [
        ("fill_local", 32, r"AddressSanitizer: stack-buffer-overflow.*in fill"),
        ("copy_global, no bound", 65, r"AddressSanitizer: heap-buffer-overflow.*in .*copy_global"),
        ("shift", 64, r"emulator_kernels\.cu:\d+:\d+: runtime error: shift exponent"),
    ],
)
def test_sanitizers_find(name, block, words):
    done = in_sanitized_process(f"run_mistake({name!r}, {block})")
    assert done.returncode != 0
    assert re.search(words, done.stderr.replace("\n", " ")), done.stderr


# ---- the kernels of the package


def check_kernels(variant: emulation.Variant):
    """Small problems through all of them, with results that are exact."""
    emulator = emulation.Emulator(variant)
    generator = torch.Generator().manual_seed(1)
    for text in ["n2c32h6w5k32r3s3p1", "n1c6h7w6k4r3s2u2p1d1g2", "n2c64h4w4k64r1s1u2"]:
        problem = ConvProblem.parse(text)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for memory_format in (torch.channels_last, torch.contiguous_format):
                channels_last = memory_format == torch.channels_last

                def small(size):
                    values = torch.randint(-2, 3, size, generator=generator).to(dtype)  # noqa: B023
                    return values.contiguous(memory_format=memory_format)  # noqa: B023

                g, x, weight = small(problem.output_size), small(problem.input_size), small(problem.weight_size)
                bits = emulation.nonzeros_of(g) if channels_last else None
                copied = emulator.prune(g, None, channels_last=channels_last, nonzeros=channels_last)
                torch.testing.assert_close(copied.values, g, rtol=0, atol=0)
                if channels_last:
                    assert torch.equal(copied.nonzeros.view(torch.int32), bits.view(torch.int32))
                grad_input = emulator.agb(problem, g, weight, bits, channels_last=channels_last)
                grad_weight = emulator.wgc(problem, g, x, bits, channels_last=channels_last)
                expected = torch.ops.aten.convolution_backward(
                    *(t.double() for t in (g, x, weight)), None, problem.stride, problem.padding, problem.dilation,
                    False, [0, 0], problem.groups, [True, True, False],
                )  # fmt: skip
                torch.testing.assert_close(grad_input, expected[0].to(dtype), rtol=0, atol=0)
                torch.testing.assert_close(grad_weight, expected[1].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["fast", "checked"])
def test_kernels(variant):
    check_kernels(variant)


def test_kernels_with_sanitizers():
    done = in_sanitized_process("check_kernels('sanitized')")
    assert done.returncode == 0, done.stderr
