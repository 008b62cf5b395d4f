# SPDX-License-Identifier: Apache-2.0
"""What a training step of a model gains by pruned gradients, layer by layer: :func:`profile`, ``python -m sparsebwd profile``."""

from .measure import profile
from .result import Alternative, LayerProfile, Profile

__all__ = ["Alternative", "LayerProfile", "Profile", "profile"]
