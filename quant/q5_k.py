"""Q5_K: Q4_K with a fifth bit of every code in a plane of its own (`ggml-quants.c: quantize_q5_K`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, Bytes, F32Array, QuantType
from convert_drafter.quant.columns import SUPER, as_c
from convert_drafter.quant.min_search import Grid
from convert_drafter.quant.q4_k import (
    BLOCK,
    LARGEST,
    Scales,
    decode_codes,
    pair_nibbles,
    plain_scales,
    weighted_scales,
)

LAYOUT = np.dtype(
    [("scale", "<f2"), ("min", "<f2"), ("scales", "u1", (12,)), ("fifth", "u1", (32,)), ("codes", "u1", (4, 32))]
)
PLAIN = Grid(31, -0.5, 0.1, 16)
WEIGHTED = Grid(31, -0.9, 0.05, 37, saturating=True)


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    with as_c():
        return _pack(*plain_scales(blocks, PLAIN))


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 256,) layout."""
    with as_c():
        return _pack(*weighted_scales(rows, importance, WEIGHTED, top=63))


def _pack(found: Scales, codes: Bytes) -> Blocks:
    out = np.empty(len(found.packed), LAYOUT)
    out["scale"], out["min"], out["scales"] = found.scale, found.low, found.packed
    out["codes"] = pair_nibbles(codes)
    out["fifth"] = np.packbits(codes >> 4, axis=2, bitorder="little")[..., 0].T  # bit j belongs to block j
    return out


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32."""
    packed = blocks["codes"]
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, 8, BLOCK)
    fifth = blocks["fifth"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return decode_codes(blocks, codes | fifth << 4)


Q5_K = QuantType("Q5_K", 13, SUPER, LAYOUT, encode, decode, LARGEST, encode_weighted, chunk=16_384 * BLOCK)
