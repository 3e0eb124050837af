"""How a quantized tensor is published: each scheme's bytes and scales to F32 rows, a slab at a time.

Every scheme is the same sentence: a byte stands for one weight or two, and a weight is multiplied by the scale of its
rectangle of rows and columns. Where an asymmetric scheme has zero points they are subtracted first. The order of the
operations is that of the libraries that wrote the file, in f32, so that the last bit is theirs too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from convert_drafter.converters.checkpoint import Array, TensorHeader, read_rows
from convert_drafter.quant.base import Bytes, F32Array

F = np.float32
BYTES = np.arange(256, dtype=np.uint8)
WORD = 32  # bits of an I32, which compressed-tensors packs integers into


def _pairs(values: F32Array) -> F32Array:
    """The two weights of each byte, (16,) -> (256, 2): the lower half comes first in every scheme."""
    return np.stack([values[BYTES & 15], values[BYTES >> 4]], axis=1)


# What a byte stands for, (256, weights in a byte) f32.
E4M3 = BYTES.view(ml_dtypes.float8_e4m3fn).astype(F)[:, None]
E2M1 = _pairs(BYTES[:16].view(ml_dtypes.float4_e2m1fn).astype(F))
INT8 = BYTES.view(np.int8).astype(F)[:, None]
INT8_UP = BYTES.astype(F)[:, None] - F(128)  # compressed-tensors packs integers moved up, so that none is negative
INT4_UP = _pairs(BYTES[:16].astype(F) - F(8))
# A scale that is a power of two; the last code is no number (OCP Microscaling Formats 1.0, E8M0)
E8M0 = np.append(np.ldexp(F(1), np.arange(-127, 128)), F("nan"))
SCALES = {"U8": E8M0, "F8_E8M0": E8M0, "F8_E4M3": E4M3[:, 0]}  # what else a scale may be is a plain float


@dataclass(frozen=True, eq=False)
class Scheme:
    """One way to publish a quantized tensor `X`, its parts named by what they have after `X`.

    `codes` (256, n) f32 is what a byte of the part `suffix` stands for. `second` is a scale of the scales and how the
    two are joined. `zeros` are the dtypes that zero points may have, if there are any: packed ones are I32. `grid` is
    the rows and columns that share a scale, where that is no matter of the config.
    """

    title: str
    format: str
    suffix: str
    dtype: str
    codes: F32Array
    scale: str
    scale_dtypes: tuple[str, ...]
    second: str = ""
    join: Callable[[F32Array, F32Array], F32Array] = np.multiply
    zeros: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None

    @property
    def packs(self) -> bool:
        """Integers lie in I32 words, the last of which may not be full: the width is told by a part `_shape`."""
        return self.dtype == "I32"

    @property
    def bits(self) -> int:
        return 8 // int(self.codes.shape[1])


FLOATS = ("F32", "BF16", "F16")
FP8_BLOCKS = Scheme("FP8", "fp8", "", "F8_E4M3", E4M3, "_scale_inv", (*FLOATS, "F8_E8M0"))
FP4_GROUPS = Scheme("FP4", "fp8", "", "I8", E2M1, "_scale_inv", ("F8_E8M0",), grid=(1, 32))  # experts of DeepSeek-V4
FP8 = Scheme("FP8", "float-quantized", "", "F8_E4M3", E4M3, "_scale", FLOATS)
INT = Scheme("INT8", "int-quantized", "", "I8", INT8, "_scale", FLOATS, zeros=("I8",))
PACKED_INT4 = Scheme("INT4", "pack-quantized", "_packed", "I32", INT4_UP, "_scale", FLOATS, zeros=("I32", "I8"))
PACKED_INT8 = Scheme("INT8", "pack-quantized", "_packed", "I32", INT8_UP, "_scale", FLOATS, zeros=("I32", "I8"))
MXFP4_BLOCKS = Scheme("MXFP4", "mxfp4", "_blocks", "U8", E2M1, "_scales", ("U8",), grid=(1, 32))
MXFP4 = Scheme("MXFP4", "mxfp4-pack-quantized", "_packed", "U8", E2M1, "_scale", ("U8",), grid=(1, 32))
# compressed-tensors divides by the second scale, ModelOpt multiplies by it
NVFP4 = Scheme(
    "NVFP4", "nvfp4-pack-quantized", "_packed", "U8", E2M1, "_scale", ("F8_E4M3",),
    second="_global_scale", join=np.divide, grid=(1, 16),
)  # fmt: skip
MODELOPT_NVFP4 = Scheme(
    "NVFP4", "NVFP4", "", "U8", E2M1, "_scale", ("F8_E4M3",), second="_scale_2", join=np.multiply, grid=(1, 16)
)


@dataclass(frozen=True)
class Packed:
    """A quantized tensor of `shape` (torch order) and its parts; `grid` rows and columns share a scale."""

    scheme: Scheme
    shape: tuple[int, ...]
    grid: tuple[int, int]
    codes: TensorHeader
    scale: TensorHeader
    second: TensorHeader | None = None
    zeros: TensorHeader | None = None

    def rows(self, start: int, stop: int) -> F32Array:
        """Rows start..stop of the first axis, (stop - start, *shape[1:]) f32; nothing else is read than they need."""
        if start == stop:
            return np.empty((0, *self.shape[1:]), F)
        lines = (stop - start) * math.prod(self.shape[1:-1])  # of weights: a row has more than one under three axes
        stored = read_rows(self.codes, start, stop).reshape(-1).view(np.uint8)
        weights = looked_up(self.scheme.codes, stored).reshape(lines, -1)[:, : self.shape[-1]]
        first, last = start // self.grid[0], -(-stop // self.grid[0])
        with np.errstate(all="ignore"):  # a damaged file's scales may be anything; what comes of them is refused later
            if self.zeros is not None:
                weights = self._joined(np.subtract, weights, self._zeros(self.zeros, first, last), start, stop)
            weights = self._joined(np.multiply, weights, self._scales(first, last), start, stop)
        return weights.reshape(stop - start, *self.shape[1:])

    def _joined(self, join: np.ufunc, weights: F32Array, grid: F32Array, start: int, stop: int) -> F32Array:
        """Each weight with the value of its rectangle; the grid's first row is that of row `start`."""
        tall, wide = self.grid
        if tall > 1:
            grid = grid[np.arange(start, stop) // tall - start // tall]
        grid = grid.reshape(len(weights), -1)
        if weights.shape[1] % wide:  # the last rectangle is not whole
            grid, wide = np.repeat(grid, wide, axis=1)[:, : weights.shape[1]], 1
        parts = weights.reshape(*grid.shape, wide)
        joined: F32Array = join(parts, grid[:, :, None], out=parts).reshape(weights.shape)
        return joined

    def _scales(self, first: int, last: int) -> F32Array:
        """Rows first..last of the grid of scales, (last - first, ...) f32."""
        scales = as_floats(read_rows(self.scale, first, last), self.scale.dtype)
        if self.second is not None:
            scales = self.scheme.join(scales, as_floats(read_rows(self.second, 0, 1), self.second.dtype).reshape(()))
        return scales.reshape(last - first, -1)

    def _zeros(self, zeros: TensorHeader, first: int, last: int) -> F32Array:
        """Rows first..last of the grid of zero points; packed ones fill their words along the rows, not the columns."""
        if zeros.dtype != "I32":
            return read_rows(zeros, first, last).astype(F).reshape(last - first, -1)
        codes, together = self.scheme.codes, WORD // self.scheme.bits
        words = read_rows(zeros, first // together, -(-last // together))
        values = looked_up(codes, words.reshape(-1).view(np.uint8)).reshape(*words.shape, together)
        rows = values.swapaxes(1, 2).reshape(-1, words.shape[1])
        return rows[first % together :][: last - first]


def looked_up(codes: F32Array, stored: Bytes) -> F32Array:
    """The weights of bytes (n,), in their order; the two of a byte are taken as one item, which is twice as fast."""
    items = codes.reshape(-1).view(np.dtype(f"u{codes.itemsize * codes.shape[1]}"))
    weights: F32Array = np.take(items, stored).view(F)
    return weights


def as_floats(values: Array, dtype: str) -> F32Array:
    """Scales of a safetensors dtype as f32."""
    table = SCALES.get(dtype)
    return values.astype(F) if table is None else table[values.view(np.uint8)]
