"""The files of a published checkpoint: where its weights and config lie, and which of the shards are needed.

Only the index is read here, so that a part of a large model can be had without opening, or having, the rest of it.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.json_text import json_object

WEIGHTS, INDEX, CONFIG = ".safetensors", ".safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLE = "pickle files are never opened"
PART = re.compile(r"(.*)-\d{1,9}-of-(\d{1,9})\.safetensors")
MEND = "download the file again or use another release"
Select = Callable[[Collection[str]], Collection[str]]  # of all tensors' names, those that are needed


def everything(names: Collection[str]) -> Collection[str]:
    return names


@dataclass(frozen=True)
class WeightFiles:
    """`files` are to be opened; `weight_map`, where there is an index, says what lies in them.

    `others` are the tensors of shards that are not opened, `unused` weight files that the index does not name.
    """

    folder: Path
    files: tuple[Path, ...]
    weight_map: dict[str, str] | None = None
    others: tuple[str, ...] = ()
    unused: tuple[Path, ...] = ()


def find_weights(source: Path, select: Select) -> WeightFiles:
    """The weight files of a folder or of one file. Raises `WrongInput`, `Problems` naming shards that are absent."""
    if not source.is_dir():
        if source.suffix == WEIGHTS and source.exists():
            return WeightFiles(source.parent, (source,))
        raise WrongInput(f"{source}: {_no_source(source)}")
    below = sorted(filter(Path.is_dir, source.iterdir()))
    folders = [folder for folder in (source, *below) if files_in(folder, (INDEX, WEIGHTS))]
    if not folders:
        looked = f"looked for *{INDEX}, *{WEIGHTS} and one sub-folder that holds them"
        raise WrongInput(f"{source}: no weights: {looked}; found {names(files_in(source, PICKLES))}; {NO_PICKLE}")
    if folders[0] != source and len(folders) > 1:
        raise WrongInput(f"{source}: found weights in {names(folders)}, expected one sub-folder: give the right one")
    return _weights_in(folders[0], select)


def _no_source(source: Path) -> str:
    """Why this is no checkpoint, and what to give."""
    wanted = f"expected a checkpoint's folder or its {WEIGHTS} file"
    if not source.exists():
        return f"there is nothing of this name; {wanted}, or a repository on the hub: ORG/NAME"
    if source.suffix == ".gguf":
        return "is a GGUF already; expected the published checkpoint, a folder with config.json and safetensors"
    pickle = f" ({NO_PICKLE})" if source.suffix in PICKLES else ""
    return f"{wanted}{pickle}; for a file beside config.json give the folder"


def _weights_in(folder: Path, select: Select) -> WeightFiles:
    indexes, weights = files_in(folder, INDEX), files_in(folder, WEIGHTS)
    if len(indexes) > 1:
        raise WrongInput(f"{folder}: found several indexes ({names(indexes)}), expected one: remove the stale one")
    if not indexes:
        return WeightFiles(folder, weights)
    where = str(indexes[0])
    weight_map = json_object(where, indexes[0].read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WrongInput(f"{where}: weight_map: found {reprlib.repr(weight_map)}, expected tensors and shards; {MEND}")
    # a shard can only be a plain name in this folder
    places = {name: file if isinstance(file, str) else reprlib.repr(file) for name, file in weight_map.items()}
    shards = {places[name] for name in select(places)}
    if missing := sorted(shards - {path.name for path in weights}):
        raise Problems(where, [f"shard {shard!r}: not found beside the index; download it" for shard in missing])
    unused = tuple(path for path in weights if path.name not in places.values())
    opened = {name: file for name, file in places.items() if file in shards}
    others = tuple(name for name in places if name not in opened)
    return WeightFiles(folder, tuple(folder / shard for shard in sorted(shards)), opened, others, unused)


def find_config(source: Path, folder: Path) -> Path:
    """config.json beside the weights, or above them when they were found in a sub-folder."""
    places = dict.fromkeys([folder / CONFIG, (source if source.is_dir() else folder) / CONFIG])
    for place in filter(Path.exists, places):
        return place
    raise WrongInput(f"{' or '.join(map(str, places))}: not found; download it with the weights")


def missing_parts(files: tuple[Path, ...]) -> list[str]:
    """Without an index the file names are the only witness of a shard that was not downloaded."""
    parts = Counter(match.groups() for file in files if (match := PART.fullmatch(file.name)))
    return [
        f"{stem}-*{WEIGHTS}: found {found} of {int(count)} parts; give the folder that holds all of them"
        for (stem, count), found in parts.items()
        if found != int(count)
    ]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WrongInput(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def files_in(folder: Path, suffixes: str | tuple[str, ...]) -> tuple[Path, ...]:
    """Files by suffix, hidden ones aside; a dangling link stays in, so that it is reported and not skipped."""
    found = (path for path in folder.iterdir() if path.name.endswith(suffixes) and not path.name.startswith("."))
    return tuple(sorted(path for path in found if not path.is_dir()))
