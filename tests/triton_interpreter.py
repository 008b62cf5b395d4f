# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on CPU tensors, by triton's interpreter, and the backend above them.

What triton 3.6.0's interpreter does wrong is put right here: with NumPy 2.4 it cannot loop up to a number that a kernel computed;
float32 becomes bfloat16 by cutting, not by rounding; and tl.dot takes the bits of bfloat16 for integers.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsebwd.backends import triton_backend


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def _patch() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    patch_tensor, cast, dot = interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot

    def _patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def cast_impl(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.bfloat16, tl.float32):
            return handle(_widened(src.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return handle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *others):
        a, b = (handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    interpreter._patch_lang_tensor = _patch_lang_tensor
    builder.cast_impl, builder.create_dot = cast_impl, create_dot


@functools.cache
def kernels() -> ModuleType:
    """A copy of the module of the kernels, as functions that are interpreted."""
    _patch()
    path = Path(triton_backend.__file__).with_name("triton_kernels.py")
    spec = importlib.util.spec_from_file_location("interpreted_triton_kernels", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


class InterpretedBackend(triton_backend.TritonBackend):
    name = "interpreted"
    device_type = "cpu"

    def available(self) -> str | None:
        return None

    @property
    def kernels(self) -> ModuleType:
        return kernels()
