# SPDX-License-Identifier: Apache-2.0
"""The kernels of emulator_kernels.cu, right ones and ones with a mistake, for tests of the emulator."""

from __future__ import annotations

from pathlib import Path

import emulation
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / "emulator_kernels.cu", HERE / "emulator_kernels.cpp"]
SEEDS = range(4)
DEVICE = emulation.Device()


@pytest.fixture(scope="session", params=["fast", "checked"], name="variant")
def variant_fixture(request) -> emulation.Variant:
    return request.param


class Kernels:
    def __init__(self, variant: emulation.Variant):
        self.module = emulation.build("kernels", SOURCES, variant)

    def run(
        self,
        name: str,
        inputs,
        out: np.ndarray,
        n: int,
        *,
        grid=1,
        block=256,
        shared: int = 0,
        cooperative: bool = False,
        seed: int = 0,
        initialised: bool = False,
        device: emulation.Device = DEVICE,
    ) -> np.ndarray:
        """Launch a kernel; shared is in bytes. Returns `out`."""
        self.module.set_seed(seed)
        self.module.set_device(*device)
        arguments = (name, _three(grid), _three(block), shared, cooperative, inputs, out, n, initialised)
        emulation.readable(self.module, self.module.run, *arguments)
        return out


def _three(size) -> tuple[int, int, int]:
    size = size if isinstance(size, tuple) else (size,)
    return (*size, 1, 1)[:3]


@pytest.fixture(scope="session", name="kernels")
def kernels_fixture(variant) -> Kernels:
    return Kernels(variant)


@pytest.fixture(scope="session", name="checked")
def checked_fixture() -> Kernels:
    return Kernels("checked")


@pytest.fixture(name="rng")
def rng_fixture() -> np.random.Generator:
    return np.random.default_rng(20260801)


def integers(rng, *shape) -> np.ndarray:
    return rng.integers(-50, 50, shape, dtype=np.int32)


def place(name: str) -> str:
    """A pattern for where in emulator_kernels.cu a mistake is."""
    text = (HERE / "emulator_kernels.cu").read_text("utf-8")
    lines = [i for i, line in enumerate(text.splitlines(), 1) if name in line]
    assert len(lines) == 1, name
    return rf"emulator_kernels\.cu:{lines[0]}\b"


def aligned(array: np.ndarray) -> np.ndarray:
    """The same values, at a multiple of 16 bytes, with no other array within 4 KB: what is nearest is certain."""
    margin = 4096
    memory = np.zeros(array.nbytes + 2 * margin + 16, np.uint8)
    start = margin + -memory.ctypes.data % 16
    result = memory[start : start + array.nbytes].view(array.dtype)
    result[:] = array
    return result
