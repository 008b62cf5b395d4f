# SPDX-License-Identifier: Apache-2.0
"""What tests choose from: Hypothesis strategies, and the backends of a machine."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st

from sparsebwd.backends import available_backends, get_backend
from sparsebwd.problem import ConvProblem


def backends_on(device_type: str) -> tuple[str, ...]:
    """The backends that run on this machine and take tensors of this device, the last first choice of "auto"."""
    return tuple(
        name for name in available_backends() if get_backend(name).can_run(None, device_type, torch.float32) is None
    )


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw, max_channels: int = 40) -> ConvProblem:
    """Any small convolution, an empty batch included; max_channels is that of each group."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    try:
        return ConvProblem(
            n=draw(st.integers(0, 3)),
            c=groups * draw(st.integers(1, max_channels)),
            h=draw(st.integers(1, 12)),
            w=draw(st.integers(1, 12)),
            k=groups * draw(st.integers(1, max_channels)),
            r=draw(st.integers(1, 5)),
            s=draw(st.integers(1, 5)),
            stride=draw(pairs(1, 3)),
            padding=draw(pairs(0, 3)),
            dilation=draw(pairs(1, 2)),
            groups=groups,
        )
    except ValueError:
        assume(False)
