"""Finding: which files below a folder belong together, whatever stands in the way of looking.

Layouts: huggingface_hub's cache (docs: guides/manage-cache; blobs by hash, snapshots of links to them), LM Studio's
publisher/repository/file, Ollama's blobs (`sha256-...`, named by `manifests`; docs/import.md), and plain folders.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_model import PART
from convert_drafter.converters.holes import has_holes
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.repository import source_of
from convert_drafter.converters.scan.found import Skipped
from convert_drafter.converters.weight_files import INDEX, WEIGHTS

GGUF = ".gguf"
BLOB = re.compile(r"sha256-[0-9a-f]{64}")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
OLLAMA_MODEL = "application/vnd.ollama.image.model"
MANIFEST_LIMIT = 2**20  # bytes


@dataclass(frozen=True)
class Place:
    """Files that are one artifact: a folder of safetensors, or a GGUF with the parts it was split into.

    `name` is what a manifest calls it; `absent` are the parts that are not there; `origin` is repository and revision
    on the hub, as far as the folder tells.
    """

    path: Path
    files: tuple[Path, ...]
    folder: bool
    name: str = ""
    absent: tuple[str, ...] = ()
    origin: tuple[str | None, str | None] = (None, None)


@dataclass
class Walk:
    """One walk; `skipped` fills while `places` are taken."""

    root: Path
    skipped: list[Skipped] = field(default_factory=list)
    _seen: dict[tuple[int, int], Path] = field(default_factory=dict)

    def places(self) -> Iterator[Place]:
        """Every artifact, in the order of paths; each folder is entered once, whatever links lead to it."""
        waiting = [self.root]
        while waiting:
            folder = waiting.pop()
            entries = self._entries(folder)
            below = [Path(entry.path) for entry in entries if self._enters(entry)]
            waiting += reversed(below)
            files = [entry for entry in entries if not _is_folder(entry)]
            indexed = any(entry.name.endswith(INDEX) for entry in files)
            yield from _artifacts(folder, [Path(entry.path) for entry in files if self._readable(entry)], indexed)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What lies in a folder that was not looked at yet."""
        try:
            state = folder.stat()
            here = (state.st_dev, state.st_ino)
            if here in self._seen:
                self._link(folder, self._seen[here])
                return []
            self._seen[here] = folder
            with os.scandir(folder) as found:
                return sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self.skipped.append(Skipped(folder, f"cannot be read: {error.strerror or error}"))
            return []

    def _link(self, folder: Path, first: Path) -> None:
        loop = first in folder.parents
        what = f"a link back to {first}" if loop else f"a link to {first}, whose models are listed there"
        self.skipped.append(Skipped(folder, what))

    def _enters(self, entry: os.DirEntry[str]) -> bool:
        return _is_folder(entry) and entry.name not in (".git", "__pycache__")

    def _readable(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file has to be looked at; a link to nothing and a download that was not finished are told."""
        path = Path(entry.path)
        if entry.name.endswith(UNFINISHED):
            self.skipped.append(Skipped(path, "a download or a conversion that was not finished: start it again"))
            return False
        if not entry.name.lower().endswith((GGUF, WEIGHTS)) and not BLOB.fullmatch(entry.name):
            return False
        try:
            wrong = _unusable(path)
        except OSError as error:
            wrong = f"cannot be read: {error.strerror or error}"
        if wrong:
            self.skipped.append(Skipped(path, wrong))
        return not wrong


def _unusable(path: Path) -> str:
    """Why a file's bytes cannot be asked for; a pipe would be waited for without end."""
    if not path.exists():
        return f"a link to nothing ({_aim(path)}): download it again or remove it"
    if has_holes(path):
        return "some bytes of a file on the hub, which this program fetched for itself"
    return "" if path.is_file() else "a device or a pipe, expected a file"


def _artifacts(folder: Path, files: list[Path], indexed: bool) -> Iterator[Place]:
    if not files and not indexed:
        return
    origin = _origin(folder)
    weights = tuple(path for path in files if path.name.lower().endswith(WEIGHTS) and path.name[0] != ".")
    if weights or indexed:  # an index without any of its shards is a checkpoint that misses all of them
        yield Place(folder, weights, folder=True, origin=origin)
    for place in _ggufs([path for path in files if path.name.lower().endswith(GGUF)]):
        yield replace(place, origin=origin)
    blobs = [path for path in files if BLOB.fullmatch(path.name) and _begins_as_gguf(path)]
    names = _manifest_names(folder.parent / "manifests") if blobs else {}
    for path in blobs:
        yield Place(path, (path,), folder=False, name=names.get(path.name.replace("-", ":", 1), ""))


def _origin(folder: Path) -> tuple[str | None, str | None]:
    try:
        return source_of(folder)
    except OSError:  # notes of a download that may not be read
        return None, None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that goes round in a circle
        return False


def _aim(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return "unreadable"


def _ggufs(files: list[Path]) -> Iterator[Place]:
    """Files alone, and the parts of one model together, with the numbers of those that are not there."""
    split: dict[tuple[str, int], dict[int, Path]] = {}
    for path in files:
        if match := PART.fullmatch(path.name):
            split.setdefault((match["stem"], int(match["count"])), {})[int(match["number"])] = path
        else:
            yield Place(path, (path,), folder=False)
    for (stem, count), parts in split.items():
        ordered = tuple(parts[number] for number in sorted(parts))
        absent = tuple(f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, min(count, 99_999) + 1) if i not in parts)
        yield Place(ordered[0], ordered, folder=False, absent=absent)


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return True  # to be told of when it is looked at


def _manifest_names(folder: Path) -> dict[str, str]:
    """Names of Ollama's blobs: .../library/MODEL/TAG lists the digests of its layers."""
    names: dict[str, str] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        try:
            if not path.is_file() or path.stat().st_size > MANIFEST_LIMIT:
                continue
            layers = json_object(str(path), path.read_bytes()).get("layers")
        except (OSError, WrongInput, json.JSONDecodeError):
            continue  # it only gives a name
        for layer in layers if isinstance(layers, list) else ():
            if isinstance(layer, dict) and layer.get("mediaType") == OLLAMA_MODEL:
                names.setdefault(str(layer.get("digest")), f"{path.parent.name}-{path.name}")
    return names
