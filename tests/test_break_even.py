# SPDX-License-Identifier: Apache-2.0
"""Which densities "auto" takes the sparse kernels for: by problem, dtype, layout and kind of CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sparsebwd import backends
from sparsebwd.backends import break_even as module
from sparsebwd.backends import machine
from sparsebwd.backends.break_even import CLASSES, break_even, classify
from sparsebwd.backends.break_even_tables import BFLOAT16, FLOAT32
from sparsebwd.problem import ConvProblem

pytestmark = pytest.mark.skipif("cpu" not in backends.available_backends(), reason="no CPU kernels")

TABLES = [*FLOAT32.values(), *BFLOAT16.values()]


@pytest.mark.parametrize(
    "text, kind",
    [
        ("n32c3h32w32k64r3s3p1", "first"),
        ("n32c3h32w32k64r3s3p2d2", None),
        ("n8c3h224w224k64r7s7u2p3", None),
        ("n32c12h32w32k64r3s3p1", None),
        ("n32c16h32w32k16r3s3p1", "narrow"),
        ("n32c128h32w32k24r1s3p0x1", "narrow"),
        ("n32c64h32w32k64r3s3p1", "kernel"),
        ("n32c64h32w32k64r3s3u2p1", "kernel"),
        ("n32c64h32w32k64r5s5p2", "large kernel"),
        ("n32c64h32w32k64r1s1", "1x1 narrow"),
        ("n32c256h32w32k24r1s1u2", "1x1 narrow"),
        ("n32c64h32w32k256r1s1", "1x1 half narrow"),
        ("n32c256h32w32k64r1s1", "1x1 half narrow"),
        ("n32c64h32w32k128r1s1u2", "1x1 strided"),
        ("n32c128h32w32k128r1s1", "1x1"),
        ("n32c64h32w32k64r3s3p1g64", None),
        ("n32c64h32w32k8r3s3p1", None),
        ("n1c32h4w4k32r3s3p1", None),
    ],
)
def test_class_of_a_problem(text, kind):
    assert classify(ConvProblem.parse(text)) == kind


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_tables_have_a_density_for_each_class(table):
    assert table.name and table.origin.startswith(("measured", "estimated", "as "))
    for layout in (table.channels_last, table.contiguous):
        assert list(layout) == list(CLASSES)
        assert all(0 <= limit <= 1 for limits in layout.values() for limit in limits)
        # No kernel computes AGB of the first layer, and no training step asks for it.
        assert layout["first"].agb == 0


@pytest.mark.parametrize("name", ["amx", "avx2 against avx512", "neon against bf16"])
def test_bfloat16_at_percentile_90_is_dense_where_dense_is_much_faster(name):
    """It leaves densities from about 0.2."""
    table = BFLOAT16[name]
    assert all(max(limits) < 0.2 for layout in (table.channels_last, table.contiguous) for limits in layout.values())


@pytest.mark.parametrize(
    "isa, native, amx, units_256_bits, float32, bfloat16",
    [
        ("baseline", False, False, False, "baseline", "baseline, dense through float32"),
        ("baseline", True, False, False, "baseline", "avx2 against avx512"),
        ("neon", False, False, False, "neon", "neon, dense through float32"),
        ("neon", True, False, False, "neon", "neon against bf16"),
        ("avx2", False, False, False, "avx2", "avx2, dense through float32"),
        ("avx2", True, True, False, "avx2 against avx512", "avx2 against avx512"),
        ("avx512", True, False, False, "avx512", "avx512_bf16"),
        ("avx512", True, False, True, "avx512, 256-bit units", "avx512_bf16, 256-bit units"),
        ("avx512", True, True, False, "avx512", "amx"),
        ("avx512", False, False, False, "avx512", "avx2, dense through float32"),
    ],
)
def test_kind_of_cpu(isa, native, amx, units_256_bits, float32, bfloat16):
    assert module._kinds(isa, native, amx, units_256_bits) == (float32, bfloat16)
    assert float32 in FLOAT32 and bfloat16 in BFLOAT16


@pytest.mark.parametrize("tables, name, other", [(FLOAT32, "neon", "avx2"), (BFLOAT16, "neon against bf16", "avx512_bf16")])
def test_what_was_never_timed_says_so_and_is_cautious(tables, name, other):
    assert "nothing was timed on aarch64" in tables[name].origin
    for kind, limits in tables[name].channels_last.items():
        assert all(limit <= 0.6 * measured for limit, measured in zip(limits, tables[other].channels_last[kind])), kind


@pytest.mark.parametrize(
    "vendor, family, expected",
    [("AuthenticAMD", 25, True), ("AuthenticAMD", 26, False), ("GenuineIntel", 25, False), (None, None, False)],
)
def test_zen4_is_told_by_its_family(vendor, family, expected, monkeypatch):
    def read(self):
        if vendor is None:
            raise FileNotFoundError
        return f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: A: B\n\nprocessor\t: 1\n"

    monkeypatch.setattr(machine.Path, "read_text", read)
    assert machine.has_256_bit_units() is expected


def test_arm_cpus_are_told_apart(monkeypatch):
    """They have no name, and a calibration of one is not that of another."""
    text = "processor\t: 0\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda self: text)
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64 (implementer 0x41, part 0xd0c)"


@pytest.mark.slow
def test_limited_kernels_have_the_table_of_their_instruction_set(monkeypatch):
    monkeypatch.setenv("SPARSEBWD_MAX_ISA", "baseline")
    program = (
        "import torch, sparsebwd; from sparsebwd.backends import break_even; print(break_even.tables()[torch.float32].name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "baseline\n"


def test_break_even_is_that_of_the_table_in_force(monkeypatch):
    table = module.Table("one", "measured", {"kernel": module.BreakEven(0.5, 0.25)}, {})
    monkeypatch.setattr(module, "tables", lambda: {torch.float32: table})
    break_even.cache_clear()
    problem = ConvProblem.parse("n32c64h32w32k64r3s3p1")
    try:
        assert break_even(problem, torch.float32, True) == (0.5, 0.25)
        assert break_even(problem, torch.float32, False) == (0, 0)
        assert break_even(ConvProblem.parse("n32c128h32w32k128r1s1"), torch.float32, True) == (0, 0)
    finally:
        break_even.cache_clear()
