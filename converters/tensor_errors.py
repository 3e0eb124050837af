"""What a GGUF's tensors hold: whether it is numbers at all, and how far it is from the checkpoint's.

Floats have to be the source's own, rounded. Blocks are held against our encoding of the same weights into the same
type: identical bytes are certain, and otherwise the error may be as large as an importance matrix makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from convert_drafter.converters.checkpoint import TensorHeader, read_rows, row_ranges
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import StoredTensor
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.ops import Op
from convert_drafter.converters.quantize import stored_type
from convert_drafter.quant import I64, STORED, TYPES, OutOfRange, QuantType, ScaleOverflow, transcode
from convert_drafter.quant.base import Blocks, Bytes, F32Array, Run
from convert_drafter.quant.measure import Errors, measure

OnBytes = Callable[[int], None]
SLAB_WEIGHTS = 2 << 20  # at a time, of the file, of the source and of our encoding
GROUP = 32  # weights that share a scale in most types, and the size blocks are judged by
# Of our own encoding's error, measured with weighted encodings of this project's trained pair and of normal and heavy
# tailed weights: chi-square, log-normal (spread e and e^2) and outlier importance give at most 1.17 times the error of
# a tensor, and 10 times that of one group of 32 (Q6_K, outliers of 1000; 4.5 for all other types and importances).
TENSOR_LIMIT, GROUP_LIMIT = 1.5, 12.0
# The same encodings shrink weights by at most 10 % more than ours do (Q2_K; 2 % with four bits and more).
GAIN_LIMIT = 0.2
# Where nearly all blocks are exactly ours nobody weighted anything: other builds differ by ties, which cost nothing.
SAME_SHARE, SAME_LIMIT = 0.9, 2.0
LEAST_OWN = 0.25  # of the tensor's mean error: a group that we encoded luckily well is no measure
FLOATS = ("F32", "F16", "BF16", "I64")
ROUNDINGS = ("F16", "BF16")  # what F32 and other floats may have been on their way


@dataclass(frozen=True)
class Health:
    """What is wrong with a tensor by itself: how many weights are no finite number, the first of them, all zeros."""

    broken: int = 0
    first: int | None = None
    zero: bool = False


@dataclass(frozen=True)
class Comparison:
    """A tensor against the source's. Errors are relative: rmse per root mean square of the source.

    `own` is the error of our own encoding, `allowed` the largest that passes, `max` the largest error of one weight,
    `blocks` their number, `differing` how many are not exactly ours. `rounded` names the float type that explains a
    difference. `gain` is how large the weights are, per how large our encoding has them. `worst` is the first weight of
    the group furthest beyond what its type can make, `beyond` by how much; `apart` is the error without its block.
    """

    name: str
    type: str
    relative: float
    own: float
    allowed: float
    max: float
    blocks: int
    differing: int
    rounded: str = ""
    worst: int = 0
    beyond: float = 0.0
    apart: float = 0.0
    gain: float = 1.0

    @property
    def exact(self) -> bool:
        return self.differing == 0

    @property
    def group_limit(self) -> float:
        return SAME_LIMIT if self.differing <= (1 - SAME_SHARE) * self.blocks else GROUP_LIMIT

    @property
    def too_far(self) -> bool:
        """The tensor as a whole is not the source's."""
        if self.type in FLOATS:
            return not (self.exact or self.rounded)
        return not self.exact and (self.apart > self.allowed or abs(self.gain - 1) > GAIN_LIMIT)

    @property
    def broken_group(self) -> bool:
        return not self.exact and self.beyond > self.group_limit


def decoder(kind: GGMLQuantizationType) -> QuantType | None:
    """How a type is decoded, or None where it cannot be: integers, and what ggml only uses while it computes."""
    known = STORED.get(kind.name) or stored_type(kind)
    try:
        known.decode(np.zeros(1, known.layout))
    except NotImplementedError:
        return None
    return known


