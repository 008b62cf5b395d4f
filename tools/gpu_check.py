# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can tell (`make gpu-check`): build, tests, sanitizer, benchmark, profiler counters.

Needs an NVIDIA GPU, PyTorch with CUDA, nvcc and a C++ compiler; no network and no virtual environment. The package is
built into build/gpu-check, not into the Python that runs this. Each part has its own time limit, and one that fails does
not stop the others. After each, what is known goes into one JSON and one Markdown file, named after day and GPU; parts of
several runs on one day end up in the same files.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"  # where the package is built to
WORKLOAD = ROOT / "tools" / "gpu_workload.py"

DENSITIES = (0.4, 0.3, 0.2, 0.1, 0.05, 0.01)
BARS = {
    # (operation, math): by density, (parity with the best that is known, world class), as a ratio to cuDNN
    ("agb", "strict"): ((1.6, 1.9), (1.6, 2.1), (1.7, 2.6), (2.5, 3.6), (4.5, 6.0), (12.0, 15.0)),
    ("wgc", "strict"): ((1.6, 1.9), (1.6, 2.2), (1.8, 2.8), (2.8, 4.2), (5.0, 7.0), (12.0, 17.0)),
    **{
        (op, math): ((0.97, 0.97),) * 4 + ((1.0, 1.1), (2.3, 3.0))
        for op in ("agb", "wgc")
        for math in ("tf32", "bfloat16")
    },
}
BAR_SUITE = "resnet18-imagenet"
AUTO_BAR = 0.97
PRUNE_BARS = {"exact, on chip": 0.70, "exact, beyond": 0.58, "predicted": 0.85}
"""Of the bandwidth of a copy of the same tensor."""

ERROR_BAR = 2.0
"""Error against float64, as a multiple of that of strict cuDNN."""


class Failed(Exception):
    """A part cannot go on; the message is for people."""


# ---- processes


def run(
    command: Sequence[object], log: Path, seconds: float, environment: dict[str, str] | None = None, show: bool = False,
    interrupts: bool = False,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run to the end or for so many seconds, output into `log`, and on the terminal too if `show`.

    Raises Failed if the time is over; the process and its children are ended then. If it `interrupts`, the process is
    interrupted a while before that, as by Ctrl-C, so that it can write down what it has.
    """
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    path = [str(SITE)] if SITE.exists() else []
    path += filter(None, [os.environ.get("PYTHONPATH")])
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
    with open(log, "w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(words)}\n")
        file.flush()
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables | (environment or {}), stdout=subprocess.PIPE if show else file,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
            # Shells start what runs in the background with interrupts ignored, which is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            if show:
                # A pipe's reader cannot wait with a limit, so another process ends the command.
                reader = subprocess.Popen(["tee", "-a", str(log)], stdin=process.stdout)
                process.stdout.close()
            late = _wait(process, seconds, interrupts)
            if show:
                reader.wait(10)
            if late:
                raise subprocess.TimeoutExpired(words, seconds)
        except subprocess.TimeoutExpired:
            raise Failed(f"stopped after {seconds / 60:.1f} minutes: {shlex.join(words)[:200]}; see {log}") from None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return subprocess.CompletedProcess(words, process.returncode, log.read_text("utf-8", errors="replace"))


_LAST_SECONDS = 20.0
"""From the interrupt of a process to its end."""


def _wait(process: subprocess.Popen, seconds: float, interrupts: bool) -> bool:
    """Whether it had to be interrupted. Raises TimeoutExpired."""
    last = min(_LAST_SECONDS, 0.95 * seconds) if interrupts else 0.0
    try:
        process.wait(seconds - last)
    except subprocess.TimeoutExpired:
        if not interrupts:
            raise
        process.send_signal(signal.SIGINT)
        process.wait(last)
        return True
    return False


def checked(command: Sequence[object], log: Path, seconds: float, **settings: Any) -> str:
    """The output of a command that has to succeed. Raises Failed."""
    done = run(command, log, seconds, **settings)
    if done.returncode:
        last = "\n".join(f"    {line}" for line in done.stdout.rstrip().splitlines()[-15:])
        raise Failed(f"exit status {done.returncode} of {shlex.join(done.args)[:200]}; {log} ends in\n{last}")
    return done.stdout


def require(modules: Iterable[str] = (), programs: Iterable[str] = ()) -> None:
    """Raise Failed, naming all that is missing."""
    importlib.invalidate_caches()
    missing = [f"the Python module {name}" for name in modules if importlib.util.find_spec(name) is None]
    missing += [f"the program {name}" for name in programs if shutil.which(name) is None]
    if missing:
        raise Failed(f"missing: {', '.join(missing)}")


def say(text: str) -> None:
    print(text, flush=True)


# ---- the machine

_PROBE = """
import json, torch
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_bytes": found.total_memory,
        "devices": torch.cuda.device_count(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version()}))
