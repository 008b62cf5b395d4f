# SPDX-License-Identifier: Apache-2.0
"""Images decoded for each batch: the same batches as from the cache, whatever the number of workers, from any one on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from images import load_classes, write_classes
from PIL import Image

from sparsebwd.data import Batches, DataError, ordered_batches, streaming
from sparsebwd.data.augment import draw_resized, resized_box


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "images", train=11, test=5, size=(20, 14))


def batches(images, **options):
    options = {"seed": 3, "mirror": images.mirror, "crop": images.crop} | options
    return Batches(images.train_images, images.train_labels, 4, **options)


def drawn(source, keys):
    return [source.batch(*key) for key in keys]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


ALL = [(epoch, index) for epoch in range(2) for index in range(5)]


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_as_cached(folder, augment, workers):
    """Padded crops, bit for bit: the same images are in the files."""
    cached, streamed = (load_classes(folder, stream=stream) for stream in (False, True))
    assert isinstance(cached.train_images, np.ndarray) and isinstance(streamed.train_images, streaming.ImageFiles)
    assert_same(
        drawn(batches(cached, augment=augment), ALL), drawn(batches(streamed, augment=augment, workers=workers), ALL)
    )
    np.testing.assert_array_equal(np.asarray(streamed.test_images), cached.test_images)
    assert streamed.description == cached.description
    for mine, other in zip(streamed.statistics, cached.statistics, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("crop", ["padded", "resized"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tested_as_cached(folder, crop, workers):
    """What is tested, the middle with resized crops, is the same for both."""
    cached, streamed = (load_classes(folder, stream=stream, crop=crop) for stream in (False, True))
    for rank in range(2):
        assert_same(
            list(ordered_batches(cached.test_images, cached.test_labels, 3, rank=rank, world_size=2)),
            list(
                ordered_batches(streamed.test_images, streamed.test_labels, 3, rank=rank, world_size=2, workers=workers)
            ),
        )


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_workers_change_nothing(folder, crop):
    images = load_classes(folder, stream=True, crop=crop)
    alone = drawn(batches(images), ALL)
    for workers in (1, 2):
        assert_same(alone, drawn(batches(images, workers=workers), ALL))


@pytest.mark.slow
@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_from_any_batch_on(folder, crop):
    """A run that goes on in the middle of an epoch sees what it would have seen."""
    images = load_classes(folder, stream=True, crop=crop)
    straight = drawn(batches(images), ALL)
    for first in (1, 4, 7):
        assert_same(straight[first:], drawn(batches(images, workers=2), ALL[first:]))
    source = batches(images, workers=2)
    order = [3, 4, 5, 0, 9, 2, 2, 3]  # the workers start anew where it jumps
    assert_same([straight[index] for index in order], drawn(source, [ALL[index] for index in order]))


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_processes_share_the_batch_of_one(folder, crop):
    images = load_classes(folder, stream=True, crop=crop)
    whole = batches(images).batch(1, 2)
    shares = [batches(images, rank=rank, world_size=2, workers=1).batch(1, 2) for rank in range(2)]
    for part in range(2):
        assert torch.equal(torch.cat([share[part] for share in shares]), whole[part])


def test_workers_leave_the_global_generators_alone(folder):
    images = load_classes(folder, stream=True, crop="resized")
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn(batches(images, workers=2), ALL)
    list(ordered_batches(images.test_images, images.test_labels, 3, workers=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_fingerprints(folder):
    """Of names and labels, so that no file is read."""
    before = load_classes(folder, stream=True).fingerprint
    (folder / "train" / "cat" / "2.png").write_bytes(b"")
    assert load_classes(folder, stream=True).fingerprint == before
    os.rename(folder / "train" / "cat" / "2.png", folder / "train" / "cat" / "2a.png")
    assert load_classes(folder, stream=True).fingerprint != before


def test_subsets(folder):
    cached, streamed = (load_classes(folder, stream=stream).subset(train=9, test=4) for stream in (False, True))
    assert_same(drawn(batches(cached), [(0, 0), (0, 1)]), drawn(batches(streamed, workers=2), [(0, 0), (0, 1)]))
    np.testing.assert_array_equal(np.asarray(streamed.test_images), cached.test_images)


# crops


def test_resized_crops_are_parts_of_the_image(tmp_path):
    """The image numbers its rows and columns: a crop shows which part it is, and all sizes in between occur."""
    folder = write_classes(tmp_path / "images", train=1, test=1, classes=("only",))
    rows, columns = np.mgrid[0:200, 0:100]
    Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)).save(
        folder / "train" / "only" / "0.png"
    )
    images = load_classes(folder, stream=True, crop="resized", image_size=50)
    source = Batches(images.train_images, images.train_labels, 1, seed=0, crop="resized", mirror=False)
    areas = []
    for epoch in range(60):
        crop = source.batch(epoch, 0)[0][0].numpy().astype(int)
        height, width = crop[-1, 0, 0] - crop[0, 0, 0], crop[0, -1, 1] - crop[0, 0, 1]
        assert (np.diff(crop[:, 0, 0]) >= 0).all() and (np.diff(crop[0, :, 1]) >= 0).all()
        assert 0.7 < width / height < 1.43
        areas.append(height * width / 20_000)
    assert 0.06 < min(areas) < 0.15 and 0.4 < max(areas) <= 1


def test_boxes_lie_within_the_image():
    draws = np.random.default_rng(0)
    for width, height in ((1, 1), (1, 50), (50, 1), (3, 2), (500, 375), (30_000, 10)):
        for uniform in draw_resized(draws, 50):
            left, top, right, bottom = resized_box(width, height, uniform)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_the_middle_of_an_image_is_tested_with_resized_crops(folder):
    images = load_classes(folder, stream=True, crop="resized")
    with Image.open(folder / "test" / "cat" / "0.png") as image:
        border = 14 / 16  # 1/16 of the shorter side
        expected = image.resize((8, 8), Image.Resampling.BILINEAR, box=(border, 3 + border, 14 - border, 17 - border))
    difference = np.asarray(images.test_images)[0].astype(int) - np.asarray(expected)
    assert np.abs(difference).max() <= 12  # of noise; without the border 40


def test_auto_is_by_size(folder):
    assert load_classes(folder, crop="auto").crop == "padded"
    images = load_classes(folder, crop="auto", image_size=65)
    assert images.crop == "resized" and isinstance(images.train_images, streaming.ImageFiles)
    with pytest.raises(ValueError, match="crop: got 'random'; accepted: 'auto', 'padded', 'resized'"):
        load_classes(folder, crop="random")


# images that cannot be read


@pytest.fixture
def broken(folder):
    """Two of the 22 training images and one of the 10 test images."""
    for path in ("train/cat/2.png", "train/dog/9.png", "test/cat/0.png"):
        (folder / path).write_bytes(b"")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_names_the_image(broken, workers):
    images = load_classes(broken, stream=True, strict=True)
    with pytest.raises(DataError, match=r"^/.*(cat/2|dog/9)\.png: truncated, corrupt or no image: [^\n]*$"):
        drawn(batches(images, workers=workers), ALL[:5])
    with pytest.raises(DataError, match="test/cat/0.png: truncated"):
        list(ordered_batches(images.test_images, images.test_labels, 3, workers=workers))
    with pytest.raises(DataError, match="png: truncated"):
        images.statistics  # noqa: B018


@pytest.mark.parametrize("workers", [0, 2])
def test_others_take_the_place_of_what_cannot_be_read(broken, workers):
    images = load_classes(broken, stream=True, strict=False)
    source = batches(images, augment=False, workers=workers)
    got = drawn(source, ALL)
    if workers == 0:
        assert all(pixels.flatten(1).any(1).all() for pixels, _ in got)
    assert_same(drawn(batches(images, augment=False), ALL), got)
    notes = " ".join(images.notes.take())
    assert notes.count("cat/2.png") == notes.count("dog/9.png") == 1 and "2 images cannot be read" in notes
    tested = list(ordered_batches(images.test_images, images.test_labels, 3, workers=workers))
    assert [len(labels) for _, labels in tested] == [2, 3, 3, 1]
    assert torch.cat([labels for _, labels in tested]).tolist() == [0] * 4 + [1] * 5
    (note,) = images.notes.take()
    assert "test/cat/0.png" in note and "(3 so far)" in note


def test_the_next_image_takes_its_place_with_its_own_label(broken):
    """Behind the last one comes the first."""
    images = load_classes(broken, stream=True, strict=False).train_images
    (taken, nothing), labels, corrupt = images.take(np.array([3, 21]))
    np.testing.assert_array_equal(taken, np.asarray(images[4:5])[0])
    np.testing.assert_array_equal(nothing, np.asarray(images[:1])[0])
    assert labels.tolist() == [0, 0] and len(corrupt) == 2


def test_nothing_can_be_read(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    images = load_classes(folder, stream=True, strict=False)
    with pytest.raises(DataError, match="train: none of the 22 images can be read, such as .*: truncated"):
        drawn(batches(images, workers=1), ALL[:1])


def test_a_run_of_workers_goes_on_after_an_error(broken):
    """Strict, the batch with a broken image fails, and any other can be had afterwards."""
    images = load_classes(broken, stream=True, strict=True)
    source = batches(images, workers=2)
    good, failed = 0, 0
    for key in ALL[:5]:
        try:
            source.batch(*key)
            good += 1
        except DataError:
            failed += 1
    assert failed in (1, 2) and good == 5 - failed


# worker processes


def _end_the_process(key):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed(folder):
    with pytest.raises(DataError, match="workers: a process that decodes images ended .*; try fewer workers, or 0"):
        list(streaming.load_ahead(_end_the_process, [1], 1))


def _signalled(key):
    """Sends its own process what a terminal or a batch system sends to all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
    return key


