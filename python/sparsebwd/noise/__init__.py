# SPDX-License-Identifier: Apache-2.0
"""Pruning by noise: what pruning adds to the variance of the weight gradients is measured while training, and shared among
the layers where it buys most time.

:mod:`.measure` measures, :mod:`.allocate` shares, :mod:`.guard` looks after the run, :mod:`.controller` is what a training
loop sees.
"""

from .controller import NoiseController

__all__ = ["NoiseController"]
