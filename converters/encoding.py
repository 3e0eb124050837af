"""Rows as one file stores them to rows as another does: slab by slab, the chunks of a slab on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.quant import OutOfRange, QuantType, ScaleOverflow, transcode
from convert_drafter.quant.base import Blocks, Bytes, F32Array, Run
from convert_drafter.quant.measure import Errors, measure

SLAB_WEIGHTS = 4 << 20  # at a time: bounded memory, few enough reads, chunks enough for many cores
PATIENCE = 1e-4  # seconds a thread waits before it asks for Python's lock; with Python's own 5 ms cores stand idle
MOST_CORES = 8  # each thread holds up to 60 MiB, and Python's lock eats what more of them would gain


@contextmanager
def cores(count: int | None = None) -> Iterator[Run]:
    """A `map` on `count` threads, by default one for each core of this process; numpy works outside Python's lock."""
    count = count or min(available_cores(), MOST_CORES)
    if count == 1:
        yield map
        return
    with ThreadPoolExecutor(count, thread_name_prefix="encode") as pool:
        yield pool.map


def available_cores() -> int:
    """Cores this process may use, which can be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Tally:
    """The errors of a tensor, collected from any thread and added up in the order of its weights."""

    kind: QuantType
    parts: dict[int, Errors] = field(default_factory=dict)

    def watch(self, first: int, start: int, weights: F32Array, blocks: Blocks) -> None:
        """A chunk whose weights begin at `start` after the slab's `first`."""
        self.parts[first + start] = measure(weights, self.kind.decode(blocks).reshape(weights.shape))

    @property
    def errors(self) -> Errors:
        return sum((self.parts[index] for index in sorted(self.parts)), Errors())


@dataclass(frozen=True)
class Encoder:
    """What one tensor becomes: its name and file for messages, type, importance of its columns (row,) f32."""

    file: Path
    name: str
    source: QuantType
    kind: QuantType
    importance: F32Array | None = None
    tally: Tally | None = None

    def rows(self, data: Bytes, shape: tuple[int, ...], first: int, run: Run) -> Bytes:
        """The bytes of rows first.. as they are stored, encoded anew; raises `WrongInput` naming tensor and row."""
        row = shape[-1]
        watch = partial(self.tally.watch, first * row) if self.tally else None
        try:
            return transcode(data, self.source, self.kind, shape, self.importance, run, watch)
        except OutOfRange as found:
            finite = abs(found.value) < float("inf")  # False for NaN
            advice = "choose BF16 or F32" if finite else "the file is damaged"
            raise WrongInput(
                f"{self.file}: {self.name}: row {first + found.index // row}: found {found.value:g}, expected a finite"
                f" number up to {found.largest:g} ({self.kind.name}); {advice}"
            ) from found
        except ScaleOverflow as found:
            what = "weights too large or their importance too uneven" if self.importance is not None else "too large"
            raise WrongInput(
                f"{self.file}: {self.name}: row {first + found.index // row}: a block's scale overflows in"
                f" {self.kind.name}: {what}; choose BF16 or give the tensor another type with --tensor-type"
            ) from found
