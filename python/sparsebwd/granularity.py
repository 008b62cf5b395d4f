# SPDX-License-Identifier: Apache-2.0
"""Pruning of groups of elements instead of single ones: rows of channels, images, channels.

A group B is kept with probability min(1, ||g_B|| / tau) and divided by it, else it is 0. So its expectation is g_B, and its
variance ||g_B|| (tau - ||g_B||): Algorithm 1 of Ye et al. (2019), and all that follows from it for thresholds, with the norms of
groups in the place of the magnitudes of elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import importance, reference
from .backends.base import Backend, BackwardResult, empty
from .problem import ConvProblem
from .reference import PrunedGradient
from .settings import Pruning


class _Factors(NamedTuple):
    """values: what each group is multiplied by, 0 for what is not kept; float32 (float64 for that) in the shape of the
    norms, see :func:`norms`. tau, sigma: as in :class:`PrunedGradient`, of the norms."""

    values: Tensor
    tau: Tensor
    sigma: Tensor


def norms(grad: Tensor, pruning: Pruning) -> Tensor:
    """The norms of the groups of a gradient (N, C, H, W), float32, summed in float64: (N, ceil(C / width), H, W) of rows,
    (N, 1, 1, 1) of samples, (1, C, 1, 1) of channels. Of the last row of a pixel there may be less than its width."""
    if pruning.granularity == "sample":
        return _norm(grad, (1, 2, 3), True)
    if pruning.granularity == "channel":
        return _norm(grad, (0, 2, 3), True)
    return _norm(as_rows(grad, pruning.granularity[1]), 2, False)


def _norm(grad: Tensor, dim: int | tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.linalg.vector_norm(grad, dim=dim, keepdim=keepdim, dtype=torch.float64).float()


def as_rows(grad: Tensor, width: int) -> Tensor:
    """(N, C, H, W) as (N, rows, width, H, W), with zeros for channels that there are not. A row has no more than all."""
    width = min(width, max(grad.shape[1], 1))
    missing = -grad.shape[1] % width
    padded = F.pad(grad, (0, 0, 0, 0, 0, missing)) if missing else grad
    return padded.unflatten(1, (padded.shape[1] // width, width))


def _factors(grad: Tensor, key: Tensor, pruning: Pruning, scales: Tensor | None = None) -> _Factors:
    found = norms(grad, pruning)
    sigma, tau = reference.find_threshold(found, pruning, scales=scales)
    at = tau if scales is None else reference.thresholds_of_images(tau, scales, found.dtype)
    kept = found > at * reference.uniform(tuple(found.shape), key)
    factor = torch.where(kept, at / found, 0.0)
    return _Factors(torch.where(found < at, factor, 1.0).to(_computed_in(grad)), tau, sigma)


def _computed_in(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _scaled(grad: Tensor, factors: Tensor) -> Tensor:
    """``grad`` times factors that broadcast, rounded to its dtype; what is not kept is 0 even where it is not finite."""
    return torch.where(factors == 0, 0.0, grad * factors).to(grad.dtype)


def prune(grad: Tensor, key: Tensor, pruning: Pruning, scales: Tensor | None = None) -> PrunedGradient:
    """Prune the groups of a gradient (N, C, H, W) of any floating dtype. tau and sigma are those of the norms, the density
    is that of the elements. The random number of a group is that of an element at its place among the norms. scales: as in
    :func:`sparsebwd.reference.prune`; not of channels."""
    return _multiply(grad, _factors(grad, key, pruning, scales), pruning)


def _multiply(grad: Tensor, factors: _Factors, pruning: Pruning) -> PrunedGradient:
    of_elements = factors.values
    if isinstance(pruning.granularity, tuple):
        width = min(pruning.granularity[1], max(grad.shape[1], 1))
        of_elements = of_elements.repeat_interleave(width, 1)[:, : grad.shape[1]]
    values = _scaled(grad, of_elements).contiguous(memory_format=reference.memory_format(grad))
    return PrunedGradient(values, factors.tau, factors.sigma, reference.density(values))


def conv2d_backward(
    backend: Backend,
    problem: ConvProblem,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    key: Tensor,
    pruning: Pruning,
    output_mask: Sequence[bool],
    layer_id: int = 0,
) -> BackwardResult:
    """As :meth:`Backend.conv2d_backward`. Of samples, and of channels where there are no groups, the survivors are
    gathered and ``backend`` convolves these; the host waits for their number. Of rows it is told which to take, if it has kernels
    for them. Else it skips the zeros."""

    def convolve(problem: ConvProblem, *operands: Tensor) -> BackwardResult:
        return backend.conv2d_backward(problem, *operands, key, pruning.unpruned, output_mask, layer_id=layer_id)

    if pruning.placement == "input":
        result = convolve(problem, grad_output, input, weight)
        if result.grad_input is None:
            return result
        values, tau, sigma, _ = prune(result.grad_input, key, pruning)
        return result._replace(grad_input=values, tau=tau, sigma=sigma)
    found = _factors(grad_output, key, pruning, importance.scales(input, pruning))
    factors, tau, sigma = found
    if isinstance(pruning.granularity, tuple):
        result = backend.rows_backward(problem, grad_output, input, weight, factors, pruning.granularity[1], output_mask)
        if result is not None:
            return result._replace(tau=tau, sigma=sigma)
    if isinstance(pruning.granularity, tuple) or (pruning.granularity == "channel" and problem.groups > 1):
        values, tau, sigma, density = _multiply(grad_output, found, pruning)
        return convolve(problem, values, input, weight)._replace(tau=tau, sigma=sigma, density=density)

    dim = 0 if pruning.granularity == "sample" else 1
    kept = factors.flatten().nonzero().flatten()
    gathered = _scaled(grad_output.index_select(dim, kept), factors.index_select(dim, kept))
    if len(kept) == 0:
        grads, name = (_zeros(input), _zeros(weight)), backend.name
    else:
        # Which side of the convolution is smaller: images of input and its gradient, or filters and theirs.
        if dim == 0:
            smaller = replace(problem, n=len(kept))
            small_input, small_weight = input.index_select(0, kept), weight
        else:
            smaller = replace(problem, k=len(kept))
            small_input, small_weight = input, weight.index_select(0, kept)
        formats = [reference.memory_format(tensor) for tensor in (grad_output, input, weight)]
        small = [
            tensor.contiguous(memory_format=layout)
            for tensor, layout in zip((gathered, small_input, small_weight), formats)
        ]
        result = convolve(smaller, *small)
        grads, name = [result.grad_input, result.grad_weight], result.implementation
        if grads[dim] is not None:
            grads[dim] = _zeros((input, weight)[dim]).index_copy_(0, kept, grads[dim])
    density = torch.count_nonzero(gathered).double() / max(grad_output.numel(), 1)
    wanted = (grad if want else None for grad, want in zip(grads, output_mask))
    return BackwardResult(*wanted, tau, sigma, density.float(), f"gather+{name}")


def _zeros(like: Tensor) -> Tensor:
    return empty(like.shape, like, reference.memory_format(like)).zero_()
