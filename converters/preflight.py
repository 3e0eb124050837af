"""Preflight: would this conversion work, and would its result be served? Asked before anything is written or started.

A checkpoint and what is planned for it go in, gates come out. Nothing is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert_drafter.converters.checkpoint import open_checkpoint
from convert_drafter.converters.convert import Conversion, ConvertJob, prepare
from convert_drafter.converters.dialects import CELLS, Cell
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.drafters import needed
from convert_drafter.converters.errors import DrafterError, MissingEngine, Problems
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_header, holds_gguf
from convert_drafter.converters.launch.abilities import can
from convert_drafter.converters.launch.files import source_of_way, way_of
from convert_drafter.converters.launch.launching import LLAMA_CPP
from convert_drafter.converters.launch.modes import AUTO, DRAFTERS, OFF, canonical, unknown, ways_of
from convert_drafter.converters.pairing import different_tokens
from convert_drafter.converters.repository import repository_of
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target, read_target, target_tokenizer
from convert_drafter.converters.tokenizer import TOKENS, Tokenizer, read_tokenizer
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.converters.verify.in_llama_cpp.probe import Known, find_server

RECIPE = "F16"  # of what is planned where nobody says it
ROOM = 1.02  # keys, tokenizer and padding beside the tensors
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (1, "bytes"))


@dataclass(frozen=True)
class Plans:
    """What is to become of a checkpoint: the conversion, and how its result is to be served.

    `parallel` is the number of sequences served at once; `strict` makes warnings faults (T-36).
    """

    runtime: str = LLAMA_CPP
    recipe: str = RECIPE
    out: Path = field(default_factory=lambda: Path("drafter.gguf"))
    mode: str | None = None
    draft_length: int | None = None
    parallel: int = 1
    server: Path | None = None
    strict: bool = False


def is_checkpoint(path: Path) -> bool:
    """Is this to be looked at as a checkpoint, even where it is a broken one; a GGUF is doctor's own."""
    if repository_of(path) is not None:
        return not holds_gguf(path)
    return path.is_dir() or path.suffix == ".safetensors" or (path.is_symlink() and not path.exists())


def preflight(source: Path, target: Path | None, plans: Plans | None = None) -> tuple[Gate, ...]:
    """Every gate that can be asked; what a fault hides is skipped, with the reason."""
    plans = plans or Plans()
    paths = _paths(source, target)
    if paths.outcome is Outcome.FAIL:
        return (paths,)
    facts, conversion = _facts(source, target, plans)
    if conversion is None:
        return (paths, facts)
    cell, spec = conversion.cell, conversion.published.spec
    return (paths, facts, tokenizer_gate(conversion), *served(cell, spec, plans), _disk(conversion, plans))


def beside_file(path: Path, target: Path | None, plans: Plans) -> tuple[Gate, ...]:
    """How a finished file would be served, if anything is said about that; faults of the file itself are doctor's."""
    if plans == Plans(strict=plans.strict):
        return ()
    try:
        known = None if target is None else read_target(fetch(target, Part.CONFIG))
        drafter = read_drafter_file(fetch_header(path), target=known)
    except DrafterError as error:
        return (Gate("settings", Outcome.SKIPPED, "the file has to be mended first", (str(error),)),)
    return tuple(served(drafter.cell, drafter.spec, replace(plans, runtime=drafter.cell.runtime)))


# --- do the paths lead to something (T-35) ---


def _paths(source: Path, target: Path | None) -> Gate:
    faults, notes = list[str](), list[str]()
    if source.is_symlink() and not source.exists():
        return Gate(
            "paths", Outcome.FAIL, "1 leads nowhere", (f"{source}: a link to {source.readlink()}: nothing there",)
        )
    try:
        found = open_checkpoint(fetch(source, Part.DRAFTER, needed), needed)
        files = f"{len(found.files)} file{'s' * (len(found.files) != 1)}"
        notes.append(f"{source}: {len(found.tensors)} tensors in {files}, and {found.config_path.name}")
    except Problems as error:
        faults += [f"{error.where}: {problem}" for problem in error.problems]
    except DrafterError as error:
        faults.append(str(error))
    if target is not None:
        try:
            notes.append(_target_weights(target, fetch(target, Part.CONFIG)))
        except DrafterError as error:
            faults.append(str(error))
    summary = _count(faults, "leads nowhere", "lead nowhere") if faults else "a config and weights where they should be"
    return Gate("paths", Outcome.FAIL if faults else Outcome.PASS, summary, tuple(faults or notes))


