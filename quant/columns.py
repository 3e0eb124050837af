"""Blocks as columns: (block, n) arrays whose sums over axis 0 run in index order, as ggml's loops do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert_drafter.quant.base import F32Array
from convert_drafter.quant.scratch import scratch

SUPER = 256  # weights of a super-block, QK_K in ggml-common.h
NEAREST_LIMIT = np.float32(4194303)  # magnitude up to which `nearest_int` is plain rounding
NEGLIGIBLE = np.float32(1e-15)  # GROUP_MAX_EPS: a smaller largest weight is none


def columns(rows: F32Array, block: int, name: str) -> F32Array:
    """(..., k * block) f32 -> (block, n) f32, a scratch array of the caller's name."""
    blocks = rows.reshape(-1, block)
    out = scratch(name, blocks.shape[::-1])
    step = max(1, 8192 // block)  # turned in pieces of 32 KiB, which the nearest cache holds
    for start in range(0, len(blocks), step):
        np.copyto(out[:, start : start + step], blocks[start : start + step].T)
    return out


def nearest_int(values: F32Array) -> NDArray[np.int32]:
    """ggml's rounding to integers, also where its trick with the mantissa gives odd ones: beyond 2^22, inf, NaN."""
    bits: NDArray[np.int32] = (values + np.float32(12582912)).view(np.int32)
    return (bits & 0x7FFFFF) - 0x400000


def _einsum_is_exact() -> bool:
    """Whether einsum multiplies and adds in index order and without fused steps, as SSE2 builds of numpy do."""
    numbers = np.random.default_rng(0).standard_normal((2, 32, 1024), dtype=np.float32)
    found = np.einsum("ij,ij->j", *numbers)
    return bool(np.array_equal(found, np.add.reduce(numbers[0] * numbers[1], axis=0)))


EINSUM_IS_EXACT = _einsum_is_exact()


def column_sums(a: F32Array) -> F32Array:
    """Sum of each column in index order, (block, n) f32 C-contiguous -> (n,) f32."""
    if a.shape[1] == 1:  # numpy would see one contiguous row, which it sums pairwise
        return np.asarray(np.add.accumulate(a, axis=0)[-1] + np.float32(0))  # C begins with 0: never -0
    return np.asarray(np.add.reduce(a, axis=0))


def take_columns(a: NDArray[Any], places: NDArray[np.intp]) -> NDArray[Any]:
    """Some columns, C-contiguous: indexing with a list would give an array in the other order."""
    return np.take(a, places, axis=1)


def largest_of(x: F32Array) -> F32Array:
    """The first element of largest magnitude of each column, or NaN if there is one: (block, n) f32 -> (n,) f32."""
    high: F32Array = np.maximum.reduce(x, axis=0)
    low = np.minimum.reduce(x, axis=0)
    tied = np.flatnonzero(high == np.negative(low))
    np.putmask(high, high < -low, low)
    if tied.size:
        sub = take_columns(x, tied)
        high[tied] = np.take_along_axis(sub, np.abs(sub).argmax(axis=0)[None], axis=0)[0]
    return high


def dots(a: F32Array, b: F32Array) -> F32Array:
    """Dot product of each column of a with that of b, (block, n) f32 twice -> (n,) f32, as a loop of C computes it."""
    if EINSUM_IS_EXACT and a.shape[1] > 1:  # one pass over the data instead of two
        return np.asarray(np.einsum("ij,ij->j", a, b))
    return column_sums(np.multiply(a, b, out=scratch("dots.product", a.shape)))


def super_sums(blocks: F32Array) -> F32Array:
    """Sum of squares of each super-block in index order: (n, 256) f32 -> (n,) f32."""
    squares = columns(blocks, SUPER, "super_sums.squares")
    return column_sums(np.square(squares, out=squares))


@contextmanager
def as_c() -> Iterator[None]:
    """C's float arithmetic: no warnings; and no copies of broadcast values (numpy makes them in shorter rows)."""
    size = np.setbufsize(512)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        np.setbufsize(size)


def round_codes(exact: F32Array, lowest: int, highest: int) -> F32Array:
    """`nearest_int` of every element, limited to lowest..highest; in place."""
    odd = None
    if not max(exact.max(initial=0), -exact.min(initial=0)) < NEAREST_LIMIT:  # also for NaN
        wild = ~(np.abs(exact) < NEAREST_LIMIT)
        odd = np.clip(nearest_int(exact[wild]), lowest, highest)
    np.rint(exact, out=exact)
    np.clip(exact, np.float32(lowest), np.float32(highest), out=exact)
    if odd is not None:
        exact[wild] = odd
    return exact


def weigh(rows: F32Array, importance: F32Array, block: int, factor: float) -> tuple[F32Array, F32Array]:
    """Blocks as columns and the weight of each error: importance * sqrt(factor * mean square of the super-block + x^2).

    (n, row) f32 and (row,) f32 -> twice (block, n * row / block) f32, scratch arrays.
    """
    spread = np.float32(factor) * super_sums(rows.reshape(-1, SUPER)) / np.float32(SUPER)
    return weigh_from(rows, importance, block, np.repeat(spread, SUPER // block))


def weigh_from(rows: F32Array, importance: F32Array, block: int, spread: F32Array) -> tuple[F32Array, F32Array]:
    """The same as `weigh` with a mean square for each block, (n * row / block,) f32."""
    x = columns(rows, block, "weigh_from.x")
    weights = np.square(x, out=scratch("weigh_from.weights", x.shape))
    np.add(weights, spread, out=weights)
    np.sqrt(weights, out=weights)
    by_row = weights.reshape(block, len(rows), -1)
    np.multiply(by_row, importance.reshape(-1, block).T[:, None], out=by_row)
    return x, weights
