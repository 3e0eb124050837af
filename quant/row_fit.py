"""Importance-weighted fits of Q4_0, Q4_1, Q5_0 and Q5_1, where the whole row says how large weights are.

Source: ggml-quants.c, `quantize_row_q4_0_impl` and its like.
"""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.columns import column_sums, columns, weigh_from
from convert_drafter.quant.min_search import Grid, search_min
from convert_drafter.quant.quads import BLOCK
from convert_drafter.quant.scale_search import search_codes

F = np.float32


def fit_scale(rows: F32Array, importance: F32Array, zero: int) -> tuple[F32Array, Bytes]:
    """Scale (n,) f32 and codes (32, n) u8 of each block of rows (m, row) f32; 0 has the code `zero`."""
    x, weights = _weigh(rows, importance)
    return search_codes(x, zero, weights)


def fit_min(rows: F32Array, importance: F32Array, top: int) -> tuple[F32Array, F32Array, Bytes]:
    """Scale and minimum (n,) f32 and codes (32, n) u8 up to `top` of each block of rows (m, row) f32."""
    x, weights = _weigh(rows, importance)
    fit = search_min(x, weights, Grid(top, -0.9, 0.05, 37, saturating=True), keep_codes=True)
    assert fit.codes is not None
    return fit.scale, fit.low, fit.codes.astype(np.uint8)


def _weigh(rows: F32Array, importance: F32Array) -> tuple[F32Array, F32Array]:
    """Blocks as columns and the weight of each error: importance * sqrt(mean square of the row + x^2).

    (m, row) f32 and (row,) f32 -> twice (32, m * row / 32) f32, scratch arrays.
    """
    width = rows.shape[1]
    squares = columns(rows, width, "row_fit.squares")
    mean = column_sums(np.square(squares, out=squares)) / F(width)
    return weigh_from(rows, importance, BLOCK, np.repeat(mean, width // BLOCK))
