"""QuantType: one way to store rows of weights, as a structured dtype and functions on arrays of blocks.

`transcode` walks a tensor in pieces that stay in the cache, each of which any thread may take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Blocks = NDArray[Any]  # (n_blocks,) of the type's layout
Run = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]  # `map`, or an executor's


@dataclass(frozen=True)
class QuantType:
    """A ggml storage type: `block` weights become one item of `layout`.

    `encode` maps (n_blocks, block) f32 to (n_blocks,) layout, `decode` the other way. `encode_weighted` maps whole rows
    (n_rows, row) f32 and the importance of their columns (row,) f32 to (n_rows * row / block,) layout; it is None where
    ggml ignores importance too. `ggml_id` is the number of `enum ggml_type` in ggml.h, which GGUF files carry. `chunk`
    weights are encoded at a time.
    """

    name: str
    ggml_id: int
    block: int
    layout: np.dtype[Any]
    encode: Callable[[F32Array], Blocks]
    decode: Callable[[Blocks], F32Array]
    largest: float  # magnitude up to which weights are taken; where a fit needs too large a scale, less is refused
    encode_weighted: Callable[[F32Array, F32Array], Blocks] | None = None
    chunk: int = 65_536  # 256 KiB of f32 stay in the cache of every core we know

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.layout.itemsize / self.block

    def n_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape (torch order; the last axis is the row)."""
        if shape and shape[-1] % self.block:
            raise ValueError(f"{self.name}: a row of {shape[-1]} is no multiple of the block of {self.block}")
        return math.prod(shape) // self.block * self.layout.itemsize


class OutOfRange(ValueError):
    """A weight is NaN, infinite or too large for the type; `index` counts weights from the tensor's first."""

    def __init__(self, value: float, index: int, largest: float) -> None:
        super().__init__(f"weight {index}: found {value:g}, expected a finite number up to {largest:g}")
        self.value, self.index, self.largest = value, index, largest


def check_range(weights: F32Array, kind: QuantType, first: int = 0) -> None:
    """Raise `OutOfRange` for the first weight that `kind` cannot store; `first` is the index of weights[0]."""
    if max(weights.max(initial=0), -weights.min(initial=0)) <= kind.largest:  # False for NaN
        return
    flat = weights.reshape(-1)
    index = int(np.argmin(np.abs(flat) <= kind.largest))
    raise OutOfRange(float(flat[index]), first + index, kind.largest)


class ScaleOverflow(ValueError):
    """A block's f16 scale became infinite; `index` is that of the block's first weight in the tensor."""

    def __init__(self, kind: QuantType, index: int) -> None:
        super().__init__(f"weights {index} to {index + kind.block - 1}: their scale overflows in {kind.name}")
        self.kind, self.index = kind, index


def check_scales(blocks: Blocks, kind: QuantType, first: int = 0) -> None:
    """Raise `ScaleOverflow`: a fit to large weights, above all under uneven importance, can ask for such a scale."""
    for name in blocks.dtype.names or ():
        if blocks.dtype[name] == np.float16 and not (finite := np.isfinite(blocks[name])).all():
            raise ScaleOverflow(kind, first + int(np.argmin(finite)) * kind.block)


def quantize(rows: F32Array, kind: QuantType, importance: F32Array | None = None, run: Run = map) -> Bytes:
    """Encode f32 rows (..., row) to the bytes of a GGUF tensor, as ggml's `ggml_quantize_chunk` does.

    `importance` (row,) weighs the columns' errors. Raises as `transcode`.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    return transcode(rows.reshape(-1).view(np.uint8), F32, kind, rows.shape, importance, run)


def dequantize(data: Bytes, kind: QuantType, shape: Sequence[int]) -> F32Array:
    """Decode the bytes of a GGUF tensor to f32 of `shape` (torch order)."""
    return kind.decode(np.ascontiguousarray(data).reshape(-1).view(kind.layout)).reshape(shape)


def transcode(
    data: Bytes,
    source: QuantType,
    kind: QuantType,
    shape: Sequence[int],
    importance: F32Array | None = None,
    run: Run = map,
    watch: Callable[[int, F32Array, Blocks], object] | None = None,
) -> Bytes:
    """From the bytes of one type to those of another, a chunk at a time; `run` may hand chunks to threads.

    `shape` is in torch order, `importance` (row,) f32. Blocks of the same type are checked and copied. `watch` sees
    each chunk's first index, weights and blocks, in any order and from any thread. Raises ValueError where a row is no
    whole blocks or importance not one row, `OutOfRange`, `ScaleOverflow`.
    """
    if importance is not None and importance.shape != (shape[-1],):
        raise ValueError(f"importance: found shape {importance.shape}, expected ({shape[-1]},)")
    out = np.empty(kind.n_bytes(shape), np.uint8).view(kind.layout)
    blocks, row, total = data.view(source.layout), shape[-1], math.prod(shape)
    encode_weights, step = _encoder(kind, row, importance)

    def encode(start: int) -> None:
        stop = min(start + step, total)
        held = blocks[start // source.block : stop // source.block]
        place = out[start // kind.block : stop // kind.block]
        with np.errstate(all="ignore"):  # damaged blocks may decode to anything, and are refused below
            weights = source.decode(held)
        check_range(weights, kind, start)
        encoded = held if source is kind else encode_weights(weights)
        place.view(np.uint8)[...] = encoded.view(np.uint8)  # field by field would take ten times as long
        check_scales(place, kind, start)
        if watch is not None:
            watch(start, weights, place)

    for _ in run(encode, range(0, total, step)):
        pass  # an executor's map raises here what a chunk raised
    return out.view(np.uint8)


def _encoder(kind: QuantType, row: int, importance: F32Array | None) -> tuple[Callable[[F32Array], Blocks], int]:
    """How weights become blocks, and how many at a time: whole rows where their columns are weighed."""
    weighted = kind.encode_weighted
    if importance is None or weighted is None:
        return (lambda weights: kind.encode(weights.reshape(-1, kind.block))), kind.chunk
    columns = np.ascontiguousarray(importance, dtype=np.float32)
    return (lambda weights: weighted(weights.reshape(-1, row), columns)), max(1, kind.chunk // row) * row


F32 = QuantType("F32", 0, 1, np.dtype("<f4"), lambda b: b[:, 0], lambda b: b[:, None], float(np.finfo(np.float32).max))
