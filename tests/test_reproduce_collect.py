# SPDX-License-Identifier: Apache-2.0
"""Results of the command that repeats the paper's tables, from directories of runs that nobody trained."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict

import pytest

from sparsebwd.reproduce import cli, estimate, paper, results, runs, timing
from sparsebwd.train import log
from sparsebwd.train.config import TrainConfig

LAYERS = list(estimate.multiply_adds("resnet18", "cifar", None, 32))


def fabricate(
    output, name, accuracies, *, densities=(), data=("cifar10", 10), speedup=None, quiet=True, nan=False, **options
):
    """The directory of a run: test accuracies and densities of its epochs, 10 steps each."""
    config = TrainConfig.from_recipe("paper-cifar", data=data[0], **options)
    variant = "dense" if config.dense else "sparse"
    epochs = []
    for index, accuracy in enumerate(accuracies):
        density = densities[index] if densities else None
        row = {
            "train_loss": 1.0,
            "train_accuracy": accuracy + 0.02,
            "test_loss": 1.0,
            "test_accuracy": accuracy,
            "step_ms": 100.0,
            "density": density,
            "layers": {} if density is None else {layer: {"density": density} for layer in LAYERS},
        }
        epochs.append(
            {"epoch": index + 1, "global_step": 10 * (index + 1), "complete": True, "variants": {variant: row}}
        )
    folder = output / name
    folder.mkdir()
    about = {"name": data[0], "train_images": 50_000, "classes": data[1], "image_size": 32}
    summary = None if nan else {**epochs[-1], "speedup": {}}
    record = {"config": asdict(config), "data": about, "epochs": epochs, "summary": summary}
    (folder / log.JSON_FILE).write_text(json.dumps(record))
    if nan:
        (folder / runs.FAILED_FILE).write_text("{}")
    if speedup:
        times = {"speedup": {"step": speedup, "backward": 2 * speedup}, "density": densities[-1], "quiet": quiet}
        times["variants"] = {"dense": {"step_ms": 200.0}, "sparse": {"step_ms": 200.0 / speedup}}
        (folder / timing.FILE).write_text(json.dumps(times))
    losses = [f"{step},{variant},0.1,{5 / step:.4f},\n" for step in range(1, 10 * len(accuracies) + 1)]
    (folder / log.STEPS_FILE).write_text("global_step,variant,learning_rate,loss,step_ms\n" + "".join(losses))


@pytest.fixture
def output(tmp_path):
    """ResNet-18 dense and at 90, two seeds each; at 95 collapsed and at 99.5 not finite; AlexNet; another width."""
    for seed, last in enumerate((0.94, 0.96)):
        fabricate(tmp_path, f"dense-{seed}", (0.5, last), dense=True, seed=seed)
        fabricate(
            tmp_path,
            f"p90-{seed}",
            (0.4, last - 0.01),
            densities=(0.5, 0.3),
            seed=seed,
            speedup=1.5 + seed,
            quiet=not seed,
        )
    fabricate(tmp_path, "p95", (0.5, 0.1), densities=(0.2, 0.0), percentile=95.0)
    fabricate(tmp_path, "p99.5", (0.1,), densities=(0.2,), percentile=99.5, nan=True)
    fabricate(tmp_path, "alexnet", (0.9,), densities=(0.02,), model="alexnet", data=("imagefolder", 10))
    fabricate(tmp_path, "narrow", (0.9,), dense=True, width=16)
    fabricate(tmp_path, "hundred", (0.7,), densities=(0.4,), data=("cifar100", 100))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / log.JSON_FILE).write_text("{")
    return tmp_path


def table(output, data="cifar10", **wanted):
    found = results.rows(results.read(output), paper.TABLES["table1"], data)
    return [row for row in found if all(getattr(row, name) == value for name, value in wanted.items())]


def test_rows_are_means_over_seeds(output):
    (dense,) = table(output, model="resnet18", kind="dense", settings="data=cifar10 width=None")
    assert dense.runs == 2 and dense.test_accuracy == pytest.approx(95) and dense.difference is None
    assert dense.test_spread == pytest.approx(2**0.5) and dense.train_accuracy == pytest.approx(97)
    assert (dense.paper_accuracy, dense.paper_density, dense.density) == (95.04, 1, None)
    (pruned,) = table(output, model="resnet18", kind="90")
    assert pruned.runs == 2 and pruned.difference == pytest.approx(-1) and not pruned.collapsed
    assert pruned.density == pytest.approx(0.4) and pruned.weighted_density == pytest.approx(0.4)
    assert (pruned.paper_accuracy, pruned.paper_density) == (95.04, 0.35)


def test_times_beside_other_work_give_way_to_others(output):
    (row,) = table(output, model="resnet18", kind="90")
    assert (row.step_speedup, row.backward_speedup, row.timed_quietly) == (1.5, 3.0, True)
    (output / "p90-0" / timing.FILE).unlink()
    (row,) = table(output, model="resnet18", kind="90")
    assert (row.step_speedup, row.timed_quietly, row.note) == (2.5, False, "timed beside other work")


def test_collapsed_runs_are_shown_as_such(output):
    (row,) = table(output, kind="95")
    assert row.collapsed == 1 and "COLLAPSED: 1 of 1" in row.note and row.test_accuracy == pytest.approx(10)
    (row,) = table(output, kind="99.5")
    assert row.not_finite == row.collapsed == 1 and row.test_accuracy is None and "loss not finite" in row.note


def test_layers_that_are_not_recorded_count_as_dense(output):
    path = output / "p90-0" / log.JSON_FILE
    record = json.loads(path.read_text())
    for entry in record["epochs"]:
        del entry["variants"]["sparse"]["layers"][LAYERS[0]]
    path.write_text(json.dumps(record))
    work = estimate.multiply_adds("resnet18", "cifar", None, 32)
    first = work[LAYERS[0]] / (2 * sum(work.values()) - work[LAYERS[0]])
    (result,) = (result for result in results.read(output) if result.name == "p90-0")
    assert result.weighted_density == pytest.approx(first + (1 - first) * 0.4) and result.density == pytest.approx(0.4)


def test_data_sets_and_settings_are_kept_apart(output):
    assert [row.model for row in table(output, settings="data=imagefolder width=None")] == ["alexnet"]
    (narrow,) = table(output, settings="data=cifar10 width=16")
    assert narrow.test_accuracy == pytest.approx(90) and narrow.runs == 1
    (hundred,) = table(output, "cifar100")
    assert hundred.paper_accuracy is None  # table 1 has none for it


def test_dense_at_equal_time(output):
    """Two dense epochs take as long as three at p = 85; their row says so, and what is lost against all of them."""
    fabricate(
        output, "p85", (0.4, 0.5, 0.94), densities=(0.5, 0.4, 0.3), percentile=85.0, width=8, speedup=1.5, epochs=3
    )
    fabricate(output, "dense", (0.4, 0.5, 0.95), dense=True, width=8, epochs=3)
    fabricate(output, "shorter", (0.4, 0.93), dense=True, width=8, epochs=3, max_steps=20)
    fabricate(output, "shortest", (0.3,), dense=True, width=8, epochs=3, max_steps=10)
    found = [row for row in table(output) if "width=8" in row.settings]
    assert [(row.kind, row.steps, row.as_long_as) for row in found] == [
        ("dense", 30, ""),
        ("85", 30, ""),
        ("dense", 20, "85"),
        ("dense", 10, ""),
    ]
    assert [row.difference for row in found] == [None, *map(pytest.approx, (-1, -2, -65))]
    assert [row.hours for row in found] == [pytest.approx(steps * 0.2 / 3600) for steps in (30, 20, 20, 10)]
    assert found[2].note == "dense at the time of p = 85" and "max_steps=20" in found[2].settings
    assert found[3].note == "COLLAPSED: 1 of 1"


def test_what_was_asked_for_names_a_row(output):
    """A budget of noise, or a density, is no percentile: it has rows of its own, behind those, and no figure of the paper's."""
    for seed in range(2):
        fabricate(output, f"noise-{seed}", (0.5, 0.94), densities=(0.4, 0.2), percentile=None, noise=0.1, seed=seed)
    fabricate(output, "density", (0.5, 0.9), densities=(0.2, 0.2), density=0.2, percentile=None)
    fabricate(output, "zeros", (0.5, 0.95), densities=(0.9, 0.9), percentile=None)
    found = [row for row in table(output, model="resnet18") if "width=None" in row.settings]
    assert [row.kind for row in found] == ["dense", "none", "90", "95", "99.5", "density 0.2", "noise 0.1"]
    assert (found[-1].runs, found[-1].paper_accuracy, found[-1].density) == (2, None, pytest.approx(0.3))
    labels = {result.kind: result.label for result in results.read(output)}
    assert labels["noise 0.1"] == "noise = 0.1" and labels["90"] == "p = 90" and labels["none"] == "zeros skipped only"


