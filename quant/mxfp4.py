"""MXFP4: 32 weights as one power of two and 4-bit floats (`ggml-quants.c: quantize_row_mxfp4_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, Bytes, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.quads import BLOCK, pack_halves, quads, size, spread, store, unpack_halves
from convert_drafter.quant.scratch import scratch

LAYOUT = np.dtype([("exponent", "u1"), ("codes", "u1", (BLOCK // 2,))])
BIAS = 127
HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # twice the values of the codes 0..7; those of 8..15 are their negatives
LIMITS = ((HALVES[1:] + HALVES[:-1]) / 4).astype(np.float32)  # a weight half way gets the lower code
TOP_EXPONENT = 2  # of the largest value
F = np.float32


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout."""
    with as_c():
        x = quads(blocks, "mxfp4.encode.x")
        exponents = _exponents(size(x))
        out = np.empty(len(blocks), LAYOUT)
        out["exponent"] = exponents
        store(out["codes"], pack_halves(_codes(x, exponents)))
        return out


def _exponents(largest: F32Array) -> Bytes:
    """The biased exponent of each block's unit from its largest magnitude, (n,) f32 -> (n,) u8.

    C's log2f rounds a magnitude just below a power of two up to it. The exponent of a denormal is negative; as a byte
    it is a large one, and the block becomes zero.
    """
    logarithm = np.log2(largest.astype(np.float64)).astype(F)
    exponents = np.floor(logarithm, out=logarithm) + F(BIAS - TOP_EXPONENT)
    exponents[largest == 0] = 0
    return exponents.astype(np.int32).astype(np.uint8)


def _codes(x: F32Array, exponents: Bytes) -> Bytes:
    """Codes (8, 4 n) u8 of quads x, which are spoilt. The code of -0 is not used."""
    np.multiply(x, spread(np.ldexp(F(1), BIAS - exponents.astype(np.int32))), out=x)  # exact
    flags = scratch("mxfp4._codes.flags", x.shape, np.bool_)
    codes: Bytes = np.multiply(np.less(x, -LIMITS[0], out=flags).view(np.uint8), np.uint8(8))
    np.abs(x, out=x)
    for limit in LIMITS:
        np.add(codes, np.greater(x, limit, out=flags).view(np.uint8), out=codes)
    return codes


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    halves = np.concatenate([HALVES, -HALVES]).astype(F)
    half_unit = np.ldexp(F(1), blocks["exponent"].astype(np.int32) - (BIAS + 1))
    weights: F32Array = halves[unpack_halves(blocks["codes"])] * half_unit[:, None]
    return weights


# ggml's log2f rounds FLT_MAX up to 2^128, and then the largest values overflow
MXFP4 = QuantType("MXFP4", 39, BLOCK, LAYOUT, encode, decode, 2.0**127, chunk=524_288)
