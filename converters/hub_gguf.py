"""GGUFs on the Hugging Face hub: which file is meant, and only those of its bytes that are needed.

Where a header or a few tensors are enough, they lie in a file with holes, whose offsets are the whole one's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_model import PART, parts_of
from convert_drafter.converters.gguf_read import GGUFFile, walk_metadata
from convert_drafter.converters.holes import FileWithHoles, Start, has_holes
from convert_drafter.converters.repository import (
    GGUF,
    LIBRARY,
    WATCH,
    Contents,
    Repository,
    contents,
    hub_errors,
    quiet,
    reader,
    repository_of,
    shown,
    snapshots,
)
from convert_drafter.converters.weight_files import INDEX, WEIGHTS

PARTS = "ggufs"  # of our folders the one for files with holes
NEAR_ALL = 0.9  # of the bytes of a file's tensors: then the whole is fetched, which other programs can use as well
NO_MODELS = ("mmproj", "imatrix")  # beside models, and taken only by their names, as llama.cpp's -hf has it


@dataclass(frozen=True)
class RemoteGGUF:
    """A file by its path in the repository at a commit; `count` is the number of parts of which it is the first."""

    repository: Repository
    commit: str
    file: str
    count: int = 1

    def __str__(self) -> str:
        return str(replace(self.repository, folder="", gguf=self.file))

    @property
    def pinned(self) -> Repository:
        return Repository(self.repository.id, self.commit)

    @property
    def with_holes(self) -> Path:
        return snapshots(self.pinned, PARTS) / self.file


# --- what commands ask for ---


def holds_gguf(place: Path) -> bool:
    """Whether a repository's GGUF is meant; False for a path, and for a repository that holds a checkpoint."""
    repository = repository_of(place)
    if repository is None:
        return False
    with hub_errors(repository):
        return means_gguf(contents(repository))


def fetch_header(place: Path) -> Path:
    """A file whose metadata can be read, of a repository's GGUF or `place` itself. Raises `WrongInput`."""
    with _meant(place) as found:
        return place if found is None else header_of(found)


def fetch_tensors(place: Path, file: GGUFFile) -> GGUFFile:
    """The same file, whose header was fetched, with the bytes of its tensors; it may name a part of them only."""
    repository = repository_of(place)
    if repository is None or not has_holes(file.path):
        return file
    found = _fetched(repository, file.path)
    wanted = [(file.offsets[name], file.offsets[name] + tensor.n_bytes) for name, tensor in file.tensors.items()]
    data = file.path.stat().st_size - min(file.offsets.values(), default=0)
    with hub_errors(repository):
        if sum(end - start for start, end in wanted) > NEAR_ALL * data:
            return replace(file, path=whole_of(found))
        with _held(found) as partly:
            partly.fill(wanted, WATCH.get())
    return replace(file, path=partly.path)


def fetch_whole(place: Path) -> Path:
    """The whole file, in huggingface_hub's cache. Raises `WrongInput`."""
    with _meant(place) as found:
        return place if found is None else whole_of(found)


def _fetched(repository: Repository, path: Path) -> RemoteGGUF:
    """What a file with holes is of: the commit that its header was fetched from, whatever is on the branch now."""
    commit, _, file = path.as_posix().rpartition(f"/{repository.cached}/snapshots/")[2].partition("/")
    return RemoteGGUF(repository, commit, file)


@contextmanager
def _meant(place: Path) -> Iterator[RemoteGGUF | None]:
    """The GGUF that is meant, None for a path; what the hub refuses is told."""
    repository = repository_of(place)
    if repository is None:
        _require_spelling(place)
        yield None
        return
    with hub_errors(repository):
        yield choose(contents(repository))


def _require_spelling(place: Path) -> None:
    """A slash before a file's name is the disk's: said where it may have been the hub that was meant."""
    if place.suffix == GGUF and len(place.parts) > 2 and not place.is_absolute() and not place.exists():
        name = f"{'/'.join(place.parts[:2])}:{'/'.join(place.parts[2:])}"
        raise WrongInput(f"{place}: there is nothing of this name; a GGUF in a repository on the hub: {name}")


# --- which file ---


