"""F16 and BF16: one weight a block, rounded to nearest even as ggml does (`ggml.c: ggml_fp32_to_bf16_row`)."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import Blocks, F32Array, QuantType


def _narrow_f16(blocks: F32Array) -> Blocks:
    with np.errstate(over="ignore"):  # an overflow is reported by the caller, who knows the tensor's name
        return blocks[:, 0].astype(np.float16)


def _narrow_bf16(blocks: F32Array) -> Blocks:
    """Keep the upper half, rounding the lower one to nearest even. (n, 1) f32 -> (n,) u16."""
    bits = blocks[:, 0].view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _widen_bf16(blocks: Blocks) -> F32Array:
    return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]


F16_MAX = float(np.finfo(np.float16).max)
BF16_MAX = 2.0**128 - 2.0**120

F16 = QuantType("F16", 1, 1, np.dtype("<f2"), _narrow_f16, lambda b: b.astype(np.float32)[:, None], F16_MAX)
BF16 = QuantType("BF16", 30, 1, np.dtype("<u2"), _narrow_bf16, _widen_bf16, BF16_MAX)
