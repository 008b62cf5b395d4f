# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the training command: those of another run, truncated, corrupt, or with wrong contents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from training import DRIVER, SMALL, interrupt, refused, saved_state, tiny, train  # noqa: F401

from sparsebwd import data
from sparsebwd.data import records
from sparsebwd.train import checkpoint, cli, measure, trainer

# checkpoints that do not fit


def test_checkpoint_of_another_run(tmp_path, capsys, monkeypatch):
    train(tmp_path, "--max-steps", "1")
    arguments = [*SMALL, "--output", str(tmp_path), "--resume"]
    message = refused(capsys, *arguments, "--percentile", "95", "--seed", "3")
    assert "percentile is 90.0 in the checkpoint and 95.0 here; seed is 0 in the checkpoint and 3 here" in message
    message = refused(capsys, *arguments, "--model", "resnet18")
    assert "model is 'tiny' in the checkpoint and 'resnet18' here" in message
    assert "compare is False in the checkpoint and True here" in refused(capsys, *arguments, "--compare")
    # Two data sets of the same name, as image folders may be.
    monkeypatch.setattr(data.ImageData, "fingerprint", "of other images")
    assert "the images or labels are not the same" in refused(capsys, *arguments)


@pytest.mark.parametrize("size", [0, 100, -1, -1000])
def test_truncated_checkpoint(tmp_path, capsys, size):
    train(tmp_path, "--max-steps", "1")
    path = tmp_path / checkpoint.FILE
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    message = refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    assert f"{path}: truncated or corrupt" in message


def test_checkpoint_with_code_is_not_run(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_run",)

    torch.save({"format": 1, "config": {}, "fingerprint": "", "state": Evil()}, tmp_path / checkpoint.FILE)
    assert "truncated or corrupt" in refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    assert not (tmp_path / "was_run").exists()


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, "--max-steps", "1")
    before = (tmp_path / checkpoint.FILE).read_bytes()

    def half(record, file):
        file.write(b"half of a checkpo")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert cli.main([*SMALL, "--output", str(tmp_path), "--resume"]) == 1
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_an_existing_run_is_not_replaced(tmp_path, capsys):
    train(tmp_path, "--max-steps", "1")
    assert "holds a run already" in refused(capsys, *SMALL, "--output", str(tmp_path))
    train(tmp_path, "--max-steps", "2", "--overwrite")
    assert saved_state(tmp_path)["step"] == 2


