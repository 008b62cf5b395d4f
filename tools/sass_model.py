# SPDX-License-Identifier: Apache-2.0
"""How fast K2 and K3 are to be expected, from their machine code: a model of one multiprocessor of an H100.

The main loops run on random zeros, instruction by instruction, with as many warps as registers allow. A scheduler issues one
instruction a clock; a warp waits for the registers that it reads, and for the instructions behind a branch that is taken; all
four schedulers share the load-store unit. What a branch does follows from what it skips: products are skipped if all of their
gradients are zeros. Loads hit the caches that they are meant to hit, and nobody waits at a barrier for others: real kernels
are slower. Times are clocks, unless they say otherwise.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from sass import Kernel
from sass_operation import Operation, operation

# An H100 SXM, and what is expected of cuDNN in strict float32 there: not measured.
MULTIPROCESSORS, GIGAHERTZ, DENSE_TFLOPS = 132, 1.755, 53.0
SCHEDULERS = 4
SHARED_BYTES = 228 * 1024 // 2 - 1024  # for each of two blocks
DENSITIES = (0.4, 0.3, 0.2, 0.1, 0.05)

# From a branch to the next instruction.
BRANCH, TAKEN_BRANCH = 5, 7
# Clocks of work that the load-store unit takes on before schedulers have to wait for it.
QUEUE = 32


# ---- the code


@dataclass(frozen=True)
class Loop:
    """From instruction ``first`` to the branch back to it, ``last``."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


@dataclass(frozen=True)
class Code:
    """The loops of a kernel around its products, and where these are: ``products`` are the first instructions of runs of
    multiply-adds, in order."""

    kernel: Kernel
    products: tuple[int, ...]
    inner: Loop
    middle: Loop
    outer: Loop

    @functools.cached_property
    def targets(self) -> tuple[int | None, ...]:
        """Of each instruction, if it is a branch."""
        return tuple(_target(self.kernel, at) for at in range(len(self.kernel.instructions)))


def _target(kernel: Kernel, at: int) -> int | None:
    instruction = kernel.instructions[at]
    found = re.search(r"0x([0-9a-f]+)$", instruction.operands) if instruction.opcode.startswith("BRA") else None
    return int(found[1], 16) // 16 if found else None


def find_code(kernel: Kernel) -> Code:
    """Raises ValueError for a kernel that has no three loops around multiply-adds."""
    instructions = kernel.instructions
    loops = {}
    for at in range(len(instructions)):
        target = _target(kernel, at)
        if target is not None and target <= at:
            loops[target] = Loop(target, at)  # the last branch back
    adds = [i.opcode.startswith("FFMA") for i in instructions]
    of_loop = {loop: sum(adds[loop.first : loop.last]) for loop in loops.values()}
    inner = [loop for loop in of_loop if of_loop[loop] and not any(loop.holds(o) and of_loop[o] for o in of_loop)]
    if inner:
        most = max(inner, key=of_loop.__getitem__)
        around = sorted((loop for loop in of_loop if loop.holds(most)), key=lambda loop: loop.last - loop.first)
        if len(around) >= 2:
            starts = [i for i in range(most.first, most.last) if adds[i] and not adds[i - 1]]
            # A product that is split by a test of the next one is one.
            products = [i for i in starts if i == starts[0] or any(_target(kernel, j) for j in range(i - 12, i))]
            return Code(kernel, tuple(products), most, *around[:2])
    raise ValueError(f"{kernel.name}: got a kernel without three loops around multiply-adds")


# ---- what a warp executes


@dataclass(frozen=True)
class Step:
    operation: Operation
    after: int = 1  # clocks until the warp may issue the next one


Skips = Callable[[int, int], bool]  # whether a branch at the one instruction to the other is taken


