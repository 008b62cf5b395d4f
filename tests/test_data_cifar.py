# SPDX-License-Identifier: Apache-2.0
"""The Python version of CIFAR: read as the binary one, and no code in a pickle runs."""

from __future__ import annotations

import dataclasses
import os
import pickle
import struct

import numpy as np
import pytest

from sparsebwd import data
from sparsebwd.data import DataError, cifar
from sparsebwd.data.pickled import read_pickle


def py2_pickle(content, module):
    """As Python 2 wrote it, protocol 2: byte strings, and arrays by numpy's `module`._reconstruct."""

    def dump(value):
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(dump(part) for item in value.items() for part in item) + b"u"
        dtype = b"cnumpy\ndtype\n" + dump(b"u1") + dump(0) + dump(1) + b"\x87R"
        state = b"(" + dump(3) + dump(b"|") + b"NNN" + dump(-1) + dump(-1) + dump(0) + b"t"
        empty = f"c{module}\n_reconstruct\ncnumpy\nndarray\n".encode() + dump(0) + b"\x85" + dump(b"b") + b"\x87R"
        shape = b"".join(map(dump, value.shape)) + b"\x86"
        return empty + b"(" + dump(1) + shape + dtype + state + b"b" + b"\x89" + dump(value.tobytes()) + b"tb"

    return b"\x80\x02" + dump(content) + b"."


WRITERS = {
    "python 2": lambda content: py2_pickle(content, "numpy.core.multiarray"),
    "python 2, later numpy": lambda content: py2_pickle(content, "numpy._core.multiarray"),
    **{f"protocol {number}": lambda content, number=number: pickle.dumps(content, number) for number in (0, 2, 4, 5)},
}


@pytest.fixture(params=["cifar10", "cifar100"])
def archive(request, monkeypatch):
    small = dataclasses.replace(cifar.ARCHIVES[request.param], train_records=6, test_records=4)
    monkeypatch.setitem(cifar.ARCHIVES, request.param, small)
    return request.param, small


def write_both(folder, small, dumps):
    """Both versions of the same made-up images."""
    draws = np.random.default_rng(0)
    (folder / small.folder).mkdir()
    (folder / small.pickled_folder).mkdir()
    for file in (*small.train_files, small.test_file):
        count = 4 if file == small.test_file else 6
        labels = draws.integers(0, small.num_classes, (count, small.label_bytes), dtype=np.uint8)
        planes = draws.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / small.folder / file).write_bytes(np.concatenate([labels, planes], axis=1).tobytes())
        content = {b"batch_label": b"made up", b"data": planes, small.labels_key: labels[:, -1].tolist()}
        (folder / small.pickled_folder / file).with_suffix("").write_bytes(dumps(content))
    names = [b"class %d" % label for label in range(small.num_classes)]
    (folder / small.folder / small.names_file).write_bytes(b"\n".join(names))
    (folder / small.pickled_folder / small.pickled_names[0]).write_bytes(dumps({small.pickled_names[1]: names}))


@pytest.mark.parametrize("writer", WRITERS)
def test_both_versions_are_the_same(archive, tmp_path, writer):
    name, small = archive
    write_both(tmp_path, small, WRITERS[writer])
    binary = data.load(name, data_dir=tmp_path / small.folder)
    pickled = data.load(name, data_dir=tmp_path / small.pickled_folder)
    assert pickled.fingerprint == binary.fingerprint and pickled.classes[3] == "class 3"
    np.testing.assert_array_equal(pickled.train_images, binary.train_images)
    np.testing.assert_array_equal(pickled.test_labels, binary.test_labels)
    # The folder that holds a version will do, and the binary one comes first.
    (tmp_path / small.pickled_folder / "data_batch_1").unlink(missing_ok=True)
    assert data.load(name, data_dir=tmp_path).fingerprint == binary.fingerprint


