"""The scale of 32 weights on sixteen uneven values, and their codes: what IQ4_NL and IQ4_XS share.

`ggml-quants.c: quantize_row_iq4_nl_impl` fits a scale to each of sixteen grids and keeps the best fit. The first grid
lays the block's largest weight on +127, the others on -134, -133 ... -120. Here the fifteen are first weighed up
together, see `_worthwhile`; only those that might win within the error of f32 are then fitted as ggml does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.columns import NEGLIGIBLE, dots, largest_of
from convert_drafter.quant.scratch import scratch

F = np.float32
F64Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]

BLOCK = 32
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])  # kvalues_iq4nl
FIRST = 127
INNERMOST, GRIDS = 120, 15  # grid g of 0..14 lays the largest weight on -(120 + g); ggml begins with the last one

# --- nearest values: tables over floor(8 * weight / scale) ---

FINE = 8
REACH = 300 * FINE
_PLACES = np.arange(-REACH, REACH)
# `best_index_int8` gives the upper of two equally near values; half way is a whole number of halves, so exact here
_MIDDLES = (VALUES[1:] + VALUES[:-1]) * (FINE // 2)
_CODES = np.searchsorted(_MIDDLES, _PLACES, side="right").astype(np.uint8)
_NEAREST = VALUES[_CODES].astype(F)


def _places(eighths: F32Array, name: str) -> Indices:
    """Where 8 * weight / scale, of magnitude up to REACH, is in the tables; in a scratch array of that name."""
    whole = np.floor(eighths, out=scratch("iq4_search._places.whole", eighths.shape))
    narrow = scratch("iq4_search._places.narrow", eighths.shape, np.int16)
    np.copyto(narrow, whole, casting="unsafe")  # f32 to int16 to int64 costs half of f32 to int64
    np.add(narrow, np.int16(REACH), out=narrow)
    places = scratch(name, eighths.shape, np.intp)
    np.copyto(places, narrow)
    return places


def _look_up(table: NDArray[Any], places: Indices, out: NDArray[Any]) -> NDArray[Any]:
    return np.take(table, places, out=out, mode="clip")  # the mode that checks least


def pack_codes(x: F32Array, scales: F32Array) -> Bytes:
    """Codes of the values nearest to weight / scale, two a byte: (32, n) and (n,) f32 -> (n, 16) u8.

    A scale of zero counts as an infinite one. NaN has the last code, since no comparison with it holds.
    """
    inverse = np.where(scales != 0, F(1) / scales, F(0))
    eighths = scratch("pack_codes.eighths", x.shape)
    if (np.abs(inverse) < F(1e37)).all():
        np.multiply(x, FINE * inverse, out=eighths)
    else:  # infinite or nearly: eight times that would make NaNs which ggml does not have
        np.fmin(x * inverse, F(FIRST), out=eighths)
        np.multiply(eighths, FINE, out=eighths)
    np.clip(eighths, F(1 - REACH), F(REACH - 1), out=eighths)
    codes = _look_up(_CODES, _places(eighths, "pack_codes.places"), scratch("pack_codes.codes", x.shape, np.uint8))
    upper = codes[BLOCK // 2 :]
    np.left_shift(upper, 4, out=upper)
    packed: Bytes = np.bitwise_or(codes[: BLOCK // 2], upper, out=upper).T
    return packed


def unpack_codes(codes: Bytes, scales: F32Array) -> F32Array:
    """Scale times value: (n, 16) u8 and (n,) f32 -> (n, 32) f32."""
    halves = np.empty((len(codes), 2, BLOCK // 2), np.uint8)
    np.bitwise_and(codes, 15, out=halves[:, 0])
    np.right_shift(codes, 4, out=halves[:, 1])
    values = VALUES.astype(F).take(halves.reshape(-1, BLOCK))
    values *= scales[:, None]
    return values


# --- one fit after the other, each taken if it is better than the last one taken ---


@dataclass
class _Best:
    """The last fit taken for each block, and what the next one is compared with."""

    scale: F32Array  # (n,)
    score: F32Array  # (n,) scale * sum of w * q * x

    def offer(self, blocks: Indices, sum_qx: F32Array, sum_q2: F32Array) -> None:
        """Take the better ones of some blocks' fits."""
        better = np.flatnonzero((sum_q2 > 0) & (sum_qx * sum_qx > self.score[blocks] * sum_q2))
        taken, sum_qx = blocks[better], sum_qx[better]
        self.scale[taken] = sum_qx / sum_q2[better]
        self.score[taken] = self.scale[taken] * sum_qx


