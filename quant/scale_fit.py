"""The fit of a super-block's scales to few bits under importance weights (`ggml-quants.c: make_qp_quants`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.columns import NEGLIGIBLE, column_sums, nearest_int

PASSES = 5
F = np.float32


def fit_scales(values: F32Array, weights: F32Array, top: int) -> tuple[F32Array, Bytes]:
    """Values (n, k) f32 as multiples 0..top of one scale a row, weighted (n, k): -> (n,) f32, (n, k) u8."""
    x, weights = np.ascontiguousarray(values.T), np.ascontiguousarray(weights.T)
    largest = np.clip(x.max(axis=0), F(0), None)
    inverse = _best_inverse(x, weights, largest, top)
    codes = _limited(x * inverse, top)
    scale = _descend(x, weights, codes, top)
    empty = largest < NEGLIGIBLE
    scale[empty], codes[:, empty] = 0, 0
    return scale, codes.T.astype(np.uint8)


def _limited(exact: F32Array, top: int) -> NDArray[np.int32]:
    return np.minimum(nearest_int(exact), top)


def _best_inverse(x: F32Array, weights: F32Array, largest: F32Array, top: int) -> F32Array:
    """The inverse scale of nine near `top / largest` whose codes have the smallest weighted squared error."""
    inverse = F(top) / largest
    best = _error(x, weights, inverse, nearest_int(x * inverse).astype(np.uint8))
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (F(0.1) * F(step) + F(top)) / largest
        error = _error(x, weights, trial, _limited(x * trial, top))
        better = error < best
        best[better], inverse[better] = error[better], trial[better]
    return inverse


def _error(x: F32Array, weights: F32Array, inverse: F32Array, codes: NDArray[np.integer]) -> F32Array:
    scale: F32Array = np.divide(F(1), inverse)
    difference = x - scale * codes.astype(F)
    return column_sums(weights * difference * difference)


def _descend(x: F32Array, weights: F32Array, codes: NDArray[np.int32], top: int) -> F32Array:
    """Improve one code after the other, in place, until a pass changes none; returns the scale that fits them."""
    weighted = weights * x
    stored = (codes & 0xFF).astype(F)  # codes are bytes in ggml; the sums before count them as they were
    sum_xl = column_sums(weighted * codes.astype(F))
    sum_l2 = column_sums(weights * codes.astype(F) * codes.astype(F))
    active = np.ones(sum_xl.shape, np.bool_)
    for _ in range(PASSES):
        changed = np.zeros_like(active)
        for row, (w, wx, values) in enumerate(zip(weights, weighted, x, strict=True)):
            old = stored[row]
            rest_xl, rest_l2 = sum_xl - wx * old, sum_l2 - w * old * old
            new = _limited(values * rest_l2 / rest_xl, top)
            real = new.astype(F)
            new_xl, new_l2 = rest_xl + wx * real, rest_l2 + w * real * real
            better = active & (rest_xl > 0) & (rest_l2 > 0) & (real != old)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            np.putmask(sum_xl, better, new_xl)
            np.putmask(sum_l2, better, new_l2)
            np.putmask(old, better, (new & 0xFF).astype(F))
            changed |= better
        active = changed
        if not active.any():
            break
    codes[...] = stored
    return np.where(sum_l2 > 0, sum_xl / sum_l2, F(0))
