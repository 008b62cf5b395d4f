# SPDX-License-Identifier: Apache-2.0
"""Data sets from small made-up files, and batches that are a function of (seed, epoch, index)."""

from __future__ import annotations

import dataclasses
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sparsebwd import data
from sparsebwd.data import Batches, DataError, Normalize, cifar, imagefolder, ordered_batches


@pytest.fixture
def draws():
    return np.random.default_rng(0)


# digits


def test_digits():
    digits = data.load("digits")
    assert digits.train_images.shape == (1540, 32, 32, 3) and digits.train_images.dtype == np.uint8
    assert digits.test_images.shape == (257, 32, 32, 3)
    assert digits.train_labels.dtype == np.int64 and len(digits.train_labels) == 1540
    assert digits.classes == tuple("0123456789") and not digits.mirror
    assert digits.train_images.max() == 255 and digits.train_images.min() == 0
    # Every class is in both parts, in about the share that it has in the whole.
    assert np.bincount(digits.train_labels, minlength=10).min() > 140
    assert np.bincount(digits.test_labels, minlength=10).min() > 20
    assert data.load("digits", image_size=8).train_images.shape == (1540, 8, 8, 3)


def test_digits_is_the_same_every_time():
    first, second = data.load("digits"), data.load("digits")
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(first.train_images, second.train_images)


# CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, monkeypatch, tmp_path, draws):
    """A folder of binary files of 20 (training) and 10 (test) records each, and what is in them."""
    small = dataclasses.replace(cifar.ARCHIVES[request.param], train_records=20, test_records=10)
    monkeypatch.setitem(cifar.ARCHIVES, request.param, small)
    folder = tmp_path / small.folder
    folder.mkdir()
    content = {}
    for file in (*small.train_files, small.test_file):
        count = 10 if file == small.test_file else 20
        labels = draws.integers(0, small.num_classes, (count, small.label_bytes), dtype=np.uint8)
        planes = draws.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        (folder / file).write_bytes(np.concatenate([labels, planes.reshape(count, -1)], axis=1).tobytes())
        content[file] = (planes, labels[:, -1])
    return request.param, folder, small, content


def test_cifar(archive):
    name, folder, small, content = archive
    for where in (folder, folder.parent):
        images = data.load(name, data_dir=where)
        planes = np.concatenate([content[file][0] for file in small.train_files])
        np.testing.assert_array_equal(images.train_images, planes.transpose(0, 2, 3, 1))
        labels = np.concatenate([content[file][1] for file in small.train_files])
        np.testing.assert_array_equal(images.train_labels, labels)
        np.testing.assert_array_equal(images.test_images, content[small.test_file][0].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(images.test_labels, content[small.test_file][1])
        assert len(images.classes) == small.num_classes


def test_cifar_class_names(archive):
    name, folder, small, _ = archive
    (folder / small.names_file).write_text("\n".join(f"class {label}" for label in range(small.num_classes)) + "\n\n")
    assert data.load(name, data_dir=folder).classes[3] == "class 3"


@pytest.mark.parametrize("change", [-1, -3073, 1])
def test_cifar_truncated(archive, change):
    name, folder, small, _ = archive
    path = folder / small.train_files[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[:change] if change < 0 else whole + b"\0")
    with pytest.raises(DataError, match=rf"{path.name}: got {len(whole) + change} bytes, a whole file has {len(whole)}"):
        data.load(name, data_dir=folder)


def test_cifar_missing(archive):
    name, folder, small, _ = archive
    (folder / small.train_files[0]).unlink()
    with pytest.raises(DataError, match=rf"{small.train_files[0]}: No such file"):
        data.load(name, data_dir=folder)
    with pytest.raises(DataError, match=rf"no {small.test_file} in .*unpack the binary version, https://"):
        data.load(name, data_dir=folder.parent.parent)


def test_cifar_corrupt_label(archive):
    name, folder, small, _ = archive
    path = folder / small.test_file
    content = bytearray(path.read_bytes())
    content[3 * (small.label_bytes + 3072) + small.label_bytes - 1] = 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{small.test_file}: corrupt, record 3 has the label 255"):
        data.load(name, data_dir=folder)


def test_cifar_has_one_size(archive):
    name, folder, _, _ = archive
    with pytest.raises(ValueError, match="image_size: got 64"):
        data.load(name, data_dir=folder, image_size=64)


# image folders


@pytest.fixture
def folder(tmp_path, draws):
    """Two classes, as PNG of 8x8 (cat) and JPEG of 12x20 (dog)."""
    for split, count in (("train", 4), ("val", 2)):
        for name, suffix, shape in (("cat", "png", (8, 8, 3)), ("dog", "JPEG", (12, 20, 3))):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.{suffix}")
    return tmp_path / "images"


def load_folder(folder, **options):
    return data.load("imagefolder", **{"data_dir": folder, "cache_dir": folder.parent / "cache", "image_size": 8} | options)


def test_imagefolder(folder):
    images = load_folder(folder)
    assert images.classes == ("cat", "dog")
    np.testing.assert_array_equal(images.train_labels, [0] * 4 + [1] * 4)
    np.testing.assert_array_equal(images.test_labels, [0] * 2 + [1] * 2)
    assert images.train_images.shape == (8, 8, 8, 3) and images.train_images.dtype == np.uint8
    with Image.open(folder / "train" / "cat" / "2.png") as image:
        np.testing.assert_array_equal(images.train_images[2], np.asarray(image))
    with Image.open(folder / "val" / "dog" / "0.JPEG") as image:
        middle = image.resize((8, 8), Image.Resampling.BILINEAR, box=(4, 0, 16, 12))
        np.testing.assert_array_equal(images.test_images[2], np.asarray(middle))
    assert load_folder(folder, image_size=5).train_images.shape == (8, 5, 5, 3)


def test_imagefolder_decodes_once(folder, monkeypatch):
    first = load_folder(folder)
    test_images = first.test_images.copy()  # the array itself is the file that is cut short below
    cached = sorted(path.name for path in (folder.parent / "cache").iterdir())
    assert len(cached) == 2 and all(name.endswith(".images") for name in cached)

    def refuse(path, size):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(imagefolder, "decode", refuse)
        np.testing.assert_array_equal(load_folder(folder).train_images, first.train_images)
    # A changed file, and a cache file cut short, are decoded again.
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "train" / "cat" / "0.png")
    assert not load_folder(folder).train_images[0].any()
    for path in (folder.parent / "cache").iterdir():
        os.truncate(path, path.stat().st_size - 1)
    np.testing.assert_array_equal(load_folder(folder).test_images, test_images)


