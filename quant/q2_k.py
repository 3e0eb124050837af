"""Q2_K: super-blocks of 16 x 16 weights, each block with a 4-bit scale and minimum (`ggml-quants.c: quantize_q2_K`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Blocks, Bytes, F32Array, QuantType
from convert_drafter.quant.columns import (
    SUPER,
    as_c,
    column_sums,
    columns,
    nearest_int,
    round_codes,
    take_columns,
    weigh,
)
from convert_drafter.quant.floats import F16_MAX
from convert_drafter.quant.min_search import Grid, codes_of_search, search_min
from convert_drafter.quant.scale_fit import fit_scales
from convert_drafter.quant.scratch import scratch

BLOCK, BLOCKS = 16, 16
TOP = 15  # of the 4-bit scales and minima
LAYOUT = np.dtype([("scales", "u1", (16,)), ("codes", "u1", (2, 32)), ("scale", "<f2"), ("min", "<f2")])
PLAIN = Grid(3, -0.5, 0.1, 16, absolute=True)
WEIGHTED = Grid(3, -0.9, 0.05, 37, saturating=True)
F = np.float32


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    with as_c():
        x = columns(blocks, BLOCK, "q2_k.x")
        weights = np.abs(x, out=scratch("q2_k.weights", x.shape))
        fit = search_min(x, weights, PLAIN)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"], scales = _multiples(fit.scale.reshape(-1, BLOCKS))
        out["min"], mins = _multiples(-fit.low.reshape(-1, BLOCKS))
        out["scales"] = scales | mins << 4
        return _fill_codes(out, x, weights, PLAIN)


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 256,) layout."""
    with as_c():
        x, weights = weigh(rows, importance, BLOCK, factor=1)
        sums = column_sums(weights).reshape(-1, BLOCKS)
        fit = search_min(x, weights, WEIGHTED)
        out = np.empty(len(sums), LAYOUT)
        out["scale"], scales = fit_scales(fit.scale.reshape(-1, BLOCKS), sums, TOP)
        out["min"], mins = fit_scales(-fit.low.reshape(-1, BLOCKS), sums, TOP)
        out["scales"] = scales | mins << 4
        return _fill_codes(out, x, weights, WEIGHTED)


def _multiples(values: F32Array) -> tuple[NDArray[np.float16], Bytes]:
    """4-bit multiples of an f16 scale for each super-block: (n, 16) f32 -> (n,) f16, (n, 16) u8."""
    largest = np.clip(values.max(axis=1), F(0), None)
    inverse = np.where(largest > 0, F(TOP) / largest, F(0))
    return (largest / F(TOP)).astype(np.float16), nearest_int(values * inverse[:, None]).astype(np.uint8)


def _per_block(blocks: Blocks) -> tuple[F32Array, F32Array]:
    """Scale and minimum of every block, (16 * n,) f32 each."""
    scale = blocks["scale"].astype(F)[:, None] * (blocks["scales"] & 15)
    low = blocks["min"].astype(F)[:, None] * (blocks["scales"] >> 4)
    return scale.reshape(-1), low.reshape(-1)


def _fill_codes(out: Blocks, x: F32Array, weights: F32Array, grid: Grid) -> Blocks:
    """Codes that fit the scales as stored; a block whose stored scale is zero keeps those of the search."""
    scale, low = _per_block(out)
    exact = scratch("q2_k.exact", x.shape)
    np.add(x, low, out=exact)
    np.divide(exact, scale, out=exact)
    if not scale.all():
        places = np.flatnonzero(scale == 0)
        exact[:, places] = codes_of_search(take_columns(x, places), take_columns(weights, places), grid)
    # rows of a block, super-block, half of 128, quarter of 32, half of 16
    codes = round_codes(exact, 0, 3).astype(np.uint8).reshape(BLOCK, -1, 2, 4, 2)
    first, second, third, fourth = (codes[..., quarter, :] << 2 * quarter for quarter in range(4))
    out["codes"] = (first | second | third | fourth).transpose(1, 2, 3, 0).reshape(-1, 2, 32)
    return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32."""
    scale, low = _per_block(blocks)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = (blocks["codes"][:, :, None, :] >> shifts & 3).reshape(-1, BLOCKS, BLOCK)
    weights: F32Array = codes * scale.reshape(-1, BLOCKS, 1)
    weights -= low.reshape(-1, BLOCKS, 1)
    return weights.reshape(-1, SUPER)


Q2_K = QuantType("Q2_K", 10, SUPER, LAYOUT, encode, decode, TOP * F16_MAX, encode_weighted, chunk=32_768 * BLOCK)
