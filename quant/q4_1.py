"""Q4_1: 32 weights as an f16 scale, an f16 minimum and 4-bit codes (`ggml-quants.c: quantize_row_q4_1_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.floats import F16_MAX, to_f16
from convert_drafter.quant.quads import BLOCK, codes_above, minimum, pack_halves, quads, span, store, unpack_halves
from convert_drafter.quant.row_fit import fit_min

LAYOUT = np.dtype([("scale", "<f2"), ("min", "<f2"), ("codes", "u1", (BLOCK // 2,))])
TOP = 15  # the largest code


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout."""
    with as_c():
        x = quads(blocks, "q4_1.encode.x")
        low = minimum(blocks, x)
        scale = span(x, low) / np.float32(TOP)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"], out["min"] = to_f16(np.stack([scale, low]))
        store(out["codes"], pack_halves(codes_above(x, low, scale)))
        return out


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 32,) layout."""
    with as_c():
        scale, low, codes = fit_min(rows, importance, TOP)
        out = np.empty(len(scale), LAYOUT)
        out["scale"], out["min"] = scale, low
        out["codes"] = pack_halves(codes).T
        return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    weights: F32Array = unpack_halves(blocks["codes"]) * blocks["scale"].astype(np.float32)[:, None]
    weights += blocks["min"].astype(np.float32)[:, None]
    return weights


# Fitted with importance, a minimum of a few times the largest weight is possible: `check_scales` refuses it.
Q4_1 = QuantType("Q4_1", 3, BLOCK, LAYOUT, encode, decode, F16_MAX, encode_weighted, chunk=524_288)
