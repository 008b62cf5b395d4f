# SPDX-License-Identifier: Apache-2.0
"""From a list of settings to rows: check each result, then time it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sparsebwd.backends import choose_backend

from .environment import CODE_PATH_VARIABLES
from .inputs import DTYPES, Inputs, Rotation
from .operations import TORCH, Case, Operation
from .results import Row
from .suites import Layer
from .timing import Call, interleave


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured: all combinations, each operation with densities or with percentiles."""

    layers: Sequence[Layer]
    operations: Sequence[Operation]
    densities: Sequence[float]
    percentiles: Sequence[float]
    dtypes: Sequence[str]
    layouts: Sequence[str]
    backends: Sequence[str]
    threads: Sequence[int]
    repeats: int
    seed: int
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
                for prunes, settings in ((False, self.densities), (True, self.percentiles)):
                    for setting in settings:
                        for layout in self.layouts:
                            for operation in self.operations:
                                if operation.prunes != prunes or not operation.applies(layer):
                                    continue
                                backends = self.backends if operation.backend is None else (operation.backend,)
                                for backend in backends:
                                    given = {"percentile" if prunes else "density": setting}
                                    yield operation, dtype, Case(layer, DTYPES[dtype], layout, backend, **given)


def run(plan: Plan, started: Callable[[str], None]) -> Iterator[Row]:
    """Measure; `started` is told of each row before it is measured. Restores the number of threads."""
    inputs, inputs_of = None, None
    threads_before = torch.get_num_threads()
    try:
        for operation, dtype, case in plan.cases():
            wanted = (case.layer.problem, case.dtype, case.density, case.percentile)
            if wanted != inputs_of:
                inputs = None  # frees the memory first
                inputs, inputs_of = Inputs(*wanted[:3], plan.rotation, plan.seed), wanted
            for threads in plan.threads:
                started(f"{case.layer.name} {operation.name}")
                torch.set_num_threads(threads)
                with torch.no_grad():
                    yield _measure(plan, operation, dtype, case, inputs, threads)
    finally:
        torch.set_num_threads(threads_before)


def _measure(plan: Plan, operation: Operation, dtype: str, case: Case, inputs: Inputs, threads: int) -> Row:
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
        percentile=case.percentile,
        pattern="heavy-tailed" if operation.prunes else "iid",
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
        nothing = dict.fromkeys(("sparse_ms", "dense_ms", "speedup", "gflops", "rel_error", "spread", "baseline"))
        return row(error=str(wrong), **nothing)

    calls = {"candidate": Call(partial(operation.candidate, case), inputs.rotating(case.layout, operation.used))}
    baselines = operation.baselines(case)
    for name, layout in baselines.items():
        calls[name] = Call(partial(operation.baseline, case), inputs.rotating(layout, operation.used))
    times = interleave(calls, plan.repeats)
    sparse, best = times["candidate"], min(baselines, key=lambda name: times[name].seconds)
    dense = times[best]
    return row(
        sparse_ms=1e3 * sparse.seconds,
        dense_ms=1e3 * dense.seconds,
        speedup=dense.seconds / sparse.seconds,
        gflops=flops / sparse.seconds / 1e9 if flops else None,
        rel_error=error,
        spread=max(sparse.spread, dense.spread),
        baseline=best,
        error=None,
    )


def _command(plan: Plan, operation: Operation, dtype: str, case: Case, threads: int) -> str:
    setting = "percentile" if operation.prunes else "density"
    options = {
        "problem": case.layer.problem,
        "op": operation.name,
        setting: getattr(case, setting),
        "dtype": dtype,
        "layout": case.layout,
        "backend": case.backend if operation.backend is None else plan.backends[0],
        "threads": threads,
        "repeats": plan.repeats,
        "seed": plan.seed,
    }
    variables = [f"{name}={os.environ[name]}" for name in CODE_PATH_VARIABLES if name in os.environ]
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return shlex.join([*variables, "python", "-m", "sparsebwd.bench", *arguments])
