# SPDX-License-Identifier: Apache-2.0
"""Functions that torch.fx traces as one node."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import fx
from torch.utils._pytree import tree_iter

_Function = TypeVar("_Function", bound=Callable)


def symbolic(function: _Function) -> _Function:
    """``function``, but for symbolic values one node of their graph, as PyTorch's own functions are."""

    @wraps(function)
    def call(*args, **kwargs):
        for value in tree_iter((args, kwargs)):
            if isinstance(value, fx.Proxy):
                return value.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return call