def _target_weights(target: Path, here: Path) -> str:
    """What there is of it, `here` what was fetched. Raises `WrongInput` where it tells too little."""
    read_target(here)
    if here.is_file():
        return f"{target}: a GGUF"
    if here != target:
        return f"{target}: a repository, of which the weights were not asked for"
    try:
        return f"{target}: {len(open_checkpoint(target).tensors)} tensors"
    except DrafterError:
        return f"{target}: a config without weights, which is enough to convert, not to verify in torch"


def _count(faults: list[str], one: str, many: str) -> str:
    return f"{len(faults)} {one if len(faults) == 1 else many}"


# --- does the conversion hold ---


def _facts(source: Path, target: Path | None, plans: Plans) -> tuple[Gate, Conversion | None]:
    """The plan of the conversion, made as `convert --dry-run` makes it."""
    try:
        conversion = prepare(ConvertJob(source, target, plans.runtime, plans.recipe, plans.out))
    except Problems as error:
        faults = list(error.problems)
        return Gate("facts", Outcome.FAIL, _count(faults, "problem", "problems"), tuple(faults)), None
    except DrafterError as error:
        return Gate("facts", Outcome.FAIL, "cannot be converted", (str(error),)), None
    spec, warnings = conversion.published.spec, conversion.warnings
    summary = f"{spec.kind} drafter for {plans.runtime}: {len(conversion.plan.tensors)} tensors in {plans.recipe}"
    if not warnings:
        return Gate("facts", Outcome.PASS, summary), conversion
    outcome = Outcome.FAIL if plans.strict else Outcome.ADVICE
    return Gate("facts", outcome, f"{summary}; {_count(list(warnings), 'warning', 'warnings')}", warnings), conversion


def tokenizer_gate(conversion: Conversion) -> Gate:
    """A2-23: the ordered vocabulary's hash tells a pair that does not belong together for certain."""
    published, name = conversion.published, "tokenizer"
    root, path, target = published.checkpoint.root, published.target_path, published.target
    if path is None or target is None:
        return Gate(name, Outcome.SKIPPED, "no target given to compare with (--target)")
    if path.exists() and path.samefile(root):
        return Gate(name, Outcome.PASS, "the checkpoint is its own target")
    if not (root / "tokenizer.json").is_file():
        return Gate(name, Outcome.PASS, f"none of the drafter's own: it takes {target.name}'s")
    try:
        ours = read_tokenizer(root, published.spec.vocab_size)
        theirs = target_tokenizer(path, target.vocab_size)
    except DrafterError as error:
        return Gate(name, Outcome.UNDECIDED, "cannot be compared", (str(error),))
    hashes = f"{ours.vocab_sha256[:12]}... and {theirs.vocab_sha256[:12]}..."
    if ours.vocab_sha256 == theirs.vocab_sha256:
        return Gate(
            name, Outcome.PASS, f"{target.name}'s: {ours.token_count} tokens, sha256 {ours.vocab_sha256[:12]}..."
        )
    return _other_tokens({entry.key: entry for entry in ours.keys}, theirs, target, hashes)


def _other_tokens(keys: dict[str, KeyValue], theirs: Tokenizer, target: Target, hashes: str) -> Gate:
    texts = keys[TOKENS].value
    assert isinstance(texts, tuple)
    remarks = list(different_tokens(keys, texts, None, theirs, target))
    outcome = Outcome.FAIL if any(remark.outcome is Outcome.FAIL for remark in remarks) else Outcome.ADVICE
    details = (f"sha256 of the vocabularies: {hashes}", *(remark.text for remark in remarks))
    return Gate("tokenizer", outcome, f"not {target.name}'s", details)


