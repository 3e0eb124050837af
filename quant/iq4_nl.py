"""IQ4_NL: 32 weights as one f16 scale and 4-bit codes of uneven values (`ggml-quants.c: quantize_iq4_nl`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c, column_sums, columns, weigh_from
from convert_drafter.quant.floats import F16_MAX
from convert_drafter.quant.iq4_search import BLOCK, best_scales, pack_codes, unpack_codes

LAYOUT = np.dtype([("scale", "<f2"), ("codes", "u1", (BLOCK // 2,))])


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout."""
    with as_c():
        x = columns(blocks, BLOCK, "iq4_nl.encode.x")
        return _packed(x, best_scales(x))


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """(n, row) f32 and the importance (row,) f32 of its columns -> (n * row / 32,) layout."""
    with as_c():
        squares = columns(rows, BLOCK, "iq4_nl.squares")
        spread = column_sums(np.square(squares, out=squares)) * np.float32(2 / BLOCK)
        x, weights = weigh_from(rows, importance, BLOCK, spread)
        return _packed(x, best_scales(x, weights, plainly=not importance.min(initial=0) >= 0))


def _packed(x: F32Array, scale: F32Array) -> Blocks:
    out = np.empty(scale.size, LAYOUT)
    out["scale"], out["codes"] = scale, pack_codes(x, scale)
    return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32 (`ggml-quants.c: dequantize_row_iq4_nl`)."""
    return unpack_codes(blocks["codes"], blocks["scale"].astype(np.float32))


# A grid's fit is at most 7 / 120 of the largest weight: where the largest is on 120 and all importance at one on 7.
IQ4_NL = QuantType("IQ4_NL", 20, BLOCK, LAYOUT, encode, decode, 17 * F16_MAX, encode_weighted, 524_288)
