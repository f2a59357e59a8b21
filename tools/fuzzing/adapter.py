# SPDX-License-Identifier: Apache-2.0
"""The formula of adapter_bottleneck in float64; the equations cited are in docs/derivations/adapter_bottleneck.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tools.fuzzing.arithmetic import Arithmetic, Array, Bounded, concatenate, either, exact

_ERF = np.vectorize(math.erf, otypes=[np.float64])
Results = dict[str, Bounded]


def expected(
    acc: Arithmetic,
    factor: Arithmetic,
    tensors: Mapping[str, Array | None],
    grad: Array,
    *,
    activation: str,
    dropout_p: float,
    seed: int | None,
    scale_is_exact: bool,
) -> Results:
    """Output and all gradients; `factor` is the type to which factors of a second product are rounded.

    tensors: x [N, C], down_weight, down_bias, up_weight, up_bias, residual, scale (one number), as the op sees them.
    """
    x, down, up, scale = (_given(tensors[name]) for name in ("x", "down_weight", "up_weight", "scale"))
    g = exact(grad)
    if not scale_is_exact:
        scale = Bounded(scale.value, acc.unit * np.abs(scale.value))  # a number comes in double
    kept = exact(_dropout(seed, x.value.shape[0] * len(down.value), dropout_p).reshape(-1, len(down.value)))

    z = acc.dot(x, down)  # (1)
    if tensors["down_bias"] is not None:
        z = acc.add(z, _given(tensors["down_bias"]))
    a = factor.rounded(_switched(acc, _activated(acc, z, activation), kept))  # (2)
    products = acc.dot(a, up)
    if tensors["up_bias"] is not None:
        products = acc.add(products, _given(tensors["up_bias"]))
    y = acc.mul(scale, products)  # (3)
    if tensors["residual"] is not None:
        y = acc.add(_given(tensors["residual"]), y)

    scaled = acc.mul(
        scale, g
    )  # before the products or after: tiny numbers lose more in one way than in the other
    e = either(acc.mul(scale, acc.dot(g, up.swap())), acc.dot(scaled, up.swap()))  # (6)
    f = _switched(acc, _switched(acc, e, kept), _slope(acc, z, activation))
    f = factor.rounded(f)  # (7)
    if x.value.shape[1] == 0:  # nothing times a slope that is not finite is NaN, or nothing
        f = f.undecided(~np.isfinite(f.value))
    return {
        "output": y,
        "x": acc.dot(f, down.swap()),  # (8)
        "down_weight": acc.dot(f.swap(), x.swap()),  # (9)
        "down_bias": acc.sum(f, 0),
        "up_weight": either(  # (10)
            acc.mul(scale, acc.dot(g.swap(), a.swap())), acc.dot(scaled.swap(), a.swap())
        ),
        "up_bias": either(acc.mul(scale, acc.sum(g, 0)), acc.sum(scaled, 0)),
        "scale": either(  # (11)
            _of_scale(acc, g, up, a, tensors["up_bias"]), acc.sum(acc.mul(g, products).reshape(-1), 0)
        ),
    }


def _given(tensor: Array | None) -> Bounded:
    assert tensor is not None
    return exact(tensor)


def _of_scale(acc: Arithmetic, g: Bounded, up: Bounded, a: Bounded, bias: Array | None) -> Bounded:
    """Eq. (11), with the magnitudes of all terms: kernels may sum rows and channels first, or hidden units."""
    ways = acc.mul(g.at(np.s_[:, :, None]), up.at(np.s_[None]))  # [N, C, H]
    terms = acc.mul(ways, a.at(np.s_[:, None, :])).reshape(-1)
    if bias is not None:
        terms = concatenate([terms, acc.mul(g, exact(bias)).reshape(-1)], 0)
    total = acc.sum(terms, 0)
    # Without rows or channels there is no term; but a sum of none times what is not finite is NaN.
    factors = (a.value, np.zeros(0) if bias is None else bias)
    nothing = g.value.size == 0 and not all(np.isfinite(factor).all() for factor in factors)
    return total.undecided(np.asarray(nothing))


def _switched(acc: Arithmetic, a: Bounded, switch: Bounded) -> Bounded:
    """a times a factor that may be 0: there, NaN and infinities in `a` may stay as NaN or become 0."""
    gone = (np.abs(switch.value) <= switch.error) & ~(np.isfinite(a.value) & np.isfinite(a.error))
    return acc.mul(a, switch).undecided(gone)


def _activated(acc: Arithmetic, z: Bounded, activation: str) -> Bounded:
    v, error = z
    if activation == "relu":
        return Bounded(np.where(v > 0, v, np.where(np.isnan(v), v, 0.0)), error)
    if activation == "gelu":
        value, steepest = 0.5 * v * (1 + _ERF(v / math.sqrt(2))), 1.13
    else:
        value, steepest = v / (1 + np.exp(-v)), 1.1
    off = steepest * error + 8 * acc.unit * np.abs(v) + acc.smallest * (v != 0)
    unsure = np.isinf(v) | np.isinf(error)
    return Bounded(value, np.where(np.isnan(v) & (error == 0), 0.0, np.where(unsure, np.inf, off)))


def _slope(acc: Arithmetic, z: Bounded, activation: str) -> Bounded:
    """The derivative of the activation; for relu either one, if rounding decides on which side of 0 z is."""
    v, error = z
    if activation == "relu":
        either = (np.abs(v) <= error) & (error > 0)
        return Bounded(np.where(v <= 0, 0.0, 1.0), np.where(either | np.isinf(error), 1.0, 0.0))
    if activation == "gelu":
        bell = np.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)
        value, bend = 0.5 * (1 + _ERF(v / math.sqrt(2))) + v * bell, 0.8
    else:
        share = 1 / (1 + np.exp(-v))
        value, bend = share * (1 + v * (1 - share)), 0.5
    # The exponent of gelu is v * v / 2: its rounding, too, is multiplied by v times the bell, which is below 1.2.
    off = bend * error + 16 * acc.unit * (1 + np.minimum(np.abs(v), 16.0))
    unsure = np.isinf(v) | np.isinf(error)
    return Bounded(value, np.where(np.isnan(v) & (error == 0), 0.0, np.where(unsure, np.inf, off)))


def _dropout(seed: int | None, count: int, p: float) -> Array:
    """The dropout factors of eq. (5), from the random bits of eq. (4)."""
    if seed is None:
        return np.ones(count)
    index = np.arange(count, dtype=np.uint64)
    words = np.stack(philox(seed, index >> np.uint64(2)), -1)  # [count, 4]
    word = np.take_along_axis(words, (index & np.uint64(3)).astype(np.int64)[:, None], -1)[:, 0]
    threshold = min(round(p * 2**32), 2**32 - 1)
    return np.where(word < np.uint64(threshold), 0.0, 1 / (1 - p) if p < 1 else 0.0)


def philox(seed: int, counter: Array) -> list[Array]:
    """Philox 4x32-10 (Salmon et al. 2011) of key `seed` and counter (low, high, 0, 0): four words of 32 bits."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    words = [counter & low, counter >> shift, np.zeros_like(counter), np.zeros_like(counter)]
    for _ in range(10):
        left, right = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (right >> shift) ^ words[1] ^ key[0],
            right & low,
            (left >> shift) ^ words[3] ^ key[1],
            left & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return words
