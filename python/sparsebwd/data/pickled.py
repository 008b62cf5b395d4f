# SPDX-License-Identifier: Apache-2.0
"""Dictionaries of plain values and byte arrays from pickle files, without running any code that a pickle names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from ..opening import open_regular


def read_pickle(path: Path, most: int) -> dict[bytes, Any]:
    """The dictionary in a pickle file: numbers, bytes, lists, and NumPy arrays of uint8.

    A pickle may name any function of any module and have it called. Here the few names that an array needs stand for
    parts of this module, which keep their arguments, and all others are refused.

    Args:
        most: bytes that the file may have.

    Raises:
        ValueError: not such a pickle. Other exceptions where it is corrupt, of whatever kind pickle raises.
        OSError: the file cannot be read, or has more bytes.
    """
    with open_regular(path, most) as file:
        content = _Unpickler(file, encoding="bytes").load()
    if type(content) is not dict:
        raise ValueError(f"got a {type(content).__name__}, accepted is a dict")
    return {
        key.encode() if isinstance(key, str) else key: value.array() if isinstance(value, _Array) else value
        for key, value in content.items()
    }


class _Part:
    """With a method for states, so that no pickle can set attributes: of the class it lacks an argument."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets a state where there is none")


class _Dtype(_Part):
    """Stands for numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which bytes do not have."""


class _Array(_Part):
    """Stands for numpy.ndarray: made empty, then told shape, type and content, or made of them at once."""

    def __init__(self, *_: Any) -> None:
        self._state: tuple = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self._state = shape, dtype, fortran, content

    def array(self) -> np.ndarray:
        shape, dtype, fortran, content = self._state
        code = dtype.code.encode() if isinstance(dtype.code, str) else dtype.code
        if code not in (b"u1", b"|u1"):
            raise ValueError(f"got an array of type {code!r}, accepted is u1")
        if not isinstance(content, (bytes, bytearray)):
            raise ValueError(f"got a {type(content).__name__} as an array's content, accepted are bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


class _FromBuffer(_Part):
    """Stands for numpy's _frombuffer, of pickle protocol 5."""

    def __new__(cls, content: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == "F", content))
        return array


class _Encode(_Part):
    """Stands for _codecs.encode: bytes of Python 3 in protocol 2."""

    def __new__(cls, text: Any, encoding: Any) -> bytes:
        return str.encode(text, {"latin1": "latin1", b"latin1": "latin1"}[encoding])


_PARTS = {
    "numpy": {"ndarray": _Array, "dtype": _Dtype},
    "numpy.core.multiarray": {"_reconstruct": _Array},
    "numpy._core.multiarray": {"_reconstruct": _Array},
    "numpy.core.numeric": {"_frombuffer": _FromBuffer},
    "numpy._core.numeric": {"_frombuffer": _FromBuffer},
    "_codecs": {"encode": _Encode},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PARTS[module][name]
        except KeyError:
            raise ValueError(f"it names {module}.{name}, which no array needs: not the file that was published") from None
