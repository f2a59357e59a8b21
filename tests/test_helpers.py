# SPDX-License-Identifier: Apache-2.0
"""The comparisons themselves: each is shown the mistake that it is there for."""

import pytest
import torch

from tests.helpers import assert_as_exact_as, assert_gradient_not_missing, guarded_memory

ORACLE = torch.linspace(-1, 1, 101, dtype=torch.float64)


def test_twice_the_error_of_plain_torch_passes_and_more_does_not():
    plain = ORACLE.bfloat16()
    assert_as_exact_as(plain.clone(), plain, ORACLE, what="x")
    worse = (ORACLE + 4 * (plain.double() - ORACLE).abs().max() + 0.01).bfloat16()
    with pytest.raises(AssertionError, match="x is off by"):
        assert_as_exact_as(worse, plain, ORACLE, what="x")


def test_a_nan_that_the_oracle_has_not_is_found():
    actual = ORACLE.float()
    actual[3] = float("nan")
    with pytest.raises(AssertionError, match="x has .* NaN, expected .*, or in other places"):
        assert_as_exact_as(actual, ORACLE.float(), ORACLE, what="x")


def test_a_nan_that_only_the_oracle_has_is_found():
    oracle = ORACLE.clone()
    oracle[3] = float("nan")
    with pytest.raises(AssertionError, match="x has .* NaN, expected .*, or in other places"):
        assert_as_exact_as(ORACLE.float(), ORACLE.float(), oracle, what="x")


@pytest.mark.parametrize("actual, exact", [(1.0, "inf"), ("-inf", "inf"), ("inf", 1.0)])
def test_an_infinity_of_one_side_is_found(actual, exact):
    ours, oracle = ORACLE.float(), ORACLE.clone()
    ours[3], oracle[3] = float(actual), float(exact)
    with pytest.raises(AssertionError, match="x has other infinities|x is off by inf"):
        assert_as_exact_as(ours, ORACLE.float(), oracle, what="x")


def test_wrong_shape_and_dtype_are_found():
    with pytest.raises(AssertionError, match="shape"):
        assert_as_exact_as(ORACLE.float()[:-1], ORACLE.float(), ORACLE, what="x")
    with pytest.raises(AssertionError, match="expected torch.float32"):
        assert_as_exact_as(ORACLE.half(), ORACLE.float(), ORACLE, what="x")


def test_a_missing_gradient_below_any_tolerance_is_found():
    gradient = torch.tensor([1.0, 2e-3, 1e-9])
    assert_gradient_not_missing(torch.tensor([1.0, 2e-3, 0.0]), gradient, what="g")
    with pytest.raises(AssertionError, match="1 gradients are missing"):
        assert_gradient_not_missing(torch.tensor([1.0, 0.0, 0.0]), gradient, what="g")


def test_guarded_memory_shows_what_was_not_written():
    with guarded_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2, 2).new_empty(4).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.int64))[0] == torch.iinfo(torch.int64).max


@pytest.mark.parametrize("offset", [-1, 3])
def test_guarded_memory_shows_a_write_outside(offset):
    with pytest.raises(AssertionError, match="outside its output"), guarded_memory():
        tensor = torch.empty(3)
        torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + offset).zero_()
