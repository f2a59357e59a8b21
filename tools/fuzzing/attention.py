# SPDX-License-Identifier: Apache-2.0
"""The formulas of ms_deform_attn and ms_deform_attn_fused in float64; docs/derivations/ms_deform_attn.md has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tools.fuzzing.arithmetic import Arithmetic, Array, Bounded, concatenate, either, exact, product
from tools.fuzzing.sampling import Level, Pair, Touched, fused_places, others_near, plain_places, touched

Results = dict[str, Bounded]


@dataclass(frozen=True)
class Sampled:
    """The results of one level's points: terms of the output and the gradients of each point."""

    terms: Bounded  # [B, Q, M, P * C, D], of (1)
    weights: Bounded  # [B, Q, M, P], (6)
    places: Pair  # the same, (7) without W and H
    scattered: list[tuple[Bounded, Array]]  # (5): terms [N, D] and their rows of value [B * S * M, D]


class Wider(NamedTuple):
    """Additional errors of results if points may lie in other cells."""

    terms: Array
    weights: Array
    along: tuple[Array, Array]
    given: Array  # to the pixels of the own cell
    other: Array  # to those of the other cell alone


class Attention:
    """One call: value [B, S, M, D], weights [B, Q, M, K], grad [B, Q, M, D]."""

    def __init__(
        self, acc: Arithmetic, levels: list[Level], method: str, value: Array, weights: Bounded, grad: Array
    ) -> None:
        self.acc, self.levels, self.method = acc, levels, method
        self.value, self.weights, self.grad = value, weights, exact(grad)

    def results(self, places: list[Pair]) -> tuple[Results, list[Sampled]]:
        """Output and gradient of value, and the samples of each level."""
        batch, pixels, heads, channels = self.value.shape
        sampled = [self._sample(level, place) for level, place in zip(self.levels, places)]
        none = exact(np.zeros((*self.grad.value.shape[:3], 0, channels)))
        output = self.acc.sum(concatenate([none, *(each.terms for each in sampled)], 3), 3)
        scattered = [pair for each in sampled for pair in each.scattered]
        terms = concatenate([exact(np.zeros((0, channels))), *(terms for terms, _ in scattered)], 0)
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *(rows for _, rows in scattered)])
        grad_value = self.acc.scatter(terms, rows, batch * pixels * heads)
        return {"output": output, "value": grad_value.reshape(batch, pixels, heads, channels)}, sampled

    def _sample(self, level: Level, place: Pair) -> Sampled:
        at = touched(place, level, self.acc, self.method)
        weight = self.weights.at(np.s_[..., level.points])
        read = _read(self.value, at.pixel)  # [B, Q, M, P, C, D]
        inside = at.pixel >= 0
        share = self.acc.mul(weight.at(np.s_[..., None]), at.share).zero_unless(inside)  # [B, Q, M, P, C]
        terms = self.acc.mul(share.at(np.s_[..., None]), exact(read)).zero_unless(inside[..., None])
        grad = self.grad.at(np.s_[..., None, None, :])
        # Two ways of (5): a weight times a gradient may overflow before it meets a share below 1.
        given = either(
            self.acc.mul(share.at(np.s_[..., None]), grad),
            self.acc.mul(
                self.acc.mul(weight.at(np.s_[..., None, None]), grad), at.share.at(np.s_[..., None])
            ),
        ).zero_unless(inside[..., None])
        # The four dot products of (6) and (7).
        dots = self.acc.sum(self.acc.mul(exact(read), grad), -1)
        dots = dots.zero_unless(inside)
        grad_weight, along = self._of_point(at, weight, dots)
        scattered = []
        for u, v in others_near(place):
            other = touched((exact(u), exact(v)), level, self.acc, self.method)
            wider = self._widened(at, other, weight.value[..., None])
            terms, given = terms.may_differ(wider.terms), given.may_differ(wider.given)
            grad_weight = grad_weight.may_differ(wider.weights)
            along = along[0].may_differ(wider.along[0]), along[1].may_differ(wider.along[1])
            unread = Bounded(np.zeros_like(wider.other), np.where(np.isnan(wider.other), np.inf, wider.other))
            scattered.append(self._scattered(unread, other.pixel))
        scattered.append(self._scattered(given, at.pixel))
        size = terms.value.shape
        terms = terms.reshape(*size[:3], size[3] * size[4], size[5])
        return Sampled(terms, grad_weight, along, scattered)

    def _of_point(self, at: Touched, weight: Bounded, dots: Bounded) -> tuple[Bounded, Pair]:
        """Eq. (6), and eq. (7) without the level's size."""
        inside = at.pixel >= 0
        grad_weight = self.acc.sum(self.acc.mul(at.share, dots).zero_unless(inside), -1)
        touches = inside.any(-1) & np.asarray(self.method == "bilinear")
        # A product that may overflow before it meets a share below 1 may be anything after it.
        over = np.isinf(self.acc.mul(weight.at(np.s_[..., None]), dots).error).any(-1)
        over |= np.isinf(self.acc.sum(dots, -1).error)  # differences of dot products
        along = []
        for slope in at.slope:
            change = self.acc.sum(self.acc.mul(slope, dots).zero_unless(inside), -1)
            along.append(self.acc.mul(weight, change).undecided(over).zero_unless(touches))
        return grad_weight, (along[0], along[1])

    def _scattered(self, given: Bounded, pixel: Array) -> tuple[Bounded, Array]:
        """Terms for grad_value and the rows to add them to, -1 for pixels outside."""
        batch, pixels, heads, channels = self.value.shape
        image = np.arange(batch).reshape(-1, 1, 1, 1, 1)
        head = np.arange(heads).reshape(1, 1, -1, 1, 1)
        rows = np.where(pixel >= 0, (image * pixels + pixel) * heads + head, -1)
        return given.reshape(rows.size, channels), rows.reshape(-1)

    def _widened(self, at: Touched, other: Touched, w: Array) -> Wider:
        """The change of the results if points lie in other cells."""
        lost = np.abs(at.share.value - _matched(at, other)) * (at.pixel >= 0)
        gone, new = _untouched(at, other), _untouched(other, at)
        moved = np.where(new, np.abs(other.share.value), 0.0)
        read, read_there = _read(self.value, at.pixel), _read(self.value, other.pixel)
        change = _changed(lost, np.abs(w[..., None] * read), gone).sum(-2, keepdims=True)
        change = change + _changed(moved, np.abs(w[..., None] * read_there), new).sum(-2, keepdims=True)
        dots = _dots(self.grad.value, read, at.pixel), _dots(self.grad.value, read_there, other.pixel)
        here, there = (_of_cell(self.method, cell, w[..., 0], dot) for cell, dot in zip((at, other), dots))
        weights, *along = (np.abs(one - two) for one, two in zip(here, there))
        most = np.abs(w)[..., None] * np.abs(self.grad.value)[..., None, None, :]
        of_lost, of_moved = _changed(lost, most, gone), _changed(moved, most, new)
        return Wider(change, weights, (along[0], along[1]), of_lost, of_moved)


