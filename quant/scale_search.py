"""The search for one scale a block, x ~ scale * code, that Q6_K, Q3_K and the weighted Q4_0 and Q5_0 share.

Source: ggml-quants.c, `make_qx_quants` with rmse_type 1. Nineteen trials near the grid on which the largest weight gets
the code -nmax; each is scored by the part of the weights' energy that its codes explain, (sum w x l)^2 / sum w l^2.

Neighbouring trials mostly round all weights of a block to the same codes. They have the same sums then, so that the
second of them changes nothing in ggml. A table tells where codes may change, and only the first trial of every run of
equal ones is scored: 8 of 19 are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.columns import (
    NEGLIGIBLE,
    as_c,
    column_sums,
    dots,
    largest_of,
    nearest_int,
    round_codes,
    take_columns,
)
from convert_drafter.quant.scratch import scratch

F, U8, U32 = np.float32, np.uint8, np.uint32
Places = NDArray[np.intp]
Masks = NDArray[np.uint32]  # bit j: trial j

ENORMOUS = F(1e30)  # up to here no inverse scale is denormal
STEPS = [F(0.1) * F(step) for step in range(-9, 10)]  # by which the trials differ from nmax
FIRST = 9  # the trial that ggml makes first and keeps if no other one is better
ALL = U32((1 << len(STEPS)) - 1)
CELLS = 16_384  # of the table, between zero and the largest weight
ROWS = 4  # of x that are looked up at a time, so that their indices stay in the cache
IN_CELL_0 = U32(1 << 24)  # above the sum of 32 masks of 19 bits


@dataclass(frozen=True)
class Found:
    """Per column: the scale, the inverse scale of the trial whose codes it fits, and whether it counts as all zero."""

    scale: F32Array
    inverse: F32Array
    empty: NDArray[np.bool_]


def search_scale(x: F32Array, nmax: int, weights: F32Array | None = None) -> F32Array:
    """The scale (n,) f32 of each column of x (block, n) f32; errors weigh `weights` (block, n) f32 or else x * x.

    Blocks are of 16 or 32 weights. Any numbers are taken, as ggml would.
    """
    return _search(x, nmax, weights).scale


def search_codes(x: F32Array, nmax: int, weights: F32Array | None = None) -> tuple[F32Array, Bytes]:
    """Scale (n,) f32 as `search_scale`, and codes (block, n) u8: 0..2 * nmax - 1, nmax is zero.

    All codes of a column that counts as empty are 0, as in ggml.
    """
    found = _search(x, nmax, weights)
    found.inverse[found.empty] = 0
    codes: NDArray[np.int8] = np.empty(x.shape, np.int8)
    with as_c():
        exact = np.multiply(x, found.inverse, out=scratch("search_codes.exact", x.shape))
        np.copyto(codes, round_codes(exact, -nmax, nmax - 1), casting="unsafe")
    np.add(codes, np.int8(nmax), out=codes)
    codes[:, found.empty] = 0
    return found.scale, codes.view(U8)


def search_plain(x: F32Array, nmax: int, weights: F32Array) -> Found:
    """The search as ggml writes it, for any numbers in x and weights (block, n)."""
    with as_c():
        size = np.abs(x)
        size[np.isnan(size)] = 0  # a NaN is never the largest
        largest = np.take_along_axis(x, size.argmax(axis=0)[None], axis=0)[0]
        inverse = F(-nmax) / largest
        sum_xl, sum_l2 = _sums(x, weights, inverse, nmax)
        scale = np.where(sum_l2 != 0, sum_xl / sum_l2, F(0))
        best = scale * sum_xl
        for step in STEPS[:FIRST] + STEPS[FIRST + 1 :]:
            trial = -(F(nmax) + step) / largest
            sum_xl, sum_l2 = _sums(x, weights, trial, nmax)
            better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
            np.putmask(scale, better, sum_xl / sum_l2)
            np.putmask(best, better, scale * sum_xl)
            np.putmask(inverse, better, trial)
        empty = size.max(axis=0) < NEGLIGIBLE
        scale[empty] = 0
        return Found(scale, inverse, empty)


def _sums(x: F32Array, weights: F32Array, inverse: F32Array, nmax: int) -> tuple[F32Array, F32Array]:
    """Sums of weight * x * code and weight * code^2 over each column, where code = x * inverse, rounded and limited."""
    codes = np.clip(nearest_int(x * inverse), -nmax, nmax - 1).astype(F)
    return column_sums(weights * x * codes), column_sums(weights * codes * codes)


def _search(x: F32Array, nmax: int, weights: F32Array | None) -> Found:
    with as_c():
        largest = largest_of(x)
        found = _search_runs(x, nmax, weights, largest)
        size = np.abs(largest)
        np.less(size, NEGLIGIBLE, out=found.empty)
        found.scale[found.empty] = 0
        if not size.max(initial=0) <= ENORMOUS:  # NaN and infinities can be among scales that are searched once more
            places = np.flatnonzero(~(size <= ENORMOUS))
            sub = take_columns(x, places)
            w = np.square(sub) if weights is None else take_columns(weights, places)
            again = search_plain(sub, nmax, w)
            found.scale[places], found.inverse[places], found.empty[places] = again.scale, again.inverse, again.empty
        return found


@cache
def _table(nmax: int) -> Masks:
    """Where r = -x / largest is near (i - CELLS) / CELLS: bit j is set if the code may differ at trials j - 1 and j."""
    cell = np.arange(2 * CELLS + 1)[:, None] - CELLS
    widths = nmax + 0.1 * np.arange(-9, 10)
    # Half a cell and a little more: rounding to f32 moves r by less than 0.01 cells, and x * inverse by less than 1e-5.
    exact = [(cell + side) / CELLS * widths + slack for side in (-0.51, 0.51) for slack in (-1e-5, 1e-5)]
    ends = np.clip(np.rint(exact), -nmax, nmax - 1)
    low, high = ends.min(axis=0), ends.max(axis=0)
    differ = np.maximum(high[:, 1:], high[:, :-1]) > np.minimum(low[:, 1:], low[:, :-1])
    masks = np.asarray((differ << np.arange(1, 19)).sum(axis=1), U32)
    masks[0] = IN_CELL_0
    return masks


def _runs(x: F32Array, largest: F32Array, nmax: int) -> Masks:
    """The trials that may have other codes than those before them, and the one before all: (n,) u32."""
    table, runs, sums = _table(nmax), np.ones(x.shape[1], U32), np.zeros(x.shape[1], U32)
    shape = (ROWS, x.shape[1])
    place, narrow = scratch("_runs.place", shape), scratch("_runs.narrow", shape, np.int32)
    index, masks = scratch("_runs.index", shape, np.intp), scratch("_runs.masks", shape, U32)
    per_cell = F(-CELLS) / largest
    for row in range(0, len(x), ROWS):
        np.multiply(x[row : row + ROWS], per_cell, out=place)
        np.add(place, F(CELLS + 0.5), out=place)
        np.copyto(narrow, place, casting="unsafe")
        np.copyto(index, narrow)
        np.take(table, index, out=masks, mode="clip")  # places of empty columns may be anywhere
        for mask in masks:
            np.bitwise_or(runs, mask, out=runs)
            np.add(sums, mask, out=sums)
    # The largest weight lies on nmax - 0.5 at trial 4, so it changes its code there or at 5: as the product rounds. It
    # is in cell 0; the few columns with other weights there are said to change at both.
    early = np.abs((F(nmax) + STEPS[4]) / largest * largest) >= F(nmax - 0.5)
    alone = sums < 2 * IN_CELL_0
    runs &= ALL
    runs |= np.where(alone, np.where(early, U32(1 << 4), U32(1 << 5)), U32(3 << 4))
    return runs


@dataclass(frozen=True)
class _Scores:
    """Sums and inverse scales of up to 19 runs of n columns, (19, n) f32 each; the first `counts[k]` have a run k."""

    counts: list[int]
    sum_xl: F32Array
    sum_l2: F32Array
    inverse: F32Array


def _search_runs(x: F32Array, nmax: int, weights: F32Array | None, largest: F32Array) -> Found:
    """The search where plain rounding is `nearest_int`, which holds if `largest` is neither NaN nor enormous."""
    runs = _runs(x, largest, nmax)
    few = U8(32) - np.bitwise_count(runs)
    order = np.argsort(few, kind="stable")  # columns with many runs first; a radix sort
    counts = [n for n in np.searchsorted(few[order], 32 - np.arange(len(STEPS))).tolist() if n]
    runs = runs[order]
    first = np.bitwise_count(runs & U32((2 << FIRST) - 1)) - U8(1)  # the run of the first trial
    only = np.flatnonzero((runs >> U32(FIRST) & U32(3)) == 3)  # columns where it is a run of its own
    scores = _score(x, nmax, weights, order, largest[order], runs, counts)
    scale, inverse = _choose(scores, first, only, weights is None or bool(weights.min() > 0))
    found = Found(np.empty_like(scale), np.empty_like(scale), np.empty(scale.shape, np.bool_))
    found.scale[order], found.inverse[order] = scale, inverse
    return found


def _score(
    x: F32Array,
    nmax: int,
    weights: F32Array | None,
    order: Places,
    largest: F32Array,
    runs: Masks,
    counts: list[int],
) -> _Scores:
    """Score the runs of the columns x[:, order]; `largest` and `runs` are in that order already. Empties `runs`."""
    xs, w, wx, codes, terms = (scratch(f"_score.{name}", x.shape) for name in ("x", "w", "wx", "codes", "terms"))
    np.take(x, order, axis=1, out=xs, mode="clip")
    if weights is None:
        np.square(xs, out=w)
    else:
        np.take(weights, order, axis=1, out=w, mode="clip")
    np.multiply(w, xs, out=wx)
    sum_xl, sum_l2, inverse = (scratch(f"_score.{name}", (19, x.shape[1])) for name in ("xl", "l2", "inverse"))
    less, trial = scratch("_score.less", runs.shape, U32), scratch("_score.trial", runs.shape, U8)
    negative = np.negative(largest)
    for k, n in enumerate(counts):
        _take_trial(runs[:n], less[:n], trial[:n])
        _inverse_scale(trial[:n], negative[:n], nmax, inverse[k, :n])
        c, t = (array.reshape(-1)[: n * len(x)].reshape(-1, n) for array in (codes, terms))
        np.multiply(xs[:, :n], inverse[k, :n], out=c)
        np.rint(c, out=c)
        c.clip(F(-nmax), F(nmax - 1), out=c)
        np.multiply(w[:, :n], c, out=t)
        sum_l2[k, :n] = dots(t, c)
        sum_xl[k, :n] = dots(c, wx[:, :n])
    return _Scores(counts, sum_xl, sum_l2, inverse)


def _take_trial(runs: Masks, less: Masks, trial: Bytes) -> None:
    """Take the lowest trial out of each mask; `trial` becomes one more than its number, `less` is scratch."""
    np.subtract(runs, U32(1), out=less)
    np.bitwise_xor(runs, less, out=runs)  # the lowest bit and those below
    np.bitwise_count(runs, out=trial)
    np.right_shift(runs, U32(1), out=runs)
    np.subtract(less, runs, out=runs)


def _inverse_scale(trial: Bytes, negative: F32Array, nmax: int, out: F32Array) -> None:
    """-(nmax + step / 10) / largest, where step = trial - 1 - FIRST."""
    np.copyto(out, trial)
    np.subtract(out, F(FIRST + 1), out=out)
    np.multiply(out, F(0.1), out=out)
    np.add(out, F(nmax), out=out)
    np.divide(out, negative, out=out)


def _choose(scores: _Scores, first: Bytes, only: Places, positive: bool) -> tuple[F32Array, F32Array]:
    """Scale and inverse scale of the run that ggml ends with: it takes one after the other if it beats the best.

    `positive`: no sum_l2 is zero.
    """
    width = scores.sum_xl.shape[1]
    place = first * np.intp(width) + np.arange(width)
    sum_xl, sum_l2 = scores.sum_xl.take(place), scores.sum_l2.take(place)
    scale = sum_xl / sum_l2
    scale[sum_l2 == 0] = 0
    best = scale * sum_xl
    scores.sum_xl[first[only], only] = np.nan  # never taken: ggml does not make the first trial again
    last = np.zeros(width, U8)  # one more than the last run that was taken
    score, limit = scratch("_choose.score", best.shape), scratch("_choose.limit", best.shape)
    better = scratch("_choose.better", best.shape, np.bool_)
    for k, n in enumerate(scores.counts):
        xl, l2, s, t, b = scores.sum_xl[k, :n], scores.sum_l2[k, :n], score[:n], limit[:n], better[:n]
        if not positive:
            xl[~(l2 > 0)] = np.nan
        np.square(xl, out=s)
        np.multiply(best[:n], l2, out=t)
        np.greater(s, t, out=b)
        np.divide(xl, l2, out=s)
        np.multiply(s, xl, out=s)
        np.putmask(best[:n], b, s)
        number = b.view(U8)
        np.multiply(number, U8(k + 1), out=number)
        np.maximum(last[:n], number, out=last[:n])
    taken = np.flatnonzero(last)
    place[taken] = (last[taken] - np.intp(1)) * width + taken
    scale[taken] = scores.sum_xl.take(place[taken]) / scores.sum_l2.take(place[taken])
    return scale, scores.inverse.take(place)
