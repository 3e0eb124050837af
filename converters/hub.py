"""The Hugging Face hub: `org/name`, `org/name@revision`, where a path may stand. Only what is needed is fetched.

Repositories, caches, tokens and offline mode are `huggingface_hub`'s own. Of a large checkpoint of which few tensors
are needed, only these are fetched, by byte ranges, into a folder beside that library's cache.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.excerpt import Excerpt, Read, plan_excerpt, read_remote_header, write_excerpt
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.weight_files import CONFIG, INDEX, WEIGHTS, Select, everything

NAME = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
SMALL = ("*.json", "*.jinja", "merges.txt", "*.model")  # configs, indexes and tokenizers; no weights
ALL_NAMES = "all-tensors.json"  # beside excerpts: what they were chosen from
TRIES = 5  # a transfer that breaks off without a byte this often has failed
LIBRARY = "convert-drafter"
Watch = Callable[[str, int, int], None]  # what is fetched, bytes that are there, bytes in all
WATCH: ContextVar[Watch] = ContextVar("WATCH", default=lambda name, done, total: None)


class Part(Enum):
    """What of a repository is needed."""

    DRAFTER = "the tensors of a drafter"
    CONFIG = "config and tokenizer"
    WHOLE = "everything"


@dataclass(frozen=True)
class Repository:
    id: str
    revision: str | None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    @property
    def folder(self) -> str:
        """As huggingface_hub names it in its cache."""
        return f"models--{self.id.replace('/', '--')}"


def repository_of(place: str | Path) -> Repository | None:
    """The repository that is meant, or None for a path: what there is on the disk goes first."""
    text = place.as_posix() if isinstance(place, Path) else place
    match = NAME.fullmatch(text)
    if match is None or Path(text).exists() or text.endswith((WEIGHTS, ".gguf", ".json")):
        return None
    return Repository(match["id"], match["revision"])


def fetch(place: Path, part: Part, select: Select = everything) -> Path:
    """The folder of what is needed of a repository, fetched where it is not there yet; any other path as it is.

    `select` chooses the tensors that a drafter needs, by the names of all; `WATCH` is told of their bytes. Raises
    `WrongInput` naming the repository, what the hub said and what to do.
    """
    repository = repository_of(place)
    if repository is None:
        return place
    with _hub_errors(repository):
        if part is Part.DRAFTER:
            return _drafter(repository, select)
        return _snapshot(repository, (*SMALL, f"*{WEIGHTS}") if part is Part.WHOLE else SMALL)


def _snapshot(repository: Repository, patterns: Sequence[str]) -> Path:
    """Files of these patterns in huggingface_hub's cache: <cache>/models--org--name/snapshots/<commit>."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return Path(snapshot_download(repository.id, revision=repository.revision, allow_patterns=list(patterns)))


def _drafter(repository: Repository, select: Select) -> Path:
    """Whole files where all of their tensors are needed, else excerpts of them."""
    from filelock import FileLock

    folder = _snapshot(repository, SMALL)
    pinned = Repository(repository.id, folder.name)
    excerpts = _excerpts_folder(pinned)
    with FileLock(excerpts.with_suffix(".lock")):  # several conversions may want the same head
        if _is_there(excerpts, select):
            return excerpts
        shards = _shards(pinned, folder)
        names = [name for tensors in shards.values() for name in tensors]
        wanted = set(select(names))
        if wanted == set(names):
            return _snapshot(pinned, [*SMALL, *shards])
        chosen = {file: wanted.intersection(tensors) for file, tensors in shards.items() if wanted & set(tensors)}
        _fetch_excerpts(pinned, excerpts, chosen)
        (excerpts / ALL_NAMES).write_text(json.dumps(names))
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):  # the config last: all is there
            if path.is_file() and not path.name.endswith(INDEX):
                shutil.copyfile(path, excerpts / path.name)
    return excerpts


def _excerpts_folder(repository: Repository) -> Path:
    """Named as the hub's cache is, so that a file made from it knows its source."""
    from huggingface_hub import cached_assets_path

    root = Path(cached_assets_path(LIBRARY, "excerpts", repository.folder)) / "snapshots"
    root.mkdir(exist_ok=True)
    return root / str(repository.revision)


def _is_there(excerpts: Path, select: Select) -> bool:
    """Whether all that is needed was fetched before; another release of this program may need other tensors."""
    if not (excerpts / CONFIG).exists():
        return False
    names = json.loads((excerpts / ALL_NAMES).read_text())
    index: Any = json_object(INDEX, (excerpts / f"model{INDEX}").read_bytes())
    return set(select(names)) == set(index["weight_map"])


