"""The closed set of tensor operations between a checkpoint and a GGUF: pure functions on slabs of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Op:
    """`apply` maps a slab of rows, given head_dim and the slab's first row, to a slab of the same shape.

    `head_dim` rows belong together where `by_head`; `gives` is the result's type where it is not the source's; `ids`
    are whole numbers, which no recipe stores otherwise.
    """

    name: str
    apply: Callable[[Array, int, int], Array]
    by_head: bool = False
    ids: bool = False
    gives: str | None = None


def _copy(rows: Array, head_dim: int, first: int) -> Array:
    return rows


def _halves(rows: Array, head_dim: int, first: int) -> Array:
    """Interleaved rotary pairs to halves: per head the even rows first, then the odd ones. (heads * head_dim, ...)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _plus_one(rows: Array, head_dim: int, first: int) -> Array:
    """Norms that are published as what they differ from one by, to those that multiply by their weight."""
    return rows.astype(np.float32) + np.float32(1)


def _absolute(rows: Array, head_dim: int, first: int) -> Array:
    """Offsets from each row's own number to the numbers themselves. (n,) integers -> (n,) i64."""
    return rows.astype(np.int64) + np.arange(first, first + len(rows))


COPY = Op("copy", _copy)
PERMUTE_ROPE = Op("permute_rope", _halves, by_head=True)
PLUS_ONE = Op("plus_one", _plus_one, gives="F32")
ABSOLUTE_IDS = Op("absolute_ids", _absolute, ids=True)
