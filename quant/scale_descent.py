"""The search for one scale a block, x ~ scale * code, that Q3_K makes without importance.

Source: ggml-quants.c, `make_q3_quants` with do_rmse. ggml starts from the grid on which the largest weight gets the
code -nmax, goes through the weights in order, moves each to the code that fits the scale of the others best if that
explains more of the energy, and repeats this until a pass moves none, five passes at most.

Of the blocks that can move at all a third do. So all weights of the blocks are judged at once, the first move of each
block is made, and only the blocks that moved are judged again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.columns import (
    NEAREST_LIMIT,
    NEGLIGIBLE,
    as_c,
    column_sums,
    dots,
    largest_of,
    nearest_int,
    take_columns,
)
from convert_drafter.quant.scratch import scratch

F = np.float32
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]
PASSES = 5
PIECE = 8192  # columns that are judged at a time in the first round; later ones have fewer
SMALL = F(1e-8)


@dataclass(frozen=True)
class _State:
    """Columns x (16, n) f32 and where they stand: codes (16, n) f32, and (n,) the sums that judge them.

    `ahead` (n,): the weights that come after the last move in this pass, as bits; `passes` (n,) that are over; `places`
    (n,) of the columns among all.
    """

    x: F32Array
    codes: F32Array
    sum_xl: F32Array
    sum_l2: F32Array
    ahead: NDArray[np.int32]
    passes: NDArray[np.int32]
    places: Places

    def take(self, some: Places) -> _State:
        return _State(
            take_columns(self.x, some),
            take_columns(self.codes, some),
            self.sum_xl[some],
            self.sum_l2[some],
            self.ahead[some],
            self.passes[some],
            self.places[some],
        )


@dataclass(frozen=True)
class _Moves:
    """For each weight: its best code and the sums with it, whether ggml would move it, and whether rounding is odd."""

    code: F32Array
    sum_xl: F32Array
    sum_l2: F32Array
    taken: Bools
    wild: Bools


def descend_scale(x: F32Array, nmax: int) -> F32Array:
    """The scale (n,) f32 of each column of x (16, n) f32, finite."""
    with as_c():
        largest = largest_of(x)
        state = _start(x, largest, nmax)
        sum_xl, sum_l2 = state.sum_xl, state.sum_l2
        wild = _descend(state, np.flatnonzero(_may_move(state, largest)), nmax)
        scale = sum_xl / sum_l2
        scale[~(sum_l2 > 0)] = 0
        scale[np.abs(largest) < NEGLIGIBLE] = 0
        if wild.size:
            scale[wild] = descend_plain(take_columns(x, wild), nmax)[0]
        return scale


def descend_plain(x: F32Array, nmax: int) -> tuple[F32Array, Bytes]:
    """The search as ggml writes it: scale (n,) f32 and codes (16, n) u8, 0..2 * nmax - 1, all 0 in an empty column."""
    with as_c():
        size = np.abs(x)
        largest = np.take_along_axis(x, size.argmax(axis=0)[None], axis=0)[0]
        codes = np.clip(nearest_int(x * (F(-nmax) / largest)), -nmax, nmax - 1).astype(F)
        w = np.square(x)
        sum_xl, sum_l2 = column_sums(w * x * codes), column_sums(w * codes * codes)
        active = np.ones(sum_xl.shape, np.bool_)
        for _ in range(PASSES):
            moved = np.zeros_like(active)
            for row in range(len(x)):
                rest_xl = sum_xl - w[row] * x[row] * codes[row]
                rest_l2 = sum_l2 - w[row] * codes[row] * codes[row]
                new = np.clip(nearest_int(x[row] * rest_l2 / rest_xl), -nmax, nmax - 1).astype(F)
                new_xl, new_l2 = rest_xl + w[row] * x[row] * new, rest_l2 + w[row] * new * new
                better = active & (rest_xl > 0) & (new != codes[row]) & (new_l2 > 0)
                better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
                for into, values in ((sum_xl, new_xl), (sum_l2, new_l2), (codes[row], new)):
                    np.putmask(into, better, values)
                moved |= better
            active = moved
        scale = np.where(sum_l2 > 0, sum_xl / sum_l2, F(0))
        empty = size.max(axis=0) < NEGLIGIBLE
        scale[empty], codes[:, empty] = 0, -nmax
        return scale, (codes + F(nmax)).astype(np.uint8)


def _start(x: F32Array, largest: F32Array, nmax: int) -> _State:
    """The codes of the grid on which the largest weight gets -nmax, and their sums."""
    codes, terms = scratch("_start.codes", x.shape), scratch("_start.terms", x.shape)
    np.multiply(x, F(-nmax) / largest, out=codes)
    np.rint(codes, out=codes)
    codes.clip(F(-nmax), F(nmax - 1), out=codes)
    np.square(x, out=terms)
    np.multiply(terms, codes, out=terms)
    sum_l2 = dots(terms, codes)
    np.square(x, out=terms)
    np.multiply(terms, x, out=terms)
    n = x.shape[1]
    return _State(x, codes, dots(terms, codes), sum_l2, np.full(n, -1, np.int32), np.zeros(n, np.int32), np.arange(n))


def _may_move(state: _State, largest: F32Array) -> Bools:
    """The columns in which a weight may have another code on the scale of the others than the one it has.

    If the largest weight is positive, all terms of sum_xl are negative or zero, and so is it without one of them: then
    ggml moves none. Else, if x / scale is d away from the code, it is d / (1 - share) away on the scale of the others,
    where the weight makes up `share` of sum_xl. Both sides of d < (1 - share) / 2 are known to better than 1e-4, unless
    the weights are so small that their cubes are denormal.
    """
    distance, share = scratch("_may_move.distance", state.x.shape), scratch("_may_move.share", state.x.shape)
    np.multiply(state.x, state.sum_l2 / state.sum_xl, out=distance)
    np.subtract(distance, state.codes, out=distance)
    np.abs(distance, out=distance)
    np.square(state.x, out=share)
    np.multiply(share, state.x, out=share)
    np.multiply(share, state.codes, out=share)
    np.multiply(share, F(0.5) / state.sum_xl, out=share)
    np.add(distance, share, out=distance)
    still: Bools = np.maximum.reduce(distance, axis=0) < F(0.499)  # False for NaN
    return ~(still & (largest < -SMALL)) & (largest <= -NEGLIGIBLE)


def _descend(start: _State, places: Places, nmax: int) -> Places:
    """Make all moves of the columns at `places`, in the sums of `start`; returns those that it cannot do."""
    wild: list[Places] = [places[:0]]
    moved = []
    for first in range(0, len(places), PIECE):
        moved.append(_move_once(start.take(places[first : first + PIECE]), start, nmax, wild))
    while any(len(state.places) for state in moved):
        moved = [_move_once(moved[0] if len(moved) == 1 else _joined(moved), start, nmax, wild)]
    return np.concatenate(wild)


def _joined(parts: list[_State]) -> _State:
    return _State(*(np.concatenate([getattr(p, f.name) for p in parts], axis=-1) for f in fields(_State)))


def _move_once(state: _State, start: _State, nmax: int, wild: list[Places]) -> _State:
    """Make the next move of each column that has one, and return only these. Others are done, or appended to `wild`."""
    moves = _judge(state, nmax)
    if moves.wild.any():
        odd = moves.wild.any(axis=0)
        wild.append(state.places[odd])
        moves.taken[:, odd] = False
    rows = _bits(moves.taken)
    later = rows & state.ahead
    passes = state.passes + (later == 0)
    moving = np.flatnonzero((rows != 0) & (passes < PASSES))
    rows, later = rows[moving], later[moving]
    row = _lowest_bit(np.where(later == 0, rows, later))
    cells, columns = (row, moving), np.arange(len(row))
    after = state.take(moving)
    after.codes[row, columns] = moves.code[cells]
    after.sum_xl[:] = start.sum_xl[after.places] = moves.sum_xl[cells]
    after.sum_l2[:] = start.sum_l2[after.places] = moves.sum_l2[cells]
    after.ahead[:], after.passes[:] = -(2 << row), passes[moving]
    return after


def _bits(taken: Bools) -> NDArray[np.int32]:
    """Bit r of a column's number is set if taken[r]: (16, n) bool -> (n,) i32."""
    bytes_of_bits = taken.view(np.uint8) * (1 << np.arange(len(taken)) % 8).astype(np.uint8)[:, None]
    low, high = np.bitwise_or.reduce(bytes_of_bits.reshape(2, 8, -1), axis=1).astype(np.int32)
    return np.asarray(low | high << 8)


