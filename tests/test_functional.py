# SPDX-License-Identifier: Apache-2.0
"""prune_gradient and sparse_conv2d: keys, arguments, bad input. What they compute is tested in
test_pruning and test_parity."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import sparsebwd
from sparsebwd import reference
from sparsebwd.functional import sparse_conv2d
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, random_tensor


def _operands(generator, size=(2, 4, 7, 6), weight_size=(6, 4, 3, 3), dtype=torch.float32):
    x = random_tensor(size, generator=generator, dtype=dtype, integer=True).requires_grad_()
    w = random_tensor(weight_size, generator=generator, dtype=dtype, integer=True).requires_grad_()
    b = torch.ones(weight_size[0], dtype=dtype, requires_grad=True)
    return x, w, b


def _rng_is_used(function) -> bool:
    before = torch.get_rng_state()
    function()
    return not torch.equal(before, torch.get_rng_state())


# ---- prune_gradient


def test_prune_gradient_returns_a_named_tuple():
    grad = torch.randn(2, 8, 4, 4)
    torch.manual_seed(3)
    pruned = sparsebwd.prune_gradient(grad, percentile=90)
    assert pruned._fields == ("values", "tau", "sigma", "density")
    torch.manual_seed(3)
    for a, b in zip(pruned, sparsebwd.prune_gradient(grad)):
        assert_bit_equal(a, b)
    for scalar in pruned[1:]:
        assert scalar.shape == () and scalar.dtype == torch.float32
    assert not torch.equal(pruned.values, sparsebwd.prune_gradient(grad).values)


def test_prune_gradient_draws_its_key_from_the_generator():
    grad = torch.randn(2, 8, 4, 4)
    key = torch.empty(2, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(5))
    expected = reference.prune(grad, key, Pruning()).values
    generator = torch.Generator().manual_seed(5)
    assert not _rng_is_used(lambda: sparsebwd.prune_gradient(grad, 90, generator))
    actual = sparsebwd.prune_gradient(grad, 90, generator=torch.Generator().manual_seed(5)).values
    assert_bit_equal(actual, expected)
    assert not torch.equal(sparsebwd.prune_gradient(grad, 90, generator).values, expected)
    assert _rng_is_used(lambda: sparsebwd.prune_gradient(grad, 90))
    assert not _rng_is_used(lambda: sparsebwd.prune_gradient(grad, 50))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"percentile": 49}, ValueError, "percentile: got 49; accepted: 50 <= percentile < 100"),
        ({"percentile": 100}, ValueError, "percentile: got 100"),
        ({"percentile": float("nan")}, ValueError, "percentile: got nan"),
        ({"percentile": "90"}, TypeError, r"percentile: got '90'; accepted: a number in \[50, 100\)$"),
        ({"percentile": True}, TypeError, "percentile: got True"),
        ({"percentile": None}, TypeError, r"percentile: got None; accepted: a number in \[50, 100\)$"),
        ({"grad": [1.0]}, TypeError, "grad: got list; accepted: a torch.Tensor"),
        ({"grad": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "grad: got torch.int32"),
        ({"grad": torch.ones(2, 2, dtype=torch.complex64)}, TypeError, "grad: got torch.complex64"),
        ({"grad": torch.ones(3)}, ValueError, r"grad: got shape \(3,\)"),
        ({"grad": torch.ones(1, 1, 1, 1, 1)}, ValueError, "grad: got shape"),
        ({"generator": 3}, TypeError, "generator: got int"),
        ({"grad": torch.ones(2, 2, device="meta"), "generator": torch.Generator()}, ValueError, "generator: got one on cpu; accepted: one on meta"),
        ({"sigma_estimator": "printed"}, ValueError, "sigma_estimator: got 'printed'; accepted: 'corrected', 'as_printed'"),
        ({"backend": "abacus"}, ValueError, "backend: got 'abacus'"),
        ({"backend": ["cpu"]}, TypeError, r"backend: got \['cpu'\]; accepted: the name of a backend"),
    ],
)  # fmt: skip
def test_prune_gradient_with_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        sparsebwd.prune_gradient(**{"grad": torch.ones(2, 3), **arguments})


def test_prune_gradient_by_a_backend_that_cannot():
    with pytest.raises(RuntimeError, match="'dense' cannot run pruning"):
        sparsebwd.prune_gradient(torch.ones(2, 2, dtype=torch.float64), backend="dense")


# ---- sparse_conv2d


@pytest.mark.parametrize("placement", ["output", "input"])
@pytest.mark.parametrize("source", ["generator", "global"])
def test_gradients_are_those_of_the_reference(placement, source, backend, memory_format, generator):
    """Bias from the unpruned gradient, AGB and WGC from the pruned one, or AGB pruned after."""
    x, w, b = _operands(generator)
    with torch.no_grad():
        x = x.contiguous(memory_format=memory_format).requires_grad_()
    problem = ConvProblem.from_sizes(x.shape, w.shape, 1, 1)
    grad_output = random_tensor(problem.output_size, generator=generator)
    key_generator = torch.Generator().manual_seed(11)
    key = torch.empty(2, dtype=torch.int64).random_(generator=key_generator)
    torch.manual_seed(11)
    y = sparse_conv2d(
        x,
        w,
        b,
        1,
        1,
        percentile=90,
        placement=placement,
        backend=backend,
        generator=torch.Generator().manual_seed(11) if source == "generator" else None,
    )
    assert_bit_equal(y, F.conv2d(x, w, b, 1, 1))
    y.backward(grad_output)

    consumed = grad_output
    if placement == "output":
        consumed = reference.prune(grad_output, key, Pruning()).values
    with torch.no_grad():
        grad_input = reference.conv2d_input(problem, w, consumed).float()
        if placement == "input":
            grad_input = reference.prune(grad_input, key, Pruning()).values
        grad_weight = reference.conv2d_weight(problem, x, consumed).float()
    torch.testing.assert_close(x.grad, grad_input, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad, grad_weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.grad, grad_output.sum((0, 2, 3)))
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 1), "weight_size": (6, 4, 4, 2)},
        {"padding": "valid", "stride": (2, 1)},
        {"padding": (1, 0), "stride": 2, "bias": False},
        {"padding": [2], "dilation": [2, 2]},
        {"groups": 2, "weight_size": (6, 2, 3, 3)},
        {"groups": 4, "weight_size": (8, 1, 3, 3), "padding": 1, "bias": False},
        {"weight_size": (6, 4, 1, 1), "stride": 2},
        {"size": (1, 4, 7, 6)},
        {"size": (0, 4, 7, 6)},
        {"size": (4, 7, 6), "padding": "same"},
        {"size": (4, 7, 6), "bias": False, "weight_size": (6, 4, 2, 3), "padding": "same"},
    ],
    ids=str,
)
def test_without_pruning_gradients_are_those_of_torch(settings, backend, generator):
    """Exactly: operands are small integers."""
    settings = dict(settings)
    sizes = {name: settings.pop(name) for name in ("size", "weight_size") if name in settings}
    operands = _operands(generator, dtype=torch.float64, **sizes)
    if not settings.pop("bias", True):
        operands = (*operands[:2], None)
    expected = F.conv2d(*operands, **settings)
    grad_output = random_tensor(
        tuple(expected.shape), generator=generator, dtype=torch.float64, integer=True, density=0.5
    )
    wanted = torch.autograd.grad(expected, [t for t in operands if t is not None], grad_output)
    operands = [None if t is None else t.detach().float().requires_grad_() for t in operands]
    assert not _rng_is_used(lambda: sparse_conv2d(*operands, **settings, percentile=None, backend=backend))
    y = sparse_conv2d(*operands, **settings, percentile=None, backend=backend)
    assert_bit_equal(y, F.conv2d(*operands, **settings))
    actual = torch.autograd.grad(y, [t for t in operands if t is not None], grad_output.float())
    for a, b in zip(actual, wanted):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


@pytest.mark.parametrize("frozen", [(), ("x",), ("w",), ("b",), ("x", "w"), ("x", "b"), ("w", "b")])
def test_gradients_nobody_needs_are_not_computed(frozen, stats, generator):
    tensors = dict(zip("xwb", _operands(generator)))
    for name in frozen:
        tensors[name].requires_grad_(False)
    sparse_conv2d(*tensors.values(), percentile=90).sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name in frozen)
    assert len(stats) == (0 if frozen == ("x", "w") else 1)


def test_a_key_is_drawn_only_where_something_is_pruned(generator):
    x, w, b = _operands(generator)
    fixed = x.detach()
    assert _rng_is_used(lambda: sparse_conv2d(x, w, b))
    assert _rng_is_used(lambda: sparse_conv2d(fixed, w, b))
    assert _rng_is_used(lambda: sparse_conv2d(x, w.detach(), b, placement="input"))
    for arguments in (
        {"percentile": None},
        {"percentile": 50},
        {"input": fixed, "placement": "input"},
        {"input": fixed, "weight": w.detach()},
        {"generator": torch.Generator()},
    ):
        arguments = {"input": x, "weight": w, "bias": b, **arguments}
        assert not _rng_is_used(functools.partial(sparse_conv2d, **arguments))
    with torch.no_grad():
        assert not _rng_is_used(lambda: sparse_conv2d(x, w, b))
        assert_bit_equal(sparse_conv2d(x, w, b), F.conv2d(x, w, b))


def test_each_call_draws_other_numbers_and_the_seed_reproduces_them(generator):
    x, w, b = _operands(generator)
    grad_output = random_tensor((2, 6, 5, 4), generator=generator)

    def gradients():
        return torch.autograd.grad(sparse_conv2d(x, w, b), (x, w, b), grad_output)

    torch.manual_seed(1)
    first, second = gradients(), gradients()
    torch.manual_seed(1)
    for one, again in zip(first, gradients()):
        assert_bit_equal(one, again)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("placement", ["output", "input"])
def test_non_finite_gradients_arrive(value, placement, backend, generator):
    x, w, b = _operands(generator)
    grad_output = random_tensor((2, 6, 5, 4), generator=generator)
    grad_output[0, 1, 2, 3] = value
    sparse_conv2d(x, w, b, percentile=90, placement=placement, backend=backend).backward(grad_output)
    for grad in (x.grad, w.grad, b.grad):
        assert not torch.isfinite(grad).all()
    # The image without it is as if nothing had been pruned.
    expected = F.conv_transpose2d(grad_output[1:], w)
    torch.testing.assert_close(x.grad[1:], expected.detach(), rtol=1e-5, atol=1e-5)


def test_sizes_that_work_in_torch_work_here():
    for size, weight_size, settings in (
        ((1, 1, 1, 1), (1, 1, 1, 1), {}),
        ((2, 3, 1, 9), (4, 3, 1, 3), {"stride": (1, 3)}),
        ((2, 3, 2, 2), (4, 3, 3, 3), {"padding": 5}),
        ((1, 3, 5, 5), (4, 3, 5, 5), {}),
    ):
        x = torch.randn(size, requires_grad=True)
        w = torch.randn(weight_size, requires_grad=True)
        expected = torch.autograd.grad(F.conv2d(x, w, **settings).sum(), (x, w))
        actual = torch.autograd.grad(sparse_conv2d(x, w, **settings, percentile=None).sum(), (x, w))
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b)


X = {"input": torch.ones(2, 4, 6, 6, requires_grad=True)}


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"input": 3}, TypeError, "input: got int"),
        ({"input": torch.ones(2, 4, 6, 6).int()}, TypeError, "input: got torch.int32"),
        ({"input": torch.ones(2, 4, 6, 6).cfloat()}, TypeError, "input: got torch.complex64"),
        ({"input": torch.ones(4, 6)}, ValueError, r"input: got shape \(4, 6\)"),
        ({"input": torch.ones(2, 5, 6, 6)}, ValueError, "weight: got shape .*; the input has 5"),
        ({"input": torch.ones(2, 4, 6, 6, device="meta")}, ValueError, "weight: got device cpu; accepted: meta"),
        ({"weight": torch.ones(6, 4, 3, 3).double()}, TypeError, "weight: got torch.float64; accepted: torch.float32, the dtype of input"),
        ({"weight": torch.ones(6, 4, 3)}, ValueError, r"weight: got shape \(6, 4, 3\)"),
        ({"weight": torch.ones(6, 4, 7, 3)}, ValueError, "weight: the kernel 7x3 .* is larger than the input 6x6"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got shape \(5,\); accepted: \(6,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: got torch.float16"),
        ({"stride": 0}, ValueError, "stride: got"),
        ({"stride": 1.5}, TypeError, "stride: got 1.5"),
        ({"padding": -1}, ValueError, "padding: got"),
        ({"padding": "full"}, ValueError, "padding: got 'full'; accepted: 'valid', 'same'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding: got 'same' with stride"),
        ({"dilation": (1, 2, 3)}, ValueError, "dilation: got 3 values"),
        ({"groups": 3}, ValueError, "weight: got shape"),
        ({"groups": 0}, ValueError, "groups: got 0; accepted: at least 1"),
        ({"groups": True}, TypeError, "groups: got True; accepted: an int"),
        ({"groups": "2"}, TypeError, "groups: got '2'; accepted: an int"),
        ({"percentile": 49.9}, ValueError, "percentile: got 49.9"),
        ({"percentile": "x"}, TypeError, "percentile: got 'x'; .*or None for no pruning"),
        ({"placement": "both"}, ValueError, "placement: got 'both'; accepted: 'output', 'input'"),
        ({"sigma_estimator": ""}, ValueError, "sigma_estimator: got ''"),
        ({"backend": "abacus"}, ValueError, "backend: got 'abacus'; accepted: 'auto', "),
        ({"backend": ["cpu"]}, TypeError, r"backend: got \['cpu'\]; accepted: the name of a backend"),
        ({"generator": 1}, TypeError, "generator: got int"),
    ],
)  # fmt: skip
def test_sparse_conv2d_with_bad_input(arguments, error, message):
    good = {**X, "weight": torch.ones(6, 4, 3, 3), "bias": torch.ones(6)}
    with pytest.raises(error, match=message):
        sparse_conv2d(**{**good, **arguments})


def test_a_backend_that_cannot_run_is_refused_in_forward(generator):
    x, w, b = (t.detach().double().requires_grad_() for t in _operands(generator))
    with pytest.raises(RuntimeError, match="'dense' cannot run n2c4h7w6.*torch.float64"):
        sparse_conv2d(x, w, b, backend="dense")


def test_float16(generator):
    x, w, b = (t.detach().half().requires_grad_() for t in _operands(generator))
    y = sparse_conv2d(x, w, b, percentile=None)
    expected = torch.autograd.grad(F.conv2d(x, w, b).sum(), (x, w, b))
    for actual, wanted in zip(torch.autograd.grad(y.sum(), (x, w, b)), expected):
        assert actual.dtype == torch.float16
        torch.testing.assert_close(actual, wanted)
