"""What a GGUF is: by its architecture and its tensors, and by its name only where those tell nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, LlamaFileType

from convert_drafter.converters.dialects import Cell, cell_of_names, own_part
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.gguf_file import ARCHITECTURE, KeyValue
from convert_drafter.converters.gguf_read import GGUFFile, skim_gguf
from convert_drafter.converters.loader_keys import VOCAB_HASH
from convert_drafter.converters.model_key import model_words, plays_a_part, split_name, storage_label
from convert_drafter.converters.pairing import NOTED
from convert_drafter.converters.recipe_rules import layer_of
from convert_drafter.converters.roles import Role
from convert_drafter.converters.scan.found import Artifact, By, Head, Shape, What
from convert_drafter.converters.scan.walk import Place
from convert_drafter.converters.spec import HEADS
from convert_drafter.converters.structure import survey
from convert_drafter.converters.tokenizer import TOKENS, vocabulary_hash

FORMAT = "gguf"
# general.type of files that serve another model (llama.cpp's gguf-py/gguf/constants.py, GGUFType), and projectors,
# which older files only tell by their architecture.
PARTS = {"adapter": "adapter", "mmproj": "projector", "imatrix": "importance matrix", "vocab": "tokenizer"}
PROJECTOR = "clip"
# Architectures of drafters that no cell reads: gemma4-dflash-draft, deepseek4-dflash-draft, dspark, gemma4_assistant.
FOREIGN = re.compile(r"dflash|dspark|eagle|draft|domino|medusa|assistant|(^|[-_])mtp([-_]|$)")
OUTSIDE = {Role.TOKEN_EMBEDDING.value, Role.OUTPUT.value}  # some files carry them and some borrow the target's
EH_PROJ = ".nextn.eh_proj."
MOST = 3  # faults of one file that are told here; `doctor` tells all
AGAIN = "download it again"
EMPTY = f"no tensor in it, only metadata: convert it again, or {AGAIN}"


@dataclass(frozen=True)
class Kind:
    """What a file is, before its facts are read; `cell` is the loader it is for, where that is known."""

    what: What
    told_by: By
    name: str = ""
    cell: Cell | None = None
    head: Head | None = None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def describe_gguf(place: Place, n_bytes: int) -> Artifact:
    """The artifact in these files, whatever is wrong with them."""
    label = place.name or place.path.name
    blank = Artifact(
        place.path,
        FORMAT,
        place.files,
        n_bytes,
        split_name(label)[0],
        What.UNKNOWN,
        By.NAME,
        quant=storage_label(label),
    )
    absent = tuple(f"part {name!r} is missing: download it beside the others" for name in place.absent)
    try:
        file, faults = _whole(place)
    except WrongInput as error:
        what = What.DRAFTER if plays_a_part(label) else What.UNKNOWN
        faults = [line if ";" in line else f"{line}; {AGAIN}" for line in _lines(error, place.path)]
        return replace(blank, what=what, name=_plain(label), faults=(*absent, *faults))
    kind = _kind(file, label)
    complete = not place.absent and not faults
    known = replace(
        blank,
        name=_name(place, file),
        what=kind.what,
        told_by=kind.told_by,
        kind=kind.name,
        architecture=_text(file.keys, ARCHITECTURE) or "",
        runtime="" if kind.cell is None or kind.what is not What.DRAFTER else kind.cell.runtime,
        head=kind.head,
        repository=place.origin[0],
        revision=place.origin[1],
        recorded={key.removeprefix(NOTED): str(e.value) for key, e in file.keys.items() if key.startswith(NOTED)},
        quant=blank.quant or _quant(file),
        faults=(*absent, *faults, *kind.faults),
        notes=kind.notes,
        complete=not place.absent,
        **_counted(file),
    )
    return _with_facts(known, file, kind.cell, complete)


def _whole(place: Place) -> tuple[GGUFFile, list[str]]:
    """The file with the tensors of all its parts, and what is wrong with where they lie."""
    first, *others = [skim_gguf(path) for path in place.files]
    faults = [f"{part.path.name}: {part.fault}" if others else part.fault for part in (first, *others) if part.fault]
    for part in others:
        first = replace(first, tensors=first.tensors | part.tensors)
    if first.parts > len(place.files) + len(place.absent):
        faults.append(f"split.count: found one of {first.parts} parts, and no others beside it; {AGAIN}")
    return first, faults


# --- what it is ---


def _kind(file: GGUFFile, label: str) -> Kind:
    arch, part = _text(file.keys, ARCHITECTURE), _text(file.keys, "general.type")
    if part in PARTS or arch == PROJECTOR:
        return Kind(What.PART, By.HEADER, PARTS.get(part or "", PARTS["mmproj"]))
    if arch is None:
        fault = f"{ARCHITECTURE}: missing, so no runtime loads it; {AGAIN}"
        return Kind(What.DRAFTER if plays_a_part(label) else What.UNKNOWN, By.NAME, faults=(fault,))
    cell = cell_of_names(arch, file.tensors)
    if cell is not None and cell.kind in HEADS:
        return _with_head(file, cell)
    if cell is not None:
        return Kind(What.DRAFTER, By.TENSORS if cell.telling else By.HEADER, cell.kind, cell)
    if any(EH_PROJ in name for name in file.tensors):
        return _with_other_head(file, arch)
    if FOREIGN.search(arch):
        return Kind(What.DRAFTER, By.HEADER, arch, faults=(_foreign(arch),))
    return _target(file, arch, label)


def _with_head(file: GGUFFile, cell: Cell) -> Kind:
    """A head is a drafter where it is alone, and a part of its target where that is in the file."""
    if len(own_part(file, cell).tensors) == len(file.tensors):
        return Kind(What.DRAFTER, By.TENSORS, cell.kind, cell)
    return Kind(What.TARGET, By.TENSORS, cell=cell, head=Head(cell.kind))


def _with_other_head(file: GGUFFile, arch: str) -> Kind:
    note = f"an MTP head of {arch}, which this converter does not make; llama.cpp may load it"
    if any(layer_of(name) == 0 for name in file.tensors):
        return Kind(What.TARGET, By.TENSORS, head=Head("", note))
    return Kind(What.DRAFTER, By.TENSORS, f"MTP head of {arch}", notes=(note,))


def _target(file: GGUFFile, arch: str, label: str) -> Kind:
    key = f"{arch}.nextn_predict_layers"
    faults = [] if file.tensors else [EMPTY]
    if file.tensors and file.parts == 1 and _number(file.keys, key):
        stop = "llama.cpp stops at the first of them; use a copy with its head, or convert again without the key"
        faults.append(f"{key}: found {file.keys[key].value}, but no tensor of an MTP head: {stop}")
    if not file.tensors and plays_a_part(label):
        return Kind(What.DRAFTER, By.NAME, faults=tuple(faults))
    named = ("its name is a drafter's; its tensors are a model's",) if plays_a_part(label) else ()
    return Kind(What.TARGET, By.HEADER, faults=tuple(faults), notes=named)


def _foreign(arch: str) -> str:
    mend = "convert-drafter convert SRC --target T --for llama.cpp --quant Q8_0 -o OUT.gguf"
    why = "an unknown dialect, which `redialect` does not read either; convert the checkpoint it was made from"
    return f"{ARCHITECTURE}: found {arch!r}, {why}: {mend}"


# --- what it says ---


def _with_facts(artifact: Artifact, file: GGUFFile, cell: Cell | None, complete: bool) -> Artifact:
    tokens = file.skipped.get(TOKENS)
    listed = file.keys[TOKENS].value if TOKENS in file.keys else None
    vocab = tokens.count if tokens else len(listed) if isinstance(listed, tuple) else None
    digest = tokens.sha256 if tokens else vocabulary_hash(listed) if isinstance(listed, tuple) else None  # type: ignore[arg-type]
    digest = digest or _text(file.keys, VOCAB_HASH)
    if artifact.what is What.DRAFTER and cell is not None:
        return _with_survey(artifact, file, cell, Shape(vocab_size=vocab, vocab_sha256=digest), complete)
    arch = artifact.architecture
    blocks, heads = (_number(file.keys, f"{arch}.{key}") for key in ("block_count", "nextn_predict_layers"))
    depth = None if blocks is None else blocks - (heads or 0)
    hidden = _number(file.keys, f"{arch}.embedding_length")
    size = vocab if vocab is not None else _number(file.keys, f"{arch}.vocab_size")
    if artifact.what is What.DRAFTER:  # of a dialect nobody knows: its own numbers are not the target's
        return replace(artifact, shape=Shape(vocab_size=size, vocab_sha256=digest))
    return replace(artifact, shape=Shape(hidden, depth, size, digest, layers=depth))


def _with_survey(artifact: Artifact, file: GGUFFile, cell: Cell, shape: Shape, complete: bool) -> Artifact:
    """A drafter's facts as its own loader reads them, and the faults that its headers show."""
    key = f"{cell.arch}.vocab_size"
    if shape.vocab_size is not None and key not in file.keys:  # the tokens were only counted
        count = KeyValue(key, GGUFValueType.UINT32, shape.vocab_size)
        file = replace(file, keys=file.keys | {key: count})
    try:
        found = survey(own_part(file, cell), cell)
    except WrongInput as error:
        return replace(artifact, shape=shape, faults=(*artifact.faults, *_lines(error, artifact.path)))
    faults = [finding.text for finding in found.findings if finding.fault] if complete else []
    faults = faults if file.tensors else [EMPTY]
    more = [f"and {len(faults) - MOST} more: convert-drafter doctor shows all"] if len(faults) > MOST else []
    facts: Mapping[str, Any] = found.facts
    known = replace(
        shape,
        hidden_size=facts.get("target_hidden_size"),
        depth=facts.get("target_layer_count"),
        vocab_size=facts.get("vocab_size", shape.vocab_size),
        captures=tuple(facts.get("capture_layers") or ()),
        layers=facts.get("layer_count"),
    )
    return replace(artifact, shape=known, faults=(*artifact.faults, *faults[:MOST], *more))


