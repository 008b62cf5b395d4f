# SPDX-License-Identifier: Apache-2.0
"""From a list of settings to rows: check each result, then time it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sparsebwd.backends import choose_backend

from .environment import command_line, copy_gbs, peak_gflops
from .inputs import DTYPES, Inputs, Rotation
from .operations import TORCH, Case, Operation
from .results import Row
from .suites import Layer
from .timing import Call, interleave


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured: all combinations, each operation with densities or with percentiles.

    file: of captured gradients, None where all are random.
    memory: MiB that the copies of the tensors may take, from which `rotation` follows.
    """

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
    repeats: int
    seed: int
    memory: int
    rotation: Rotation

    def __len__(self) -> int:
        return sum(len(self.threads) for _ in self.cases())

    def check_backends(self) -> None:
        """Raise ValueError or RuntimeError if a backend is unknown or cannot run one of the cases."""
        for _, _, case in self.cases():
            if case.backend != TORCH:
                choose_backend(case.backend, case.layer.problem, "cpu", case.dtype)

    def cases(self) -> Iterator[tuple[Operation, str, Case]]:
        """Operation, name of the dtype, case; those that share inputs are neighbours."""
        for layer in self.layers:
            for dtype in self.dtypes:
                for prunes, setting in self._settings(layer):
                    for layout in self.layouts:
                        for operation in self.operations:
                            if operation.prunes != prunes or not operation.applies(layer):
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
    """What the machine can do, for the dtypes and numbers of threads of the plan, for the record of the environment:
    "peak_gflops" by dtype and threads, "copy_gbs" by threads. Restores the number of threads."""
    threads_before = torch.get_num_threads()
    gflops: dict[str, dict[str, float]] = {dtype: {} for dtype in plan.dtypes}
    gbs: dict[str, float] = {}
    try:
        for threads in plan.threads:
            torch.set_num_threads(threads)
            gbs[str(threads)] = round(copy_gbs(), 1)
            for dtype in plan.dtypes:
                gflops[dtype][str(threads)] = round(peak_gflops(DTYPES[dtype]), 1)
    finally:
        torch.set_num_threads(threads_before)
    return {"peak_gflops": gflops, "copy_gbs": gbs}


def run(plan: Plan, peak_gflops: dict[str, dict[str, float]], started: Callable[[str], None]) -> Iterator[Row]:
    """Measure; `started` is told of each row before it is measured. Restores the number of threads.

    peak_gflops: as `peaks` returns it.
    """
    inputs, inputs_of = None, None
    threads_before = torch.get_num_threads()
    try:
        for operation, dtype, case in plan.cases():
            gradient = case.gradient(operation)
            wanted = (case.layer, case.dtype, gradient)
            if wanted != inputs_of:
                inputs = None  # frees the memory first
                inputs = Inputs(case.layer.problem, case.dtype, gradient, plan.rotation, plan.seed)
                inputs_of = wanted
            for threads in plan.threads:
                started(f"{case.layer.name} {operation.name}")
                torch.set_num_threads(threads)
                with torch.no_grad():
                    yield _measure(plan, operation, dtype, case, inputs, threads, peak_gflops[dtype][str(threads)])
    finally:
        torch.set_num_threads(threads_before)


def _measure(
    plan: Plan, operation: Operation, dtype: str, case: Case, inputs: Inputs, threads: int, peak: float
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
        threads=threads,
        bytes=operation.elements(case.layer) * case.dtype.itemsize,
        flops=flops,
        command=_command(plan, operation, dtype, case, threads),
    )
    try:
        error = operation.check(case, inputs)
    except AssertionError as wrong:
        measured = ("sparse_ms", "dense_ms", "speedup", "gflops", "of_peak", "rel_error", "spread", "baseline")
        return row(error=str(wrong), **dict.fromkeys(measured))

    calls = {"candidate": Call(partial(operation.candidate, case), inputs.rotating(case.layout, operation.used))}
    baselines = operation.baselines(case)
    for name, layout in baselines.items():
        calls[name] = Call(partial(operation.baseline, case), inputs.rotating(layout, operation.used))
    times = interleave(calls, plan.repeats)
    sparse, best = times["candidate"], min(baselines, key=lambda name: times[name].seconds)
    dense = times[best]
    gflops = flops / sparse.seconds / 1e9 if flops else None
    return row(
        sparse_ms=1e3 * sparse.seconds,
        dense_ms=1e3 * dense.seconds,
        speedup=dense.seconds / sparse.seconds,
        gflops=gflops,
        of_peak=gflops / peak if flops else None,
        rel_error=error,
        spread=max(sparse.spread, dense.spread),
        baseline=best,
        error=None,
    )


def _command(plan: Plan, operation: Operation, dtype: str, case: Case, threads: int) -> str:
    layer = case.layer
    if layer.captured is not None:
        source = {"gradients": plan.file, "layer": layer.name}
    elif layer.suite is not None:
        source = {"suite": layer.suite, "batch": layer.problem.n, "layer": layer.name}
    else:
        source = {"problem": layer.problem}
    options = {
        **source,
        "op": operation.name,
        "pattern": case.pattern if case.density is not None else None,
        "density": case.density,
        "percentile": case.percentile,
        "dtype": dtype,
        "layout": case.layout,
        "backend": case.backend if operation.backend is None else plan.backends[0],
        "threads": threads,
        "repeats": plan.repeats,
        "seed": plan.seed,
        "memory": plan.memory,
    }
    return command_line(options)
