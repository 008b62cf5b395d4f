# SPDX-License-Identifier: Apache-2.0
"""What a backend is, the ordered list of them, and how one is chosen."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import importance, loading, reference
from ..arguments import shown
from ..problem import ConvProblem
from ..reference import PrunedGradient

if TYPE_CHECKING:
    from ..settings import Pruning

logger = logging.getLogger("sparsebwd")


class BackwardResult(NamedTuple):
    """Gradients of one convolution; None where they were not asked for.

    density is that of the gradient which both convolutions consumed; sigma is that of the gradient
    that was pruned, and tau the threshold at which it was. All three are numbers, as 0-dim tensors
    where they are known to the device alone, or None where not computed.
    implementation names what ran, for instance "dense" where a backend fell back to it.
    """

    grad_input: Tensor | None
    grad_weight: Tensor | None
    tau: Tensor | float | None
    sigma: Tensor | float | None
    density: Tensor | float | None
    implementation: str


@dataclass(frozen=True)
class LayerStats:
    """What one backward pass of one layer did; handed to every callable in :data:`observers`.

    layer_id: ``SparseConv2d.layer_id``, 0 for a call of the functional form.
    density, sigma, tau: 0-dim float32 tensors on the gradient's device (reading them may wait for
    the device); sigma and tau are None where nothing was pruned. sigma is that of this very gradient
    and tau the threshold used, also where the latter was predicted from earlier gradients.
    numel: elements of grad_output. seconds: host time of the call.
    """

    layer_id: int
    backend: str
    implementation: str
    problem: ConvProblem
    pruning: Pruning
    density: Tensor
    sigma: Tensor | None
    tau: Tensor | None
    numel: int
    seconds: float


observers: list[Callable[[LayerStats], None]] = globals().get("observers", [])  # kept where this module is reloaded
"""Called after each backward pass. Nothing is measured while it is empty."""


class Backend(ABC):
    """One implementation of pruning, AGB and WGC.

    The tensors it is given are contiguous or channels_last; what it returns may be in either
    format and is converted by the caller where needed.
    """

    name: str

    only_by_name: str | None = None
    """Why "auto" passes it over, None if it does not."""

    def available(self) -> str | None:
        """None if this backend runs on this machine at all, else the reason why not."""
        return None

    def for_auto(self) -> Backend:
        """What "auto" uses when it comes to this backend: itself, or a form of it that leaves to
        other implementations what they do faster. Then it logs, at debug level, what runs and why."""
        return self

    def why_not_faster(self, problem: ConvProblem, dtype: torch.dtype, channels_last: bool, pruning: Pruning) -> str | None:
        """Asked of what :meth:`for_auto` returns: None if a layer may gain by this backend on this machine, else why it
        cannot, whatever its gradients. channels_last: the layout of its tensors, else contiguous."""
        return f"the backend {self.name!r}, which is what runs {dtype} here, is not faster than PyTorch's convolutions"

    def break_even(self, problem: ConvProblem, dtype: torch.dtype, channels_last: bool) -> tuple[float, float]:
        """Densities up to which AGB and WGC are faster than dense ones, taken to take time in proportion to the density. 1:
        nothing is known."""
        return 1.0, 1.0

    @abstractmethod
    def can_run(self, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> str | None:
        """None if it can compute this, else the reason why not. Without a problem: prune."""

    def prune(
        self,
        grad: Tensor,
        key: Tensor,
        pruning: Pruning,
        sigma_history: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> PrunedGradient:
        """Prune ``grad`` (N, C, H, W) with the int64[2] ``key``, where ``pruning.prunes``. Here in plain
        PyTorch, on any device.

        sigma_history: predict the threshold from it, and record sigma of ``grad`` in it, as
        :func:`sparsebwd.reference.threshold` does.
        scales: float32 (N,), as :func:`sparsebwd.importance.scales` returns them: the threshold of each image is tau times
        that. None: it is tau.
        """
        return reference.prune(grad, key, pruning, sigma_history, scales)

    @abstractmethod
    def conv2d_input(self, problem: ConvProblem, weight: Tensor, grad_output: Tensor) -> Tensor:
        """AGB: the gradient (N, C, H, W) of the input."""

    @abstractmethod
    def conv2d_weight(self, problem: ConvProblem, input: Tensor, grad_output: Tensor) -> Tensor:
        """WGC: the gradient (K, C/groups, R, S) of the weight."""

    def gradients(
        self, problem: ConvProblem, grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of AGB and WGC that ``output_mask`` wants, None for the others."""
        grad_input = self.conv2d_input(problem, weight, grad_output) if output_mask[0] else None
        grad_weight = self.conv2d_weight(problem, input, grad_output) if output_mask[1] else None
        return grad_input, grad_weight

    def conv2d_backward(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        key: Tensor,
        pruning: Pruning,
        output_mask: Sequence[bool],
        sigma_history: Tensor | None = None,
        layer_id: int = 0,
    ) -> BackwardResult:
        """Prune, AGB and WGC; ``output_mask`` says whether the input's and the weight's gradient
        are wanted. layer_id: that of the layer, for backends that remember something of it; 0 if
        there is none. The rest is as in :meth:`prune`."""
        gradient, tau, sigma, density = grad_output, None, None, None
        if pruning.prunes_output:
            scales = importance.scales(input, pruning)
            gradient, tau, sigma, density = self.prune(grad_output, key, pruning, sigma_history, scales)
        grad_input, grad_weight = self.gradients(problem, gradient, input, weight, output_mask)
        if grad_input is not None and pruning.prunes_input:
            grad_input, tau, sigma, _ = self.prune(grad_input, key, pruning, sigma_history)
        return BackwardResult(grad_input, grad_weight, tau, sigma, density, self.name)

    def rows_backward(
        self,
        problem: ConvProblem,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        factors: Tensor,
        width: int,
        output_mask: Sequence[bool],
    ) -> BackwardResult | None:
        """AGB and WGC of ``grad_output`` with each row, ``width`` channels of a pixel, times its factor: float32
        (N, ceil(K / width), P, Q), 0 for rows that are dropped, and rounded to its dtype. None from a backend that has no way
        of its own to do that; then :meth:`conv2d_backward` is given the product."""
        return None


