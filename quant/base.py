"""QuantType: one way to store rows of weights, as a structured dtype and two functions on arrays of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Blocks = NDArray[Any]  # (n_blocks,) of the type's layout


@dataclass(frozen=True)
class QuantType:
    """A ggml storage type: `block` weights become one item of `layout`.

    `encode` maps (n_blocks, block) f32 to (n_blocks,) layout, `decode` the other way. `ggml_id` is the number of
    `enum ggml_type` in ggml.h, which GGUF files carry.
    """

    name: str
    ggml_id: int
    block: int
    layout: np.dtype[Any]
    encode: Callable[[F32Array], Blocks]
    decode: Callable[[Blocks], F32Array]
    largest: float  # magnitude up to which a weight can be stored; more would become an infinity

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.layout.itemsize / self.block

    def n_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape (torch order; the last axis is the row)."""
        if shape and shape[-1] % self.block:
            raise ValueError(f"{self.name}: a row of {shape[-1]} is no multiple of the block of {self.block}")
        return math.prod(shape) // self.block * self.layout.itemsize


# Weights encoded at a time: 256 KiB of f32 stay in the cache of every core we know.
CHUNK = 65_536


def quantize(rows: F32Array, kind: QuantType) -> NDArray[np.uint8]:
    """Encode f32 rows (..., row) to the bytes of a GGUF tensor. Raises ValueError where a row is no whole blocks."""
    kind.n_bytes(rows.shape)
    blocks = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1, kind.block)
    out = np.empty(len(blocks), dtype=kind.layout)
    step = max(1, CHUNK // kind.block)
    for start in range(0, len(blocks), step):
        out[start : start + step] = kind.encode(blocks[start : start + step])
    return out.view(np.uint8)


def dequantize(data: NDArray[np.uint8], kind: QuantType, shape: Sequence[int]) -> F32Array:
    """Decode the bytes of a GGUF tensor to f32 of `shape` (torch order)."""
    return kind.decode(np.ascontiguousarray(data).reshape(-1).view(kind.layout)).reshape(shape)