def test_signals_do_not_end_workers():
    """They are the training's, which ends its workers itself, when it has saved."""
    assert list(streaming.load_ahead(_signalled, [1, 2, 3], 2)) == [1, 2, 3]


def _fails(key):
    raise ZeroDivisionError("a fault of the program")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_pass_as_they_are(workers):
    with pytest.raises(ZeroDivisionError, match="a fault of the program"):
        list(streaming.load_ahead(_fails, [1], workers))


def children():
    return set(torch.multiprocessing.active_children())


def test_close_ends_the_workers(folder):
    before = children()
    source = batches(load_classes(folder, stream=True), workers=2)
    first = source.batch(0, 0)
    assert len(children() - before) == 2
    source.close()
    assert not children() - before
    assert_same([first], [source.batch(0, 0)])  # they start again where they are needed
    del source
    assert not children() - before


def test_errors_end_the_workers(broken):
    """At once, also while somebody keeps the error."""
    before = children()
    images = load_classes(broken, stream=True, strict=True)
    source = batches(images, workers=2)
    with pytest.raises(DataError) as kept:
        drawn(source, ALL[:5])
    with pytest.raises(DataError) as also_kept:
        list(ordered_batches(images.test_images, images.test_labels, 3, workers=2))
    assert not children() - before and kept and also_kept


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "list(load_ahead(int, ['no number'], 1))"])
def test_workers_end_with_the_program(folder, end):
    """Also where nobody closes anything."""
    code = f"""
from pathlib import Path
from images import load_classes
from sparsebwd.data import Batches
from sparsebwd.data.streaming import load_ahead
images = load_classes(Path({str(folder)!r}), stream=True)
source = Batches(images.train_images, images.train_labels, 4, seed=3, workers=2)
print(len(source.batch(0, 0)[1]), flush=True)
{end}
"""
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.stdout == "4\n" and result.returncode == bool(end)
    assert "DataLoader worker (pid" not in result.stderr  # how PyTorch reports one that died
