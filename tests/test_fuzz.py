# SPDX-License-Identifier: Apache-2.0
"""The fuzzer: its oracle has the gradients of finite differences, and it finds what is wrong, by the number of the case."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tools.fuzzing import adapter, attention, tokens
from tools.fuzzing.arithmetic import FLOAT64, Bounded
from tools.fuzzing.sampling import Level

LEVELS = [Level(3, 4, 2, slice(0, 2)), Level(1, 2, 0, slice(2, 3)), Level(5, 1, 14, slice(3, 3))]
PIXELS = 19
Formula = Callable[..., dict[str, Bounded]]


def _adapter(activation: str, p: float) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        options = dict(activation=activation, dropout_p=p, seed=5, scale_is_exact=True)
        return adapter.expected(FLOAT64, FLOAT64, {**tensors, "residual": None}, grad, **options)

    shapes = dict(x=(4, 3), down_weight=(5, 3), down_bias=(5,), up_weight=(3, 5), up_bias=(3,), scale=())
    return formula, shapes


def _attention(fused: bool, numbers: int, shared: bool) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    formula = attention.expected_fused if fused else attention.expected_plain
    of_places = (2, 3, 2, 3, 2)
    shapes: dict[str, tuple[int, ...]] = dict(value=(2, PIXELS, 2, 3))
    if fused:
        shapes["reference_points"] = (1, 3, 1, numbers) if shared else (2, 3, 3, numbers)
    shapes |= {"offsets" if fused else "locations": of_places, "logits" if fused else "weights": of_places[:-1]}

    def call(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return formula(FLOAT64, LEVELS, "bilinear", *tensors.values(), grad.reshape(2, 3, 2, 3))

    return call, shapes


def _pool(shared: bool) -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return tokens.expected_pool(FLOAT64, FLOAT64, FLOAT64, *tensors.values(), grad)

    return formula, dict(x=(2, 4, 3), weight=(5, 3) if shared else (2, 5, 3))


def _project() -> tuple[Formula, dict[str, tuple[int, ...]]]:
    def formula(*, grad: np.ndarray, **tensors: np.ndarray) -> dict[str, Bounded]:
        return tokens.expected_project(FLOAT64, FLOAT64, *tensors.values(), grad)

    return formula, dict(x=(2, 4, 3), query=(2, 4, 5), key=(2, 3, 5), tokens=(2, 3, 3))


FORMULAS = {
    "adapter-relu": _adapter("relu", 0.0),
    "adapter-gelu": _adapter("gelu", 0.0),
    "adapter-silu": _adapter("silu", 0.3),
    "attention": _attention(False, 2, False),
    "fused-points": _attention(True, 2, False),
    "fused-boxes": _attention(True, 4, False),
    "fused-shared": _attention(True, 4, True),
    "pool-filter": _pool(True),
    "pool-recurrent": _pool(False),
    "project": _project(),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_oracle_has_the_gradients_of_finite_differences(name):
    formula, shapes = FORMULAS[name]
    rng = np.random.default_rng(0)
    tensors = {key: rng.uniform(0.1, 0.9, shape) for key, shape in shapes.items()}
    if "x" in tensors:
        tensors["x"] -= 0.5
    size = formula(grad=np.zeros(_output_of(tensors)), **tensors)["output"].value.shape
    grad = rng.standard_normal(size)
    known = formula(grad=grad, **tensors)
    for key, tensor in tensors.items():
        for _ in range(3):
            way = rng.standard_normal(tensor.shape)
            sides = []
            for step in (1e-6, -1e-6):
                moved = formula(grad=grad, **{**tensors, key: tensor + step * way})["output"].value
                sides.append((moved * grad).sum())
            along = (known[key].value * way).sum()
            np.testing.assert_allclose(along, (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-8, err_msg=key)


def _output_of(tensors: dict[str, np.ndarray]) -> tuple[int, ...]:
    if "value" in tensors:
        return (2, 3, 6)
    return (2, tensors["weight"].shape[-2], 3) if "weight" in tensors else tensors["x"].shape
