# SPDX-License-Identifier: Apache-2.0
"""The assertions themselves: they must fail where they should."""

from __future__ import annotations

import pytest
import torch

from sparsebwd.testing import assert_bit_equal, assert_error_bounded, fenced, poisoned_memory, random_tensor


def test_bit_equality_sees_signs_of_zeros_and_accepts_equal_nans():
    a = torch.tensor([0.0, float("nan"), 1.0])
    assert_bit_equal(a, a.clone())
    for other in (torch.tensor([-0.0, float("nan"), 1.0]), a.double(), a[:2]):
        with pytest.raises(AssertionError, match="tensor: "):
            assert_bit_equal(other, a)
    with pytest.raises(AssertionError, match=r"x: 1 of 3 elements differ, first at \(2,\): 2.0 instead of 1.0"):
        assert_bit_equal(torch.tensor([0.0, float("nan"), 2.0]), a, "x")
    assert_bit_equal(a.view(1, 3).t(), a.view(3, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_bound(dtype, generator):
    expected = torch.randn(50, 40, dtype=torch.float64, generator=generator)
    noise = torch.randn(50, 40, dtype=torch.float64, generator=generator) * 20 * torch.finfo(dtype).eps
    dense = (expected + noise).to(dtype)
    assert_error_bounded(dense, expected, dense)
    assert_error_bounded((expected - 1.9 * noise).to(dtype), expected, dense)
    with pytest.raises(AssertionError, match="dw: largest error against float64 is .*, allowed"):
        assert_error_bounded((expected - 2.2 * noise).to(dtype), expected, dense, "dw")
    for value in (float("nan"), float("inf")):
        broken = dense.clone()
        broken[3, 4] = value
        with pytest.raises(AssertionError):
            assert_error_bounded(broken, expected, dense)
    with pytest.raises(AssertionError, match="got"):
        assert_error_bounded(dense.double(), expected, dense)
    # A lucky dense result does not demand the impossible.
    exact = torch.full((3,), 1.0, dtype=dtype)
    assert_error_bounded(exact, exact.double() * (1 + torch.finfo(dtype).eps / 4), exact)
    empty = torch.empty(0, dtype=dtype)
    assert_error_bounded(empty, empty.double(), empty)


def test_random_tensors(generator):
    tensor = random_tensor((4, 8, 9, 10), generator=generator, integer=True, density=0.25)
    assert set(tensor.unique().tolist()) == {-3, -2, -1, 0, 1, 2, 3}
    assert (tensor != 0).float().mean() == pytest.approx(0.25, abs=0.04)
    tensor = random_tensor((4, 8, 9, 10), generator=generator, memory_format=torch.channels_last)
    assert tensor.stride(1) == 1 and (tensor != 0).all()


def test_fences_are_nan_around_an_equal_tensor(memory_format):
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    copy = fenced(tensor)
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    around = (
        copy.as_strided((1,), (1,), copy.storage_offset() - 1),
        copy.as_strided((1,), (1,), copy.storage_offset() + 120),
    )
    assert all(torch.isnan(value) for value in around)


def test_poisoned_memory_is_nan_and_settings_come_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.isnan(torch.empty(100)).all()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
