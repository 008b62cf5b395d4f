# SPDX-License-Identifier: Apache-2.0
"""How much each image counts for the noise of the weight gradient: thresholds by the norm of a convolution's input.

What the pruning of an element adds to the noise of the weight gradient is its variance times the squared norm of the patch of
the input under its pixel. So elements are kept with probability min(1, |g| s / tau) where s grows with that norm, which leaves
the gradient without bias whatever s is, as long as it does not depend on the numbers drawn: Algorithm 1 of Ye et al. (2019) at
the threshold tau / s. Here s is one number for each image. Known for samples of linear layers as leverage scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import Pruning

_PARTS = 4
"""Along the height and the width of an image, of each of which a pixel is looked at."""
_LEVELS = 2.0**15
_MOST = 4.0
"""Of an image whose input is all but zero the weight gradient sees nothing, but the layers before do."""


def scales(input: Tensor, pruning: Pruning) -> Tensor | None:
    """1 / s for each image of the input (N, C, H, W) of a convolution: what its threshold is tau times. float32 (N,), on the
    device of the input, which is not waited for; None where all images have tau.

    s = (norm of the input of the image / root mean square of these norms)^(3/4), at least 1/4; 1 where the input is all zero
    or not finite. The norms are those of up to 7 x 7 pixels, spread evenly over each image, rounded to 1/32768 of the
    largest magnitude: squares are integers, whose sums are exact, and the power is one of square roots. So the bits do not
    depend on layout, device or number of threads.
    """
    if not (pruning.by_image and pruning.active):
        return None
    rows, columns = (max(size // _PARTS, 1) for size in input.shape[2:])
    seen = input[:, :, rows // 2 :: rows, columns // 2 :: columns].float()
    if seen.numel() == 0:
        return input.new_ones(len(input), dtype=torch.float32)
    levels = (seen / seen.abs().amax()).mul_(_LEVELS).round_()
    squares = levels.square_().sum((1, 2, 3), dtype=torch.float64)
    share = squares * len(input) / squares.sum()
    power = (share * share * share).sqrt().sqrt().sqrt()
    return power.reciprocal().clamp(max=_MOST).nan_to_num(1.0).float()
