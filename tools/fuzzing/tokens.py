# SPDX-License-Identifier: Apache-2.0
"""The formulas of token_pool and token_project in float64; their pages in docs/derivations have the equations."""

from __future__ import annotations

import numpy as np

from tools.fuzzing.arithmetic import Arithmetic, Array, Bounded, exact, product

Results = dict[str, Bounded]


def expected_pool(
    acc: Arithmetic, factor: Arithmetic, stored: Arithmetic, x: Array, weight: Array, grad: Array
) -> Results:
    """Output and gradients for x [B, N, C], weight [T, C] or [B, T, C], grad [B, T, C]; `stored`: dtype of tokens."""
    shared = weight.ndim == 2
    batch, pixels, _ = x.shape
    pixel, g = exact(x), exact(grad)
    w = exact(np.broadcast_to(weight, (batch, *weight.shape[-2:])))
    s = acc.dot(w, pixel)  # (1), [B, T, N]
    share = acc.softmax(s, -1)  # (2)
    rounded = factor.rounded(share)
    y = acc.dot(rounded, pixel.swap())  # (3), [B, T, C]
    if pixels == 0:
        y = exact(np.zeros_like(grad))

    delta = acc.sum(acc.mul(g, stored.rounded(y)), -1)  # (5)
    f = acc.mul(share, acc.minus(acc.dot(g, pixel), delta.at(np.s_[..., None])))  # (6)
    f = factor.rounded(f)
    grad_x = acc.add(acc.dot(rounded.swap(), g.swap()), acc.dot(f.swap(), w.swap()))  # (7)
    grad_w = acc.dot(f, pixel.swap())  # (8)
    # (9) takes sum(f) y away, which is rounding: as much as f is off by, and y where the tokens were kept.
    rest = (f.error.sum(-1) + acc.unit * (pixels + 4) * np.abs(f.value).sum(-1))[..., None]
    with np.errstate(all="ignore"):
        grad_w = grad_w.may_differ(product(rest, np.abs(y.value) + y.error))
    if shared:
        grad_w = acc.sum(grad_w, 0)
    return {"output": y, "attention": share.swap(), "x": grad_x, "weight": grad_w}


def expected_project(
    acc: Arithmetic, factor: Arithmetic, x: Array, query: Array, key: Array, tokens: Array, grad: Array
) -> Results:
    """Output and gradients for x [B, N, C], query [B, N, K], key [B, T, K], tokens [B, T, C], grad [B, N, C]."""
    q, k, v, g = exact(query), exact(key), exact(tokens), exact(grad)
    share = acc.softmax(acc.dot(q, k), -1)  # (1), [B, N, T]
    rounded = factor.rounded(share)
    y = acc.add(exact(x), acc.dot(rounded, v.swap()))  # (2)

    h = acc.dot(g, v)  # (3)
    mean = acc.sum(acc.mul(share, h), -1)
    f = factor.rounded(acc.mul(share, acc.minus(h, mean.at(np.s_[..., None]))))  # (4)
    return {
        "output": y,
        "x": g,
        "query": acc.dot(f, k.swap()),  # (5)
        "key": acc.dot(f.swap(), q.swap()),  # (6)
        "tokens": acc.dot(rounded.swap(), g.swap()),
    }
