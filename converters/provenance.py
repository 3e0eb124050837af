"""Our own metadata: where a file came from and which target it belongs to, for later checks to compare.

Runtimes ignore keys they do not know. Nothing here changes from one run to the next: no dates, no absolute paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gguf import GGUFValueType

from convert_drafter.converters.checkpoint import Checkpoint
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.repository import name_of, place_in_repository, source_of
from convert_drafter.converters.target import Target
from convert_drafter.converters.tokenizer import Tokenizer


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
    yield _string("drafter.target.name", name_of(path) if source_of(path)[0] else target.name)
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


def _string(key: str, value: str) -> KeyValue:
    return KeyValue(key, GGUFValueType.STRING, value)


def _strings(key: str, values: tuple[str, ...]) -> KeyValue:
    return KeyValue(key, GGUFValueType.ARRAY, values, GGUFValueType.STRING)
