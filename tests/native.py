# SPDX-License-Identifier: Apache-2.0
"""What tests of the CPU kernels share: gradients with special values, and what may be written."""

from __future__ import annotations

import math

import numpy as np
import torch

from sparsebwd.testing import random_tensor

KEYS = [(0, 0), (-1, 2**63 - 1), (0x123456789ABCDEF, -0x76543210FEDCBA98)]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38]


def gradient(shape, dtype, memory_format, seed, special=False):
    generator = torch.Generator().manual_seed(seed)
    grad = random_tensor(
        shape, generator=generator, dtype=dtype, memory_format=memory_format, density=0.9
    )
    if special and grad.numel() >= len(SPECIAL):
        positions = torch.randperm(grad.numel(), generator=generator)[: len(SPECIAL)]
        index = np.unravel_index(positions.numpy(), shape)
        grad[tuple(map(torch.from_numpy, index))] = torch.tensor(SPECIAL).to(dtype)
    return grad


def assert_surroundings_kept(tensor):
    """Nothing but the elements of ``tensor`` was written in its storage, which was all NaN."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    written = ~storage.isnan()
    inside = torch.zeros_like(written)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    assert not (written & ~inside).any()


def rounded(tau, dtype):
    return torch.tensor(tau).to(dtype).float()
