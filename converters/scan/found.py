"""What a scan finds: artifacts, the models they are quants of, and which drafter goes with which target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


class What(StrEnum):
    """What an artifact is for. A part (projector, adapter, importance matrix) serves another model."""

    TARGET = "target"
    DRAFTER = "drafter"
    PART = "part"
    UNKNOWN = "unknown"


class By(StrEnum):
    """What told it: tensors go before a header or config, and a name comes last."""

    TENSORS = "tensors"
    HEADER = "header"
    CONFIG = "config"
    NAME = "name"


@dataclass(frozen=True)
class Shape:
    """What has to agree between a drafter and its target; None where the headers do not tell.

    Of a drafter `hidden_size`, `depth` and `vocab_size` are those of the target it reads; `layers` are its own.
    """

    hidden_size: int | None = None
    depth: int | None = None
    vocab_size: int | None = None
    vocab_sha256: str | None = None
    captures: tuple[int, ...] = ()
    layers: int | None = None


@dataclass(frozen=True)
class Head:
    """An MTP head inside its target. `kind` is "" where it is none that is converted, and `note` says why."""

    kind: str
    note: str = ""


@dataclass(frozen=True)
class Artifact:
    """One copy of a model: a folder of safetensors, or a GGUF with all its parts.

    `path` is the folder or the first file; `also` are other paths to the same files; it is `complete` unless parts of
    it are not there. `weights` counts without embedding and output head, None where the headers do not tell; `bits` are
    the bits of one of them in a matrix, on average. `recorded` is what it notes of its target: `repository`, `name`,
    `architecture`. `faults` are what has to be mended, each with how; `notes` are worth knowing, and `mend` is the
    command that makes of it what llama.cpp loads. `runtime` is the one whose dialect a drafter's GGUF is in. `lacks` is
    the note, if one of them says what a drafter alone does not tell and its target may.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    n_bytes: int
    name: str
    what: What
    told_by: By
    kind: str = ""
    architecture: str = ""
    quant: str = ""
    weights: int | None = None
    bits: float | None = None
    shape: Shape = Shape()
    runtime: str = ""
    head: Head | None = None
    repository: str | None = None
    revision: str | None = None
    recorded: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    also: tuple[Path, ...] = ()
    complete: bool = True
    mend: str = ""
    lacks: str = ""
    standalone_deploy: bool | None = None
    ui_role: str | None = None

    @property
    def other_notes(self) -> tuple[str, ...]:
        """Without the one that its target may settle."""
        return tuple(note for note in self.notes if note != self.lacks)


@dataclass(frozen=True)
class Model:
    """All copies of one model. `key` is shared by their names; two models of one key differ in what they are."""

    key: str
    name: str
    what: What
    kind: str
    variants: tuple[Artifact, ...]

    @property
    def n_bytes(self) -> int:
        return sum(variant.n_bytes for variant in self.variants)


@dataclass(frozen=True)
class Candidate:
    """A target that a drafter might belong to, what speaks for it and what against it."""

    target: Model
    fits: tuple[str, ...]
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A drafter and its target, or why it has none here.

    `basis` is what told the pair: inside, recorded, catalog, shapes or name; "" without a target, and then `candidates`
    may be some.
    """

    drafter: Artifact
    target: Model | None
    basis: str
    evidence: tuple[str, ...]
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """What could not be looked at, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    """Everything below `root`."""

    root: Path
    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]
    skipped: tuple[Skipped, ...]
    catalog: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return tuple(variant for model in self.models for variant in model.variants)
