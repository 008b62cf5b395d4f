# SPDX-License-Identifier: Apache-2.0
"""Train convolutional networks faster: pruned activation gradients, sparse backward convolutions."""

__version__ = "0.1.0"

from . import loading  # noqa: F401  before all others

# isort: split
from . import functional, fusion, grad, nn  # noqa: F401  fusion registers itself
from .backends.break_even import use_calibration
from .conversion import ConversionReport, LayerReport, conversion_report, convert, revert
from .functional import PrunedGradient, prune_gradient
from .info import Info, info  # the function takes the place of its package, which stays in sys.modules
from .memory import keep_memory
from .monitor import DensityMonitor
from .nn import SparseConv2d
from .noise import NoiseController
from .profiling import Profile, profile
from .schedule import PercentileSchedule
from .settings import Pruning
from .subclasses import register_conv

__all__ = [
    "ConversionReport",
    "DensityMonitor",
    "Info",
    "LayerReport",
    "NoiseController",
    "PrunedGradient",
    "PercentileSchedule",
    "Profile",
    "Pruning",
    "SparseConv2d",
    "conversion_report",
    "convert",
    "functional",
    "grad",
    "info",
    "keep_memory",
    "nn",
    "profile",
    "prune_gradient",
    "register_conv",
    "revert",
    "use_calibration",
]
