# SPDX-License-Identifier: Apache-2.0
"""The dense kernels for the backward pass of depthwise convolutions, against the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsebwd import SparseConv2d, grad, reference
from sparsebwd.backends import available_backends, base, dense, depthwise
from sparsebwd.backends.dense import convolution_backward
from sparsebwd.problem import ConvProblem
from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor

if "cpu" not in available_backends():
    pytest.skip("the cpu backend is not built", allow_module_level=True)

RAW = torch.ops.sparsebwd_cpu
FORMATS = [torch.contiguous_format, torch.channels_last]
SMALL = ConvProblem.parse("n2c5h6w7k5r3s3p1g5")


def _geometry(problem):
    return problem.stride, problem.padding, problem.dilation


def _operands(problem, dtype, formats, integer=True, seed=0):
    """(grad_output, input, weight)"""
    generator = torch.Generator().manual_seed(seed)
    sizes = problem.output_size, problem.input_size, problem.weight_size
    return [
        fenced(random_tensor(size, generator=generator, dtype=dtype, integer=integer, memory_format=memory_format))
        for size, memory_format in zip(sizes, formats, strict=True)
    ]


def _backward(problem, grad_output, input=None, weight=None, memory_format=torch.contiguous_format):
    """Gradients of the input, if there is a weight, and of the weight, if there is an input."""
    with poisoned_memory():
        grad_input = torch.empty(problem.input_size, dtype=grad_output.dtype, memory_format=memory_format)
        grad_weight = torch.empty(problem.weight_size, dtype=grad_output.dtype)
    grad_input, grad_weight = (None if weight is None else grad_input), (None if input is None else grad_weight)
    sizes = problem.input_size, problem.weight_size
    RAW.depthwise_backward(grad_output, input, weight, *sizes, *_geometry(problem), grad_input, grad_weight)
    return grad_input, grad_weight


def _assert_right(problem, dtype, formats, seed=0):
    grad_output, input, weight = _operands(problem, dtype, formats[:3], seed=seed)
    grad_input, grad_weight = _backward(problem, grad_output, input, weight, formats[3])
    expected = reference.conv2d_input(problem, weight, grad_output)
    assert_bit_equal(grad_input + 0, expected.to(dtype) + 0, f"AGB of {problem}")
    expected = reference.conv2d_weight(problem, input, grad_output)
    assert_bit_equal(grad_weight + 0, expected.to(dtype) + 0, f"WGC of {problem}")
    assert_bit_equal(_backward(problem, grad_output, None, weight, formats[3])[0] + 0, grad_input + 0, "AGB alone")
    assert_bit_equal(_backward(problem, grad_output, input)[1], grad_weight, "WGC alone")


@pytest.mark.isa
@pytest.mark.parametrize(
    "text",
    [
        "n2c3h5w7k3r3s3p1g3",
        "n1c16h9w9k16r3s3u2p1g16",
        "n3c17h8w11k17r3s3u2p1d2g17",
        "n2c20h12w12k40r3s3p1g20",
        "n1c40h14w13k40r5s5p2g40",
        "n2c33h15w9k33r7s7p3g33",
        "n1c1h4w4k3r1s1g1",
        "n1c8h10w6k8r5s3u3x2p4x1d1x3g8",
        "n0c4h5w5k4r3s3p1g4",
        "n1c2h150w200k2r3s3p1g2",
        "n1c6h20w30k6r11s12p6g6",
        "n2c80h40w40k80r3s3u2p1g80",  # bands, and channel blocks, of what is read in place
    ],
)
def test_gradients_are_right_to_the_bit(text, dtype, memory_format):
    _assert_right(ConvProblem.parse(text), dtype, [memory_format] * 4)


def _draw(rng):
    while True:
        c, r = rng.choice([1, 3, 8, 15, 17, 40, 70]), rng.choice([1, 2, 3, 3, 5, 7, 11])
        pair = lambda low, high: (rng.randint(low, high), rng.randint(low, high))  # noqa: E731
        try:
            return ConvProblem(
                n=rng.choice([0, 1, 2, 5]), c=c, h=rng.randint(1, 24), w=rng.randint(1, 24), k=c * rng.choice([1, 1, 2, 3]),
                r=r, s=rng.choice([r, r, 1, 3, 12]), stride=pair(1, 3), padding=pair(0, 6), dilation=pair(1, 3), groups=c,
            )  # fmt: skip
        except ValueError:
            continue


@pytest.mark.isa
def test_random_problems_in_mixed_layouts_are_right_to_the_bit():
    rng = random.Random(0)
    for seed in range(60):
        problem, dtype = _draw(rng), rng.choice([torch.float32, torch.bfloat16])
        _assert_right(problem, dtype, [rng.choice(FORMATS) for _ in range(4)], seed)


@pytest.mark.isa
@pytest.mark.parametrize("text", ["n4c24h28w28k24r3s3p1g24", "n2c16h30w30k16r7s7p3g16", "n8c32h9w9k32r5s5u2p2g32"])
def test_errors_are_bounded(text, dtype, memory_format):
    problem = ConvProblem.parse(text)
    grad_output, input, weight = _operands(problem, dtype, [memory_format] * 3, integer=False)
    results = _backward(problem, grad_output, input, weight, memory_format)
    exact = convolution_backward(problem, grad_output.double(), input.double(), weight.double(), (True, True))
    # Dense in float32, rounded: kernels of 16 bits are less accurate on some machines, and wrong on others.
    single = convolution_backward(problem, grad_output.float(), input.float(), weight.float(), (True, True))
    for result, expected, other in zip(results, exact, single):
        assert_error_bounded(result, expected, other.to(dtype))


def test_bits_do_not_depend_on_threads(dtype, memory_format):
    problem = ConvProblem.parse("n5c70h19w17k70r3s3u1p1g70")
    operands = _operands(problem, dtype, [memory_format] * 3, integer=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = _backward(problem, *operands)
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for result, wanted in zip(_backward(problem, *operands), expected):
                assert_bit_equal(result, wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (replace(SMALL, groups=1), "not depthwise"),
        (replace(SMALL, stride=(9, 1)), "a stride is above 8"),
        (replace(SMALL, stride=(1, 2**30)), "a stride is above 8"),
        (replace(SMALL, r=2**10, s=2**10, padding=(2**10, 2**10)), "more than 16384 elements"),
        (replace(SMALL, k=5 * 2**12), "more than 16384 elements"),
        (replace(SMALL, r=2**30, s=1, padding=(2**29, 1)), "more than 16384 elements"),
        (replace(SMALL, w=2**27), "rows are too long"),
        (replace(SMALL, dilation=(1, 2**25), padding=(1, 2**25)), "taps too far apart"),
        (replace(SMALL, dilation=(2**13, 2**13), padding=(2**13, 2**13)), "taps too far apart"),
    ],
    ids=str,
)
def test_what_could_overflow_is_refused(problem, reason):
    assert reason in RAW.depthwise_refusal(problem.input_size, problem.weight_size, *_geometry(problem), problem.groups)
    if problem.groups == 1:
        return
    tensor = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"which no kernel takes: .*{reason}"):
        RAW.depthwise_backward(
            tensor, tensor, tensor, problem.input_size, problem.weight_size, *_geometry(problem), tensor, tensor
        )


def test_taps_that_reach_far_are_right():
    for dilation in ((1, 2**10), (2**10, 1), (200, 200)):
        problem = replace(SMALL, dilation=dilation, padding=dilation)
        _assert_right(problem, torch.float32, FORMATS * 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_output": torch.ones(2, 5, 6, 6)}, "grad_output: got Float of shape"),
        ({"input": torch.ones(2, 5, 6, 7).bfloat16()}, "input: got BFloat16"),
        ({"input": torch.ones(2, 5, 7, 6).transpose(2, 3)}, "accepted is a channels_last tensor, or a contiguous one, of"),
        ({"weight": None}, "weight: got None"),
        ({"input": None}, "input: got None"),
        ({"grad_weight": torch.ones(5, 1, 3, 2)}, "grad_weight: got shape"),
        ({"grad_output": torch.ones(2, 5, 6, 7).double()}, "grad_output: got a tensor of dtype Double"),
    ],
)
def test_bad_input(change, message):
    names = ("grad_output", "input", "weight", "grad_input", "grad_weight")
    shapes = SMALL.output_size, SMALL.input_size, SMALL.weight_size, SMALL.input_size, SMALL.weight_size
    tensors = {name: torch.ones(shape) for name, shape in zip(names, shapes)} | change
    grad_output, input, weight, *results = (tensors[name] for name in names)
    with pytest.raises(ValueError, match=message):
        RAW.depthwise_backward(
            grad_output, input, weight, SMALL.input_size, SMALL.weight_size, *_geometry(SMALL), *results
        )


# ---- in "auto"

LARGE = "n2c16h8w9k16r5s5p2g16"
NARROW = "n2c16h8w9k16r3s3p1g16"


_kept = {name: getattr(RAW, name) for name in ("depthwise_backward", "depthwise_refusal")}


@pytest.fixture
def avx2(monkeypatch):
    """The choice as on a CPU with AVX2, without PyTorch's kernels for bfloat16."""
    base.forget_choices()
    monkeypatch.setattr(depthwise, "_raw", SimpleNamespace(isa=lambda: "avx2", **_kept))
    monkeypatch.setattr(dense, "is_native", lambda dtype: False)
    yield
    base.forget_choices()


