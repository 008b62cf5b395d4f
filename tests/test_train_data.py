# SPDX-License-Identifier: Apache-2.0
"""Training on folders of images: streamed as from the cache, crops for training and testing, images that cannot be read."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

import pytest
import torch
from images import write_classes
from training import assert_same_run, refused, saved_state, signals, tiny  # noqa: F401

from sparsebwd.data import Batches, streaming
from sparsebwd.train import checkpoint, cli, trainer

RUN = ["--model", "tiny", "--data", "imagefolder", "--image-size", "8", "--batch-size", "4", "--epochs", "2"]
RUN += ["--measure-every", "3"]


@pytest.fixture
def folder(tmp_path):
    """22 training and 10 test images: 5 steps an epoch."""
    return write_classes(tmp_path / "images", train=11, test=5, size=(20, 14))


def run(folder, output, *arguments):
    cache = ["--cache-dir", str(folder.parent / "cache")]
    return cli.main([*RUN, "--data-dir", str(folder), *cache, "--output", str(output), *arguments])


def test_streamed_as_cached(folder, tmp_path, monkeypatch):
    """A whole run, whatever the number of workers: nothing of it depends on where the images come from."""
    monkeypatch.setattr(trainer.TrainConfig, "differences", lambda *_: [])
    assert run(folder, tmp_path / "cached") == 0
    for workers in ("0", "2"):
        assert run(folder, tmp_path / workers, "--stream", "--workers", workers) == 0
        assert_same_run(tmp_path / "cached", tmp_path / workers)
    assert not torch.multiprocessing.active_children()


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_resumed_within_an_epoch(folder, tmp_path, crop):
    options = ["--stream", "--crop", crop]
    assert run(folder, tmp_path / "whole", *options, "--workers", "2") == 0
    assert run(folder, tmp_path / "parts", *options, "--max-steps", "3") == 0
    assert run(folder, tmp_path / "parts", *options, "--resume", "--workers", "0", "--max-steps", "7") == 0
    assert run(folder, tmp_path / "parts", *options, "--resume", "--skip-unreadable") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_crops_are_those_of_the_data(folder, tmp_path, monkeypatch):
    """For training and for testing; by the size of the images where asked."""
    seen = []

    class Watched(Batches):
        def __init__(self, images, *arguments, crop, **options):
            seen.append((crop, images))
            super().__init__(images, *arguments, crop=crop, **options)

    monkeypatch.setattr(trainer, "Batches", Watched)
    for number, (options, crop, streamed) in enumerate(
        [
            ([], "padded", False),
            (["--crop", "resized"], "resized", True),
            (["--crop", "resized", "--no-stream"], "resized", False),
            (["--crop", "auto"], "padded", False),
            (["--crop", "auto", "--image-size", "65"], "resized", True),
        ]
    ):
        assert run(folder, tmp_path / str(number), *options, "--max-steps", "1", "--workers", "0") == 0
        (got, images) = seen.pop()
        assert got == crop and isinstance(images, streaming.ImageFiles) == streamed
        assert saved_state(tmp_path / str(number))["step"] == 1


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (["--crop", "resized"], [], "crop is 'resized' in the checkpoint and 'padded' here"),
        (["--stream"], ["--no-stream"], "stream is True in the checkpoint and False here"),
    ],
)
def test_another_crop_is_another_run(folder, tmp_path, capsys, before, now, message):
    assert run(folder, tmp_path / "run", *before, "--max-steps", "1", "--workers", "0") == 0
    cache = ["--cache-dir", str(tmp_path / "cache")]
    shown = refused(
        capsys, *RUN, "--data-dir", str(folder), *cache, "--output", str(tmp_path / "run"), *now, "--resume"
    )
    assert message in shown


def test_bad_options(folder, capsys):
    assert "crop: got 'random', accepted are auto, padded, resized" in refused(capsys, *RUN, "--crop", "random")
    assert "workers: got -1, accepted are numbers from 0 to 512" in refused(capsys, *RUN, "--workers", "-1")
    assert "stream: got True, but only imagefolder is streamed" in refused(capsys, "--stream")


# images that cannot be read


@pytest.mark.parametrize("options", [["--no-stream"], ["--stream", "--workers", "0"]])
def test_unreadable_at_the_start(folder, tmp_path, capsys, options):
    """Where all are decoded, or enough for their mean and deviation."""
    (folder / "train" / "cat" / "3.png").write_bytes(b"")
    cache = ["--cache-dir", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    message = refused(capsys, *RUN, "--data-dir", str(folder), *cache, *options)
    assert "cat/3.png: truncated, corrupt or no image: it does not begin as a JPEG or PNG file" in message
    assert run(folder, tmp_path / "run", *options, "--skip-unreadable", "--max-steps", "1") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 image cannot be read and is left out: " in shown and "cat/3.png: truncated" in shown


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_unreadable_on_the_way(folder, tmp_path, capsys, monkeypatch, workers, part):
    """What was done until then is kept; without the image the run goes on from there."""
    options = ["--stream", "--workers", workers]
    one_step = trainer.Trainer.train_step

    def spoil(self):
        if self.steps_done == 2:
            for path in (folder / part / "cat").iterdir():
                path.write_bytes(b"")
            self._batches.close()  # what workers have made ahead
        one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", spoil)
        assert run(folder, tmp_path / "run", *options) == 1
    message = capsys.readouterr().err
    step = saved_state(tmp_path / "run")["step"]
    assert message.startswith(f"error: after step {step}, {folder}/{part}/cat/") and message.count("\n") == 1
    assert "truncated, corrupt or no image: " in message
    assert message.endswith("; to leave it out, add --skip-unreadable to --resume\n")
    assert step == 5 if part == "test" else 2 <= step < 5
    assert not torch.multiprocessing.active_children()


def test_unreadable_on_the_way_can_be_left_out(folder, tmp_path, capsys, monkeypatch):
    """The statistics and the look at the data are those of before; only batches see the broken image."""
    one_step = trainer.Trainer.train_step
    path = folder / "train" / "cat" / "3.png"
    whole = path.read_bytes()

    def spoil(self):
        path.write_bytes(b"" if self.steps_done >= 2 else whole)
        one_step(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", spoil)
    options = ["--stream", "--workers", "0"]
    assert run(folder, tmp_path / "run", *options) == 1
    assert run(folder, tmp_path / "run", *options, "--resume", "--skip-unreadable") == 0
    assert saved_state(tmp_path / "run")["step"] == 10
    shown = capsys.readouterr().out
    assert shown.count("1 image cannot be read and is left out: ") == 1


@pytest.mark.parametrize("path", ["train/cat/3.png", "test/dog/1.png"])
def test_images_broken_from_the_start_in_one_line(folder, tmp_path, capfd, path):
    (folder / path).write_bytes(b"\x89PNG")
    with contextlib.suppress(SystemExit):
        run(folder, tmp_path / "run", "--stream", "--workers", "1")
    *_, last = capfd.readouterr().err.splitlines()
    assert "error: " in last and f"{folder / path}: truncated, corrupt or no image: " in last


def test_what_is_ignored_is_said_once(folder, tmp_path, capsys):
    (folder / "train" / "cat" / "x.webp").touch()
    assert run(folder, tmp_path / "run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("1 other entry ignored: 1 that end in .webp") == 1


# signals


@pytest.mark.slow
@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_to_all_processes(folder, tmp_path, monkeypatch, capsys, number):
    """As from a terminal or a batch system: workers live until the run has saved."""
    one_step = trainer.Trainer.train_step

    def signalled(self):
        one_step(self)
        if self.steps_done == 3:
            pids = [str(child.pid) for child in torch.multiprocessing.active_children()]
            # By another process, as a batch system does.
            assert (
                len(pids) == 2 and subprocess.run(["sh", "-c", f"kill -{int(number)} {' '.join(pids)}"]).returncode == 0
            )
            os.kill(os.getpid(), number)

    options = ["--stream", "--workers", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", signalled)
        assert run(folder, tmp_path / "run", *options) == 128 + number
    assert "goes on from here" in capsys.readouterr().err
    assert run(folder, tmp_path / "run", *options, "--resume") == 0
    assert run(folder, tmp_path / "whole", *options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# names


def test_names_that_are_not_utf8(tmp_path, capsys):
    """From the data to the log and the checkpoint, and back."""
    odd = tmp_path / os.fsdecode(b"\xff")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    folder = write_classes(odd / "images", classes=("cat", os.fsdecode(b"d\xf8g")))
    output = odd / "run"
    assert run(folder, output, "--max-steps", "1") == 0
    assert run(folder, output, "--resume") == 0
    assert (output / checkpoint.FILE).exists()
    capsys.readouterr().out.encode()
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    cache = ["--cache-dir", str(odd / "cache")]
    message = refused(capsys, *RUN, "--data-dir", str(folder), *cache, "--output", str(output), "--overwrite")
    assert "\\xff/images/train/cat/0.png: truncated" in message and message.encode()
