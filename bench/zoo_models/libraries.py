# SPDX-License-Identifier: Apache-2.0
"""torchvision, timm and pytorchcv, where they are installed; the latter two import the former."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

_MODULES = {"torchvision": "torchvision.models", "timm": "timm", "pytorchcv": "pytorchcv.model_provider"}

# torchvision's own, whose fake forms it registers without asking whether its native library was loaded.
_OPERATORS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}


def load(library: str) -> Any:
    """The module of a library that makes its models.

    A torchvision whose native library is for another build of PyTorch, such as one with CUDA, does not import; here it
    does, without operators of its own, which networks for classification do not use.

    Raises RuntimeError if the library is not installed.
    """
    try:
        try:
            return importlib.import_module(_MODULES[library])
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            _define_operators()
            return importlib.import_module(_MODULES[library])
    except ImportError as error:
        raise RuntimeError(f"source: {library} is not installed ({error}); accepted then: own") from None


def _define_operators() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in _MODULES]:
        del sys.modules[name]  # what the failed import left
    for schema in _OPERATORS.values():
        _library.define(schema)


_library = torch.library.Library("torchvision", "FRAGMENT")
