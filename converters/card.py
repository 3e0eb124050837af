"""Card: the README.md of a repository of drafter GGUFs, from what the files themselves and `verify` say.

Nothing in it is made up: what a file does not say is left out, a measurement that was not given is not claimed.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.plan import type_facts
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.roles import role_name
from convert_drafter.converters.type_choice import Candidate, choose_types
from convert_drafter.quant import TYPES

VERDICT, VERDICT_VERSION = "convert-drafter/verdict", 1
CHUNK = 2**22  # bytes hashed at once
SAME = ("drafter.kind", "drafter.source.repository", "drafter.source.revision", "drafter.source.config_sha256")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class CardFile:
    """One file of the repository: what it is, its hash, and what `verify` measured with it."""

    drafter: DrafterFile
    sha256: str
    verdicts: tuple[Mapping[str, Any], ...]

    @property
    def path(self) -> Path:
        return self.drafter.file.path

    @property
    def n_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def bits(self) -> float:
        tensors = self.drafter.file.tensors.values()
        return 8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)

    def says(self, key: str) -> str | None:
        entry = self.drafter.file.keys.get(key)
        return None if entry is None else str(entry.value)

    def lists(self, key: str) -> tuple[str, ...]:
        entry = self.drafter.file.keys.get(key)
        return tuple(map(str, entry.value)) if entry is not None and isinstance(entry.value, tuple) else ()


@dataclass(frozen=True)
class Card:
    """The files of one repository, the first of which speaks for all."""

    files: tuple[CardFile, ...]
    license: str | None = None

    @property
    def first(self) -> CardFile:
        return self.files[0]

    @property
    def source(self) -> str | None:
        return pinned(self.first, "source")

    @property
    def target(self) -> str | None:
        return pinned(self.first, "target") or self.first.says("drafter.target.name")


def read_card(
    paths: Sequence[Path],
    verdicts: Sequence[Path] = (),
    license: str | None = None,
    advance: Advance = lambda count: None,
) -> Card:
    """Files and what was measured of them; `advance` hears of bytes hashed.

    Raises `WrongInput` for what is no drafter's GGUF, for files of different drafters, and for a verdict of none of
    these files.
    """
    drafters = [read_drafter_file(path) for path in paths]
    for drafter in drafters[1:]:
        _require_same(drafters[0], drafter)
    measured = _verdicts(verdicts, [drafter.file.path for drafter in drafters])
    files = (
        CardFile(drafter, _sha256(drafter.file.path, advance), tuple(measured.get(drafter.file.path.name, ())))
        for drafter in drafters
    )
    return Card(tuple(files), license)


def _require_same(one: DrafterFile, other: DrafterFile) -> None:
    """A repository is of one drafter: another quant of it is welcome, another model is not."""
    for key in (*SAME, "general.architecture"):
        found, expected = (f.file.keys[key].value if key in f.file.keys else None for f in (other, one))
        if found != expected:
            raise WrongInput(
                f"{other.file.path}: {key}: found {found!r}, expected {expected!r} as {one.file.path} has:"
                " a card is of one drafter's files"
            )


def _verdicts(paths: Sequence[Path], files: Sequence[Path]) -> dict[str, list[Mapping[str, Any]]]:
    """What `verify --json` wrote, by the name of the file it is of."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    known = {file.name for file in files}
    for path in paths:
        with file_access(path, "read"):
            verdict: dict[str, Any] = json_object(str(path), path.read_bytes())
        said = (verdict.get("schema"), verdict.get("version"))
        if said != (VERDICT, VERDICT_VERSION):
            raise WrongInput(f"{path}: schema and version: found {said}, expected {(VERDICT, VERDICT_VERSION)}")
        name = Path(str(verdict.get("file"))).name
        if name not in known:
            raise WrongInput(f"{path}: file: found {name!r}, expected one of {', '.join(sorted(known))}")
        found.setdefault(name, []).append(verdict)
    return found


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with file_access(path, "read"), path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def pinned(file: CardFile, what: str) -> str | None:
    repository, revision = (file.says(f"drafter.{what}.{key}") for key in ("repository", "revision"))
    return repository if repository is None or revision is None else f"{repository}@{revision}"


# --- how it was made ---


def recipe_of(drafter: DrafterFile) -> str | None:
    """The recipe that gives exactly these types, if one does; a file says only which family it is of."""
    facts = type_facts(drafter.spec)
    stored = {role_name(key): tensor for key, tensor in drafter.tensors.items() if tensor.type.name in TYPES}
    candidates = [Candidate(name, tensor.shape, TYPES["F32"]) for name, tensor in stored.items()]
    said = drafter.file.keys.get("general.file_type")
    for recipe in RECIPES.values():
        if said is not None and recipe.file_type == said.value:
            chosen = choose_types(recipe, candidates, facts, None)
            if [choice.type.name for choice in chosen] == [tensor.type.name for tensor in stored.values()]:
                return recipe.name
    return None


def making_command(file: CardFile) -> str | None:
    """The command that makes the file again; None where its source or its recipe is not known."""
    source, recipe = pinned(file, "source"), recipe_of(file.drafter)
    if source is None or recipe is None or file.says("drafter.redialect.from") is not None:
        return None
    target = pinned(file, "target")
    words = ["convert-drafter", "convert", source]
    if target is not None and target != source:
        words += ["--target", target]
    words += ["--for", file.drafter.cell.runtime, "--quant", recipe]
    words += [word for text in file.lists("drafter.source.settings") for word in ("--set", text)]
    words += [word for text in file.lists("drafter.source.ignored") for word in ("--ignore-tensor", text)]
    return shlex.join([*words, "-o", file.path.name])


# --- to the hub ---


def push(card: Card, text: str, repository: str, private: bool = False) -> str:
    """Upload files and page as one commit, the repository made if there is none; returns its address.

    Raises `WrongInput` with what the hub said.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    additions = [CommitOperationAdd(f.path.name, str(f.path)) for f in card.files]
    additions.append(CommitOperationAdd("README.md", text.encode()))
    names = ", ".join(f.path.name for f in card.files)
    try:
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().create_commit(repository, additions, commit_message=f"Add {names}")
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise WrongInput(
            f"--push {repository}: {first}; `hf auth login` or HF_TOKEN with the right to write"
        ) from error
    return str(address)