"""

_CLOCKS = (
    "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "temperature.gpu", "power.draw",
    "power.limit",
)  # fmt: skip


def find_gpu() -> dict[str, Any] | None:
    """The first GPU that PyTorch finds, None without one; asked in a process of its own, which leaves no memory in use."""
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300)
    last = probe.stdout.strip().rpartition("\n")[2]
    return json.loads(last) if probe.returncode == 0 and last.startswith("{") else None


def clocks() -> dict[str, str]:
    """What nvidia-smi reads at this moment. Nothing here sets anything of the card."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, (value.strip() for value in answer.partition("\n")[0].split(","))))


def nvcc_release() -> str | None:
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\S+),", text)
    return found[1] if found else None


# ---- build


def build(check: Check) -> dict[str, Any]:
    require(["pip", "setuptools", "ninja", "numpy", "rich", "typer"], [os.environ.get("CXX", "c++").split()[0]])
    start = time.monotonic()
    environment = {"SPARSEBWD_CUDA": "1"}
    os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # setup.py takes the architecture of the GPU here
    checked(build_command(), WORK / "build.log", 60 * check.minutes, environment=environment)
    said = checked([sys.executable, "-m", "sparsebwd.info", "--json"], WORK / "info.log", 120)
    info, _ = json.JSONDecoder().raw_decode(said, said.index("\n{") + 1)  # warnings may stand around it
    check.record["environment"] |= info
    reason = info["backends"]["cuda"]
    if reason is not None:
        raise Failed(f"it was built, but the backend 'cuda' does not run: {reason}")
    return {"seconds": round(time.monotonic() - start), "where": str(SITE.relative_to(ROOT))}


def build_command() -> list[object]:
    return [
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target",
        SITE, ROOT,
    ]  # fmt: skip


# ---- tests


def tests_command(report: Path) -> list[object]:
    # Only files that have such tests: others import what need not be here.
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"\bmark\.gpu\b", path.read_text("utf-8"))]
    names = [path.relative_to(ROOT) for path in files]
    # A test that hangs shows where in the log: after a minute all stacks go there.
    return [
        sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-o", "faulthandler_timeout=60", "-p",
        "no:cacheprovider", f"--junitxml={report}", *names,
    ]  # fmt: skip


def tests(check: Check) -> dict[str, Any]:
    require(["pytest", "hypothesis", "sparsebwd"])
    report = WORK / "tests.xml"
    report.unlink(missing_ok=True)
    # cuBLAS asks for this where PyTorch is told to be deterministic.
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    log, late = WORK / "tests.log", None
    try:
        run(tests_command(report), log, 60 * check.minutes, environment=environment, show=True, interrupts=True)
    except Failed as error:
        late = error
    if not report.exists():
        raise late or Failed(f"pytest wrote no report; see {log}")
    found = outcomes(report)
    check.record["parts"]["tests"] = found
    failures = f"{len(found['failed'])} of {found['ran']} tests failed: {', '.join(found['failed'][:20])}"
    if late:
        raise Failed(f"{failures}; then {late}" if found["failed"] else f"{found['ran']} tests passed, then {late}")
    if found["failed"]:
        raise Failed(failures)
    if not found["ran"]:
        raise Failed("no test ran")
    return found


