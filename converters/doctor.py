"""Doctor: whether a drafter's GGUF is whole, whether it is the checkpoint's, whether it is the target's.

A path goes in, gates come out. Nothing is run and nothing is printed; what no loader says aloud is said here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from convert_drafter.converters.against_source import Agreement, agreement
from convert_drafter.converters.dialects import own_part
from convert_drafter.converters.drafter_file import cell_of_file
from convert_drafter.converters.drafters import needed
from convert_drafter.converters.encoding import cores
from convert_drafter.converters.errors import Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE, file_access
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.holes import has_holes
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_header, fetch_tensors
from convert_drafter.converters.loader_keys import key_faults, provenance_faults
from convert_drafter.converters.pairing import PAIRING, check_pairing
from convert_drafter.converters.roles import Role
from convert_drafter.converters.source_facts import overruled, read_source
from convert_drafter.converters.structure import Finding, Survey, survey
from convert_drafter.converters.target import read_target
from convert_drafter.converters.tensor_errors import Comparison, Health, OnBytes, health
from convert_drafter.converters.token_ids import ids_of_file
from convert_drafter.converters.tokenizer_faults import tokenizer_faults
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.quant import I64

STRUCTURE = "structure"
MAGIC = b"GGUF"
LARGEST = 1e9  # relative error of something where the checkpoint has zeros: JSON knows no infinity


def doctor(
    path: Path,
    target: Path | None = None,
    source: Path | None = None,
    settings: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> tuple[Gate, ...]:
    """The gates "structure" and, with a target, "pairing" of a drafter's GGUF.

    With `source`, a checkpoint, structure includes that every fact and tensor is its own; `settings` correct its config
    as in a conversion. `on_bytes` hears of the bytes looked at: the file's once, with a source twice. The weights of a
    repository's file are fetched only where its header shows no fault. Raises `WrongUsage` for a folder, `WrongInput`
    for what is no drafter's GGUF and for a target or source that cannot be read.
    """
    hear: Callable[[int], None] = on_bytes or (lambda n: None)
    target = None if target is None else fetch(target, Part.CONFIG)
    file = _opened(fetch_header(path))
    if isinstance(file, Gate):
        return _alone(file, target)
    if ARCHITECTURE not in file.keys:
        missing = Finding(f"{ARCHITECTURE}: missing, expected the architecture every runtime asks for first")
        return _alone(_gate("", [missing]), target)
    cell = cell_of_file(file)
    whole, file = file, own_part(file, cell)
    found = survey(file, cell, None if target is None else read_target(target))
    if has_holes(file.path):
        if gates := _refused(found, target):
            return gates
        file = fetch_tensors(path, file)
        found = replace(found, file=file)
    source = None if source is None else fetch(source, Part.DRAFTER, needed)
    published = None if source is None else read_source(found, source, target, settings or {})
    sick = _health(file, hear)
    broken = frozenset(name for name, state in sick.items() if state.broken)
    agreed = Agreement(()) if published is None else agreement(found, published, broken, hear)
    if source is not None:
        agreed = replace(agreed, findings=(*agreed.findings, *overruled(found, source, target, settings or {})))
    structure = _structure(found, sick, agreed, source, whole)
    return (structure,) if target is None else (structure, check_pairing(found, target))


def _alone(structure: Gate, target: Path | None) -> tuple[Gate, ...]:
    skipped = Gate(PAIRING, Outcome.SKIPPED, "not asked: the file cannot be read")
    return (structure,) if target is None else (structure, skipped)


def _refused(found: Survey, target: Path | None) -> tuple[Gate, ...]:
    """What a header alone shows to be wrong; no gates where nothing is."""
    unseen = Finding("its weights were not fetched: mend this first", fault=False)
    structure = _gate(_summary(found), [*_header_findings(found), unseen])
    gates = (structure,) if target is None else (structure, check_pairing(found, target))
    return gates if any(gate.outcome is Outcome.FAIL for gate in gates) else ()


def _opened(path: Path) -> GGUFFile | Gate:
    """The file, or the gate that says where its bytes are wrong; `WrongInput` where it is no GGUF at all."""
    if path.is_dir():
        raise WrongUsage(f"{path}: is a folder, expected a drafter's GGUF; `inspect` reads checkpoints")
    try:
        return read_gguf(path)
    except WrongInput as error:
        if not path.is_file():
            raise
        with file_access(path, "read"), path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise
        lines = error.problems if isinstance(error, Problems) else (str(error).removeprefix(f"{path}: "),)
        return Gate(STRUCTURE, Outcome.FAIL, "the file is damaged", lines)


def _health(file: GGUFFile, on_bytes: OnBytes) -> dict[str, Health]:
    with cores() as run:
        return {name: health(file, stored, run, on_bytes) for name, stored in file.tensors.items()}


def _structure(found: Survey, sick: dict[str, Health], agreed: Agreement, source: Path | None, whole: GGUFFile) -> Gate:
    findings = [
        *_header_findings(found),
        *_values(found.file, sick),
        *_ids(found),
        *_bounds(whole),
        *provenance_faults(found.cell, found.file.keys),
        *agreed.findings,
    ]
    return _gate(f"{_summary(found)}{_compared(agreed.compared, source)}", findings, agreed.compared)


def _header_findings(found: Survey) -> tuple[Finding, ...]:
    keys = found.file.keys
    return (
        *found.findings,
        *key_faults(found.cell, keys, found.facts),
        *tokenizer_faults(keys, found.facts, needed=found.cell.tokenizer),
    )


def _summary(found: Survey) -> str:
    types = Counter(stored.type.name for stored in found.file.tensors.values())
    kinds = ", ".join(f"{count} {name}" for name, count in types.most_common())
    return f"{found.cell.kind} drafter for {found.cell.runtime}: {len(found.file.tensors)} tensors ({kinds})"


def _compared(compared: Iterable[Comparison], source: Path | None) -> str:
    if source is None:
        return ""
    all_of_them = list(compared)
    exact = sum(c.exact for c in all_of_them)
    if exact == len(all_of_them) > 0:
        return ", bit for bit what the checkpoint's weights encode to"
    return f"; {exact} of {len(all_of_them)} compared are bit for bit what the checkpoint's weights encode to"


def _gate(summary: str, findings: Iterable[Finding], compared: Iterable[Comparison] = ()) -> Gate:
    """Faults first, notes after them."""
    every = list(dict.fromkeys(findings))
    faults = [finding.text for finding in every if finding.fault]
    doubts = [finding.text for finding in every if finding.doubt]
    notes = [f"note: {finding.text}" for finding in every if not (finding.fault or finding.doubt)]
    tensors = [
        {
            "name": c.name,
            "type": c.type,
            "relative": min(c.relative, LARGEST),
            "allowed": c.allowed,
            "max": c.max,
            "wrong": c.too_far or c.broken_group,
        }
        for c in compared
    ]
    figures = {"tensors": tensors} if tensors else {}
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        return Gate(
            STRUCTURE, Outcome.FAIL, f"{count}; {summary}" if summary else count, (*faults, *doubts, *notes), figures
        )
    if doubts:
        return Gate(STRUCTURE, Outcome.UNDECIDED, f"{summary}; settings leave a doubt", (*doubts, *notes), figures)
    return Gate(STRUCTURE, Outcome.PASS, summary, tuple(notes), figures)


def _values(file: GGUFFile, sick: dict[str, Health]) -> Iterable[Finding]:
    for name, state in sick.items():
        stored = file.tensors[name]
        row = stored.shape[-1]
        if state.first is not None:
            place = f"row {state.first // row}, column {state.first % row}"
            count = f"{state.broken} of {stored.n_elements} weights are no finite number"
            yield Finding(f"{name} ({stored.type.name}): {count}, the first at {place}")
        elif state.zero:
            vector = "a norm of zeros silences what it scales" if len(stored.shape) == 1 else "was it ever written?"
            divides = name == Role.ROPE_FACTORS.value  # frequencies, which are no numbers then
            said = "frequencies are divided by them" if divides else vector
            yield Finding(f"{name}: all {stored.n_elements} weights are zero: {said}", fault=divides)


def _ids(found: Survey) -> Iterable[Finding]:
    """T-67: tokens of a reduced vocabulary."""
    stored, vocab = found.tensors.get((Role.DRAFT_TO_TARGET, None)), found.facts.get("vocab_size")
    if stored is not None and stored.type.name == I64.name and vocab is not None:
        yield from map(Finding, ids_of_file(found.file, stored.name, vocab))


def _bounds(file: GGUFFile) -> Iterable[Finding]:
    """The reader holds every tensor inside the file; what lies behind the last one is only told."""
    end = max((file.offsets[name] + stored.n_bytes for name, stored in file.tensors.items()), default=None)
    if end is None:
        return
    rest = file.path.stat().st_size - (end + -end % file.alignment)
    if rest > 0:
        yield Finding(f"{rest} bytes after the last tensor, which nobody reads", fault=False)