@pytest.mark.parametrize("name", ["cat/1.png", "dog/1.JPEG"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "garbage"])
def test_imagefolder_corrupt(folder, name, damage):
    path = folder / "train" / name
    whole = path.read_bytes()
    broken = {
        "truncate": whole[: len(whole) * 2 // 3],
        "empty": b"",
        "text": b"not an image",
        "garbage": whole[:40] + bytes(reversed(whole[40:])),
    }
    path.write_bytes(broken[damage])
    with pytest.raises(DataError, match=rf"{path.name}: truncated, corrupt or no image"):
        load_folder(folder, strict=True)
    assert list((folder.parent / "cache").iterdir()) == []  # nothing half-written stays


def test_imagefolder_grey_and_palette_images(folder):
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(folder / "train" / "cat" / "0.png")
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).quantize(2).save(folder / "train" / "cat" / "1.png")
    images = load_folder(folder)
    assert (images.train_images[0] == 77).all() and (images.train_images[1] == 99).all()


def test_imagefolder_missing_parts(folder, tmp_path):
    with pytest.raises(DataError, match="needs the folders train/ and test/"):
        load_folder(tmp_path)
    (folder / "val" / "emu").mkdir()
    with pytest.raises(DataError, match="no training images for the classes emu"):
        load_folder(folder)
    (folder / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="emu: has no images, accepted are the endings .jpg"):
        load_folder(folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagefolder"])
def test_data_dir_has_to_be_a_directory(name, tmp_path):
    with pytest.raises(DataError, match="data_dir: got '.*/elsewhere', which does not exist"):
        data.load(name, data_dir=tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="data_dir: got '.*/file', which is not a directory"):
        data.load(name, data_dir=tmp_path / "file")


@pytest.mark.parametrize(
    "name, module, package", [("digits", "sklearn", "scikit-learn"), ("imagefolder", "PIL", "pillow")]
)
def test_missing_packages_are_named(name, module, package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"{name} needs .*: pip install {package}$"):
        data.load(name, data_dir=folder, cache_dir=folder.parent / "cache")


def test_load_bad_arguments():
    with pytest.raises(ValueError, match="name: got 'mnist'; accepted: 'digits', 'cifar10'"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data_dir: got none, but cifar10"):
        data.load("cifar10")
    with pytest.raises(ValueError, match="image_size: got 0"):
        data.load("digits", image_size=0)


# what is made of them


def test_statistics(draws):
    images = draws.integers(0, 256, (3000, 4, 4, 3), dtype=np.uint8)
    labels = np.zeros(3000, np.int64)
    whole = data.ImageData("made up", images, labels, images[:1], labels[:1], ("only",))
    mean, deviation = whole.statistics
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std(axis=(0, 1, 2)), rtol=1e-6)


def test_subset_spreads():
    digits = data.load("digits", image_size=8)
    part = digits.subset(train=100, test=10)
    assert len(part.train_images) == len(part.train_labels) == 100 and len(part.test_images) == 10
    np.testing.assert_array_equal(part.train_images[50], digits.train_images[770])
    assert part.train_labels[50] == digits.train_labels[770]
    assert part.fingerprint != digits.fingerprint
    assert digits.subset(train=10**6).train_images is digits.train_images


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize(draws, channels_last):
    images = torch.from_numpy(draws.integers(0, 256, (5, 6, 7, 3), dtype=np.uint8))
    mean, deviation = np.float32([10, 20, 30]), np.float32([2, 4, 8])
    result = Normalize(mean, deviation, channels_last=channels_last)(images)
    assert result.shape == (5, 3, 6, 7) and result.dtype == torch.float32
    expected = (images.permute(0, 3, 1, 2) - torch.tensor([10, 20, 30]).view(3, 1, 1)) / torch.tensor([2, 4, 8]).view(3, 1, 1)
    torch.testing.assert_close(result, expected)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=memory_format)


