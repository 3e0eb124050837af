"""The search for scale and minimum that Q4_K, Q5_K and Q2_K share: x ~ scale * code + low, low <= 0.

Source: ggml-quants.c: `make_qkx2_quants` (plain), `make_qkx3_quants` (with importance). Each trial rounds the weights
to a slightly different grid, fits scale and low to the codes by weighted least squares, and is kept if its error is
smaller. A trial's grid starts from the low of the best fit so far, so the trials cannot be made in parallel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import F32Array
from convert_drafter.quant.columns import NEAREST_LIMIT, as_c, column_sums, dots, nearest_int, take_columns
from convert_drafter.quant.scratch import scratch

F = np.float32
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """The trials: `count` grids of `levels + first + step * i` steps. `absolute` errors instead of squared ones.

    `saturating`: codes of the trials are limited before they are rounded (`make_qkx3_quants`), not after.
    """

    levels: int
    first: float
    step: float
    count: int
    absolute: bool = False
    saturating: bool = False

    def widths(self) -> list[np.float32]:
        first, step, levels = F(self.first), F(self.step), F(self.levels)
        return [first + step * F(i) + levels for i in range(self.count)]


@dataclass(frozen=True)
class Fit:
    """Per column: `scale`, `low` (n,) f32, and `codes` (block, n) f32 where they were asked for."""

    scale: F32Array
    low: F32Array
    codes: F32Array | None = None


def search_min(x: F32Array, weights: F32Array, grid: Grid, keep_codes: bool = False) -> Fit:
    """Fit every column of x (block, n) f32; columns whose numbers leave `nearest_int`'s range are done literally."""
    with as_c():
        fit, wild = _search(x, weights, grid, keep_codes, literal=False)
        if wild.any():
            places = np.flatnonzero(wild)
            again, _ = _search(take_columns(x, places), take_columns(weights, places), grid, keep_codes, literal=True)
            fit.scale[places], fit.low[places] = again.scale, again.low
            if fit.codes is not None:
                fit.codes[:, places] = again.codes
        return fit


def codes_of_search(x: F32Array, weights: F32Array, grid: Grid) -> F32Array:
    """The codes of each column's best trial, (block, n) f32: for the few columns that keep them."""
    codes = search_min(x, weights, grid, keep_codes=True).codes
    assert codes is not None
    return codes


def _search(x: F32Array, weights: F32Array, grid: Grid, keep_codes: bool, literal: bool) -> tuple[Fit, Bools]:
    """The fit, and the columns where plain rounding is not what ggml's `nearest_int` gives (none if `literal`)."""
    lowest, high = _first_zeros(x, x.min(axis=0)), _first_zeros(x, x.max(axis=0))
    low = lowest.copy()  # not clipped: that would make 0 of -0
    np.putmask(low, low > 0, F(0))
    sum_w, sum_x = column_sums(weights), dots(weights, x)
    _sign_sums(x, weights, sum_x)
    codes = scratch("search_min.codes", x.shape)
    span = high - low
    width: F32Array = np.divide(F(grid.levels), span)
    scale: F32Array = np.divide(F(1), width)
    narrow = _narrow(lowest, high, grid)
    flat = high == low  # nothing to fit: the scale stays zero, and so do the codes
    narrow[flat] = -1
    wild = ~(span > narrow)
    _round(x, low, width, grid, literal, False, codes)
    kept = codes.copy() if keep_codes else None
    best = _error(x, weights, codes, scale, low, grid.absolute)
    for steps in grid.widths():
        np.subtract(high, low, out=span)
        if not (tame := span > narrow).all():
            wild |= ~tame
        np.divide(steps, span, out=width)
        _round(x, low, width, grid, literal, grid.saturating, codes)
        trial, valid = _least_squares(x, weights, codes, sum_w, sum_x)
        if kept is not None:
            candidate = codes.copy()
        error = _error(x, weights, codes, trial.scale, trial.low, grid.absolute)
        better = valid & (error < best)
        for into, new in ((best, error), (scale, trial.scale), (low, trial.low)):
            np.putmask(into, better, new)
        if kept is not None:
            np.copyto(kept, candidate, where=better)
    if kept is not None:
        kept[:, flat] = 0
    return Fit(scale, low, kept), wild & (not literal)


def _first_zeros(x: F32Array, extremes: F32Array) -> F32Array:
    """Give those of the columns' extremes (n,) that are zero the sign of the column's first zero, as ggml's loop does.

    It is the sign of 1 / (high - low) once a fit has moved low up to high, and Q4_1 and Q5_1 store that of low.
    """
    places = np.flatnonzero(extremes == 0)
    if places.size:
        some = take_columns(x, places)
        extremes[places] = np.take_along_axis(some, (some == 0).argmax(axis=0)[None], axis=0)[0]
    return extremes


def _sign_sums(x: F32Array, weights: F32Array, sums: F32Array) -> None:
    """A sum of nothing but -0 is -0, since ggml starts with the first product; `dots` may start with 0."""
    places = np.flatnonzero(sums == 0)
    if places.size:
        products = take_columns(x, places) * take_columns(weights, places)
        sums[places[(np.signbit(products) & (products == 0)).all(axis=0)]] = F(-0.0)


def _narrow(lowest: F32Array, high: F32Array, grid: Grid) -> F32Array:
    """The span below which (lowest - low) * width may leave the range of `nearest_int`, or width overflow.

    At the largest x the product is the grid's number of steps; it is most extreme at the smallest x.
    """
    narrow = (high - lowest) * (F(grid.levels + 2) / NEAREST_LIMIT)
    return np.clip(narrow, F(1e-36), None, out=narrow)


def _round(
    x: F32Array, low: F32Array, width: F32Array, grid: Grid, literal: bool, saturating: bool, codes: F32Array
) -> None:
    """codes = x on the grid that starts at `low`, limited to 0..levels."""
    np.subtract(x, low, out=codes)
    np.multiply(codes, width, out=codes)
    if not literal:
        np.rint(codes, out=codes)
        np.clip(codes, F(0), F(grid.levels), out=codes)
    elif saturating:
        codes[...] = np.where(codes > 0, np.rint(np.fmin(codes, F(grid.levels))), F(0))
    else:
        codes[...] = np.clip(nearest_int(codes), 0, grid.levels)


def _least_squares(
    x: F32Array, weights: F32Array, codes: F32Array, sum_w: F32Array, sum_x: F32Array
) -> tuple[Fit, Bools]:
    """Scale and low that fit x to the codes best, and where there is such a fit."""
    product = np.multiply(weights, codes, out=scratch("min_search.product", x.shape))
    sum_l, sum_xl, sum_l2 = column_sums(product), dots(product, x), dots(product, codes)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale: F32Array = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
    low: F32Array = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
    if (positive := low > 0).any():
        np.copyto(scale, sum_xl / sum_l2, where=positive)
        low[positive] = 0
    return Fit(scale, low), determinant > 0


def _error(x: F32Array, weights: F32Array, codes: F32Array, scale: F32Array, low: F32Array, absolute: bool) -> F32Array:
    """Weighted error of each column; the codes are spoilt, since one array less is 15 % less time."""
    np.multiply(codes, scale, out=codes)
    np.add(codes, low, out=codes)
    np.subtract(codes, x, out=codes)
    (np.abs if absolute else np.square)(codes, out=codes)
    return dots(codes, weights)
