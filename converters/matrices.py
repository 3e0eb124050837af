"""Matrices of a checkpoint put below or beside each other, or taken apart, as runtimes have them.

Nothing is read here: rows are put together when they are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from convert_drafter.converters.checkpoint import Array, Headers, TensorHeader, read_rows
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.experts import described


@dataclass(frozen=True)
class Part:
    """Rows `start` to before `stop` of a tensor."""

    of: TensorHeader
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def below(name: str, parts: Sequence[Part]) -> TensorHeader:
    """Rows of matrices below each other as one. Raises `WrongInput` for unlike ones."""
    first = parts[0].of
    for other in (part.of for part in parts):
        if (other.dtype, other.shape[1:]) != (first.dtype, first.shape[1:]):
            raise _unlike(other, first, "rows of the same width and type")
    places = list(accumulate((part.rows for part in parts), initial=0))

    def expand(start: int, stop: int) -> Array:
        found = [read_rows(first, 0, 0)]
        for at, part in zip(places, parts, strict=False):
            low, high = max(start - at, 0), min(stop - at, part.rows)
            if low < high:
                found.append(read_rows(part.of, part.start + low, part.start + high))
        return np.concatenate(found)

    return replace(described(first, (places[-1], *first.shape[1:]), expand), name=name)


def beside(name: str, left: TensorHeader, right: TensorHeader) -> TensorHeader:
    """Columns of two matrices beside each other as one. Raises `WrongInput` for unlike ones."""
    if (left.dtype, left.shape[:1], len(left.shape)) != (right.dtype, right.shape[:1], 2) or len(right.shape) != 2:
        raise _unlike(right, left, "two matrices with as many rows and of the same type")

    def expand(start: int, stop: int) -> Array:
        return np.concatenate([read_rows(left, start, stop), read_rows(right, start, stop)], axis=1)

    shape = (left.rows, left.shape[1] + right.shape[1])
    return replace(described(left, shape, expand), name=name)


def _unlike(other: TensorHeader, first: TensorHeader, expected: str) -> WrongInput:
    found = f"found {other.dtype} {list(other.shape)} beside {first.dtype} {list(first.shape)} of {first.name}"
    return WrongInput(f"{other.name}: {found}, expected {expected}")


END = ".weight"


def join_columns(headers: Mapping[str, TensorHeader], first: str, second: str, whole: str) -> Headers:
    """The same tensors with (out, in + in) `whole` in place of every (out, in) `first` and its `second`.

    All three are names' ends. Raises `Problems` naming one that has not the other, or another shape.
    """
    part = re.compile(rf"(.*\.)(?:{first}|{second})\{END}")
    found: Headers = {}
    problems: list[str] = []
    for name, header in headers.items():
        if (stem := part.fullmatch(name)) is None:
            found[name] = header
            continue
        left, right = (f"{stem[1]}{end}{END}" for end in (first, second))
        if left not in headers or right not in headers:
            problems.append(f"{right if name == left else left}: missing, expected beside {name}")
        elif name == left and not (wrong := _unlike_halves(header, headers[right])):
            found[f"{stem[1]}{whole}{END}"] = beside(f"{stem[1]}{whole}{END}", header, headers[right])
        elif name == left:
            problems += wrong
    if problems:
        raise Problems(f"{first} and {second}", problems)
    return found


def _unlike_halves(left: TensorHeader, right: TensorHeader) -> list[str]:
    if len(right.shape) == 2 and (left.shape, left.dtype) == (right.shape, right.dtype):
        return []
    expected = f"expected {left.dtype} {list(left.shape)} as {left.name}"
    return [f"{right.name}: found {right.dtype} {list(right.shape)}, {expected}"]
