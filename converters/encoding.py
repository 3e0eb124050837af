"""Rows as one file stores them to rows as another does: slab by slab, the chunks of a slab on all cores."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.quant import OutOfRange, QuantType, transcode
from convert_drafter.quant.base import Blocks, Bytes, F32Array, Run
from convert_drafter.quant.measure import Errors, measure

SLAB_WEIGHTS = 4 << 20  # at a time: bounded memory, few enough reads, chunks enough for many cores


PATIENCE = 1e-4  # seconds a thread waits for Python's lock before it asks for it; Python's own 5 ms idle a core


@contextmanager
def cores(count: int | None = None) -> Iterator[Run]:
    """A `map` on `count` threads, by default one for each core of this process; numpy works outside Python's lock."""
    count = count or available_cores()
    if count == 1:
        yield map
        return
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="encode") as pool:
            yield pool.map
    finally:
        sys.setswitchinterval(before)


def available_cores() -> int:
    """Cores this process may use, which in a container or a batch job are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass
class Tally:
    """The errors of a tensor, added up by any thread."""

    kind: QuantType
    errors: Errors = field(default_factory=Errors)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self, weights: F32Array, blocks: Blocks) -> None:
        found = measure(weights, self.kind.decode(blocks).reshape(weights.shape))
        with self._lock:
            self.errors += found


@dataclass(frozen=True)
class Encoder:
    """What one tensor becomes: its name and file for messages, type, importance of its columns (row,) f32."""

    file: Path
    name: str
    source: QuantType
    kind: QuantType
    importance: F32Array | None = None
    watch: Callable[[F32Array, Blocks], object] | None = None

    def rows(self, data: Bytes, shape: tuple[int, ...], first: int, run: Run) -> Bytes:
        """The bytes of rows first.. as they are stored, encoded anew; raises `WrongInput` naming tensor and row."""
        try:
            return transcode(data, self.source, self.kind, shape, self.importance, run, self.watch)
        except OutOfRange as found:
            row = first + found.index // shape[-1]
            finite = abs(found.value) < float("inf")  # False for NaN
            advice = "choose --quant BF16 or F32" if finite else "the file is damaged"
            raise WrongInput(
                f"{self.file}: {self.name}: row {row}: found {found.value:g}, expected a finite number up to"
                f" {found.largest:g} ({self.kind.name}); {advice}"
            ) from found
