# SPDX-License-Identifier: Apache-2.0
"""Implementations of the backward pass, from the oracle to the fastest; see :mod:`.base`."""

from .base import (
    PLANNED,
    Backend,
    BackwardResult,
    LayerStats,
    available_backends,
    choose_backend,
    get_backend,
    observers,
    register,
    registered_backends,
)
from .cpu import CpuBackend
from .cuda import CudaBackend
from .dense import DenseBackend
from .reference import ReferenceBackend

__all__ = [
    "PLANNED",
    "Backend",
    "BackwardResult",
    "LayerStats",
    "available_backends",
    "choose_backend",
    "get_backend",
    "observers",
    "register",
    "registered_backends",
]

# "auto" takes the last of these that can run.
register(ReferenceBackend())
register(DenseBackend())
register(CpuBackend())
register(CudaBackend())
