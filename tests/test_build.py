# SPDX-License-Identifier: Apache-2.0
"""`make build` shows what it does."""

from __future__ import annotations

import sys

import build

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
