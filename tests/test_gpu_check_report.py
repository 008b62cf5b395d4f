# SPDX-License-Identifier: Apache-2.0
"""What tools/gpu_check makes of results, and its workload for sanitizer and profiler."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import gpu_workload
import pytest
from gpu_check import bench as benching
from gpu_check import counters, report, sanitizer, units
from gpu_checking import check_fixture, gpu_that_is_none  # noqa: F401
from test_bench_reports import make_row

from sparsebwd.bench import suites

pytestmark = pytest.mark.usefixtures("gpu_that_is_none")

NCU = '''==PROF== Connected to process 12
==PROF== Profiling "prune_kernel": 0%....100% - 30 passes
"ID","Process ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","l1tex__t_sector_hit_rate.pct","launch__registers_per_thread","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio"
"","","","","ns","%","%","register/thread","inst","inst","inst","inst"
"0","12","void sparsebwd::cuda::<unnamed>::prune_kernel<float, 2>(Args<T1>)","(132, 1, 1)","41,250","81.5","3.25","40","0.5","1.5","7.25","0.1"
==PROF== Disconnected
'''


def test_counters_of_ncu():
    (kernel,) = counters.kernels_of(NCU)
    assert (kernel["us"], kernel["DRAM %"], kernel["L1 hit %"], kernel["registers"]) == (41.25, 81.5, 3.25, 40)
    assert kernel["FMA pipe %"] is None
    assert kernel["stalls"] == {"long_scoreboard": 7.25, "wait": 1.5, "barrier": 0.5}
    assert report._short(kernel["kernel"]) == "prune_kernel<float, 2>"
    assert counters.kernels_of("==ERROR== nothing\n") == []


@pytest.mark.parametrize("summary, status, clean", [
    ("========= ERROR SUMMARY: 0 errors", 0, True), ("========= ERROR SUMMARY: 2 errors", 9, False), ("Aborted", 0, False),
])  # fmt: skip
def test_sanitizer_results(check, monkeypatch, summary, status, clean):
    monkeypatch.setattr(sanitizer, "require", lambda *_: None)
    monkeypatch.setattr(sanitizer, "run", lambda command, *_, **__: subprocess.CompletedProcess(command, status, summary))
    assert check.part("sanitizer", sanitizer.sanitizer) == clean
    assert {tool: found["clean"] for tool, found in check.record["parts"]["sanitizer"].items()} == dict.fromkeys(
        ("memcheck", "racecheck"), clean
    )


def rows_of(unit, wrong: int = 0, speedup: float = 2.0) -> list[dict]:
    """What the benchmark would measure."""
    rows = []
    layers = {layer.name: layer for layer in suites.load(unit.suite, 256)}
    settings = [(None, 90.0)] if unit.pruning else [(density, None) for density in unit.densities]
    for name in unit.layers:
        for op in unit.operations:
            for mode in unit.modes:
                for backend in unit.backends:
                    for density, percentile in settings:
                        row = make_row(
                            suite=unit.suite, layer=name, problem=str(layers[name].problem), op=op,
                            multiplicity=layers[name].multiplicity, density=density or 0.3, nominal_density=density,
                            percentile=percentile, dtype="bfloat16" if mode == "bfloat16" else "float32",
                            math=None if mode == "bfloat16" else mode, backend=backend, device="cuda", threads=None,
                            sparse_ms=1.0, dense_ms=speedup, speedup=speedup, rel_error=3e-7, dense_rel_error=2e-7,
                            bytes=3 * 4 * layers[name].problem.macs // 10**3,
                            error="off by one" if len(rows) < wrong else None,
                        )  # fmt: skip
                        rows.append(asdict(row))
    return rows


# Of each unit two layers and densities: after each the report of all rows is written.
UNITS = tuple(replace(unit, layers=unit.layers[:2], densities=unit.densities[:2]) for unit in units.UNITS)


@pytest.fixture
def bench(check, monkeypatch):
    """Runs the part with a benchmark that takes no time; `seconds` of a clock pass with each unit."""
    clock = [0.0]
    monkeypatch.setattr(benching, "require", lambda *_: None)
    monkeypatch.setattr(benching.time, "monotonic", lambda: clock[0])
    environment = {"gpu": {"sm_mhz": "1980"}, "peak_gflops": {"float32": {"strict": 5e4}}, "copy_gbs": {"strict": 3e3}}

    def call(seconds: float, wrong: int = 0, rows: int | None = None, crashing: str = "") -> bool:
        def run(command, log, limit, **_):
            unit = next(unit for unit in UNITS if unit.command(0, 256)[6:13] == command[6:13]
                        and unit.command(0, 256)[14:18] == command[14:18] and matches(unit, command))  # fmt: skip
            clock[0] += seconds
            if unit.title != crashing:
                output = Path(command[command.index("--json") + 1])
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps({"environment": environment, "rows": rows_of(unit, wrong)[:rows]}))
            return subprocess.CompletedProcess(command, 0, "some last words\n")

        def matches(unit, command) -> bool:
            wanted = unit.command(0, 256)
            return all(command[command.index(name) + 1] == wanted[wanted.index(name) + 1]
                       for name in ("--dtype", "--backend", "--math") if name in wanted)  # fmt: skip

        monkeypatch.setattr(benching, "run", run)
        return check.part("bench", functools.partial(benching.bench, units=UNITS))

    return call


def test_bench_part_fills_the_record(check, bench):
    check.minutes = 60
    assert bench(30.0)
    found = check.record["parts"]["bench"]
    assert found["left_out"] == [] and [unit["name"] for unit in found["units"]] == [u.title for u in UNITS]
    assert len(check.record["rows"]) == sum(unit.rows for unit in UNITS)
    assert all(unit["repeats"] == 15 for unit in found["units"])
    # Measured again, rows take the place of the old ones.
    assert bench(30.0) and len(check.record["rows"]) == sum(unit.rows for unit in UNITS)
    assert json.loads(check.path.read_text())["rows"] == check.record["rows"]


def test_bench_part_says_what_it_left_out(check, bench, capsys):
    assert bench(70.0, rows=5)
    found = check.record["parts"]["bench"]
    assert len(found["units"]) == 7  # of 480 seconds
    assert f"{UNITS[0].title}: {UNITS[0].rows - 5} of {UNITS[0].rows} rows: the time was over" in (
        found["left_out"]
    )
    assert f"{UNITS[-1].title}: the time was over" in found["left_out"]
    assert f"left out: {UNITS[-1].title}" in capsys.readouterr().out
    assert f"- left out of the bench: {UNITS[-1].title}" in check.path.with_suffix(".md").read_text()


def test_slow_units_are_followed_by_fewer_samples(check, bench):
    check.minutes = 14
    assert bench(60.0)
    repeats = [unit["repeats"] for unit in check.record["parts"]["bench"]["units"]]
    assert repeats[:2] == [units.REPEATS[0], units.REPEATS[-1]]


def test_bench_part_fails_with_wrong_rows_and_crashes(check, bench):
    title = UNITS[2].title
    assert not bench(10.0, wrong=2, crashing=title)
    result = check.record["results"]["bench"]
    assert "2 rows are WRONG" in result and f"{title}: exit status 0 and no results" in result and "some last words" in result
    assert len(check.record["parts"]["bench"]["units"]) == len(UNITS) - 1
    assert check.path.with_suffix(".md").read_text().count("off by one") == 2 * (len(UNITS) - 1)


# ---- the report


def test_report_answers_the_questions(check):
    rows = [row for unit in units.UNITS for row in rows_of(unit) if row["op"] != "agb+wgc"]
    for row in rows:
        if row["op"] == "prune":
            row["speedup"], row["dense_ms"] = 0.6, 0.6
        if row["op"] == "agb" and row["nominal_density"] == 0.01:
            row["sparse_ms"] = 0.1
        if row["layer"] == "stages.0.0.conv1" and row["op"] == "wgc" and row["nominal_density"] == 0.4:
            row["dense_ms"] = 10.0
    check.record["rows"] = rows
    check.record["parts"]["counters"] = {"kernels": counters.kernels_of(NCU)}
    text = report.report(check.record)
    lines = text.splitlines()
    # By hand: of the 19 convolutions 4 are stages.0.0.conv1. 2 of 1.0 ms each, 10 of 1.0 ms.
    by_hand = (4 * 10 + 15 * 2) / 19
    assert f"| strict | cuda | WGC | {by_hand:.2f} (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) | 2.00 (below) | 2.00 (below) |" in (
        lines
    )
    assert "| strict | cuda | AGB | 2.00 (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) | 2.00 (below) | 20.00 (world class) |" in (
        lines
    )
    assert "| strict | AGB | 1.6 / 1.9 | 1.6 / 2.1 | 1.7 / 2.6 | 2.5 / 3.6 | 4.5 / 6 | 12 / 15 |" in lines
    assert any(line.startswith("| tf32 | auto | AGB | 2.00 (world class)") for line in lines)
    assert any(line.startswith("| exact, beyond | 66% | 60% | 60% | 60% |") for line in lines)
    assert any(line.startswith("| predicted | 93% | 200% |") for line in lines)
    assert any(line.startswith("| strict | AGB | 3.0e-07 | 2.0e-07 | 1.50 |") for line in lines)
    assert any(line.startswith("| prune_kernel<float, 2> | 41.25 | 81.5 | - |") for line in lines)
    assert "compute capability 9.0, 80 GiB" in text and "clocks.sm 1980 MHz" in text
    assert any(line.startswith("| resnet18-imagenet | strict | cuda | backward | 10 | 0.30 | 2.00 |") for line in lines)


def test_time_in_which_nonzeros_are_found_is_taken_off(check):
    def rows(op: str, sparse_ms: float) -> list[dict]:
        unit = next(unit for unit in units.UNITS if op in unit.operations and "strict" in unit.modes)
        return [row | {"sparse_ms": sparse_ms, "dense_ms": 6.0} for row in rows_of(unit) if row["op"] == op]

    # Looking takes 1 ms, AGB 2 and WGC 3; in one call 6.
    check.record["rows"] = rows("agb", 3.0) + rows("wgc", 4.0)
    assert report.without_search(check.record, check.record["rows"]) == []
    assert "| strict | cuda | AGB | 2.00 (world class) |" in report.report(check.record)
    check.record["rows"] += rows("agb+wgc", 6.0)
    text = report.report(check.record)
    assert "| strict | cuda | AGB | 2.00 | 2.00 |" in text
    assert "| strict | cuda, non-zeros known | AGB | 3.00 (world class) | 3.00 (world class) |" in text
    assert "| strict | cuda, non-zeros known | WGC | 2.00 (world class) | 2.00 (ok) | 2.00 (ok) | 2.00 (below) |" in text
    assert "| strict | auto, non-zeros known" not in text


def test_report_of_layers_that_are_missing(check):
    unit = next(unit for unit in units.UNITS if unit.operations == ("agb", "wgc"))
    check.record["rows"] = [row for row in rows_of(unit) if row["layer"] != "stages.3.0.conv2"]
    assert "2.00 (world class), 9 of 10 layers" in report.report(check.record)


def test_report_of_the_first_minutes(check):
    """Rows of even and of skewed images apart, and what is lost between them."""
    for unit in units.FIRST_UNITS:
        for pattern in unit.patterns:
            for row in rows_of(unit, speedup=1.5 if pattern == "skewed" else 2.0):
                if row["nominal_density"] is None or row["nominal_density"] in unit.densities:
                    check.record["rows"].append(row | {"pattern": pattern})
    text = report.report(check.record)
    assert "| strict | cuda | AGB | - | 2.00 | - | 2.00 | - | - |" in text.splitlines()
    assert "| WGC | 0.1 | 2.00 | 1.50 | 25% |" in text.splitlines()
    assert any(line.startswith("| bfloat16 | WGC | 0.4 | 2.00 | stages.0.0.conv1 2.00, ") for line in text.splitlines())
    assert not any(line.startswith("| strict | AGB | 0.65 ") for line in text.splitlines())


def test_report_of_nothing(check):
    assert report.report(check.record).startswith("# GPU check: Some GPU 80GB, ")


# ---- the workload of sanitizer and profiler


def test_workload_runs(monkeypatch, stats):
    """On the CPU, in the place of a GPU."""
    monkeypatch.setattr(gpu_workload, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_workload, "BACKEND", "dense")
    monkeypatch.setattr(gpu_workload, "LAYER", "n2c4h6w5k8r3s3p1")
    calls = []
    for name in ("synchronize", "profiler.start", "profiler.stop"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda name=name: calls.append((name, len(stats))))
    gpu_workload.layer()
    assert calls == [("synchronize", 2), ("profiler.start", 2), ("synchronize", 4), ("profiler.stop", 4)]
    stats.clear()
    gpu_workload.small()
    assert len(stats) == len(gpu_workload.SMALL) * 3 * 2 * 4
    assert {stat.problem.stride for stat in stats} == {(1, 1), (2, 2)} and {stat.problem.groups for stat in stats} == {1, 3}
