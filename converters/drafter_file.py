"""A drafter's GGUF read back into the hub: its facts, each with its origin, and its tensors in their places.

Whoever wrote the file: what it does not carry is asked for, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from convert_drafter.converters.config import ADVICE, JSON_NAMES, ConfigReader
from convert_drafter.converters.dialects import CELLS, Cell, cell_of_names, find_cell, own_part, read
from convert_drafter.converters.dialects.cell import OWN_ROWS, SAME, Row
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.errors import BadFact, Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE, KeyValue, StoredTensor
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.recipe_rules import layer_of
from convert_drafter.converters.roles import Role, TensorKey, describe, role_name
from convert_drafter.converters.spec import MROPE_SECTIONS, DrafterSpec, required, spec_from
from convert_drafter.converters.target import Target

T = GGUFValueType
PYTHON: dict[GGUFValueType, type] = {T.UINT32: int, T.INT32: int, T.FLOAT32: float, T.BOOL: bool, T.STRING: str}
# Every fact a file can carry, by field path, with a row that tells its type: what --set takes.
SETTABLE: dict[str, Row] = {
    row.field: row for cell in reversed(CELLS.values()) for row in (*cell.rows, *OWN_ROWS) if row.field != "kind"
}
# A loader that takes another runtime's tensor names as well as its own (Lucebox: draft_gguf_loader.cpp).
ALSO_NAMED = {"lucebox": "ik_llama.cpp"}
TOGETHER = {  # features that take more than one fact
    "window.": {"window.size", "window.layers"},
    "rope.scaling.": {"rope.scaling.method", "rope.scaling.factor"},
}
# Facts that a tensor's shape tells: field, role, axis in torch order.
_REDUCED = ("draft_vocab_size", Role.DRAFT_TO_TARGET, 0)
_MARKOV = ("markov_rank", Role.MARKOV_IN, 1)
BY_SHAPE: dict[str, tuple[tuple[str, Role, int], ...]] = {
    "dflash": (_REDUCED,),
    "dflash2": (_REDUCED,),
    "eagle3": (_REDUCED,),
    "dspark": (_REDUCED, _MARKOV),
    "gemma4-dspark": (_MARKOV,),
}
FROM_TARGET = ("target_layer_count", "vocab_size")
Facts = dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """One fact of a drafter and the place it came from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class DrafterFile:
    """A file understood. `given` are the facts the user stated, `tensors` are in the order a conversion writes them.

    `problems` tells what does not fit, all of it.
    """

    file: GGUFFile
    cell: Cell
    given: frozenset[str]
    facts: tuple[Fact, ...]
    spec: DrafterSpec
    tensors: Mapping[TensorKey, StoredTensor]
    problems: tuple[str, ...]

    def unread(self) -> list[str]:
        """Keys of a drafter's architecture that this cell knows nothing of."""
        keys = (*(row.key for row in self.cell.rows), *(count.key for count in self.cell.counts))
        known = {key.format(a=self.cell.arch) for key in keys}
        archs = tuple(f"{cell.arch}." for cell in CELLS.values())
        return [key for key in self.file.keys if key.startswith(archs) and key not in known]


def read_drafter_file(
    path: Path, settings: Mapping[str, str] | None = None, target: Target | None = None
) -> DrafterFile:
    """Read facts and headers; `settings` are the user's facts (field path -> JSON text), which go before the file's.

    Raises `WrongUsage` for a setting that is no fact, `WrongInput` naming key and --set for a fact that is nowhere.
    """
    return drafter_in(read_gguf(path), settings, target)


def drafter_in(file: GGUFFile, settings: Mapping[str, str] | None = None, target: Target | None = None) -> DrafterFile:
    """`read_drafter_file` of a file whose headers are read already."""
    given, cell = given_facts(settings or {}), cell_of_file(file)
    file = own_part(file, cell)
    facts = _read_facts(file, cell, given, target)
    spec = _spec(file, facts)
    tensors, problems = place_tensors(file, cell, spec)
    return DrafterFile(file, cell, frozenset(given), facts, spec, tensors, tuple(problems))


def given_facts(settings: Mapping[str, str]) -> Facts:
    """The user's facts, typed."""
    reader, facts = ConfigReader({}, "--set", settings), Facts()
    for name in settings:
        row = SETTABLE.get(name)
        if row is None:
            raise WrongUsage(f"--set {name}: no fact of a drafter's file; there are: {', '.join(sorted(SETTABLE))}")
        element = PYTHON[row.element or row.type]
        facts[name] = reader.find_list(name, element, name) if row.element else reader.get(name, element, name)
        if facts[name] is None:
            raise reader.missing(name, "a list", name)
    return facts


