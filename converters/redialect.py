"""Redialect: a drafter's GGUF in, the same drafter for another runtime out. A job goes in, a report comes out.

Facts are read through the rows of the file's own cell and written through the other runtime's; tensors get their other
names. Their bytes are copied: every dialect stores rows in torch's order and rotary pairs as halves, so there is
nothing to permute, and nothing is encoded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from convert_drafter.converters import provenance
from convert_drafter.converters.convert import mask_doubt, tokenizer_for
from convert_drafter.converters.destination import OURS, refuse_overwriting
from convert_drafter.converters.dialects import CELLS, Cell, doubts, find_cell, objections, write
from convert_drafter.converters.dialects.cell import OWN_ROWS, SLIDING_NOTE
from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.errors import Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE, KeyValue, StoredTensor, file_access, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_header, fetch_tensors
from convert_drafter.converters.launch.line import launch_line
from convert_drafter.converters.plan import unplaced
from convert_drafter.converters.recipes import ALWAYS_F32
from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target, read_target
from convert_drafter.converters.tokenizer import MASK, TOKENS, Tokenizer, copy_tokenizer, vocabulary_hash

STRING, ARRAY = GGUFValueType.STRING, GGUFValueType.ARRAY
OWN, TARGET, VOCAB_HASH = "drafter.", "drafter.target.", "drafter.vocab.sha256"
VERSION, CONFIG_HASH = "drafter.tool.version", "drafter.source.config_sha256"
FROM, HEADER_HASH, SETTINGS = (f"drafter.redialect.{name}" for name in ("from", "header_sha256", "settings"))
# What a runtime's own converters write, without a word, for a fact they do not find: Lucebox's look for theta, block
# size and mask token at the config's top level alone (server/scripts/convert_dflash_to_gguf.py).
GUESSED: dict[str, dict[str, Any]] = {
    "lucebox": {"rope.theta": 1e6, "block_size": 16, "mask_token_id": 248070, "context_length": 32768}
}


@dataclass(frozen=True)
class RedialectJob:
    """What to rewrite, and for whom. `settings` are the user's own facts (field path -> JSON text)."""

    source: Path
    target: Path | None
    runtime: str
    out: Path
    strict: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """One tensor: as it is stored in the source, and its name in the result."""

    stored: StoredTensor
    name: str


@dataclass(frozen=True)
class Redialection:
    """Everything decided, nothing written. `cell` is the one the drafter is rewritten for."""

    job: RedialectJob
    drafter: DrafterFile
    cell: Cell
    moves: tuple[Move, ...]
    keys: tuple[KeyValue, ...]
    warnings: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(move.stored.n_bytes for move in self.moves)

    @property
    def launch(self) -> str:
        return launch_line(self.cell, self.drafter.spec, self.job.target, self.job.out)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know in the other runtime, and what was otherwise in the file's own."""
        spec, own = self.drafter.spec, self.drafter.cell
        notes = tuple(note.text for note in self.cell.notes if note.concerns(spec))
        slides = SLIDING_NOTE in own.notes and SLIDING_NOTE not in self.cell.notes and SLIDING_NOTE.concerns(spec)
        return (*notes, f"{own.runtime}, whose file it was: {SLIDING_NOTE.text}") if slides else notes


@dataclass(frozen=True)
class RedialectReport:
    """What was done; sizes in bytes."""

    redialection: Redialection
    out: Path
    source_bytes: int
    out_bytes: int


def prepare_redialect(job: RedialectJob) -> Redialection:
    """Decide everything from headers alone. Raises with every problem; writes nothing."""
    if job.source.is_dir():
        raise WrongUsage(f"{job.source}: is a folder, expected a drafter's GGUF; `convert` reads checkpoints")
    job = replace(job, target=None if job.target is None else fetch(job.target, Part.CONFIG))
    target = None if job.target is None else read_target(job.target)
    drafter = read_drafter_file(fetch_header(job.source), job.settings, target)
    file, spec = drafter.file, drafter.spec
    cell = find_cell(spec.kind, job.runtime)
    refuse_overwriting(job.out, _files_read(job, file.path))
    moves, unnamed = _rename(drafter.tensors, cell)
    architecture = _architecture(file, target)
    if drafter.cell.transforms != cell.transforms:  # bytes are copied here
        unnamed.append(f"{cell.runtime} wants the rows of queries and keys in another order: convert the checkpoint")
    problems = [*drafter.problems, *unnamed, *objections(cell, spec, architecture), *_mispairing(spec, target)]
    if problems:
        raise Problems(str(job.source), problems)
    tokenizer = _tokenizer(job, file, cell, spec)
    warnings = (
        *(f"{job.source}: {doubt}" for doubt in _file_doubts(drafter)),
        *doubts(cell, spec, architecture),
        *_tokenizer_doubts(drafter, tokenizer, given=target is not None),
    )
    if warnings and job.strict:
        raise Problems(f"{job.source} (--strict)", warnings)
    return Redialection(job, drafter, cell, moves, _keys(job, drafter, cell, target, tokenizer), warnings)