def outcomes(report: Path) -> dict[str, Any]:
    """Of a report of pytest: how many tests ran, the names of those that failed, what the first ones said, and why others
    were skipped."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    messages = {}
    for case in cases:
        wrong = next((found for name in ("failure", "error") if (found := case.find(name)) is not None), None)
        if wrong is not None:
            messages[f"{case.get('classname')}::{case.get('name')}"] = (wrong.get("message") or "").partition("\n")[0][:300]
    failed = list(messages)
    reasons = [(case.find("skipped").get("message") or "") for case in cases if _has(case, "skipped")]
    skipped = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    seconds = sum(float(case.get("time") or 0) for case in cases)
    first = dict(list(messages.items())[:10])
    return {"ran": len(cases) - len(reasons), "failed": failed, "messages": first, "skipped": skipped, "seconds": round(seconds)}


def _has(case: ElementTree.Element, *names: str) -> bool:
    return any(case.find(name) is not None for name in names)


# ---- sanitizer

SANITIZER_TOOLS = ("memcheck", "racecheck")


def sanitizer_command(tool: str) -> list[object]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20",
        sys.executable, WORKLOAD, "small",
    ]  # fmt: skip


def sanitizer(check: Check) -> dict[str, Any]:
    require(["sparsebwd"], ["compute-sanitizer"])
    found: dict[str, Any] = {}
    end = time.monotonic() + 60 * check.minutes
    for tool in SANITIZER_TOOLS:
        start = time.monotonic()
        # With PyTorch's allocator in between, few accesses are outside of what the driver allocated.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        log = WORK / f"{tool}.log"
        try:
            done = run(sanitizer_command(tool), log, max(1, end - start), environment=environment)
        except Failed as error:
            found[tool] = {"result": str(error), "clean": False}
        else:
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            clean = done.returncode == 0 and bool(summary)
            text = summary[-1].lstrip("= ") if summary else f"exit status {done.returncode}; see {log}"
            found[tool] = {"result": text, "clean": clean}
        found[tool]["seconds"] = round(time.monotonic() - start)
        say(f"  {tool}: {found[tool]['result']} ({found[tool]['seconds']} s)")
        check.record["parts"]["sanitizer"] = found
    bad = [tool for tool in SANITIZER_TOOLS if not found[tool]["clean"]]
    if bad:
        raise Failed(f"{' and '.join(bad)}: not clean")
    return found


# ---- benchmark

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
_GMACS = {"resnet18-imagenet": 0.655, "resnet18-cifar": 0.214}  # an image's, over the distinct layers
_WARMUP = 7  # calls of each before the samples
_LEAST_SECONDS = 20.0


@dataclass(frozen=True)
class Unit:
    """One call of the benchmark. modes: "strict", "tf32" (float32) and "bfloat16"."""

    name: str
    suite: str
    operations: tuple[str, ...]
    modes: tuple[str, ...]
    backends: tuple[str, ...]
    layers: tuple[str, ...] = tuple(STAGES)

    @property
    def title(self) -> str:
        return f"{self.suite}: {self.name}"

    @property
    def pruning(self) -> bool:
        return self.operations[0] not in ("agb", "wgc", "agb+wgc")

    @property
    def rows(self) -> int:
        settings = 1 if self.pruning else len(DENSITIES)
        return len(self.layers) * len(self.operations) * len(self.modes) * len(self.backends) * settings

    def command(self, repeats: int, batch: int, minutes: float | None = None, output: Path | None = None) -> list[object]:
        dtypes = dict.fromkeys("bfloat16" if mode == "bfloat16" else "float32" for mode in self.modes)
        maths = [mode for mode in self.modes if mode != "bfloat16"]
        amount = ["--percentile", "90"] if self.pruning else ["--density", ",".join(map(str, DENSITIES))]
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
        flops = 2e9 * _GMACS[self.suite] * batch * len(self.layers) / len(STAGES)
        for mode in self.modes:
            # Half of the peak; the sparse kernels somewhat faster than dense ones in float32.
            dense, sparse = 2 * flops / _GFLOPS[mode] / 1e9, 1.4 * flops / _GFLOPS["strict"] / 1e9
            seconds += self.rows / len(self.layers) / len(self.modes) * (repeats + _WARMUP) * (2 * dense + sparse)
            seconds += 2 * len(self.layers) * len(self.operations) * _SEARCH_SECONDS
        return seconds


_CONVOLUTIONS, _BOTH = ("agb", "wgc"), ("cuda", "auto")
_PRUNINGS, _PASSES = ("prune", "prune-predicted"), ("backward", "backward-predicted")
_MODES = ("strict", "tf32", "bfloat16")
UNITS = tuple(
    unit
    for suite in ("resnet18-imagenet", "resnet18-cifar")
    for unit in (
        Unit("pruning", suite, _PRUNINGS, ("strict", "bfloat16"), ("cuda",)),
        Unit("AGB and WGC, strict", suite, _CONVOLUTIONS, ("strict",), _BOTH),
        Unit("AGB and WGC in one call", suite, ("agb+wgc",), ("strict",), ("cuda",)),
        *(Unit(f"AGB and WGC, {mode}", suite, _CONVOLUTIONS, (mode,), _BOTH) for mode in ("tf32", "bfloat16")),
        Unit("backward pass with pruning", suite, _PASSES, _MODES, _BOTH),
        Unit("first layer", suite, ("wgc",), _MODES, ("auto",), ("stem.0",)),
    )
)
"""The most important first."""


def choose_batch(minutes: float, memory_bytes: int) -> int:
    """The most images for which the convolutions of the first suite fit into memory and, with the fewest samples, into so
    many minutes; else the fewest."""
    most = memory_bytes // 2**26  # 64 MiB an image: two copies of the largest layer in two layouts, and the reference
    units = [unit for unit in UNITS if unit.suite == UNITS[0].suite and not unit.pruning]
    for batch in BATCHES:
        if batch <= most and sum(unit.seconds(REPEATS[-1], batch) for unit in units) <= 60 * minutes:
            return batch
    return BATCHES[-1]


def choose_repeats(units: Sequence[Unit], batch: int, seconds: float, scale: float = 1.0) -> int | None:
    """The most samples with which the first of the `units` takes no more than its share of the time that is left for all;
    None if there is no time to begin.

    scale: how much longer earlier units took than was expected.
    """
    if seconds < _LEAST_SECONDS:
        return None
    whole = sum(unit.seconds(REPEATS[0], batch) for unit in units)
    share = seconds * units[0].seconds(REPEATS[0], batch) / whole
    fitting = (repeats for repeats in REPEATS if scale * units[0].seconds(repeats, batch) <= share)
    return next(fitting, REPEATS[-1])


def bench(check: Check) -> dict[str, Any]:
    require(["sparsebwd", "typer", "rich"])
    end = time.monotonic() + 60 * check.minutes
    batch = choose_batch(check.minutes, check.record["environment"]["gpu"]["memory_bytes"])
    left_out = [] if batch == BATCHES[0] else [f"batches of {BATCHES[0]}: {batch} images instead"]
    found: dict[str, Any] = {"batch": batch, "left_out": left_out, "units": []}
    check.record["parts"]["bench"] = found
    failures, expected, took = [], 0.0, 0.0
    for number, unit in enumerate(UNITS):
        start = time.monotonic()
        scale = took / expected if expected else 1.0
        repeats = choose_repeats(UNITS[number:], batch, end - start, scale)
        if repeats is None:
            left_out.append(f"{unit.title}: the time was over")
            continue
        say(f"  {number + 1} of {len(UNITS)}, {(end - start) / 60:.1f} minutes left: {unit.title}, {unit.rows} rows")
        try:
            rows, wrong = measure(check, unit, repeats, batch, end - start)
        except Failed as error:
            failures.append(str(error))
            say(f"    {error}")
            continue
        seconds = time.monotonic() - start
        if wrong:
            failures.append(f"{unit.title}: {wrong} rows are WRONG")
        if rows < unit.rows:
            left_out.append(f"{unit.title}: {unit.rows - rows} of {unit.rows} rows: the time was over")
        elif not wrong:
            took, expected = took + seconds, expected + unit.seconds(repeats, batch)
        found["units"].append(
            {"name": unit.title, "rows": rows, "wrong": wrong, "repeats": repeats, "seconds": round(seconds)}
            | {"clocks": clocks(), "command": shlex.join(map(str, unit.command(repeats, batch)[1:]))}
        )
        check.write()
    for text in left_out:
        say(f"  left out: {text}")
    if failures:
        raise Failed("; ".join(failures))
    return found


def measure(check: Check, unit: Unit, repeats: int, batch: int, seconds: float) -> tuple[int, int]:
    """Add the rows of a unit. How many there are, and how many are wrong. Raises Failed if there are none."""
    name = re.sub(r"[^a-z0-9]+", "-", unit.title.lower())
    output, log = WORK / f"bench-{name}.json", WORK / f"bench-{name}.log"
    output.unlink(missing_ok=True)
    done = run(unit.command(repeats, batch, (seconds - 10) / 60, output), log, seconds + 30)
    if not output.exists():
        last = done.stdout.rstrip().rpartition("\n")[2]
        raise Failed(f"{unit.title}: exit status {done.returncode} and no results; {log} ends in: {last}")
    measured = json.loads(output.read_text("utf-8"))
    merge_rows(check.record, measured)
    return len(measured["rows"]), sum(row["error"] is not None for row in measured["rows"])


ROW_KEY = (
    "suite", "layer", "problem", "op", "nominal_density", "percentile", "pattern", "dtype", "layout", "backend", "device",
    "math", "threads",
)  # fmt: skip


def merge_rows(record: dict[str, Any], measured: dict[str, Any]) -> None:
    """Add rows of the benchmark, in the place of earlier ones of the same setting, and what it says of the machine."""
    rows = {tuple(row[name] for name in ROW_KEY): row for row in (*record["rows"], *measured["rows"])}
    record["rows"] = list(rows.values())
    environment = record["environment"]
    for name, value in measured["environment"].items():
        if name in ("peak_gflops", "copy_gbs"):
            for key, entry in value.items():
                before = environment.setdefault(name, {}).get(key)
                # The best that was seen of dtype and mode.
                if isinstance(entry, dict):
                    both = {mode: max((before or {}).get(mode, 0), rate) for mode, rate in entry.items()}
                    environment[name][key] = (before or {}) | both
                else:
                    environment[name][key] = max(before or 0, entry)
        elif name == "gpu":
            environment["gpu"] |= value
        else:
            environment[name] = value


# ---- counters

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy",
    "LaunchStats",
)  # fmt: skip
COUNTERS = {
    # heading: names that versions of ncu have for it
    "us": ("gpu__time_duration.sum",),
    "DRAM %": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    "issue active %": (
        "smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    ),
    "FMA pipe %": (
        "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active", "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_fp32.avg.pct_of_peak_sustained_active",
    ),
    "L1 hit %": ("l1tex__t_sector_hit_rate.pct",),
    "L2 hit %": ("lts__t_sector_hit_rate.pct",),
    "occupancy %": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}  # fmt: skip
_STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio|"
                    r"smsp__average_warp_latency_issue_stalled_(\w+?)\.ratio")  # fmt: skip
_IN_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def counters_command() -> list[object]:
    sections = [part for name in SECTIONS for part in ("--section", name)]
    return [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "demangled", "--kernel-name",
        "regex:sparsebwd", *sections, "--csv", "--page", "raw", "--print-units", "base", sys.executable, WORKLOAD, "layer",
    ]  # fmt: skip


def counters(check: Check) -> dict[str, Any]:
    require(["sparsebwd"], ["ncu"])
    output = checked(counters_command(), WORK / "counters.log", 60 * check.minutes)
    found = kernels_of(output)
    if not found:
        raise Failed(f"ncu saw none of the kernels; see {WORK / 'counters.log'}")
    return {"kernels": found}


def kernels_of(output: str) -> list[dict[str, Any]]:
    """Of ncu's output: for each launch the kernel, the counters above, the three most frequent stalls, and all metrics."""
    lines = output.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"'))))
    units, *launches = table
    found = []
    for launch in launches:
        values = {name: _number(text) for name, text in launch.items() if name}
        metrics = {name: value for name, value in values.items() if value is not None and "__" in name}
        kernel: dict[str, Any] = {"kernel": launch["Kernel Name"]}
        for heading, names in COUNTERS.items():
            name = next((name for name in names if name in metrics), None)
            kernel[heading] = None if name is None else metrics[name]
            if heading == "us" and name is not None:
                kernel[heading] *= _IN_US.get(units[name], 1.0)
        stalls = {}
        for name, value in metrics.items():
            match = _STALL.fullmatch(name)
            if match:
                stalls[match[1] or match[2]] = value
        kernel["stalls"] = dict(sorted(stalls.items(), key=lambda item: -item[1])[:3])
        found.append(kernel | {"metrics": metrics})
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


