"""Q4_0: 32 weights as one f16 scale and 4-bit codes around zero (`ggml-quants.c: quantize_row_q4_0_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.floats import F16_MAX, to_f16
from convert_drafter.quant.quads import BLOCK, farthest, pack_halves, quads, signed_codes, store, unpack_halves
from convert_drafter.quant.row_fit import fit_scale

LAYOUT = np.dtype([("scale", "<f2"), ("codes", "u1", (BLOCK // 2,))])
ZERO = 8  # the code of 0


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout. The weight of largest magnitude gets code 0, whatever its sign."""
    with as_c():
        x = quads(blocks, "q4_0.encode.x")
        scale = farthest(blocks, x) / np.float32(-ZERO)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"] = to_f16(scale)
        store(out["codes"], pack_halves(signed_codes(x, scale, ZERO)))
        return out


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 32,) layout."""
    with as_c():
        scale, codes = fit_scale(rows, importance, ZERO)
        out = np.empty(len(scale), LAYOUT)
        out["scale"] = scale
        out["codes"] = pack_halves(codes).T
        return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    codes = unpack_halves(blocks["codes"]).view(np.int8) - np.int8(ZERO)
    weights: F32Array = codes * blocks["scale"].astype(np.float32)[:, None]
    return weights


# A scale is at most 1.5 / 7.1 of the largest weight: where all importance is at one that is rounded from 1.5 to 1.
Q4_0 = QuantType("Q4_0", 2, BLOCK, LAYOUT, encode, decode, 4 * F16_MAX, encode_weighted, chunk=524_288)