def redialect(job: RedialectJob, advance: Callable[[int], None] = lambda n: None) -> RedialectReport:
    """Write the GGUF of a job. `advance` is told the bytes written. Raises before or instead of writing, never half."""
    return write_redialection(prepare_redialect(job), advance)


def write_redialection(decided: Redialection, advance: Callable[[int], None] = lambda n: None) -> RedialectReport:
    """Write what `prepare_redialect` decided; the file appears under its name complete or not at all."""
    file, out = fetch_tensors(decided.job.source, decided.drafter.file), decided.job.out
    names = {move.name: move.stored.name for move in decided.moves}
    tensors = [replace(move.stored, name=move.name) for move in decided.moves]
    size = write_gguf(out, decided.keys, tensors, lambda tensor: file.slabs(names[tensor.name]), advance)
    return RedialectReport(decided, out, file.path.stat().st_size, size)


def _files_read(job: RedialectJob, source: Path) -> list[Path]:
    """Every file the job reads or may read; an old GGUF beside the target's files may be replaced."""
    if job.target is None or not job.target.is_dir():
        return [source, *([] if job.target is None else [job.target])]
    return [source, *(path for path in job.target.iterdir() if path.suffix not in OURS and path.is_file())]


def _rename(tensors: Mapping[TensorKey, StoredTensor], cell: Cell) -> tuple[tuple[Move, ...], list[str]]:
    """The tensors under this runtime's names, and what it cannot take."""
    named = ((stored, cell.tensor_name(key)) for key, stored in tensors.items())
    moves = tuple(Move(stored, name) for stored, name in named if name is not None)
    sources = {key: stored.name for key, stored in tensors.items()}
    return moves, list(unplaced(sources, cell.tensor_name, cell.runtime, cell.needs))


# --- the target and its tokenizer ---


def _architecture(file: GGUFFile, target: Target | None) -> str | None:
    """The target's architecture, from the target or from what an earlier run noted."""
    if target is not None:
        return target.architecture
    entry = file.keys.get(f"{TARGET}architecture")
    return None if entry is None else str(entry.value)


