"""Block types of ggml in vectorized numpy. Knows bytes and rows, nothing about models."""

from __future__ import annotations

from convert_drafter.quant.base import (
    F32,
    OutOfRange,
    QuantType,
    ScaleOverflow,
    check_range,
    dequantize,
    quantize,
    transcode,
)
from convert_drafter.quant.floats import BF16, F16
from convert_drafter.quant.ids import I64
from convert_drafter.quant.iq4_nl import IQ4_NL
from convert_drafter.quant.iq4_xs import IQ4_XS
from convert_drafter.quant.mxfp4 import MXFP4
from convert_drafter.quant.q2_k import Q2_K
from convert_drafter.quant.q3_k import Q3_K
from convert_drafter.quant.q4_0 import Q4_0
from convert_drafter.quant.q4_1 import Q4_1
from convert_drafter.quant.q4_k import Q4_K
from convert_drafter.quant.q5_0 import Q5_0
from convert_drafter.quant.q5_1 import Q5_1
from convert_drafter.quant.q5_k import Q5_K
from convert_drafter.quant.q6_k import Q6_K
from convert_drafter.quant.q8_0 import Q8_0

TYPES: dict[str, QuantType] = {
    kind.name: kind
    for kind in (F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, IQ4_NL, IQ4_XS, MXFP4, Q3_K, Q2_K)
}

# Everything a drafter's file may hold: what recipes choose from, and token ids.
STORED: dict[str, QuantType] = TYPES | {I64.name: I64}

__all__ = [
    "I64",
    "STORED",
    "TYPES",
    "OutOfRange",
    "QuantType",
    "ScaleOverflow",
    "check_range",
    "dequantize",
    "quantize",
    "transcode",
]
