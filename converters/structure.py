"""What a drafter's GGUF says and everything that is wrong with it, all at once: keys, facts, tensors, their types.

Only headers are read here. `read_drafter_file` stops at what is missing; a survey goes on with what is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert_drafter.converters.dialects import Cell, objections
from convert_drafter.converters.dialects.cell import read_all
from convert_drafter.converters.drafter_file import TOGETHER, derived_facts, names_of, place_tensors, rows_of
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_file import StoredTensor
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.plan import unplaced
from convert_drafter.converters.recipes import ALWAYS_F32, RECIPES
from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec, required, spec_from
from convert_drafter.converters.target import Target
from convert_drafter.converters.tensor_errors import decoder

Facts = dict[str, Any]
ARCHITECTURE_NOTED = "drafter.target.architecture"
# What loaders take where a key is not there (load_hparams in llama.cpp's src/llama-model.cpp, common/speculative.cpp;
# server/src/draft/draft_gguf_loader.cpp in Lucebox).
SILENTLY = {
    "rope.theta": "10000", "sliding.theta": "10000", "sliding.dimensions": "the dimensions of full layers",
    "block_size": "16", "kv_head_count": "the number of query heads",
    "attention_scale": "1 / sqrt(head_dim)", "activation": "SiLU", "embedding_scale": "1",
    "head_dim": "embedding_length / head_count", "feed_forward_size": "0", "head_count": "0",
}  # fmt: skip
SILENTLY_IN = {"lucebox": {"rope.theta": "0", "block_size": "0"}, "ik_llama.cpp": {"mask_token_id": "0"}}
# Tensors that tell another kind of drafter under an architecture that DFlash shares with it.
OTHER_KINDS = {
    "dflash.dspark.markov.w1": "DSpark", "dflash.selector.hproj.weight": "DFlash2", "dflash.domino.start": "Domino",
    "dflash_aux_hidden_norm.0.weight": "Laguna DFlash", "dflash.aux_hidden_norm.0.weight": "Laguna DFlash",
}  # fmt: skip
PROMISED = {"confidence_head": Role.CONFIDENCE, "draft_vocab_size": Role.DRAFT_TO_TARGET}
SCALINGS = ("linear", "yarn")
# Values that contradict nothing, so that one bad fact does not hide the next.
HARMLESS: Facts = {
    "context_length": 1, "norm_epsilon": 1e-6, "rope.theta": 1e4, "rope.dimensions": 2, "block_size": 2,
    "mask_token_id": 0, "causal": False,
}  # fmt: skip
LISTED = "`convert-drafter list dialects` has what is"
PARTS = {"rope": "rope.dimensions", "window": "window.layers"}  # the spec's name for a contradiction -> the fact meant


@dataclass(frozen=True)
class Finding:
    """One line. A fault fails the file, a doubt leaves it undecided; anything else is worth knowing."""

    text: str
    fault: bool = True
    doubt: bool = False


@dataclass(frozen=True)
class Survey:
    """A drafter's GGUF as far as it can be understood.

    `facts` are the file's own, whatever is wrong with them; `spec` has harmless values where they cannot be, and is
    None where the tensors' shapes cannot be told. `tensors` are those with a place, none without a spec.
    """

    file: GGUFFile
    cell: Cell
    facts: Mapping[str, Any]
    spec: DrafterSpec | None
    tensors: Mapping[TensorKey, StoredTensor]
    findings: tuple[Finding, ...]


def survey(file: GGUFFile, cell: Cell, target: Target | None = None) -> Survey:
    """Read facts and tensors, with every fault of them. `WrongInput` where they are another kind's of drafter."""
    if other := next((kind for name, kind in OTHER_KINDS.items() if name in file.tensors), None):
        raise WrongInput(f"{file.path}: the tensors are those of {other}, which is not checked yet; {LISTED}")
    facts, wrong = read_all(cell, file.keys)
    findings = [Finding(text) for text in wrong]
    facts |= {"kind": cell.kind}
    facts |= {name: value for name, value, _ in derived_facts(file, cell, facts, target) if name not in facts}
    findings += map(Finding, _missing(file, cell, facts))
    spec, contradictions = _settled(file, cell, facts)
    findings += map(Finding, contradictions)
    tensors = dict[TensorKey, StoredTensor]()
    if not file.tensors:
        findings.append(Finding("found no tensor, expected a drafter's weights: nothing was converted"))
    elif spec is None or spec.layer_count > len(file.tensors):
        if spec is not None:
            findings.append(Finding(f"found {spec.layer_count} layers, but {len(file.tensors)} tensors"))
        silent = not any(finding.fault for finding in findings)
        findings.append(Finding("tensors could not be held against these facts; mend them and ask again", fault=silent))
    else:
        tensors, problems = place_tensors(file, cell, spec)
        findings += map(Finding, [*problems, *_unplaced(cell, tensors), *_objections(file, cell, spec, facts, target)])
        findings += map(Finding, _promised(file, cell, facts, tensors))
    findings += _types(file, cell, tensors)
    return Survey(file, cell, facts, spec, tensors, tuple(findings))