@pytest.mark.parametrize("what", ["table1", "table2", "figure3"])
def test_collect(output, what, capsys):
    """Files in each form, of what was found, though the runs that the paper has are missing."""
    assert cli.main([what, "--output", str(output), "--collect"]) == 0
    shown = capsys.readouterr().out
    assert "runs are missing" in shown
    if what == "figure3":
        assert (output / "figure3.png").read_bytes().startswith(b"\x89PNG")
        drawn = (output / "figure3.svg").read_text()
        assert drawn.count('id="axes_') == 4  # ResNet-18 in two widths and on CIFAR-100, AlexNet
        return
    with open(output / f"{what}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((output / f"{what}.json").read_text())
    text = (output / f"{what}.md").read_text()
    count = {"table1": 6, "table2": 1}[what]
    assert (
        len(rows) == len(record["rows"]) == count
        and text.count("\n| resnet18 |") + text.count("\n| alexnet |") == count
    )
    if what == "table1":
        assert "95.00 ± 1.41" in text and "95.00 ± 1.41" in shown and "COLLAPSED" in shown
        assert (output / "table1-time.svg").exists()
    assert not [path for path in output.iterdir() if path.name.endswith(".tmp")]


def test_the_paper_as_printed():
    counts = {name: len(entry.rows) for name, entry in paper.TABLES.items()}
    assert counts == {"table1": 7, "table2": 7, "table3": 4}
    for entry in paper.TABLES.values():
        for model, row in entry.rows.items():
            assert len(row) == 5 and all(0 < accuracy < 100 and 0 < density <= 1 for accuracy, density in row)
            assert (row[0][1] == 1) == (model != "alexnet")
    assert paper.TABLES["table3"].figures("alexnet", "99.5") == (39.58, 0.02)
    assert (
        paper.TABLES["table3"].figures("resnet50", "90") is None
        and paper.TABLES["table1"].figures("resnet18", "80") is None
    )


@pytest.mark.parametrize(
    "file, change",
    [
        (log.JSON_FILE, lambda record: record.pop("config")),
        (log.JSON_FILE, lambda record: record.pop("data")),
        (log.JSON_FILE, lambda record: record.update(config=[])),
        (log.JSON_FILE, lambda record: record["config"].update(percentile="x")),
        (log.JSON_FILE, lambda record: record.update(epochs=3)),
        (log.JSON_FILE, lambda record: record.update(epochs=[{}])),
        (log.JSON_FILE, lambda record: record["epochs"][-1]["variants"].update(sparse=[])),
        (log.JSON_FILE, lambda record: record["epochs"][0].update(global_step="1")),
        (log.JSON_FILE, lambda record: record["data"].pop("classes")),
        (timing.FILE, lambda record: record.pop("speedup")),
        (timing.FILE, lambda record: record.update(speedup={})),
        (timing.FILE, lambda record: record["variants"].pop("dense")),
    ],
)
def test_files_that_are_no_logs_are_named(output, capsys, file, change):
    path = output / "p90-0" / file
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit) as ended:
        cli.main(["table2", "--collect", "--output", str(output)])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2
    assert f"error: {path.parent}" in said and "its contents are not what this version writes" in said