@pytest.mark.parametrize(
    "text, memory_format, masks",
    [
        (LARGE, torch.contiguous_format, {(True, True), (True, False), (False, True)}),
        (LARGE, torch.channels_last, {(True, True), (False, True)}),
        (NARROW, torch.contiguous_format, {(True, True), (True, False)}),
        (NARROW, torch.channels_last, set()),
        ("n64c128h16w16k128r3s3p1g128", torch.channels_last, {(True, True)}),
        ("n64c128h32w32k128r3s3u2p1g128", torch.channels_last, set()),
        ("n2c16h8w9k32r5s5p2g16", torch.contiguous_format, set()),
        ("n2c16h8w9k16r3s3p1g4", torch.contiguous_format, set()),
        ("n2c8h8w9k8r3s3p1g8", torch.contiguous_format, set()),
        ("n2c16h8w9k16r3s3u3p1g16", torch.contiguous_format, set()),
    ],
)
def test_auto_takes_them_where_they_are_faster(text, memory_format, masks, dtype, avx2):
    problem = ConvProblem.parse(text)
    grad_output = torch.empty(problem.output_size, dtype=dtype).contiguous(memory_format=memory_format)
    wanted = [(True, True), (True, False), (False, True)]
    assert {mask for mask in wanted if depthwise.is_faster(problem, grad_output, mask)} == masks


