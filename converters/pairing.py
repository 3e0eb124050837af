"""Whether a drafter's file belongs to a target: what can be known without running either.

A drafter of the wrong generation is accepted nearly as often as the right one (T-61), so the pair is told by shapes,
by the vocabulary's hash and by what the file notes of its target, never by acceptance.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType

from convert_drafter.converters.dialects import doubts
from convert_drafter.converters.drafter_file import names_of
from convert_drafter.converters.errors import DrafterError
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.loader_keys import VOCAB_HASH
from convert_drafter.converters.repository import name_of, source_of
from convert_drafter.converters.roles import Role
from convert_drafter.converters.shared_cache import cache_doubts, cache_misfits
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.structure import ARCHITECTURE_NOTED, Survey, key_of
from convert_drafter.converters.target import Target, read_target, target_tokenizer
from convert_drafter.converters.tokenizer import TOKEN_TYPE, TOKENS, Tokenizer, vocabulary_hash
from convert_drafter.converters.verdict import Gate, Outcome

PAIRING = "pairing"
NOTED = "drafter.target."
FEW = 1000  # one token in so many, and none of them ordinary text, may be spelled otherwise
ORDINARY = (TokenType.NORMAL, TokenType.BYTE)


@dataclass(frozen=True)
class Remark:
    """One line about the pair: it rules the pair out, leaves it open, or is only worth knowing."""

    text: str
    outcome: Outcome = Outcome.FAIL


def check_pairing(survey: Survey, target_path: Path) -> Gate:
    """The gate "pairing" of a drafter's file and a target's folder or GGUF; `WrongInput` for what is no target."""
    target = read_target(target_path)
    remarks = [
        *_widths(survey, target),
        *_captures(survey, target),
        *_cache(survey.spec, target),
        *_vocabulary(survey, target_path, target),
        *_identity(survey.file, target_path, target),
        *_runtime(survey, target),
    ]
    outcomes = {remark.outcome for remark in remarks}
    for outcome in (Outcome.FAIL, Outcome.UNDECIDED, Outcome.PASS):
        if outcome in outcomes or outcome is Outcome.PASS:
            break
    first = [remark.text for remark in remarks if remark.outcome is outcome and outcome is not Outcome.PASS]
    rest = [f"note: {remark.text}" for remark in remarks if remark.text not in first]
    return Gate(PAIRING, outcome, _summary(outcome, survey, target, len(first)), (*first, *rest))


def _summary(outcome: Outcome, survey: Survey, target: Target, count: int) -> str:
    if outcome is Outcome.FAIL:
        return f"not {target.name}'s drafter: {count} {'thing' if count == 1 else 'things'} do not fit"
    if outcome is Outcome.UNDECIDED:
        return f"fits {target.name} as far as the file tells, which is not all"
    depth, width = target.layer_count, target.hidden_size
    return f"made for {target.name}: {depth} layers, hidden size {width}, {target.vocab_size} tokens"


def _both(what: str, key: str, file: object, place: str, target: object) -> str:
    return f"{what}: the file has {file} ({key}), the target {place} {target}"


# --- shapes ---


def _widths(survey: Survey, target: Target) -> Iterator[Remark]:
    file, cell, facts = survey.file, survey.cell, survey.facts
    known = {"target_hidden_size": target.hidden_size, "target_layer_count": target.layer_count,
             "vocab_size": target.vocab_size}  # fmt: skip
    for field, theirs in known.items():
        ours = facts.get(field)
        if ours is not None and ours != theirs:
            yield Remark(_both(field, key_of(file, cell, field), ours, target.name, f"has {theirs}"))
    captures = facts.get("capture_layers") or ()
    name = names_of(cell, (Role.FUSION, None))[0]
    fusion = file.tensors.get(name)
    if fusion is not None and captures and fusion.shape[-1] != len(captures) * target.hidden_size:
        wanted = f"{len(captures)} capture layers * {target.hidden_size} = {len(captures) * target.hidden_size}"
        yield Remark(f"{name}: the file has {fusion.shape[-1]} columns, the target {target.name} gives {wanted}")


def _captures(survey: Survey, target: Target) -> Iterator[Remark]:
    file, cell, facts = survey.file, survey.cell, survey.facts
    key = key_of(file, cell, "capture_layers")
    beyond = [k for k in facts.get("capture_layers") or () if not 0 <= k < target.layer_count]
    if beyond:
        found = f"layers {', '.join(map(str, beyond))}, counted from 0"
        yield Remark(_both("capture_layers", key, found, target.name, f"has {target.layer_count} layers"))
    mask = facts.get("mask_token_id")
    if mask is not None and not 0 <= mask < target.vocab_size:
        rows = f"has {target.vocab_size} rows in its embedding"
        yield Remark(_both("mask_token_id", key_of(file, cell, "mask_token_id"), mask, target.name, rows))


def _cache(spec: DrafterSpec | None, target: Target) -> Iterator[Remark]:
    if spec is not None:
        yield from (Remark(text) for text in cache_misfits(spec, target))
        yield from (Remark(text, Outcome.UNDECIDED) for text in cache_doubts(spec, target))


# --- vocabulary ---


def _vocabulary(survey: Survey, path: Path, target: Target) -> Iterator[Remark]:
    keys = survey.file.keys
    try:
        theirs = target_tokenizer(path, target.vocab_size)
    except DrafterError as error:
        yield Remark(f"vocabulary: not compared: the target's tokenizer cannot be read: {error}", Outcome.UNDECIDED)
        return
    ours = keys[TOKENS].value if TOKENS in keys else None
    texts = ours if isinstance(ours, tuple) and keys[TOKENS].element is GGUFValueType.STRING else None
    recorded = keys[VOCAB_HASH].value if VOCAB_HASH in keys else None
    known = vocabulary_hash(texts) if texts is not None else recorded  # type: ignore[arg-type]
    if known is None:
        why = "the file has neither tokens nor their hash, as only this converter notes it"
        yield Remark(f"vocabulary: not compared: {why}", Outcome.UNDECIDED)
    elif known != theirs.vocab_sha256:
        yield from different_tokens(keys, texts, recorded, theirs, target)
    elif (mask := survey.facts.get("mask_token_id")) is not None and theirs.mask_token_id not in (None, mask):
        yield Remark(f"mask token: the file has {mask}, the target's tokenizer {theirs.mask_token_id}", Outcome.ADVICE)


def different_tokens(
    keys: Mapping[str, KeyValue], texts: Sequence[Any] | None, recorded: object, theirs: Tokenizer, target: Target
) -> Iterator[Remark]:
    """How many tokens differ, and the first; only the hash where the file has no tokens."""
    if texts is None:
        hashes = f"the file notes {str(recorded)[:12]}..., the target {target.name} has {theirs.vocab_sha256[:12]}..."
        yield Remark(f"vocabulary: {hashes} ({VOCAB_HASH})")
        return
    tokens = next(entry.value for entry in theirs.keys if entry.key == TOKENS)
    assert isinstance(tokens, tuple)
    if len(texts) != len(tokens):
        yield Remark(f"vocabulary: the file has {len(texts)} tokens, the target {target.name} {len(tokens)}")
        return
    differing = [i for i, (one, other) in enumerate(zip(texts, tokens, strict=True)) if one != other]
    first = differing[0]
    found = f"{len(differing)} of {len(tokens)} tokens differ, the first is {first}"
    text = f"vocabulary: {found}: the file has {texts[first]!r}, the target {target.name} {tokens[first]!r}"
    kinds = keys[TOKEN_TYPE].value if TOKEN_TYPE in keys else ()
    special = isinstance(kinds, tuple) and len(kinds) == len(texts) and not any(kinds[i] in ORDINARY for i in differing)
    if special and len(differing) * FEW <= max(FEW, len(tokens)):  # renamed padding; ids are all a drafter uses
        yield Remark(f"{text}; special tokens only, which a drafter does not read", Outcome.ADVICE)
    else:
        yield Remark(text)


# --- what the file notes of its target ---


def _identity(file: GGUFFile, path: Path, target: Target) -> Iterator[Remark]:
    noted = {key.removeprefix(NOTED): str(entry.value) for key, entry in file.keys.items() if key.startswith(NOTED)}
    repository, revision = source_of(path)
    theirs = name_of(path) if repository else target.name
    if "name" not in noted:
        yield Remark("target: the file does not say which one it was made for", Outcome.ADVICE)
    elif not _same_model(noted["name"], theirs):
        said = _both("target", f"{NOTED}name", repr(noted["name"]), "is called", repr(theirs))
        yield Remark(f"{said}: the same model under another name?", Outcome.UNDECIDED)
    one, other = noted.get("architecture"), target.architecture
    if one is not None and one != other and ("For" in one) == ("For" in other):
        yield Remark(_both("target architecture", ARCHITECTURE_NOTED, one, target.name, f"is {other}"))
    if (
        repository
        and noted.get("repository") == repository
        and revision
        and noted.get("revision", revision) != revision
    ):
        yield Remark(_both("revision", f"{NOTED}revision", noted["revision"], "is", revision), Outcome.ADVICE)


def _same_model(one: str, other: str) -> bool:
    """Names of one model: Qwen3.6-27B, "Qwen3.6 27B Instruct", Qwen3.6-27B-Q4_K_M. Never a word that is another's."""
    words = [set(re.findall(r"[a-z0-9.]+", name.lower())) for name in (one, other)]
    return words[0] <= words[1] or words[1] <= words[0]


