# SPDX-License-Identifier: Apache-2.0
"""The registered operators: schemas, fakes, autograd, autocast, and what observers see."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsebwd
from sparsebwd import backends, decision
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, random_tensor

PROBLEMS = ["n2c6h7w8k4r3s3u2p1", "n2c6h7w8k4r3s2p1x0d2x1g2", "n0c3h5w5k4r3s3", "n1c1h5w4k1r1s1"]


def operands_of(text: str, dtype, memory_format, requires_grad=False):
    problem = ConvProblem.parse(text)
    generator = torch.Generator().manual_seed(1)
    input, weight, grad_output = (
        random_tensor(size, generator=generator, dtype=dtype, memory_format=memory_format, integer=True)
        for size in (problem.input_size, problem.weight_size, problem.output_size)
    )
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    for tensor in (input, weight):
        tensor.requires_grad_(requires_grad)
    return problem, input, weight, grad_output, geometry


@pytest.mark.parametrize(
    "text, percentile, placement, with_bias",
    [(text, 90.0, "output", True) for text in PROBLEMS]
    + [(PROBLEMS[0], 90.0, "input", True), (PROBLEMS[0], None, "output", True), (PROBLEMS[1], 90.0, "input", False)],
)
def test_opcheck_conv2d(text, percentile, placement, with_bias, memory_format):
    problem, input, weight, _, geometry = operands_of(text, torch.float32, memory_format, True)
    bias = torch.ones(problem.k, requires_grad=True) if with_bias else None
    key = torch.tensor([1, 2])
    config = (key, Pruning(percentile=percentile, placement=placement).text, 3)
    torch.library.opcheck(torch.ops.sparsebwd.conv2d.default, (input, weight, bias, *geometry, *config))


ALL = (True, True, True)
MASKS = [ALL, (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize(
    "text, output_mask",
    [(text, ALL) for text in PROBLEMS] + [(PROBLEMS[0], mask) for mask in MASKS[1:]],
)
def test_opcheck_conv2d_backward(text, output_mask, memory_format, backend):
    _, input, weight, grad_output, geometry = operands_of(text, torch.float32, memory_format)
    config = (torch.tensor([1, 2]), Pruning(backend=backend).text, 3, output_mask)
    torch.library.opcheck(torch.ops.sparsebwd.conv2d_backward.default, (grad_output, input, weight, *geometry, *config))


@pytest.mark.parametrize("text", PROBLEMS)
def test_opcheck_conv2d_input_and_weight(text, memory_format, backend):
    problem, input, weight, grad_output, geometry = operands_of(text, torch.float32, memory_format)
    torch.library.opcheck(
        torch.ops.sparsebwd.conv2d_input.default,
        (problem.input_size, weight, grad_output, *geometry, backend),
    )
    torch.library.opcheck(
        torch.ops.sparsebwd.conv2d_weight.default,
        (input, problem.weight_size, grad_output, *geometry, backend),
    )


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (0, 6, 3, 5), (1, 1, 1, 1)])
def test_opcheck_prune(shape, memory_format, dtype, backend):
    grad = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    torch.library.opcheck(torch.ops.sparsebwd.prune.default, (grad, torch.tensor([1, 2]), f"backend={backend}"))


def test_opcheck_draw_key():
    like = torch.randn(2, 3)
    torch.library.opcheck(torch.ops.sparsebwd.draw_key.default, (like, None))
    torch.library.opcheck(torch.ops.sparsebwd.draw_key.default, (like, torch.randn(1)))
    assert torch.Tag.nondeterministic_seeded in torch.ops.sparsebwd.draw_key.default.tags


def test_gradients_have_the_format_of_their_tensors(backend, dtype):
    formats = (torch.contiguous_format, torch.channels_last)
    for of_input in formats:
        for of_weight in formats:
            for of_grad in formats:
                problem, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], dtype, torch.contiguous_format)
                input = input.contiguous(memory_format=of_input)
                weight = weight.contiguous(memory_format=of_weight)
                grad_output = grad_output.contiguous(memory_format=of_grad)
                config = (torch.tensor([1, 2]), Pruning(percentile=None, backend=backend).text, 0)
                grads = torch.ops.sparsebwd.conv2d_backward(
                    grad_output, input, weight, *geometry, *config, (True, True, True)
                )
                assert grads[0].stride() == input.stride()
                assert grads[1].stride() == weight.stride()
                grad_input = torch.ops.sparsebwd.conv2d_input(
                    problem.input_size, weight, grad_output, *geometry, backend
                )
                grad_weight = torch.ops.sparsebwd.conv2d_weight(
                    input, problem.weight_size, grad_output, *geometry, backend
                )
                assert grad_input.is_contiguous(memory_format=of_grad)
                assert grad_weight.is_contiguous(memory_format=of_input)
                assert torch.equal(grads[0], grad_input)
                assert torch.equal(grads[1], grad_weight)


@pytest.mark.parametrize("text", ["n1c2h200w200k1r1s1", "n4c2h60w60k3r1s1"])
def test_bias_gradient_does_not_depend_on_the_number_of_threads(text, memory_format, dtype, generator):
    problem = ConvProblem.parse(text)
    operands = [
        random_tensor(size, generator=generator, dtype=dtype, memory_format=memory_format)
        for size in (problem.output_size, problem.input_size, problem.weight_size)
    ]
    geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
    config = (torch.tensor([1, 2]), Pruning(percentile=None).text, 0, (False, False, True))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.sparsebwd.conv2d_backward(*operands, *geometry, *config)[2])
    finally:
        torch.set_num_threads(threads)
    assert results[0].shape == (problem.k,)
    expected = operands[0].double().sum((0, 2, 3))
    torch.testing.assert_close(results[0].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    for other in results[1:]:
        assert_bit_equal(other, results[0])


def test_operands_in_any_layout(backend, generator):
    problem, input, weight, grad_output, geometry = operands_of(
        "n2c6h8w8k6r3s3p1", torch.float32, torch.contiguous_format
    )
    config = (torch.tensor([1, 2]), Pruning(backend=backend).text, 0, (True, True, True))
    expected = torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config)
    views = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (grad_output, input, weight)]
    assert not any(view.is_contiguous() for view in views)
    for actual, wanted in zip(torch.ops.sparsebwd.conv2d_backward(*views, *geometry, *config), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)
    ones = torch.ones(()).expand(problem.output_size)
    for actual, wanted in zip(
        torch.ops.sparsebwd.conv2d_backward(ones, input, weight, *geometry, *config),
        torch.ops.sparsebwd.conv2d_backward(ones.contiguous(), input, weight, *geometry, *config),
    ):
        assert_bit_equal(actual, wanted)


@pytest.mark.parametrize("output_mask", [(True, False, True), (False, True, True), (False, False, True)])
def test_only_the_gradients_asked_for_are_computed(output_mask, register):
    """The composition in the base class, and that no backend is called for a bias alone."""
    calls = []

    class Spy(type(backends.get_backend("reference"))):
        name = "spy"

        def prune(self, *args):
            calls.append("prune")
            return super().prune(*args)

        def conv2d_input(self, *args):
            calls.append("input")
            return super().conv2d_input(*args)

        def conv2d_weight(self, *args):
            calls.append("weight")
            return super().conv2d_weight(*args)

    register(Spy())
    _, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format)
    for placement in ("output", "input"):
        config = (torch.tensor([1, 2]), Pruning(placement=placement, backend="spy").text, 0, output_mask)
        calls.clear()
        grads = torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config)
        wanted = [name for name, want in zip(("input", "weight"), output_mask) if want]
        if placement == "output" and wanted:
            wanted.insert(0, "prune")
        elif output_mask[0]:
            wanted.insert(1, "prune")
        assert calls == wanted
        for grad, want, like in zip(grads, output_mask, (input, weight, weight[:, 0, 0, 0])):
            assert grad.shape == (like.shape if want else (0,))
        assert torch.equal(grads[2], grad_output.sum((0, 2, 3)))


def test_default_device_does_not_matter(backend, memory_format, stats):
    _, input, weight, grad_output, geometry = operands_of("n2c16h8w8k16r3s3p1", torch.float32, memory_format)
    key = torch.tensor([1, 2])
    config = (key, Pruning(backend=backend).text, 0, (True, True, True))
    expected = torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config)
    pruned = torch.ops.sparsebwd.prune(grad_output, key, f"backend={backend}")
    with torch.device("meta"):
        actual = torch.ops.sparsebwd.conv2d_backward(grad_output, input, weight, *geometry, *config)
        again = torch.ops.sparsebwd.prune(grad_output, key, f"backend={backend}")
    for one, two in zip((*actual, *again), (*expected, *pruned)):
        assert_bit_equal(one, two)
    assert stats[1].sigma.device == stats[1].density.device == torch.device("cpu")


def test_not_differentiable():
    problem, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format, True)
    results = [
        torch.ops.sparsebwd.conv2d_input(problem.input_size, weight, grad_output, *geometry, "auto"),
        torch.ops.sparsebwd.conv2d_weight(input, problem.weight_size, grad_output, *geometry, "auto"),
        torch.ops.sparsebwd.prune(input, torch.tensor([1, 2]), "")[0],
    ]
    for result in results:
        with pytest.raises(RuntimeError, match="is not differentiable"):
            result.sum().backward()


def test_double_backward_raises():
    _, input, weight, _, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format, True)
    output = torch.ops.sparsebwd.conv2d(
        input, weight, None, *geometry, torch.tensor([1, 2]), Pruning(percentile=None).text, 0
    )
    (grad,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward .* not supported"):
        grad.square().sum().backward()


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_the_convolution_of_torch_does(amp_dtype):
    problem, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format, True)
    config = (torch.tensor([1, 2]), Pruning(percentile=None, backend="reference").text, 0)
    with torch.autocast("cpu", amp_dtype):
        output = torch.ops.sparsebwd.conv2d(input, weight, None, *geometry, *config)
        expected = torch.nn.functional.conv2d(input, weight, None, *geometry)
        half = torch.ops.sparsebwd.conv2d_input(problem.input_size, weight, grad_output, *geometry, "reference")
        kept = torch.ops.sparsebwd.prune(grad_output, config[0], "")[0]
        double = torch.ops.sparsebwd.conv2d(input.double(), weight.double(), None, *geometry, *config)
    assert_bit_equal(output, expected)
    assert output.dtype == half.dtype == amp_dtype
    assert kept.dtype == torch.float32 and double.dtype == torch.float64
    output.sum().backward()
    assert input.grad.dtype == weight.grad.dtype == torch.float32


def test_modes_see_the_operators():
    """Autograd goes on to an implementation at once only where the dispatcher would."""
    seen = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    _, input, weight, _, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format, True)
    config = (torch.tensor([1, 2]), Pruning().text, 0)
    with Spy():
        torch.ops.sparsebwd.conv2d(input, weight, None, *geometry, *config).sum().backward()
    ours = [function for function in seen if function.namespace == "sparsebwd"]
    assert ours == [torch.ops.sparsebwd.conv2d.default, torch.ops.sparsebwd.conv2d_backward.default]


def test_views_that_negate():
    """Their numbers in memory have the other sign; the dispatcher has to make them real first."""
    grad, key = torch.randn(2, 6, 3, 5), torch.tensor([1, 2])
    actual = torch.ops.sparsebwd.prune(torch._neg_view(grad), key, "")
    for one, two in zip(actual, torch.ops.sparsebwd.prune(-grad, key, "")):
        assert_bit_equal(one, two)


@pytest.mark.parametrize("kind", ["gradient", "input"])
def test_tensors_of_zeros_without_memory(kind):
    """PyTorch's own, such as tangents and gradients that are known to be 0: their address is 0."""
    x, weight = torch.ones(2, 3, 6, 6), torch.ones(4, 3, 3, 3, requires_grad=True)
    if kind == "input":
        x = torch._efficientzerotensor(x.shape).contiguous()
    name = "cpu" if "cpu" in backends.available_backends() else "auto"
    output = sparsebwd.functional.sparse_conv2d(x, weight, percentile=None, backend=name)
    zeros = torch._efficientzerotensor(output.shape) if kind == "gradient" else torch.ones_like(output)
    for gradient in (zeros, zeros.contiguous()):
        (grad,) = torch.autograd.grad(output, weight, gradient, retain_graph=True)
        assert not grad.any() and grad.shape == weight.shape


