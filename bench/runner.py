# SPDX-License-Identifier: Apache-2.0
"""From a list of settings to rows: check each result, then time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sparsebwd.backends import choose_backend

from .devices import Device, Mode
from .environment import command_line, copy_gbs, peak_gflops
from .inputs import DTYPES, Inputs, Rotation
from .operation import TORCH, Case, Operation
from .results import Row
from .suites import Layer
from .timing import Call, interleave

AGAINST = ("best", "same")


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured: all combinations, each operation with densities or with percentiles.

    file: of captured gradients, None where all are random.
    threads: of a CPU. maths: of a GPU, for float32.
    against: "best", dense in the layout in which it is faster, or "same", in that of the candidate.
    memory: MiB that the copies of the tensors may take, from which `rotation` follows.
    """

    device: Device
    layers: Sequence[Layer]
    file: Path | None
    operations: Sequence[Operation]
    patterns: Sequence[str]
    densities: Sequence[float]
    percentiles: Sequence[float]
    dtypes: Sequence[str]
    layouts: Sequence[str]
    backends: Sequence[str]
    threads: Sequence[int]
    maths: Sequence[str]
    against: str
    repeats: int
    seed: int
    memory: int
    rotation: Rotation

    def __len__(self) -> int:
        return sum(len(self.modes(dtype)) for _, dtype, _ in self.cases())

    def modes(self, dtype: str) -> list[Mode]:
        return self.device.modes(DTYPES[dtype], self.threads, self.maths)

    def check_backends(self) -> None:
        """Raise ValueError or RuntimeError if a backend is unknown or cannot run one of the cases."""
        for _, _, case in self.cases():
            if case.backend != TORCH:
                choose_backend(case.backend, case.layer.problem, self.device.type, case.dtype)

    def cases(self) -> Iterator[tuple[Operation, str, Case]]:
        """Operation, name of the dtype, case; those that share inputs are neighbours."""
        for layer in self.layers:
            for dtype in self.dtypes:
                for prunes, setting in self._settings(layer):
                    for layout in self.layouts:
                        for operation in self.operations:
                            if operation.prunes != prunes or not operation.applies(layer):
                                continue
                            if self.device.type not in operation.devices:
                                continue
                            backends = self.backends if operation.backend is None else (operation.backend,)
                            for backend in backends:
                                yield operation, dtype, Case(layer, DTYPES[dtype], layout, backend, **setting)

    def _settings(self, layer: Layer) -> Iterator[tuple[bool, dict[str, object]]]:
        """What operations start from that do not prune, and those that do (True), as fields of a case."""
        if layer.captured is None:
            for pattern in self.patterns:
                for density in self.densities:
                    yield False, {"pattern": pattern, "density": density}
        elif layer.placement == "output":
            for percentile in self.percentiles:
                yield False, {"pattern": "captured", "percentile": percentile}
        else:
            yield False, {"pattern": "captured"}
        for percentile in self.percentiles:
            yield True, {"pattern": "heavy-tailed" if layer.captured is None else "captured", "percentile": percentile}


def peaks(plan: Plan) -> dict[str, dict[str, float]]:
    """What the machine can do, for the dtypes and modes of the plan, for the record of the environment: "peak_gflops"
    by dtype and mode, "copy_gbs" by mode."""
    gflops: dict[str, dict[str, float]] = {dtype: {} for dtype in plan.dtypes}
    gbs: dict[str, float] = {}
    with plan.device.restored():
        for dtype in plan.dtypes:
            for mode in plan.modes(dtype):
                plan.device.set(mode)
                of_device = plan.device.type, plan.device.sampler()
                if mode.name not in gbs:
                    gbs[mode.name] = round(copy_gbs(*of_device), 1)
                gflops[dtype][mode.name] = round(peak_gflops(DTYPES[dtype], *of_device), 1)
    return {"peak_gflops": gflops, "copy_gbs": gbs}


