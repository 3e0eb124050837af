"""Block types of ggml in vectorized numpy. Knows bytes and rows, nothing about models."""

from __future__ import annotations

from convert_drafter.quant.base import QuantType, dequantize, quantize
from convert_drafter.quant.floats import BF16, F16, F32
from convert_drafter.quant.q8_0 import Q8_0

TYPES: dict[str, QuantType] = {kind.name: kind for kind in (F32, F16, BF16, Q8_0)}

__all__ = ["TYPES", "QuantType", "dequantize", "quantize"]
