"""Repositories on the Hugging Face hub: how one is named, what is in it, bytes of its files, and what can go wrong.

Spelled ORG/NAME[/FOLDER][:GGUF][@REVISION]: a folder of a checkpoint, and as llama.cpp's -hf has it, a GGUF by its
quant; or by its name. The revision may also stand before the colon. Caches, tokens and offline mode are
`huggingface_hub`'s own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import quote

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.excerpt import Read
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.weight_files import WEIGHTS

NAME = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>[^@:\\]+))?"
    r"((@(?P<early>\w[\w./-]*))?(:(?P<gguf>[^@:\\]+))|(:(?P<named>[^@:\\]+))?(@(?P<revision>\w[\w./-]*))?)",
    re.ASCII,
)
CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(/|$)")
GGUF = ".gguf"
TRIES = 5  # a transfer that breaks off without a byte this often has failed
LIBRARY = "convert-drafter"
Watch = Callable[[str, int, int], None]  # what is fetched, bytes that are there, bytes in all
WATCH: ContextVar[Watch] = ContextVar("WATCH", default=lambda name, done, total: None)


@dataclass(frozen=True)
class Repository:
    """`folder` is where in it a checkpoint lies, `gguf` a file's name or its quant; "" where it is not said."""

    id: str
    revision: str | None
    folder: str = ""
    gguf: str = ""

    def __str__(self) -> str:
        place = f"{self.id}/{self.folder}" if self.folder else self.id
        place = f"{place}:{self.gguf}" if self.gguf else place
        return place if self.revision is None else f"{place}@{self.revision}"

    @property
    def cached(self) -> str:
        """As huggingface_hub names it in its cache."""
        return f"models--{self.id.replace('/', '--')}"

    def within(self, name: str) -> str:
        """A file's or a pattern's path in the repository."""
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(frozen=True)
class Contents:
    """What was asked for, its commit, and the paths of the repository's files."""

    repository: Repository
    commit: str
    files: tuple[str, ...]

    def below(self, ending: str) -> tuple[str, ...]:
        """Files in the meant folder or below it."""
        start = self.repository.within("")
        return tuple(file for file in self.files if file.startswith(start) and file.endswith(ending))

    def beside(self, ending: str) -> tuple[str, ...]:
        """Files in the meant folder itself."""
        start = self.repository.within("")
        return tuple(file for file in self.below(ending) if "/" not in file.removeprefix(start))

    def folders(self, name: str) -> tuple[str, ...]:
        """Folders that hold a file of this name, the root aside."""
        return tuple(file.rpartition("/")[0] for file in self.files if file.endswith(f"/{name}"))


def repository_of(place: str | Path) -> Repository | None:
    """The repository that is meant, or None for a path: what there is on the disk goes first.

    A longer path is one of the disk also where its first folder is here: something in it is spelled wrong.
    """
    text = place.as_posix() if isinstance(place, Path) else place
    match = NAME.fullmatch(text)
    if match is None or os.path.lexists(text):
        return None
    revision, gguf = match["revision"] or match["early"], match["gguf"] or match["named"] or ""
    found = Repository(match["id"], revision, match["folder"] or "", gguf)
    if not found.gguf and text.endswith((WEIGHTS, GGUF, ".json")):
        return None
    if found.folder and os.path.lexists(found.id.partition("/")[0]):
        return None
    return found if all(_is_below(part) for part in (found.folder, found.gguf) if part) else None


def contents(repository: Repository) -> Contents:
    """What is in it at its revision; where the hub cannot be asked or refuses, what it said the last time."""
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    remembered = assets(repository, "contents") / f"{quote(repository.revision or 'main', safe='')}.json"
    try:
        patience = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(repository.id, revision=repository.revision, timeout=patience)
    except RevisionNotFoundError:
        raise
    except (OfflineModeIsEnabled, HfHubHTTPError, httpx2.ConnectError, httpx2.TimeoutException):
        known = _remembered(remembered) or _in_cache(repository)  # as huggingface_hub does with whole files
        if known is None:
            raise
        return Contents(repository, known[0], tuple(known[1]))
    commit, files = str(info.sha), tuple(one.rfilename for one in info.siblings or () if _is_below(one.rfilename))
    if re.fullmatch("[0-9a-f]{40}", commit) is None:
        raise WrongInput(f"{repository}: the hub gave {commit!r} for its commit, expected 40 hexadecimal digits")
    with NamedTemporaryFile("w", dir=remembered.parent, encoding="utf-8", delete=False) as file:
        json.dump({"commit": commit, "files": files}, file)
    Path(file.name).replace(remembered)
    return Contents(repository, commit, files)


