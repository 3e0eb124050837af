"""Q5_0: Q4_0 with a fifth bit of every code (`ggml-quants.c: quantize_row_q5_0_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.floats import F16_MAX, to_f16
from convert_drafter.quant.quads import (
    BLOCK,
    add_fifth_bits,
    as_rows,
    farthest,
    fifth_bits,
    pack_halves,
    quads,
    signed_codes,
    store,
    unpack_halves,
)
from convert_drafter.quant.row_fit import fit_scale

LAYOUT = np.dtype([("scale", "<f2"), ("fifth", "<u4"), ("codes", "u1", (BLOCK // 2,))])
ZERO = 16  # the code of 0


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout. The weight of largest magnitude gets code 0, whatever its sign."""
    with as_c():
        x = quads(blocks, "q5_0.encode.x")
        scale = farthest(blocks, x) / np.float32(-ZERO)
        codes = signed_codes(x, scale, ZERO)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"] = to_f16(scale)
        out["fifth"] = fifth_bits(as_rows(codes))
        store(out["codes"], pack_halves(codes))
        return out


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 32,) layout."""
    with as_c():
        scale, codes = fit_scale(rows, importance, ZERO)
        out = np.empty(len(scale), LAYOUT)
        out["scale"] = scale
        out["fifth"] = fifth_bits(codes.T)
        out["codes"] = pack_halves(codes).T
        return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    codes = add_fifth_bits(unpack_halves(blocks["codes"]), blocks["fifth"]).view(np.int8) - np.int8(ZERO)
    weights: F32Array = codes * blocks["scale"].astype(np.float32)[:, None]
    return weights


# A scale is at most 1.5 / 15.1 of the largest weight: where all importance is at one that is rounded from 1.5 to 1.
Q5_0 = QuantType("Q5_0", 6, BLOCK, LAYOUT, encode, decode, 10 * F16_MAX, encode_weighted, chunk=524_288)
