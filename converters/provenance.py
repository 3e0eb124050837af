"""Our own metadata: where a file came from and which target it belongs to, for later checks to compare.

Runtimes ignore keys they do not know. Nothing here changes from one run to the next: no dates, no absolute paths.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gguf import GGUFValueType

from convert_drafter.converters.checkpoint import Checkpoint
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.target import Target
from convert_drafter.converters.tokenizer import Tokenizer

CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(/|$)")


def tool_version() -> str:
    try:
        return version("convert-drafter")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


def source_keys(checkpoint: Checkpoint, settings: Mapping[str, str], ignored: Iterable[str]) -> Iterator[KeyValue]:
    """Tool, checkpoint, and what the user changed about it."""
    yield _string("drafter.tool.version", tool_version())
    yield from _origin("drafter.source", checkpoint.root)
    yield _string("drafter.source.config_sha256", hashlib.sha256(checkpoint.config_path.read_bytes()).hexdigest())
    yield _strings("drafter.source.files", tuple(sorted(checkpoint.header_sha256)))
    yield _strings("drafter.source.header_sha256", tuple(h for _, h in sorted(checkpoint.header_sha256.items())))
    if checkpoint.quantization:
        yield _string("drafter.source.quantization", checkpoint.quantization)
    if settings:
        yield _strings("drafter.source.settings", tuple(f"{key}={text}" for key, text in sorted(settings.items())))
    if left_out := tuple(sorted(ignored)):
        yield _strings("drafter.source.ignored", left_out)


def target_keys(path: Path, target: Target, tokenizer: Tokenizer | None) -> Iterator[KeyValue]:
    """Which target the file belongs to; the ordered vocabulary's hash tells a mismatched pair for certain."""
    repository, _ = source_of(path)
    yield _string("drafter.target.name", repository.split("/")[-1] if repository else target.name)
    yield _string("drafter.target.architecture", target.architecture)
    yield from _origin("drafter.target", path)
    if tokenizer is not None:
        yield _string("drafter.vocab.sha256", tokenizer.vocab_sha256)


def _origin(prefix: str, folder: Path) -> Iterator[KeyValue]:
    repository, revision = source_of(folder)
    if repository is not None:
        yield _string(f"{prefix}.repository", repository)
    if revision is not None:
        yield _string(f"{prefix}.revision", revision)
    if place := place_in_repository(folder):
        yield _string(f"{prefix}.path", place)


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


def place_in_repository(path: Path) -> str:
    """Where a folder or a file from the hub's cache lies in its repository; "" for the root and for other places."""
    match = _cached(path)
    return "" if match is None else match.string[match.end() :].rstrip("/")


def _cached(path: Path) -> re.Match[str] | None:
    places = (path.absolute(), path.resolve())  # a link into the cache counts, a link out of it as well
    return next(filter(None, (CACHE_FOLDER.search(f"{place.as_posix()}/") for place in places)), None)


def _string(key: str, value: str) -> KeyValue:
    return KeyValue(key, GGUFValueType.STRING, value)


def _strings(key: str, values: tuple[str, ...]) -> KeyValue:
    return KeyValue(key, GGUFValueType.ARRAY, values, GGUFValueType.STRING)
