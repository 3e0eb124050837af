"""F16 and BF16: one weight a block, rounded to nearest even as ggml does (`ggml.c: ggml_fp32_to_bf16_row`).

The bits are computed with integers, in passes over scratch arrays. numpy's own conversion to f16 goes number by number,
and where the f16 is denormal it takes 40 ns for each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import Blocks, F32Array, QuantType
from convert_drafter.quant.scratch import scratch

U = np.uint32
F32_EXPONENT = 23  # where the exponent's bits begin
LOWEST = 127 - 14  # biased exponent of the smallest normal f16; the denormals below share its unit


def to_f16(values: F32Array) -> NDArray[np.float16]:
    """f32 of magnitude up to F16_MAX -> f16 of the same shape.

    A power of two is added, so large that f32 rounds the sum to the unit of the f16: what is left in the sum's mantissa
    is the f16's mantissa with its leading bit, which then counts as one step of the exponent.
    """
    bits = values.view(U)
    size, power = scratch("to_f16.size", bits.shape, U), scratch("to_f16.power", bits.shape, U)
    np.bitwise_and(bits, U(0x7FFFFFFF), out=size)
    np.bitwise_and(bits, U(0x7F800000), out=power)
    np.clip(power, U(LOWEST << F32_EXPONENT), U(0x7F800000), out=power)  # faster than maximum
    np.add(power, U(13 << F32_EXPONENT), out=power)
    floats = size.view(np.float32)
    np.add(floats, power.view(np.float32), out=floats)
    np.right_shift(size, U(13), out=power)  # the exponent, in the place it has in an f16
    np.add(size, power, out=size)
    np.subtract(size, U(LOWEST + 13 << 10), out=size)
    out = size.astype(np.uint16)
    sign = np.right_shift(bits, U(16), out=size).astype(np.uint16)
    np.bitwise_and(sign, np.uint16(0x8000), out=sign)
    out |= sign
    return out.view(np.float16)


def _narrow_f16(blocks: F32Array) -> Blocks:
    return to_f16(blocks[:, 0])


def _widen_f16(blocks: Blocks) -> F32Array:
    return blocks.astype(np.float32)[:, None]


def _narrow_bf16(blocks: F32Array) -> NDArray[np.uint16]:
    """Keep the upper half, rounding the lower one to nearest even. (n, 1) f32 -> (n,) u16."""
    bits = blocks[:, 0].view(U)
    upper: NDArray[np.uint32] = scratch("floats.upper", bits.shape, U)
    np.right_shift(bits, U(16), out=upper)
    np.bitwise_and(upper, U(1), out=upper)
    np.add(upper, U(0x7FFF), out=upper)
    np.add(upper, bits, out=upper)
    np.right_shift(upper, U(16), out=upper)
    return upper.astype(np.uint16)


def _widen_bf16(blocks: Blocks) -> F32Array:
    wide: NDArray[np.uint32] = blocks.astype(U)
    return np.left_shift(wide, U(16), out=wide).view(np.float32)[:, None]


F16_MAX = float(np.finfo(np.float16).max)
BF16_MAX = 2.0**128 - 2.0**120

CHUNK = 524_288

F16 = QuantType("F16", 1, 1, np.dtype("<f2"), _narrow_f16, _widen_f16, F16_MAX, chunk=CHUNK)
BF16 = QuantType("BF16", 30, 1, np.dtype("<u2"), _narrow_bf16, _widen_bf16, BF16_MAX, chunk=CHUNK)