def _counted(file: GGUFFile) -> dict[str, Any]:
    """Weights without embedding and head, and the bits of one in a matrix."""
    inside = [stored for name, stored in file.tensors.items() if name not in OUTSIDE]
    matrices = [stored for stored in inside if len(stored.shape) > 1]
    n_matrix = sum(stored.n_elements for stored in matrices)
    bits = 8 * sum(stored.n_bytes for stored in matrices) / n_matrix if n_matrix else None
    return {"weights": sum(stored.n_elements for stored in inside), "bits": bits}


def _quant(file: GGUFFile) -> str:
    """What the header calls its recipe, else the type that most weights have."""
    number = _number(file.keys, "general.file_type")
    if number is not None and number in set(LlamaFileType):
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    counts: Counter[str] = Counter()
    for stored in file.tensors.values():
        counts[stored.type.name] += stored.n_elements
    return max(counts, key=lambda name: counts[name], default="")


def _name(place: Place, file: GGUFFile) -> str:
    """The file's own name; where that is everybody's, the header's, and then the folder's."""
    own = _plain(place.name or place.path.name)
    inside = _text(file.keys, "general.name") or ""
    names = (own, inside, place.path.absolute().parent.name)
    return next((name for name in names if model_words(name)), own)


def _plain(label: str) -> str:
    """The name without its storage words, as it is spelled."""
    return label[: len(split_name(label)[0])]


def _text(keys: Mapping[str, KeyValue], key: str) -> str | None:
    value = keys[key].value if key in keys else None
    return value if isinstance(value, str) else None


def _number(keys: Mapping[str, KeyValue], key: str) -> int | None:
    value = keys[key].value if key in keys else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _lines(error: WrongInput, path: Path) -> Iterator[str]:
    lines = error.problems if isinstance(error, Problems) else (str(error),)
    yield from (line.removeprefix(f"{path}: ") for line in lines[:MOST])
