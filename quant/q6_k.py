"""Q6_K: super-blocks of 16 x 16 weights, each block with an 8-bit scale (`ggml-quants.c: quantize_q6_K`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Blocks, Bytes, F32Array, QuantType
from convert_drafter.quant.columns import (
    NEGLIGIBLE,
    SUPER,
    as_c,
    columns,
    largest_of,
    nearest_int,
    round_codes,
    take_columns,
)
from convert_drafter.quant.floats import F16_MAX
from convert_drafter.quant.scale_search import search_codes, search_scale
from convert_drafter.quant.scratch import scratch

BLOCK, BLOCKS = 16, 16
NMAX = 32  # codes -32..31
LAYOUT = np.dtype([("codes", "u1", (2, 64)), ("upper", "u1", (2, 32)), ("scales", "i1", (BLOCKS,)), ("scale", "<f2")])
# A code of x is at least 2/3 of 31.1 x / largest, so no block's scale is above largest / 20.
LARGEST = 128 * 20 * F16_MAX
F, U64 = np.float32, np.uint64
Places = NDArray[np.intp]


def encode(blocks: F32Array) -> Blocks:
    """(n, 256) f32 -> (n,) layout."""
    return _encode(blocks, None)


def encode_weighted(rows: F32Array, importance: F32Array) -> Blocks:
    """Rows (n, row) f32 and their columns' importance (row,) f32 -> (n * row / 256,) layout."""
    of_a_row = columns(importance, BLOCK, "q6_k.importance")
    weights = scratch("q6_k.weights", (BLOCK, len(rows), of_a_row.shape[1]))
    np.copyto(weights, of_a_row[:, None])
    return _encode(rows.reshape(-1, SUPER), weights.reshape(BLOCK, -1))


def _encode(blocks: F32Array, weights: F32Array | None) -> Blocks:
    x = columns(blocks, BLOCK, "q6_k.x")

    def searched(places: Places) -> Bytes:
        w = None if weights is None else take_columns(weights, places)
        return search_codes(take_columns(x, places), NMAX, w)[1]

    with as_c():
        fit = search_scale(x, NMAX, weights).reshape(-1, BLOCKS)
        largest = largest_scale(fit)
        inverse = F(-128) / largest
        out = np.empty(len(blocks), LAYOUT)
        out["scale"] = F(1) / inverse
        out["scales"] = np.minimum(nearest_int(fit * inverse[:, None]), 127)
        _pack(fill_codes(blocks, _per_block(out), NMAX, searched), out)
        out[~(np.abs(largest) >= NEGLIGIBLE)] = np.zeros((), LAYOUT)
        return out


def largest_scale(scales: F32Array) -> F32Array:
    """The first scale of largest magnitude in each row, 0 if there are none but NaN and 0: (n, k) f32 -> (n,) f32."""
    largest = largest_of(np.ascontiguousarray(scales.T))
    if np.isnan(largest).any():
        largest = largest_of(np.ascontiguousarray(np.where(np.isnan(scales), F(0), scales).T))
    return largest


def fill_codes(blocks: F32Array, scale: F32Array, nmax: int, searched: Callable[[Places], Bytes]) -> Bytes:
    """Codes that fit the scales as stored: (n, 256) f32, (16 * n,) f32 -> (n, 256) u8, 0..2 * nmax - 1.

    A block whose stored scale is zero keeps the codes of the search: `searched` maps k of its places to (16, k) u8.
    """
    exact = scratch("fill_codes.exact", blocks.shape)
    np.copyto(exact.reshape(-1, BLOCK), scale[:, None])  # np.repeat would keep other threads waiting
    np.divide(blocks, exact, out=exact)
    if not scale.all():
        places = np.flatnonzero(scale == 0)
        exact.reshape(-1, BLOCK)[places] = searched(places).T.astype(F) - F(nmax)
    codes: NDArray[np.int8] = scratch("fill_codes.codes", blocks.shape, np.int8)
    np.copyto(codes, round_codes(exact, -nmax, nmax - 1), casting="unsafe")
    np.add(codes, np.int8(nmax), out=codes)
    return codes.view(np.uint8)


def _per_block(blocks: Blocks) -> F32Array:
    """Scale of every block as a decoder computes it, (16 * n,) f32."""
    scale: F32Array = blocks["scale"].astype(F)[:, None] * blocks["scales"]
    return scale.reshape(-1)


def _pack(codes: Bytes, out: Blocks) -> None:
    """Byte i of a half holds lower bits of quarters 0 and 2 (or 1 and 3), byte i of `upper` the others of all four."""
    quarters = codes.view(U64).reshape(-1, 2, 4, 4)  # eight codes at a time
    low = quarters & U64(0x0F0F0F0F0F0F0F0F)
    lower = low[:, :, :2] | low[:, :, 2:] << U64(4)
    high = quarters >> U64(4) & U64(0x0303030303030303)
    upper = high[:, :, 0] | high[:, :, 1] << U64(2) | high[:, :, 2] << U64(4) | high[:, :, 3] << U64(6)
    out["codes"] = lower.view(np.uint8).reshape(-1, 2, 64)
    out["upper"] = upper.view(np.uint8).reshape(-1, 2, 32)


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 256) f32."""
    low = np.stack([blocks["codes"] & 15, blocks["codes"] >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = blocks["upper"][:, :, None, :] >> shifts & 3
    codes = (low | high << 4).view(np.int8) - np.int8(NMAX)
    weights: F32Array = codes.reshape(-1, BLOCKS, BLOCK) * _per_block(blocks).reshape(-1, BLOCKS, 1)
    return weights.reshape(-1, SUPER)


Q6_K = QuantType("Q6_K", 14, SUPER, LAYOUT, encode, decode, LARGEST, encode_weighted, chunk=32_768 * BLOCK)
