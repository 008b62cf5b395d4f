# SPDX-License-Identifier: Apache-2.0
"""A run for TensorBoard: scalars, and histograms of the gradients that convolutions are given, with tau marked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..monitor import DensityMonitor
from ..nn import SparseConv2d

FOLDER = "tensorboard"

_VALUES = 2**16  # of a gradient, at most, spread over it
_TAUS = 5  # in a histogram, on each side
_BINS = np.linspace(-_TAUS, _TAUS, 20 * _TAUS + 1)  # -1 and 1 are edges


def require_tensorboard() -> None:
    """Raises ValueError where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard: it needs {error.name or 'the package tensorboard'}, which is not installed; pip install "
            "tensorboard, or leave the option out"
        ) from error


class Gradients:
    """What the sparse convolutions of a model are given in a backward pass, before it is pruned, thinned out.

    samples: for each layer, values of its latest gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self.samples: dict[str, Tensor] = {}
        self._layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseConv2d)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Forward and backward passes are watched within."""
        # Hooks of tensors, not of modules: rectifiers behind a convolution may work in place.
        hooks = [module.register_forward_hook(partial(self._forward, name)) for name, module in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _forward(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Tensor) -> None:
        values = gradient.detach().reshape(-1)
        self.samples[name] = values[:: -(-len(values) // _VALUES)].float()


class Board:
    """Writes a run into `FOLDER` below `folder`, in a folder for each of `variants`, which TensorBoard shows together.

    step: that from which the run goes on; what was written of later ones is not shown any more.
    """

    def __init__(self, folder: Path, variants: list[str], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writers = {
            name: SummaryWriter(str(folder / FOLDER / name), purge_step=step + 1 if step else 0) for name in variants
        }

    def scalars(self, variant: str, step: int, **values: float | None) -> None:
        """Those that are not None."""
        for name, value in values.items():
            if value is not None:
                self._writers[variant].add_scalar(name, value, step)

    def layers(self, variant: str, step: int, monitor: DensityMonitor) -> None:
        """Density, sigma, tau and time of each layer."""
        monitor.add_scalars(self._writers[variant], step)

    def gradients(self, variant: str, step: int, gradients: Gradients, monitor: DensityMonitor) -> None:
        """Histograms in units of the threshold, which is at -1 and 1, up to 5; without one in their own."""
        record = monitor.as_dict()["layers"]
        for name, values in gradients.samples.items():
            if not bool(torch.isfinite(values).all()):
                continue
            tau = record[name]["tau"]
            if tau:
                values = (values / tau).clamp(-_TAUS, _TAUS)
                self._writers[variant].add_histogram(f"gradient_in_tau/{name}", values.cpu().numpy(), step, bins=_BINS)
            else:
                self._writers[variant].add_histogram(f"gradient/{name}", values.cpu().numpy(), step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
