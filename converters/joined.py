"""Two matrices of a checkpoint that runtimes have as one, their columns beside each other. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from convert_drafter.converters.checkpoint import Array, Headers, TensorHeader, read_rows
from convert_drafter.converters.errors import Problems
from convert_drafter.converters.experts import described

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
        elif name == left:
            problems += _unlike(header, headers[right])
            found[f"{stem[1]}{whole}{END}"] = _beside(f"{stem[1]}{whole}{END}", header, headers[right])
    if problems:
        raise Problems(f"{first} and {second}", problems)
    return found


def _unlike(left: TensorHeader, right: TensorHeader) -> list[str]:
    if len(right.shape) == 2 and (left.shape, left.dtype) == (right.shape, right.dtype):
        return []
    expected = f"expected {left.dtype} {list(left.shape)} as {left.name}"
    return [f"{right.name}: found {right.dtype} {list(right.shape)}, {expected}"]


def _beside(name: str, left: TensorHeader, right: TensorHeader) -> TensorHeader:
    def expand(start: int, stop: int) -> Array:
        return np.concatenate([read_rows(half, start, stop) for half in (left, right)], axis=-1)

    return replace(described(left, (*left.shape[:-1], 2 * left.shape[-1]), expand), name=name)
