# SPDX-License-Identifier: Apache-2.0
"""What setup.py compiles, here and on other machines; `make build` shows what it does."""

from __future__ import annotations

import os
import platform
import re
import runpy
import subprocess
import sys
from pathlib import Path

import build
import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent

SAID = """\
running build_ext
[1/12] compile csrc/cpu/isa.cpp
[12/12] c++ -MMD -I/include -c /there/csrc/torch/library.cpp -o build/library.o -O3
[2/2] link everything
ninja: no work to do.
"""


def shown(text, capfd, status=0):
    program = f"import sys; print({text!r}, end=''); print('to stderr', file=sys.stderr); sys.exit({status})"
    returned = build.main([sys.executable, "-c", program])
    return returned, *capfd.readouterr()


def test_a_line_for_each_file(capfd):
    status, out, err = shown(SAID, capfd)
    assert (status, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [["1/12", "isa.cpp"], ["12/12", "library.cpp"], ["2/2", "link"]]
    assert max(map(len, out.splitlines())) < 80 and all(line.endswith(" s") for line in out.splitlines())


def test_what_a_build_that_fails_said_is_shown_whole(capfd):
    status, out, err = shown(SAID, capfd, 3)
    assert status == 3 and all(line in err for line in SAID.splitlines()) and "to stderr" in err


@pytest.mark.parametrize(
    "machine, isas, macro",
    [
        ("x86_64", {"avx2": "-mavx2 -mfma -mbmi -mbmi2 -mpopcnt", "avx512": "-mavx2 .*-mavx512f .*-mavx512vl"}, "X86"),
        ("AMD64", {"avx2": "-mavx2 .*", "avx512": ".*-mavx512f .*"}, "X86"),
        ("aarch64", {"neon": ""}, "AARCH64"),
        ("arm64", {"neon": ""}, "AARCH64"),
        ("riscv64", {}, None),
    ],
)
def test_what_each_machine_compiles(machine, isas, macro, monkeypatch, tmp_path):
    """setup.py told that it is on that machine, with nothing compiled."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.delitem(sys.modules, "cpu_kernels", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name, value in {"SPARSEBWD_CUDA": "0", "SPARSEBWD_SANITIZE": "0", "CXX": sys.executable, "PATH": os.environ["PATH"]}.items():
        monkeypatch.setenv(name, value)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    objects = setup["kernel_objects"](tmp_path)

    rules = (tmp_path / "kernels.ninja").read_text()
    own = dict(re.findall(r": compile csrc/cpu/(\w+)\.cpp\n  own_flags = ?(.*)\n", rules))
    assert len(own) == len(objects["sparsebwd._C"]) and all((ROOT / f"csrc/cpu/{name}.cpp").is_file() for name in own)
    kernels = {name: flags for name, flags in own.items() if re.match("(prune|conv|depthwise)_(?!plan|backward)", name)}
    expected = {f"{kernel}_{isa}": flags for kernel in ("prune", "conv", "depthwise") for isa, flags in ({"baseline": ""} | isas).items()}
    assert kernels.keys() == expected.keys()
    assert all(re.fullmatch(expected[name], flags) for name, flags in kernels.items())
    assert not any(flags for name, flags in own.items() if name not in kernels)
    common = re.search(r"rule compile\n  command = (.*)", rules)[1]
    assert re.findall(r"-DSPARSEBWD_(\w+)", common) == ([macro] if macro else [])
    assert not re.search(r" -m[a-z]", common)  # such as -mavx2