class Walk:
    """The instructions of a warp, endlessly. `units` counts what it has done: rows of a strip times channels of
    grad_output in K2, pixels times a warp's channels in K3."""

    # Of shared memory, opcodes of loads that all lanes do from one address.
    broadcasts = "LDS.128"
    pixels = 0  # of grad_output, in a unit
    chain = 0  # values of a channel, after which sums are put aside

    def __init__(self, code: Code, density: float, seed: int, channels: int, width: int) -> None:
        self.code, self.density, self.channels, self.width = code, density, channels, width
        self.random = random.Random(seed)
        self.units = 0
        self.step = functools.cache(self.step)
        self.rest, self.aside = self._outer()

    def draw(self, count: int) -> list[bool]:
        return [self.random.random() < self.density for _ in range(count)]

    def step(self, at: int, taken: bool | None = None) -> Step:
        instruction = self.code.kernel.instructions[at]
        after = 1 if taken is None else TAKEN_BRANCH if taken else BRANCH
        return Step(operation(instruction, instruction.opcode == self.broadcasts), after)

    def walk(self, loop: Loop, skips: Skips, inside: Iterable[Step] = ()) -> Iterator[Step]:
        """One turn of a loop; the loop in it is what ``inside`` gives."""
        at = loop.first
        while at <= loop.last:
            if loop != self.code.inner and at == self.code.inner.first:
                yield from inside
                at = self.code.inner.last + 1
                continue
            target = self.code.targets[at]
            if target is None:
                yield self.step(at)
                at += 1
            elif at == loop.last:
                yield self.step(at, True)
                return
            else:
                instruction = self.code.kernel.instructions[at]
                conditional = instruction.guard or "P" in instruction.operands
                taken = target > at and (not conditional or skips(at, target))
                yield self.step(at, taken)
                at = target if taken else at + 1

    def skips_products(self, nonzero: Sequence[bool]) -> Skips:
        """Branches are taken if they skip products and all of these are of zeros."""

        def skips(at: int, target: int) -> bool:
            skipped = [nonzero[i] for i, product in enumerate(self.code.products) if at < product < target]
            return bool(skipped) and not any(skipped)

        return skips

    def _outer(self) -> tuple[list[Step], list[Step]]:
        """What the outer loop has beside loops of products: for each turn of it, and to put sums aside."""
        kernel, outer = self.code.kernel, self.code.outer
        branches = [at for at in range(outer.first, outer.last + 1) if self.code.targets[at] is not None]
        adding = [Loop(self.code.targets[at], at) for at in branches if outer.first < self.code.targets[at] <= at]
        adding = [
            loop for loop in adding if any(i.opcode.startswith("FFMA") for i in kernel.instructions[loop.first : loop.last])
        ]
        edges = sorted({outer.first, outer.last + 1, *(at + 1 for at in branches), *(self.code.targets[at] for at in branches)})
        rest, aside, added = [], [], 0
        for first, end in zip(edges, edges[1:]):
            if first < outer.first or first > outer.last or any(loop.first <= first <= loop.last for loop in adding):
                continue
            opcodes = [i.opcode for i in kernel.instructions[first:end]]
            steps = [self.step(at) for at in range(first, end)]
            adds = sum(opcode.startswith("FADD") for opcode in opcodes)
            if adds and added < self.sums:
                aside += steps
                added += adds
            elif not adds and not self.leaves_out(opcodes):
                rest += steps
        return rest, aside

    sums = 0  # of a lane

    def leaves_out(self, opcodes: Sequence[str]) -> bool:
        return False


