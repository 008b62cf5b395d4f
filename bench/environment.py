# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on besides the code."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import sparsebwd

from .timing import Call, Sampler, sample_on_cpu

# These change which code runs, on either side; a command that repeats a row has to set them.
CODE_PATH_VARIABLES = (
    "SPARSEBWD_MAX_ISA", "SPARSEBWD_CALIBRATION", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip

_PREFIXES = tuple(
    "SPARSEBWD_ ONEDNN_ DNNL_ ATEN_ OMP_ KMP_ GOMP_ MKL_ MALLOC_ GLIBC_ LD_PRELOAD CUDA_ CUDNN_ CUBLAS_ NVIDIA_TF32_ "
    "TORCH_ALLOW_ PYTORCH_CUDA_ PYTORCH_ALLOC_ PYTORCH_NO_CUDA_".split()
)


def environment() -> dict[str, Any]:
    """:func:`sparsebwd.info`, and the state of the machine at this moment. json.dumps() takes it."""
    return {
        **sparsebwd.info(),
        "last_level_cache": last_level_cache(),
        "load": load(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
    }


def command_line(options: Mapping[str, object], *command: str) -> str:
    """The command of this benchmark with these options, by the names of their parameters; those that are None or False are
    left out, those that are True have no value. It has the variables that change which code runs."""
    variables = [f"{name}={os.environ[name]}" for name in CODE_PATH_VARIABLES if name in os.environ]
    arguments = [
        part
        for name, value in options.items()
        if value is not None and value is not False
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return shlex.join([*variables, "python", "-m", "sparsebwd.bench", *command, *arguments])


def load() -> float | None:
    """Processes that wanted to run over the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


PRODUCT = 2048
"""Rows and columns of the matrices whose product is timed for the peak, on a CPU."""

COPIED = 2**26
"""Bytes of the tensor that is copied for the bandwidth, or twice the last-level cache where that is more."""

PRODUCT_CUDA, COPIED_CUDA = 8192, 2**30
"""The same on a GPU."""

_SAMPLES, _ENOUGH_SECONDS = 5, 1.0


def peak_gflops(dtype: torch.dtype, device: str = "cpu", sample: Sampler = sample_on_cpu) -> float:
    """GFLOP/s of the fastest dense product that PyTorch has on this device as it is set now: of square matrices, or a
    3x3 convolution, which on some CPUs has a better library. The best of several calls."""
    size = PRODUCT if device == "cpu" else PRODUCT_CUDA
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    channels, pixels, images = size // 8, 28, 16
    x = torch.randn(images, channels, pixels, pixels, device=device).to(dtype).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
    return max(
        2 * size**3 / _best_seconds(lambda: torch.mm(a, b), sample),
        2 * images * pixels**2 * channels**2 * 9 / _best_seconds(lambda: F.conv2d(x, w, padding=1), sample),
    ) / 1e9  # fmt: skip


def copy_gbs(device: str = "cpu", sample: Sampler = sample_on_cpu) -> float:
    """Gigabytes read and written per second by copying a tensor that is too large for caches, on this device as it is
    set now. The best of several calls."""
    size = max(2 * (last_level_cache() or 0), COPIED) if device == "cpu" else COPIED_CUDA
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), sample) / 1e9


def _best_seconds(function: Callable[[], object], sample: Sampler) -> float:
    """Of several calls after one for warm-up; of fewer where they take long."""
    call = Call(lambda _: function(), lambda: None)
    sample(call)
    samples: list[float] = []
    while len(samples) < _SAMPLES and sum(samples) < _ENOUGH_SECONDS:
        samples.append(sample(call))
    return min(samples)


class OtherProcesses:
    """How busy this machine's CPUs are with anything but this process, from when it is made."""

    def __init__(self) -> None:
        self._start = self._now()

    def cpus(self) -> float | None:
        """CPUs in use by others, on average, time stolen by a hypervisor included; None where /proc does not say."""
        if self._start is None:
            return None
        wall, busy = (now - start for now, start in zip(self._now(), self._start))
        return round(max(0.0, busy / wall), 2)

    @staticmethod
    def _now() -> tuple[float, float] | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        own = os.times()[:4]  # in user and system mode, of this process and of children that have ended
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy - sum(own)


def last_level_cache() -> int | None:
    """Bytes of the first CPU's largest cache; None where the system does not say."""
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=None)


def _bytes(text: str) -> int:
    text = text.strip()
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)
