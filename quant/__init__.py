"""Block types of ggml in vectorized numpy. Knows bytes and rows, nothing about models."""

from __future__ import annotations

from convert_drafter.quant.base import F32, OutOfRange, QuantType, check_range, dequantize, quantize, transcode
from convert_drafter.quant.floats import BF16, F16
from convert_drafter.quant.q2_k import Q2_K
from convert_drafter.quant.q4_k import Q4_K
from convert_drafter.quant.q5_k import Q5_K
from convert_drafter.quant.q8_0 import Q8_0

TYPES: dict[str, QuantType] = {kind.name: kind for kind in (F32, F16, BF16, Q8_0, Q5_K, Q4_K, Q2_K)}

__all__ = ["TYPES", "OutOfRange", "QuantType", "check_range", "dequantize", "quantize", "transcode"]
