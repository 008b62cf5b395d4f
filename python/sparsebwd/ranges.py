# SPDX-License-Identifier: Apache-2.0
"""Names of layers, in the log and around their backward passes in what torch.profiler records."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from weakref import WeakValueDictionary

import torch
from torch import nn

PREFIX = "sparsebwd backward"

_layers: WeakValueDictionary[int, nn.Module] = globals().get("_layers", WeakValueDictionary())  # kept where it is reloaded
_NOTHING = nullcontext()


def register(layer: nn.Module) -> None:
    """Make a layer known by its layer_id."""
    _layers[layer.layer_id] = layer


def name_of(layer_id: int) -> str:
    """That in the model that was converted, or else "layer 3"."""
    return getattr(_layers.get(layer_id), "layer_name", "") or f"layer {layer_id}"


def of_layer(layer_id: int) -> AbstractContextManager[object]:
    """Around the backward pass of a layer: a range ``sparsebwd backward: NAME`` while a profiler listens, else nothing."""
    if not torch._C._autograd._profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(f"{PREFIX}: {name_of(layer_id)}")
