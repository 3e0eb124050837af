"""Cell: one drafter kind in one runtime, as a table that works both ways.

A row holds a GGUF key and a field path of the spec, never a function of one direction, so `write(spec)` and
`read(keys)` come from the same line and what one writes the other gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFValueType

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.ops import COPY, INVERSE, Op
from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec, facts_of, yarn_attention
from convert_drafter.converters.tokenizer import TOKENS

U32, F32, I32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.INT32
BOOL, STRING, ARRAY = GGUFValueType.BOOL, GGUFValueType.STRING, GGUFValueType.ARRAY
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Codec:
    """How a fact is spelled in a key: `encode(value, facts)` and its inverse `decode`; None: another key decides."""

    name: str
    encode: Callable[[Any, Facts], Any]
    decode: Callable[[Any, Facts], Any]


def exactly(total: int, parts: int, what: str) -> int:
    if total % parts:
        raise WrongInput(f"a width of {total} is no multiple of {parts} {what}")
    return total // parts


SAME = Codec("SAME", lambda value, _: value, lambda stored, _: stored)
ONE_BASED = Codec("ONE_BASED", lambda ids, _: tuple(k + 1 for k in ids), lambda stored, _: tuple(k - 1 for k in stored))
# ggml's rope kernel multiplies the paper's factor in; the key holds what is left to multiply.
YARN_ATTENTION = Codec(
    "YARN_ATTENTION",
    lambda value, facts: value / yarn_attention(facts["rope.scaling.factor"]),
    lambda stored, facts: float(f"{stored * yarn_attention(facts['rope.scaling.factor']):.6g}"),
)
# Width of all captured hidden states side by side; the count of capture layers is known from its own row above.
ALL_CAPTURES = Codec(
    "ALL_CAPTURES",
    lambda width, facts: width * len(facts["capture_layers"]),
    lambda stored, facts: exactly(stored, len(facts["capture_layers"]), "capture layers"),
)


@dataclass(frozen=True)
class Row:
    """`key` with `{a}` for the architecture; `element` is set for an array. An F32 key keeps 24 bits of a float.

    `also` is another element type that the runtime reads as well as the one we write; a `required` key stops the
    loader, or is taken for something else, where it is missing, whatever else may tell the fact. Of rows with one key
    the last whose fact is there writes it; the others read a part of it, or another type.
    """

    key: str
    type: GGUFValueType
    field: str
    codec: Codec = SAME
    element: GGUFValueType | None = None
    also: GGUFValueType | None = None
    required: bool = False


@dataclass(frozen=True)
class Count:
    """A key that repeats the length of a list; the reader checks it and learns nothing from it (T-2)."""

    key: str
    field: str


@dataclass(frozen=True)
class Limit:
    """What the runtime's loader demands of the facts beyond their keys."""

    field: str
    holds: Callable[[DrafterSpec], bool]
    message: str


@dataclass(frozen=True)
class Note:
    """What a user should know when running the file, where it concerns the drafter."""

    text: str
    concerns: Callable[[DrafterSpec], bool] = lambda spec: True


@dataclass(frozen=True)
class Implied:
    """What the runtime takes for a fact without a key; where it has none at all, it can carry no other value."""

    field: str
    value: Callable[[Facts], Any]