@pytest.mark.parametrize("text", [LARGE, NARROW, "n2c24h9w9k24r3s3u2p1g24"])
@pytest.mark.parametrize("percentile", [None, 90.0])
def test_layers_in_auto(text, percentile, memory_format, dtype, stats, avx2, caplog):
    problem = ConvProblem.parse(text)
    layer = SparseConv2d(
        problem.c, problem.k, problem.r, problem.stride, problem.padding, groups=problem.groups, percentile=percentile
    ).to(dtype)
    grad_output, input, _ = _operands(problem, dtype, [memory_format] * 3)
    with torch.no_grad():
        layer.weight.copy_(_operands(problem, dtype, [memory_format] * 3)[2])
    input.requires_grad_()
    with caplog.at_level("DEBUG", "sparsebwd"):
        layer(input).backward(grad_output)
    by_ours = depthwise.is_faster(problem, grad_output, (True, True))
    assert stats[-1].implementation == ("depthwise" if by_ours else "dense")
    assert any("the depthwise kernels are faster" in message for message in caplog.messages) is by_ours
    assert input.grad.is_contiguous(memory_format=memory_format)
    if percentile is None:
        expected = reference.conv2d_input(problem, layer.weight.detach(), grad_output).to(dtype)
        assert_bit_equal(input.grad + 0, expected + 0)
        expected = reference.conv2d_weight(problem, input.detach(), grad_output).to(dtype)
        assert_bit_equal(layer.weight.grad + 0, expected + 0)
    else:
        assert stats[-1].density < 0.95


@pytest.mark.parametrize("text", [LARGE, NARROW])
def test_gradients_alone_in_auto(text, memory_format, dtype, avx2):
    problem = ConvProblem.parse(text)
    grad_output, input, weight = _operands(problem, dtype, [memory_format] * 3)
    actual = grad.conv2d_input(input.shape, weight, grad_output, *_geometry(problem), problem.groups)
    assert_bit_equal(actual + 0, reference.conv2d_input(problem, weight, grad_output).to(dtype) + 0)
    actual = grad.conv2d_weight(input, weight.shape, grad_output, *_geometry(problem), problem.groups)
    assert_bit_equal(actual + 0, reference.conv2d_weight(problem, input, grad_output).to(dtype) + 0)
