# SPDX-License-Identifier: Apache-2.0
"""``python -m sparsebwd.bench noise``."""

from __future__ import annotations

import json

import pytest
from training import tiny  # noqa: F401
from typer.testing import CliRunner

from sparsebwd.bench import cli, noise
from sparsebwd.bench.noise import WAYS

COMMAND = ["noise", "--model", "tiny", "--image-size", "8", "--train-subset", "96", "--batch-size", "16", "--steps", "1"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [*COMMAND, *map(str, arguments)])


@pytest.mark.slow
def test_ways_are_compared(tiny, small_bench, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(noise, "WAYS", tuple(way._replace(values=way.values[-1:]) for way in WAYS))
    monkeypatch.setattr(noise, "_TESTED", 3)
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"a.{name}" for name in ("json", "md", "png", "svg")}
    plots = ("--plot", files["png"], "--plot", files["svg"])
    done = run("--json", files["json"], "--markdown", files["md"], *plots, "--draws", 4, "--repeats", 3)
    assert done.exit_code == 0, done.output
    record = json.loads(files["json"].read_text())
    assert [point["step"] for point in record["points"]] == [1]
    assert record["setting"]["command"].startswith("python -m sparsebwd.bench noise --model tiny")
    for point in record["points"]:
        rows = {(row["way"], row["value"]): row for row in point["rows"]}
        assert len(rows) == len(WAYS)
        assert rows["percentile", 99.95]["noise"] > 0
        assert rows["density", 0.15]["density"] == pytest.approx(0.15, abs=0.03)
        # Nothing is gained where so little is computed.
        assert rows["noise", 1.0]["noise"] == 0 and rows["noise", 1.0]["density"] == 1
        assert "budget 100 %" in rows["noise", 1.0]["controller"]
        assert all(row["speedup"]["total"] > 0 and row["noise_error"] >= 0 for row in rows.values())
        assert point["dense"]["total_ms"] > 0
    text = files["md"].read_text()
    assert "## tiny, digits, batch 16, after step 1" in text and "- noise 1: noise 0 % of SGD's (budget 100 %)" in text
    assert "noise=, a threshold for each layer and image" in files["svg"].read_text()


def test_some_ways_and_no_times(tiny, small_bench, tmp_path):  # noqa: F811
    done = run("--steps", "1", "--ways", "variance", "--repeats", 0, "--draws", 2, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    (point,) = json.loads((tmp_path / "a.json").read_text())["points"]
    assert {row["way"] for row in point["rows"]} == {"variance"} and point["dense"] is None
    assert all(row["speedup"] is None for row in point["rows"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--ways", "noise,luck"), "ways: got 'luck'; accepted: percentile, image, density, variance, noise, noise-none, row, sample"),
        (("--where", "here"), "where: got 'here'; accepted: everywhere, faster"),
        (("--batch-size", 3), "batch_size: got 3; accepted: 4 and more"),
        (("--plot", "a.pdf"), "plot: got 'a.pdf'; accepted: .png or .svg"),
    ],
)
def test_refusals(arguments, message, tiny):  # noqa: F811
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())