def health(file: GGUFFile, stored: StoredTensor, run: Run = map, on_bytes: OnBytes = lambda n: None) -> Health:
    """Decode a tensor slab by slab and look at every weight; all is well with a type that cannot be decoded."""
    kind = decoder(stored.type)
    if kind is None:
        on_bytes(stored.n_bytes)
        return Health()
    broken, first, zero, seen = 0, None, True, 0
    for slab in _slabs(file, stored):
        blocks = slab.reshape(-1).view(kind.layout)
        for bad, index, nothing in run(partial(_look, kind, blocks), range(0, len(blocks), _step(kind))):
            first = seen + index if bad and first is None else first
            broken, zero = broken + bad, zero and nothing
        seen += len(blocks) * kind.block
        on_bytes(slab.nbytes)
    return Health(broken, first, zero)


def _slabs(file: GGUFFile, stored: StoredTensor) -> Iterator[Bytes]:
    return file.slabs(stored.name, max(1, SLAB_WEIGHTS // stored.shape[-1] * stored.row_bytes))


def _step(kind: QuantType) -> int:
    return max(1, kind.chunk // kind.block)


def _look(kind: QuantType, blocks: Blocks, start: int) -> tuple[int, int, bool]:
    """(weights that are no number, the slab's index of the first, are all of them zero) of one chunk."""
    with np.errstate(all="ignore"):
        weights = kind.decode(blocks[start : start + _step(kind)]).reshape(-1)
        finite, zero = np.isfinite(weights), not weights.any()
    bad = weights.size - int(np.count_nonzero(finite))
    return bad, start * kind.block + (int(np.argmin(finite)) if bad else 0), zero


# --- against the source ---


@dataclass(frozen=True)
class Source:
    """A checkpoint's tensor as the hub has it."""

    header: TensorHeader
    op: Op
    head_dim: int

    @property
    def type(self) -> QuantType:
        return I64 if self.op.ids else TYPES[self.op.gives or self.header.dtype]

    def rows(self, start: int, stop: int) -> NDArray[np.generic]:
        """Rows start..stop; where heads are re-ordered both are multiples of `head_dim`."""
        return np.ascontiguousarray(self.op.apply(read_rows(self.header, start, stop), self.head_dim, start))

    def ranges(self) -> Iterator[tuple[int, int]]:
        most = SLAB_WEIGHTS * self.type.layout.itemsize
        return row_ranges(self.header, most, self.head_dim if self.op.by_head else 1)

    def weights(self, start: int, stop: int) -> F32Array:
        """The same as `rows`, (rows, row) f32."""
        rows = self.rows(start, stop)
        return rows.astype(np.float32).reshape(len(rows), -1) if rows.ndim > 1 else rows.astype(np.float32)[None]


NOTHING = Errors()


@dataclass
class _Sums:
    """What one tensor's slabs add up to."""

    kind: QuantType
    file: Errors = NOTHING
    own: Errors = NOTHING
    blocks: int = 0
    differing: int = 0
    seen: int = 0
    worst: int = 0
    beyond: float = 0.0
    damage: Errors = NOTHING  # of the worst group's block
    routes: set[str] = field(default_factory=lambda: set(ROUNDINGS))

    @property
    def apart(self) -> float:
        return replace(self.file, squared_error=max(0.0, self.file.squared_error - self.damage.squared_error)).relative

    @property
    def gain(self) -> float:
        """Nothing can be said of zeros, or without an encoding of our own."""
        return (self.file.product - self.damage.product) / self.own.product if self.own.product else 1.0

    def add(self, weights: F32Array, held: Blocks, ours: Blocks) -> None:
        copy = _decode(self.kind, held)
        found = measure(weights, copy)
        size = self.kind.layout.itemsize
        differ = (held.view(np.uint8).reshape(-1, size) != ours.view(np.uint8).reshape(-1, size)).any(axis=1)
        count = int(np.count_nonzero(differ))
        self.file += found
        if count and self.kind.block > 1:
            made = _decode(self.kind, ours)
            self.own += measure(weights, made)
            self._groups(weights, copy, made, differ)
        else:
            self.own += found if not count else measure(weights, _decode(self.kind, ours))
        self.blocks, self.differing, self.seen = self.blocks + len(held), self.differing + count, self.seen + copy.size

    def _groups(self, weights: F32Array, copy: F32Array, made: F32Array, differ: NDArray[np.bool_]) -> None:
        """The group of 32 whose error is furthest beyond that of our own encoding."""
        pick = np.flatnonzero(differ)
        size = (self.kind.block // GROUP, GROUP) if self.kind.block >= GROUP else (1, self.kind.block)
        x, y, z = (a.reshape(-1, *size)[pick] for a in (weights, copy, made))
        theirs, ours = (np.square(x - other).sum(axis=-1) for other in (y, z))
        mean = self.own.squared_error / max(1, self.own.count) * size[1]
        least = max(mean * LEAST_OWN**2, float(np.finfo(np.float32).tiny))
        ratios = np.sqrt(theirs / np.maximum(ours, least))
        place = int(np.argmax(ratios))
        if ratios.flat[place] > self.beyond:
            block, group = divmod(place, size[0])
            self.beyond, self.damage = float(ratios.flat[place]), measure(x[block], y[block])
            self.worst = self.seen + int(pick[block]) * self.kind.block + group * size[1]

    def route(self, rows: Bytes, source: QuantType, shape: tuple[int, ...], held: Bytes, run: Run) -> None:
        """Which other float types the source can have gone through to become exactly these bytes."""
        for name in tuple(self.routes):
            try:
                there = transcode(rows, source, TYPES[name], shape, run=run)
                back = transcode(there, TYPES[name], self.kind, shape, run=run)
            except OutOfRange:
                self.routes.discard(name)
                continue
            if not np.array_equal(back, held):
                self.routes.discard(name)


def _decode(kind: QuantType, blocks: Blocks) -> F32Array:
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(kind.decode(blocks)).reshape(-1)


def compare(
    file: GGUFFile, stored: StoredTensor, source: Source, run: Run = map, on_bytes: OnBytes = lambda n: None
) -> Comparison:
    """Hold a finite tensor against the source's of the same shape, slab by slab.

    `on_bytes` hears of the file's bytes. Raises `WrongInput` where the source cannot be encoded in this type.
    """
    kind = decoder(stored.type)
    assert kind is not None, stored.type
    ours = kind if kind.name in STORED else TYPES["F32"]
    sums = _Sums(kind)
    for start, stop in source.ranges():
        rows = source.rows(start, stop)
        shape, before = rows.shape, kind.n_bytes((start, *stored.shape[1:]))
        held = file.tensor_bytes(stored.name, before, before + kind.n_bytes(shape))
        raw = rows.reshape(-1).view(np.uint8)
        weights = rows.astype(np.float32).reshape(-1)
        if ours is not kind:  # a type we do not encode: its own decoding is all there is
            sums.file += measure(weights, _decode(kind, held.view(kind.layout)))
            sums.blocks += len(held) // kind.layout.itemsize
            sums.differing = sums.blocks
        else:
            encoded = _encoded(file.path, stored.name, raw, source.type, kind, shape, run)
            if kind.block == 1 and sums.routes:
                sums.route(raw, source.type, shape, held, run)
            sums.add(weights, held.view(kind.layout), encoded.view(kind.layout))
        on_bytes(held.nbytes)
    return _comparison(stored, kind, sums, known=ours is kind)


def _encoded(
    path: Path, name: str, raw: Bytes, source: QuantType, kind: QuantType, shape: tuple[int, ...], run: Run
) -> Bytes:
    try:
        return transcode(raw, source, kind, shape, run=run)
    except (OutOfRange, ScaleOverflow) as error:
        raise WrongInput(f"{path}: {name}: the checkpoint's weights do not fit {kind.name}: {error}") from error


def _comparison(stored: StoredTensor, kind: QuantType, sums: _Sums, known: bool) -> Comparison:
    rounded = next((r for r in ROUNDINGS if r in sums.routes), "") if kind.block == 1 and sums.differing else ""
    allowed = sums.own.relative * (TENSOR_LIMIT if kind.block > 1 else 1.0)
    if not known:
        allowed = rough_limit(kind)
    return Comparison(
        stored.name, kind.name, sums.file.relative, sums.own.relative, allowed, sums.file.max, sums.blocks,
        sums.differing, rounded, sums.worst, sums.beyond, sums.apart, sums.gain,
    )  # fmt: skip


def rough_limit(kind: QuantType) -> float:
    """For types we do not encode: some two times the error that so many bits leave of normal weights, at most 0.9."""
    limit: float = 4.0 * 2.0**-kind.bits_per_weight
    return min(0.9, limit)
