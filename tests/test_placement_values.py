# SPDX-License-Identifier: Apache-2.0
"""Placement by what is known of values: constants, masks, rectifiers that complement each other. Compared with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsebwd.placement import decide_placements

_relu = F.relu


class Uses(nn.Module):
    """Masks that are true for half of the elements, for few and for most, and numbers."""

    def __init__(self, after) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 3, 3), after
        drawn = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
        for name, value in {
            "some": drawn > 0.5, "few": drawn > 0.97, "most": drawn < 0.97, "drawn": drawn - 0.5,
            "far": torch.full((3, 12, 12), -20.0), "zero": torch.zeros(3, 12, 12), "unknown": torch.rand(3, 12, 12) > 0.03,
        }.items():  # fmt: skip
            self.register_buffer(name, value)

    def forward(self, x):
        return self.after(self.conv(x), self)


@pytest.mark.parametrize(
    "after, expected",
    [
        # Constants in functions of three operands.
        (lambda y, m: _relu(torch.addcmul(y, y, y)), "input"),
        (lambda y, m: _relu(torch.addcmul(torch.ones(1), y, y)), "output"),
        (lambda y, m: _relu(torch.addcmul(torch.full((1,), 3.0), y, torch.ones(1))), "output"),
        (lambda y, m: _relu(torch.addcmul(y, torch.ones(1), torch.ones(1), value=-1)), "input"),
        (lambda y, m: _relu(torch.addcmul(m.drawn, y, m.drawn)), "input"),
        (lambda y, m: _relu(y.addcmul(m.drawn, m.drawn)), "input"),
        (lambda y, m: _relu(y.addcdiv(torch.ones(1), torch.full((1,), 0.2))), "output"),
        (lambda y, m: _relu(torch.addcdiv(torch.full((1,), 0.1), y, torch.ones(1))), "input"),
        (lambda y, m: _relu(torch.lerp(y, torch.full((1,), 6.0), 0.5)), "output"),
        (lambda y, m: _relu(torch.lerp(torch.zeros(1), y, 0.5)), "input"),
        # Tensors of one value.
        (lambda y, m: _relu(y - m.far), "output"),
        (lambda y, m: _relu(y + m.far), "input"),
        (lambda y, m: torch.maximum(y, m.far), "output"),
        (lambda y, m: torch.clamp(y, min=m.zero), "input"),
        (lambda y, m: _relu(y + m.drawn), "input"),
        # Masks that are known.
        (lambda y, m: torch.where(m.some, y, 0), "input"),
        (lambda y, m: torch.where(m.few, y, 0), "input"),
        (lambda y, m: torch.where(m.most, y, 0), "output"),
        (lambda y, m: torch.where(m.few, 0, y), "output"),
        (lambda y, m: y.where(m.most, m.drawn), "output"),
        (lambda y, m: y.masked_fill(m.few, 0), "output"),
        (lambda y, m: y * m.some, "input"),
        (lambda y, m: y * m.most, "output"),
        (lambda y, m: y[:, m.some], "input"),
        (lambda y, m: y[:, m.most], "output"),
        (lambda y, m: _relu(y * m.drawn), "input"),
        # Masks that nothing is known of pass.
        (lambda y, m: torch.where(m.unknown.clone(), y, 0), "output"),
        (lambda y, m: _relu(torch.where(m.unknown.clone(), y, 0)), "input"),
        # Masks by comparison.
        (lambda y, m: torch.where(y > -3, y, 0), "output"),
        (lambda y, m: torch.where(-3 < y, y, 0), "output"),
        (lambda y, m: torch.where(y > 3, y, 0), "input"),
        (lambda y, m: torch.where(~(y > 0), 0, y), "input"),
        (lambda y, m: y.masked_fill(y < -3, 0), "output"),
        (lambda y, m: y.masked_fill(y > -3, 0), "input"),
        (lambda y, m: y[y > -3], "output"),
        (lambda y, m: y * (y > -3), "output"),
        (lambda y, m: y * torch.where(y > 0, 1, 0), "input"),
        (lambda y, m: y * torch.where(y > 0, 2, 1), "output"),
        (lambda y, m: torch.where((y > 0) & (y < 1), y, 0), "input"),
        (lambda y, m: torch.where((y > 0) | (y <= 0), y, 0), "output"),
        (lambda y, m: torch.where((y > 0) & y.isfinite(), y, 0), "input"),
        (lambda y, m: torch.where(y.isnan(), 0, y), "output"),
        (lambda y, m: torch.where(y.isfinite(), y, 0), "output"),
        (lambda y, m: y.masked_fill(y.isnan() | y.isinf(), 0), "output"),
        (lambda y, m: torch.where(y != 0, y, 1e-6), "output"),
        # Paths that complement each other go on.
        (lambda y, m: F.max_pool2d(_relu(y) + _relu(-y), 2), "input"),
        (lambda y, m: F.max_pool2d(torch.cat([_relu(y), _relu(-y)], 1), 2), "input"),
        (lambda y, m: F.avg_pool2d(_relu(y) + _relu(-y), 2), "output"),
        (lambda y, m: F.layer_norm(_relu(y) + _relu(-y), [12, 12]), "output"),
        (lambda y, m: _relu(torch.cat([_relu(y), _relu(-y)], 1)), "output"),
        (lambda y, m: _relu(_relu(y) - _relu(-y)), "input"),
        (lambda y, m: _relu(y) + _relu(-y) + F.max_pool2d(y, 3, 1, 1), "output"),
        (lambda y, m: torch.where(y > 0, y, 0) + torch.where(y <= 0, y, 0), "output"),
        (lambda y, m: y * (y > 0) + y * (y < 0), "output"),
        (lambda y, m: torch.where(y > 0, y, 0) + torch.where(y > 1, y, 0), "input"),
        (lambda y, m: _relu(torch.maximum(y, -y)), "output"),
        (lambda y, m: F.max_pool2d(torch.maximum(y, -y), 2), "input"),
        # What zeroes little.
        (lambda y, m: F.max_pool2d(y, 1), "output"),
        (lambda y, m: F.max_pool2d(y, 1, 2), "input"),
        (lambda y, m: nn.MaxPool2d((1, 1))(y), "output"),
        (lambda y, m: F.hardshrink(y, 0.01), "output"),
        (lambda y, m: nn.Softshrink(0.01)(y), "output"),
        (lambda y, m: F.softshrink(0.01 * y, 0.02), "input"),
        (lambda y, m: _relu(nn.Sigmoid()(y)), "output"),
        (lambda y, m: _relu(y.sort(1)[0]), "input"),
        (lambda y, m: y.kthvalue(1, 1)[0], "input"),
        (lambda y, m: y.tril(), "input"),
    ],
)
def test_the_placement_is_that_of_the_measured_gradient(after, expected):
    model = Uses(after)
    placement, reason = decide_placements(model)["conv"]
    assert placement == expected and "by order" not in reason, reason
    y = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    after(y, model).square().sum().backward()
    assert ((y.grad == 0).float().mean() > 0.125) == (expected == "input")


def test_parameters_are_no_constants():
    """They are trained, whatever they begin with; buffers of modules within are known."""

    class Gated(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.conv, self.gate, self.bn = nn.Conv2d(3, 3, 3), gate, nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(x) * self.gate

    gate = torch.zeros(3, 1, 1)
    assert decide_placements(Gated(nn.Parameter(gate)))["conv"].placement == "output"
    assert decide_placements(nn.Sequential(Gated(nn.Buffer(gate)), nn.Flatten()))["0.conv"].placement == "input"
