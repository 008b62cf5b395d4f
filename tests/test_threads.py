# SPDX-License-Identifier: Apache-2.0
"""convert() and what the process shares: other threads convert or run models of their own, and draw random numbers."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsebwd import conversion_report, convert, models, revert

TURNS = 40


class Watched(nn.Module):
    """Calls what it was given at each step of its own tracing."""

    def __init__(self, watch) -> None:
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1)
        self.watch = watch

    def forward(self, x):
        self.watch()
        x = self.act(self.conv(x))
        self.watch()
        return F.silu(self.last(x))


def test_two_conversions_that_overlap_in_any_order():
    """Both are in the middle of a trace at the same time, and end in the order in which they began, and in the other."""
    unpatched = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__", "forward")}
    for first_to_end in (0, 1):
        both_trace, one_has_ended = threading.Barrier(2, timeout=60), threading.Event()
        calls = [0, 0]

        def watch(index, barrier=both_trace, ended=one_has_ended, first=first_to_end, calls=calls):
            assert {name: getattr(nn.Module, name) for name in unpatched} == unpatched
            calls[index] += 1
            if calls[index] == 1:
                barrier.wait()
                if index != first:
                    assert ended.wait(60)

        def run(index, watch=watch, ended=one_has_ended):
            model = convert(Watched(lambda: watch(index)), where="everywhere")
            ended.set()
            return model

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(run, range(2)))
        for model in results:
            assert (model.conv.placement, model.last.placement) == ("input", "output")
            assert "by order" not in str(conversion_report(model))
    assert {name: getattr(nn.Module, name) for name in unpatched} == unpatched


@pytest.mark.slow
def test_many_conversions_beside_forward_passes():
    """Every one ends as it does alone, and so do the forward and backward passes of other threads."""
    reference = str(conversion_report(convert(models.create("resnet18", num_classes=10), where="everywhere")))
    bystander = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(1, 3, 6, 6)
    expected = bystander(x)
    stop = threading.Event()

    def forward() -> int:
        passes = 0
        while not stop.is_set() or passes < TURNS:
            assert torch.equal(bystander(x), expected)
            passes += 1
        return passes

    def conversions() -> set[str]:
        model, reports = models.create("resnet18", num_classes=10), set()
        for _ in range(TURNS // 10):
            reports.add(str(conversion_report(convert(model, where="everywhere"))))
            revert(model)
        return reports

    with ThreadPoolExecutor(4) as pool:
        passing = [pool.submit(forward) for _ in range(2)]
        converting = [pool.submit(conversions) for _ in range(2)]
        try:
            assert [future.result() for future in converting] == [{reference}] * 2
        finally:
            stop.set()
        assert all(future.result() >= TURNS for future in passing)


def test_a_conversion_draws_nothing_while_another_thread_draws():
    """The numbers that this thread draws, from the generators of the process, are those of a thread alone."""

    def draw() -> list[float]:
        return [*torch.randn(3).tolist(), random.random()]

    def seeded() -> None:
        torch.manual_seed(3)
        random.seed(3)

    seeded()
    expected = [draw() for _ in range(3)]
    ask, answer = threading.Semaphore(0), threading.Semaphore(0)

    def wait_for_a_draw() -> None:
        ask.release()
        assert answer.acquire(timeout=60)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(x) + torch.randn(1) * random.random() + torch.rand_like(x).mean()

    whole = nn.ModuleList([Watched(wait_for_a_draw), Noisy(), nn.Dropout(), nn.RReLU()])
    seeded()
    thread = threading.Thread(target=convert, args=(whole,))
    got = [draw()]
    thread.start()
    for _ in range(2):
        assert ask.acquire(timeout=60)
        got.append(draw())
        answer.release()
    thread.join(60)
    assert not thread.is_alive() and got == expected


@pytest.mark.parametrize("after", [nn.Dropout(), nn.RReLU(), nn.FractionalMaxPool2d(2, output_ratio=0.5), nn.ReLU()])
def test_modules_that_draw_do_not_when_they_are_traced(after):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), after, nn.ReLU())
    states = torch.get_rng_state(), random.getstate()
    convert(model, where="everywhere")
    conversion_report(model)
    revert(model)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]


# ---- generators

GENERATOR = torch.Generator()
SHARED = random.Random(0)


def _helper():
    return random.random()


class _Callable:
    def __call__(self):
        return random.random()


class _Holder:
    """Something with a method, an attribute and a container of functions; refers to itself."""

    def __init__(self):
        self.itself, self.function, self.functions = self, _helper, {"a": [_helper]}

    def method(self):
        return random.random()


def _by_default(x, draw=random.random, *, also=np.random.rand):
    return x * draw() * also()


def _imports_within(x):
    from numpy.random import rand as anything

    return x * anything()


_instance, _holder, _legacy, _modern = _Callable(), _Holder(), np.random.RandomState(0), np.random.default_rng(0)
_table = {"a": (_helper,)}
DRAWS = {
    "torch": lambda self, x: x * torch.rand(1),
    "generator": lambda self, x: x * torch.rand(1, generator=GENERATOR),
    "own generator": lambda self, x: x * torch.rand(1, generator=self.generator),
    "dropout of a constant": lambda self, x: x * F.dropout(torch.ones(3, 1, 1)),
    "distribution": lambda self, x: x * torch.distributions.Normal(0.0, 1.0).sample(),
    "initialisation": lambda self, x: x + nn.init.normal_(torch.empty(3, 1, 1)),
    "manual_seed": lambda self, x: (torch.manual_seed(3), x)[1],
    "seed": lambda self, x: (torch.seed(), x)[1],
    "default generator": lambda self, x: (torch.default_generator.manual_seed(3), x)[1],
    "seed of a generator": lambda self, x: (GENERATOR.manual_seed(3), x)[1],
    "seed of its own generator": lambda self, x: (self.generator.manual_seed(3), x)[1],
    "random": lambda self, x: x * random.random(),
    "shuffle": lambda self, x: (random.shuffle([1, 2]), x)[1],
    "Random": lambda self, x: x * SHARED.random(),
    "own Random": lambda self, x: x * self.random.random(),
    "helper": lambda self, x: x * _helper(),
    "object": lambda self, x: x * _instance(),
    "partial": partial(lambda k, self, x: x * random.random(), 1),
    "numpy": lambda self, x: x * np.random.rand(),
    "own numpy": lambda self, x: x * self.numpy.random(),
    "RandomState": lambda self, x: x * _legacy.standard_normal(),
    "numpy generator": lambda self, x: x * _modern.standard_normal(),
    "gauss": lambda self, x: x * SHARED.gauss(0, 1),
    "method of an object": lambda self, x: x * _holder.method(),
    "function in an object": lambda self, x: x * _holder.itself.function(),
    "table in an object": lambda self, x: x * _holder.functions["a"][0](),
    "table": lambda self, x: x * _table["a"][0](),
    "object of its own": lambda self, x: x * self.holder.method(),
    "defaults": lambda self, x: _by_default(x),
    "import": lambda self, x: _imports_within(x),
    "property": lambda self, x: x * self.share,
    "base class": lambda self, x: x * self.overridden(),
}


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_no_generator_moves(draw, bound):
    class Base(nn.Module):
        def overridden(self):
            return random.random()

    class Draws(Base):
        def __init__(self):
            super().__init__()
            self.conv, self.draw, self.holder = nn.Conv2d(3, 3, 3), draw, _holder
            self.generator, self.random = torch.Generator(), random.Random(0)
            self.numpy = np.random.default_rng(0)

        @property
        def share(self):
            return random.random()

        def overridden(self):
            return super().overridden()

        def forward(self, x):
            return self.draw(self, self.conv(x))

    model = nn.Sequential(Draws(), nn.Conv2d(3, 3, 3), nn.ReLU())
    if bound:  # on the instance
        model[0].forward = MethodType(lambda self, x: draw(self, x), model[0])

    def states():
        generators = (torch.default_generator, GENERATOR, model[0].generator)
        return (
            [generator.get_state().tolist() for generator in generators],
            [random.getstate(), SHARED.getstate(), model[0].random.getstate()],
            str((np.random.get_state(), model[0].numpy.bit_generator.state, _modern.bit_generator.state, _legacy.get_state())),
        )

    before = states()
    convert(model, where="everywhere")
    conversion_report(model)
    assert states() == before and model[1].placement == "input"