def cell_of_file(file: GGUFFile) -> Cell:
    """The cell whose loader takes the file; `WrongInput` where no runtime's drafters are of its architecture."""
    entry = file.keys.get(ARCHITECTURE)
    cell = None if entry is None else cell_of_names(str(entry.value), file.tensors)
    if cell is None:
        found = "missing" if entry is None else f"found {entry.value!r}"
        if entry is not None and any(cell.arch == entry.value for cell in CELLS.values()):
            found += " without a tensor of an MTP head: a target"
        if declared := file.keys.get(f"{'' if entry is None else entry.value}.nextn_predict_layers"):
            head = f"but no {Role.NEXTN_PROJ.value.replace('{i}', '*')}, which every MTP head has"
            raise WrongInput(f"{file.path}: {declared.key}: found {declared.value}, {head}; llama.cpp stops there")
        known = ", ".join(dict.fromkeys(f"{cell.arch} ({cell.runtime})" for cell in CELLS.values()))
        raise WrongInput(f"{file.path}: {ARCHITECTURE}: {found}, expected a drafter's: {known}")
    return cell


# --- facts ---


def _read_facts(file: GGUFFile, cell: Cell, given: Facts, target: Target | None) -> tuple[Fact, ...]:
    """Every fact with its origin: the user, the file's keys, its tensors, the target, what its loader takes."""
    try:
        stated, keys = _with_given(cell, file.keys, given)
        with np.errstate(over="ignore"):  # a given number beyond 32 bits becomes an infinity, which no fact can be
            values = {"kind": cell.kind} | read(stated, keys)
    except WrongInput as error:
        if absent := _absent(cell, file.keys, given):  # what is wrong may be that another key is not there
            raise Problems(str(file.path), [_missing(cell, name, target) for name in absent]) from error
        raise WrongInput(f"{file.path}: {error}") from error
    origins = {row.field: key for row in reversed(rows_of(cell)) if (key := row.key.format(a=cell.arch)) in file.keys}
    origins |= {"kind": ARCHITECTURE} | {name: f"--set {name}" for name in given}
    for name, value, origin in derived_facts(file, cell, values, target):
        if name not in values:
            values[name], origins[name] = value, origin
    parts = (facts for start, facts in TOGETHER.items() if any(n.startswith(start) for n in values))
    needed = required(cell.kind).union(*parts)
    if missing := sorted(needed - set(values)):
        raise Problems(str(file.path), [_missing(cell, name, target) for name in missing])
    return tuple(Fact(n, v, origins.get(n, f"no key: what {cell.runtime} takes")) for n, v in values.items())


def rows_of(cell: Cell) -> tuple[Row, ...]:
    return (*cell.rows, *OWN_ROWS)


def _with_given(cell: Cell, keys: Mapping[str, KeyValue], given: Facts) -> tuple[Cell, dict[str, KeyValue]]:
    """The cell and keys to read: the user's facts in rows before the file's own about the same, which are left out."""
    rows = [replace(SETTABLE[name], key=f"--set {name}", codec=SAME) for name in given]
    stated = {row.key: KeyValue(row.key, row.type, given[row.field], row.element) for row in rows}
    replaced = {row.key.format(a=cell.arch) for row in rows_of(cell) if row.field in given}
    replaced -= {row.key.format(a=cell.arch) for row in cell.rows if row.field not in given}
    kept = {name: entry for name, entry in keys.items() if name not in replaced}
    counts = tuple(count for count in cell.counts if count.field not in given)
    rows += [row for row in cell.rows if row.field not in given]
    return replace(cell, rows=tuple(rows), counts=counts), kept | stated


