# SPDX-License-Identifier: Apache-2.0
"""The geometry of one 2-D convolution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .arguments import MOST, Pair, as_int, as_pair, shown

_TOKEN = re.compile(r"([a-z])(\d+)(?:x(\d+))?")
_SIZES = "nchwkrs"
_OPTIONS = {"u": "stride", "p": "padding", "d": "dilation", "g": "groups"}


@dataclass(frozen=True)
class ConvProblem:
    """Sizes and settings of a 2-D convolution; (height, width) pairs throughout.

    n: batch, c: input channels, h, w: input size, k: output channels, r, s: kernel size.
    ``str(problem)`` gives ``n32c64h32w32k128r3s3u2p1d1g1`` (u: stride, p: padding, d: dilation,
    g: groups; unequal pairs as ``u2x1``) and :meth:`parse` reads it back.

    Raises ValueError if the sizes do not fit together.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation"):
            object.__setattr__(self, name, as_pair(getattr(self, name), name))
        for name in (*_SIZES, "groups"):
            object.__setattr__(self, name, as_int(getattr(self, name), name))
        lower_bounds = {"n": 0, "padding": 0}
        for name in (*_SIZES, *_OPTIONS.values()):
            bound = lower_bounds.get(name, 1)
            value = getattr(self, name)
            if min(value) < bound if isinstance(value, tuple) else value < bound:
                raise ValueError(f"{name}: got {value}; accepted: at least {bound}")
        for name, channels in (("c", self.c), ("k", self.k)):
            if channels % self.groups:
                raise ValueError(f"groups: got {self.groups}; accepted: a divisor of {name}={channels}")
        if self.p < 1 or self.q < 1:
            raise ValueError(
                f"weight: the kernel {self.r}x{self.s} with dilation {self.dilation} is larger than the "
                f"input {self.h}x{self.w} with padding {self.padding}"
            )
        if max(self.p, self.q) > MOST:
            raise ValueError(f"padding: got {self.padding}; accepted: what makes the output at most 2^63 - 1 high and wide")

    def __hash__(self) -> int:
        return hash(self._text)  # strings keep their hash, tuples do not

    @property
    def p(self) -> int:
        """Output height."""
        return self._output(self.h, self.r, 0)

    @property
    def q(self) -> int:
        """Output width."""
        return self._output(self.w, self.s, 1)

    def _output(self, size: int, kernel: int, axis: int) -> int:
        span = self.dilation[axis] * (kernel - 1) + 1
        return (size + 2 * self.padding[axis] - span) // self.stride[axis] + 1

    @cached_property
    def input_size(self) -> tuple[int, int, int, int]:
        return (self.n, self.c, self.h, self.w)

    @cached_property
    def weight_size(self) -> tuple[int, int, int, int]:
        return (self.k, self.c // self.groups, self.r, self.s)

    @cached_property
    def output_size(self) -> tuple[int, int, int, int]:
        return (self.n, self.k, self.p, self.q)

    @property
    def macs(self) -> int:
        """Multiply-adds of the forward pass, and of each of AGB and WGC when dense.

        Multiplications with padding are counted, as is usual.
        """
        return self.n * self.p * self.q * self.k * (self.c // self.groups) * self.r * self.s

    @classmethod
    def from_sizes(
        cls,
        input_size: Sequence[int],
        weight_size: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> ConvProblem:
        """Build from the shapes (N, C, H, W) of the input and (K, C/groups, R, S) of the weight.

        Raises ValueError if they do not fit together, TypeError for what is not made of ints.
        """
        for name, size in (("input", input_size), ("weight", weight_size)):
            if len(size) != 4:
                raise ValueError(f"{name}: got shape {tuple(size)}; accepted: 4 dimensions")
        groups = as_int(groups, "groups", least=1)
        n, c, h, w = input_size
        k, c_per_group, r, s = weight_size
        if c != c_per_group * groups:
            raise ValueError(
                f"weight: got shape {tuple(weight_size)} with groups={groups}, which takes "
                f"{c_per_group * groups} input channels; the input has {c}"
            )
        return cls(n, c, h, w, k, r, s, stride, padding, dilation, groups)

    @classmethod
    def parse(cls, text: str) -> ConvProblem:
        """Read ``n32c64h32w32k128r3s3u2p1d1g1``; u, p, d and g may be left out (1, 0, 1, 1).

        Raises ValueError naming what is wrong with ``text``, TypeError if it is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"problem: got {shown(text)}; accepted: a string like 'n32c64h32w32k128r3s3u2p1d1g1'")
        fields: dict[str, int | Pair] = {}
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            if token is None:
                raise ValueError(
                    f"problem: got {text!r}, unreadable from {text[position:]!r}; "
                    "accepted: like 'n32c64h32w32k128r3s3u2p1d1g1'"
                )
            letter, first, second = token.groups()
            name = _OPTIONS.get(letter, letter)
            if name not in (*_SIZES, *_OPTIONS.values()) or name in fields:
                problem = "repeats" if name in fields else "has the unknown letter"
                raise ValueError(f"problem: got {text!r}, which {problem} {letter!r}")
            if letter in "upd":
                fields[name] = (int(first), int(second or first))
            elif second is not None:
                raise ValueError(f"problem: got {text!r}; {letter!r} takes one number, not a pair")
            else:
                fields[name] = int(first)
            position = token.end()
        missing = [letter for letter in _SIZES if letter not in fields]
        if missing:
            raise ValueError(f"problem: got {text!r}, which lacks {', '.join(missing)}")
        return cls(**fields)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        def pair(value: Pair) -> str:
            return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"

        sizes = "".join(f"{name}{getattr(self, name)}" for name in _SIZES)
        return f"{sizes}u{pair(self.stride)}p{pair(self.padding)}d{pair(self.dilation)}g{self.groups}"
