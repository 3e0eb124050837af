"""Attach: an MTP head into its target's own GGUF, beside the target's tensors, which are copied byte for byte.

The file stays what it was but for the keys that count its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from convert_drafter.converters.convert import Conversion, ConvertJob, prepare
from convert_drafter.converters.destination import refuse_overwriting
from convert_drafter.converters.dialects import Cell
from convert_drafter.converters.dialects.cell import keys_of, read_all
from convert_drafter.converters.errors import Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE, KeyValue
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.hub_gguf import fetch_header
from convert_drafter.converters.plan import Plan
from convert_drafter.converters.recipe_rules import layer_of
from convert_drafter.converters.spec import DrafterSpec, facts_of
from convert_drafter.converters.target import target_tokenizer

Keys = dict[str, KeyValue]
OURS = "drafter."


def prepare_attach(job: ConvertJob) -> Conversion:
    """Decide everything from headers alone. Raises with everything in which target and head differ; writes nothing."""
    assert job.attach is not None  # the caller has seen to it
    conversion = prepare(job)
    cell, spec = conversion.cell, conversion.published.spec
    if cell.launch_attached is None:
        raise WrongUsage(f"--attach: a {cell.kind} drafter {cell.apart}")
    base = read_gguf(fetch_header(job.attach))
    refuse_overwriting(job.out, [base.path])
    _check_architecture(base, cell)
    changed = dict(counting_keys(cell, spec))
    if problems := [*_has_head(base, cell, spec), *_misfits(base, cell, spec, changed)]:
        raise Problems(f"{job.attach}: cannot take the head of {job.source}", problems)
    head = tuple(tensor for tensor in conversion.plan.tensors if tensor.key[1] is not None)
    doubts = tuple(_doubts(conversion, base))
    if doubts and job.strict:
        raise Problems(f"{job.attach} (--strict)", doubts)
    return replace(
        conversion,
        plan=Plan(head, conversion.plan.dropped),
        keys=tuple(_keys(base, changed, conversion.keys)),
        warnings=(*conversion.warnings, *doubts),
        base=base,
    )


def counting_keys(cell: Cell, spec: DrafterSpec) -> Iterator[tuple[str, tuple[KeyValue | None, KeyValue]]]:
    """Keys that a head changes, as they are without it (None: not there) and with it."""
    facts = facts_of(spec)
    without = {entry.key: entry for entry in keys_of(cell, {**facts, "layer_count": 0})}
    count = next(row.key.format(a=cell.arch) for row in cell.rows if row.field == "layer_count")
    for entry in keys_of(cell, facts):
        before = without[entry.key]
        if entry.key == count:
            yield entry.key, (None, entry)
        elif before != entry:
            yield entry.key, (before, entry)


# --- does the head belong here ---


def _check_architecture(base: GGUFFile, cell: Cell) -> None:
    found = base.keys.get(ARCHITECTURE)
    if found is None or found.value != cell.arch:
        raise WrongInput(
            f"{base.path}: {ARCHITECTURE}: found {found and found.value!r}, expected {cell.arch!r}: the head's target"
        )


def _has_head(base: GGUFFile, cell: Cell, spec: DrafterSpec) -> Iterator[str]:
    """A5-2: also what only half of the file says."""
    key = f"{cell.arch}.nextn_predict_layers"
    entry = base.keys.get(key)
    if entry is not None and entry.value != 0:
        yield f"{key}: found {entry.value}, expected none: it has a head already, or says so"
    taken = [name for name in base.tensors if (layer := layer_of(name)) is not None and layer >= spec.first_layer]
    if taken:
        yield f"{taken[0]} and {len(taken) - 1} more: expected no layer from {spec.first_layer} on, where the head goes"


def _misfits(
    base: GGUFFile, cell: Cell, spec: DrafterSpec, changed: Mapping[str, tuple[KeyValue | None, KeyValue]]
) -> Iterator[str]:
    """Facts that target and head do not share."""
    for key, (before, _) in changed.items():
        found = base.keys.get(key)
        if before is not None and found is not None and found.value != before.value:
            yield f"{key}: found {_shown(found.value)}, expected {_shown(before.value)}, as the head's checkpoint says"
    merged = {**base.keys, **{key: after for key, (_, after) in changed.items()}}
    facts, faults = read_all(cell, merged)
    yield from faults
    expected = facts_of(spec)
    for row in cell.rows:
        key, value = row.key.format(a=cell.arch), facts.get(row.field)
        if key in changed or key not in base.keys or row.field in cell.harmless:
            continue
        if value != expected.get(row.field):
            yield f"{key}: found {_shown(value)}, the head's checkpoint has {_shown(expected.get(row.field))}"
    size = facts.get("vocab_size")
    if size != spec.vocab_size:
        yield f"tokens: found {size}, the head's checkpoint has {spec.vocab_size}"


def _shown(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, tuple) and len(value) > 8 else repr(value)


def _doubts(conversion: Conversion, base: GGUFFile) -> Iterator[str]:
    """Names of tokens may differ where ids do not, so another vocabulary is only told."""
    path, size = conversion.published.target_path, conversion.published.spec.vocab_size
    if path is None:
        return
    ours, theirs = (target_tokenizer(place, size).vocab_sha256 for place in (path, base.path))
    if ours != theirs:
        yield f"{base.path}: its tokens are not those of {path}: is it the model the head was trained in?"


# --- the file ---


def _keys(
    base: GGUFFile, changed: Mapping[str, tuple[KeyValue | None, KeyValue]], own: tuple[KeyValue, ...]
) -> Iterator[KeyValue]:
    """The target's keys in their order, the counting ones changed; then what it did not say, and where we have it from.

    A list of layers that the target does not have is not added: its loader counts them by itself.
    """
    for entry in base.keys.values():
        yield changed[entry.key][1] if entry.key in changed else entry
    yield from (after for key, (before, after) in changed.items() if before is None and key not in base.keys)
    yield from (entry for entry in own if entry.key.startswith(OURS) and entry.key not in base.keys)
