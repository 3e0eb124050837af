"""Blocks of 32 weights as quads: arrays (8, 4 n) whose row r holds the weights 4 r .. 4 r + 3 of every block.

numpy is fast on long rows, and to move four weights at once costs a third of a transposition. The codes of Q4_0, Q4_1,
Q5_0, Q5_1 and MXFP4 are packed alike: byte j of a block holds code j below code j + 16, a fifth bit lies apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Bytes, F32Array
from convert_drafter.quant.scratch import scratch

BLOCK, QUADS, QUAD = 32, 8, 4
LOW = np.uint8(15)
F = np.float32


def quads(blocks: F32Array, name: str) -> F32Array:
    """(n, 32) f32 -> (8, 4 n) f32, a scratch array of the caller's name."""
    out = scratch(name, (QUADS, QUAD * len(blocks)))
    np.copyto(out.view("V16"), blocks.view("V16").T)
    return out


def spread(values: F32Array) -> F32Array:
    """A value per block (n,) for every column of the quads (4 n,)."""
    return np.repeat(values, QUAD)


def lowest(x: F32Array) -> F32Array:
    """The smallest weight of each block, quads -> (n,). Which of two zeros is not said."""
    return _fold(np.minimum, x)


def highest(x: F32Array) -> F32Array:
    """The largest weight of each block, as `lowest`."""
    return _fold(np.maximum, x)


def _fold(pick: np.ufunc, x: F32Array) -> F32Array:
    best = pick.reduce(x, axis=0)
    return np.asarray(pick(pick(best[0::4], best[1::4]), pick(best[2::4], best[3::4])))


def size(x: F32Array) -> F32Array:
    """The largest magnitude of each block, as `lowest`."""
    magnitudes: F32Array = np.abs(np.maximum(highest(x), -lowest(x)))  # not -0
    return magnitudes


def span(x: F32Array, low: F32Array) -> F32Array:
    """How far the largest weight of each block is from the smallest, `low` (n,) f32. -> (n,) f32"""
    spans: F32Array = np.abs(highest(x) - low)  # not -0
    return spans


def farthest(blocks: F32Array, x: F32Array) -> F32Array:
    """The weight of largest magnitude of each block, the first of equals; 0 where all are 0 or -0. -> (n,) f32"""
    low, high = lowest(x), highest(x)
    sums = high + low  # its sign is exact
    out: F32Array = np.copysign(np.maximum(high, -low), sums)  # np.where takes four times as long
    ties = np.flatnonzero((sums == 0) & (high > 0))
    if ties.size:
        tied = blocks[ties]
        out[ties] = tied[np.arange(ties.size), np.abs(tied).argmax(axis=1)]
    out += F(0)  # -0 becomes 0
    return out


def minimum(blocks: F32Array, x: F32Array) -> F32Array:
    """The smallest weight of each block, with the sign of the first zero where it is zero. -> (n,) f32"""
    low = lowest(x)
    zero = np.flatnonzero(low == 0)
    if zero.size:
        blocks = blocks[zero]
        low[zero] = blocks[np.arange(zero.size), (blocks == 0).argmax(axis=1)]
    return low


def signed_codes(x: F32Array, scale: F32Array, zero: int) -> Bytes:
    """Codes (8, 4 n) u8 of quads x, which are spoilt, on the grid of `scale` (n,) f32 where 0 has the code `zero`."""
    steps = inverse(scale)
    np.multiply(x, spread(steps), out=x)
    np.add(x, F(zero + 0.5), out=x)
    codes = _whole(x)
    np.minimum(codes, np.full(codes.shape[1], 2 * zero - 1, np.uint8), out=codes)
    lost = np.flatnonzero(steps == 0)
    lost = lost[scale[lost] != 0]
    if lost.size:  # ggml's codes are NaN or an infinity as int8, which is 0 on x86-64
        codes.reshape(QUADS, -1, QUAD)[:, lost] = 0
    return codes


def codes_above(x: F32Array, low: F32Array, scale: F32Array) -> Bytes:
    """Codes (8, 4 n) u8 of quads x, which are spoilt, on the grid of `scale` from `low` up, (n,) f32 each."""
    np.subtract(x, spread(low), out=x)
    np.multiply(x, spread(inverse(scale)), out=x)
    np.add(x, F(0.5), out=x)
    return _whole(x)


def inverse(scale: F32Array) -> F32Array:
    """1 / scale, and 0 where that is infinite. (n,) f32"""
    out = np.divide(F(1), scale)
    np.putmask(out, np.isinf(out), F(0))
    return out


def _whole(x: F32Array) -> Bytes:
    codes: Bytes = scratch("quads._whole", x.shape, np.uint8)
    np.copyto(codes, x, casting="unsafe")
    return codes


def pack_halves(codes: Bytes) -> Bytes:
    """The low four bits of the codes of a block's halves in one byte: (k, m) u8 -> (k / 2, m) u8."""
    half = len(codes) // 2
    out = np.multiply(codes[half:], np.uint8(16))  # faster than a shift of bytes
    low = np.bitwise_and(codes[:half], LOW)
    return np.bitwise_or(out, low, out=out)


def unpack_halves(packed: Bytes) -> Bytes:
    """Bytes (n, 16) -> codes (n, 32) u8 of four bits."""
    return np.concatenate([packed & LOW, packed >> 4], axis=1)


def store(into: NDArray[Any], codes: NDArray[Any]) -> None:
    """Quads of bytes (k, 4 n) to a field (n, 4 k) of a layout."""
    np.copyto(into.view("V4"), codes.view("V4").T)


def fifth_bits(codes: Bytes) -> NDArray[np.uint32]:
    """Bit 4 of the codes of a block, bit j from code j: (n, 32) u8 -> (n,) u32."""
    bits = np.packbits(np.ascontiguousarray(codes).reshape(-1) & np.uint8(16), bitorder="little")
    return bits.view(np.uint32)


def add_fifth_bits(codes: Bytes, fifth: NDArray[np.uint32]) -> Bytes:
    """Codes (n, 32) u8 of four bits and their fifth bits (n,) u32 -> codes (n, 32) u8."""
    bits = np.unpackbits(np.ascontiguousarray(fifth).view(np.uint8), bitorder="little").reshape(codes.shape)
    return codes | np.multiply(bits, np.uint8(16))


def as_rows(codes: Bytes) -> Bytes:
    """Quads of codes (8, 4 n) u8 -> (n, 32) u8."""
    rows: Bytes = scratch("quads.as_rows", (codes.shape[1] // QUAD, BLOCK), np.uint8)
    store(rows, codes)
    return rows
