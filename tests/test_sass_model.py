# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the model that predicts the speed of CUDA kernels, on code of which the time is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sass_model as model
import sass_operation
from sass import Instruction, Kernel


def _instructions(text: str) -> tuple[Instruction, ...]:
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        guard, line = line.split(" ", 1) if line.startswith("@") else ("", line)
        found.append(Instruction(guard, *line.split(" ", 1)) if " " in line else Instruction(guard, line, ""))
    return tuple(found)


def _steps(text: str, times: int = 1) -> list[model.Step]:
    return [model.Step(sass_operation.operation(i)) for i in _instructions(text)] * times


APART = "\n".join(f"FFMA R{i}, R100, R101, R{i}" for i in range(10, 20))
CHAIN = "FFMA R1, R100, R101, R1"


@pytest.mark.parametrize(
    "text, times, warps, clocks",
    [
        (APART, 10, 1, 99),  # the last of 100 instructions is issued 99 clocks after the first
        (APART, 10, 4, 99),  # one on each scheduler
        (APART, 10, 8, 199),
        (CHAIN, 10, 1, 9 * sass_operation.ARITHMETIC),
        (CHAIN, 10, 16, 9 * sass_operation.ARITHMETIC + 3),  # four warps of a scheduler hide its latency
        ("LDS R1, [R2]\nFADD R3, R1, R1", 1, 1, 1 + sass_operation.SHARED),
        ("LOP3.LUT P0, RZ, R1, 0x1, RZ, 0xc0, !PT\n@P0 FADD R3, R4, R4", 1, 1, sass_operation.PREDICATE),
        ("IMAD.WIDE.U32 R2, R4, R5, R6\nFADD R8, R3, R3", 1, 1, sass_operation.ARITHMETIC),  # the second of two
        ("LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT\nLOP3.LUT R4, R2, R3, RZ, 0xc0, !PT", 1, 1, 2),  # half as many lanes
    ],
)
def test_clocks_of_known_code(text, times, warps, clocks):
    assert model.simulate([_steps(text, times) for _ in range(warps)]) == clocks


def test_schedulers_share_the_load_store_unit():
    """Loads of 16 bytes take it 4 clocks each, whichever scheduler they are from."""
    loads = _steps("\n".join(f"LDG.E.128.CONSTANT R{4 * i}, [R200.64]" for i in range(10)), 10)
    clocks = model.simulate([loads] * 4)
    assert clocks == pytest.approx(4 * 100 * 4, abs=model.QUEUE + 4)


@pytest.mark.parametrize(
    "text, reads, writes",
    [
        ("LDG.E.128.CONSTANT R56, desc[UR10][R68.64+0x10]", {"UR10", "R68", "R69"}, {"R56", "R57", "R58", "R59"}),
        ("STG.E.64 desc[UR10][R68.64], R4", {"UR10", "R68", "R69", "R4", "R5"}, set()),
        ("@!P3 SHFL.IDX PT, R11, R9, RZ, 0x1f", {"P3", "R9"}, {"R11"}),
        ("LEA R68, P0, R56, UR8, 0x2", {"R56", "UR8"}, {"R68", "P0"}),
        ("IADD3.X R9, R9, UR9, RZ, P0, !PT", {"R9", "UR9", "P0"}, {"R9"}),
        ("VOTE.ANY R165, PT, P0", {"P0"}, {"R165"}),
        ("@P0 BRA 0x24c0", {"P0"}, set()),
    ],
)
def test_registers_of_instructions(text, reads, writes):
    found = sass_operation.operation(*_instructions(text))
    assert (set(found.reads), set(found.writes)) == (reads, writes)


# A strip of two pixels, of which products are passed by if their gradient is zero; a loop over channels, in one over words of
# 32, in one over rows.
PRODUCT = "\n".join(f"FFMA R{20 + i}, R1, R{40 + i}, R{20 + i}" for i in range(18))
LOOPS = f"""
    IADD3 R9, R9, 0x1, RZ
    IADD3 R10, R9, 0x1, RZ
    IADD3 R2, R9, 0x1, RZ
    @!P1 BRA 0x170
    {PRODUCT}
    NOP
    @!P2 BRA 0x2b0
    {PRODUCT}
    NOP
    @P3 BRA 0x20
    @P4 BRA 0x10
    @P5 BRA 0x0
"""


def _kernel() -> Kernel:
    return Kernel("agb_kernel<Form<float, 3, 1, 2, 2> >", "sm_90a", 168, 0, 384, 1, _instructions(LOOPS))


def test_what_branches_skip():
    code = model.find_code(_kernel())
    assert code.products == (4, 24)
    assert (code.inner, code.middle, code.outer) == (model.Loop(2, 43), model.Loop(1, 44), model.Loop(0, 45))
    walk = model.AgbWalk(code, 0.5, 0, 64, 56)
    lengths = [
        len(list(walk.walk(code.inner, walk.skips_products(nonzero))))
        for nonzero in ((True, True), (True, False), (False, True), (False, False))
    ]
    # Of 42 instructions: 18 multiply-adds for a product, and what stands between them and a branch's target.
    assert lengths == [42, 42 - 18 - 1, 42 - 18 - 1, 42 - 2 * 19]


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_units_and_time_of_a_kernel(density):
    """One scheduler that is never idle takes as many clocks as instructions: those of what is not zero."""
    kernel = _kernel()
    walks = model.walks_of(kernel, density)
    assert len(walks) == kernel.warps == 12
    assert walks[0].flops == 2 * 2 * 9 * 64
    steps = iter(walks[0])
    count = 0
    while walks[0].units < 100000:
        next(steps)
        count += 1
    of_unit = count / walks[0].units
    some = 1 - (1 - density) ** 2
    assert of_unit == pytest.approx(4 * some + 19 * 2 * density + 2 / 32 + 2 / 64, rel=0.03)
    assert model.clocks_of_unit(kernel, density) >= of_unit / model.SCHEDULERS


def test_dense_time_and_milliseconds():
    # 53 TFLOP/s on 132 multiprocessors at 1.755 GHz are 228.8 operations a clock.
    assert model.dense_clocks(18432) == pytest.approx(80.6, abs=0.05)
    assert model.milliseconds(132 * 1.755e6, 2.0) == pytest.approx(2.0)


def test_kernels_without_loops_are_refused():
    kernel = Kernel("pack_kernel", "sm_90a", 16, 0, 256, 0, _instructions(APART))
    with pytest.raises(ValueError, match="three loops"):
        model.find_code(kernel)
    assert model.modelled([kernel]) == []


@pytest.mark.slow
def test_the_table_has_a_line_for_each_kernel_of_the_h100():
    kernel = _kernel()
    lines = model.predictions([kernel, replace(kernel, architecture="sm_80")]).splitlines()
    assert len(lines) == 4 and lines[1].startswith(kernel.name) and lines[3].startswith(f"{kernel.name} (1.12)")
    ratios, times = (list(map(float, line.split()[-5:])) for line in lines[1::2])
    assert ratios == sorted(ratios)
    assert all(ratio * time == pytest.approx(1.116, rel=0.05) for ratio, time in zip(ratios, times))