def _sums(x: F32Array, weights: F32Array, places: Indices) -> tuple[F32Array, F32Array]:
    """Sums of w * q * x and of w * q * q over each block, q the value at its place: -> twice (n,) f32."""
    q = _look_up(_NEAREST, places, scratch("_sums.q", x.shape))
    weighted = np.multiply(weights, q, out=scratch("_sums.weighted", x.shape))
    return dots(weighted, x) + F(0), dots(weighted, q)  # a sum in C begins with 0 and is never minus zero


def _gather(a: F32Array, blocks: Indices, name: str) -> F32Array:
    out = scratch(name, (BLOCK, blocks.size))
    return np.take(a, blocks, axis=1, out=out, mode="clip")


def _fit_grid(x: F32Array, weights: F32Array | None, blocks: Indices, inverse: F32Array, best: _Best) -> None:
    """Offer the fits of one grid for some blocks."""
    some = _gather(x, blocks, "_fit_grid.x")
    if weights is None:
        w = np.square(some, out=scratch("_fit_grid.weights", some.shape))
    else:
        w = _gather(weights, blocks, "_fit_grid.weights")
    eighths = np.multiply(some, FINE * inverse, out=scratch("_fit_grid.eighths", some.shape))
    best.offer(blocks, *_sums(some, w, _places(eighths, "_fit_grid.places")))


def best_scales(x: F32Array, weights: F32Array | None = None, plainly: bool = False) -> F32Array:
    """Scale of the best fit of each block: (32, n) f32 and weights of errors like it -> (n,) f32.

    Without `weights` they are the squares of x. They must not be negative unless `plainly`, which fits every grid: the
    same result at several times the cost.
    """
    largest = largest_of(x)
    negligible = np.abs(largest) < NEGLIGIBLE
    largest[negligible] = 1
    inverse = F(1) / (largest / F(FIRST))
    eighths = np.multiply(x, FINE * inverse, out=scratch("best_scales.eighths", x.shape))
    places = _places(eighths, "best_scales.places")
    w = np.square(x, out=scratch("best_scales.weights", x.shape)) if weights is None else weights
    sum_qx, sum_q2 = _sums(x, w, places)
    scale: F32Array = np.where(sum_q2 > 0, sum_qx / sum_q2, F(0))
    best = _Best(scale, scale * sum_qx)
    todo = np.ones((GRIDS, largest.size), np.bool_) if plainly else _worthwhile(x, w, largest, eighths, places)
    todo[:, negligible] = False
    for grid in reversed(range(GRIDS)):
        blocks = np.flatnonzero(todo[grid])
        if blocks.size:
            _fit_grid(x, weights, blocks, F(-INNERMOST - grid) / largest[blocks], best)
    best.scale[negligible] = 0
    return best.scale


# --- which grids can win ---


