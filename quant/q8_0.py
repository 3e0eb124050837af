"""Q8_0: 32 weights as one f16 scale and 32 signed bytes (`ggml-quants.c: quantize_row_q8_0_ref`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.floats import F16_MAX, to_f16
from convert_drafter.quant.quads import BLOCK, inverse, quads, size, spread, store
from convert_drafter.quant.scratch import scratch

LAYOUT = np.dtype([("scale", "<f2"), ("codes", "i1", (BLOCK,))])
TOP = 127  # the largest code


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout. The codes divide by the f32 scale, not by the stored f16 one."""
    with as_c():
        x = quads(blocks, "q8_0.encode.x")
        scale = size(x) / np.float32(TOP)
        out = np.empty(len(blocks), LAYOUT)
        out["scale"] = to_f16(scale)
        np.multiply(x, spread(inverse(scale)), out=x)
        store(out["codes"], _round_half_away(x))
        return out


def _round_half_away(x: F32Array) -> NDArray[np.int8]:
    """C's roundf of up to +-127, as trunc(2 x) - trunc(x); numpy's rint differs at halves. x is spoilt."""
    codes = scratch("q8_0.whole", x.shape, np.int8)
    twice = scratch("q8_0.twice", x.shape, np.int16)
    np.copyto(codes, x, casting="unsafe")
    np.add(x, x, out=x)
    np.copyto(twice, x, casting="unsafe")
    lower = twice.astype(np.int8)  # of the difference only the lower byte counts
    lower -= codes
    return lower


def decode(blocks: Blocks) -> F32Array:
    """(n,) layout -> (n, 32) f32."""
    weights: F32Array = blocks["codes"] * blocks["scale"].astype(np.float32)[:, None]
    return weights


Q8_0 = QuantType("Q8_0", 8, BLOCK, LAYOUT, encode, decode, TOP * F16_MAX, chunk=524_288)