def _read(value: Array, pixel: Array) -> Array:
    """Reads [B, S, M, D] at pixels [B, Q, M, P, C], 0 outside: [B, Q, M, P, C, D]."""
    batch, pixels, heads, channels = value.shape
    if pixels == 0:
        return np.zeros((*pixel.shape, channels))
    image = np.arange(batch).reshape(-1, 1, 1, 1, 1)
    head = np.arange(heads).reshape(1, 1, -1, 1, 1)
    return np.where((pixel >= 0)[..., None], value[image, np.maximum(pixel, 0), head], 0.0)


def _matched(at: Touched, other: Touched) -> Array:
    """The shares in `other` of the pixels of `at`."""
    same = (at.pixel[..., :, None] == other.pixel[..., None, :]) & (at.pixel >= 0)[..., None]
    return np.where(same, other.share.value[..., None, :], 0.0).sum(-1)


def _untouched(at: Touched, other: Touched) -> Array:
    """Which pixels of `at` are none of `other`."""
    same = (at.pixel[..., :, None] == other.pixel[..., None, :]).any(-1)
    return (at.pixel >= 0) & ~same


def _dots(grad: Array, read: Array, pixel: Array) -> Array:
    products: Array = read * grad[..., None, None, :]
    return np.where(pixel >= 0, products.sum(-1), 0.0)


def _of_cell(method: str, at: Touched, weight: Array, dots: Array) -> list[Array]:
    """Eqs. (6) and (7) for one cell, without error bounds."""
    inside = at.pixel >= 0
    found = [np.where(inside, at.share.value * dots, 0.0).sum(-1)]
    for slope in at.slope:
        change = weight * np.where(inside, slope.value * dots, 0.0).sum(-1)
        found.append(np.where(inside.any(-1) & (method == "bilinear"), change, 0.0))
    return found


def _changed(share: Array, by: Array, whole: Array) -> Array:
    """A change of shares times what they multiply: NaN where a share of 0 of what is not finite comes or goes whole."""
    return np.where(whole[..., None], share[..., None] * by, product(share[..., None], by))


