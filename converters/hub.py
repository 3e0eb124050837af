"""From the Hugging Face hub: `org/name`, `org/name@revision`, where a path may stand. Only what is needed is fetched.

Of a large checkpoint of which few tensors are needed, only these are fetched, by byte ranges, into a folder beside
huggingface_hub's cache; a GGUF's parts are `hub_gguf`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from glob import escape
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.excerpt import Excerpt, Read, plan_excerpt, read_remote_header, write_excerpt
from convert_drafter.converters.hub_gguf import choose, header_of, means_gguf, whole_of
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.repository import (
    GGUF,
    WATCH,
    Contents,
    Repository,
    check_room,
    contents,
    hub_errors,
    quiet,
    reader,
    repository_of,
    shown,
    snapshots,
    source_of,
)
from convert_drafter.converters.weight_files import CONFIG, INDEX, WEIGHTS, Select, everything

SMALL = ("*.json", "*.jinja", "merges.txt", "*.model")  # configs, indexes and tokenizers; no weights
ALL_NAMES = "all-tensors.json"  # beside excerpts: what they were chosen from


class Part(Enum):
    """What of a repository is needed; of one that holds GGUFs the chosen file's header, or the file."""

    DRAFTER = "the tensors of a drafter's checkpoint"
    CONFIG = "config and tokenizer, or a GGUF's header"
    SERVED = "config and tokenizer, or a whole GGUF"
    WHOLE = "everything"


def fetch(place: Path, part: Part, select: Select = everything) -> Path:
    """The folder, or the GGUF, of what is needed of a repository, fetched where it is not there yet; else `place`.

    `select` chooses the tensors that a drafter needs, by the names of all; `WATCH` is told of their bytes. Raises
    `WrongInput` naming the repository, what the hub said and what to do.
    """
    repository = repository_of(place)
    if repository is None:
        return place
    with hub_errors(repository):
        found = contents(repository)
        if means_gguf(found) and part is not Part.DRAFTER:
            chosen = choose(found)
            return header_of(chosen) if part is Part.CONFIG else whole_of(chosen, in_parts=True)
        if repository.gguf:
            raise WrongInput(f"{repository}: a GGUF, which is converted already; expected a checkpoint: ORG/NAME alone")
        if repository.within(CONFIG) not in found.files:
            raise WrongInput(f"{repository}: no {CONFIG}{_instead(found)}")
        if part is Part.DRAFTER:
            return _drafter(repository, found, select)
        return _snapshot(repository, (*SMALL, f"*{WEIGHTS}") if part is Part.WHOLE else SMALL)


def _snapshot(repository: Repository, patterns: Sequence[str]) -> Path:
    """Files of these patterns in huggingface_hub's cache: <cache>/models--org--name/snapshots/<commit>[/<folder>]."""
    from huggingface_hub import snapshot_download

    quiet()
    wanted = [f"{escape(repository.folder)}/{pattern}" if repository.folder else pattern for pattern in patterns]
    root = Path(snapshot_download(repository.id, revision=repository.revision, allow_patterns=wanted))
    return root / repository.folder


def _drafter(repository: Repository, found: Contents, select: Select) -> Path:
    """Whole files where all of their tensors are needed, else excerpts of them."""
    from filelock import FileLock

    folder = _snapshot(repository, SMALL)
    pinned = replace(repository, revision=source_of(folder)[1] or found.commit)
    excerpts = snapshots(pinned, "excerpts")
    excerpts.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(excerpts.with_name(f"{excerpts.name}.lock")):  # several conversions may want the same head
        if _is_there(excerpts, select):
            return excerpts
        shards = _shards(pinned, found, folder)
        names = [name for tensors in shards.values() for name in tensors]
        wanted = set(select(names))
        if wanted == set(names):
            return _snapshot(pinned, [*SMALL, *map(escape, shards)])
        chosen = {file: wanted.intersection(tensors) for file, tensors in shards.items() if wanted & set(tensors)}
        _fetch_excerpts(pinned, excerpts, chosen)
        (excerpts / ALL_NAMES).write_text(json.dumps(names))
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):  # the config last: all is there
            if path.is_file() and not path.name.endswith(INDEX):
                shutil.copyfile(path, excerpts / path.name)
    return excerpts


def _is_there(excerpts: Path, select: Select) -> bool:
    """Whether all that is needed was fetched before; another release of this program may need other tensors."""
    if not (excerpts / CONFIG).exists():
        return False
    names = json.loads((excerpts / ALL_NAMES).read_text())
    index: Any = json_object(INDEX, (excerpts / f"model{INDEX}").read_bytes())
    return set(select(names)) == set(index["weight_map"])


def _shards(repository: Repository, found: Contents, folder: Path) -> dict[str, list[str]]:
    """Weight files and the tensors in each: by the index, else by the header of each file."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        several = ", ".join(path.name for path in indexes)
        raise WrongInput(f"{repository}: found several indexes ({several}), expected one; download the right files")
    if not indexes:
        if here := sorted(path.name for path in folder.glob(f"*{WEIGHTS}")):  # fetched before, and all of them needed
            return {file: [] for file in here}
        files = _weight_files(found)
        headers = (read_remote_header(f"{repository}: {file}", _reader(repository, file)) for file in files)
        return {file: list(header.tensors) for file, header in zip(files, headers, strict=True)}
    weight_map = json_object(str(indexes[0]), indexes[0].read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_plain(file) for file in weight_map.values()):
        raise WrongInput(f"{repository}: {indexes[0].name}: weight_map: expected tensors and plain names of shards")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    return shards


def _is_plain(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(WEIGHTS) and "/" not in file and "\\" not in file


def _weight_files(found: Contents) -> list[str]:
    weights = sorted(file.rpartition("/")[2] for file in found.beside(WEIGHTS))
    if not weights:
        raise WrongInput(f"{found.repository}: no {WEIGHTS} file{_instead(found)}")
    return weights


def _reader(repository: Repository, file: str) -> Read:
    return reader(repository, repository.within(file))


def _instead(found: Contents) -> str:
    """What there is where a checkpoint was looked for, and how to name it."""
    folders = [folder for folder in found.folders(CONFIG) if folder != found.repository.folder]
    if folders:
        names = [str(replace(found.repository, folder=folder)) for folder in folders]
        return f"; a {CONFIG} is in sub-folders: give {shown(names)}"
    if CONFIG in found.files and found.repository.folder:
        return f"; it is at the root: give {replace(found.repository, folder='')}"
    if ggufs := found.below(GGUF):
        return f"; found GGUFs ({shown(ggufs, 3)}), which are converted already"
    return f"; found {shown(found.below('')) or 'nothing'}"


def _fetch_excerpts(repository: Repository, excerpts: Path, chosen: dict[str, set[str]]) -> None:
    """An excerpt of each shard, and an index of their tensors."""
    plans: dict[str, tuple[Excerpt, Read]] = {}
    for file, names in chosen.items():
        read = _reader(repository, file)
        plans[file] = plan_excerpt(read_remote_header(f"{repository}: {file}", read), names), read
    total, done = sum(excerpt.n_bytes for excerpt, _ in plans.values()), 0
    excerpts.mkdir(parents=True, exist_ok=True)
    check_room(excerpts, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        WATCH.get()(str(repository), done, total)

    for file, (excerpt, read) in plans.items():
        write_excerpt(excerpt, excerpts / file, read, advance)
    index = {"weight_map": {name: file for file, names in chosen.items() for name in sorted(names)}}
    (excerpts / f"model{INDEX}").write_text(json.dumps(index, indent=1) + "\n")


__all__ = ["Part", "fetch"]
