# SPDX-License-Identifier: Apache-2.0
"""NoiseController: gives layers the thresholds at which the noise of the whole network is what was asked for."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import as_int, check_flag, shown
from ..nn import SparseConv2d
from ..settings import Pruning
from . import allocate
from .guard import LossGuard
from .measure import Measured, Measurement, images_of, this_process
from .state import check as check_state

log = logging.getLogger("sparsebwd")

# Noise of a network, as a fraction of that of minibatches, that layers with a threshold of their own may add.
_MOST = 1.0
# Looks in one measurement, at most; fewer where noise is as near to the budget as this.
_LOOKS = 5
_CLOSE = 1.15
# Of the ratios that fit the noise of a dense pass.
_FIRST = 0.65
BATCHES = 4
"""The variance that two halves of one batch have, and the thresholds that follow, differ from batch to batch by 40 % and more. So
the first measurement is of this many batches."""
# Later ones move thresholds by this part of the way, in the logarithm; unless noise is further from the budget than chance
# explains: then training has changed, and it begins anew.
_LEAST_PART = 1 / 3
_CHANCE = 2.0
# Where there is a budget: how many times it noise has to be for the network to become dense.
_RUNAWAY = 5.0


class NoiseController:
    """Keeps what pruning adds to the noise of a training run at what ``noise=`` says, and lets no run collapse.

    A training loop changes by one line:

        >>> import torch
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import sparsebwd
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        >>> images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
        >>> _ = network(images)
        >>> model = sparsebwd.convert(network, noise=0.1, where="everywhere")
        >>> optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = sparsebwd.NoiseController(model, lambda images, labels: F.cross_entropy(model(images), labels))
        >>> for step in range(22):
        ...     optimiser.zero_grad()
        ...     controller(images, labels).backward()  # in the place of the loss
        ...     optimiser.step()
        >>> print(controller)
        noise ... % of SGD's (budget 10 %), density ..., backward ...x (expected)

    Now and then, on a batch of the training itself, it measures the variance that weight gradients have between minibatches,
    and what pruning adds to it as a function of the threshold of each layer (:mod:`sparsebwd.noise.measure`); it sets the
    thresholds, as tau / sigma, so that what is added to the weight gradients of all layers together is the budget, and that the
    backward pass takes the least time. Thresholds are means over batches, as one says little: the first measurement is of four
    batches in a row. Training starts dense. Parameters, their gradients, buffers and the generators of the
    process (PyTorch's, NumPy's, Python's) are left as they are; a measurement takes as long as 2 to 2.5 steps, dense ones, and no more memory.

    The guard makes the network dense where the loss, or the measured noise, runs away, says so once in the log, and comes back
    later. It also works for layers with a percentile, density or variance, whose thresholds stay as they are: those with most noise
    for the time they save become dense while noise is above 1, that of the minibatches themselves.

    With several processes each measures on its part of the batch, and all get the same thresholds. The model may be compiled,
    nothing is compiled again when thresholds change. On a GPU the host waits in measurements, not in other steps.

    Args:
        model: a module with SparseConv2d layers, or one that holds it, as DistributedDataParallel does.
        loss: takes a batch, or a part of one, and returns the loss that is trained on, a mean (or a sum) over its images.
        start: steps before the first measurement. The next are as many steps later as there were before, at most ``every``.
        every: steps between measurements.
        guard: whether to look after the run.
        seed: of what is random in measurements.

    Attributes:
        budget: what ``noise=`` of the layers says, or None where none has it.
        noise: in the whole network, as the last measurements had it, each at the thresholds that it left; None before.
        density: of the gradients, weighted by multiply-adds, and
        speedup: of the backward passes of the convolutions, dense time / sparse time, both as expected at the thresholds set last,
            by the break-even densities; None before.
        seconds: host time spent on measurements.

    Raises:
        TypeError: ``model`` or ``loss`` is of another type.
        ValueError: there is no sparse layer, layers differ in ``noise``, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        start: int = 20,
        every: int = 500,
        guard: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; accepted: an nn.Module")
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}; accepted: a function of a batch that returns its loss")
        self._model, self._loss = model, loss
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseConv2d)}
        if not self._layers:
            raise ValueError("model: has no SparseConv2d layer; call sparsebwd.convert(model, noise=...) first")
        budgets = {layer.noise for layer in self._layers.values()} - {None}
        if len(budgets) > 1:
            raise ValueError(f"noise: got layers with {', '.join(map(str, sorted(budgets)))}; accepted: one for the whole network")
        self.budget = budgets.pop() if budgets else None
        self._start, self._every = as_int(start, "start", least=1), as_int(every, "every", least=1)
        self._guard = LossGuard() if check_flag(guard, "guard") else None
        self._seed = as_int(seed, "seed")
        self.noise: float | None = None
        self.density: float | None = None
        self.speedup: float | None = None
        self.seconds = 0.0
        self._step, self._next = 0, self._start
        self._ratios = {name: 0.0 for name, layer in self._layers.items() if layer.noise is not None}
        # Layers with a threshold of their own that are dense now, and what they had.
        self._off: dict[str, Pruning] = {}
        self._rests, self._resting = 0, False
        self._known = 0  # batches that went into the ratios
        self._loaded = self._warned = False
        self._seen = self._states()

    def __call__(self, *batch: Any) -> Tensor:
        """The loss of the batch, as ``loss`` returns it: :meth:`step`, ``loss`` and :meth:`observe`."""
        self.step(*batch)
        loss = self._loss(*batch)
        self.observe(loss)
        return loss

    def step(self, *batch: Any) -> None:
        """Call it before each step; measures on this batch where it is time to."""
        if self._loaded:  # after the model, whose load_state_dict() makes its layers dense
            self._write()
            self._loaded = False
        elif self._forgotten():
            log.info("noise: the parameters were replaced, which makes layers dense: measuring again")
            self._forget()
            self._next = self._step
        if self._step >= self._next and self._may_measure(batch):
            start = time.perf_counter()
            self._measure(batch)
            self.seconds += time.perf_counter() - start
        self._step += 1

    def _states(self) -> list[tuple[int, int]]:
        """What changes where somebody else has written to the layers' ``sigma_history``; known without waiting for a device."""
        found = []
        for name in self._ratios:
            history = self._layers[name]._buffers.get("sigma_history")
            if history is None or not isinstance(self._layers[name], SparseConv2d):
                raise RuntimeError(f"noise: the layer {name!r} has no noise= any more; make a new NoiseController")
            found.append((id(history), history._version))
        return found

    def _forgotten(self) -> bool:
        """Whether layers have lost their ratios, as load_state_dict() of the model makes them."""
        states, before = self._states(), self._seen
        self._seen = states
        if states == before:
            return False
        return any(ratio and not self._layers[name].sigma_history[-1] for name, ratio in self._ratios.items())

    def _may_measure(self, batch: tuple) -> bool:
        """Whether there are two images, as may not be in the last batch of an epoch: else the next batch is as good."""
        if images_of(batch) > 1:
            return True
        if not self._warned:
            log.warning("noise: a batch of one image cannot be measured, which takes two halves: waiting for a larger one")
        self._warned = True
        return False

    def observe(self, loss: Tensor) -> None:
        """Call it after each step with its loss; for the guard."""
        if not isinstance(loss, Tensor) or loss.layout is not torch.strided or loss.numel() != 1:
            raise TypeError(f"loss: got {shown(loss)}; accepted: a tensor of one element")
        if self._guard is not None and self._guard.runs_away(loss.reshape(())) and not self._resting:
            self._rest("the loss has run away")

    @property
    def ratios(self) -> dict[str, float]:
        """tau / sigma of each layer with ``noise``, by name; 0: nothing is pruned."""
        return dict(self._ratios)

    def __str__(self) -> str:
        if self.noise is None:
            return f"noise not measured yet ({self._budget_text()})"
        text = f"noise {100 * self.noise:.2g} % of SGD's ({self._budget_text()})"
        return text + ("" if self.density is None else f", density {self.density:.2f}, backward {self.speedup:.1f}x (expected)")

    def _budget_text(self) -> str:
        return "thresholds are fixed" if self.budget is None else f"budget {100 * self.budget:.3g} %"

    def _measure(self, batch: tuple) -> None:
        for name, pruning in self._off.items():
            self._layers[name].pruning = pruning
        dense, found, settled = self._off, [], self._ratios
        seed = hash((self._seed, self._step, this_process())) % 2**31
        measurement = Measurement(self._model, list(self._layers.values()), self._loss, batch, seed)
        with measurement.opened() as measured:
            for look in range(_LOOKS):
                off = set(self._off)
                measurement.look({self._layers[name] for name in off})
                curves = {self._name_of(curve.layer): curve for curve in allocate.curves_of(measured.calls)}
                found.append(self._noise(curves, off, measured))
                self._share(curves, measured)
                # What is to prune again is looked at before it does; within a measurement layers only become dense then.
                self._look_after(curves, measured, off if look else set())
                self._write_ratios()
                if off == set(self._off) and (self.budget is None or _near(found[-1], self.budget, _CLOSE)):
                    break
        if self._resting:
            self._resting = False
            if self._guard is not None:
                self._guard.forget()
        self._next = self._step + min(self._every, max(self._start, self._step))
        if self._guard is not None and self.budget is not None and not found[-1] <= _RUNAWAY * self.budget:
            self.noise = found[-1]
            self._rest(f"noise is {100 * self.noise:.3g} % of that of minibatches, the budget {100 * self.budget:.3g} %")
            return
        if self.budget is None:
            self.noise = found[-1]
        else:
            if self._known == BATCHES and not _near(found[0], self.budget, _CHANCE):
                self._known = 0
            self._average(settled)
            noise = self._noise(curves, set(self._off), measured)
            self.noise = _mean(self.noise or 0.0, noise, self._part) if self._known > 1 else noise
        if self._off.keys() - dense.keys():
            log.warning(
                "noise: pruning adds %.3g %% of the noise of minibatches; dense until it is less: %s",
                100 * max(found),
                ", ".join(self._off),
            )
        self._write()  # as measuring leaves buffers as they were
        self._expect(curves, measured)
        if self._next > self._step + 1:
            log.info("step %d: %s", self._step, self)

    @property
    def _part(self) -> float:
        """What the batch that was measured last counts, in means over all."""
        return max(1 / self._known, _LEAST_PART)

    def _average(self, before: dict[str, float]) -> None:
        """Make the ratios, which fit one batch, means of what they were before and of that."""
        self._known = min(self._known + 1, BATCHES)
        if self._known < BATCHES:
            self._next = self._step + 1
        self._ratios = {name: _mean(before[name], ratio, self._part) for name, ratio in self._ratios.items()}

    def _forget(self) -> None:
        self._ratios, self._known = dict.fromkeys(self._ratios, 0.0), 0

    def _noise(self, curves: dict[str, allocate.Curves], off: set[str], measured: Measured) -> float:
        """Of this batch, by the last look at it."""
        total = sum(
            curve.at(self._ratios.get(name, curve.fixed))[0] for name, curve in curves.items() if name not in off
        )
        if not measured.variance > 0:
            return 0.0 if total == 0 else math.nan
        return total / measured.variance

    def _share(self, curves: dict[str, allocate.Curves], measured: Measured) -> None:
        """Set the ratios of layers with ``noise``."""
        if self.budget is None:
            return
        free = [name for name in self._ratios if name in curves]
        chosen = allocate.share([curves[name] for name in free], self.budget * measured.variance)
        # Curves hold at the noise that there was. It compounds: what is changed is changed by half.
        before, self._ratios = self._ratios, dict.fromkeys(self._ratios, 0.0)
        for name, ratio in zip(free, chosen):
            self._ratios[name] = math.sqrt(before[name] * ratio) if before[name] else _FIRST * ratio

    def _look_after(self, curves: dict[str, allocate.Curves], measured: Measured, stay: set[str]) -> None:
        """Choose those of the layers with a threshold of their own that become dense; those in ``stay`` are and remain so."""
        if self._guard is None:
            return
        fixed = [name for name in curves if name not in self._ratios and name not in stay]
        choices = [curves[name].or_dense() for name in fixed]
        kept = [choice.ratios[-1].item() for choice in choices]
        most = _MOST * measured.variance
        if not sum(choice.noise[-1].item() for choice in choices) <= most:
            kept = allocate.share(choices, most, stretch=False)
        off = stay.union(name for name, ratio in zip(fixed, kept) if ratio == 0)
        self._off = {name: layer.pruning for name, layer in self._layers.items() if name in off}

    def _rest(self, reason: str) -> None:
        """Make the network dense for a while, longer each time."""
        steps = min(self._every, self._start * 2 ** min(self._rests + 1, 64))
        log.warning("noise: %s: the network is dense for %d steps", reason, steps)
        self._rests, self._resting = self._rests + 1, True
        self._next = self._step + steps
        self._forget()
        self._off = {
            name: self._off.get(name, layer.pruning) for name, layer in self._layers.items() if name not in self._ratios
        }
        self._write()
        if self._guard is not None:
            self._guard.forget()

    def _expect(self, curves: dict[str, allocate.Curves], measured: Measured) -> None:
        """What the cost model says of the thresholds that are set now."""
        dense = time = allocate.dense_work(measured.calls)
        left = dense
        for name, curve in curves.items():
            ratio = 0.0 if name in self._off else self._ratios.get(name, curve.fixed)
            _, changed, remaining = curve.at(ratio)
            time += changed - curve.dense
            left += remaining - curve.dense
        self.density, self.speedup = left / dense, dense / time

    @torch.no_grad()
    def _write_ratios(self) -> None:
        for name, ratio in self._ratios.items():
            self._layers[name].sigma_history[-1:].view(torch.float32).fill_(ratio)
        self._seen = self._states()

    def _write(self) -> None:
        self._write_ratios()
        for name in self._off:
            self._layers[name].pruning = self._layers[name].pruning.unpruned

    def _name_of(self, layer: SparseConv2d) -> str:
        return next(name for name, known in self._layers.items() if known is layer)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on to the same bits: plain numbers, strings and None."""
        return {
            "step": self._step,
            "next": self._next,
            "ratios": dict(self._ratios),
            "off": {name: pruning.text for name, pruning in self._off.items()},
            "rests": self._rests,
            "known": self._known,
            "resting": self._resting,
            "noise": self.noise,
            "density": self.density,
            "speedup": self.speedup,
            "guard": None if self._guard is None else self._guard.state_dict(),
        }

    def check_state(self, state: Any) -> None:
        """Raise TypeError or ValueError, naming what is wrong, unless :meth:`load_state_dict` takes ``state``."""
        check_state(state, self.state_dict(), self._layers)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` of a controller of such a model has returned, before or after the model's own.

        Raises TypeError or ValueError where it is of other layers, or damaged; this one is then unchanged.
        """
        self.check_state(state)
        for name, pruning in self._off.items():
            self._layers[name].pruning = pruning
        self._step, self._next = state["step"], state["next"]
        self._ratios = {name: state["ratios"][name] for name in self._ratios}
        self._off = {name: Pruning.parse(text) for name, text in state["off"].items()}
        self._rests, self._resting, self._known = state["rests"], state["resting"], state["known"]
        self.noise, self.density, self.speedup = state["noise"], state["density"], state["speedup"]
        if self._guard is not None:
            self._guard.load_state_dict(state["guard"], next(self._model.parameters()).device)
        self._write()
        self._loaded = True


def _near(value: float, to: float, factor: float) -> bool:
    return to / factor < value < to * factor


def _mean(before: float, now: float, part: float) -> float:
    """In the logarithm. The new value where there was none, or where it has none: 0, infinite or no number."""
    known = all(0 < value < math.inf for value in (before, now))
    return before ** (1 - part) * now**part if known else now
