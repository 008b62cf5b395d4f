# SPDX-License-Identifier: Apache-2.0
"""Calls of the benchmark: what each measures, how long it takes, how many fit into the time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DENSITIES = (0.4, 0.3, 0.2, 0.1, 0.05, 0.01)

# The layers of ResNet-18 but the first: its filter of 7x7 (3x3 for CIFAR) on 3 channels is none that the sparse kernels
# take, and no training step computes its AGB.
STAGES = [
    f"stages.{stage}.0.{name}" for stage in range(4) for name in ("conv1", "conv2", "shortcut.0")
    if stage > 0 or name == "conv1"
]  # fmt: skip

REPEATS, BATCHES = (15, 9, 5), (256, 128, 64)
"""Samples of each row, and images, the first choice first. Where time is short there are fewer samples, then the last
units are left out; a smaller batch is for GPUs that are too slow or too small for the first one."""

# For the estimate of time: rates of dense products, as of an H100, and what goes with each process, row and search for
# an algorithm.
_GFLOPS = {"strict": 50e3, "tf32": 350e3, "bfloat16": 600e3}
_PROCESS_SECONDS, _ROW_SECONDS, _SEARCH_SECONDS = 8.0, 0.12, 0.4
GMACS = {"resnet18-imagenet": 0.655, "resnet18-cifar": 0.214}  # an image's, over the distinct layers
_WARMUP = 7  # calls of each before the samples
LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Unit:
    """One call of the benchmark. modes: "strict", "tf32" (float32) and "bfloat16"."""

    name: str
    suite: str
    operations: tuple[str, ...]
    modes: tuple[str, ...]
    backends: tuple[str, ...]
    layers: tuple[str, ...] = tuple(STAGES)
    densities: tuple[float, ...] = DENSITIES
    patterns: tuple[str, ...] = ("iid",)

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.name}"

    @property
    def pruning(self) -> bool:
        return self.operations[0] not in ("agb", "wgc", "agb+wgc")

    @property
    def rows(self) -> int:
        settings = 1 if self.pruning else len(self.densities) * len(self.patterns)
        return len(self.layers) * len(self.operations) * len(self.modes) * len(self.backends) * settings

    def command(self, repeats: int, batch: int, minutes: float | None = None, output: Path | None = None) -> list[object]:
        dtypes = dict.fromkeys("bfloat16" if mode == "bfloat16" else "float32" for mode in self.modes)
        maths = [mode for mode in self.modes if mode != "bfloat16"]
        amount = ["--percentile", "90"]
        if not self.pruning:
            amount = ["--density", ",".join(map(str, self.densities)), "--pattern", ",".join(self.patterns)]
        return [
            sys.executable, "-m", "sparsebwd.bench", "--device", "cuda", "--suite", self.suite, "--batch", batch,
            "--layer", ",".join(self.layers), "--op", ",".join(self.operations), *amount, "--dtype", ",".join(dtypes),
            *(["--math", ",".join(maths)] if maths else []), "--backend", ",".join(self.backends), "--repeats", repeats,
            *([] if minutes is None else ["--minutes", f"{minutes:.2f}"]),
            *([] if output is None else ["--json", output]),
        ]  # fmt: skip

    def seconds(self, repeats: int, batch: int) -> float:
        """About how long it takes on an H100."""
        seconds = _PROCESS_SECONDS + self.rows * _ROW_SECONDS
        if self.operations[0].startswith("prune"):
            return seconds
        flops = 2e9 * GMACS[self.suite] * batch * len(self.layers) / len(STAGES)
        for mode in self.modes:
            # Half of the peak; the sparse kernels somewhat faster than dense ones in float32.
            dense, sparse = 2 * flops / _GFLOPS[mode] / 1e9, 1.4 * flops / _GFLOPS["strict"] / 1e9
            seconds += self.rows / len(self.layers) / len(self.modes) * (repeats + _WARMUP) * (2 * dense + sparse)
            seconds += 2 * len(self.layers) * len(self.operations) * _SEARCH_SECONDS
        return seconds


CONVOLUTIONS, BOTH = ("agb", "wgc"), ("cuda", "auto")
_PRUNINGS, PASSES = ("prune", "prune-predicted", "prune-launches"), ("backward", "backward-predicted")
MODES = ("strict", "tf32", "bfloat16")

ROW_DENSITIES = (0.65, 0.4)
"""What rows keep at the noise that elements have at 0.25 and 0.14."""
_ROW_LAYERS = ("stages.0.0.conv1", "stages.1.0.conv2", "stages.2.0.conv2", "stages.3.0.conv2")  # 3x3, of each size


def rows(*modes: str) -> Unit:
    """Rows on tensor cores; kernels are compiled when they are first called, seconds each."""
    return Unit(
        f"rows, {', '.join(modes)}", "resnet18-imagenet", CONVOLUTIONS, modes, ("triton",), _ROW_LAYERS, ROW_DENSITIES, ("rows",)
    )


UNITS = tuple(
    unit
    for suite in ("resnet18-imagenet", "resnet18-cifar")
    for unit in (
        Unit("pruning", suite, _PRUNINGS, ("strict", "bfloat16"), ("cuda",)),
        Unit("AGB and WGC, strict", suite, CONVOLUTIONS, ("strict",), BOTH),
        Unit("AGB and WGC in one call", suite, ("agb+wgc",), ("strict",), ("cuda",)),
        *(Unit(f"AGB and WGC, {mode}", suite, CONVOLUTIONS, (mode,), BOTH) for mode in ("tf32", "bfloat16")),
        Unit("backward pass with pruning", suite, PASSES, MODES, BOTH),
        Unit("first layer", suite, ("wgc",), MODES, ("auto",), ("stem.0",)),
        *([rows(*MODES)] if suite == "resnet18-imagenet" else []),
    )
)
"""The most important first."""

FIRST_UNITS = (
    Unit("pruning", "resnet18-imagenet", _PRUNINGS, ("strict",), ("cuda",)),
    Unit(
        "AGB and WGC, strict, even and skewed", "resnet18-imagenet", CONVOLUTIONS, ("strict",), ("cuda",),
        densities=(0.3, 0.1), patterns=("iid", "skewed"),
    ),
    Unit("AGB and WGC in one call", "resnet18-imagenet", ("agb+wgc",), ("strict",), ("cuda",), densities=(0.3, 0.1)),
    *(
        Unit(f"AGB and WGC, {mode}", "resnet18-imagenet", CONVOLUTIONS, (mode,), ("auto",), densities=(0.3, 0.05))
        for mode in ("tf32", "bfloat16")
    ),
    rows("tf32", "bfloat16"),
)  # fmt: skip
"""Those of the first minutes on a GPU."""


def choose_batch(minutes: float, memory_bytes: int, units: Sequence[Unit] = UNITS) -> int:
    """The most images for which the convolutions of the first suite fit into memory and, with the fewest samples, into so
    many minutes; else the fewest."""
    most = memory_bytes // 2**26  # 64 MiB an image: two copies of the largest layer in two layouts, and the reference
    units = [unit for unit in units if unit.suite == units[0].suite and not unit.pruning]
    for batch in BATCHES:
        if batch <= most and sum(unit.seconds(REPEATS[-1], batch) for unit in units) <= 60 * minutes:
            return batch
    return BATCHES[-1]


def choose_repeats(units: Sequence[Unit], batch: int, seconds: float, scale: float = 1.0) -> int | None:
    """The most samples with which the first of the `units` takes no more than its share of the time that is left for all;
    None if there is no time to begin.

    scale: how much longer earlier units took than was expected.
    """
    if seconds < LEAST_SECONDS:
        return None
    whole = sum(unit.seconds(REPEATS[0], batch) for unit in units)
    share = seconds * units[0].seconds(REPEATS[0], batch) / whole
    fitting = (repeats for repeats in REPEATS if scale * units[0].seconds(repeats, batch) <= share)
    return next(fitting, REPEATS[-1])
