"""IQ4_XS: 256 weights as an f16 scale, eight 6-bit multiples of it and 4-bit codes of uneven values.

Source: `ggml-quants.c: quantize_iq4_xs`.
"""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import SUPER, as_c, columns, nearest_int, weigh
from convert_drafter.quant.floats import F16_MAX
from convert_drafter.quant.iq4_search import BLOCK, best_scales, pack_codes, unpack_codes

PARTS = SUPER // BLOCK
LAYOUT = np.dtype(
    [("scale", "<f2"), ("upper", "<u2"), ("lower", "u1", (PARTS // 2,)), ("codes", "u1", (PARTS, BLOCK // 2))]
)
F = np.float32


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    with as_c():
        x = columns(blocks, BLOCK, "iq4_xs.encode.x")
        return _packed(x, best_scales(x))


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """(n, row) f32 and the importance (row,) f32 of its columns -> (n * row / 256,) layout."""
    with as_c():
        x, weights = weigh(rows, importance, BLOCK, factor=2)
        return _packed(x, best_scales(x, weights, plainly=not importance.min(initial=0) >= 0))


def _packed(x: F32Array, scales: F32Array) -> Blocks:
    """Columns of blocks and their scales, (32, 8 n) and (8 n,) f32 -> (n,) layout."""
    scales = scales.reshape(-1, PARTS)
    out = np.empty(len(scales), LAYOUT)
    magnitudes = np.fmax(np.abs(scales), F(0))  # not NaN, which is never greater than another
    largest = scales[np.arange(len(scales)), magnitudes.argmax(axis=1)][:, None]
    chosen: F32Array = np.where(np.abs(largest) > 0, largest, F(0))
    scale = chosen / F(-32)  # minus zero is stored as such
    inverse = np.where(scale != 0, F(1) / scale, F(0))
    multiples = np.clip(nearest_int(inverse * scales), -32, 31)
    out["scale"] = scale[:, 0]
    block_scales: F32Array = scale * multiples.astype(F)
    out["codes"] = pack_codes(x, block_scales.reshape(-1)).reshape(-1, PARTS, BLOCK // 2)
    codes = (multiples + 32).astype(np.uint16)
    out["lower"] = (codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4
    out["upper"] = np.bitwise_or.reduce(codes >> 4 << np.arange(0, 2 * PARTS, 2, dtype=np.uint16), axis=1)
    return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32 (`ggml-quants.c: dequantize_row_iq4_xs`)."""
    codes = np.empty((len(blocks), PARTS), np.int16)
    codes[:, ::2], codes[:, 1::2] = blocks["lower"] & 15, blocks["lower"] >> 4
    codes |= (blocks["upper"][:, None] >> np.arange(0, 2 * PARTS, 2, dtype=np.uint16) & 3).astype(np.int16) << 4
    scales = blocks["scale"].astype(F)[:, None] * (codes - 32).astype(F)
    return unpack_codes(blocks["codes"].reshape(-1, BLOCK // 2), scales.reshape(-1)).reshape(-1, SUPER)


# A block's scale is at most 7 / 120 of its largest weight, as for IQ4_NL; here a 32nd of that is stored.
IQ4_XS = QuantType("IQ4_XS", 23, SUPER, LAYOUT, encode, decode, 32 * 17 * F16_MAX, encode_weighted, 524_288)
