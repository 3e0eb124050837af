"""What the headers of several artifacts show together: sizes that cannot be, and files for another runtime."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from convert_drafter.converters.errors import DrafterError, Problems
from convert_drafter.converters.redialect import RedialectJob, prepare_redialect
from convert_drafter.converters.scan.found import Artifact, What

MAINLINE = "llama.cpp"
LEAST_SHARE = 0.75  # of its siblings' weights; what a runtime borrows or makes for itself is less than a quarter
BITS = re.compile(r"(?:^|-)(?:I?Q|TQ|MXFP|NVFP|FP|BF|F)(\d+)", re.IGNORECASE)
TOO_FEW, TOO_MANY = 1.5, 6  # bits beside the number in a type's name; mixtures and fallbacks stay within
UNITS = ("B", "kB", "MB", "GB", "TB")


def check_sizes(variants: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """The copies of one model with what their sizes betray: a head of 0.9 GB has no quant of 0.3 MB."""
    largest = max(variants, key=lambda variant: variant.weights or 0)
    found = [(each, tuple(_size_faults(each, largest))) for each in variants]
    return tuple(replace(each, faults=(*each.faults, *faults)) if faults else each for each, faults in found)


def _size_faults(variant: Artifact, largest: Artifact) -> Iterator[str]:
    weights, most = variant.weights, largest.weights
    if variant.format == "gguf" and weights is not None and most and weights < LEAST_SHARE * most and variant.complete:
        found = f"{decimal(variant.n_bytes)} with {weights:,} weights"
        yield f"size: {found}, where {largest.path.name} has {most:,}: most of the model is missing; convert it again"
    named = BITS.search(variant.quant)
    if named is None or variant.bits is None:
        return
    bits, said = variant.bits, int(named[1])
    if not said - TOO_FEW <= bits <= said + TOO_MANY:
        yield f"size: called {variant.quant}, but a weight takes {bits:.1f} bits: the name or the file is wrong"


def decimal(n_bytes: int) -> str:
    """Bytes as hubs and file managers give them: 0.3 MB."""
    value, unit = float(n_bytes), 0
    while value >= 100 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.1f} {UNITS[unit]}"


def with_redialect(drafter: Artifact, target: Path | None = None) -> Artifact:
    """For a GGUF in another dialect than llama.cpp's: the line that rewrites it, and what that still asks for.

    With a target, once that is found: the line with it, or the drafter as it is where that does not help.
    """
    if drafter.what is not What.DRAFTER or drafter.format != "gguf" or drafter.runtime in ("", MAINLINE):
        return drafter
    out = drafter.path.with_name(f"{drafter.path.stem}-{MAINLINE}.gguf")
    words = ["convert-drafter", "redialect", str(drafter.path), *(["--target", str(target)] if target else [])]
    note, lacks = f"{MAINLINE} does not know its dialect, {drafter.runtime}'s ({drafter.architecture})", ""
    try:
        prepare_redialect(RedialectJob(drafter.path, target, MAINLINE, out))
    except DrafterError as error:
        if target is not None:
            return drafter
        first = error.problems[0] if isinstance(error, Problems) else str(error)
        note += f"; to rewrite it takes more than it says: {first.removeprefix(f'{drafter.path}: ')}"
        lacks = note
    line = shlex.join([*words, "--for", MAINLINE, "-o", str(out)])
    return replace(drafter, notes=(*drafter.other_notes, note), mend=line, lacks=lacks)
