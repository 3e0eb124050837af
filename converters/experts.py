"""A mixture's experts as runtimes have them: each projection of all experts is one tensor (experts, out, in).

Some checkpoints have a tensor for each expert, others have gate and up projection of all of them in one. Nothing is
read here: the tensors are described, and their rows are put together when they are asked for.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from convert_drafter.converters.checkpoint import DTYPES, Array, Checkpoint, Headers, TensorHeader, read_rows
from convert_drafter.converters.errors import Problems

EACH = re.compile(r"(.*\.(?:mlp|mixer|ffn)\.experts\.)(\d{1,6})\.((?:gate|up|down)_proj|w[123])\.weight")
FUSED = re.compile(r"(.*\.mlp\.experts\.)gate_up_proj(?:\.weight)?")
BARE = re.compile(r"(.*\.(?:mlp|mixer)\.experts\.(?:gate|up|down)_proj)")
MEND = "download the file again or use another release"


def stack_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its experts stacked, if it has some. Raises `Problems` naming one that is absent."""
    if not any(".experts." in name for name in checkpoint.tensors):
        return checkpoint
    found: Headers = {}
    problems: list[str] = []
    each: defaultdict[str, dict[int, TensorHeader]] = defaultdict(dict)
    for name, header in checkpoint.tensors.items():
        if one := EACH.fullmatch(name):
            each[f"{one[1]}{one[3]}.weight"][int(one[2])] = header
        elif (fused := FUSED.fullmatch(name)) and len(header.shape) == 3 and header.shape[1] % 2 == 0:
            found |= {f"{fused[1]}{part}.weight": _half(header, i) for i, part in enumerate(("gate_proj", "up_proj"))}
        elif bare := BARE.fullmatch(name):
            found[f"{bare[1]}.weight"] = replace(header, name=f"{bare[1]}.weight")
        else:
            found[name] = header
    for name, experts in each.items():
        problems += _incomplete(name, experts)
        found[name] = _stacked(name, experts)
    if problems:
        raise Problems(str(checkpoint.root), problems)
    return replace(checkpoint, tensors=dict(sorted(found.items())))


def described(header: TensorHeader, shape: tuple[int, ...], expand: Callable[[int, int], Array]) -> TensorHeader:
    """Another shape over a header's bytes, or a part of them; where they begin in the file is `expand`'s business."""
    return replace(header, shape=shape, start=0, end=math.prod(shape) * DTYPES[header.dtype].itemsize, expand=expand)


def _half(header: TensorHeader, which: int) -> TensorHeader:
    """(experts, 2 * width, in) -> one of the two (experts, width, in): the gate first, then up."""
    count, width, columns = header.shape
    width //= 2

    def expand(start: int, stop: int) -> Array:
        return np.ascontiguousarray(read_rows(header, start, stop)[:, which * width : (which + 1) * width])

    return described(header, (count, width, columns), expand)


def _stacked(name: str, experts: Mapping[int, TensorHeader]) -> TensorHeader:
    """One (out, in) for each expert -> (experts, out, in)."""
    headers = [experts[i] for i in sorted(experts)]

    def expand(start: int, stop: int) -> Array:
        return np.stack([read_rows(header, 0, header.rows) for header in headers[start:stop]])

    shape = (len(headers), *headers[0].shape)
    return replace(described(headers[0], shape, expand), name=name)


def _incomplete(name: str, experts: Mapping[int, TensorHeader]) -> list[str]:
    """An expert that is absent, or unlike the first."""
    first = experts[min(experts)]
    absent = sorted(set(range(max(experts) + 1)) - experts.keys())
    said = [f"{name}: expert {absent[0]} and {len(absent) - 1} more are absent; {MEND}"] if absent else []
    unlike = [h for h in experts.values() if (h.shape, h.dtype) != (first.shape, first.dtype)]
    return said + [
        f"{h.name}: found {h.dtype} {list(h.shape)}, expected {first.dtype} {list(first.shape)} as {first.name}"
        for h in unlike[:3]
    ]