def means_gguf(found: Contents) -> bool:
    """A checkpoint goes before GGUFs beside it, unless one of them is named."""
    published = found.beside(WEIGHTS) or found.beside(INDEX)
    return bool(found.repository.gguf) or (bool(found.below(GGUF)) and not published)


def choose(found: Contents) -> RemoteGGUF:
    """The one that is meant: named, by its quant, or the only one. Raises `WrongInput` listing what there is."""
    models = dict(_models(found.below(GGUF)))
    repository = found.repository
    fits = _fitting(list(models), repository.gguf, repository)
    if len(fits) == 1:
        return RemoteGGUF(repository, found.commit, fits[0], models[fits[0]])
    there = fits or list(models)
    name = repository.id
    if not there:
        raise WrongInput(f"{repository}: found no GGUF, expected one; there is {shown(found.below('')) or 'nothing'}")
    what = f"found {len(fits)} GGUFs" if fits else f"no GGUF is named so, or of this quant, among {len(models)}"
    raise WrongInput(f"{repository}: {what}, expected one: give {name}:FILE or :QUANT; there are: {shown(there)}")


def _models(files: Iterable[str]) -> Iterator[tuple[str, int]]:
    """(file, number of parts), a set of parts by its first."""
    for file in files:
        split = PART.fullmatch(file)
        if split is None or int(split["number"]) == 1:
            yield file, 1 if split is None else int(split["count"])


def _fitting(files: Sequence[str], wanted: str, repository: Repository) -> list[str]:
    """The files that a name means, by the first reading of it that any has."""
    models = [file for file in files if not any(word in file.rpartition("/")[2] for word in NO_MODELS)]
    if not wanted:
        return models or list(files)
    word, places = re.escape(wanted), (wanted, repository.within(wanted))
    if exact := [file for file in files if file in places]:
        return exact
    ends = rf"(^|.*[-._/]){word}(-\d{{5}}-of-\d{{5}})?\.gguf"
    for pattern in (ends, rf"(.*/)?{word}/[^/]+", rf"(^|.*[-._/]){word}[-./].*"):
        if fits := [file for file in models if re.fullmatch(pattern, file, re.IGNORECASE)]:
            return fits
    return []


# --- its bytes ---


def whole_of(remote: RemoteGGUF, in_parts: bool = False) -> Path:
    """In huggingface_hub's cache: <cache>/models--org--name/snapshots/<commit>/<file>; of several parts the first."""
    if remote.count > 1 and not in_parts:
        stem = PART.fullmatch(remote.file)
        pattern = f"{stem['stem']}-*.gguf" if stem else remote.file
        said = f"`hf download {remote.pinned.id} --include '{pattern}'`, then `llama-gguf-split --merge`"
        raise WrongInput(f"{remote}: a model in {remote.count} parts, expected one file: {said}")
    quiet()
    first, *_ = (_download(remote.pinned, path.as_posix()) for path in parts_of(Path(remote.file)))
    return first


def _download(pinned: Repository, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(pinned.id, file, revision=pinned.revision, library_name=LIBRARY))


def header_of(remote: RemoteGGUF) -> Path:
    """The file with everything before its tensors' data; the whole where it was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(remote.pinned.id, remote.file, revision=remote.pinned.revision)
    if isinstance(cached, str):
        return Path(cached)
    with _held(remote) as partly:
        if not partly.complete_header:
            start = Start(partly)
            try:
                walk_metadata(Path(str(remote)), start.read, partly.size)
            except WrongInput:
                if start.failed:
                    raise  # else whoever reads the file finds the same fault of it
            partly.complete_header = True
            partly.record()
    return partly.path


@contextmanager
def _held(remote: RemoteGGUF) -> Iterator[FileWithHoles]:
    """The file with holes, made where there is none; nobody else writes it meanwhile."""
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    path = remote.with_holes
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        partly = FileWithHoles(str(remote), path, reader(remote.pinned, remote.file))
        if not partly.ranges:
            url = hf_hub_url(remote.pinned.id, remote.file, revision=remote.pinned.revision)
            size = get_hf_file_metadata(url).size
            if size is None:
                raise WrongInput(f"{remote}: the server tells no size, expected one; hf download it")
            partly.make(size)
        yield partly


__all__ = ["fetch_header", "fetch_tensors", "fetch_whole", "holds_gguf"]