def _lowest_bit(numbers: NDArray[np.int32]) -> Places:
    lowest: Places = np.bitwise_count((numbers & -numbers) - 1).astype(np.intp)
    return lowest


def _judge(state: _State, nmax: int) -> _Moves:
    """What ggml would do with each weight if it came to it now; the sums are (n,), all else is (16, n) or (n,)."""
    x, codes = state.x, state.codes
    w, wx, rest_xl, rest_l2, code = (scratch(f"_judge.{name}", x.shape) for name in ("w", "wx", "xl", "l2", "code"))
    np.square(x, out=w)
    np.multiply(w, x, out=wx)
    np.multiply(wx, codes, out=rest_xl)
    np.subtract(state.sum_xl, rest_xl, out=rest_xl)
    np.multiply(w, codes, out=rest_l2)
    np.multiply(rest_l2, codes, out=rest_l2)
    np.subtract(state.sum_l2, rest_l2, out=rest_l2)
    np.multiply(x, rest_l2, out=code)
    np.divide(code, rest_xl, out=code)
    taken = rest_xl > 0
    wild = np.zeros((1, 1), np.bool_)
    if not max(code.max(initial=0), -code.min(initial=0)) < NEAREST_LIMIT:  # also for NaN
        wild = taken & ~(np.abs(code) < NEAREST_LIMIT)
    np.rint(code, out=code)
    code.clip(F(-nmax), F(nmax - 1), out=code)
    taken &= code != codes
    np.multiply(wx, code, out=wx)
    np.add(rest_xl, wx, out=rest_xl)
    np.multiply(w, code, out=w)
    np.multiply(w, code, out=w)
    np.add(rest_l2, w, out=rest_l2)
    taken &= rest_l2 > 0
    np.multiply(rest_xl, rest_xl, out=wx)
    np.multiply(wx, state.sum_l2, out=wx)
    np.multiply(state.sum_xl * state.sum_xl, rest_l2, out=w)
    taken &= wx > w
    return _Moves(code, rest_xl, rest_l2, taken, wild)
