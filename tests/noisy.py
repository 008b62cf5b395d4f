# SPDX-License-Identifier: Apache-2.0
"""A small network, and what tests of noise ask of it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import sparsebwd
from sparsebwd import SparseConv2d
from sparsebwd.noise.measure import weights_of


def network(widths=(12, 16, 20), norm=nn.BatchNorm2d, inplace=True) -> nn.Sequential:
    torch.manual_seed(7)
    layers, channels = [], 3
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 5))


def batch(images=16, size=8):
    generator = torch.Generator().manual_seed(3)
    scale = torch.exp(torch.randn(images, 1, 1, 1, generator=generator))
    return torch.randn(images, 3, size, size, generator=generator) * scale, torch.randint(5, (images,), generator=generator)


def loss_of(model):
    return lambda images, labels: F.cross_entropy(model(images), labels)


def sparse_layers(model) -> list[SparseConv2d]:
    return [module for module in model.modules() if isinstance(module, SparseConv2d)]


def set_ratio(layer, ratio) -> None:
    layer.sigma_history[-1:].view(torch.float32).fill_(ratio)


def copy_without_pruning(model):
    return sparsebwd.revert(copy.deepcopy(model))


def gradients(model, part):
    return torch.autograd.grad(loss_of(model)(*part), weights_of(model))


def squares(ones, others) -> float:
    return sum((one.double() - other.double()).square().sum().item() for one, other in zip(ones, others))
