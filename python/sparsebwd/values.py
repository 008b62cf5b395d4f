# SPDX-License-Identifier: Apache-2.0
"""What is known of values in a graph of torch.fx before it runs: constants, multiples of a convolution's output, and masks."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .rectifiers import ABOVE_ZERO, ITSELF, LARGE_PART, Affine, Bounds

_POSITIVE = set("abs exp square sqrt rsqrt sigmoid softplus hardsigmoid".split())  # whatever of
_GREATER, _LESS = {"gt", "ge", "greater", "greater_equal"}, {"lt", "le", "less", "less_equal"}
_RARE, _USUAL = {"eq", "isnan", "isinf"}, {"ne", "not_equal", "isfinite"}  # of floating-point numbers
_AND, _OR = {"logical_and", "bitwise_and", "and"}, {"logical_or", "bitwise_or", "or"}
_NOT = {"logical_not", "bitwise_not", "invert"}
_MULTIPLIES, _DIVIDES = ("mul", "imul", "multiply"), ("div", "divide", "truediv", "itruediv", "true_divide")
_SAME = "to float type_as type half bfloat16 bool contiguous view expand expand_as unsqueeze".split()


class Mask(NamedTuple):
    """Where it is true: between ``bounds`` of the value that it was made of; or else in this ``share`` of all elements; or else in some."""

    bounds: Bounds | None = None
    share: float | None = None

    def inverted(self) -> Mask:
        if self.bounds is not None:  # one of the two is infinite
            low, high = self.bounds
            return Mask((-math.inf, low) if high == math.inf else (high, math.inf))
        return Mask(None, None if self.share is None else 1.0 - self.share)

    def and_also(self, other: Mask) -> Mask:
        for one, two in ((self, other), (other, self)):
            if one.share is not None:
                return one if 1.0 - one.share >= LARGE_PART else two
        if self.bounds is None or other.bounds is None:
            return Mask()
        low, high = max(self.bounds[0], other.bounds[0]), min(self.bounds[1], other.bounds[1])
        if low >= high:
            return Mask(None, 0.0)
        return Mask((low, high)) if math.inf in (-low, high) else Mask()


def note_constant(node: fx.Node, traced: nn.Module, model: nn.Module) -> None:
    """Keep of a tensor that forward() made, or of a buffer, its value if that is one number, and how much of it is not zero.

    traced: the copy of ``model`` that was traced, whose buffers are empty.
    """
    path = node.target.split(".")
    for owner in (traced, model):
        with suppress(AttributeError):
            tensor = reduce(getattr, path, owner)
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, nn.Parameter):
                return
            if not (tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided or tensor.numel() == 0):
                first = tensor.detach().flatten()[0]
                if bool((tensor == first).all()):
                    node.meta["constant"] = float(first)
                node.meta["share"] = float(tensor.detach().ne(0).double().mean())
                return


def name_of(node: fx.Node) -> str:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    # relu.default is an overload, _threshold what torch.nn.functional.threshold is called.
    return name.partition(".")[0].strip("_") if not name.startswith("__") else name


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def others(node: fx.Node, source: fx.Node) -> list[Any]:
    return [value for value in (*node.args, *node.kwargs.values()) if value is not source]


def constant(value: Any) -> float | None:
    """A constant as a number; None where it is not known."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, fx.Node) and name_of(value) in ("neg", "negative") and value.op != "call_module":
        number = constant(value.args[0])
        return None if number is None else -number
    return value.meta.get("constant") if isinstance(value, fx.Node) else None