# --- runtime ---


def _runtime(survey: Survey, target: Target) -> Iterator[Remark]:
    cell, spec = survey.cell, survey.spec
    if spec is None:
        return
    fields = {row.field for row in cell.rows}
    deep = _with_depth(spec, target)
    yield from (Remark(text, Outcome.UNDECIDED) for text in doubts(cell, deep, target.architecture))
    last = cell.targets is not None and cell.targets.get(target.architecture) is False
    if last and target.layer_count - 1 in survey.facts.get("capture_layers", ()):
        what = f"{cell.runtime} has no state after the last layer of {target.architecture}"
        yield Remark(f"capture_layers: the file captures layer {target.layer_count - 1}, the target's last; {what}")
    if target.embedding_scale is not None and "embedding_scale" in fields and "embedding_scale" not in survey.facts:
        scale = f"multiplies its embeddings by {target.embedding_scale:.6g}"
        yield Remark(f"embedding_scale: the file has none, the target {target.name} {scale}")
    sections = survey.facts.get("rope.sections")
    if "rope.sections" in fields and bool(sections and any(sections)) != target.uses_mrope:
        ours = f"has sections {sections}" if sections else "has no sections"
        theirs = "positions with M-RoPE" if target.uses_mrope else "does not"
        note = f"M-RoPE: the file {ours}, the target {target.name} {theirs}; text is the same, images are not"
        yield Remark(note, Outcome.ADVICE)


def _with_depth(spec: DrafterSpec, target: Target) -> DrafterSpec:
    """The spec beside this target, so that its last layer is known; as it is where its layers do not exist there."""
    if not spec.capture_layers:  # it reads the same state whatever the depth
        return spec
    return replace(spec, target_layer_count=max(target.layer_count, *(k + 1 for k in spec.capture_layers)))