def _steps() -> tuple[F32Array, F32Array, F32Array, F32Array]:
    """Tables over places of the first grid: value on grid 0, step outward, growth of the square, threshold * 127 * 8.

    Between grids 0 and 14 a weight can pass the threshold that is within 120 to 134 times weight / largest. Where there
    is one, the lowest bit of the value is set as a mark.
    """
    ratio = (_PLACES + 0.5) / (FINE * FIRST)  # weight / largest in the middle of the place
    value = VALUES[np.searchsorted(_MIDDLES, -FIRST * FINE * ratio, side="right")].astype(F)
    step, growth, threshold = np.zeros((3, _PLACES.size), F)
    half = 0.51 / (FINE * FIRST)
    near, far = (np.abs(ratio) - half) * (INNERMOST - 0.01), (np.abs(ratio) + half) * (INNERMOST + GRIDS - 0.99)
    for below, above in pairwise(VALUES):
        middle = (below + above) / 2
        inner, outer = (below, above) if middle > 0 else (above, below)
        passed = (near < abs(middle)) & (abs(middle) < far) & (ratio * middle < 0)
        value[passed], step[passed], growth[passed] = inner, outer - inner, outer**2 - inner**2
        threshold[passed] = -middle * FIRST * FINE
    value.view(np.int32)[step != 0] |= 1
    return value, step, growth, threshold


_VALUE, _STEP, _GROWTH, _THRESHOLD = _steps()

# In units of 2^-24, the error of one rounding: ggml's sums of w * q * x and w * q * q have 33 roundings, ours 14 and 16
# (but 17, as steps from 1 to -10 make magnitudes of w * q * x a fifth greater). Where a fit explains 98 % of the power,
# those add up to at most 1.011 of their sum (Cauchy and Schwarz). So a score sum_qx^2 / sum_q2 is off by at most
# 2 * 1.011 * (33 + 17) + 33 + 16 < 151, and a comparison in ggml by 4. Between the best of 16 fits and one that is
# worse by 64 there is somewhere a gap of over 4, which no comparison crosses: the worse one has no part in the result.
SLACK = (2 * 151 + 64) * 2.0**-24
EXPLAINED = 0.98
ORDINARY = 2.0**100  # f32 has all its bits for numbers between this and its inverse, also for their roots
TIE = F(1e-4)  # six roundings of a number up to 134, doubled


def _worthwhile(x: F32Array, weights: F32Array, largest: F32Array, eighths: F32Array, places: Indices) -> Flags:
    """Grids that may be taken last, (15, n); for blocks of which nothing is certain, all. Several alike count once.

    From grid 0 to 14 no weight steps over more than one threshold, so the sums of all grids are those of grid 0 and
    where each weight steps. `eighths` and `places` are those of the first grid.
    """
    value = _look_up(_VALUE, places, scratch("_worthwhile.value", x.shape))
    marks = scratch("_worthwhile.marks", x.shape, np.bool_)
    np.copyto(marks, value.view(np.bool_)[:, :: value.itemsize])
    at = np.flatnonzero(marks)
    place = _pick(places, at, "_worthwhile.place")
    keys = _first_grids(x, largest, eighths, at, place)
    weighted = np.multiply(weights, x, out=scratch("_worthwhile.weighted", x.shape))
    power = dots(weighted, x)
    sum_qx = _by_grid("_worthwhile.sum_qx", keys, largest.size, _pick(weighted, at, "_worthwhile.a"), _STEP, place)
    sum_qx[0] += _loose_dots(weighted, value)
    sum_q2 = _by_grid("_worthwhile.sum_q2", keys, largest.size, _pick(weights, at, "_worthwhile.a"), _GROWTH, place)
    new = sum_q2 > 0  # else no weight steps over that counts: the fit of the grid before once more
    new[0] = True
    np.multiply(weights, value, out=weighted)
    sum_q2[0] += _loose_dots(weighted, value)
    _accumulate(sum_qx)
    _accumulate(sum_q2)
    return _near_best(sum_qx, sum_q2, power, new)


def _pick(a: NDArray[Any], at: Indices, name: str) -> NDArray[Any]:
    """a[at] of the flattened array, in a scratch array."""
    return np.take(a.reshape(-1), at, out=scratch(name, at.shape, a.dtype), mode="clip")


