"""Q4_K: super-blocks of 8 x 32 weights, each block with a 6-bit scale and minimum (`ggml-quants.c: quantize_q4_K`).

Q5_K is the same with one more bit a weight, so what they share stands here.
"""

from __future__ import annotations

from dataclasses import dataclass

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

BLOCK, BLOCKS = 32, 8  # weights of a block, blocks of a super-block
TOP = 63  # of the 6-bit scales and minima
LAYOUT = np.dtype([("scale", "<f2"), ("min", "<f2"), ("scales", "u1", (12,)), ("codes", "u1", (4, 32))])
PLAIN = Grid(15, -1.0, 0.1, 21)
WEIGHTED = Grid(15, -0.9, 0.05, 37, saturating=True)
LARGEST = TOP * F16_MAX  # the magnitude of a minimum that still has a finite f16 scale
F = np.float32


@dataclass(frozen=True)
class Scales:
    """Of n super-blocks: the f16 scales `scale` of scales and `low` of minima (n,), and their `packed` bits (n, 12)."""

    scale: NDArray[np.float16]
    low: NDArray[np.float16]
    packed: Bytes

    def per_block(self) -> tuple[F32Array, F32Array]:
        """Scale and minimum of every block as a decoder computes them, (8 * n,) f32 each."""
        multiples = unpack_six_bits(self.packed)
        both = (self.scale.astype(F)[:, None] * multiples[0], self.low.astype(F)[:, None] * multiples[1])
        return both[0].reshape(-1), both[1].reshape(-1)


def plain_scales(blocks: F32Array, grid: Grid) -> tuple[Scales, Bytes]:
    """Scales and codes (32, n, 8) u8 of super-blocks (n, 256) f32: `quantize_row_q4_K_ref`, `_q5_K_ref`."""
    x = columns(blocks, BLOCK, "plain_scales.x")
    weights = scratch("plain_scales.weights", x.shape)
    np.square(x, out=weights)
    average = np.sqrt(column_sums(weights) / F(BLOCK))
    np.abs(x, out=weights)
    np.add(weights, average, out=weights)
    fit = search_min(x, weights, grid)
    scale, scales = _multiples(fit.scale.reshape(-1, BLOCKS))
    low, mins = _multiples(-fit.low.reshape(-1, BLOCKS))
    found = Scales(scale, low, pack_six_bits(scales, mins))
    return found, _codes(x, weights, grid, found)


def weighted_scales(rows: F32Array, importance: F32Array, grid: Grid, top: int) -> tuple[Scales, Bytes]:
    """The same for columns of different importance: `quantize_row_q4_K_impl`, `_q5_K_impl`.

    A negative scale becomes a large multiple, which only Q5_K limits: `top` is 63 there and 255 for Q4_K.
    """
    x, weights = weigh(rows, importance, BLOCK, factor=2)
    sums = column_sums(weights).reshape(-1, BLOCKS)
    fit = search_min(x, weights, grid)
    scale, scales = fit_scales(fit.scale.reshape(-1, BLOCKS), sums, TOP)
    low, mins = fit_scales(-fit.low.reshape(-1, BLOCKS), sums, TOP)
    packed = pack_six_bits(np.minimum(scales, top), np.minimum(mins, top))
    found = Scales(scale.astype(np.float16), low.astype(np.float16), packed)
    return found, _codes(x, weights, grid, found)


def _multiples(values: F32Array) -> tuple[NDArray[np.float16], Bytes]:
    """6-bit multiples of an f16 scale for each super-block: (n, 8) f32 -> (n,) f16, (n, 8) u8."""
    largest = np.clip(values.max(axis=1), F(0), None)
    inverse = np.where(largest > 0, F(TOP) / largest, F(0))
    multiples = nearest_int(values * inverse[:, None]).astype(np.uint8)
    return (largest / F(TOP)).astype(np.float16), np.minimum(multiples, TOP)


def _codes(x: F32Array, weights: F32Array, grid: Grid, found: Scales) -> Bytes:
    """The codes that fit the scales as stored, (32, n, 8) u8; a block whose stored scale is zero keeps the search's."""
    scale, low = found.per_block()
    exact = scratch("q4_k.exact", x.shape)
    np.add(x, low, out=exact)
    np.divide(exact, scale, out=exact)
    if not scale.all():
        places = np.flatnonzero(scale == 0)
        exact[:, places] = codes_of_search(take_columns(x, places), take_columns(weights, places), grid)
    return round_codes(exact, 0, grid.levels).astype(np.uint8).reshape(BLOCK, -1, BLOCKS)


def pack_six_bits(scales: Bytes, mins: Bytes) -> Bytes:
    """The 6-bit multiples of 8 blocks in 12 bytes: (n, 8) u8 twice -> (n, 12) u8.

    The last four blocks lend their upper two bits to the bytes of the first four.
    """
    out = np.empty((len(scales), 12), np.uint8)
    out[:, :4] = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    out[:, 4:8] = mins[:, :4] | (mins[:, 4:] >> 4) << 6
    out[:, 8:] = (scales[:, 4:] & 15) | (mins[:, 4:] & 15) << 4
    return out


def unpack_six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """(n, 12) u8 -> scales and mins, (n, 8) u8 each (`ggml-quants.c: get_scale_min_k4`)."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack([first & 63, (rest & 15) | (first >> 6) << 4])
    mins = np.hstack([second & 63, (rest >> 4) | (second >> 6) << 4])
    return scales, mins


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    with as_c():
        return _pack(*plain_scales(blocks, PLAIN))


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 256,) layout."""
    with as_c():
        return _pack(*weighted_scales(rows, importance, WEIGHTED, top=255))


def _pack(found: Scales, codes: Bytes) -> Blocks:
    out = np.empty(len(found.packed), LAYOUT)
    out["scale"], out["min"], out["scales"] = found.scale, found.low, found.packed
    out["codes"] = pair_nibbles(codes)
    return out


def pair_nibbles(codes: Bytes) -> Bytes:
    """Lower four bits of blocks 0 and 1 (2 and 3 ...) in one byte: (32, n, 8) u8 -> (n, 4, 32) u8."""
    pairs: Bytes = np.bitwise_or(codes[..., 0::2] & 15, codes[..., 1::2] << 4)
    return pairs.transpose(1, 2, 0)


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32."""
    packed = blocks["codes"]
    codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(-1, BLOCKS, BLOCK)
    return decode_codes(blocks, codes)


def decode_codes(blocks: Blocks, codes: Bytes) -> F32Array:
    """Codes (n, 8, 32) u8 and the scales of their blocks -> (n, 256) f32."""
    scale, low = Scales(blocks["scale"], blocks["min"], blocks["scales"]).per_block()
    weights: F32Array = codes * scale.reshape(-1, BLOCKS, 1)
    weights -= low.reshape(-1, BLOCKS, 1)
    return weights.reshape(-1, SUPER)


Q4_K = QuantType("Q4_K", 12, SUPER, LAYOUT, encode, decode, LARGEST, encode_weighted, chunk=16_384 * BLOCK)
