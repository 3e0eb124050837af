"""Q3_K: super-blocks of 16 x 16 weights, each block with a 6-bit scale (`ggml-quants.c: quantize_q3_K`)."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Blocks, Bytes, F32Array, QuantType
from convert_drafter.quant.columns import SUPER, as_c, column_sums, columns, nearest_int, take_columns, weigh
from convert_drafter.quant.floats import F16_MAX
from convert_drafter.quant.q6_k import fill_codes, largest_scale
from convert_drafter.quant.scale_descent import descend_plain, descend_scale
from convert_drafter.quant.scale_search import search_codes, search_scale

BLOCK, BLOCKS = 16, 16
NMAX = 4  # codes -4..3
SCALE_ZERO = 32  # the stored scale that means 0
LAYOUT = np.dtype([("third", "u1", (32,)), ("codes", "u1", (2, 32)), ("scales", "u1", (12,)), ("scale", "<f2")])
LARGEST = 32 * F16_MAX  # a scale is a mean of x / code, so none is above the largest weight
F, U8, U64 = np.float32, np.uint8, np.uint64
Places = NDArray[np.intp]


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    with as_c():
        x = columns(blocks, BLOCK, "q3_k.x")
        fit = descend_scale(x, NMAX).reshape(-1, BLOCKS)
        largest = largest_scale(fit)
        inverse = F(-32) / largest
        multiples = nearest_int(fit * inverse[:, None]).astype(np.int8)
        scales = (np.clip(multiples, -32, 31) + SCALE_ZERO).astype(U8)
        scale = F(1) / inverse
        scales[largest == 0], scale[largest == 0] = 0, 0
        out, per_block = _with_scales(scale, scales)

        def searched(places: Places) -> Bytes:
            return descend_plain(take_columns(x, places), NMAX)[1]

        return _pack(fill_codes(blocks, per_block, NMAX, searched), out)


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 256,) layout."""
    with as_c():
        x, weights = weigh(rows, importance, BLOCK, factor=2)
        sums = column_sums(weights).reshape(-1, BLOCKS)
        fit = search_scale(x, NMAX, weights).reshape(-1, BLOCKS)
        scale, scales = search_codes(np.ascontiguousarray(fit.T), 32, np.ascontiguousarray(sums.T))
        out, per_block = _with_scales(scale, np.ascontiguousarray(scales.T))

        def searched(places: Places) -> Bytes:
            return search_codes(take_columns(x, places), NMAX, take_columns(weights, places))[1]

        return _pack(fill_codes(rows.reshape(-1, SUPER), per_block, NMAX, searched), out)


def _with_scales(scale: F32Array, scales: Bytes) -> tuple[Blocks, F32Array]:
    """Blocks with f16 of `scale` (n,) f32 and the `scales` (n, 16) u8, 0..63, and each block's scale, (16 * n,) f32.

    The lower four bits of two scales share a byte, the upper two of four.
    """
    out = np.empty(len(scale), LAYOUT)
    out["scale"] = scale
    first, second, third, fourth = scales.view(np.uint32).T  # four scales at a time
    high = [(four >> 4 & 0x03030303) << 2 * i for i, four in enumerate((first, second, third, fourth))]
    lower = [(a & 0x0F0F0F0F) | (b & 0x0F0F0F0F) << 4 for a, b in ((first, third), (second, fourth))]
    out["scales"] = np.stack([*lower, reduce(np.bitwise_or, high)], axis=1).view(U8)
    return out, _per_block(out, scales)


def _per_block(blocks: Blocks, scales: Bytes) -> F32Array:
    """Scale of every block as a decoder computes it, (16 * n,) f32."""
    scale: F32Array = blocks["scale"].astype(F)[:, None] * (scales.view(np.int8) - np.int8(SCALE_ZERO))
    return scale.reshape(-1)


def _pack(codes: Bytes, out: Blocks) -> Blocks:
    """Codes (n, 256) u8, 0..7: the lower two bits of a half's quarters share a byte, the third bits of all eighths."""
    eights = codes.view(U64).reshape(-1, 8, 4)  # eight codes at a time; eighths of a super-block
    third = eights >> U64(2) & U64(0x0101010101010101)
    low = (eights & U64(0x0303030303030303)).reshape(-1, 2, 4, 4)
    thirds = [third[:, i] << U64(i) for i in range(8)]
    lows = [low[:, :, i] << U64(2 * i) for i in range(4)]
    out["third"] = reduce(np.bitwise_or, thirds).view(U8)
    out["codes"] = reduce(np.bitwise_or, lows).view(U8).reshape(-1, 2, 32)
    return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32."""
    shifts = np.arange(8, dtype=U8)[:, None]
    third = (blocks["third"][:, None, :] >> shifts & 1).reshape(-1, BLOCKS, BLOCK)
    low = (blocks["codes"][:, :, None, :] >> 2 * shifts[:4] & 3).reshape(-1, BLOCKS, BLOCK)
    codes = (low | third << 2).view(np.int8) - np.int8(NMAX)
    lower, upper = blocks["scales"][:, :8], blocks["scales"][:, None, 8:]
    scales = np.hstack([lower & 15, lower >> 4]) | (upper >> 2 * shifts[:4] & 3).reshape(-1, BLOCKS) << 4
    weights: F32Array = codes * _per_block(blocks, scales).reshape(-1, BLOCKS, 1)
    return weights.reshape(-1, SUPER)


Q3_K = QuantType("Q3_K", 11, SUPER, LAYOUT, encode, decode, LARGEST, encode_weighted, chunk=49_152 * BLOCK)