def _shards(repository: Repository, folder: Path) -> dict[str, list[str]]:
    """Weight files and the tensors in each: by the index, else by the header of each file."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        found = ", ".join(path.name for path in indexes)
        raise WrongInput(f"{repository}: found several indexes ({found}), expected one; download the right files")
    if not indexes:
        if here := sorted(path.name for path in folder.glob(f"*{WEIGHTS}")):  # fetched before, and all of them needed
            return {file: [] for file in here}
        files = _weight_files(repository)
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


def _weight_files(repository: Repository) -> list[str]:
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(repository.id, revision=repository.revision)
    weights = sorted(file for file in files if file.endswith(WEIGHTS) and "/" not in file)
    if not weights:
        ggufs = [file for file in files if file.endswith(".gguf")]
        found = f"GGUFs ({', '.join(ggufs[:3])} ...), which are converted already" if ggufs else ", ".join(files[:8])
        raise WrongInput(f"{repository}: no {WEIGHTS} file; found {found or 'an empty repository'}")
    return weights


def _fetch_excerpts(repository: Repository, excerpts: Path, chosen: dict[str, set[str]]) -> None:
    """An excerpt of each shard, and an index of their tensors."""
    plans: dict[str, tuple[Excerpt, Read]] = {}
    for file, names in chosen.items():
        read = _reader(repository, file)
        plans[file] = plan_excerpt(read_remote_header(f"{repository}: {file}", read), names), read
    total, done = sum(excerpt.n_bytes for excerpt, _ in plans.values()), 0
    excerpts.mkdir(parents=True, exist_ok=True)
    _check_room(excerpts, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        WATCH.get()(str(repository), done, total)

    for file, (excerpt, read) in plans.items():
        write_excerpt(excerpt, excerpts / file, read, advance)
    index = {"weight_map": {name: file for file, names in chosen.items() for name in sorted(names)}}
    (excerpts / f"model{INDEX}").write_text(json.dumps(index, indent=1) + "\n")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WrongInput(f"{folder}: {free:,} bytes are free, expected {needed:,}; set HF_HOME to a larger disk")


# --- bytes of a file on the hub ---


def _reader(repository: Repository, file: str) -> Read:
    from huggingface_hub import hf_hub_url

    return partial(_read, hf_hub_url(repository.id, file, revision=repository.revision), f"{repository}: {file}")


def _read(url: str, where: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes start..end in pieces; a transfer that breaks off goes on where it stopped."""
    import httpx2
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    at, failures = start, 0
    while at < end:
        before, broken = at, None
        headers = {**build_hf_headers(), "range": f"bytes={at}-{end - 1}", "accept-encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            if response.status_code != httpx2.codes.PARTIAL_CONTENT:
                raise WrongInput(f"{where}: the server sends whole files only; hf download the repository instead")
            try:  # in here, because the library would take it for a failure to connect
                for piece in response.iter_raw():
                    yield piece[: end - at]
                    at += len(piece)
            except httpx2.TransportError as error:
                broken = error
        failures = failures + 1 if at == before else 0
        if failures == TRIES:
            raise WrongInput(f"{where}: the transfer broke off {TRIES} times ({broken}); try again later")


# --- what can go wrong ---


@contextmanager
def _hub_errors(repository: Repository) -> Iterator[None]:
    """Every failure of the hub as one message with what to do."""
    import httpx2
    from huggingface_hub import errors

    advice: dict[type[Exception], str] = {
        errors.GatedRepoError: "access has to be asked for on its page; then `hf auth login`, or set HF_TOKEN",
        errors.RepositoryNotFoundError: "no such repository, or a private one: check the name, `hf auth login`",
        errors.RevisionNotFoundError: f"no revision {repository.revision}: give a branch, a tag or a commit",
        errors.EntryNotFoundError: "a file is missing, or not in the cache and the hub is not asked (offline)",
        errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set: fetch it once without it",
        errors.HfHubHTTPError: "the hub refused",
        httpx2.HTTPError: "the hub cannot be reached: check the network and HF_ENDPOINT",
        errors.HFValidationError: "no name of a repository",
    }
    try:
        yield
    except tuple(advice) as error:
        what = next(text for kind, text in advice.items() if isinstance(error, kind))
        raise WrongInput(f"{repository}: no such path; from the hub: {what} ({_first(error)})") from error


def _first(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
