# SPDX-License-Identifier: Apache-2.0
"""A machine instruction as the model of a multiprocessor (sass_model.py) sees it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from sass import Instruction

# From an instruction to one that reads what it wrote: as the compiler, which knows, schedules them for sm_90 where that is fixed,
# else as published microbenchmarks have them, roughly.
ARITHMETIC, PREDICATE, SHUFFLE, SPECIAL = 4, 13, 23, 20
SHARED, L1, L2 = 23, 38, 270


@dataclass(frozen=True)
class Operation:
    """An instruction as the model sees it: registers read and written, clocks until those are there, and clocks that it
    occupies its scheduler's arithmetic unit and the load-store unit."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    latency: int
    unit: str = ""
    occupies: int = 1
    load_store: int = 0


_REGISTER = re.compile(r"\b(U?[RP]\d+)\b(\.64)?")
_WORDS = {"64": 2, "128": 4}
_TWO = re.compile(r"IMAD\.WIDE|CS2R|UIMAD\.WIDE")
_NO_RESULT = re.compile(r"ST|RED\b|BRA|BAR|BSSY|BSYNC|WARPSYNC|EXIT|NOP|LDGSTS|LDGDEPBAR|DEPBAR|MEMBAR|ERRBAR|CCTL|BREAK")


def _span(register: str, count: int) -> list[str]:
    name, number = re.fullmatch(r"(\D+)(\d+)", register).groups()
    return [f"{name}{int(number) + i}" for i in range(count)]


@functools.cache
def operation(instruction: Instruction, broadcasts: bool = False) -> Operation:
    """``broadcasts``: all lanes load from one address."""
    opcode, parts = instruction.opcode, [part.strip() for part in instruction.operands.split(",")]
    width = next((_WORDS[word] for word in opcode.split(".") if word in _WORDS), 1)
    memory = re.match(r"(LD|ST|ATOM|RED\b)", opcode) and not opcode.startswith(("LDC", "LDGDEPBAR"))
    wide = 2 if _TWO.match(opcode) else width if memory else 1
    writes, reads = [], [name for name, _ in _REGISTER.findall(instruction.guard)]
    first = 0
    if not _NO_RESULT.match(opcode):
        # Predicates come first where an instruction writes them.
        while first < len(parts) and re.fullmatch(r"U?P[T\d]", parts[first]):
            writes += [] if parts[first].endswith("T") else [parts[first]]
            first += 1
        if re.fullmatch(r"U?R\d+", parts[first] if first < len(parts) else ""):
            writes += _span(parts[first], wide)
            first += 1
            if first < len(parts) and re.fullmatch(r"U?P\d", parts[first]):  # a carry
                writes.append(parts[first])
                first += 1
    for part in parts[first:]:
        for name, pair in _REGISTER.findall(part):
            stored = memory and opcode.startswith("ST") and "[" not in part
            reads += _span(name, 2 if pair else width if stored else 1)
    unit, occupies, load_store, latency = "alu", 2, 0, ARITHMETIC
    if re.match(r"(FFMA|FADD|FMUL|IMAD|HFMA2)", opcode):
        unit, occupies = "fma", 1
    elif memory:
        unit, occupies = "", 1
        latency = SHARED if opcode.startswith("LDS") else L1 if width > 1 else L2
        load_store = max(1, width // 2) if broadcasts else width
    elif opcode.startswith("SHFL"):
        unit, occupies, latency, load_store = "", 1, SHUFFLE, 1
    elif re.match(r"(REDUX|POPC|FLO|UFLO|UPOPC|R2UR|S2|LDC|ULDC|MUFU)", opcode):
        unit, occupies, latency = "special", 4, SPECIAL
    elif re.match(r"(BRA|BSSY|BSYNC|NOP|WARPSYNC)", opcode):
        unit, occupies = "", 1
    if latency == ARITHMETIC and any("P" in name for name in writes):
        latency = PREDICATE
    return Operation(tuple(reads), tuple(writes), latency, unit, occupies, load_store)
