# SPDX-License-Identifier: Apache-2.0
"""What the microbenchmark makes of its rows: summaries, break-even densities, comparisons, pictures."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from sparsebwd.bench import cli, compare, plot, results, timing
from sparsebwd.bench.results import Row

PROBLEM = "n2c4h6w5k8r3s3u1p1d1g1"
MACHINE = {
    "cpu": {"name": "some CPU", "cores": 2, "isa": {"in_use": "avx2"}}, "torch": "2.13", "sparsebwd": "0.1",
    "time": "today", "variables": {},
}  # fmt: skip


def make_row(**changes) -> Row:
    values = dict.fromkeys(Row.__dataclass_fields__)
    values |= {"suite": "s", "layer": "a", "problem": PROBLEM, "multiplicity": 1, "op": "agb", "density": 0.1}
    values |= {
        "pattern": "iid",
        "dtype": "float32",
        "layout": "contiguous",
        "backend": "cpu",
        "device": "cpu",
        "threads": 2,
        "baseline": "contiguous",
    }
    values |= {"nominal_density": changes.get("density", 0.1) if "percentile" not in changes else None}
    values |= {"sparse_ms": 1.0, "dense_ms": 1.0, "speedup": 1.0, **changes}
    return Row(**values)


def test_summary():
    rows = [
        make_row(layer="a", sparse_ms=1.0, dense_ms=8.0, speedup=8.0, multiplicity=3),
        make_row(layer="b", sparse_ms=4.0, dense_ms=8.0, speedup=2.0, multiplicity=1),
        make_row(layer="c", sparse_ms=None, dense_ms=None, speedup=None, error="off"),
        make_row(density=0.5),
    ]
    summary, other = results.summarize(rows)
    assert (summary["layers"], summary["wrong"], summary["density"]) == (2, 1, pytest.approx(0.1))
    assert summary["geometric_mean"] == pytest.approx(4)
    assert summary["total_ratio"] == pytest.approx((3 * 8 + 8) / (3 * 1 + 4))
    assert (summary["worst_layer"], summary["worst_speedup"]) == ("b", 2.0)
    assert other["density"] == 0.5
    assert results.summary_line(summary) == (
        "agb at density 0.1 [s, iid, float32, contiguous, cpu, 2 threads]: 1 WRONG; 4.00x (geometric mean of 2 layers), "
        "4.57x in total, worst 2.00x (b)"
    )


def test_summary_of_pruning_counts_copies():
    rows = [make_row(op="prune", percentile=90.0, density=d, baseline="copy", speedup=0.5) for d in (0.3, 0.4)]
    (summary,) = results.summarize(rows)
    assert summary["density"] == pytest.approx(0.35)
    line = results.summary_line(summary)
    assert "density 0.35 (percentile 90)" in line and "costs 2.00 copies (geometric mean of 2 layers)" in line


# ---- break-even


def series(**speedups: float) -> list[Row]:
    """Rows of one layer: by density, as d0_1=3.0."""
    return [
        make_row(density=float(name[1:].replace("_", ".")), speedup=value, sparse_ms=1.0, dense_ms=value)
        for name, value in speedups.items()
    ]


@pytest.mark.parametrize(
    "rows, relation, expected",
    [
        # speed-up 0.4 / density
        (series(d0_8=0.5, d0_2=2.0, d0_1=4.0), "=", 0.4),
        (series(d0_5=1.0, d0_1=4.0), ">", 0.5),
        (series(d0_5=1.5, d0_1=4.0), ">", 0.5),
        (series(d0_5=0.5, d0_1=0.9), "<", 0.1),
        # the lowest of several
        (series(d0_8=0.5, d0_4=2.0, d0_2=0.5, d0_1=2.0), "=", 0.2**0.5 * 0.1**0.5),
        (series(d0_0=9.0, d0_4=0.5, d0_1=2.0), "=", 0.2),
    ],
)
def test_break_even(rows, relation, expected):
    (entry,) = results.break_even(rows)
    assert (entry["relation"], entry["break_even"]) == (relation, pytest.approx(expected))
    assert (entry["layer"], entry["op"], entry["dtype"], entry["threads"]) == ("a", "agb", "float32", 2)


def test_break_even_needs_two_densities_against_dense():
    assert results.break_even(series(d0_1=2.0)) == []
    assert results.break_even(series(d0_0=2.0, d0_1=2.0)) == []
    assert results.break_even([replace(row, baseline="copy") for row in series(d0_5=0.5, d0_1=2.0)]) == []
    wrong = make_row(density=0.5, speedup=None, sparse_ms=None, dense_ms=None, baseline=None, error="off")
    assert results.break_even([*series(d0_1=2.0), wrong]) == []
    assert results.break_even_table(series(d0_1=2.0)) is None


def test_table_of_break_even_has_a_column_for_what_differs():
    rows = series(d0_8=0.5, d0_2=2.0)
    rows += [replace(row, op="wgc") for row in series(d0_5=2.0, d0_1=4.0)]
    rows += [replace(row, op="wgc", layer="b") for row in series(d0_5=0.5, d0_1=0.9)]
    table = results.break_even_table(rows)
    assert (list(table.headings), table.rows) == (["layer", "agb", "wgc"], [["a", "0.4", "> 0.5"], ["b", "-", "< 0.1"]])
    table = results.break_even_table(rows + [replace(row, threads=1) for row in rows])
    assert list(table.headings) == ["layer", "agb 1 threads", "agb 2 threads", "wgc 1 threads", "wgc 2 threads"]


# ---- comparison


def record_of(rows: list[Row], **machine) -> dict:
    return {"environment": MACHINE | machine, "rows": list(map(asdict, rows))}


def test_slower_rows_are_regressions_beyond_spread_and_tolerance():
    old = [make_row(layer=layer, speedup=2.0, spread=0.02) for layer in "abcde"]
    new = [
        replace(row, speedup=speedup, spread=spread)
        for row, speedup, spread in zip(old, (1.8, 1.91, 1.8, 2.5, None), (0.02, 0.01, 0.1, 0.0, None))
    ]
    found = compare.compare(record_of(old), MACHINE, new, 0.05)
    # c: within the spread of both, 12 %. e: now wrong.
    assert [change.regression for change in found.rows] == [True, False, False, False, True]
    (summary,) = found.summaries
    assert (summary.old, summary.new) == (pytest.approx(2.0), pytest.approx((1.8 * 1.91 * 1.8 * 2.5) ** 0.25))
    assert not summary.regression and found.regressions == 2
    table = compare.table(found, "old.json")
    assert table.rows[0][-4:] == ["2.00x", "1.80x", "-10.0%", "REGRESSION"]
    assert table.rows[4][-4:] == ["2.00x", "WRONG", "-", "REGRESSION"]
    assert "2 REGRESSIONS" in table.notes


def test_chance_cancels_in_summaries():
    old = [make_row(layer=str(layer), speedup=2.0, spread=0.06) for layer in range(16)]
    new = [replace(row, speedup=1.8) for row in old]
    # Of each row 12 % may be chance, of the mean over 16 rows 3 %, of that over one row 12 % again.
    found = compare.compare(record_of(old), MACHINE, new, 0.05)
    assert not any(change.regression for change in found.rows) and [
        change.regression for change in found.summaries
    ] == [True]
    assert not compare.compare(record_of(old), MACHINE, new, 0.11).regressions
    assert not compare.compare(record_of(old), MACHINE, new[:1], 0.05).regressions


def test_rows_are_matched_by_everything_that_identifies_them():
    row = make_row()
    changes = {
        "suite": "t", "layer": "b", "problem": "n1c1h1w1k1r1s1", "op": "wgc", "nominal_density": 0.2, "percentile": 90.0,
        "pattern": "skewed", "dtype": "bfloat16", "layout": "channels_last", "backend": "auto", "device": "cuda",
        "math": "tf32", "threads": 1,
    }  # fmt: skip
    for name, value in changes.items():
        found = compare.compare(record_of([row]), MACHINE, [replace(row, **{name: value})], 0.05)
        assert not found.rows and (len(found.only_old), len(found.only_new)) == (1, 1), name
        notes = compare.table(found, "old.json").notes
        assert any("1 of the rows are not in this measurement" in note for note in notes)
        assert any("1 of the rows are not in old.json" in note for note in notes)
        assert any("nothing to compare" in note for note in notes)
    # Times, density as it came out and multiplicity identify nothing.
    found = compare.compare(
        record_of([row]), MACHINE, [replace(row, density=0.11, sparse_ms=9.0, multiplicity=4)], 0.05
    )
    assert len(found.rows) == 1 and not found.only_old and not found.only_new


def test_records_of_earlier_versions_are_understood():
    row = make_row()
    record = record_of([row])
    for name in ("nominal_density", "device", "math", "dense_rel_error"):
        del record["rows"][0][name]
    assert len(compare.compare(record, MACHINE, [row], 0.05).rows) == 1


def test_differing_machines_are_named():
    cpu = {"name": "another CPU", "cores": 2, "isa": {"in_use": "avx2"}}
    found = compare.compare(record_of([make_row()], cpu=cpu, torch="2.12"), MACHINE, [make_row()], 0.05)
    assert found.environment == ["CPU another CPU, now some CPU", "torch 2.12, now 2.13"]
    assert not compare.compare(record_of([make_row()]), MACHINE, [make_row()], 0.05).environment
    assert compare.compare({"environment": {}, "rows": []}, MACHINE, [], 0.05).environment


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ("[]", "was not written by"),
        ('{"environment": {}}', "KeyError: 'rows'"),
        ('{"environment": {}, "rows": [{"speedup": 2}]}', "was not written by"),
        ('{"environment": {}, "rows": [3]}', "was not written by"),
        (json.dumps({"environment": 1, "rows": []}), "environment is not an object"),
        (json.dumps(record_of([make_row(speedup="2")])), "speedup is '2'"),
        (json.dumps(record_of([make_row(speedup=0)])), "speedup is 0"),
        (json.dumps(record_of([make_row(layer=["a"])])), "layer is ['a']"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="compare: .*old.json") as refused:
        compare.load(path)
    assert words in str(refused.value)
    result = CliRunner().invoke(cli.app, ["--compare", str(path)], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "--compare" in result.output


@pytest.fixture
def run(small_bench, monkeypatch):
    """Every call takes 0.1 ms: measured times can scatter so much on a busy machine that nothing is a regression."""
    clock = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: 1e-4 * next(clock)))

    def call(*arguments):
        fixed = ["--problem", PROBLEM, "--op", "wgc", "--backend", "dense", "--threads", "1", "--repeats", "3"]
        return CliRunner().invoke(cli.app, [*fixed, *map(str, arguments)], env={"COLUMNS": "400"})

    return call


def test_exit_status_of_a_comparison(tmp_path, run):
    path = tmp_path / "old.json"
    assert run("--json", path).exit_code == 0
    record = json.loads(path.read_text())

    def compare_with(factor: float):
        for row in record["rows"]:
            row["speedup"] *= factor
        path.write_text(json.dumps(record))
        return run("--compare", path)

    result = compare_with(1e-6)
    assert result.exit_code == 0 and "no regression" in result.output
    result = compare_with(1e12)
    assert result.exit_code == 1 and "REGRESSIONS" in result.output
    result = run("--compare", path, "--density", "0.7")
    assert result.exit_code == 1 and "nothing to compare" in result.output


# ---- pictures


def many_rows() -> list[Row]:
    return [
        make_row(layer=layer, op=op, density=density, speedup=0.4 * factor / density, baseline=baseline)
        for layer, factor in (("first", 1.0), ("second", 1.5), ("third", 3.0))
        for op, baseline in (("agb", "contiguous"), ("wgc", "channels_last"), ("prune", "copy"))
        for density in (0.5, 0.1, 0.01)
    ]


def test_pictures(tmp_path):
    png, svg = tmp_path / "a.png", tmp_path / "b.SVG"
    for path in (png, svg):
        plot.write(path, MACHINE, many_rows())
    with Image.open(png) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    texts = {element.text for element in ElementTree.parse(svg).iter() if element.tag.endswith("}text")}
    assert {"first", "second", "third", "geometric mean", "break-even", "agb", "wgc"} <= texts
    assert {"density of the gradient", "speed-up over dense", "some CPU, avx2"} <= texts
    assert "s, iid, float32, contiguous, cpu, 2 threads" in texts
    assert "prune" not in texts
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.SVG"}


def test_nothing_to_draw_is_said(tmp_path):
    wrong = make_row(speedup=None, sparse_ms=None, dense_ms=None, baseline=None, error="off")
    with pytest.raises(ValueError, match="no speed-up against dense to draw"):
        plot.write(tmp_path / "a.png", MACHINE, [wrong])
    assert not list(tmp_path.iterdir())


def test_plot_option(tmp_path, run):
    paths = [tmp_path / name for name in ("a.png", "b.svg", "c.svg")]
    result = run("--plot", f"{paths[0]},{paths[1]}", "--plot", paths[2])
    assert result.exit_code == 0, result.output
    assert set(tmp_path.iterdir()) == set(paths)
