# SPDX-License-Identifier: Apache-2.0
"""The raw operators of the cuda backend, on the emulated kernels: schemas, what they refuse, bad input."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from emulated_backend import (
    KEY,
    SPARSE,
    emulated,  # noqa: F401  a fixture
    geometry_of,
    needs_compiler,
    operands_of,
    raw_arguments,
)

from sparsebwd import backends
from sparsebwd.backends import cuda
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning

pytestmark = [pytest.mark.emulated, needs_compiler, pytest.mark.usefixtures("emulated")]


def test_schemas_say_what_is_written():
    problem = ConvProblem.parse("n2c4h5w5k3r3s3p1")
    sizes = problem.output_size
    operators, history = torch.ops.sparsebwd_emulated, torch.zeros(5, dtype=torch.int32)
    scales = torch.ones(sizes[0])
    arguments = (torch.ones(sizes), KEY, 1.0, 1.0, history, scales, True, torch.empty(sizes), torch.empty(3))
    torch.library.opcheck(operators.prune.default, arguments, test_utils="test_schema")
    tensors = {
        "input": torch.ones(problem.input_size),
        "weight": torch.ones(problem.weight_size),
        "key": KEY,
        "sigma_history": history,
        "scales": scales,
        "pruned": torch.empty(sizes),
        "grad_input": torch.empty(problem.input_size),
        "grad_weight": torch.empty(problem.weight_size),
    }
    arguments = raw_arguments(problem, torch.ones(sizes), **tensors)
    torch.library.opcheck(operators.conv2d_backward.default, arguments, test_utils="test_schema")


@pytest.mark.parametrize("text", [SPARSE, "n0c3h5w5k4r3s3", "n1c1h5w4k1r1s1"])
def test_opcheck(text, memory_format, generator):
    problem = ConvProblem.parse(text)
    input, weight, grad_output = operands_of(problem, generator, memory_format=memory_format)
    config = (KEY, Pruning(backend="emulated").text, 3, (True, True, True))
    operators = torch.ops.sparsebwd
    torch.library.opcheck(operators.conv2d_backward.default, (grad_output, input, weight, *geometry_of(problem), *config))
    torch.library.opcheck(operators.prune.default, (grad_output, *config[:2]))


def test_refusals():
    operators = torch.ops.sparsebwd_emulated
    for dtype in ("float32", "bfloat16", "float16"):
        assert operators.refusals((2, 16, 6, 5), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1, dtype) == ("", "")
    agb, wgc = operators.refusals((2, 6, 9, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6, "float32")
    assert agb and wgc and not agb.endswith(".")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n": 2**31}, "a size is above 2147483647"),
        ({"stride": (1, 2**31), "padding": (0, 2**31)}, "a stride, padding or dilation is above 2147483647"),
        ({"padding": (2**30, 0)}, "a side of the input with its padding is above"),
        ({"n": 0, "h": 2**20, "w": 2**25, "c": 8}, "more than 2^46 elements"),
    ],
)
def test_what_no_kernel_can_count_is_refused(changes, words):
    problem = replace(BAD, **changes)
    assert words in backends.get_backend("emulated").can_run(problem, "cpu", torch.float32)
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    operators = torch.ops.sparsebwd_emulated
    with pytest.raises(ValueError, match="which no kernel takes: "):
        operators.refusals(problem.input_size, problem.weight_size, *geometry, "float32")
    with pytest.raises(ValueError, match="which no kernel takes: "):
        operators.conv2d_backward(
            G, G, G, problem.input_size, problem.weight_size, *geometry, None, 0.0, 0.0, None, None, True, None, G, None, STATS
        )


def test_refusals_are_logged(caplog):
    problem = ConvProblem.parse("n2c6h7w8k6r3s3p1g6")
    cuda.refusals_of.cache_clear()
    with caplog.at_level(logging.DEBUG, "sparsebwd"):
        agb, wgc = cuda.refusals_of(torch.ops.sparsebwd_emulated, problem, torch.float32)
    for name, refusal in (("AGB", agb), ("WGC", wgc)):
        assert f"{problem} in torch.float32: no sparse {name}, since {refusal}" in caplog.text


G = torch.ones(2, 4, 3, 5)
STATS = torch.empty(3)
HISTORY = torch.zeros(5, dtype=torch.int32)
BAD = ConvProblem.parse("n2c6h3w5k4r3s3p1")


def _prune(g=G, key=KEY, coefficient=1.0, quantile=1.0, history=None, scales=None, out=None, stats=STATS):
    torch.ops.sparsebwd_emulated.prune(g, key, coefficient, quantile, history, scales, True, out, stats)


def _convolve(grad_output=G, **tensors):
    torch.ops.sparsebwd_emulated.conv2d_backward(*raw_arguments(BAD, grad_output, **tensors))


def _refusals(dtype="float32", groups=1):
    torch.ops.sparsebwd_emulated.refusals((2, 6, 3, 5), (4, 6, 3, 3), (1, 1), (1, 1), (1, 1), groups, dtype)


INPUT, WEIGHT = torch.ones(BAD.input_size), torch.ones(BAD.weight_size)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: _prune(G.to("meta")), "g: got a tensor on another device, accepted is"),
        (lambda: _prune(G.double()), "g: got a tensor of dtype Double, accepted are Float .*, BFloat16 and Half"),
        (lambda: _prune(G[0]), "g: got 3 dimensions, accepted are 4"),
        (lambda: _prune(G[:, ::2]), "g: got strides .* accepted are contiguous and channels_last"),
        (
            lambda: _prune(torch.empty(0, 2**31, 1, 1)),
            r"g: got shape \[0, 2147483648, 1, 1\], .* sizes up to 2147483647",
        ),
        (lambda: _prune(key=KEY.int()), "key: got Int of shape"),
        (lambda: _prune(key=KEY[:1]), r"key: got Long of shape \[1\], accepted"),
        (lambda: _prune(key=KEY.to("meta")), "key: got a tensor on another device, accepted is that of g"),
        (lambda: _prune(coefficient=-1.0), "sigma_coefficient: got -1, accepted are finite numbers >= 0"),
        (lambda: _prune(quantile=float("nan")), "quantile: got nan"),
        (lambda: _prune(history=HISTORY[:4]), r"sigma_history: got Int of shape \[4\], accepted is Int of shape \[5\]"),
        (lambda: _prune(history=HISTORY.float()), "sigma_history: got Float of shape"),
        (lambda: _prune(key=None, history=HISTORY), "sigma_history: got a tensor without a key"),
        (lambda: _prune(scales=torch.ones(3)), r"scales: got Float of shape \[3\], accepted is Float of shape \[2\]"),
        (lambda: _prune(scales=torch.ones(2).double()), "scales: got Double of shape"),
        (lambda: _prune(key=None, scales=torch.ones(2)), "scales: got a tensor without a key"),
        (lambda: _prune(out=G[:1]), r"out: got Float of shape \[1, 4, 3, 5\]"),
        (lambda: _prune(out=G.to(memory_format=torch.channels_last)), "out: got Float .* accepted are those of g"),
        (lambda: _prune(stats=STATS[:2]), r"stats: got Float of shape \[2\], accepted is Float of shape \[3\]"),
        (lambda: _prune(stats=STATS.double()), "stats: got Double of shape"),
        (lambda: _convolve(G.double()), "grad_output: got a tensor of dtype Double"),
        (lambda: _convolve(G[:1]), r"grad_output: got Float of shape \[1, 4, 3, 5\].* shape \[2, 4, 3, 5\]"),
        (lambda: _convolve(G.to("meta")), "grad_output: got a tensor on another device"),
        (lambda: _convolve(torch.ones(2, 4, 3, 10)[..., ::2]), "grad_output: got strides .* accepted are contiguous"),
        (lambda: _convolve(input_size=(2, 6, 3)), r"input_size: got \[2, 6, 3\], accepted are 4 sizes"),
        (lambda: _convolve(weight_size=(4, 5, 3, 3)), "groups: got 1 for 6 input channels"),
        (lambda: _convolve(weight_size=(4, 6, 9, 3)), "weight_size: got .* not larger than the input"),
        (lambda: _convolve(grad_input=INPUT), "weight: got None, accepted is a tensor if grad_input is wanted"),
        (lambda: _convolve(grad_weight=WEIGHT), "input: got None, accepted is a tensor if grad_weight is wanted"),
        (lambda: _convolve(weight=WEIGHT.half(), grad_input=INPUT), "weight: got Half .* grad_output's dtype, Float"),
        (lambda: _convolve(weight=WEIGHT, grad_input=INPUT[:1]), "grad_input: got Float of shape"),
        (lambda: _convolve(input=INPUT[:1], grad_weight=WEIGHT), "input: got Float of shape"),
        (lambda: _convolve(input=INPUT, grad_weight=WEIGHT[:1]), "grad_weight: got Float of shape"),
        (lambda: _convolve(input=INPUT.to("meta"), grad_weight=WEIGHT), "input: got a tensor on another device"),
        (lambda: _convolve(key=KEY), "pruned: got None, accepted is a tensor if there is a key"),
        (lambda: _convolve(pruned=G.clone()), "pruned: got a tensor, .* if there is a key, else None"),
        (lambda: _convolve(key=KEY, pruned=G.half()), "pruned: got Half of shape"),
        (lambda: _refusals("float64"), "dtype: got 'float64', accepted are 'float32', 'bfloat16' and 'float16'"),
        (lambda: _refusals(groups=3), "groups: got 3 for 6 input channels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