def key_of(file: GGUFFile, cell: Cell, field: str) -> str:
    """The key of the file that tells a fact, else the one the cell would write, else the fact's name."""
    keys = [row.key.format(a=cell.arch) for row in rows_of(cell) if row.field == field]
    return next((key for key in keys if key in file.keys), keys[0] if keys else field)


# --- keys ---


def _missing(file: GGUFFile, cell: Cell, facts: Facts) -> Iterator[str]:
    """Keys that the runtime needs or would silently replace."""
    needed = required(cell.kind)
    told = needed & set(facts)
    for row in cell.rows:
        key = row.key.format(a=cell.arch)
        if key in file.keys or row.field not in needed:
            continue
        if row.required or row.field not in told or (row.field == "head_dim" and not _square(facts)):
            silently = SILENTLY_IN.get(cell.runtime, {}).get(row.field) or SILENTLY.get(row.field)
            taken = f"; {cell.runtime} takes {silently} without a word" if silently else ""
            yield f"{key}: missing, expected {row.field}{taken}"
    for start, parts in TOGETHER.items():
        there = [name for name in facts if name.startswith(start)]
        if start == "rope.scaling." and facts.get("rope.scaling.method", "yarn") not in SCALINGS:
            continue  # that is said elsewhere, and then the factor does not matter
        for name in sorted(parts - set(facts)) if there else ():
            if (key := key_of(file, cell, name)) not in file.keys:
                yield f"{key}: missing, expected {name} beside {key_of(file, cell, there[0])}"


