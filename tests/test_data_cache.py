# SPDX-License-Identifier: Apache-2.0
"""Decoded images on disk: made once, made again when they do not fit or are damaged, and never half of them."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from images import RGB, load_classes, png, write_classes

from sparsebwd.data import DataError, cache, imagefolder


@pytest.fixture
def folder(tmp_path):
    return write_classes(tmp_path / "images")


@pytest.fixture
def decodes(monkeypatch):
    """The paths that were decoded."""
    paths, real = [], imagefolder.decode

    def counted(path):
        paths.append(os.path.basename(os.fsdecode(path)))
        return real(path)

    monkeypatch.setattr(imagefolder, "decode", counted)
    return paths


def entry(folder, split="train"):
    (path,) = (folder.parent / "cache").glob(f"{split}-*.images")
    return path


def only_entries(folder):
    """Nothing half-written lies about."""
    return all(path.suffix == ".images" for path in (folder.parent / "cache").iterdir())


def assert_loads(folder, train, test):
    images = load_classes(folder)
    np.testing.assert_array_equal(images.train_images, train)
    np.testing.assert_array_equal(images.test_images, test)
    assert only_entries(folder)
    return images


@pytest.fixture
def loaded(folder):
    """Training and test images as arrays of their own: a mapped file must not be changed."""
    images = load_classes(folder)
    return np.array(images.train_images), np.array(images.test_images)


# full disks


def test_no_room_at_the_start(folder, monkeypatch):
    def full(descriptor, offset, length):
        assert length == 8 * 8 * 8 * 3
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(
            DataError, match="cache_dir: .*cache: No space left on device; the decoded images take 0 MB"
        ):
            load_classes(folder)
    assert list((folder.parent / "cache").iterdir()) == []
    assert len(load_classes(folder).train_images) == 8


@pytest.mark.parametrize("limit", [0, 1000, 1600])
def test_no_room_later(folder, monkeypatch, limit):
    """Where room cannot be asked for, writing fails: at once, among the pixels, at the description. A limit on the size
    of files stands in for the size of the disk."""

    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", unknown)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(
                DataError, match="cache: File too large; .* name a folder with more room, or stream them"
            ):
                load_classes(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list((folder.parent / "cache").iterdir()) == []
        assert len(load_classes(folder).train_images) == 8


def test_a_failing_disk_is_named(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DataError, match="cache_dir: .*cache: Input/output error; name another folder"):
            load_classes(folder)
    assert list((folder.parent / "cache").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_while_decoding(folder, monkeypatch, error):
    def fail(path):
        if os.fsdecode(path).endswith("2.png"):
            raise error
        return real(path)

    real = imagefolder.decode
    with monkeypatch.context() as patch:
        patch.setattr(imagefolder, "decode", fail)
        with pytest.raises(error):
            load_classes(folder)
    assert list((folder.parent / "cache").iterdir()) == []
    assert len(load_classes(folder).train_images) == 8


# damage


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "longer":
        content += b"more"
    elif kind == "zeros":
        content[:] = bytes(len(content))
    elif kind == "twice":
        content *= 2
    elif isinstance(kind, float):
        del content[int(len(content) * kind) :]
    else:
        content[kind] ^= 16
    path.unlink()  # since it may be mapped
    path.write_bytes(content)


# Pixels at the start, then description, digest, its length, and the mark.
@pytest.mark.parametrize(
    "kind",
    [0, 777, 1535, 1536, 1540, -150, -33, -32, -17, -16, -9, -8, -1, 0.0, 0.01, 0.5, 0.999, "longer", "zeros", "twice"],
)
def test_damage_is_healed(folder, loaded, decodes, kind):
    damage(entry(folder), kind)
    images = assert_loads(folder, *loaded)
    assert len(decodes) == 8
    assert "is damaged" in " ".join(images.notes.take())
    assert_loads(folder, *loaded)
    assert len(decodes) == 8  # what was made is whole


def test_every_bit_of_the_description_counts(folder, loaded):
    path = entry(folder)
    whole = path.read_bytes()
    description = {"identity": "", "shape": [8, 8, 8, 3]}
    for place in range(8 * 8 * 8 * 3, len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        try:
            assert cache._open(path, description) is None
        except cache._Damaged:
            pass
    assert_loads(folder, *loaded)


def test_something_else_in_the_place_of_an_entry(folder, loaded, tmp_path):
    path = entry(folder)
    path.unlink()
    os.mkfifo(path)
    assert_loads(folder, *loaded)
    path.unlink()
    path.symlink_to(path.name)
    assert_loads(folder, *loaded)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cache_dir: .*: Is a directory; name another folder"):
        load_classes(folder)


def test_what_a_killed_process_left_is_written_over(folder, loaded):
    path = entry(folder)
    path.unlink()
    path.with_name(f".{path.name}.tmp").write_bytes(b"half" * 9999)
    assert_loads(folder, *loaded)


def test_a_cache_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cache_dir: .*file/below: Not a directory; name another folder"):
        load_classes(folder, cache_dir=tmp_path / "file" / "below")


# changes of the images


def decoded_as(pixels):
    """An image in a file that differs in nothing but its pixels."""
    return png(np.full((12, 10, 3), pixels), 8, RGB)


def test_two_images_exchanged(folder):
    """The same names, sizes and times as before."""
    first, second = folder / "train" / "cat" / "0.png", folder / "train" / "cat" / "1.png"
    for path, value in ((first, 10), (second, 20)):
        path.write_bytes(decoded_as(value))
        os.utime(path, (1, 1))
    assert first.stat().st_size == second.stat().st_size
    assert load_classes(folder).train_images[:2, 0, 0, 0].tolist() == [10, 20]
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    assert load_classes(folder).train_images[:2, 0, 0, 0].tolist() == [20, 10]


def test_an_image_rewritten_with_its_time(folder):
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(decoded_as(10))
    os.utime(path, (1, 1))
    assert load_classes(folder).train_images[0, 0, 0, 0] == 10
    changed = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == changed:  # clocks of file systems are coarse
        path.write_bytes(decoded_as(20))
        os.utime(path, (1, 1))
    assert load_classes(folder).train_images[0, 0, 0, 0] == 20


def test_folders_exchanged(folder, tmp_path):
    """The place of the folder names the file; what is in it decides whether the file fits."""
    other = write_classes(tmp_path / "others", size=(9, 9))
    before = np.array(load_classes(folder).train_images), np.array(load_classes(other).train_images)
    folder.rename(tmp_path / "aside")
    other.rename(folder)
    (tmp_path / "aside").rename(other)
    np.testing.assert_array_equal(load_classes(folder).train_images, before[1])
    np.testing.assert_array_equal(load_classes(other).train_images, before[0])


def test_renamed_or_removed_images(folder, decodes):
    before = load_classes(folder)
    train, test = np.array(before.train_images), before.test_images
    (folder / "train" / "dog" / "3.png").rename(folder / "train" / "dog" / "00.png")
    assert_loads(folder, train[[0, 1, 2, 3, 4, 7, 5, 6]], test)
    (folder / "train" / "cat" / "0.png").unlink()
    assert_loads(folder, train[[1, 2, 3, 4, 7, 5, 6]], test)
    assert len(decodes) == 12 + 8 + 7  # the test images once


# images that cannot be read


def test_a_cache_remembers_what_could_not_be_read(folder, decodes):
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    for _ in range(2):
        images = load_classes(folder, strict=False)
        assert images.train_labels.tolist() == [0] * 4 + [1] * 3 and len(images.train_images) == 7
        (note,) = images.notes.take()
        assert "1 image cannot be read and is left out: " in note and "dog/1.png: truncated, corrupt or no" in note
    assert len(decodes) == 12
    with pytest.raises(DataError, match="dog/1.png: truncated, corrupt or no image"):
        load_classes(folder, strict=True)
    for index in (0, 2, 3):
        (folder / "train" / "dog" / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match="dog: none of its images can be read"):
        load_classes(folder, strict=False)
    for index in range(4):
        (folder / "train" / "cat" / f"{index}.png").write_bytes(b"")
    with pytest.raises(DataError, match="train: none of the 8 images can be read, such as .*cat/0.png: trunc"):
        load_classes(folder, strict=False)


# several processes

LOAD = """
    import os, sys
    from images import load_classes
    from pathlib import Path
    from sparsebwd.data import imagefolder
    count, real = 0, imagefolder.decode
    def counted(path):
        global count
        count += 1
        return real(path)
    imagefolder.decode = counted
    images = load_classes(Path(sys.argv[1]))
    print(count, images.fingerprint)
