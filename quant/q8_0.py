"""Q8_0: 32 weights as one f16 scale and 32 signed bytes (`ggml-quants.c: quantize_row_q8_0_ref`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.floats import F16_MAX

LAYOUT = np.dtype([("scale", "<f2"), ("codes", "i1", (32,))])


def _round_half_away(x: F32Array) -> F32Array:
    """C's roundf, in place of numpy's rint: the two differ at exact halves. x + 0.5 would round 0.49999997 up."""
    whole = np.trunc(x)
    np.subtract(x, whole, out=x)  # exact: the fraction
    np.multiply(x, 2, out=x)
    np.trunc(x, out=x)  # -1, 0 or 1
    return np.add(whole, x, out=x)


def encode(blocks: F32Array) -> Blocks:
    """(n, 32) f32 -> (n,) layout. The codes divide by the f32 scale, not by the stored f16 one."""
    out = np.empty(len(blocks), dtype=LAYOUT)
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
        out["scale"] = scale.astype(np.float16)
    # A scale that is zero or too small to invert gives codes of zero, also in ggml (inf to int8 is 0 on x86-64).
    inverse[np.isinf(inverse)] = 0
    out["codes"] = _round_half_away(blocks * inverse[:, None])
    return out


def decode(blocks: Blocks) -> F32Array:
    scaled: F32Array = blocks["codes"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]
    return scaled


Q8_0 = QuantType("Q8_0", 8, 32, LAYOUT, encode, decode, 127 * F16_MAX)