def _square(facts: Facts) -> bool:
    """Whether a head is as wide as loaders take it for without a key."""
    hidden, heads = facts.get("hidden_size", 0), facts.get("head_count", 0)
    return bool(heads and hidden // heads == facts.get("head_dim"))


# --- facts ---


def _settled(file: GGUFFile, cell: Cell, facts: Facts) -> tuple[DrafterSpec | None, list[str]]:
    """The spec, each fact that cannot be replaced by one that contradicts nothing, and what was wrong."""
    wrong, method = list[str](), facts.get("rope.scaling.method")
    if method not in (None, "none", *SCALINGS):
        expected = " or ".join(SCALINGS)
        wrong.append(f"{key_of(file, cell, 'rope.scaling.method')}: found {method!r}, expected {expected}")
    if method not in SCALINGS or "rope.scaling.factor" not in facts:
        facts = _without(facts, "rope.scaling")
    if not {"window.size", "window.layers"} <= set(facts):
        facts = _without(facts, "window")
    captures = facts.get("capture_layers") or ()
    facts = {"target_layer_count": max(captures, default=0) + 1, **HARMLESS, **facts}
    for _ in range(2 * len(facts)):  # each round mends one fact
        try:
            return spec_from(facts), wrong
        except BadFact as bad:
            if bad.field not in facts and bad.field not in PARTS:
                return None, wrong  # missing, which is said already
            wrong.append(_contradiction(file, cell, facts, bad))
            mended = _mended(facts, PARTS.get(bad.field, bad.field))
            if mended is None:
                return None, wrong
            facts = mended
    return None, wrong


def _without(facts: Facts, part: str) -> Facts:
    return {name: value for name, value in facts.items() if name != part and not name.startswith(f"{part}.")}


def _mended(facts: Facts, field: str) -> Facts | None:
    """The facts with a harmless value for one of them; None where the shapes of tensors depend on it."""
    if field == "capture_layers" and facts[field]:
        count = len(facts[field])
        return {**facts, field: tuple(range(count)), "target_layer_count": max(count, facts["target_layer_count"])}
    if field in HARMLESS:
        return {**facts, field: HARMLESS[field]}
    if field in required(facts["kind"]):
        return None
    return _without(facts, field.split(".")[0] if field.startswith("window") else field)


def _contradiction(file: GGUFFile, cell: Cell, facts: Facts, bad: BadFact) -> str:
    field = PARTS.get(bad.field, bad.field)
    key = key_of(file, cell, field)
    stored = file.keys[key].value if key in file.keys else facts[field]
    meaning = "" if stored == facts[field] else f" ({field} = {facts[field]!r})"
    found = f"{len(stored)} entries" if isinstance(stored, tuple) and field == "window.layers" else repr(stored)
    return f"{key}: found {found}{meaning}, expected {bad.expected}"


def _objections(file: GGUFFile, cell: Cell, spec: DrafterSpec, facts: Facts, target: Target | None) -> Iterator[str]:
    """What the loader demands beyond its keys, of facts that are the file's own."""
    block, context = facts.get("block_size", 0), facts.get("context_length")
    if context and block > context:
        yield f"{key_of(file, cell, 'block_size')}: found {block}, expected at most the context_length {context}"
    noted = file.keys.get(ARCHITECTURE_NOTED)
    architecture = target.architecture if target else None if noted is None else str(noted.value)
    for text in objections(cell, spec, architecture):
        if text.split(":")[0].split(" ")[0] in facts:
            yield text


# --- tensors ---


def _unplaced(cell: Cell, tensors: Mapping[TensorKey, StoredTensor]) -> Iterator[str]:
    named = {key: stored.name for key, stored in tensors.items()}
    return unplaced(named, lambda key: next(iter(names_of(cell, key)), None), cell.runtime, cell.needs)


def _promised(file: GGUFFile, cell: Cell, facts: Facts, tensors: Mapping[TensorKey, StoredTensor]) -> Iterator[str]:
    """A fact that says there is a tensor."""
    for name, role in PROMISED.items():
        if facts.get(name) and (role, None) not in tensors:
            found = f"{key_of(file, cell, name)}: found {facts[name]!r}"
            yield f"{found}, but the file has no {cell.tensor_name((role, None))}"


def _types(file: GGUFFile, cell: Cell, tensors: Mapping[TensorKey, StoredTensor]) -> Iterator[Finding]:
    """Norms and vectors in F32, matrices in something a runtime multiplies by."""
    names = {stored.name: key for key, stored in tensors.items()}
    ids = cell.tensor_name((Role.DRAFT_TO_TARGET, None))  # known by its name where a missing fact leaves none a place
    for stored in file.tensors.values():
        kind, key = stored.type.name, names.get(stored.name)
        if stored.name == ids:
            if kind != "I64":
                yield Finding(f"{stored.name}: found {kind}, expected I64: runtimes stop at token ids of another type")
            continue
        flat = sum(size > 1 for size in stored.shape) < 2
        router = not flat and key is not None and key[0] is Role.FFN_ROUTER  # llama.cpp's DeepSeek-V4 has it in BF16
        if kind != "F32" and not router and (flat or (key is not None and key[0] in ALWAYS_F32)):
            what = ALWAYS_F32.get(key[0], "vector") if key is not None else "vector"
            yield Finding(f"{stored.name}: found {kind}, expected F32: runtimes stop at a {what} of another type")
        elif decoder(stored.type) is None:
            yield Finding(f"{stored.name}: found {kind}, expected a type {cell.runtime} multiplies by, such as F16")
        elif router and kind != "F32":
            yield Finding(f"{stored.name}: found {kind}: rounded, a router may choose other experts", fault=False)
    yield from _file_type(file)


def _file_type(file: GGUFFile) -> Iterator[Finding]:
    """general.file_type is only a label, but people choose by it."""
    entry = file.keys.get("general.file_type")
    recipe = next((r for r in RECIPES.values() if entry is not None and r.file_type == entry.value), None)
    weights: dict[str, int] = {}
    for stored in file.tensors.values():
        if len(stored.shape) > 1:
            weights[stored.type.name] = weights.get(stored.type.name, 0) + stored.n_elements
    if recipe is None or not weights or recipe.name.startswith("MXFP4"):
        return
    most = max(weights, key=lambda name: weights[name])
    if recipe.weights not in weights:
        said = f"general.file_type says {recipe.name}, but no matrix is {recipe.weights} and most weights are {most}"
        yield Finding(said, fault=False)