@dataclass(frozen=True)
class Cell:
    """One (kind, runtime) pair: one loader. `source` names the code the facts were read from.

    `names` lists the tensors called otherwise than the role says, None where the loader has no such tensor;
    `harmless` the facts that may be lost, with the reason; `needs` a tensor that may not come without another;
    `draft_type` is llama-server's name of how it drafts; `targets` the target architectures that hand out hidden
    states, True where also the last layer's; `tokenizer` tells whether the file carries the target's; `telling` is the
    tensor that tells this kind's files from those of another kind under the same `arch`, or from the target's own;
    `launch_attached` runs a target that the drafter is attached to, None where it cannot be: `apart` is why, what
    follows on "such a drafter". `transforms` are done to a tensor on its way from the hub into a file, and their
    inverses on the way back; `from_target` are the facts that drafters of this kind take from their target where no key
    tells them.
    """

    kind: str
    runtime: str
    arch: str
    rows: tuple[Row, ...]
    source: str
    launch: str
    draft_type: str = ""
    names: Mapping[Role, str | None] = field(default_factory=dict)
    counts: tuple[Count, ...] = ()
    implied: tuple[Implied, ...] = ()
    harmless: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    needs: Mapping[Role, Role] = field(default_factory=dict)
    targets: Mapping[str, bool] | None = None
    tokenizer: bool = True
    notes: tuple[Note, ...] = ()
    telling: Role | None = None
    launch_attached: str | None = None
    apart: str = "is a model of its own, expected an MTP head"
    transforms: Mapping[Role, Op] = field(default_factory=dict)
    from_target: frozenset[str] = frozenset({"embedding_scale", "rope.sections"})

    def tensor_name(self, key: TensorKey) -> str | None:
        """The runtime's name of a tensor, or None where its loader has none."""
        role, layer = key
        name = self.names.get(role, role.value)
        return name if name is None or layer is None else name.replace("{i}", str(layer))

    def into_hub(self, key: TensorKey) -> Op:
        """What makes a file's tensor the hub's."""
        op = self.transforms.get(key[0], COPY)
        return INVERSE.get(op, op)


# What a file without our own keys and without llama.cpp's optional ones means to these loaders.
WHOLE_HEADS = Implied("rope.dimensions", lambda facts: facts.get("head_dim"))
BIDIRECTIONAL = Implied("causal", lambda facts: False)
SAME_WIDTH = Implied("target_hidden_size", lambda facts: facts.get("hidden_size"))
# Numerically the same, so that it may be lost.
PLAIN_SECTIONS = {"rope.sections": "text-only M-RoPE sections are numerically plain rotate-half RoPE"}
SLIDING_NOTE = Note(
    "sliding layers look only backwards inside a block here, and both ways in llama.cpp; no key says which was trained",
    lambda spec: spec.window is not None,
)
# Keys that every runtime spells alike, after llama.cpp (`src/llama-arch.cpp`).
SHARED_ROWS = (
    Row("{a}.block_count", U32, "layer_count"),
    Row("{a}.context_length", U32, "context_length"),
    Row("{a}.embedding_length", U32, "hidden_size"),
    Row("{a}.feed_forward_length", U32, "feed_forward_size"),
    Row("{a}.attention.head_count", U32, "head_count"),
    Row("{a}.attention.head_count_kv", U32, "kv_head_count"),
    Row("{a}.attention.key_length", U32, "head_dim"),
    Row("{a}.attention.value_length", U32, "head_dim"),
    Row("{a}.attention.layer_norm_rms_epsilon", F32, "norm_epsilon"),
    Row("{a}.attention.sliding_window", U32, "window.size"),
    Row("{a}.attention.sliding_window_pattern", ARRAY, "window.layers", element=BOOL),
    Row("{a}.rope.freq_base", F32, "rope.theta"),
    Row("{a}.vocab_size", U32, "vocab_size"),
)
# Facts no runtime reads. Other keys are ignored by all of them, so the file can carry what a later check needs.
OWN_ROWS = (
    Row("drafter.kind", STRING, "kind"),
    Row("drafter.target.block_count", U32, "target_layer_count"),
    Row("drafter.target.embedding_length", U32, "target_hidden_size"),
    Row("drafter.draft_vocab_size", U32, "draft_vocab_size"),
    Row("drafter.markov_rank", U32, "markov_rank"),
)


def write(cell: Cell, spec: DrafterSpec) -> tuple[KeyValue, ...]:
    """The spec's keys in this dialect, in the order of the table."""
    return keys_of(cell, facts_of(spec))


