"""Card: the README.md of a repository of drafter GGUFs, from what the files themselves and `verify` say.

Nothing in it is made up: what a file does not say is left out, a measurement that was not given is not claimed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.file_hash import Advance, hash_file
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.plan import type_facts
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.repository import GGUF, Repository, first_line, quiet
from convert_drafter.converters.roles import role_name
from convert_drafter.converters.type_choice import Candidate, choose_types
from convert_drafter.quant import TYPES

VERDICT, VERDICT_VERSION = "convert-drafter/verdict", 1
SAME = ("drafter.kind", "drafter.source.repository", "drafter.source.revision", "drafter.source.config_sha256")


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
    names = [drafter.file.path.name for drafter in drafters]
    if twice := next((path for path in paths if names.count(path.name) > 1), None):
        raise WrongInput(f"{twice}: its name is another file's as well, expected names of their own in one repository")
    measured = _verdicts(verdicts, [drafter.file.path for drafter in drafters])
    sums = [hash_file(drafter.file.path, advance=advance).sha256 for drafter in drafters]
    files = (
        CardFile(drafter, sha256, tuple(measured.get(drafter.file.path.name, ())))
        for drafter, sha256 in zip(drafters, sums, strict=True)
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


def pinned(file: CardFile, what: str) -> str | None:
    """What was fetched, as a command takes it."""
    repository, revision, place = (file.says(f"drafter.{what}.{key}") for key in ("repository", "revision", "path"))
    if repository is None:
        return None
    folder, gguf = ("", place) if place is not None and place.endswith(GGUF) else (place, "")
    return str(Repository(repository, revision, folder or "", gguf or ""))


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

    What goes up is what the page has the sums of: the hub refuses another content. Raises `WrongInput` with what it
    said.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    quiet()
    names = ", ".join(f.path.name for f in card.files)
    try:
        additions = [_addition(file) for file in card.files]
        additions.append(CommitOperationAdd("README.md", text.encode()))
        address = HfApi().create_repo(repository, private=private, exist_ok=True)
        HfApi().create_commit(repository, additions, commit_message=f"Add {names}")
    # the last two are how huggingface_hub tells of a file that could not be sent, and of what a storage refused
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise WrongInput(f"--push {repository}: {_said(error)}; {_advice(error)}") from error
    return str(address)


def _addition(file: CardFile) -> Any:
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(file.path.name, str(file.path))
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition


def _said(error: BaseException) -> str:
    """The first line of an error and of what caused it."""
    first = first_line(error)
    return first if error.__cause__ is None or _status(error) is not None else f"{first} {_said(error.__cause__)}"


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _advice(error: BaseException) -> str:
    """By the status that is at the bottom of it."""
    status, cause = _status(error), error.__cause__
    if status is None and cause is not None:
        return _advice(cause)
    if status in (401, 403, 404) or (status is None and re.search(r"\b40[134]\b", str(error))):  # xet tells no status
        return "`hf auth login` or HF_TOKEN with the right to write there"
    if status is not None and status < 500:
        return "nothing was committed; has a file changed meanwhile? run it again"
    return "nothing was committed; run it again: what arrived whole is not sent twice"
