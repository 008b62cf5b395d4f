# SPDX-License-Identifier: Apache-2.0
"""What is taken of a folder of images, what is left out and told, and folders with names of any kind."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from images import load_classes, write_classes

from sparsebwd.data import DataError
from sparsebwd.data.notes import Notes

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["cached", "streamed"])


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "images")


@STREAM
def test_what_is_ignored_is_counted_and_named_once(folder, stream):
    cat = folder / "train" / "cat"
    for name in ("a.webp", "b.webp", "notes.txt", "README", ".hidden.png"):
        (cat / name).touch()
    (cat / "below").mkdir()
    os.mkfifo(cat / "pipe.png")
    (folder / "train" / "list.csv").touch()
    images = load_classes(folder, stream=stream)
    assert len(images.train_images) == 8
    (note,) = images.notes.take()
    assert note.startswith(f"{folder / 'train'}: 8 images, and 8 other entries ignored: 2 that end in .webp, 1 ")
    assert note.count(" 1 ") == 5 and ", and others (such as list.csv, " in note  # six kinds are named, three examples
    assert note.endswith("images are files that end in .jpg, .jpeg, .png, in a folder for each class")
    assert images.notes.take() == []


def test_nothing_ignored_says_nothing(folder):
    assert load_classes(folder).notes.take() == []


def test_hidden_folders_are_no_classes(folder):
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "test" / ".thumbnails").mkdir()
    images = load_classes(folder)
    assert images.classes == ("cat", "dog") and len(images.notes.take()) == 2


def test_links_to_images_and_classes_count(folder):
    (folder / "train" / "dog" / "9.png").symlink_to(folder / "train" / "cat" / "0.png")
    (folder / "train" / "emu").symlink_to("dog")
    images = load_classes(folder)
    assert images.train_labels.tolist() == [0] * 4 + [1] * 5 + [2] * 5
    np.testing.assert_array_equal(images.train_images[8], images.train_images[0])


@STREAM
def test_loops_of_links(folder, stream):
    """A folder that is a loop is no class; an image that is one cannot be read."""
    (folder / "train" / "a").symlink_to("b")
    (folder / "train" / "b").symlink_to("a")
    assert load_classes(folder, stream=stream).classes == ("cat", "dog")
    (folder / "train" / "cat" / "9.png").symlink_to("9.png")
    with pytest.raises(DataError, match="cat/9.png: cannot be read: Too many levels of symbolic links"):
        np.asarray(load_classes(folder, stream=stream).train_images)
    images = load_classes(folder, stream=stream, strict=False)
    np.asarray(images.train_images)
    assert any("9.png: cannot be read: Too many levels" in note for note in images.notes.take())


@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_back_into_the_folder_is_not_followed_for_ever(folder, target):
    (folder / "train" / "again").symlink_to(target)
    with pytest.raises(DataError, match="train/again: has no images"):
        load_classes(folder)


def test_the_folder_is_a_loop(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="data_dir: got '.*loop'"):
        load_classes(tmp_path / "loop")
    (tmp_path / "train").symlink_to("train")
    with pytest.raises(DataError, match="needs the folders train/ and test/"):
        load_classes(tmp_path)


@STREAM
def test_images_that_links_promise(folder, stream):
    (folder / "train" / "cat" / "9.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match="cat/9.png: cannot be read: No such file"):
        np.asarray(load_classes(folder, stream=stream).train_images)


def make(path):
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    return path


@STREAM
def test_names_that_are_not_utf8(tmp_path, stream):
    """Of the folder, of classes, of images, and of the cache."""
    above = make(tmp_path / os.fsdecode(b"\xff\n"))
    classes = ("cat", os.fsdecode(b"d\xf8g"))
    folder = write_classes(above / os.fsdecode(b"im\xe4ges"), classes=classes)
    for split in ("train", "test"):
        (folder / split / "cat" / "0.png").rename(folder / split / "cat" / os.fsdecode(b"\xc3.png"))
    images = load_classes(folder, stream=stream, cache_dir=above / os.fsdecode(b"c\xa9che"))
    assert images.classes == classes and np.asarray(images.train_images).shape == (8, 8, 8, 3)
    assert len(images.fingerprint) == 32
    again = pickle.loads(pickle.dumps(images.train_images))  # as it goes to worker processes
    np.testing.assert_array_equal(np.asarray(again), np.asarray(images.train_images))

    (folder / "train" / "cat" / os.fsdecode(b"\xc3.png")).write_bytes(b"")
    (folder / "train" / "cat" / os.fsdecode(b"\xc4.gif")).touch()
    with pytest.raises(DataError, match=r"cat/\\xc3\.png: truncated") as caught:
        np.asarray(load_classes(folder, stream=stream).train_images)
    str(caught.value).encode()
    images = load_classes(folder, stream=stream, strict=False)
    np.asarray(images.train_images)
    notes = images.notes.take()
    assert len(notes) == 2 and all("im\\xe4ges" in note and note.encode() for note in notes)


def test_a_class_that_is_only_tested_is_named_in_escapes(tmp_path):
    folder = write_classes(tmp_path / "images")
    make(folder / "test" / os.fsdecode(b"\xe9mu"))
    with pytest.raises(DataError, match=r"no training images for the classes \\xe9mu"):
        load_classes(folder)


def test_a_class_without_test_images(folder):
    for path in (folder / "test" / "cat").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="test/cat: has no images"):
        load_classes(folder)
    (folder / "test" / "cat").rmdir()
    images = load_classes(folder)
    assert images.classes == ("cat", "dog") and images.test_labels.tolist() == [1, 1]


def test_notes_name_ten_and_count_the_rest():
    notes = Notes()
    notes.add_corrupt({f"{index}.png": "empty" for index in range(12)})
    (text,) = notes.take()
    assert text.startswith("12 images cannot be read and are left out: 0.png: empty; ") and text.endswith(
        "; and 2 more"
    )
    notes.add_corrupt({"3.png": "empty", "99.png": "empty"})  # one of them again
    assert notes.take() == ["1 image cannot be read and is left out (13 so far): 99.png: empty"]
    assert notes.take() == [] and len(notes.corrupt) == 13