def _is_below(file: str) -> bool:
    """Whether a name that a server gave can only lie below a folder (R7)."""
    return not {"", ".", ".."} & set(file.split("/")) and "\\" not in file and file.isprintable()


def _remembered(path: Path) -> tuple[str, list[str]] | None:
    if not path.exists():
        return None
    found: Any = json_object(str(path), path.read_bytes())
    return found["commit"], found["files"]


def _in_cache(repository: Repository) -> tuple[str, list[str]] | None:
    """As `hf download` left it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repository.id, revision=repository.revision, allow_patterns=[], local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None
    return folder.name, [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def assets(repository: Repository, what: str) -> Path:
    """A folder of our own beside huggingface_hub's cache, named as that is."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path(LIBRARY, what, repository.cached))


def snapshots(pinned: Repository, what: str) -> Path:
    """Where parts of its files lie; named so that what is made from them knows its source."""
    root = assets(pinned, what) / "snapshots" / str(pinned.revision)
    root.parent.mkdir(exist_ok=True)
    return root / pinned.folder


def quiet() -> None:
    """Progress bars are for a terminal."""
    import sys

    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WrongInput(f"{folder}: {free:,} bytes are free, expected {needed:,}; set HF_HOME to a larger disk")


def shown(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, not all of them where there are many."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


# --- where a path came from ---


def source_of(folder: Path) -> tuple[str | None, str | None]:
    """(repository, revision) of a folder that came from the Hugging Face hub, as far as it tells.

    Known places: the hub cache's folder names, and the metadata `hf download --local-dir` leaves behind.
    """
    if match := _cached(folder):
        return f"{match['owner']}/{match['name']}", match["revision"]
    metadata = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if metadata.is_file():
        first = metadata.read_text(encoding="utf-8", errors="replace").splitlines()[:1]
        if first and re.fullmatch(r"[0-9a-f]{40}", first[0]):
            return None, first[0]
    return None, None


def name_of(folder: Path) -> str:
    """A model's name by the repository it came from, else by its folder."""
    repository, _ = source_of(folder)
    return repository.split("/")[-1] if repository else folder.resolve().name


def place_in_repository(path: Path) -> str:
    """Where a folder or a file from the hub's cache lies in its repository; "" for the root and for other places."""
    match = _cached(path)
    return "" if match is None else match.string[match.end() :].rstrip("/")


def _cached(path: Path) -> re.Match[str] | None:
    places = (path.absolute(), path.resolve())  # a link into the cache counts, a link out of it as well
    return next(filter(None, (CACHE_FOLDER.search(f"{place.as_posix()}/") for place in places)), None)


# --- bytes of a file on the hub ---


def reader(repository: Repository, file: str) -> Read:
    """Reads ranges of a file, by its path in the repository."""
    from huggingface_hub import hf_hub_url

    return partial(_read, hf_hub_url(repository.id, file, revision=repository.revision), f"{repository}: {file}")


def _read(url: str, where: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes start..end in pieces; a transfer that breaks off or stalls goes on where it stopped."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    at, failures, patience = start, 0, constants.HF_HUB_DOWNLOAD_TIMEOUT
    while at < end:
        before, broken = at, None
        headers = {**build_hf_headers(), "range": f"bytes={at}-{end - 1}", "accept-encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers, timeout=patience) as response:
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
def hub_errors(repository: Repository) -> Iterator[None]:
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
        raise WrongInput(f"{repository}: no such path; from the hub: {what} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says; what follows the ? of an address may be a key to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"(https?://[^\s'?]*)\?[^\s']*", r"\1", lines[0]) if lines else type(error).__name__