def test_shapes_that_do_not_fit():
    problem, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format)
    wrong = grad_output[:, :, 1:]
    with pytest.raises(ValueError, match="grad_output: got shape"):
        torch.ops.sparsebwd.conv2d_input(problem.input_size, weight, wrong, *geometry, "auto")
    with pytest.raises(ValueError, match="grad_output: got shape"):
        torch.ops.sparsebwd.conv2d_weight(input, problem.weight_size, wrong, *geometry, "auto")


# ---- observers


def test_observers_see_every_backward_pass(backend, stats):
    problem, input, weight, grad_output, geometry = operands_of(
        "n2c6h8w8k6r3s3p1", torch.float32, torch.contiguous_format
    )
    key = torch.tensor([1, 2])
    expected = torch.ops.sparsebwd.prune(grad_output, key, "backend=reference")
    for percentile, placement in ((90.0, "output"), (90.0, "input"), (None, "output")):
        torch.ops.sparsebwd.conv2d_backward(
            grad_output,
            input,
            weight,
            *geometry,
            key,
            Pruning(percentile, placement, backend=backend).text,
            7,
            (True, True, False),
        )
    assert len(stats) == 3
    for record in stats:
        assert record.layer_id == 7 and record.backend == backend and record.problem == problem
        assert record.numel == grad_output.numel() and record.seconds > 0
    output, input, none = stats
    assert_bit_equal(output.tau, expected[1])
    assert_bit_equal(output.sigma, expected[2])
    assert_bit_equal(output.density, expected[3])
    # The consumed gradient is not the pruned one here.
    assert input.density == none.density == (grad_output != 0).float().mean()
    assert input.tau > 0 and none.tau is None and none.sigma is None
    assert (none.pruning.percentile, input.pruning.placement) == (None, "input")


def test_geometry_is_looked_up_once():
    decision.problem_of.cache_clear()
    problem, input, weight, grad_output, geometry = operands_of(PROBLEMS[0], torch.float32, torch.contiguous_format)
    for _ in range(3):
        torch.ops.sparsebwd.conv2d_input(problem.input_size, weight, grad_output, *geometry, "auto")
    assert decision.problem_of.cache_info().misses == 1
