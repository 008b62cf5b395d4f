# SPDX-License-Identifier: Apache-2.0
"""Tables on narrow and wide terminals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import sparsebwd
from sparsebwd import models
from sparsebwd.bench import pictures, results, sides, zoo
from sparsebwd.bench.terminal import Table

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def shown(show, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", ["2026-11-23-epyc-zen5-densities", "2026-11-23-epyc-zen5-avx2", "2026-11-23-epyc-zen5-contiguous"])
def test_rows_of_networks_fit_80_columns(name):
    rows = pictures.rows_of(json.loads((RESULTS / f"{name}.json").read_text("utf-8")))
    rows = [row for row in rows if row.suite == rows[0].suite]
    table = shown(lambda console: results.show(rows, console), 80).partition("all rows:")[0].splitlines()
    assert len(table) == len(rows) + 1 and max(map(len, table)) <= 80
    for heading in ("layer", "op", "density", "sparse ms", "dense ms", "speed-up"):
        assert heading in table[0]


def test_what_is_left_out_is_said_and_wide_terminals_have_all():
    rows = pictures.rows_of(json.loads((RESULTS / "2026-11-28-epyc-zen3-auto.json").read_text("utf-8")))
    narrow, wide = (shown(lambda console: results.show(rows, console), width) for width in (80, 300))
    assert "not shown for want of width: " in narrow and "not shown" not in wide
    columns, _ = results._visible(rows)
    left_out = [column.heading for column in columns if f" {column.heading}" not in narrow.splitlines()[0]][1:]
    assert left_out and all(heading in narrow.partition("not shown")[2] for heading in left_out)
    assert all(column.heading in wide.splitlines()[0] for column in columns)


def test_columns_go_one_by_one():
    table = Table("t", ("name", "a", "b"), [("x" * 10, "1" * 10, "2" * 10)], ("name",), optional=("b", "a"))
    for width, count in ((34, 3), (33, 2), (22, 2), (21, 1), (5, 1)):
        text = shown(table.show, width)
        assert [("1" * 10 in text), ("2" * 10 in text)] == [count > 1, count > 2], width
        assert ("not shown" in text) == (count < 3)


def test_layers_of_a_step_fit_80_columns():
    record = json.loads((RESULTS / "2026-11-23-epyc-zen5-step-resnet18.json").read_text("utf-8"))
    table = sides.layer_table("Layers", record["points"][0]["layers"])
    lines = shown(table.show, 80).strip().splitlines()[1:]
    assert max(len(line) for line in lines if not line.startswith("not shown")) <= 80
    assert "speed-up" in lines[0] and "density" in lines[0]


def test_monitor_of_resnet18_fits_80_columns():
    model = sparsebwd.convert(models.create("resnet18", 10, width=16), 90, where="everywhere")
    with sparsebwd.DensityMonitor(model) as monitor:
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert max(map(len, str(monitor).splitlines())) <= 80
    monitor._names = {number: "a.very.long.name." * 5 + name for number, name in monitor._names.items()}
    assert all(name in str(monitor) for name in monitor._names.values())


@pytest.mark.parametrize("name", ["networks", "resnet18-150-steps"])
def test_networks_fit_80_columns(name):
    record = json.loads((RESULTS / f"2026-11-29-epyc-zen3-zoo-{name}.json").read_text("utf-8"))
    for table in zoo.tables(record["setting"], record["rows"]):
        lines = shown(table.show, 80).strip().splitlines()[1:]
        shown_rows = lines[: len(table.rows) + 1]
        assert max(map(len, shown_rows)) <= 80 and "ratio" in shown_rows[0]
