# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import problems

from sparsebwd.arguments import as_int, as_pair
from sparsebwd.problem import ConvProblem


@given(problems())
def test_text_round_trip(problem):
    assert ConvProblem.parse(str(problem)) == problem


@given(problems())
def test_output_size_is_that_of_torch(problem):
    input = torch.empty(problem.input_size, device="meta")
    weight = torch.empty(problem.weight_size, device="meta")
    output = torch.nn.functional.conv2d(
        input, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups
    )
    assert output.shape == problem.output_size
    assert problem.macs == output.numel() * weight[:1].numel()


def test_text():
    problem = ConvProblem(32, 64, 32, 32, 128, 3, 3, (2, 2), (1, 1))
    assert str(problem) == "n32c64h32w32k128r3s3u2p1d1g1"
    assert (problem.p, problem.q) == (16, 16)
    assert ConvProblem.parse("n32c64h32w32k128r3s3u2p1") == problem
    assert ConvProblem.parse("r3s3k128n32c64h32w32p1u2x1").stride == (2, 1)
    assert "u2x1p0x3" in str(dataclasses.replace(problem, stride=(2, 1), padding=(0, 3)))


def test_from_sizes():
    problem = ConvProblem.from_sizes((2, 6, 9, 7), (4, 3, 3, 1), 2, (1, 0), groups=2)
    assert problem == ConvProblem(2, 6, 9, 7, 4, 3, 1, (2, 2), (1, 0), (1, 1), 2)
    assert problem.input_size == (2, 6, 9, 7)
    assert problem.weight_size == (4, 3, 3, 1)
    assert problem.output_size == (2, 4, 5, 4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("n1c1h1w1k1r1", "lacks s"),
        ("", "lacks n, c, h, w, k, r, s"),
        ("n1c1h1w1k1r1s1n2", "repeats 'n'"),
        ("n1c1h1w1k1r1s1z2", "unknown letter 'z'"),
        ("n1c1h1w1k1r1s1u-1", "unreadable from 'u-1'"),
        ("n1c1h1w1k1r1s1g1x2", "'g' takes one number"),
        ("n1c1h2w2k1r3s3", "larger than the input"),
    ],
)
def test_unreadable_text(text, message):
    with pytest.raises(ValueError, match=message):
        ConvProblem.parse(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n": -1}, "n: got -1"),
        ({"c": 0}, "c: got 0"),
        ({"stride": (1, 0)}, r"stride: got \(1, 0\)"),
        ({"padding": (-1, 0)}, "padding: got"),
        ({"dilation": (3, 1)}, "weight: the kernel 3x3 .* larger than the input"),
        ({"groups": 3}, "groups: got 3; accepted: a divisor of c=4"),
        ({"groups": 4}, "groups: got 4; accepted: a divisor of k=6"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    sizes = {"n": 1, "c": 4, "h": 4, "w": 4, "k": 6, "r": 3, "s": 3}
    with pytest.raises(ValueError, match=message):
        ConvProblem(**{**sizes, **changes})


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="weight: .*takes 3 input channels; the input has 4"):
        ConvProblem.from_sizes((1, 4, 5, 5), (2, 3, 1, 1))
    with pytest.raises(ValueError, match="groups: got 0; accepted: at least 1"):
        ConvProblem.from_sizes((1, 4, 5, 5), (2, 3, 1, 1), groups=0)
    with pytest.raises(ValueError, match="input: .*4 dimensions"):
        ConvProblem.from_sizes((4, 5, 5), (2, 4, 1, 1))


def test_pairs():
    assert as_pair(3, "stride") == as_pair([3], "stride") == (3, 3)
    assert as_pair((1, 2), "stride") == (1, 2)
    for value in (np.int64(3), [np.uint8(3)], (3, np.int32(3)), torch.tensor(3)):
        pair = as_pair(value, "stride")
        assert pair == (3, 3) and type(pair[0]) is type(pair[1]) is int
    assert type(as_int(np.int64(2), "groups")) is int
    for value in ("same", 1.0, (1, 2.0), True, (True, 1), None, np.float32(1), np.bool_(True), np.array([1, 2])):
        with pytest.raises(TypeError, match="stride: got"):
            as_pair(value, "stride")
    with pytest.raises(TypeError, match="groups: got 2.0; accepted: an int"):
        as_int(2.0, "groups")
    with pytest.raises(ValueError, match="stride: got 3 values"):
        as_pair((1, 2, 3), "stride")