def keys_of(cell: Cell, facts: Facts) -> tuple[KeyValue, ...]:
    keys = [
        KeyValue(row.key.format(a=cell.arch), row.type, value, row.element)
        for row in (*cell.rows, *OWN_ROWS)
        if row.field in facts and (value := row.codec.encode(facts[row.field], facts)) is not None
    ]
    for count in cell.counts:
        keys.append(KeyValue(count.key.format(a=cell.arch), U32, len(facts[count.field])))
    return tuple({entry.key: entry for entry in keys}.values())


def read(cell: Cell, keys: Mapping[str, KeyValue]) -> dict[str, Any]:
    """The facts a file carries, by field path. `WrongInput` names a key of the wrong type or a contradiction."""
    facts, faults = read_all(cell, keys)
    if faults:
        raise WrongInput(faults[0])
    return facts


def read_all(cell: Cell, keys: Mapping[str, KeyValue]) -> tuple[dict[str, Any], list[str]]:
    """`read` as far as it goes: the facts of all good keys, and what is wrong with the others."""
    facts, faults, spoilt = dict[str, Any](), list[str](), set[str]()
    for row in (*cell.rows, *OWN_ROWS):
        name = row.key.format(a=cell.arch)
        if name not in keys or _meant_by_another(cell, row, keys[name]):
            continue
        try:
            value = _decoded(row, _stored(keys[name], row, name), facts, name)
        except WrongInput as error:
            faults.append(str(error))
            spoilt.add(row.field)
            continue
        if value is not None and facts.setdefault(row.field, value) != value:
            faults.append(f"{name}: found {value!r}, but another key says {row.field} = {facts[row.field]!r}")
    if not any(facts.get("window.layers", (True,))):  # a window that no layer uses is none
        facts = {name: value for name, value in facts.items() if not name.startswith("window.")}
    if TOKENS in keys:  # every loader that reads a tokenizer counts its tokens
        tokens = keys[TOKENS].value
        if keys[TOKENS].element is not GGUFValueType.STRING or not isinstance(tokens, tuple):
            faults.append(f"{TOKENS}: found {keys[TOKENS].type.name}, expected an array of STRING")
        else:
            facts.setdefault("vocab_size", len(tokens))
    for implied in cell.implied:
        if (value := implied.value(facts)) is not None:
            facts.setdefault(implied.field, value)
    for count in cell.counts:
        if count.field not in spoilt:  # a list that could not be read has no length
            faults += _count_faults(keys, count.key.format(a=cell.arch), facts.get(count.field))
    return facts, faults


def _meant_by_another(cell: Cell, row: Row, entry: KeyValue) -> bool:
    """Rows of one key are alternatives: the type of what is there tells which of them it is."""
    return entry.type != row.type and any(r.key == row.key and r.type == entry.type for r in cell.rows)


def _stored(entry: KeyValue, row: Row, name: str) -> Any:
    if entry.type != row.type or entry.element not in (row.element, row.also or row.element):
        found = entry.type.name if entry.element is None else f"array of {entry.element.name}"
        expected = row.type.name if row.element is None else f"array of {row.element.name}"
        raise WrongInput(f"{name}: found {found}, expected {expected}")
    if row.type == F32 and not np.isfinite(entry.value):
        raise WrongInput(f"{name}: found {entry.value}, expected a finite number")
    # the shortest decimal with these 24 bits: 1e-06 comes back as 1e-06
    return float(str(np.float32(entry.value))) if row.type == F32 else entry.value  # type: ignore[arg-type]


def _decoded(row: Row, stored: Any, facts: Facts, name: str) -> Any:
    try:
        return row.codec.decode(stored, facts)
    except (KeyError, ZeroDivisionError) as error:
        raise WrongInput(f"{name}: found {stored!r}, but a key that it belongs to is missing or empty") from error


def _count_faults(keys: Mapping[str, KeyValue], name: str, values: Any) -> list[str]:
    if name not in keys:
        return []
    if values is None:
        return [f"{name}: a count without its list; the loader would guess the entries"]
    if keys[name].value != len(values):
        return [f"{name}: found {keys[name].value}, but the list has {len(values)} entries"]
    return []
