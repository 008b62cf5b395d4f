# SPDX-License-Identifier: Apache-2.0
"""The random generators that a whole process shares."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """They are afterwards as before: Python's, NumPy's, and PyTorch's of the CPU and of ``device``."""
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
