# SPDX-License-Identifier: Apache-2.0
"""The judge of `vitkern check`, vitkern/check/compare.py: wrong results made in numpy fail, right ones pass.

The op here is a product of matrices in numpy, so that a fault of the judge cannot hide behind the kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkern.check.compare import judge

ROWS, TERMS, COLUMNS = 12, 60, 9
RANDOM = np.random.default_rng(0)
LEFT, RIGHT = RANDOM.standard_normal((ROWS, TERMS)), RANDOM.standard_normal((TERMS, COLUMNS))
NAN, INF = np.nan, np.inf
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def rounded(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)).to(dtype)


def product(left: np.ndarray, right: np.ndarray, order=range(TERMS), kind=np.float32) -> np.ndarray:
    """The product of matrices, summed term by term in `order`, each sum rounded to `kind`."""
    total = np.zeros((len(left), right.shape[1]), kind)
    for term in order:
        total = total + (left[:, term, None].astype(kind) * right[None, term].astype(kind))
    return total


def in_blocks(left: np.ndarray, right: np.ndarray, size: int, kind: type) -> np.ndarray:
    starts = range(0, TERMS, size)
    blocks = [product(left, right, range(at, min(at + size, TERMS)), kind) for at in starts]
    while len(blocks) > 1:
        blocks = [sum(blocks[at : at + 2]) for at in range(0, len(blocks), 2)]
    return blocks[0]


RIGHT_ORDERS = {
    "backwards": lambda left, right, kind: product(left, right, range(TERMS)[::-1], kind),
    "even, then odd": lambda left, right, kind: product(
        left, right, [*range(0, TERMS, 2), *range(1, TERMS, 2)], kind
    ),
    "blocks of seven": lambda left, right, kind: in_blocks(left, right, 7, kind),
    "in pairs": lambda left, right, kind: in_blocks(left, right, 1, kind),
    "rounded once": lambda left, right, kind: product(left, right, kind=np.longdouble),
}


def inputs(dtype: torch.dtype) -> list[np.ndarray]:
    """The two factors, rounded to the dtype."""
    return [rounded(array, dtype).double().numpy() for array in (LEFT, RIGHT)]


def yardsticks(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain product in the dtype and the exact one."""
    left, right = inputs(dtype)
    kind = np.float64 if dtype == torch.float64 else np.float32
    exact = product(left, right, kind=np.longdouble).astype(np.float64)
    return rounded(product(left, right, kind=kind), dtype), torch.from_numpy(exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", RIGHT_ORDERS)
def test_right_results_pass(order, dtype):
    kind = np.float64 if dtype == "float64" else np.float32
    actual = rounded(RIGHT_ORDERS[order](*inputs(DTYPES[dtype]), kind), DTYPES[dtype])
    for gradient in (False, True):
        assert judge(actual, *yardsticks(DTYPES[dtype]), gradient=gradient).complaint is None


def changed(where: object, number: float):
    def change(exact: np.ndarray) -> np.ndarray:
        exact[where] = number
        return exact

    return change


def of_terms(left: np.ndarray, right: np.ndarray):
    return lambda exact: product(left, right, range(left.shape[1]), np.float64)


# From the right numbers to wrong ones, and what is said of them.
WRONG = {
    "all signs turned": (lambda e: -e, "off by"),
    "one sign turned": (lambda e: np.where(np.abs(e) == np.abs(e).max(), -e, e), "off by"),
    "one row too far": (lambda e: np.roll(e, 1, 0), "off by"),
    "two columns exchanged": (lambda e: e[:, [1, 0, *range(2, COLUMNS)]], "off by"),
    "rows backwards": (lambda e: e[::-1], "off by"),
    "the last term left out": (of_terms(LEFT[:, :-1], RIGHT[:-1]), "off by"),
    "the first term twice": (
        of_terms(np.concatenate([LEFT[:, :1], LEFT], 1), np.concatenate([RIGHT[:1], RIGHT])),
        "off by",
    ),
    "terms of the next row": (of_terms(np.roll(LEFT, 1, 0), RIGHT), "off by"),
    "a thousandth too large": (lambda e: e * 1.001, "off by"),
    "shifted a little": (lambda e: e + 1e-3, "off by"),
    "rounded to 16 bits": (lambda e: e.astype(np.float16).astype(np.float64), "off by"),
    "the last row not written": (changed(-1, 0.0), "off by"),
    "the last column of the next": (changed((slice(None), -1), 1.0), "off by"),
    "all zero": (np.zeros_like, "off by"),
    "one NaN": (changed((3, 4), NAN), "1 NaN, expected no"),
    "all NaN": (changed(..., NAN), "NaN, expected no"),
    "one infinity": (changed((3, 4), INF), "off by inf"),
    "one infinity below": (changed((0, 0), -INF), "off by inf"),
    "a row too few": (lambda e: e[:-1], "has shape [11, 9], expected [12, 9]"),
    "transposed": (lambda e: e.T, "has shape [9, 12], expected [12, 9]"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_results_fail(fault):
    change, said = WRONG[fault]
    plain, exact = yardsticks(torch.float32)
    complaint = judge(rounded(change(exact.numpy().copy()), torch.float32), plain, exact).complaint
    assert complaint is not None
    assert said in complaint


@pytest.mark.parametrize(
    "actual, exact, said",
    [
        ([1.0, 2.0], [1.0, NAN], "no NaN, expected 1"),
        ([NAN, 2.0], [1.0, NAN], "1 NaN, expected 1, or in other places"),
        ([1.0, 2.0], [1.0, INF], "other infinities"),
        ([1.0, -INF], [1.0, INF], "other infinities"),
        ([1.0, NAN], [1.0, INF], "1 NaN, expected no"),
    ],
)
def test_what_is_not_finite_must_be_where_it_is_expected(actual, exact, said):
    plain = torch.tensor(exact)
    assert said in judge(torch.tensor(actual), plain, plain.double()).complaint
    assert judge(plain.clone(), plain, plain.double()).complaint is None


def test_another_dtype_fails():
    plain, exact = yardsticks(torch.float32)
    assert judge(exact.half(), plain, exact).complaint == "is torch.float16, expected torch.float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_twice_the_error_of_plain_torch_and_the_units_fails(dtype):
    plain, exact = yardsticks(DTYPES[dtype])
    allowed = judge(plain, plain, exact).allowed
    for factor, right in ((0.5, True), (2, False)):  # the moved result is rounded too
        moved = (exact + factor * allowed).to(DTYPES[dtype])
        assert (judge(moved, plain, exact).complaint is None) is right


@pytest.mark.parametrize("small, found", [(2e-3, True), (1e-9, False)])
def test_a_gradient_that_is_missing_is_found_below_any_tolerance(small, found):
    exact = torch.tensor([1.0, small, 0.0], dtype=torch.float64)
    plain = exact.float() * (1 + 0.01)  # so coarse that a tolerance lets the zero pass
    complaint = judge(torch.tensor([1.0, 0.0, 0.0]), plain, exact, gradient=True).complaint
    assert complaint == ("is zero in 1 places where it should not be" if found else None)


def test_zeros_are_not_missing_where_the_gradient_is_zero_and_plain_torch_only_rounds():
    zeros = torch.zeros(3)
    assert judge(zeros, zeros + 1e-9, zeros.double(), gradient=True).complaint is None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 2)])
def test_zeros_and_nothing_are_right_only_as_such(shape):
    zeros = torch.zeros(shape)
    assert judge(zeros, zeros, zeros.double(), gradient=True).complaint is None
    if zeros.numel():
        assert judge(zeros + 1e-30, zeros, zeros.double()).complaint is not None
