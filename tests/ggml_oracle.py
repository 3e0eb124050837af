"""ggml's own quantizer, called with ctypes: what the real llama.cpp writes for given weights, on x86-64."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from engine import llama_binary

from convert_drafter.quant import QuantType


@cache
def library() -> ctypes.CDLL:
    """libggml-base with the one signature that is called."""
    loaded = ctypes.CDLL(str(llama_binary("libggml-base.so")))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    return loaded


def ggml_quantize(rows: np.ndarray, kind: QuantType, importance: np.ndarray | None = None) -> bytes:
    """The bytes `ggml_quantize_chunk` writes for (n, row) f32 rows and an optional (row,) f32 importance."""
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty(kind.n_bytes(rows.shape), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if weights is None else weights.ctypes.data
    size = library().ggml_quantize_chunk(kind.ggml_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, address)
    assert size == out.nbytes
    return out.tobytes()