def test_a_replaced_run_cannot_be_resumed(tmp_path, monkeypatch):
    train(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(data.Batches, "batch", interrupt)
        assert cli.main([*SMALL, "--output", str(tmp_path), "--overwrite"]) == 130
    train(tmp_path, "--resume", "--max-steps", "1")
    assert saved_state(tmp_path)["step"] == 1


# checkpoints


def test_every_bit_of_a_checkpoint_is_verified(tmp_path, capsys):
    train(tmp_path, "--max-steps", "1")
    path = tmp_path / checkpoint.FILE
    whole = path.read_bytes()
    stored = saved_state(tmp_path)["twins"]["sparse"]["model"]["0.weight"]
    weight = whole.index(stored.permute(0, 2, 3, 1).numpy().tobytes())  # in the order of channels_last
    for place in (weight, len(whole) // 3, len(whole) - 1, len(whole) - 70):
        corrupt = bytearray(whole)
        corrupt[place] ^= 4
        path.write_bytes(corrupt)
        assert f"{path}: truncated or corrupt" in refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    path.write_bytes(whole)
    train(tmp_path, "--resume")


@pytest.mark.parametrize("place", range(0, 1800, 60))
def test_every_bit_of_a_record_is_verified(tmp_path, place):
    path = tmp_path / "record.pt"
    records.save_record(path, {"tensor": torch.arange(8.0), "text": "words"})
    content = bytearray(path.read_bytes())
    assert torch.load(path, weights_only=True)["text"] == "words"
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    with pytest.raises(records.RecordError, match="truncated or corrupt"):
        records.load_record(path)


def replaced(path, value):
    """Replaces what is at `path`, as "state/step", in a record."""

    def change(record):
        *parents, last = path.split("/")
        for key in parents:
            record = record[int(key) if isinstance(record, list) else key]
        last = int(last) if isinstance(record, list) or last == "5" else last
        if value is KeyError:
            del record[last]
        else:
            record[last] = value(record[last]) if callable(value) else value

    return change


def with_nan(tensor):
    tensor[(0,) * tensor.ndim] = float("nan")
    return tensor


def absurd(tensor):
    """Finite, and what no run can have."""
    return tensor.fill_(1e38)


WRONG = {
    "config": ([1, 2], "config: got list, accepted is dict"),
    "config/seed": ([0], "config.seed: got list"),
    "config/colour": ("red", "colour is 'red' in the checkpoint and unknown here"),
    "fingerprint": (5, "fingerprint: got int"),
    "config/seed#long": ("9" * 10_000, "seed is '9999"),
    "config/5": (1, "config: a name: got int, accepted is str"),
    "format": (7, "got format 7, accepted is 2"),
    "format#tensor": (torch.zeros(2, 2), "format: got Tensor, accepted is int"),
    "state": (KeyError, "checkpoint lacks state"),
    "state/step": (-1, "got step -1, but this run has 12 steps"),
    "state/step#far": (10**9, "got step 1000000000, but this run has 12 steps"),
    "state/step#float": (1.0, "step: got float, accepted is int"),
    "state/step#bool": (True, "step: got bool, accepted is int"),
    "state/step#missing": (KeyError, "state lacks step"),
    "state/history": ({}, "history: got dict, accepted is list"),
    "state/history#none": ([], "history: got 0 epochs in a state of step 7, accepted are 1 to 2"),
    "state/history#more": (lambda history: history * 2, "history[2].epoch: got 1, in a state of step 7 accepted is 3"),
    "state/history/0#cut": (KeyError, "history[0].epoch: got 2, in a state of step 7 accepted is 1"),
    "state/history/0/complete": (False, "history[0].complete: got False, in a state of step 7 accepted is True"),
    "state/history/1/complete": (True, "history[1].complete: got True, in a state of step 7 accepted is False"),
    "state/history/1/epoch": (10**9, "history[1].epoch: got 1000000000, in a state of step 7 accepted is 2"),
    "state/twins/sparse/tally/images#huge": (10**400, "sparse.tally.images: got 10000"),
    "state/history/0": (3, "history[0]: got int, accepted is dict"),
    "state/history/0/global_step": (9, "history[0].global_step: got 9, in a state of step 7 accepted is 6"),
    "state/history/0/variants/sparse/test_loss": ("low", "history[0].sparse.test_loss: got str"),
    "state/history/0/variants/sparse": (KeyError, "history[0].variants lacks sparse"),
    "state/twins": ([], "twins: got list"),
    "state/twins/sparse": (KeyError, "twins lacks sparse"),
    "state/twins/sparse/model/0.weight": (KeyError, "sparse.model lacks 0.weight"),
    "state/twins/sparse/model/0.weight#shape": (torch.zeros(8, 3, 1, 1), "got shape (8, 3, 1, 1), this run has (8, 3, 3, 3)"),
    "state/twins/sparse/model/0.weight#dtype": (torch.Tensor.double, "got dtype torch.float64, this run has torch.float32"),
    "state/twins/sparse/model/0.weight#nan": (with_nan, "sparse.model.0.weight is not finite"),
    "state/twins/sparse/model/0.weight#sparse": (torch.Tensor.to_sparse, "got layout torch.sparse_coo"),
    "state/twins/sparse/model/1.running_var": (torch.Tensor.neg, "sparse.model.1.running_var is negative"),
    "state/twins/sparse/model/1.num_batches_tracked": (torch.tensor(-1), "sparse.model.1.num_batches_tracked is negative"),
    "state/twins/sparse/model/9.bias": ([0.0] * 10, "sparse.model.9.bias: got list, accepted is Tensor"),
    "state/twins/sparse/model/more": (torch.zeros(1), "sparse.model has more, which this run has not"),
    "state/twins/sparse/momenta": ({}, "sparse.momenta lacks 0.weight, 1.weight, 1.bias"),
    "state/twins/sparse/momenta/0.weight": (with_nan, "sparse.momenta.0.weight is not finite"),
    "state/twins/sparse/momenta/1.bias": (torch.zeros(9), "sparse.momenta.1.bias: got shape (9,)"),
    "state/twins/sparse/sigma_histories": ({"0.sigma_history": torch.zeros(5)}, "sparse.sigma_histories has 0.sigma_history"),
    "state/twins/sparse/tally/loss": (float("nan"), "sparse.tally.loss: got nan, accepted are finite numbers"),
    "state/twins/sparse/tally/step": ("abc", "sparse.tally.step: got str, accepted is list"),
    "state/twins/sparse/tally/layers": ({"0": {"density": [1.0]}}, "sparse.tally.layers.0.density: got 1 numbers"),
    "state/twins/sparse/model/0.weight#large": (absurd, "sparse.model.0.weight has 1e+38; accepted are magnitudes up to 1.84e+19"),
    "state/twins/sparse/model/1.running_var#large": (absurd, "sparse.model.1.running_var has 1e+38"),
    "state/twins/sparse/momenta/0.weight#large": (absurd, "sparse.momenta.0.weight has 1e+38"),
    "state/twins/sparse/tally/loss#negative": (-1.0, "sparse.tally.loss: got -1.0, accepted are finite numbers from 0"),
    "state/twins/sparse/tally/step#negative": ([-0.1], "sparse.tally.step: got -0.1"),
    "state/twins/sparse/tally/correct": (17.0, "sparse.tally.correct: got 17.0 of 16.0 images"),
    "state/twins/sparse/tally/layers#negative": ({"0": {"sigma": [-1.0, 1]}}, "tally.layers.0.sigma: got -1.0"),
    "state/twins/sparse/tally/layers#none": ({"0": {"sigma": [1.0, 0]}}, "layers.0.sigma: got the sum 1.0 of 0 values"),
    "state/twins/sparse/tally/layers#share": ({"0": {"density": [3.0, 2]}}, "density: got the sum 3.0 of 2 values"),
    "state/history/0/epoch": (-1, "history[0].epoch: got -1"),
    "state/history/0/learning_rate": (-0.1, "history[0].learning_rate: got -0.1"),
    "state/history/0/variants/sparse/density": (1.5, "history[0].sparse.density: got 1.5, accepted are numbers from 0 to 1"),
    "state/history/0/variants/sparse/test_accuracy": (2.0, "history[0].sparse.test_accuracy: got 2.0"),
    "state/history/0/variants/sparse/train_loss": (float("inf"), "history[0].sparse.train_loss: got inf"),
    "state/history/0/variants/sparse/layers": ({"0": {"tau": -1.0}}, "history[0].sparse.layers.0.tau: got -1.0"),
    "state/environment": (None, "environment: got NoneType"),
    "state/environment/threads": (torch.zeros(3), "environment.threads: got Tensor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def a_checkpoint(tmp_path_factory):
    """Of step 7 of 12."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        from sparsebwd import models

        patch.setattr(models, "_BUILDERS", dict(models._BUILDERS))
        exec(DRIVER.partition("import sys")[0], {})
        train(folder, "--max-steps", "7")
    return folder / checkpoint.FILE


@pytest.mark.parametrize("path", WRONG)
def test_wrong_contents_are_refused(tmp_path, capsys, a_checkpoint, path):
    """Of a file whose digest is right. Nothing of it is used."""
    value, message = WRONG[path]
    record = records.load_record(a_checkpoint)
    replaced(path.partition("#")[0], value)(record)
    records.save_record(tmp_path / checkpoint.FILE, record)
    shown = refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    assert message in shown and f"{tmp_path / checkpoint.FILE}: " in shown and len(shown) < 2000


def test_contents_that_are_no_dictionary_are_refused(tmp_path, capsys):
    records.save_record(tmp_path / checkpoint.FILE, [1, 2, 3])
    assert "checkpoint: got list, accepted is dict" in refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")


def test_wrong_histories_of_predicted_thresholds_are_refused(tmp_path, capsys):
    options = ["--threshold", "predicted"]
    train(tmp_path, *options, "--max-steps", "2")
    path = tmp_path / checkpoint.FILE
    record = records.load_record(path)
    history = record["state"]["twins"]["sparse"]["sigma_histories"]["3.sigma_history"]
    negative, large = (int(torch.tensor(value).view(torch.int32)) for value in (-1.0, 1e38))
    for place, value, message in (
        (0, -1, "is negative"),
        (1, 0x7FC00000, "is not finite"),
        (2, negative, "is negative"),
        (3, large, "has 1e+38"),
    ):
        before = int(history[place])
        history[place] = value
        records.save_record(path, record)
        history[place] = before
        shown = refused(capsys, *SMALL, "--output", str(tmp_path), *options, "--resume")
        assert f"sparse.sigma_histories.3.sigma_history {message}" in shown


def test_a_checkpoint_of_an_earlier_version_is_named_so(tmp_path, capsys):
    torch.save({"format": 1, "config": {}, "fingerprint": "", "state": {}}, tmp_path / checkpoint.FILE)
    message = refused(capsys, *SMALL, "--output", str(tmp_path), "--resume")
    assert "written by an earlier version: it does not end in its digest" in message and "--overwrite" in message


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path, monkeypatch, capsys):
    train(tmp_path, "--max-steps", "1")
    before = (tmp_path / checkpoint.FILE).read_bytes()
    one_step = trainer.Trainer.train_step

    def spoil(self):
        one_step(self)
        if self.steps_done == 3:
            with_nan(self.twins[0].model[9].bias.data)

    monkeypatch.setattr(trainer.Trainer, "train_step", spoil)
    assert cli.main([*SMALL, "--output", str(tmp_path), "--resume", "--max-steps", "3"]) == 1
    assert "in the sparse model after step 3, 9.bias is not finite: try a lower" in capsys.readouterr().err
    assert (tmp_path / checkpoint.FILE).read_bytes() == before


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_log_is_json_whatever_was_measured(tmp_path, monkeypatch, loss):
    """A model whose weights are finite may still have no finite loss on the test images; the run goes on."""
    evaluate = trainer.Trainer._evaluate
    monkeypatch.setattr(trainer.Trainer, "_evaluate", lambda self, twin: {**evaluate(self, twin), "test_loss": loss})
    train(tmp_path, "--max-steps", "7")
    train(tmp_path, "--resume")

    def no_json(constant):
        raise AssertionError(f"{constant} is not JSON")

    log = json.loads((tmp_path / "log.json").read_text(), parse_constant=no_json)
    rows = [*log["epochs"], log["summary"]]
    assert len(rows) == 3 and all(row["variants"]["sparse"]["test_loss"] is None for row in rows)
    assert all(row["variants"]["sparse"]["test_accuracy"] is not None for row in rows)


def test_overflown_gradients_do_not_spoil_a_checkpoint():
    """A scaler skips such a step, so that weights stay finite; the statistics of layers have to."""
    tally = measure.EpochTally()
    for sigma in (1.0, float("inf"), float("nan"), 3.0):
        tally.add_densities({"total": {"density": 0.5, "sigma": sigma, "tau": None}, "layers": {}})
    assert tally.layers[""] == {"density": [2.0, 4], "sigma": [4.0, 2]}
