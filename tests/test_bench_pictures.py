# SPDX-License-Identifier: Apache-2.0
"""Pictures: those of committed results, and that their numbers can be read."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

import sparsebwd
from sparsebwd.bench import cli, pictures, plot
from sparsebwd.profiling import LayerProfile

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
DENSITIES = RESULTS / "2026-11-23-epyc-zen5-densities.json"


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plot", *map(str, arguments)], env={"COLUMNS": "400"})


@pytest.fixture
def drawn(monkeypatch):
    """Figures in place of files."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    return figures


def assert_readable(figure):
    """No panel is empty, none of its tick labels touches the next, and all is within the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    assert figure.axes
    for axes in figure.axes:
        assert axes.lines or axes.patches or axes.collections, "an empty panel"
        for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            labels = [label for label in axis.get_ticklabels() if label.get_visible() and label.get_text()]
            low, high = sorted(axis.get_view_interval())
            boxes = [
                label.get_window_extent()
                for label, place in zip(labels, axis.get_ticklocs())
                if low <= place <= high
            ]
            intervals = sorted((getattr(box, f"{side}0"), getattr(box, f"{side}1")) for box in boxes)
            for (_, end), (start, _) in pairwise(intervals):
                assert end < start, f"labels of {side} overlap: {[label.get_text() for label in labels]}"
            assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1 for box in boxes)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_make_readable_pictures(path, drawn):
    record = json.loads(path.read_text("utf-8"))
    if "rows" not in record or "op" not in record["rows"][0]:
        pytest.skip("of whole steps")
    rows = pictures.rows_of(record)
    if all(row.baseline == "copy" for row in rows):
        with pytest.raises(ValueError, match="there is no speed-up against dense to draw"):
            plot.write(Path("x.png"), record["environment"], rows)
        return
    plot.write(Path("x.png"), record["environment"], rows)
    assert_readable(drawn[0])


def test_overview_of_the_readme(drawn):
    record = json.loads(DENSITIES.read_text("utf-8"))
    rows = pictures.rows_of(record)
    assert run(DENSITIES, "x.png", "--overview").exit_code == 0
    (figure,) = drawn
    assert_readable(figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    for name, label in (("agb", "gradient of the input (AGB)"), ("wgc", "gradient of the weight (WGC)")):
        by_density = plot._by([row for row in rows if row.op == name], "nominal_density")
        assert list(lines[label].get_xdata()) == sorted(by_density)
        lowest = by_density[min(by_density)]
        mean = 1.0
        for row in lowest:
            mean *= row.speedup ** (1 / len(lowest))
        assert lines[label].get_ydata()[0] == pytest.approx(mean)
    crossed = [x for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()]
    assert len(crossed) == sum(entry["relation"] == "=" for entry in plot.break_even(rows)) > 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    result = run(DENSITIES, path, "--overview")
    assert result.exit_code == 0, result.output
    assert (b"\x89PNG" if suffix == ".png" else b"<svg") in path.read_bytes()[:600]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((DENSITIES, "a.pdf"), 2, "plot: got 'a.pdf'; accepted: .png or .svg"),
        (("/nowhere.json", "a.png"), 2, "plot: /nowhere.json: No such file"),
        ((RESULTS / "2026-11-23-epyc-zen5-step-resnet18.json", "a.png"), 2, "was not written by"),
        ((RESULTS / "2026-11-23-epyc-zen5-auto.json", "/dev/null/a.png"), 2, "/dev/null is not a folder"),
    ],
)
def test_refuses(arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == status and message in " ".join(result.output.split()), result.output


def test_an_overview_is_of_one_setting():
    record = json.loads(DENSITIES.read_text("utf-8"))
    rows = pictures.rows_of({"rows": [{**row, "threads": 1 + (row["op"] == "agb")} for row in record["rows"]]})
    with pytest.raises(ValueError, match="got rows of 2 settings; accepted: of one dtype"):
        plot.overview(Path("x.png"), record["environment"], rows)


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.2, None])
@pytest.mark.parametrize("count", [1, 20, 120])
def test_pictures_of_profiles_are_readable(count, density, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, path, **_: drawn.append(figure) or Path(path).touch())
    layers = tuple(
        LayerProfile(f"stages.{i}.with.a.very.long.name.conv1", "n32c64h32w32k64r3s3u1p1d1g1", density, 1234.5, 400.0, "sparse", "", "cpu")
        for i in range(count)
    )
    times = {"total": 1.0, "forward": 1.0, "backward": 1.0, "optimizer": 1.0, "convolutions": 1.0}
    sparsebwd.Profile(times, times, 0.0, layers, (), {}).plot(tmp_path / "a.png")
    assert_readable(drawn[0])