def expected_plain(
    acc: Arithmetic,
    levels: list[Level],
    method: str,
    value: Array,
    locations: Array,
    weights: Array,
    grad: Array,
) -> Results:
    """Output and gradients for locations [B, Q, M, K, 2] and weights [B, Q, M, K]."""
    call = Attention(acc, levels, method, value, exact(weights), grad)
    places = [plain_places(locations[..., level.points, :], level, acc, method) for level in levels]
    results, sampled = call.results(places)
    results["weights"] = concatenate(
        [exact(np.zeros((*weights.shape[:3], 0))), *(s.weights for s in sampled)], -1
    )
    found = [exact(np.zeros((*weights.shape[:3], 0, 2)))]
    for level, each in zip(levels, sampled):
        axes = []
        for n, along in zip(level.size, each.places):  # (7)
            wide = acc.mul(
                exact(float(n)), exact(weights[..., level.points])
            )  # may overflow before it meets the rest
            axes.append(acc.mul(exact(float(n)), along).undecided(np.isinf(wide.error)))
        found.append(Bounded(*(np.stack(pair, -1) for pair in zip(*axes))))
    return {**results, "locations": concatenate(found, -2)}


def expected_fused(
    acc: Arithmetic,
    levels: list[Level],
    method: str,
    value: Array,
    reference: Array,
    offsets: Array,
    logits: Array,
    grad: Array,
) -> Results:
    """Output and gradients for reference [B or 1, Q, L or 1, 2 or 4], offsets [B, Q, M, K, 2], logits [B, Q, M, K]."""
    weights = acc.softmax(exact(logits), -1)  # (8)
    call = Attention(acc, levels, method, value, weights, grad)
    full = np.broadcast_to(reference, (len(value), reference.shape[1], len(levels), reference.shape[3]))
    placed = []
    for index, level in enumerate(levels):
        of_level = full[:, :, None, index, None]  # [B, Q, 1, 1, .]
        placed.append(fused_places(of_level, offsets[..., level.points, :], level, acc, method))
    results, sampled = call.results([places for places, _ in placed])

    found = [exact(np.zeros((*logits.shape[:3], 0))), *(each.weights for each in sampled)]
    along = concatenate(found, -1)
    mean = acc.sum(acc.mul(weights, along), -1)
    results["logits"] = acc.mul(weights, acc.minus(along, mean.at(np.s_[..., None])))  # (11)

    moved = [exact(np.zeros((*logits.shape[:3], 0, 2)))]
    anchors = [exact(np.zeros((*full.shape[:2], 0, full.shape[3])))]
    for level, each, (_, steps) in zip(levels, sampled, placed):
        axes = [_times(acc, step, along) for step, along in zip(steps, each.places)]
        moved.append(Bounded(*(np.stack(pair, -1) for pair in zip(*axes))))
        anchors.append(_of_reference(acc, level, offsets[..., level.points, :], each.places, full.shape[3]))
    results["offsets"] = concatenate(moved, -2)  # (12)
    shared = acc.sum(concatenate(anchors, 2), tuple(a for a in (0, 2) if reference.shape[a] == 1))
    return {**results, "reference_points": shared.reshape(*reference.shape)}


def _times(acc: Arithmetic, factor: Array, along: Bounded) -> Bounded:
    """The factor times a gradient, rounded a few times; a gradient of 0 stays 0 for any factor."""
    product = acc.rounded(acc.mul(exact(factor), along))
    return product.zero_unless((along.value != 0) | (along.error != 0))


def _of_reference(acc: Arithmetic, level: Level, offsets: Array, places: Pair, numbers: int) -> Bounded:
    """The gradient of the level's reference points, [B, Q, 1, 2 or 4]: sums over heads and points."""
    count = level.points.stop - level.points.start
    found = []
    for size, along in zip(level.size, places):
        found.append(acc.sum(_times(acc, np.full(along.value.shape, float(size)), along), (2, 3)))
    if numbers == 4:
        for axis, (size, along) in enumerate(zip(level.size, places)):
            of_box, part = offsets[..., axis] * size, 1 / (2 * max(count, 1))
            before = acc.sum(_times(acc, of_box * part, along), (2, 3))
            after = acc.sum(_times(acc, of_box, along), (2, 3))
            found.append(either(before, acc.mul(after, exact(part))))
    return Bounded(*(np.stack(parts, -1)[:, :, None] for parts in zip(*found)))