def after(node: fx.Node, source: fx.Node, value: Affine) -> Affine:
    """What ``node`` makes of ``value``, where it adds or multiplies constants."""
    if node.op == "call_module":
        return value
    name, rest = name_of(node), others(node, source)
    scale, shift = value
    squares = not rest if name in _MULTIPLIES else name in ("pow", "ipow") and rest in ([2], [4])
    if name in _POSITIVE or squares:
        return ABOVE_ZERO
    if name in ("addcmul", "addcdiv", "lerp"):
        return _after_three(node, name, source, value)
    if name in ("maximum", "fmax") and len(rest) == 1 and _is_negative_of(rest[0], source):
        return ABOVE_ZERO
    if name in ("add", "sub", "subtract") and "alpha" in node.kwargs:
        rest = [argument(node, 1, "other", None)] if node.args and node.args[0] is source else []
    if name in ("neg", "negative"):
        return Affine(-scale, -shift)
    number = constant(rest[0]) if len(rest) == 1 else None
    if number is None:
        return ITSELF if name in ("sub", "isub", "subtract", "rsub") else value
    number *= constant(node.kwargs.get("alpha", 1)) or 1.0
    first = bool(node.args) and node.args[0] is source
    if name in ("add", "iadd"):
        return Affine(scale, shift + number)
    if name in ("sub", "isub", "subtract", "rsub"):
        from_it = first != (name == "rsub")
        return Affine(scale, shift - number) if from_it else Affine(-scale, number - shift)
    if number and name in _MULTIPLIES:
        return Affine(scale * number, shift * number)
    if number and first and name in _DIVIDES:
        return Affine(scale / number, shift / number)
    return value


def _after_three(node: fx.Node, name: str, source: fx.Node, value: Affine) -> Affine:
    """Of ``input + value * tensor1 * tensor2`` or ``/ tensor2``, or ``start + weight * (end - start)``."""
    names = ("start", "end", "weight") if name == "lerp" else ("input", "tensor1", "tensor2")
    operands = [argument(node, place, operand, None) for place, operand in enumerate(names)]
    numbers = [constant(operand) for operand in operands]
    places = [place for place, operand in enumerate(operands) if operand is source]
    factor = 1.0 if name == "lerp" else constant(argument(node, 3, "value", 1))
    if name == "addcmul" and places == [1, 2] and (factor or 0) > 0 and (numbers[0] or 0) >= 0:
        return ABOVE_ZERO
    known = [number for place, number in enumerate(numbers) if place not in places and number is not None]
    if len(places) != 1 or len(known) != 2 or factor is None:
        return ITSELF
    results = []
    for probe in (0.0, 1.0):
        first, second, third = (probe if place in places else number for place, number in enumerate(numbers))
        if name == "lerp":
            results.append(first + third * (second - first))
        elif name == "addcmul":
            results.append(first + factor * second * third)
        elif places == [2] or not third:
            return ITSELF
        else:
            results.append(first + factor * second / third)
    scale, shift = results[1] - results[0], results[0]
    return Affine(value.scale * scale, value.shift * scale + shift) if scale else ITSELF


def _is_negative_of(value: Any, source: fx.Node) -> bool:
    return isinstance(value, fx.Node) and name_of(value) in ("neg", "negative") and value.all_input_nodes == [source]


def mask_of(value: Any, source: fx.Node) -> Mask | None:
    """Where ``value`` is true, or not zero, by the values of ``source``; None where nothing is known of it."""
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        return Mask(None, value.meta["share"]) if "share" in value.meta else None
    if value.op not in ("call_function", "call_method"):
        return None
    name = name_of(value)
    first, second = argument(value, 0, "input", None), argument(value, 1, "other", None)
    if name in _SAME:
        return mask_of(first, source)
    if name in _NOT:
        found = mask_of(first, source)
        return found and found.inverted()
    if name in _RARE or name in _USUAL:
        return Mask(None, float(name in _USUAL))
    if name in _AND | _OR:
        one, two = mask_of(first, source), mask_of(second, source)
        if one is None or two is None:
            return None
        return one.and_also(two) if name in _AND else one.inverted().and_also(two.inverted()).inverted()
    if name == "where" and len(value.args) == 3:
        yes, no = constant(value.args[1]), constant(value.args[2])
        found = mask_of(value.args[0], source)
        if found is None or yes is None or no is None or (yes == 0) == (no == 0):
            return None
        return found if yes else found.inverted()
    if name not in _GREATER | _LESS:
        return None
    if source not in (first, second):
        return Mask()
    level = constant(second if first is source else first) or 0.0
    return Mask((level, math.inf) if (name in _GREATER) == (first is source) else (-math.inf, level))
