# SPDX-License-Identifier: Apache-2.0
"""Train convolutional networks faster: pruned activation gradients, sparse backward convolutions."""

from . import functional, grad, nn
from .functional import prune_gradient
from .nn import SparseConv2d

__version__ = "0.1.0"

__all__ = [
    "SparseConv2d",
    "functional",
    "grad",
    "nn",
    "prune_gradient",
]