@pytest.fixture
def numbered():
    """60 images whose pixels tell image and position apart; labels number the images."""
    images = np.zeros((60, 10, 10, 3), np.uint8)
    images[..., 0] = np.arange(60)[:, None, None] + 1
    images[..., 1] = np.arange(10)[:, None] + 1
    images[..., 2] = np.arange(10) + 1
    return images, np.arange(60)


def test_batches_are_a_function_of_seed_epoch_and_index(numbered):
    one = Batches(*numbered, 8, seed=5)
    assert len(one) == 7
    straight = {(epoch, index): one.batch(epoch, index) for epoch in range(2) for index in range(7)}
    for epoch, index in [(1, 3), (0, 6), (1, 3), (0, 0)]:
        images, labels = Batches(*numbered, 8, seed=5).batch(epoch, index)
        assert torch.equal(images, straight[epoch, index][0]) and torch.equal(labels, straight[epoch, index][1])
    for epoch in range(2):
        seen = torch.cat([straight[epoch, index][1] for index in range(7)])
        assert len(seen.unique()) == 56
    assert not torch.equal(straight[0, 0][1], straight[1, 0][1])
    assert not torch.equal(straight[0, 0][1], Batches(*numbered, 8, seed=6).batch(0, 0)[1])


def test_augmentation_crops_and_mirrors(numbered):
    images, labels = Batches(*numbered, 60, seed=1).batch(0, 0)
    offsets, mirrored = set(), 0
    for image, label in zip(images.numpy().astype(int), labels.tolist(), strict=True):
        inside = image[..., 0] > 0
        assert set(np.unique(image[..., 0])) <= {0, label + 1}
        rows, columns = image[..., 1][inside], image[..., 2][inside]
        y, x = np.nonzero(inside)
        assert len(set(rows - y)) == 1
        flipped = len(set(columns - x)) > 1
        shift = set(columns + x) if flipped else set(columns - x)
        assert len(shift) == 1
        offsets.add(int((rows - y)[0]) - 1)
        mirrored += flipped
    assert min(offsets) >= -4 and max(offsets) <= 4 and len(offsets) > 5
    assert 10 < mirrored < 50  # binomial(60, 1/2): outside once in 10^7 seeds, and this seed is fixed
    plain, labels = Batches(*numbered, 60, seed=1, augment=False).batch(0, 0)
    np.testing.assert_array_equal(plain.numpy(), numbered[0][labels.numpy()])


def test_mirror_can_be_off(numbered):
    images, _ = Batches(*numbered, 60, seed=1, mirror=False).batch(0, 0)
    for image in images.numpy().astype(int):
        y, x = np.nonzero(image[..., 0])
        assert len(set(image[..., 2][y, x] - x)) == 1


def test_processes_share_the_batch_of_one(numbered):
    whole = Batches(*numbered, 12, seed=2).batch(3, 1)
    shares = [Batches(*numbered, 12, seed=2, rank=rank, world_size=3).batch(3, 1) for rank in range(3)]
    assert torch.equal(torch.cat([images for images, _ in shares]), whole[0])
    assert torch.equal(torch.cat([labels for _, labels in shares]), whole[1])
    ordered = [labels for rank in range(3) for _, labels in ordered_batches(*numbered, 8, rank=rank, world_size=3)]
    assert sorted(torch.cat(ordered).tolist()) == list(range(60))


def test_batches_bad_arguments(numbered):
    with pytest.raises(ValueError, match="batch_size: got 61, accepted are 1 to 60"):
        Batches(*numbered, 61, seed=0)
    with pytest.raises(ValueError, match="batch_size: got 10, accepted are multiples of 3"):
        Batches(*numbered, 10, seed=0, world_size=3)


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "file"
    with data.atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "first"
    with pytest.raises(KeyboardInterrupt), data.atomic_write(path) as temporary:
        temporary.write_text("half of the sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
