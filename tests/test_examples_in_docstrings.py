# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings run, and what users call has some."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys

import pytest

import sparsebwd

# Results, which users are given; and what needs a file, or a library.
WITHOUT = {"ConversionReport", "LayerReport", "PrunedGradient", "Profile", "Info", "use_calibration", "register_conv"}

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(sparsebwd.__path__, "sparsebwd.")
    if not name.startswith(("sparsebwd.bench", "sparsebwd._C")) and not name.endswith("__main__")
]


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        yield from (found for found in finder.find(module, name) if found.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_examples(example):
    if "keep_memory" in example.name:
        pytest.skip("it holds to the end of the process: below")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    example.globs.clear()  # as in a program of one's own
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="needs glibc")
def test_example_of_keep_memory():
    program = "import doctest, sparsebwd.memory as m; assert doctest.testmod(m).failed == 0"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_what_users_call_has_an_example():
    public = {name: getattr(sparsebwd, name) for name in sparsebwd.__all__ if name not in WITHOUT}
    public |= {f"{module.__name__}.{name}": getattr(module, name) for module in (sparsebwd.functional, sparsebwd.grad) for name in module.__all__}
    things = {name: thing for name, thing in public.items() if inspect.isfunction(thing) or inspect.isclass(thing)}
    missing = [name for name, thing in things.items() if ">>>" not in (thing.__doc__ or "") and name.rpartition(".")[2] not in WITHOUT]
    assert len(things) > 10 and not missing