class AgbWalk(Walk):
    def __init__(self, code: Code, density: float, seed: int, channels: int, width: int) -> None:
        _, taps, stride, columns, lane = _arguments(code.kernel)
        self.taps, self.lane, self.sums, self.pixels, self.chain = taps, lane, taps * columns * lane, columns // stride, 32
        super().__init__(code, density, seed, channels, width)

    @property
    def flops(self) -> int:
        """Of a dense kernel, for a unit."""
        return 2 * self.pixels * self.taps**2 * 32 * self.lane

    def leaves_out(self, opcodes: Sequence[str]) -> bool:
        return any(opcode.startswith("STS") for opcode in opcodes)  # for warps that share rows

    def __iter__(self) -> Iterator[Step]:
        values = 0
        while True:
            for _ in range(max(1, self.channels // 32)):
                bits = [self.draw(len(self.code.products)) for _ in range(32)]
                nothing = not any(map(any, bits))
                yield from self.walk(self.code.middle, partial(self._skips_all, nothing), self._channels(bits))
                values += max(map(sum, zip(*bits)))
                if values >= self.chain:
                    yield from self.aside
                    values = 0
            yield from self.rest

    def _skips_all(self, nothing: bool, at: int, target: int) -> bool:
        return nothing and at < self.code.inner.first < target

    def _channels(self, bits: list[list[bool]]) -> Iterator[Step]:
        for nonzero in bits:
            if any(nonzero):
                yield from self.walk(self.code.inner, self.skips_products(nonzero))
            self.units += 1


class WgcWalk(Walk):
    run = 4  # pixels of a turn of the inner loop

    def __init__(self, code: Code, density: float, seed: int, channels: int, width: int) -> None:
        _, self.taps, stride, self.lane = _arguments(code.kernel)
        self.channels_of_warp = 16 // self.lane if self.taps == 3 else 8
        self.sums, self.chain = self.channels_of_warp * self.taps**2 * self.lane, 128
        # As the kernel cuts rows into strips and steps, of at most 128 pixels and what is staged at once.
        cuts = []
        for strips in range(math.ceil(width / 32), width + 1):
            strip = math.ceil(math.ceil(width / strips) / self.run) * self.run
            columns, tile_k = (strip - 1) * stride + self.taps, 4 * self.channels_of_warp
            for rows in range(128 // strip, 0, -1):
                ring = (2 * rows - 2) * stride + 2 * self.taps
                if 4 * (ring * columns * 32 * self.lane + 2 * rows * (strip * tile_k + 32)) <= SHARED_BYTES:
                    cuts.append((300 / (rows * strip) + 100 / strip, -strip, rows))
                    break
        _, strip, self.rows = min(cuts)
        self.strip = -strip
        super().__init__(code, density, seed, channels, width)

    @property
    def flops(self) -> int:
        return 2 * self.channels_of_warp * self.taps**2 * 32 * self.lane

    def __iter__(self) -> Iterator[Step]:
        summed = [0] * self.channels_of_warp
        while True:
            yield from self.rest
            for _ in range(self.rows):
                pixels = [self.draw(self.channels_of_warp) for _ in range(self.strip)]
                yield from self.walk(self.code.middle, lambda at, target: False, self._runs(pixels))
                summed = [total + sum(column) for total, column in zip(summed, zip(*pixels))]
            if max(summed) >= self.chain:
                yield from self.aside
                summed = [0] * self.channels_of_warp

    def _runs(self, pixels: list[list[bool]]) -> Iterator[Step]:
        runs = [pixels[first : first + self.run] for first in range(0, self.strip, self.run)]
        there = [False, *(any(map(any, run)) for run in runs), False]
        for run, before, present, after in zip(runs, there, there[1:], there[2:]):
            if present:
                yield from self.walk(self.code.inner, self._skips(run, before, after))
            self.units += self.run

    def _skips(self, run: list[list[bool]], before: bool, after: bool) -> Skips:
        by_products = self.skips_products([bit for pixel in run for bit in pixel])

        def skips(at: int, target: int) -> bool:
            if any(at < product < target for product in self.code.products):
                return by_products(at, target)
            # Loads of what the run before has loaded, or of what the one after will not use.
            return before if at < self.code.products[0] else not after

        return skips


def _arguments(kernel: Kernel) -> tuple[str, ...]:
    words = re.search(r"<\w+<(.*?)>", kernel.name)[1].split(",")
    return tuple(int(word) if word.strip().isdigit() else word.strip() for word in words)


# ---- time


@dataclass
class _Warp:
    steps: Iterator[Step]
    scheduler: int
    free: int = 0  # when it may issue
    ready: dict[str, int] = field(default_factory=dict)  # registers that are not there yet, and when they will be
    step: Step | None = None


def simulate(warps: Sequence[Iterable[Step]], until: Callable[[int], bool] = lambda now: False) -> int:
    """Clocks that a multiprocessor takes until all is issued, or ``until``, asked with the clock now and then, says so. Warps
    take the four schedulers in turn."""
    states = [_Warp(iter(steps), i % SCHEDULERS) for i, steps in enumerate(warps)]
    issues = [0] * SCHEDULERS  # when a scheduler may issue next
    units = [dict[str, int]() for _ in range(SCHEDULERS)]
    load_store = now = 0
    queue = []

    def earliest(warp: _Warp) -> int:
        step = warp.step.operation
        return max(warp.free, issues[warp.scheduler], units[warp.scheduler].get(step.unit, 0),
                   load_store - QUEUE if step.load_store else 0, *(warp.ready.get(name, 0) for name in step.reads))  # fmt: skip

    for number, warp in enumerate(states):
        warp.step = next(warp.steps, None)
        if warp.step is not None:
            heapq.heappush(queue, (earliest(warp), number))
    count = 0
    while queue:
        now, number = heapq.heappop(queue)
        warp = states[number]
        time = earliest(warp)
        if time > now:
            heapq.heappush(queue, (time, number))
            continue
        step = warp.step.operation
        issues[warp.scheduler] = now + 1
        if step.unit:
            units[warp.scheduler][step.unit] = now + step.occupies
        done = now + step.latency
        if step.load_store:
            load_store = max(load_store, now) + step.load_store
            done = load_store + step.latency
        for name in step.writes:
            warp.ready[name] = done
        warp.free = now + warp.step.after
        warp.step = next(warp.steps, None)
        if warp.step is not None:
            heapq.heappush(queue, (earliest(warp), number))
        count += 1
        if count % 256 == 0 and until(now):
            break
    return now


WALKS = {"agb_kernel": AgbWalk, "wgc_kernel": WgcWalk}


def walks_of(kernel: Kernel, density: float, channels: int = 64, width: int = 56) -> list[Walk]:
    """Of all warps of a multiprocessor that is full of this kernel."""
    code = find_code(kernel)
    return [WALKS[kernel.name.partition("<")[0]](code, density, seed, channels, width) for seed in range(kernel.warps)]


def clocks_of_unit(kernel: Kernel, density: float, units: int = 1200) -> float:
    """Of a multiprocessor. Measured over about so many units, more at low densities, after as many to begin with: warps that
    have just begun wait for the same things."""
    walks = walks_of(kernel, density)
    done = lambda: sum(walk.units for walk in walks)  # noqa: E731
    marks = [units / density**0.5, 2 * units / density**0.5]
    reached: list[tuple[int, int]] = []

    def until(now: int) -> bool:
        if done() >= marks[len(reached)]:
            reached.append((now, done()))
        return len(reached) == 2

    simulate(walks, until)
    (start, before), (end, after) = reached
    return (end - start) / (after - before)


def dense_clocks(flops: int) -> float:
    """Of a multiprocessor, in a dense kernel at `DENSE_TFLOPS`."""
    return flops / (DENSE_TFLOPS * 1e3 / MULTIPROCESSORS / GIGAHERTZ)


# ---- what is printed

# Of each 3x3 layer of stride 1 of a ResNet-18 for ImageNet at batch 256; those of stride 2 have half of it.
LAYER_FLOPS = 2 * 9 * 256 * 56**2 * 64**2
_MODELLED = re.compile(r"(agb_kernel<Form<float, 3, (\d), |wgc_kernel<Kernel<float, 3, (\d), )")


def modelled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Those that there is a prediction for."""
    return [k for k in kernels if k.architecture == "sm_90a" and _MODELLED.match(k.name)]


def predictions(kernels: Sequence[Kernel]) -> str:
    """A table of speed-ups, and one of times, by kernel and density."""
    chosen = modelled(kernels)
    width = max((len(kernel.name) for kernel in chosen), default=0) + 12
    heading = "".join(f"{density:>8}" for density in DENSITIES)
    ratios, times = [], []
    for kernel in chosen:
        dense = walks_of(kernel, 0.0)[0].flops
        of_layer = LAYER_FLOPS // int(next(filter(None, _MODELLED.match(kernel.name).groups()[1:])))
        clocks = [clocks_of_unit(kernel, density) for density in DENSITIES]
        ratios.append(f"{kernel.name:{width}}" + "".join(f"{dense_clocks(dense) / each:8.2f}" for each in clocks))
        name = f"{kernel.name} ({of_layer / DENSE_TFLOPS / 1e9:.2f})"
        times.append(f"{name:{width}}" + "".join(f"{milliseconds(of_layer / dense, each):8.2f}" for each in clocks))
    return "\n".join(
        [f"{'predicted speed-up over dense float32':{width}}{heading}", *ratios]
        + [f"{'predicted ms, a layer of ResNet-18 (dense)':{width}}{heading}", *times]
    )


def milliseconds(units: float, clocks: float) -> float:
    """Of so many units on all multiprocessors, each of which takes a multiprocessor so many clocks."""
    return units * clocks / MULTIPROCESSORS / GIGAHERTZ / 1e6
