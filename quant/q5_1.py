"""Q5_1: Q4_1 with a fifth bit of every code (`ggml-quants.c: quantize_row_q5_1_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.floats import F16_MAX, to_f16
from convert_drafter.quant.quads import (
    BLOCK,
    add_fifth_bits,
    as_rows,
    codes_above,
    fifth_bits,
    minimum,
    pack_halves,
    quads,
    span,
    store,
    unpack_halves,
)
from convert_drafter.quant.row_fit import fit_min

LAYOUT = np.dtype([("scale", "<f2"), ("min", "<f2"), ("fifth", "<u4"), ("codes", "u1", (BLOCK // 2,))])
TOP = 31  # the largest code


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout."""
    with as_c():
        x = quads(blocks, "q5_1.encode.x")
        low = minimum(blocks, x)
        scale = span(x, low) / np.float32(TOP)
        codes = codes_above(x, low, scale)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"], out["min"] = to_f16(np.stack([scale, low]))
        out["fifth"] = fifth_bits(as_rows(codes))
        store(out["codes"], pack_halves(codes))
        return out


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 32,) layout."""
    with as_c():
        scale, low, codes = fit_min(rows, importance, TOP)
        out = np.empty(len(scale), LAYOUT)
        out["scale"], out["min"] = scale, low
        out["fifth"] = fifth_bits(codes.T)
        out["codes"] = pack_halves(codes).T
        return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    codes = add_fifth_bits(unpack_halves(blocks["codes"]), blocks["fifth"])
    weights: F32Array = codes * blocks["scale"].astype(np.float32)[:, None]
    weights += blocks["min"].astype(np.float32)[:, None]
    return weights


# Fitted with importance, a minimum of a few times the largest weight is possible: `check_scales` refuses it.
Q5_1 = QuantType("Q5_1", 7, BLOCK, LAYOUT, encode, decode, F16_MAX, encode_weighted, chunk=524_288)