def _mispairing(spec: DrafterSpec, target: Target | None) -> Iterator[str]:
    if target is None:
        return
    pairs = {
        "vocab_size": (spec.vocab_size, target.vocab_size),
        "target_layer_count": (spec.target_layer_count, target.layer_count),
        "target_hidden_size": (spec.target_hidden_size, target.hidden_size),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            yield f"{name}: the file has {ours}, the target {target.name} has {theirs}; is it this drafter's target?"


def _tokenizer(job: RedialectJob, file: GGUFFile, cell: Cell, spec: DrafterSpec) -> Tokenizer | None:
    """The given target's tokenizer, else the file's own."""
    if job.target is not None or TOKENS not in file.keys:
        return tokenizer_for(cell, job.target, spec)
    count = len(file.keys[TOKENS].value)  # type: ignore[arg-type]
    if count != spec.vocab_size and "vocab_size" not in job.settings:
        found = f"{TOKENS}: found {count} tokens, expected {spec.vocab_size} (vocab_size)"
        raise WrongInput(f"{file.path}: {found}; give --target, or --set vocab_size={spec.vocab_size} to fill them up")
    try:
        return copy_tokenizer(file.keys, spec.vocab_size)
    except WrongInput as error:
        raise WrongInput(f"{file.path}: {error}") from error


# --- doubts ---


def _file_doubts(drafter: DrafterFile) -> Iterator[str]:
    """What a file may have got wrong without showing it, and what of it is not carried over."""
    yield from (f"{key}: nobody reads this key; it is left out" for key in drafter.unread())
    for key, stored in drafter.tensors.items():
        if key[0] in ALWAYS_F32 and stored.type.name != "F32":
            advice = "GPU kernels want F32 here: convert the checkpoint again"
            yield f"{stored.name}: found {stored.type.name}; {advice}"
    if CONFIG_HASH not in drafter.file.keys:  # somebody else's converter
        yield from _converter_doubts(drafter)


def _converter_doubts(drafter: DrafterFile) -> Iterator[str]:
    """T-9, T-55: older converters lose these facts, or make them up."""
    facts = {fact.name: fact for fact in drafter.facts}
    guessed = GUESSED.get(drafter.cell.runtime, {})
    same = [name for name, value in guessed.items() if facts[name].value == value and name not in drafter.given]
    if same:
        shown = ", ".join(f"{name} = {facts[name].value:g}" for name in same)
        yield (
            f"{shown}: what {drafter.cell.runtime}'s converters write where they find none; compare with the drafter's"
            " config.json and settle it with --set"
        )
    if "window.size" not in facts and "window.layers" not in drafter.given:
        yield (
            "no sliding window, which older converters left out: if layer_types in the drafter's config.json has"
            " sliding_attention, give --set window.size=TOKENS --set window.layers=[true,...]; else [false]"
        )


def _tokenizer_doubts(drafter: DrafterFile, tokenizer: Tokenizer | None, given: bool) -> Iterator[str]:
    """`given` where the tokenizer is a given target's, not the file's own."""
    keys = drafter.file.keys
    if given or MASK not in {row.key for row in drafter.cell.rows}:
        yield from mask_doubt(drafter.spec, tokenizer)
    known = keys[VOCAB_HASH].value if VOCAB_HASH in keys else None
    if known is None and TOKENS in keys:
        known = vocabulary_hash(keys[TOKENS].value)  # type: ignore[arg-type]
    if given and tokenizer is not None and known not in (None, tokenizer.vocab_sha256):
        yield "vocabulary: the file was made for other tokens than the target's; is it this drafter's target?"


# --- metadata ---


def _keys(
    job: RedialectJob, drafter: DrafterFile, cell: Cell, target: Target | None, tokenizer: Tokenizer | None
) -> tuple[KeyValue, ...]:
    """All metadata in a conversion's order: general, the drafter's facts, our own, the tokenizer's.

    What the file says of itself is kept; what it says of its target and its tokenizer gives way to a given target.
    """
    file = drafter.file
    kept = [entry for entry in file.keys.values() if entry.value != () and entry.key != ARCHITECTURE]
    written = write(cell, drafter.spec)
    taken = {entry.key for entry in written} | {row.key for row in OWN_ROWS}
    own = {entry.key: entry for entry in kept if entry.key.startswith(OWN) and entry.key not in taken}
    about = {key: entry for key, entry in own.items() if key.startswith(TARGET) or key == VOCAB_HASH}
    if job.target is not None and target is not None:
        about = {entry.key: entry for entry in provenance.target_keys(job.target, target, tokenizer)}
    elif tokenizer is not None:
        about[VOCAB_HASH] = KeyValue(VOCAB_HASH, STRING, tokenizer.vocab_sha256)
    history = {entry.key: entry for entry in _history(job, file)}
    version = {VERSION: KeyValue(VERSION, STRING, provenance.tool_version())}
    rest = {key: entry for key, entry in own.items() if not (key.startswith(TARGET) or key == VOCAB_HASH)}
    return (
        KeyValue(ARCHITECTURE, STRING, cell.arch),
        *(entry for entry in kept if entry.key.startswith("general.")),
        *written,
        *(version | rest | version | history).values(),
        *about.values(),
        *(entry for entry in kept if not entry.key.startswith(_placed())),
        *(tokenizer.keys if tokenizer is not None and cell.tokenizer else ()),
    )


def _placed() -> tuple[str, ...]:
    """How keys begin that are not carried over as they are."""
    return ("general.", OWN, "tokenizer.", "split.", *(f"{cell.arch}." for cell in CELLS.values()))


def _history(job: RedialectJob, file: GGUFFile) -> Iterator[KeyValue]:
    """What was rewritten: one entry for each time, the last one last."""
    arch = str(file.keys[ARCHITECTURE].value)
    yield _appended(file, FROM, (arch,))
    yield _appended(file, HEADER_HASH, (_header_sha256(file),))
    if job.settings:
        yield _appended(file, SETTINGS, tuple(f"{name}={text}" for name, text in sorted(job.settings.items())))


def _appended(file: GGUFFile, key: str, values: tuple[str, ...]) -> KeyValue:
    before = file.keys.get(key)
    earlier = before.value if before is not None and before.element is STRING else ()
    return KeyValue(key, ARRAY, (*earlier, *values), STRING)  # type: ignore[misc]


def _header_sha256(file: GGUFFile) -> str:
    """Of everything before the tensors' data: keys, names, shapes and types."""
    with file_access(file.path, "read"), file.path.open("rb") as source:
        return hashlib.sha256(source.read(min(file.offsets.values()))).hexdigest()
