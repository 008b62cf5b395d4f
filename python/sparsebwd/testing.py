# SPDX-License-Identifier: Apache-2.0
"""Assertions and inputs shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ERROR_FACTOR = 2.0
"""Error against float64 allowed, as a multiple of the error of dense PyTorch."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bit_equal(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Raise AssertionError unless both have the same shape, dtype and bits (NaN payloads and signs
    of zeros included); strides may differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: {tuple(actual.shape)} {actual.dtype} differs from {tuple(expected.shape)} {expected.dtype}"
        )
    bits = _BITS[actual.element_size()]
    differ = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if differ.any():
        index = tuple(differ.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {actual.numel()} elements differ, first at {index}: "
            f"{actual[index].item()!r} instead of {expected[index].item()!r}"
        )


def assert_error_bounded(actual: Tensor, expected: Tensor, dense: Tensor, what: str = "tensor") -> None:
    """Raise AssertionError unless ``actual`` is about as accurate as dense PyTorch.

    actual: the result under test; dense: that of dense PyTorch, same dtype and same inputs;
    expected: the result in float64. Both the largest and the root-mean-square error of ``actual``
    against ``expected`` may be :data:`ERROR_FACTOR` times that of ``dense``, plus half a unit in
    the last place, which ``dense`` can fall below only by luck. NaN and Inf are errors.
    """
    if actual.dtype != dense.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{what}: got {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {dense.dtype}"
        )
    if actual.numel() == 0:
        return
    expected = expected.double()
    half_ulp = torch.finfo(dense.dtype).eps / 2
    for norm, measure in (("largest", _largest), ("root-mean-square", _rms)):
        error, error_of_dense = (measure(result.double() - expected) for result in (actual, dense))
        allowed = ERROR_FACTOR * error_of_dense + half_ulp * measure(expected)
        if not error <= allowed:
            raise AssertionError(
                f"{what}: {norm} error against float64 is {error:.3g}, allowed {allowed:.3g} "
                f"(dense: {error_of_dense:.3g})"
            )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def random_tensor(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    density: float = 1.0,
    integer: bool = False,
) -> Tensor:
    """A CPU tensor of normal numbers, or of integers from -3 to 3 without 0, of which a fraction
    ``density`` (in expectation) is kept and the rest is 0.

    Sums of products of such integers are exact in float32 in any order, up to 2^24.
    """
    if integer:
        values = torch.randint(1, 4, shape, generator=generator).double()
        values *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kept = torch.rand(shape, generator=generator) < density
    return (values * kept).to(dtype).contiguous(memory_format=memory_format)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill with NaN every tensor that PyTorch allocates uninitialised within the context.

    Restores the settings of deterministic algorithms on leaving.
    """
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)


def fenced(tensor: Tensor, fence: int = 67) -> Tensor:
    """A copy of ``tensor`` with the same strides that lies between ``fence`` NaNs on each side, unaligned unless these
    are a multiple of what it is to be aligned to.

    What reads outside of it computes NaN.
    """
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    buffer = tensor.new_full((size + 2 * fence,), float("nan"))
    return buffer.as_strided(tensor.shape, tensor.stride(), fence).copy_(tensor)
