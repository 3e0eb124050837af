"""The up-projection of latent attention as runtimes have it: keys and values apart, keys transposed for each head.

A checkpoint has one matrix whose rows are, head by head, those of keys that are not rotated, then those of values.
Runtimes send queries through the part of the keys, so that keys stay as narrow as they are kept (arXiv 2405.04434,
section 2.1.2; llama.cpp's conversion/deepseek.py). Nothing is read here: rows are put together when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from convert_drafter.converters.checkpoint import Array, Headers, TensorHeader, read_rows
from convert_drafter.converters.errors import Problems
from convert_drafter.converters.experts import described

BOTH = re.compile(r".*\.kv_b_proj\.weight")
KEYS, VALUES = " (keys)", " (values)"  # behind the name of the matrix they are parts of


def part_keys_values(headers: Mapping[str, TensorHeader], heads: int, key: int, value: int) -> Headers:
    """The same tensors with keys (heads, rank, key) and values (heads, value, rank) in place of each such matrix.

    Raises `Problems` naming one that has not a row for each of these widths.
    """
    found: Headers = {}
    problems: list[str] = []
    for name, header in headers.items():
        if not BOTH.fullmatch(name):
            found[name] = header
        elif len(header.shape) != 2 or header.rows != heads * (key + value):
            rows = f"{heads * (key + value)} rows: {heads} heads of {key} for the key and {value} for the value"
            problems.append(f"{header.file.name}: {name}: found shape {list(header.shape)}, expected {rows}")
        else:
            found[name + KEYS] = _keys(header, heads, key)
            found[name + VALUES] = _values(header, heads, value)
    if problems:
        raise Problems("latent attention", problems)
    return found


def _of_heads(header: TensorHeader, heads: int, start: int, stop: int) -> Array:
    """The rows of some heads, (stop - start, key + value, rank)."""
    each = header.rows // heads
    return read_rows(header, start * each, stop * each).reshape(stop - start, each, header.shape[1])


def _keys(header: TensorHeader, heads: int, key: int) -> TensorHeader:
    def expand(start: int, stop: int) -> Array:
        return np.ascontiguousarray(_of_heads(header, heads, start, stop)[:, :key].swapaxes(1, 2))

    return _part(header, KEYS, (heads, header.shape[1], key), expand)


def _values(header: TensorHeader, heads: int, value: int) -> TensorHeader:
    def expand(start: int, stop: int) -> Array:
        return np.ascontiguousarray(_of_heads(header, heads, start, stop)[:, -value:])

    return _part(header, VALUES, (heads, value, header.shape[1]), expand)


def _part(
    header: TensorHeader, which: str, shape: tuple[int, ...], expand: Callable[[int, int], Array]
) -> TensorHeader:
    return replace(described(header, shape, expand), name=header.name + which)
