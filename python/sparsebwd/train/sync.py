# SPDX-License-Identifier: Apache-2.0
"""BatchNorm by the statistics of all processes, also on CPUs, where that of PyTorch refuses to run."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn


class SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch is that of all processes together, which each bring as many images.

    Parameters, buffers and what it computes in evaluation mode are those of nn.BatchNorm2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input: [N, C, H, W] of a process; returns as much."""
        if not self.training:
            return super().forward(input)
        values = input.float()
        mean = _mean_of_all(values.mean((0, 2, 3)))
        centred = values - mean[:, None, None]
        # In two passes: the mean of the squares less the square of the mean would lose what they have in common.
        variance = _mean_of_all(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = input.numel() // input.shape[1] * distributed.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def synchronize_norms(model: nn.Module) -> None:
    """Make every nn.BatchNorm2d of the model a SyncBatchNorm: its parameters and all references to it remain."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm


def _mean_of_all(value: Tensor) -> Tensor:
    return _Sum.apply(value) / distributed.get_world_size()


class _Sum(torch.autograd.Function):
    """Over all processes. Each loss depends on each summand, so gradients are summed as well."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