"""


def start(folder):
    code = [sys.executable, "-c", textwrap.dedent(LOAD), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_two_processes_make_the_same_file_once(folder, loaded):
    """Both find none, and wait for this process, which makes none."""
    path = entry(folder)
    path.unlink()
    with open(path.with_name(f".{path.name}.tmp"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        processes = [start(folder) for _ in range(2)]
        try:
            for process in processes:
                assert "waiting for another process that decodes the same images" in process.stderr.readline()
        except BaseException:
            for process in processes:
                process.kill()
            raise
    results = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(int(count) for count, _ in results) == [0, 8]
    assert results[0][1] == results[1][1] == assert_loads(folder, *loaded).fingerprint


def test_where_files_cannot_be_locked(folder, monkeypatch):
    """Each process writes a file of its own; whoever comes last replaces what the others made."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    names, real = [], os.replace

    def replace(source, target):
        names.append(os.path.basename(source))
        real(source, target)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "replace", replace)
    assert len(load_classes(folder).train_images) == 8
    assert len(set(names)) == 2 and all(f".{os.getpid()}." in name for name in names)
    assert only_entries(folder)


def test_one_process_makes_what_another_needs_meanwhile(folder, loaded, monkeypatch, decodes):
    """Its file is there when the lock is: it is taken, not made again."""
    path = entry(folder)
    made = path.rename(path.with_suffix(".aside"))
    real = cache._exclusive.__enter__

    def late(self):
        made.rename(path)
        return real(self)

    monkeypatch.setattr(cache._exclusive, "__enter__", late)
    assert_loads(folder, *loaded)
    assert decodes == []