def _first_grids(x: F32Array, largest: F32Array, eighths: F32Array, at: Indices, place: Indices) -> Indices:
    """grid * n + block of the weights at `at`: the first grid, 0 to 14, on which each is over its threshold, or 15."""
    n = largest.size
    exact = _pick(_THRESHOLD, place, "_first_grids.exact")
    exact /= _pick(eighths, at, "_first_grids.eighths")
    whole, off = scratch("_first_grids.whole", at.shape), scratch("_first_grids.off", at.shape)
    np.rint(exact, out=whole)
    np.subtract(exact, whole, out=off)
    np.abs(off, out=off)
    tied = np.flatnonzero(off < TIE)
    np.ceil(exact, out=exact)
    if tied.size:
        threshold = _THRESHOLD[place[tied]] / F(-FIRST)
        over = _is_over(x.reshape(-1)[at[tied]], largest[at[tied] % n], threshold, whole[tied])
        exact[tied] = whole[tied] + ~over
    np.subtract(exact, F(INNERMOST), out=exact)
    np.clip(exact, F(0), F(GRIDS), out=exact)
    row = scratch("_first_grids.row", at.shape, np.int32)
    keys: Indices = scratch("_first_grids.keys", at.shape, np.intp)
    np.copyto(row, at, casting="unsafe")
    np.floor_divide(row, np.int32(n), out=row)  # at % n would take four times as long
    np.copyto(whole, row, casting="unsafe")
    np.subtract(exact, whole, out=exact)
    np.copyto(keys, exact, casting="unsafe")
    keys *= n
    keys += at
    return keys


def _is_over(x: F32Array, largest: F32Array, threshold: F32Array, target: F32Array) -> Flags:
    """Whether weights are over thresholds (in eighths) in ggml where the largest one is laid on -target, all (n,).

    Half way is over a positive one only. Weights rounded to bfloat16 are often exactly there, but for f32's roundings.
    """
    eighths = x * (FINE * (-target / largest))
    over: Flags = np.where(threshold > 0, eighths >= threshold, eighths < threshold)
    return over


def _loose_dots(a: F32Array, b: F32Array) -> F32Array:
    """Dot product of each column in any order, with at most 10 roundings in sequence after the products."""
    parts = (4, BLOCK // 4, -1)
    sums: F32Array = np.einsum("kij,kij->kj", a.reshape(parts), b.reshape(parts)).sum(axis=0)
    return sums


def _by_grid(name: str, keys: Indices, n: int, factors: F32Array, table: F32Array, place: Indices) -> F64Array:
    """Sums of factor * table[place] at each key = grid * n + block, without grid 15: -> (15, n), a scratch array."""
    changes = scratch("_by_grid.changes", keys.shape, np.float64)
    np.multiply(factors, _pick(table, place, "_by_grid.table"), out=factors)
    np.copyto(changes, factors)
    sums = scratch(name, (GRIDS + 1, n), np.float64)
    sums.fill(0)
    np.add.at(sums.reshape(-1), keys, changes)
    return sums[:GRIDS]


def _accumulate(sums: F64Array) -> None:
    """np.cumsum over the first axis, in place and in a twentieth of its time."""
    for before, after in pairwise(sums):
        after += before


def _near_best(sum_qx: F64Array, sum_q2: F64Array, power: F32Array, new: Flags) -> Flags:
    """Which of (15, n) fits are the best of their block or nearly so; every one where f32 may do anything."""
    score = np.square(sum_qx, out=sum_qx)
    score /= sum_q2
    top = score.max(axis=0)
    near: Flags = score >= top * (1 - SLACK)
    near &= new
    sure = top >= EXPLAINED * power
    for number in (top, sum_q2[0], top * sum_q2[0]):
        sure &= (number >= 1 / ORDINARY) & (number <= ORDINARY)
    near[:, ~sure] = True
    return near
