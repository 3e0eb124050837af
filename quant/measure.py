"""The error of a tensor against its quantized copy, as sums that add up over its chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import F32Array
from convert_drafter.quant.scratch import scratch

PIECE = 32_768  # weights at a time: the f64 copies stay in the cache


@dataclass(frozen=True)
class Errors:
    """Sums over `count` weights in float64 and the largest error; `Errors()` is that of no weights."""

    count: int = 0
    squared_error: float = 0.0
    squares: float = 0.0  # of the original
    squares_of_copy: float = 0.0
    product: float = 0.0  # of the original with the copy
    max: float = 0.0  # magnitude of the largest error

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.count + other.count,
            self.squared_error + other.squared_error,
            self.squares + other.squares,
            self.squares_of_copy + other.squares_of_copy,
            self.product + other.product,
            max(self.max, other.max),
        )

    @property
    def rmse(self) -> float:
        """Root of the mean squared error; 0 for no weights."""
        return math.sqrt(self.squared_error / self.count) if self.count else 0.0

    @property
    def relative(self) -> float:
        """RMSE per root mean square of the original. Of an original of zeros: 0 if the copy is equal, else infinite."""
        if self.squares:
            return math.sqrt(self.squared_error / self.squares)
        return math.inf if self.squared_error else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between original and copy: 1 if both are zeros, 0 if one is."""
        lengths = math.sqrt(self.squares) * math.sqrt(self.squares_of_copy)
        return self.product / lengths if lengths else float(self.squares == self.squares_of_copy)


def measure(original: F32Array, copy: F32Array) -> Errors:
    """Errors of `copy` against `original`, f32 of one shape; raises ValueError where the shapes differ."""
    if original.shape != copy.shape:
        raise ValueError(f"original {original.shape} and copy {copy.shape} differ in shape")
    x, y = original.reshape(-1), copy.reshape(-1)
    total = Errors()
    for start in range(0, x.size, PIECE):
        total += _measure_piece(x[start : start + PIECE], y[start : start + PIECE])
    return total


def _measure_piece(original: F32Array, copy: F32Array) -> Errors:
    x, y = scratch("measure.x", original.shape, np.float64), scratch("measure.y", copy.shape, np.float64)
    np.copyto(x, original)
    np.copyto(y, copy)
    squares, squares_of_copy, product = _dot(x, x), _dot(y, y), _dot(x, y)
    difference = np.subtract(x, y, out=x)
    largest = float(max(difference.max(), -difference.min()))
    return Errors(x.size, _dot(difference, difference), squares, squares_of_copy, product, largest)


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Not `a @ b`: that is BLAS, which starts threads of its own."""
    return float(np.einsum("i,i->", a, b))
