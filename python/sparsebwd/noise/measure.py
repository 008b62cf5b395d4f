# SPDX-License-Identifier: Apache-2.0
"""What pruning adds to the noise of the weight gradients, layer by layer, as a function of the threshold.

Pruning replaces the gradient g of a layer by g + e, where e has the expectation 0 and is independent between elements (or
groups of them) and, given what reached the layer, of all that was drawn before. The weight gradients dW of this layer and of
all that backward reaches later are linear in g. So the noise in all of them is the sum over the layers of

    E||dW(g + e) - dW(g)||^2 = sum over i of Var(e_i) ||d dW / d g_i||^2,   Var(e_i) = |g_i| (tau - |g_i|) below tau,

with the gradient g that reached the layer, noise of the layers before it included: that is how noise compounds. With u a
vector of random signs, one for each weight, ||d dW / d g_i||^2 = E_u <u, d dW / d g_i>^2, and <u, d dW / d g_i> is the
derivative of output i of the layer when all weights move along u. So one more forward pass, with weights moved a little, says
for each element of each layer's gradient how much of its noise arrives in all weight gradients together; and noise for all
thresholds follows from one backward pass. docs/numerics.md has the proof.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel

from .. import granularity, histogram, importance, reference
from ..backends import choose_backend, why_not_faster
from ..nn import SparseConv2d
from ..problem import ConvProblem
from ..randomness import generators_kept

RATIOS = torch.cat([torch.zeros(1), torch.logspace(math.log10(0.2), math.log10(16), 128)]).double()
"""tau / sigma at which curves are known; 0: not pruned."""

SAMPLES = 32749
"""Elements of a gradient that its curve is computed from, at most."""

# Of the typical weight: how far weights move. Rounding is below a thousandth of what that changes in float32, and of the size
# of it in half precision.
_MOVE = 2.0**-9
_MOVE_HALF = 2.0**-5


@dataclass
class Call:
    """One use of a layer in a forward pass, and what was measured of it.

    noise, density: float64[len(RATIOS)], what pruning at each ratio adds to the squared error of all weight gradients
        together, and the fraction of the gradient that is left. None where this layer does not prune.
    ratio: tau / sigma, float64, at which it pruned.
    scales: what thresholds of images are tau times, as :func:`sparsebwd.importance.scales` says it; None: all have tau.
    natural: fraction of the gradient of the output that is not zero where nothing is pruned.
    """

    layer: SparseConv2d
    problem: ConvProblem
    dtype: torch.dtype
    channels_last: bool
    needs_grad_input: bool
    prunes: bool
    moved: Tensor | None = None
    place: GradientEdge | None = None
    slope: Tensor | None = None
    scales: Tensor | None = None
    natural: float = 1.0
    noise: Tensor | None = None
    density: Tensor | None = None
    ratio: Tensor | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """Densities up to which the sparse AGB and WGC are faster than dense ones."""
        pruning = self.layer.pruning
        if pruning.granularity in ("sample", "channel"):
            return 1.0, 1.0
        device_type = self.layer.weight.device.type
        backend = choose_backend(pruning.backend, self.problem, device_type, self.dtype)
        return backend.break_even(self.problem, self.dtype, self.channels_last)


@dataclass
class Measured:
    """variance: of the weight gradients between minibatches, on the scale of the noise of the calls. calls: in the order of
    the forward pass."""

    variance: float
    calls: list[Call] = field(default_factory=list)


class Measurement:
    """A look at one batch, with the layers as they are; training goes on afterwards as if there had been none.

    Args:
        model: what the loss is computed with: see :func:`weights_of`.
        layers: the sparse ones, whose pruning is measured.
        loss: of a part of a batch, a mean or a sum over its images.
        batch: arguments of ``loss``; the tensors among them are cut in half along their first dimension.
        seed: of all that is random here.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[SparseConv2d], loss: Callable[..., Tensor], batch: Sequence, seed: int
    ) -> None:
        self._model, self._layers, self._loss, self._seed = model, layers, loss, seed
        self._weights = weights_of(model)
        self._parts = _halves(batch)
        self._calls: list[Call] = []
        self._place = 0
        self._phase = ""

    @contextmanager
    def opened(self) -> Iterator[Measured]:
        """Yields the variance; :meth:`look` then fills in the curves of the calls, as often as it is called."""
        self._python, self._numpy = random.getstate(), numpy.random.get_state()
        with ExitStack() as stack:
            stack.enter_context(_undisturbed(self._model, self._layers))
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(handle.remove)
                handle = layer.register_forward_hook(self._after, with_kwargs=True)
                stack.callback(handle.remove)
            first, second = self._parts
            self._forward_moved(first)
            loss = self._forward(first, "first")
            gradients = self._backward(loss)
            other = self._forward(second, "second")
            variance = sum(
                torch.linalg.vector_norm(one - two, dtype=torch.float64).square()
                for one, two in zip(gradients, torch.autograd.grad(other, self._weights, allow_unused=True))
                if one is not None and two is not None
            )
            del gradients
            self._first_loss = loss
            # Half of the batch was looked at: the other half adds as much again.
            yield Measured(_over_processes(variance / 2).item(), self._calls)
            del self._first_loss
            for call in self._calls:
                call.moved = call.place = call.slope = call.scales = None

    def look(self, off: Collection[SparseConv2d] = ()) -> None:
        """Backward with gradients pruned as the layers have it now, but for those in ``off``; sets ``noise``, ``density`` and
        ``ratio`` of all calls."""
        self._phase, self._off = "pruned", off
        torch.manual_seed(self._seed + 1)
        places = [call.place for call in self._calls if call.place is not None]
        for call in self._calls:
            call.noise = call.density = None
        if places:  # not of the weights, so that no WGC runs
            torch.autograd.grad(self._first_loss, places, retain_graph=True, allow_unused=True)
        known = [call for call in self._calls if call.noise is not None]
        if known:
            curves = [torch.cat([call.noise, call.density, call.ratio.double()[None]]) for call in known]
            for call, curve in zip(known, _over_processes(torch.stack(curves)).cpu()):
                call.noise, call.density = curve[: len(RATIOS)], curve[len(RATIOS) : -1] / _processes()
                call.ratio = curve[-1] / _processes()

    def _forward_moved(self, part: Sequence) -> None:
        """Forward with all weights moved along random signs; keeps what the layers then get or return."""
        self._phase = "moved"
        generator = torch.Generator(self._weights[0].device).manual_seed(self._seed)
        sizes = torch.stack([weight.detach().float().square().mean().sqrt() for weight in self._weights])
        half = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")) or self._weights[0].dtype != torch.float32
        self._move = (_MOVE_HALF if half else _MOVE) * sizes.median()
        before = [weight.detach().clone() for weight in self._weights]
        try:
            with torch.no_grad():
                for weight in self._weights:
                    signs = torch.empty_like(weight).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
                    weight.add_(signs * self._move.to(weight))
                self._drawn(part)
        finally:
            with torch.no_grad():
                for weight, values in zip(self._weights, before):
                    weight.copy_(values)

    def _drawn(self, part: Sequence) -> Tensor:
        """The loss, for which each time the same is drawn."""
        torch.manual_seed(self._seed)
        # Where nobody draws, not even another thread, this changes nothing.
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        return self._loss(*part)

    def _forward(self, part: Sequence, phase: str) -> Tensor:
        self._phase, self._place = phase, 0
        with torch.enable_grad():
            loss = self._drawn(part)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(f"loss: returned {_kind(loss)}; accepted: a tensor of one element that depends on the weights")
        return loss.squeeze()

    def _backward(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        self._phase = "dense"
        return torch.autograd.grad(loss, self._weights, retain_graph=True, allow_unused=True)

    def _before(self, layer: SparseConv2d, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        input = _input_of(args, kwargs)
        if input is None or layer.pruning.placement != "input":
            return None
        if self._phase == "moved":
            self._calls.append(_call_of(layer, input))
            self._calls[-1].moved = _looked_at(input, self._calls[-1])
        elif self._phase == "first" and input.requires_grad:
            # A gradient of this layer's alone, whatever else takes the same input.
            place = input.view_as(input)
            self._watch(self._calls[self._place], place)
            return ((place, *args[1:]), kwargs) if args else (args, {**kwargs, "input": place})
        return None

    def _after(self, layer: SparseConv2d, args: tuple, kwargs: dict, output: Tensor) -> None:
        input = _input_of(args, kwargs)
        if input is None or not isinstance(output, Tensor):
            return
        prunes_output = layer.pruning.placement == "output"
        if self._phase == "moved" and prunes_output:
            self._calls.append(_call_of(layer, input))
            self._calls[-1].moved = _looked_at(output, self._calls[-1])
        elif self._phase == "first":
            call = self._calls[self._place]
            self._place += 1
            call.needs_grad_input = input.requires_grad
            images = input.detach() if input.dim() == 4 else input.detach().unsqueeze(0)
            call.scales = importance.scales(images, layer.pruning)
            if prunes_output:
                self._watch(call, output)
            if output.requires_grad:
                output.register_hook(lambda grad: self._count(call, grad))

    def _watch(self, call: Call, place: Tensor) -> None:
        """``place``: whose gradient the layer prunes."""
        if call.prunes and place.requires_grad:
            call.place = get_gradient_edge(place)  # of the tensor as it is now, which may change in place
            call.slope = (call.moved.float() - _looked_at(place.detach(), call).float()) / self._move.float()
            call.moved = None
            place.register_hook(lambda grad: self._prune(call, grad))

    def _count(self, call: Call, grad: Tensor) -> None:
        if self._phase == "dense":
            found = histogram.sample(grad) if grad.dim() == 4 else grad
            call.natural = torch.count_nonzero(found).item() / max(found.numel(), 1)

    def _prune(self, call: Call, grad: Tensor) -> Tensor | None:
        if self._phase != "pruned":
            return None
        whole = grad if grad.dim() == 4 else grad.unsqueeze(0)
        call.noise, call.density = _curves(call, whole)
        layer = call.layer
        state = layer.sigma_history.clone() if layer.pruning.state_size else None
        key = torch.empty(2, dtype=torch.int64, device=grad.device).random_()
        values, tau, sigma, _ = torch.ops.sparsebwd.prune(whole, key, layer.pruning.text, state, call.scales)
        call.ratio = torch.where(sigma > 0, tau / sigma, 0.0)
        return None if layer in self._off else values.view_as(grad)


def _input_of(args: tuple, kwargs: dict) -> Tensor | None:
    """What a layer is called with: layer(x), or layer(input=x)."""
    input = args[0] if args else kwargs.get("input")
    return input if isinstance(input, Tensor) else None


def _call_of(layer: SparseConv2d, input: Tensor) -> Call:
    n, (c, h, w) = (input.shape[0] if input.dim() == 4 else 1), input.shape[-3:]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        padding, (right, bottom) = (0, 0), layer._reversed_padding_repeated_twice[::2]
        h, w = h + 2 * bottom, w + 2 * right
    elif isinstance(padding, str):
        spans = (dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation))
        padding = (0, 0) if padding == "valid" else tuple(span // 2 for span in spans)
    sizes = (n, c, h, w, layer.out_channels, *layer.kernel_size)
    problem = ConvProblem(*sizes, layer.stride, padding, layer.dilation, layer.groups)
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    channels_last = input.is_contiguous(memory_format=torch.channels_last) if input.dim() == 4 else False
    prunes = layer.pruning.active and why_not_faster(layer.pruning, problem, kind, dtype, channels_last) is None
    return Call(layer, problem, dtype, channels_last, True, prunes)


def _looked_at(tensor: Tensor, call: Call) -> Tensor:
    """What is kept of an activation: a sample where elements are pruned, else all of it."""
    if not call.prunes:
        return tensor.new_empty(0)
    whole = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
    # A copy, as what follows may work in place.
    return histogram.sample(whole, SAMPLES).clone() if call.layer.granularity == "element" else whole.clone()


def _curves(call: Call, grad: Tensor) -> tuple[Tensor, Tensor]:
    """(noise, density) of pruning this gradient, at all RATIOS."""
    pruning = call.layer.pruning
    if pruning.granularity == "element":
        whole = grad
        sizes, shares = _elements(call, grad)
    else:
        whole = granularity.norms(grad, pruning)
        sizes, shares = _groups(call, grad, whole)
    measured = reference.looked_at(whole, pruning, call.scales)
    sigma = pruning.sigma_coefficient * measured.abs().sum(dtype=torch.float64) / max(measured.numel(), 1)
    ratios = RATIOS.to(grad.device)
    # Of all below each threshold: sums of what is linear in it, and of what is not.
    bins = torch.bucketize((sizes / sigma.clamp(min=1e-300)), ratios, right=True)
    scale = whole.numel() / max(sizes.numel(), 1)
    known = sizes > 0
    noise = torch.where(known, shares / sizes, 0.0)
    sums = torch.stack([noise, shares, sizes, known.double()])
    below = torch.zeros(4, len(ratios) + 1, dtype=torch.float64, device=grad.device).scatter_add_(1, bins.expand(4, -1), sums)
    over, total, first, count = below.cumsum(1)[:, :-1]
    taus = ratios * sigma
    density = (torch.where(taus > 0, first / taus, 0.0) + below[3].sum() - count) / max(sizes.numel(), 1)
    return ((taus * over - total) * scale).clamp(min=0), density


def _elements(call: Call, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes of a sample, divided by the scales of their images; what arrives in the weight gradients of an error as large
    as each of them, squared."""
    found = histogram.sample(grad, SAMPLES).double()
    sizes = found.abs()
    if call.scales is not None:
        sizes = sizes / histogram.of_sampled(call.scales, tuple(grad.shape), SAMPLES)
    return sizes, (found * call.slope.double()).square()


def _groups(call: Call, grad: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """The same of all groups, which an error moves along what they are."""
    sizes = norms if call.scales is None else norms / call.scales.view(-1, 1, 1, 1)
    product = grad.double() * call.slope.double()
    kind = call.layer.granularity
    if kind == "sample":
        sums = product.sum((1, 2, 3))
    elif kind == "channel":
        sums = product.sum((0, 2, 3))
    else:
        sums = granularity.as_rows(product, kind[1]).sum(2)
    return sizes.double().flatten(), sums.square().flatten()


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Those whose gradients' noise counts: of all convolutions, sparse or not. What comes behind them, mostly linear layers, no
    pruning reaches, and it may have half of all the variance."""
    convolutions = (module for module in model.modules() if isinstance(module, _ConvNd))
    weights = {weight: None for module in convolutions for weight in module.parameters() if weight.dim() >= 2}
    return [weight for weight in weights if weight.requires_grad]


def images_of(batch: Sequence) -> int:
    """How many images the arguments of a loss hold. Raises ValueError if none of them is a tensor, TypeError if one is not dense."""
    tensors = [item for item in batch if isinstance(item, Tensor)]
    for tensor in tensors:
        if tensor.is_nested or tensor.layout is not torch.strided:
            raise TypeError("batch: got a sparse or nested tensor; accepted: dense tensors, which can be cut in half")
    sizes = [len(tensor) for tensor in tensors if tensor.dim() > 0]
    if not sizes:
        raise ValueError("batch: got no tensor of images; accepted: batches that can be cut in half")
    return min(sizes)


def _halves(batch: Sequence) -> tuple[list, list]:
    parts: tuple[list, list] = ([], [])
    for item in batch:
        halves = (item, item)
        if isinstance(item, Tensor) and item.dim() > 0:
            half = len(item) // 2
            halves = item[:half], item[half : 2 * half]
        for part, value in zip(parts, halves):
            part.append(value)
    return parts


@contextmanager
def _undisturbed(model: nn.Module, layers: Sequence[SparseConv2d]) -> Iterator[None]:
    """Random generators and buffers are afterwards as before; layers are dense, code runs as it is written, processes do not
    exchange gradients."""
    device = next(model.parameters()).device
    training = [layer.training for layer in layers]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        stack.enter_context(generators_kept(device))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        try:
            for layer in layers:
                layer.training = False  # means nothing else to a convolution
            yield
        finally:
            for layer, was in zip(layers, training):
                layer.training = was
            with torch.no_grad():
                for buffer, values in buffers:
                    buffer.copy_(values)


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def this_process() -> int:
    """Its number."""
    return distributed.get_rank() if _processes() > 1 else 0


def _over_processes(values: Tensor) -> Tensor:
    """Sums over all processes."""
    if _processes() > 1:
        distributed.all_reduce(values)
    return values


def _kind(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
