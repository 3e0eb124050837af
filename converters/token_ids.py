"""The token of the target that each row of a reduced vocabulary stands for: d2t, as a checkpoint or a GGUF has it.

A checkpoint holds offsets from the row's own number, a GGUF the tokens themselves. Offsets taken for tokens, or tokens
for offsets, load everywhere and draft nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert_drafter.converters.checkpoint import Headers, read_rows
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.plan import Matcher, plain_name
from convert_drafter.converters.roles import Role


def ids_of_checkpoint(matcher: Matcher, tensors: Headers) -> Iterator[str]:
    """What is wrong with the token ids of a checkpoint whose tensors fit; `tensors` are all it has, t2d among them."""
    match = matcher.matches.get((Role.DRAFT_TO_TARGET, None))
    if match is None or matcher.problems:
        return
    ids = match.rule.op.apply(read_rows(match.header, 0, match.header.rows), matcher.spec.head_dim, 0)
    for fault in id_faults(ids, matcher.spec.vocab_size):
        yield f"{match.header.name}: {fault}"
    given_up = {drop.source for drop in matcher.dropped if drop.reason.startswith("--ignore-tensor")}
    mask = next((tensors[name] for name in tensors.keys() - given_up if plain_name(name) == "t2d"), None)
    if mask is not None and mask.dtype == "BOOL" and mask.shape == (matcher.spec.vocab_size,):
        yield from _unlike(read_rows(mask, 0, mask.rows), ids, match.header.name)


def _unlike(mask: NDArray[Any], ids: NDArray[Any], name: str) -> Iterator[str]:
    """t2d marks the tokens that d2t comes to; where it marks d2t's own numbers, those are tokens already."""
    marked = np.flatnonzero(mask)
    if np.array_equal(np.sort(ids), marked):
        return
    absolute = np.array_equal(np.sort(ids - np.arange(len(ids))), marked)
    why = "its numbers are tokens, not offsets" if absolute else f"t2d marks {len(marked)} others"
    yield f"{name}: comes to tokens that t2d does not mark: {why}; --ignore-tensor t2d leaves a stale one out"


def ids_of_file(file: GGUFFile, name: str, vocab: int) -> Iterator[str]:
    """What is wrong with the token ids in a GGUF's I64 tensor."""
    for fault in id_faults(file.tensor_bytes(name).view("<i8"), vocab):
        yield f"{name}: {fault}"


def id_faults(ids: NDArray[Any], vocab: int) -> Iterator[str]:
    """`ids` (rows,) have to be tokens below `vocab`, each once."""
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab))
    if len(wrong):
        first = int(wrong[0])
        found = f"row {first} is token {int(ids[first])}, and {len(wrong) - 1} more rows are none"
        yield f"{found}; expected tokens of the target's {vocab}"
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        again = int(values[counts > 1][0])
        rows = [int(row) for row in np.flatnonzero(ids == again)[:2]]
        what = "offsets where tokens belong?" if (ids == 0).sum() > 1 else "each row drafts a token of its own"
        yield f"rows {rows[0]} and {rows[1]} are both token {again}: {what}"