# ---- reports


def ratio_in_total(rows: Sequence[dict[str, Any]]) -> float:
    """Dense time / sparse time, summed over the network's layers."""
    dense, sparse = (sum(row["multiplicity"] * row[name] for row in rows) for name in ("dense_ms", "sparse_ms"))
    return dense / sparse


def mode_of(row: dict[str, Any]) -> str:
    return row["math"] or row["dtype"]


def timed(record: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    """Rows that were timed and have these entries."""
    return [
        row for row in record["rows"]
        if row["error"] is None and all(row[name] == value for name, value in wanted.items())
    ]  # fmt: skip


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def against(value: float, parity: float, world: float | None = None) -> str:
    """A number beside its bars."""
    if value < parity:
        mark = "below"
    else:
        mark = "world class" if world is not None and value >= world else "ok"
    return f"{value:.2f} ({mark})"


def report(record: dict[str, Any]) -> str:
    """The Markdown: the questions of the bars, one after the other."""
    lines = [f"# GPU check: {record['environment']['gpu']['name']}, {record['date']}", "", *_parts(record)]
    for title, section in (
        ("Environment", _environment), ("Pruning", _pruning), ("AGB and WGC", _convolutions), ("Backward pass", _passes),
        ("Dispatch", _dispatch), ("Accuracy", _accuracy), ("Counters", _counters),
    ):  # fmt: skip
        found = section(record)
        if found:
            lines += [f"## {title}", "", *found]
    return "\n".join(lines).rstrip() + "\n"


def _parts(record: dict[str, Any]) -> list[str]:
    lines = table(["part", "result"], [(name, record["results"][name]) for name in PARTS if name in record["results"]])
    left_out = record["parts"].get("bench", {}).get("left_out", [])
    tests = record["parts"].get("tests", {})
    skipped = tests.get("skipped", {})
    notes = [f"- left out of the benchmark: {text}" for text in left_out]
    notes += [f"- {name}: {message}" for name, message in tests.get("messages", {}).items()]
    notes += [f"- {count} tests skipped: {reason}" for reason, count in skipped.items()]
    return lines + notes + ([""] if notes else [])


def _environment(record: dict[str, Any]) -> list[str]:
    environment, gpu = record["environment"], record["environment"]["gpu"]
    lines = table(
        ["", ""],
        [
            (name, value)
            for name, value in (
                ("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"),
                ("clocks, temperature and power as read", ", ".join(f"{k} {v}" for k, v in record["clocks"].items())),
                ("torch, CUDA, cuDNN", f"{gpu['torch']}, {gpu['cuda']}, {gpu['cudnn']}"),
                ("nvcc", environment.get("nvcc")),
            )
            if value
        ],
    )
    rates = [
        (f"{dtype}, {mode}", f"{gflops / 1e3:.1f} TFLOP/s")
        for dtype, modes in environment.get("peak_gflops", {}).items()
        for mode, gflops in modes.items()
    ]
    copies = list(environment.get("copy_gbs", {}).values())
    if copies:
        rates.append(("copy of 1 GiB", f"{max(copies) / 1e3:.2f} TB/s read and written"))
    return lines + (table(["ceiling, in the same run", ""], rates) if rates else [])


def _pruning(record: dict[str, Any]) -> list[str]:
    exact = timed(record, op="prune", backend="cuda")
    predicted = {_of_tensor(row): row for row in timed(record, op="prune-predicted", backend="cuda")}
    if not exact:
        return []
    room = record["environment"]["gpu"].get("shared_bytes") or 0
    groups: dict[str, list[float]] = {name: [] for name in PRUNE_BARS}
    rows = []
    for row in exact:
        nbytes = row["bytes"] // 3
        place = "exact, on chip" if nbytes <= room else "exact, beyond"
        groups[place].append(row["speedup"])
        other = predicted.get(_of_tensor(row))
        if other:
            groups["predicted"].append(other["speedup"])
        rows.append(
            (row["suite"], row["layer"], row["dtype"], f"{nbytes / 1e6:.1f}", place.partition(", ")[2], f"{row['dense_ms'] * 1e3:.1f}")
            + (f"{row['speedup']:.0%}", f"{other['speedup']:.0%}" if other else "-")
        )
    bars = [
        (name, f"{bar:.0%}", f"{min(groups[name]):.0%}", f"{geometric_mean(groups[name]):.0%}", f"{max(groups[name]):.0%}")
        + (f"{sum(value >= bar for value in groups[name])} of {len(groups[name])}",)
        for name, bar in PRUNE_BARS.items()
        if groups[name]
    ]
    return [
        f"Sigma, threshold and pruning in one launch, as a share of the bandwidth that a copy of the same tensor reaches: time "
        f"of the copy / time of pruning, operands out of cache. On chip: at most the {room / 1e6:.1f} MB of shared memory.",
        "",
        *table(["threshold", "bar", "worst", "geometric mean", "best", "reach the bar"], bars),
        *table(["suite", "layer", "dtype", "MB", "tensor", "copy us", "exact", "predicted"], rows),
    ]  # fmt: skip


def _of_tensor(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("suite", "problem", "dtype", "math", "layout"))


def _convolutions(record: dict[str, Any]) -> list[str]:
    rows = [row for op in _CONVOLUTIONS for row in timed(record, op=op)]
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        cells = []
        for mode in _MODES:
            for backend in _BOTH:
                for op in _CONVOLUTIONS:
                    here = [
                        row for row in rows
                        if (row["suite"], mode_of(row), row["backend"], row["op"]) == (suite, mode, backend, op)
                        and row["layer"] in STAGES
                    ]  # fmt: skip
                    if not here:
                        continue
                    alone = without_search(record, here)
                    judged = suite == BAR_SUITE and backend == ("cuda" if mode == "strict" else "auto")
                    bars = BARS[op, mode] if judged else None
                    cells.append((mode, backend, op.upper(), *_by_density(here, None if alone else bars)))
                    if alone:
                        cells.append((mode, f"{backend}, non-zeros known", op.upper(), *_by_density(alone, bars)))
        batch = re.match(r"n(\d+)", next(row["problem"] for row in rows if row["suite"] == suite))[1]
        lines += [
            f"{suite}, batch {batch}: time of cuDNN at its fastest (both layouts, algorithms searched) / time of ours, summed "
            "over the network's layers without the first, each as often as it occurs. Finding the non-zeros is in ours, "
            "pruning is not. Where pruning has just found them, the kernels take as long as the rows 'non-zeros known' say: "
            "from the times of AGB, of WGC, and of both in one call, which looks for the non-zeros once, that of looking "
            "follows.",
            "",
            *table(["cuDNN in", "backend", "", *map(str, DENSITIES)], cells),
        ]
    if lines:
        bars = [
            (mode, op.upper(), *(f"{parity:g} / {world:g}" for parity, world in BARS[op, mode]))
            for mode in _MODES
            for op in _CONVOLUTIONS
        ]
        lines += [
            "The bars, over the ImageNet layers at batch 256, parity / world class:", "",
            *table(["cuDNN in", "", *map(str, DENSITIES)], bars),
        ]  # fmt: skip
    return lines


def without_search(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of AGB or WGC less the time in which the non-zeros are found, as far as there are rows of both in one call."""
    same = ("suite", "problem", "nominal_density", "dtype", "math", "layout", "backend")
    times = {
        op: {tuple(row[name] for name in same): row["sparse_ms"] for row in timed(record, op=op)}
        for op in ("agb", "wgc", "agb+wgc")
    }
    found = []
    for row in rows:
        agb, wgc, both = (times[op].get(tuple(row[name] for name in same)) for op in ("agb", "wgc", "agb+wgc"))
        if agb is not None and wgc is not None and both is not None:
            search = min(max(0.0, agb + wgc - both), 0.9 * row["sparse_ms"])
            found.append(row | {"sparse_ms": row["sparse_ms"] - search})
    return found


def _by_density(rows: Sequence[dict[str, Any]], bars: Sequence[tuple[float, float]] | None) -> list[str]:
    """A cell for each density, judged by its bars if there are any."""
    cells = []
    for place, density in enumerate(DENSITIES):
        here = [row for row in rows if row["nominal_density"] == density]
        if not here:
            cells.append("-")
            continue
        value = ratio_in_total(here)
        cell = against(value, *bars[place]) if bars else f"{value:.2f}"
        cells.append(cell + ("" if len(here) == len(STAGES) else f", {len(here)} of {len(STAGES)} layers"))
    return cells


def _passes(record: dict[str, Any]) -> list[str]:
    rows = [row for op in _PASSES for row in timed(record, op=op)]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["suite"], mode_of(row), row["backend"], row["op"]), []).append(row)
    if not groups:
        return []
    return [
        "Pruning at percentile 90, AGB and WGC in one call, against AGB and WGC of cuDNN, summed over the network's layers "
        "without the first.",
        "",
        *table(
            ["suite", "cuDNN in", "backend", "operation", "layers", "density", "speed-up", "worst"],
            [
                (*key, len(group), f"{sum(row['density'] for row in group) / len(group):.2f}", f"{ratio_in_total(group):.2f}")
                + (f"{min(row['speedup'] for row in group):.2f}",)
                for key, group in groups.items()
            ],
        ),
    ]  # fmt: skip


def _dispatch(record: dict[str, Any]) -> list[str]:
    rows = [row for op in _CONVOLUTIONS for row in timed(record, op=op, backend="auto")]
    if not rows:
        return []
    cells = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for mode in _MODES:
            here = [row for row in rows if row["suite"] == suite and mode_of(row) == mode]
            if here:
                worst = min(here, key=lambda row: row["speedup"])
                below = sum(row["speedup"] < AUTO_BAR for row in here)
                name = f"{worst['layer']}, {worst['op']} at {worst['nominal_density']:g}"
                cells.append((suite, mode, len(here), below, f"{worst['speedup']:.2f}", name, f"{worst['dense_ms'] * 1e3:.0f}"))
    return [
        f"The backend auto is never to be below {AUTO_BAR}:", "",
        *table(["suite", "cuDNN in", "rows", "below", "worst", "which", "cuDNN us"], cells),
    ]  # fmt: skip


def _accuracy(record: dict[str, Any]) -> list[str]:
    cells = []
    for dtype, math in (("float32", "strict"), ("float32", "tf32"), ("bfloat16", None)):
        for op in _CONVOLUTIONS:
            here = [row for row in timed(record, op=op, dtype=dtype, math=math, backend="cuda") if row["dense_rel_error"]]
            if here:
                ratios = [row["rel_error"] / row["dense_rel_error"] for row in here]
                cells.append(
                    (math or dtype, op.upper(), f"{max(row['rel_error'] for row in here):.1e}")
                    + (f"{max(row['dense_rel_error'] for row in here):.1e}", f"{max(ratios):.2f}")
                )
    wrong = [row for row in record["rows"] if row["error"] is not None]
    notes = [f"- WRONG: {row['command']}: {row['error']}" for row in wrong]
    if not cells and not notes:
        return []
    return [
        f"Error against float64, of the sparse kernels and of cuDNN (the bar: at most {ERROR_BAR:g} times that of strict cuDNN):",
        "",
        *table(["cuDNN in", "", "largest error of ours", "of cuDNN", "largest ratio"], cells),
        *notes,
        "",
    ]  # fmt: skip


def _counters(record: dict[str, Any]) -> list[str]:
    kernels = record["parts"].get("counters", {}).get("kernels", [])
    if not kernels:
        return []
    rows = [
        (_short(kernel["kernel"]), *("-" if kernel[name] is None else f"{kernel[name]:.4g}" for name in COUNTERS))
        + (", ".join(f"{name} {value:.2f}" for name, value in kernel["stalls"].items()),)
        for kernel in kernels
    ]
    return [
        "One launch of each kernel on the 3x3 layer of 128 channels on 28x28, batch 256, float32, density 0.1 (pruning: "
        "percentile 90). Stalls are in cycles for each instruction issued.",
        "",
        *table(["kernel", *COUNTERS, "stalls"], rows),
    ]  # fmt: skip


def _short(name: str) -> str:
    """A kernel's name without parameters and our namespaces; | would end a cell."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|sparsebwd::cuda::|sparsebwd::|\bvoid ", "", name)
    return name.partition("(")[0].replace("|", "/")


# ---- the whole


class Check:
    """What is known so far, and where it goes.

    minutes: the limit of each part.
    """

    def __init__(self, output: Path, gpu: dict[str, Any], minutes: float) -> None:
        self.minutes = minutes
        date = datetime.now(UTC).date().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", gpu["name"].lower()).strip("-")
        self.path = output / f"{date}-{slug}.json"
        self.record: dict[str, Any] = {"date": date, "results": {}, "parts": {}, "environment": {}, "clocks": {}, "rows": []}
        if self.path.exists():
            self.record |= json.loads(self.path.read_text("utf-8"))
        environment = self.record["environment"]
        environment["gpu"] = environment.get("gpu", {}) | gpu
        environment["nvcc"] = nvcc_release()
        self.record["clocks"] = clocks()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.record, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), self.report())

    def report(self) -> str:
        try:
            return report(self.record)
        except Exception:  # the record is there, and other parts are yet to run
            return f"The report cannot be written:\n\n{traceback.format_exc()}"

    def part(self, name: str, function: Callable[[Check], dict[str, Any]]) -> bool:
        """Run it; whether it passed."""
        say(f"== {name}, at most {self.minutes:g} minutes")
        start = time.monotonic()
        try:
            self.record["parts"][name] = function(self)
            result = "passed"
        except Failed as error:
            result = f"FAILED: {error}"
        except Exception as error:  # a mistake of ours, or an answer that no one thought of
            result = f"FAILED: {type(error).__name__}: {error}"
            say(traceback.format_exc())
        minutes = (time.monotonic() - start) / 60
        say(f"   {name}: {result} ({minutes:.1f} minutes)")
        self.record["results"][name] = result.partition("\n")[0]
        self.write()
        return result == "passed"


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


