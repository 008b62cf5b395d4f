# SPDX-License-Identifier: Apache-2.0
"""Files that users name are opened in one way: what is no file, or too large a one, is refused at once."""

import ast
import errno
import os
import socket
from pathlib import Path

import pytest

import sparsebwd
from sparsebwd import opening
from sparsebwd.bench import compare, gradients
from sparsebwd.data import cifar, records
from sparsebwd.data.dataset import DataError
from sparsebwd.reproduce import claims, runs, sweep, timing
from sparsebwd.train import log

ROOT = Path(__file__).parents[1]
KINDS = {"FIFO": "a FIFO", "device": "a device", "directory": "a directory", "socket": "a socket"}


def make(kind: str, path: Path) -> Path:
    """Something of this kind, by a link where that is what users have."""
    if kind == "FIFO":
        target = path.with_name(f"{path.name}-target")
        os.mkfifo(target)
        path.symlink_to(target)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))
    else:  # larger than the memory of most machines, on no disk
        with open(path, "wb") as file:
            os.truncate(file.fileno(), 10**12)
    return path


@pytest.fixture(autouse=True)
def in_time(deadline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_by_what_it_is(kind, tmp_path):
    path = make(kind, tmp_path / "file")
    with pytest.raises(OSError, match=f"not a regular file but {KINDS[kind]}: '{path}'"):
        opening.open_regular(path)
    with pytest.raises(OSError, match="not a regular file"):
        next(opening.read_rows(os.fsencode(path)))


def test_the_size_is_limited(tmp_path):
    path = tmp_path / "file"
    path.write_text("four")
    assert opening.read_text(path, 4) == "four"
    with pytest.raises(OSError, match="it has 4 bytes, accepted are up to 3") as caught:
        opening.read_bytes(path, 3)
    assert caught.value.errno == errno.EFBIG
    if Path("/proc/self/maps").exists():  # without a size
        assert opening.read_text("/proc/self/comm")
        with pytest.raises(OSError, match="it has more than 9 bytes, accepted are up to 9"):
            opening.read_text("/proc/self/maps", 9)


def test_rows_have_an_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a,b\n" + bytes(2500) + b"\nc\xff")
    assert [len(row) for row in opening.read_rows(path)] == [4, 1000, 1000, 501, 2]


def test_a_descriptor_is_closed_where_the_file_was_exchanged(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    real, opened = os.open, []

    def exchanged(name, *arguments, **options):
        os.unlink(path)
        os.mkfifo(path)
        opened.append(real(name, *arguments, **options))
        return opened[-1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", exchanged)
        with pytest.raises(OSError, match="a FIFO"):
            opening.open_regular(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


READERS = {
    "calibration": (sparsebwd.use_calibration, ValueError),
    "bench --compare": (compare.load, ValueError),
    "bench --gradients": (gradients.load, ValueError),
    "checkpoint": (records.load_record, (OSError, records.RecordError)),
    "CIFAR": (lambda path: cifar._read(path, cifar.ARCHIVES["cifar10"], 9), DataError),
    "CIFAR, pickled": (lambda path: cifar._read_pickled(path, cifar.ARCHIVES["cifar10"], 9), DataError),
}


@pytest.mark.parametrize("kind", [*KINDS, "huge"])
@pytest.mark.parametrize("reader", READERS)
def test_files_that_users_name(reader, kind, tmp_path):
    path = make(kind, tmp_path / "file")
    read, errors = READERS[reader]
    words = r"got \d+ bytes|it has \d+ bytes, accepted are up to|does not end in its digest" if kind == "huge" else KINDS[kind]
    with pytest.raises(errors, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["FIFO", "huge"])
def test_files_in_folders_of_runs(kind, tmp_path):
    """What is none is not there, or is refused; nothing waits, and nothing is read that has no end."""
    assert runs.read_json(make(kind, tmp_path / log.JSON_FILE)) is None
    with pytest.raises(OSError, match=r"not a regular file|it has \d+ bytes"):
        timing.measure(tmp_path)
    claim = make(kind, tmp_path / claims.FILE)
    with pytest.raises(OSError, match=r"not a regular file|it has \d+ bytes"):
        claims.take(tmp_path)
    if kind == "huge":
        assert sweep._last_line(claim).strip("\0") == ""
        with pytest.raises(OSError, match=r"it has \d+ bytes"):
            log.StepLog(make(kind, tmp_path / log.STEPS_FILE).parent).begin(1, ["sparse"])


def test_nothing_else_opens_a_file_to_read():
    """But for files that the same function wrote, or opened by it, and those of the system."""
    found = set()
    for path in sorted([*ROOT.glob("python/**/*.py"), *ROOT.glob("bench/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and _reads(ast.unparse(node.func), node.args):
                found.add((str(path.relative_to(ROOT)), ast.unparse(node)))
    assert found == {
        ("python/sparsebwd/backends/machine.py", "Path('/proc/cpuinfo').read_text()"),
        ("python/sparsebwd/data/cifar.py", "np.fromfile(file, np.uint8, size)"),
        ("python/sparsebwd/data/files.py", "open(temporary, 'rb')"),
        ("python/sparsebwd/data/records.py", "torch.load(file, map_location='cpu', weights_only=True)"),
        ("python/sparsebwd/profiling/kept.py", "torch.load(path, weights_only=False)"),
        ("python/sparsebwd/reproduce/claims.py", "Path('/proc/sys/kernel/random/boot_id').read_text()"),
        ("python/sparsebwd/reproduce/timing.py", "Path('/proc/stat').read_text()"),
        ("bench/environment.py", "Path('/proc/stat').read_text()"),
        ("bench/environment.py", "path.read_text()"),
        ("bench/memory.py", "_STATUS.read_text()"),
        ("bench/memory.py", "path.read_text('utf-8')"),
        ("bench/memory.py", "torch.load(path, weights_only=False)"),
    }


def _reads(function: str, arguments: list[ast.expr]) -> bool:
    if function == "open":
        return len(arguments) == 1 or "r" in ast.literal_eval(arguments[1])
    ends = (".read_text", ".read_bytes", "np.load", "np.fromfile", "np.loadtxt", "torch.load")
    return function.endswith(ends) and not function.startswith("opening.") or function == "json.load"
