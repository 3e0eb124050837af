"""I64: token ids, which a file stores beside its weights; no recipe chooses it."""

from __future__ import annotations

import numpy as np

from convert_drafter.quant.base import QuantType

EXACT = float(2**24)  # integers up to here are f32 numbers, and no vocabulary is larger

I64 = QuantType(
    "I64",
    27,
    1,
    np.dtype("<i8"),
    lambda ids: np.rint(ids[:, 0]).astype("<i8"),
    lambda ids: ids.astype(np.float32)[:, None],
    EXACT,
)