def run(plan: Plan, peak_gflops: dict[str, dict[str, float]], started: Callable[[str], None]) -> Iterator[Row]:
    """Measure; `started` is told of each row before it is measured. Restores what it sets of the device.

    peak_gflops: as `peaks` returns it.
    """
    inputs, inputs_of = None, None
    with plan.device.restored():
        for operation, dtype, case in plan.cases():
            gradient = case.gradient(operation)
            wanted = (case.layer, case.dtype, gradient)
            if wanted != inputs_of:
                inputs = None  # frees the memory first
                inputs = Inputs(
                    case.layer.problem, case.dtype, gradient, plan.rotation, plan.seed, plan.device.type
                )
                inputs_of = wanted
            for mode in plan.modes(dtype):
                started(f"{case.layer.name} {operation.name}")
                plan.device.set(mode)
                with torch.no_grad():
                    yield _measure(plan, operation, dtype, case, inputs, mode, peak_gflops[dtype][mode.name])


def _measure(
    plan: Plan, operation: Operation, dtype: str, case: Case, inputs: Inputs, mode: Mode, peak: float
) -> Row:
    density = operation.density(case, inputs)
    flops = operation.flops(case.layer, density)
    row = partial(
        Row,
        suite=case.layer.suite,
        layer=case.layer.name,
        problem=str(case.layer.problem),
        multiplicity=case.layer.multiplicity,
        op=operation.name,
        density=density,
        nominal_density=case.density,
        percentile=case.percentile,
        pattern=case.pattern,
        dtype=dtype,
        layout=case.layout,
        backend=case.backend,
        device=plan.device.type,
        math=mode.math,
        threads=mode.threads,
        bytes=operation.elements(case.layer) * case.dtype.itemsize,
        flops=flops,
        command=_command(plan, operation, dtype, case, mode),
    )
    try:
        errors = operation.check(case, inputs)
    except AssertionError as wrong:
        measured = (
            "sparse_ms", "dense_ms", "speedup", "gflops", "of_peak", "rel_error", "dense_rel_error", "spread", "baseline",
        )  # fmt: skip
        return row(error=str(wrong), **dict.fromkeys(measured))

    calls = {"candidate": Call(partial(operation.candidate, case), inputs.rotating(case.layout, operation.used))}
    baselines = operation.baselines(case)
    if plan.against == "same":
        baselines = {name: layout for name, layout in baselines.items() if layout == case.layout}
    for name, layout in baselines.items():
        following = inputs.rotating(layout, operation.used, from_middle=True)
        calls[name] = Call(partial(operation.baseline, case), following)
    times = interleave(calls, plan.repeats, sample=plan.device.sampler(case.backend))
    sparse, best = times["candidate"], min(baselines, key=lambda name: times[name].seconds)
    dense = times[best]
    gflops = flops / sparse.seconds / 1e9 if flops else None
    return row(
        sparse_ms=1e3 * sparse.seconds,
        dense_ms=1e3 * dense.seconds,
        speedup=dense.seconds / sparse.seconds,
        gflops=gflops,
        of_peak=gflops / peak if flops else None,
        rel_error=errors.result if errors else None,
        dense_rel_error=errors.dense if errors else None,
        spread=max(sparse.spread, dense.spread),
        baseline=best,
        error=None,
    )


def _command(plan: Plan, operation: Operation, dtype: str, case: Case, mode: Mode) -> str:
    layer = case.layer
    if layer.captured is not None:
        source = {"gradients": plan.file, "layer": layer.name}
    elif layer.suite is not None:
        source = {"suite": layer.suite, "batch_size": layer.problem.n, "layer": layer.name}
    else:
        source = {"problem": layer.problem}
    options = {
        "device": plan.device.type,
        **source,
        "op": operation.name,
        "pattern": case.pattern if case.density is not None else None,
        "density": case.density,
        "percentile": case.percentile,
        "dtype": dtype,
        "layout": case.layout,
        "against": plan.against if plan.against != AGAINST[0] else None,
        "backend": case.backend if operation.backend is None else plan.backends[0],
        "math": mode.math,
        "threads": mode.threads,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "memory": plan.memory,
    }
    return command_line(options)