def refusal(operators, problem: ConvProblem) -> str | None:
    """Why the kernels behind these raw operators do not take the problem, None if they do: what they count could
    overflow."""
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    return operators.refusal(problem.input_size, problem.weight_size, *geometry) or None


def why_not_on_gpu(device_type: str, dtype: torch.dtype, accepted: str) -> str | None:
    """Why kernels of a GPU do not take operands on such a device, in such a dtype; None if they do. accepted: the type of their
    device."""
    if device_type != accepted:
        return f"the device is {device_type}, not {accepted}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} is not float32, bfloat16 or float16"
    return None


def empty(size: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of the dtype and on the device of ``like``."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


_backends: dict[str, Backend] = globals().get("_backends", {})

_choices: list[Any] = []


def until_choices_change(function: Callable) -> Callable:
    """``lru_cache`` for what follows from the backends there are and from the tables of break-even densities in force."""
    cached = lru_cache(maxsize=4096)(function)
    _choices.append(cached)
    return cached


generation = 0
"""How often choices were forgotten: what was found out before holds no longer where it has changed."""


def forget_choices() -> None:
    """Choose anew from now on."""
    global generation
    generation += 1
    for cached in _choices:
        cached.cache_clear()


def check_name(name: str) -> str:
    """Return ``name``. Raises TypeError if it is not a string."""
    if not isinstance(name, str):
        raise TypeError(f"backend: got {shown(name)}; accepted: the name of a backend, as a string")
    return name


def register(backend: Backend) -> None:
    """Add a backend at the end of the list, that is as the one "auto" prefers. Raises TypeError if it is none, ValueError
    if one has its name."""
    if not isinstance(backend, Backend):
        raise TypeError(f"backend: got {shown(backend)}; accepted: an instance of a class derived from Backend")
    check_name(backend.name)
    if backend.name in _backends:
        raise ValueError(f"backend: {backend.name!r} is registered already")
    _backends[backend.name] = backend
    forget_choices()


def registered_backends() -> tuple[str, ...]:
    """Names of all backends, in the order of preference, the last first choice of "auto"."""
    return tuple(_backends)


def available_backends() -> tuple[str, ...]:
    """Names of those that run on this machine, in the same order."""
    return tuple(name for name, backend in _backends.items() if backend.available() is None)


def get_backend(name: str) -> Backend:
    """The backend of that name, available or not. Raises ValueError for an unknown name, TypeError for what is no name."""
    check_name(name)
    if name not in _backends:
        accepted = ", ".join(repr(known) for known in ("auto", *_backends))
        raise ValueError(f"backend: got {shown(name)}; accepted: {accepted}")
    return _backends[name]


@until_choices_change
def choose_backend(name: str, problem: ConvProblem | None, device_type: str, dtype: torch.dtype) -> Backend:
    """The backend called ``name``, or for "auto" the last in the list that can run.

    Raises ValueError for an unknown name, RuntimeError with the reasons if it, or for "auto" every backend, cannot run.
    Refusals on the way are logged at debug level.
    """
    candidates = reversed(_backends.values()) if name == "auto" else [get_backend(name)]
    what = f"{problem or 'pruning'} in {dtype} on {device_type}"
    refusals = []
    for backend in candidates:
        reason = backend.available() or backend.can_run(problem, device_type, dtype)
        if name == "auto":
            reason = reason or backend.only_by_name
        if reason is None:
            return backend.for_auto() if name == "auto" else backend
        logger.debug("%s: backend %r refuses: %s", what, backend.name, reason)
        refusals.append(f"{backend.name!r}: {reason}")
    raise RuntimeError(f"backend: {name!r} cannot run {what} ({'; '.join(refusals)})")


def why_not_faster(
    pruning: Pruning, problem: ConvProblem, device_type: str, dtype: torch.dtype, channels_last: bool
) -> str | None:
    """Why a layer stays dense and unpruned where its ``pruning.where`` is "faster"; None if it does not: it may gain by
    the backend that "auto" chooses, or another one is named. Raises as :func:`choose_backend` does."""
    if pruning.where != "faster" or pruning.backend != "auto":
        return None
    if pruning.granularity in ("sample", "channel") and pruning.active:
        return None  # smaller dense convolutions
    chosen = choose_backend(pruning.backend, problem, device_type, dtype)
    return chosen.why_not_faster(problem, dtype, channels_last, pruning)


def _log_as_environment_says() -> None:
    level = os.environ.get("SPARSEBWD_LOG")
    if not level:
        return
    if level.lower() not in ("debug", "info", "warning", "error"):
        text = f"SPARSEBWD_LOG: got {level!r}; accepted: debug, info, warning, error"
        raise SystemExit(f"error: {text}") if loading.A_COMMAND else ValueError(text)
    logger.setLevel(level.upper())
    if any(handler.get_name() == logger.name for handler in logger.handlers):
        return  # that of an earlier import
    handler = logging.StreamHandler()
    handler.set_name(logger.name)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)


_log_as_environment_says()
