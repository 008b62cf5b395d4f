# SPDX-License-Identifier: Apache-2.0
"""DensityMonitor: what the backward passes of a model's sparse convolutions did."""

from __future__ import annotations

import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .backends.base import LayerStats, observers
from .nn import SparseConv2d


@dataclass
class _Tally:
    """Sums over the backward passes of one layer, or of all.

    density, sigma and tau are sums weighted by elements of grad_output. They stay 0-dim tensors on the device until
    they are read, so that recording a GPU's statistics does not wait for it.
    """

    steps: int = 0
    seconds: float = 0.0
    consumed: int = 0  # elements of the gradients whose density is known
    pruned: int = 0  # elements of the gradients that came with a sigma and a tau
    density: Tensor | float = 0.0
    sigma: Tensor | float = 0.0
    tau: Tensor | float = 0.0
    implementations: Counter[str] = field(default_factory=Counter)

    def add(self, stats: LayerStats) -> None:
        self.steps += 1
        self.seconds += stats.seconds
        self.implementations[stats.implementation] += 1
        if stats.density is not None:
            self.consumed += stats.numel
            self.density = self.density + stats.density.double() * stats.numel
        if stats.sigma is not None and stats.tau is not None:
            self.pruned += stats.numel
            self.sigma = self.sigma + stats.sigma.double() * stats.numel
            self.tau = self.tau + stats.tau.double() * stats.numel

    def merge(self, other: _Tally) -> None:
        self.steps = max(self.steps, other.steps)
        for name in ("seconds", "consumed", "pruned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("density", "sigma", "tau"):  # layers may lie on different devices
            setattr(self, name, float(getattr(self, name)) + float(getattr(other, name)))
        self.implementations.update(other.implementations)

    def as_dict(self) -> dict[str, Any]:
        return {
            "density": float(self.density) / self.consumed if self.consumed else None,
            "sigma": float(self.sigma) / self.pruned if self.pruned else None,
            "tau": float(self.tau) / self.pruned if self.pruned else None,
            "seconds": self.seconds,
            "steps": self.steps,
            "implementations": dict(self.implementations),
        }


class DensityMonitor:
    """Records what each :class:`sparsebwd.SparseConv2d` of a model does in backward, while active.

    ::

        with sparsebwd.DensityMonitor(model) as monitor:
            loss_function(model(x), y).backward()
        print(monitor)

    Works for compiled models and for models in DistributedDataParallel. Several monitors may be active at once; none
    costs anything outside its ``with`` block. Recording goes on where it stopped if the block is entered again.

    Args:
        model: a module that is or holds SparseConv2d layers, see :func:`sparsebwd.convert`.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``model`` has no SparseConv2d.

    Examples:
        >>> import torch, sparsebwd
        >>> model = sparsebwd.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3)), where="everywhere")
        >>> with sparsebwd.DensityMonitor(model) as monitor:
        ...     model(torch.randn(4, 3, 16, 16)).square().mean().backward()
        >>> monitor.as_dict()["total"]["steps"]
        1
        >>> 0.3 < monitor.as_dict()["layers"]["0"]["density"] < 0.8
        True
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; accepted: an nn.Module")
        self._names = {
            module.layer_id: name or type(module).__name__
            for name, module in model.named_modules()
            if isinstance(module, SparseConv2d)
        }
        if not self._names:
            raise ValueError("model: has no SparseConv2d layer to monitor; call sparsebwd.convert(model) first")
        self._lock = threading.Lock()  # backward runs in one thread for each device
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        with self._lock:
            self._tallies = {layer_id: _Tally() for layer_id in self._names}

    def __enter__(self) -> DensityMonitor:
        if self._record in observers:
            raise RuntimeError("this DensityMonitor is active already")
        observers.append(self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._record not in observers:
            raise RuntimeError("this DensityMonitor is not active")
        observers.remove(self._record)

    def _record(self, stats: LayerStats) -> None:
        if stats.layer_id in self._names:
            with self._lock:
                self._tallies[stats.layer_id].add(stats)

    def as_dict(self) -> dict[str, Any]:
        """``{"layers": {name: {...}}, "total": {...}}``, of plain numbers and strings.

        For each layer, in the order of the model, and in total:
            density: non-zeros / elements of the gradient that AGB and WGC consumed, over all steps.
            sigma, tau: estimated standard deviation of the gradient that was pruned, and the threshold used, which
                does not belong to that sigma where it was predicted; means over all steps.
            seconds: host time in backward, summed.
            steps: number of backward passes; in total, that of the layer with the most.
            implementations: {name of what ran: number of backward passes}.
        The means are weighted by elements; density, sigma and tau are None where nothing was recorded.
        """
        total = _Tally()
        layers = {}
        with self._lock:
            for layer_id, name in self._names.items():
                tally = self._tallies[layer_id]
                layers[name] = tally.as_dict()
                total.merge(tally)
        return {"layers": layers, "total": total.as_dict()}

    def add_scalars(self, writer: Any, step: int) -> None:
        """Write density, sigma, tau and time to TensorBoard.

        Tags are ``density/<layer>``, ``sigma/<layer>``, ``tau/<layer>`` and ``backward_ms/<layer>`` (mean over the
        recorded steps), with ``total`` as the layer for all of them together. Call :meth:`reset` afterwards to have
        each point cover only the steps since the last one.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
            step: the global step to write at.

        Raises:
            TypeError: ``writer`` has no ``add_scalar``.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"writer: got {type(writer).__name__}; accepted: a SummaryWriter, or what has its add_scalar")
        record = self.as_dict()
        for name, values in [*record["layers"].items(), ("total", record["total"])]:
            for quantity in ("density", "sigma", "tau"):
                if values[quantity] is not None:
                    writer.add_scalar(f"{quantity}/{name}", values[quantity], step)
            if values["steps"]:
                writer.add_scalar(f"backward_ms/{name}", 1e3 * values["seconds"] / values["steps"], step)

    def table(self) -> str:
        """The record as a plain-text table, of 80 columns if the names of layers allow that."""
        console, table = Console(file=io.StringIO(), width=80, color_system=None), self.__rich__()
        console.width = max(80, console.measure(table, options=console.options.update(max_width=10_000)).minimum)
        console.print(table)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    __str__ = table

    def __rich__(self) -> Table:
        record = self.as_dict()
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for column in ("layer", "density", "sigma", "tau", "ms/step", "steps", "implementation"):
            justify = "left" if column in ("layer", "implementation") else "right"
            table.add_column(column, justify=justify, no_wrap=column != "implementation")
        for name, values in record["layers"].items():
            table.add_row(name, *_cells(values))
        table.add_section()
        table.add_row("total", *_cells(record["total"]))
        return table


def _cells(values: dict[str, Any]) -> list[str]:
    steps, counts = values["steps"], values["implementations"]
    return [
        *("-" if values[name] is None else f"{values[name]:{form}}" for name, form in _FORMATS.items()),
        f"{1e3 * values['seconds'] / steps:.2f}" if steps else "-",
        str(steps),
        ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in counts.items()) or "-",
    ]


_FORMATS = {"density": ".3f", "sigma": ".2g", "tau": ".2g"}