def derived_facts(file: GGUFFile, cell: Cell, facts: Facts, target: Target | None) -> Iterator[tuple[str, Any, str]]:
    """What tensors and target tell where the file's keys do not: (field, value, origin)."""
    captures = facts.get("capture_layers")
    fusion = next((file.tensors[n] for n in names_of(cell, (Role.FUSION, None)) if n in file.tensors), None)
    if captures and fusion is not None and fusion.shape and fusion.shape[-1] % len(captures) == 0:
        yield "target_hidden_size", fusion.shape[-1] // len(captures), f"columns of {fusion.name} / capture layers"
    for field, role, axis in BY_SHAPE.get(cell.kind, ()):
        stored = next((file.tensors[n] for n in names_of(cell, (role, None)) if n in file.tensors), None)
        if stored is not None and stored.shape and stored.shape[axis] != facts.get("vocab_size"):
            yield field, stored.shape[axis], f"shape of {stored.name}"
    if "confidence_head" in required(cell.kind):
        there = any(name in file.tensors for name in names_of(cell, (Role.CONFIDENCE, None)))
        yield "confidence_head", there, "tensor names"
    if target is None:
        return
    origin = f"target {target.name}"
    yield "target_layer_count", target.layer_count, origin
    yield "vocab_size", target.vocab_size, origin
    # as a conversion has them from the target; a dialect with a key for them has said that there are none
    unsaid = cell.from_target - {row.field for row in cell.rows}
    if "embedding_scale" in unsaid and target.embedding_scale is not None:
        yield "embedding_scale", target.embedding_scale, f"{origin} scales its embeddings"
    if "rope.sections" in unsaid and target.uses_mrope and "rope.dimensions" in facts:
        sections = (facts["rope.dimensions"] // 2, *[0] * (MROPE_SECTIONS - 1))
        yield "rope.sections", sections, f"{origin} positions with M-RoPE"


def _absent(cell: Cell, keys: Mapping[str, KeyValue], given: Facts) -> list[str]:
    """Required facts that this cell has keys for, of which the file has none, and that nothing else tells."""
    stated = {row.field for row in cell.rows if row.key.format(a=cell.arch) in keys} | set(given)
    told = {implied.field for implied in cell.implied} | {"target_hidden_size", "vocab_size"}
    return sorted({row.field for row in cell.rows} & required(cell.kind) - stated - told)


def _missing(cell: Cell, name: str, target: Target | None) -> str:
    row = next((row for row in rows_of(cell) if row.field == name), None)
    what = f"{name}: missing" if row is None else f"{row.key.format(a=cell.arch)}: missing ({name})"
    kind = "a list" if SETTABLE[name].element else JSON_NAMES[PYTHON[SETTABLE[name].type]]
    advice = ADVICE.format(path=name) + (", or give --target" if name in FROM_TARGET and target is None else "")
    return f"{what}, expected {kind}; {advice}"


def _spec(file: GGUFFile, facts: Sequence[Fact]) -> DrafterSpec:
    try:
        spec = spec_from({fact.name: fact.value for fact in facts})
    except BadFact as bad:
        place = next((fact.origin for fact in facts if fact.name == bad.field), bad.field)
        names = [name for name in SETTABLE if name == bad.field or name.startswith(f"{bad.field}.")]
        advice = " or ".join(f"--set {name}=VALUE" for name in names)
        found = f"{place}: found {bad.found!r}, expected {bad.expected}"
        raise WrongInput(f"{file.path}: {found}; settle it with {advice}") from bad
    if spec.layer_count > len(file.tensors):  # nobody has to count up to a nonsense number
        raise WrongInput(f"{file.path}: found {spec.layer_count} layers, but {len(file.tensors)} tensors")
    return spec


# --- tensors ---


def llama_cpp_names(file: GGUFFile) -> dict[str, str]:
    """llama.cpp's names of a drafter's tensors by the file's own; empty if no dialect has its architecture."""
    entry = file.keys.get(ARCHITECTURE)
    cell = None if entry is None else cell_of_names(str(entry.value), file.tensors)
    if cell is None:
        return {}
    layers = sorted({layer for name in file.tensors if (layer := layer_of(name)) is not None})
    keys = [(rule.role, i) for rule in rules_of(cell.kind) for i in (layers if rule.role.per_layer else [None])]
    return {name: role_name(key) for key in keys for name in names_of(cell, key) if name in file.tensors}


def names_of(cell: Cell, key: TensorKey) -> list[str]:
    """What the cell's loader takes for a tensor, its own name first; none where it has no such tensor."""
    runtimes = [cell.runtime, ALSO_NAMED.get(cell.runtime, cell.runtime)]
    names = [find_cell(cell.kind, runtime).tensor_name(key) for runtime in runtimes]
    return [] if names[0] is None else [name for name in names if name is not None]


def place_tensors(file: GGUFFile, cell: Cell, spec: DrafterSpec) -> tuple[dict[TensorKey, StoredTensor], list[str]]:
    """Every tensor's place in the hub, and what does not fit."""
    rules = {rule.role: rule for rule in reversed(rules_of(cell.kind)) if rule.exists(spec)}
    known = {name: (key, rule) for rule in rules.values() for key in rule.keys(spec) for name in names_of(cell, key)}
    found, problems = dict[TensorKey, StoredTensor](), list[str]()
    for stored in file.tensors.values():
        if stored.name not in known:
            problems.append(f"{stored.name}: unknown tensor {list(stored.shape)}: none of a {cell.kind} drafter's")
            continue
        key, rule = known[stored.name]
        if key in found:
            problems.append(f"{stored.name}: {describe(key)} is there twice, also as {found[key].name}")
        elif stored.shape != (shape := rule.expected_shape(spec, key[1])):
            widths = ", ".join(rule.shape)
            problems.append(f"{stored.name}: found shape {list(stored.shape)}, expected {list(shape)} ({widths})")
        found.setdefault(key, stored)
    present = {role for role, _ in found}
    needed = [
        rule for rule in rules.values() if rule.needed(spec) or rule.role in present
    ]  # what one layer has, all do
    absent = [key for rule in needed for key in rule.keys(spec) if key not in found]
    problems += [f"{names_of(cell, key)[0]}: missing ({describe(key)})" for key in absent]
    order = {rule.role: n for n, rule in enumerate(rules_of(cell.kind))}
    keys = sorted(found, key=lambda key: (-1 if key[1] is None else key[1], order[key[0]]))
    return {key: found[key] for key in keys}, problems
