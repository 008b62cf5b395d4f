# SPDX-License-Identifier: Apache-2.0
"""Implementations of the backward pass, from the oracle to the fastest; see :mod:`.base`."""

from .base import (
    Backend,
    BackwardResult,
    LayerStats,
    available_backends,
    choose_backend,
    get_backend,
    observers,
    register,
    registered_backends,
    why_not_faster,
)
from .cpu import CpuBackend
from .cuda import CudaBackend
from .dense import DenseBackend
from .reference import ReferenceBackend
from .triton_backend import TritonBackend

__all__ = [
    "Backend",
    "BackwardResult",
    "LayerStats",
    "available_backends",
    "choose_backend",
    "get_backend",
    "observers",
    "register",
    "registered_backends",
    "why_not_faster",
]

# "auto" takes the last of these that can run.
for _backend in (ReferenceBackend(), DenseBackend(), TritonBackend(), CpuBackend(), CudaBackend()):
    if _backend.name not in registered_backends():  # as they are, where this module is reloaded
        register(_backend)