# --- would it be served ---


def served(cell: Cell, spec: DrafterSpec, plans: Plans) -> Iterator[Gate]:
    """Do the settings for serving contradict the drafter or each other, and can the engine do it."""
    way = way_of(CELLS[cell.kind, LLAMA_CPP])
    yield _settings(way, source_of_way(cell, spec, plans.out).limit, plans)
    yield _batching(plans)
    yield _engine(way, plans)


def _settings(way: str, limit: int | None, plans: Plans) -> Gate:
    """T-41: each alone may be right."""
    faults = list[str]()
    mode = canonical(plans.mode) or AUTO
    drafters = [named for named in ways_of(mode) if named in DRAFTERS]
    faults += [f"--mode: unknown {word!r}" for word in unknown(plans.mode)]
    if len(drafters) > 1:
        faults.append(f"--mode {mode}: {' and '.join(drafters)} exclude each other: a server has one drafter")
    faults += [f"--mode {mode}: this is a drafter of {way}, not of {other}" for other in drafters if other != way]
    if plans.draft_length is not None and limit is not None and plans.draft_length > limit:
        faults.append(f"--draft-length {plans.draft_length}: the drafter gives {limit} at most")
    if plans.draft_length is not None and mode != AUTO and not drafters:
        faults.append(f"--draft-length {plans.draft_length}: --mode {mode} uses no drafter, so it does nothing")
    if faults:
        return Gate("settings", Outcome.FAIL, _count(faults, "contradiction", "contradictions"), tuple(faults))
    return Gate("settings", Outcome.PASS, "do not contradict each other" if mode != OFF else "drafting is off")


def _batching(plans: Plans) -> Gate:
    """T-36, A2-20: a warning, as it works and may cost more than it brings."""
    if plans.parallel <= 1:
        return Gate("batching", Outcome.PASS, "one sequence at a time")
    said = "drafts of all sequences are verified together, so that each costs more: measure before you keep it"
    outcome = Outcome.FAIL if plans.strict else Outcome.ADVICE
    return Gate("batching", outcome, f"a drafter beside {plans.parallel} sequences at a time", (said,))


def _engine(way: str, plans: Plans) -> Gate:
    """What the server's --help says; three answers (T-33)."""
    if plans.runtime != LLAMA_CPP:
        return Gate("engine", Outcome.SKIPPED, f"{plans.runtime} is not asked what it can do")
    try:
        server = find_server(plans.server)
    except MissingEngine as error:
        missing = Outcome.FAIL if plans.server is not None else Outcome.SKIPPED
        return Gate("engine", missing, "no llama-server to ask", (str(error),))
    found, name = can(server.abilities, way), f"llama-server {server.version}"
    outcomes = {Known.YES: Outcome.PASS, Known.NO: Outcome.FAIL, Known.UNKNOWN: Outcome.UNDECIDED}
    said = {Known.YES: "can draft so", Known.NO: "cannot draft so", Known.UNKNOWN: "does not tell whether it can"}
    details = (found.reason,) if found.reason else ()
    return Gate("engine", outcomes[found.known], f"{name} {said[found.known]}: {way}", details)


# --- is there room ---


def _disk(conversion: Conversion, plans: Plans) -> Gate:
    needed = int(conversion.n_bytes * ROOM)
    free = shutil.disk_usage(plans.out.parent).free
    summary = f"{_size(needed)} for {plans.out.name}, {_size(free)} free"
    return Gate("disk", Outcome.PASS if free > needed else Outcome.FAIL, summary)


def _size(n_bytes: int) -> str:
    unit, name = next((unit, name) for unit, name in UNITS if n_bytes >= unit or unit == 1)
    return f"{n_bytes / unit:.1f} {name}" if unit > 1 else f"{n_bytes} {name}"
