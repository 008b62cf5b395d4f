# SPDX-License-Identifier: Apache-2.0
"""What differs between a CPU and a GPU: how time is measured, how large the cache is, what can be set, what is said."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from . import environment
from .timing import Sampler, sample_on_cpu, sample_on_cuda

MATHS = ("strict", "tf32")
"""How a GPU's dense kernels may compute with float32: as IEEE says, or with operands rounded to 11 bits of precision."""


@dataclass(frozen=True)
class Mode:
    """A way in which rows are measured.

    threads: of PyTorch's pool, on a CPU; None on a GPU.
    math: of MATHS, for float32 on a GPU; None elsewhere.
    """

    threads: int | None = None
    math: str | None = None

    @property
    def name(self) -> str:
        """Of its entries in the record of the environment."""
        return str(self.threads or self.math or "default")


class Device(ABC):
    """type: PyTorch's name for it, also that of the backend that is measured if none is asked for."""

    type: str

    @property
    @abstractmethod
    def cache_bytes(self) -> int | None:
        """Of the largest cache; None where the system does not say."""

    @abstractmethod
    def modes(self, dtype: torch.dtype, threads: Sequence[int], maths: Sequence[str]) -> list[Mode]:
        """All that are to be measured, of these numbers of threads or of these maths."""

    @abstractmethod
    def set(self, mode: Mode) -> None:
        """Compute in this mode from now on."""

    @contextmanager
    @abstractmethod
    def restored(self) -> Iterator[None]:
        """What `set` changes within is undone on leaving."""

    @abstractmethod
    def sampler(self, backend: str | None = None) -> Sampler:
        """What measures the calls of one row, the candidate being this backend's."""

    def describe(self) -> dict[str, Any]:
        """What belongs into the record of the environment."""
        return {}


class Cpu(Device):
    type = "cpu"

    @property
    def cache_bytes(self) -> int | None:
        return environment.last_level_cache()

    def modes(self, dtype: torch.dtype, threads: Sequence[int], maths: Sequence[str]) -> list[Mode]:
        return [Mode(threads=count) for count in threads]

    def set(self, mode: Mode) -> None:
        torch.set_num_threads(mode.threads)

    @contextmanager
    def restored(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def sampler(self, backend: str | None = None) -> Sampler:
        return sample_on_cpu


class Cuda(Device):
    """PyTorch's current CUDA device. cuDNN searches for its fastest algorithm."""

    type = "cuda"

    @cached_property
    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(torch.cuda.current_device())

    @property
    def cache_bytes(self) -> int | None:
        return self._properties.L2_cache_size

    def modes(self, dtype: torch.dtype, threads: Sequence[int], maths: Sequence[str]) -> list[Mode]:
        return [Mode(math=math) for math in maths] if dtype == torch.float32 else [Mode()]

    def set(self, mode: Mode) -> None:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode.math == "tf32"

    @contextmanager
    def restored(self) -> Iterator[None]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        try:
            yield
        finally:
            cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before

    def sampler(self, backend: str | None = None) -> Sampler:
        # To choose, "auto" waits for the density of the gradient before the last one. In training that is long since
        # known.
        return sample_on_cuda(longest=2) if backend == "auto" else sample_on_cuda()

    def describe(self) -> dict[str, Any]:
        found = self._properties
        return {
            "gpu": {
                "name": found.name,
                "capability": f"{found.major}.{found.minor}",
                "memory_bytes": found.total_memory,
                "multiprocessors": found.multi_processor_count,
                "shared_bytes": found.multi_processor_count * getattr(found, "shared_memory_per_multiprocessor", 0),
                "l2_bytes": found.L2_cache_size,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                **_nvidia_smi(getattr(found, "uuid", None)),
            }
        }


DEVICES: dict[str, Device] = {device.type: device for device in (Cpu(), Cuda())}


def named(name: str) -> Device:
    """The device of that name. Raises ValueError if there is none here."""
    if name not in DEVICES:
        raise ValueError(f"device: got {name!r}; accepted: {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda'; PyTorch finds no CUDA device here")
    return DEVICES[name]


_ASKED = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_most": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "celsius": "temperature.gpu",
    "watts": "power.draw",
    "watts_most": "power.limit",
}
"""Of nvidia-smi, at the moment of the question: nothing here changes clocks or limits."""


def _nvidia_smi(uuid: object) -> dict[str, str]:
    """What it says of the device; nothing where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader,nounits"]
    if uuid is not None:
        command.append(f"--id=GPU-{uuid}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in answer.partition("\n")[0].split(",")]
    return dict(zip(_ASKED, values)) if len(values) == len(_ASKED) else {}
