# SPDX-License-Identifier: Apache-2.0
"""Fusion by torch.ao.quantization (``fuse_modules``, ``fuse_modules_qat``) looks up modules by exact type. What it has for
nn.Conv2d it gets for SparseConv2d here: the layer is reverted, and fused as the nn.Conv2d that it is then."""

from __future__ import annotations

from functools import partial

from torch import nn

from .conversion import convert, revert
from .nn import SparseConv2d

try:
    from torch.ao.quantization.fuser_method_mappings import _DEFAULT_OP_LIST_TO_FUSER_METHOD as _methods
except ImportError:  # it is to leave PyTorch
    _methods = {}


def _fuse(types: tuple[type, ...], is_qat: bool, conv: SparseConv2d, *others: nn.Module) -> nn.Module:
    pruning = conv.pruning
    try:
        return _methods[types](is_qat, revert(conv), *others)
    except Exception:
        convert(conv, placement=pruning.placement, where="everywhere").pruning = pruning  # as it was
        raise


for _types in [types for types in _methods if types[0] is nn.Conv2d]:
    _methods[(SparseConv2d, *_types[1:])] = partial(_fuse, _types)