class Runs:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def test_no_code_of_a_pickle_runs(archive, tmp_path):
    name, small = archive
    write_both(tmp_path, small, WRITERS["protocol 2"])
    folder, trace = tmp_path / small.pickled_folder, tmp_path / "trace"
    train = (folder / small.train_files[0]).with_suffix("")
    for function, arguments in (
        (os.mkdir, (str(trace),)),
        (eval, (f"__import__('os').mkdir({str(trace)!r})",)),
        (getattr, ("", "join")),
        (np.zeros, (3,)),
    ):
        train.write_bytes(pickle.dumps({b"data": Runs(function, *arguments)}, 2))
        with pytest.raises(DataError, match=rf"{train.name}: .*it names .*, which no array needs"):
            data.load(name, data_dir=folder)
        assert not trace.exists()


@pytest.mark.parametrize("part", ["numpy\nndarray", "numpy\ndtype", "_codecs\nencode", "numpy._core.numeric\n_frombuffer"])
def test_a_pickle_cannot_change_what_reads_it(tmp_path, part):
    # BUILD with (None, {...}) sets attributes: here of what stands for `part`.
    path = tmp_path / "pickle"
    path.write_bytes(b"\x80\x02c" + part.encode() + b"\nN}X\x05\x00\x00\x00stateK\x01s\x86b0}.")
    with pytest.raises(TypeError):
        read_pickle(path)


def content(small, **changes):
    planes = np.zeros((6, 3072), np.uint8)
    return {b"data": planes, small.labels_key: [0] * 6} | {key.encode(): value for key, value in changes.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": np.zeros((6, 3072), np.float32)}, "array of type b'f4', accepted is u1"),
        ({"data": np.zeros((5, 3072), np.uint8)}, r"data is \(5, 3072\), not \(6, 3072\)"),
        ({"data": np.array([[None] * 3072] * 6)}, "array of type b'O8', accepted is u1"),
        ({"data": [1, 2]}, r"data is list, not \(6, 3072\)"),
        ({"labels": [0] * 5}, "labels is not a list of 6 integers"),
        ({"labels": [0.5] * 6}, "labels is not a list of 6 integers"),
        ({"labels": [2**70] * 6}, "too large"),
        ({"labels": [0, 0, 10, 0, 0, 0]}, "corrupt, record 2 has the label 10, accepted are 0 to 9"),
        ({"labels": [0, -1, 10, 0, 0, 0]}, "corrupt, record 1 has the label -1, accepted are 0 to 9"),
    ],
)
def test_wrong_content(monkeypatch, tmp_path, change, message):
    small = dataclasses.replace(cifar.ARCHIVES["cifar10"], train_records=6, test_records=4)
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", small)
    write_both(tmp_path, small, WRITERS["protocol 2"])
    path = tmp_path / small.pickled_folder / "data_batch_3"
    path.write_bytes(pickle.dumps(content(small, **change), 2))
    with pytest.raises(DataError, match=f"data_batch_3: .*{message}"):
        data.load("cifar10", data_dir=path.parent)


def test_broken_files(archive, tmp_path):
    name, small = archive
    write_both(tmp_path, small, WRITERS["python 2"])
    path = (tmp_path / small.pickled_folder / small.train_files[-1]).with_suffix("")
    whole = path.read_bytes()
    broken = {
        "empty": b"",
        "cut": whole[:-1],
        "half": whole[: len(whole) // 2],
        "text": b"not a pickle",
        "list": pickle.dumps([1, 2]),
        "empty dict": pickle.dumps({}),
        "state of a dict": pickle.dumps({}, 2)[:-1] + b"}b.",
        "unhashable": b"\x80\x02}]Ns.",
        "too long": whole + bytes(1 << 21),
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path.name}: .*again"):
            data.load(name, data_dir=path.parent)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: .*No such file or directory; unpack"):
        data.load(name, data_dir=path.parent)
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{path.name}: .*not a regular file but a FIFO; unpack"):
        data.load(name, data_dir=path.parent)


def test_nothing_there(archive, tmp_path):
    name, small = archive
    with pytest.raises(DataError, match=rf"no {small.test_file} in .*, and no test\w* in its {small.pickled_folder}/"):
        data.load(name, data_dir=tmp_path)
    # Names that cannot be read are no reason to refuse the images.
    write_both(tmp_path, small, WRITERS["protocol 2"])
    (tmp_path / small.pickled_folder / small.pickled_names[0]).write_bytes(b"cos\nsystem\n.")
    assert data.load(name, data_dir=tmp_path / small.pickled_folder).classes[3] == "3"
