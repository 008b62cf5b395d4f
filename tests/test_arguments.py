# SPDX-License-Identifier: Apache-2.0
"""Every public call with every argument replaced by what it is not: TypeError or ValueError naming the argument."""

from __future__ import annotations

import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import sparsebwd
from sparsebwd import backends, data, functional, grad, models
from sparsebwd.arguments import MOST, as_float, as_int, check_flag, shown
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import DEFAULT


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


def _kinds_of_tensors():
    ragged = [torch.randn(2, 3), torch.randn(1, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that these are prototypes, or deprecated
        return {
            "a sparse tensor": torch.eye(3).to_sparse(),
            "a CSR tensor": torch.eye(3).to_sparse_csr(),
            "a nested tensor": torch.nested.nested_tensor(ragged),
            "a jagged tensor": torch.nested.nested_tensor(ragged, layout=torch.jagged),
            "a quantised tensor": torch.quantize_per_tensor(torch.randn(2, 3, 6, 6), 0.1, 0, torch.quint8),
        }


X, W, G = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 4, 4)

# Never accepted, for whatever argument.
JUNK = {
    "object": object(),
    "unprintable": Unprintable(),
    "bytes": b"\x01\x02",
    "bytearray": bytearray(b"\x01"),
    "complex": 1j,
    "dict": {"a": 1},
    "set": {3},
    "function": len,
    "integer beyond 64 bits": 2**70,
    "-2**63": -(2**63),
    "an integer of 5000 digits": 10**5000,
    "NaN": float("nan"),
    "array of strings": np.array(["output", "auto"]),
    "array of bools": np.array([True, False]),
    "tensor of bools": torch.tensor([True, False]),
    **_kinds_of_tensors(),
    "a complex tensor": torch.zeros(2, 3, 6, 6, dtype=torch.complex64),
    "a tensor of integers": torch.zeros(2, 3, 6, 6, dtype=torch.int64),
    "a NumPy array": np.zeros((2, 3, 6, 6), np.float32),
}
BOOL = {"True": True, "np.False_": np.bool_(False), "a bool tensor": torch.tensor(True)}
TEXT = {"text": "one", "a number as text": "3", "text of 10000 letters": "x" * 10_000}
NUMBERS = {"float": 2.5, "-1": -1}
NONE = {"None": None}

_tensor = {**JUNK, **BOOL, **TEXT, **NUMBERS, "a list": [[1.0]]}
_size = {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE, "three": (1, 2, 3), "bool in it": (2, True, 6, 6), "beyond": (2, 3, 2**63, 6)}
_integer = {**JUNK, **BOOL, **TEXT, **NONE, "float": 2.5, "a list": [1], "a tensor": torch.tensor([1]), "2**63": 2**63}
_pair = {**JUNK, **BOOL, **TEXT, **NONE, "float": 2.5, "three": (1, 2, 3), "bool in it": (1, True), "beyond": (1, 2**63)}
_choice = {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE, "a list": ["output"], "an empty string": ""}
_percentile = {**JUNK, **BOOL, **TEXT, **NUMBERS, "a list": [90.0], "a tensor": torch.tensor([90.0])}
_percentile["below 100, and as a float not"] = 100 - Fraction(1, 10**30)
_density = {**JUNK, **BOOL, **TEXT, **NUMBERS, "0": 0, "above 1": 1 + 2**-40, "2**63": 2**63, "infinity": float("inf"), "a list": [0.5]}
_density["above 0, and as a float not"] = Fraction(1, 10**400)
_variance = {**JUNK, **BOOL, **TEXT, "-1": -1, "infinity": float("inf"), "a list": [0.5], "a tensor": torch.tensor([0.5])}
_variance.pop("integer beyond 64 bits")  # a number such as any other
_granularity = {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE, "an empty string": "", "no width": ("row",), "two": ("row", 4, 4)}
_granularity |= {
    f"width {name}": ("row", value) for name, value in {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE, "0": 0, "2**63": 2**63}.items()
}
_granularity |= {"a list": ["row", 4], "an array": np.array(["row", "4"]), "another": ("channel", 4), "text in text": "row:4"}
_flag = {**JUNK, **TEXT, **NUMBERS, "a list": [True], "an empty string": ""}
_module = {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE, "a class": nn.Conv2d}
_geometry = {"stride": _pair, "padding": _pair, "dilation": _pair, "groups": _integer}
_amount = {"percentile": _percentile, "density": _density, "variance": _variance, "granularity": _granularity}
_amount["noise"] = {**_variance, "0": 0}
_pruning = {name: _choice for name in ("placement", "backend", "sigma_estimator", "where", "threshold", "importance")} | _amount

CONV = dict(in_channels=3, out_channels=4, kernel_size=3)
PROBLEM = dict(n=2, c=3, h=6, w=6, k=4, r=3, s=3)

# The call, arguments that it accepts, and for each argument what it does not.
CALLS = {
    "prune_gradient": (
        sparsebwd.prune_gradient,
        dict(grad=G),
        dict(
            grad={**_tensor, **NONE},
            **{name: values for name, values in _amount.items() if name not in ("percentile", "noise")},
            percentile={**_percentile, **NONE},
            generator=_tensor,
            threshold=_choice,
            sigma_estimator=_choice,
            backend=_choice,
            sigma_history=_tensor,
        ),
    ),
    "sparse_conv2d": (
        functional.sparse_conv2d,
        dict(input=X.requires_grad_(), weight=W),
        dict(
            input={**_tensor, **NONE},
            weight={**_tensor, **NONE},
            bias=_tensor,
            **_geometry,
            **_pruning,
            generator=_tensor,
            layer_id=_integer,
            sigma_history=_tensor,
        ),
    ),
    "conv2d_input": (
        grad.conv2d_input,
        dict(input_size=X.shape, weight=W, grad_output=G),
        dict(input_size=_size, weight={**_tensor, **NONE}, grad_output={**_tensor, **NONE}, **_geometry, backend=_choice),
    ),
    "conv2d_weight": (
        grad.conv2d_weight,
        dict(input=X, weight_size=W.shape, grad_output=G),
        dict(input={**_tensor, **NONE}, weight_size=_size, grad_output={**_tensor, **NONE}, **_geometry, backend=_choice),
    ),
    "SparseConv2d": (
        sparsebwd.SparseConv2d,
        CONV,
        dict(
            in_channels=_integer,
            out_channels=_integer,
            kernel_size=_pair,
            **_geometry,
            bias=_flag,
            padding_mode=_choice,
            dtype={**JUNK, **BOOL, **TEXT, "a NumPy dtype": np.float32, "complex": torch.complex64, "int": torch.int32},
            **_pruning,
        ),
    ),
    "SparseConv2d.from_conv2d": (
        sparsebwd.SparseConv2d.from_conv2d,
        dict(conv=nn.Conv2d(3, 4, 3)),
        dict(conv=_module, **_pruning),
    ),
    "SparseConv2d()": (sparsebwd.SparseConv2d(**CONV), dict(input=X), dict(input={**_tensor, **NONE})),
    "SparseConv2d().eval()": (
        sparsebwd.SparseConv2d(**CONV).eval(),
        dict(input=X),
        # What nn.Conv2d does with tensors stays as it is.
        dict(input={name: value for name, value in {**_tensor, **NONE}.items() if not isinstance(value, torch.Tensor)}),
    ),
    "Pruning": (sparsebwd.Pruning, {}, dict(**_pruning)),
    "convert": (
        sparsebwd.convert,
        dict(model=nn.Conv2d(3, 4, 3)),
        dict(
            model=_module,
            **_pruning,
            exclude={name: value for name, value in {**JUNK, **BOOL, **TEXT, **NUMBERS, **NONE}.items()},
        ),
    ),
    "revert": (sparsebwd.revert, dict(model=nn.Conv2d(3, 4, 3)), dict(model=_module)),
    "conversion_report": (sparsebwd.conversion_report, dict(model=nn.Conv2d(3, 4, 3)), dict(model=_module)),
    "DensityMonitor": (
        sparsebwd.DensityMonitor,
        dict(model=sparsebwd.SparseConv2d(**CONV)),
        dict(model={**_module, "no layer": nn.ReLU()}),
    ),
    "ConvProblem": (ConvProblem, PROBLEM, {**{name: _integer for name in PROBLEM}, **_geometry}),
    "models.create": (
        models.create,
        dict(name="resnet18", num_classes=10),
        dict(name=_choice, num_classes={**_integer, "0": 0}, form=_choice),
    ),
    "data.load": (
        data.load,
        dict(name="digits"),
        dict(
            name=_choice,
            image_size={**_integer, "0": 0},
            crop=_choice,
            stream=_flag,
            strict=_flag,
            data_dir={**JUNK, **BOOL, **NUMBERS},
            cache_dir={**JUNK, **BOOL, **NUMBERS},
        ),
    ),
    "data.Batches": (
        data.Batches,
        dict(images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.zeros(4, np.int64), batch_size=2, seed=0),
        dict(
            batch_size={**_integer, "0": 0, "5": 5},
            seed={**_integer, "-1": -1, "2**63": 2**64},
            augment=_flag,
            mirror=_flag,
            crop=_choice,
            rank={**_integer, "1": 1},
            world_size={**_integer, "0": 0},
            workers={**_integer, "-1": -1},
        ),
    ),
    "backends.register": (backends.register, None, dict(backend={**JUNK, **TEXT, **NONE, "a class": backends.DenseBackend})),
    "backends.get_backend": (backends.get_backend, dict(name="cpu"), dict(name=_choice)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_every_argument_is_checked(call):
    function, accepted, wrong = CALLS[call]
    if accepted is not None:
        function(**accepted)
    for name, values in wrong.items():
        named = {"name": "backend"}.get(name, name) if function is backends.get_backend else name
        for what, value in values.items():
            with pytest.raises((TypeError, ValueError)) as caught:
                function(**{**(accepted or {}), name: value})
                pytest.fail(f"{call}({name}={what}) is accepted")
            message = str(caught.value)
            assert re.match(rf"{named}: .", message), (call, name, what, message)
            assert "accepted" in message or "call sparsebwd.convert" in message, (call, name, what, message)
            assert "\n" not in message and len(message) < 700, (call, name, what, message)


@pytest.mark.parametrize("name, values", CALLS["Pruning"][2].items())
def test_attributes_of_layers_are_checked(name, values):
    layer = sparsebwd.SparseConv2d(**CONV)
    before = layer.pruning
    # nn.Module keeps modules and parameters that are assigned, whatever the name.
    for value in (*values.values(), nn.Linear(1, 1), nn.Parameter(torch.ones(1))):
        with pytest.raises((TypeError, ValueError), match=f"{name}: got .*accepted: "):
            setattr(layer, name, value)
    with pytest.raises(TypeError, match="pruning: got Linear; accepted: a sparsebwd.Pruning"):
        layer.pruning = nn.Linear(1, 1)
    assert layer.pruning is before and not list(layer.children())


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_integers_of_every_kind(value):
    assert as_int(value, "layer_id") == 3 and type(as_int(value, "layer_id")) is int
    assert sparsebwd.SparseConv2d(value, 4, value, groups=1).kernel_size == (3, 3)
    assert ConvProblem(**{**PROBLEM, "n": value}).n == 3


def test_numbers_of_every_kind():
    for value in (75, 75.0, np.float32(75), np.int64(75), Fraction(75), DEFAULT):
        assert type(as_float(value, "percentile")) is float and sparsebwd.Pruning(value).percentile == value
    assert sparsebwd.Pruning(variance=10**70).variance == 1e70
    with pytest.raises(ValueError, match="variance: got .*; accepted: a number, 0 <= variance < infinity, or None"):
        sparsebwd.Pruning(variance=10**400)


def test_limits_of_integers():
    assert as_int(MOST, "n") == MOST and as_int(-MOST, "n") == -MOST
    for value in (MOST + 1, -MOST - 1):
        with pytest.raises(ValueError, match=r"n: got -?9223372036854775808; accepted: at most 2\^63 - 1"):
            as_int(value, "n")
    with pytest.raises(ValueError, match="n: got 11; accepted: at most 10"):
        as_int(11, "n", most=10)


def test_flags():
    assert [check_flag(value, "bias") for value in (True, 0, np.True_, None)] == [True, False, True, False]
    assert sparsebwd.SparseConv2d(3, 4, 3, bias=None).bias is None  # as of nn.Conv2d


def test_values_are_shown_in_one_short_line():
    assert shown("a\nb") == "'a\\nb'" and "\n" not in shown(np.zeros((50, 50)))
    assert len(shown("x" * 10_000)) == 200
    assert shown(Unprintable()) == "Unprintable"


def test_monitor_left_twice():
    monitor = sparsebwd.DensityMonitor(sparsebwd.SparseConv2d(**CONV))
    with monitor:
        with pytest.raises(RuntimeError, match="is active already"):
            monitor.__enter__()
    with pytest.raises(RuntimeError, match="is not active"):
        monitor.__exit__(None, None, None)
    with pytest.raises(TypeError, match="writer: got str; accepted: "):
        monitor.add_scalars("runs", 1)