PARTS: dict[str, Callable[[Check], dict[str, Any]]] = {
    "build": build, "tests": tests, "sanitizer": sanitizer, "bench": bench, "counters": counters,
}  # fmt: skip


def dry_run(parts: Sequence[str], minutes: float) -> None:
    """Print what would run, of the benchmark on a GPU such as an H100."""
    for name in parts:
        say(f"== {name}, at most {minutes:g} minutes")
        if name == "bench":
            batch, left = choose_batch(minutes, 80 * 2**30), 60 * minutes
            say(f"  layers: {', '.join(STAGES)}; stem.0 by auto only. Batch {batch}")
            for number, unit in enumerate(UNITS):
                repeats = choose_repeats(UNITS[number:], batch, left)
                if repeats is None:
                    say(f"  left out: {unit.title}")
                    continue
                seconds = min(left, unit.seconds(repeats, batch))
                left -= seconds
                say(f"  about {seconds / 60:.1f} minutes, {unit.rows} rows of {repeats} samples: {unit.title}")
                say(f"    {shlex.join(map(str, unit.command(repeats, batch)))}")
        for command in COMMANDS.get(name, ()):
            say(f"    {shlex.join(map(str, command))}")


COMMANDS: dict[str, list[list[object]]] = {
    "build": [build_command()],
    "tests": [tests_command(WORK / "tests.xml")],
    "sanitizer": [sanitizer_command(tool) for tool in SANITIZER_TOOLS],
    "counters": [counters_command()],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="which, in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of each part; the benchmark is made to fit. Default: 8")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="default: bench/results")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    options = parser.parse_args(arguments)
    parts = [name for name in PARTS if name in options.parts]
    if options.dry_run:
        dry_run(parts, options.minutes)
        return 0
    if importlib.util.find_spec("torch") is None:
        print(f"gpu-check: {sys.executable} has no PyTorch, so nothing was checked; name one that has by PYTHON=.", file=sys.stderr)
        return 2
    gpu = find_gpu()
    if gpu is None:
        print(f"gpu-check: PyTorch of {sys.executable} finds no NVIDIA GPU here, so nothing was checked.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(SITE))
    # Where toolkits are that were installed without being put on PATH.
    homes = filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"])
    places = [os.path.join(home, folder) for home in homes for folder in ("bin", "compute-sanitizer")]
    places += sorted(map(str, Path("/opt/nvidia/nsight-compute").glob("*")), reverse=True)
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *filter(os.path.isdir, places)])
    check = Check(options.output.resolve(), gpu, options.minutes)
    say(f"{gpu['name']}, torch {gpu['torch']}, CUDA {gpu['cuda']}, nvcc {check.record['environment']['nvcc']}")
    passed = [check.part(name, PARTS[name]) for name in parts]
    say(f"\n{check.report()}")
    say(f"{check.path} and {check.path.with_suffix('.md').name}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
