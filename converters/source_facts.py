"""A drafter's GGUF against the facts of the checkpoint it was made from, and what the user set when it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert_drafter.converters.convert import Published, read_published
from convert_drafter.converters.dialects import objections, write
from convert_drafter.converters.dialects.cell import read_all
from convert_drafter.converters.drafter_file import SETTABLE, given_facts
from convert_drafter.converters.errors import DrafterError, WrongInput
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.spec import required
from convert_drafter.converters.structure import Finding, Survey, key_of

SETTINGS, IGNORED = "drafter.source.settings", "drafter.source.ignored"
REWRITTEN, CONFIG_HASH = "drafter.redialect.settings", "drafter.source.config_sha256"
FROM_TARGET = ("rope.sections", "embedding_scale")  # facts a conversion takes from the target


def read_source(survey: Survey, source: Path, target: Path | None, settings: Mapping[str, str]) -> Published:
    """The checkpoint with the settings the file was converted with and the user's own, which go before them.

    It is read without the target where that is not its target.
    """
    settings, ignore = {**recorded_settings(survey.file), **settings}, noted(survey.file, IGNORED)
    if target is None:
        return read_published(source, None, settings, ignore)
    try:
        return read_published(source, target, settings, ignore)
    except WrongInput as error:
        try:
            return read_published(source, None, settings, ignore)
        except WrongInput:
            raise error from None


def recorded_settings(file: GGUFFile) -> dict[str, str]:
    """What the user set of the checkpoint's config when this file was converted: path -> JSON text."""
    return dict(entry.partition("=")[::2] for entry in noted(file, SETTINGS))


def noted(file: GGUFFile, key: str) -> tuple[str, ...]:
    entry = file.keys.get(key)
    values = entry.value if entry is not None and isinstance(entry.value, tuple) else ()
    return tuple(value for value in values if isinstance(value, str))


def fact_findings(survey: Survey, published: Published) -> list[Finding]:
    """What was set by hand, every fact that is not the checkpoint's, and whether its config is another revision."""
    return [*_settings(survey), *_facts(survey, published), *_origin(survey, published)]


def unread_settings(published: Published) -> Iterator[Finding]:
    """Settings that changed nothing, a slip of the pen perhaps; asked after every key was read that somebody reads."""
    unread = set(published.reader.unread())
    for path in published.reader.settings:
        if path in unread:
            yield Finding(f"--set {path}: nobody reads this key, so it changed nothing", fault=False, doubt=True)


def _settings(survey: Survey) -> Iterator[Finding]:
    for key in (SETTINGS, REWRITTEN):
        for entry in noted(survey.file, key):
            yield Finding(f"{key}: {entry}: set by the user when the file was made, and applied here", fault=False)


def overruled(survey: Survey, source: Path, target: Path | None, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Facts that the checkpoint states itself, and that settings recorded in the file overrule: meant, or a mistake."""
    if not any(noted(survey.file, key) for key in (SETTINGS, REWRITTEN)):
        return
    try:
        published = read_published(source, target, settings, noted(survey.file, IGNORED))
    except WrongInput:
        return  # without them it cannot be read: they were needed
    wanted, _ = read_all(survey.cell, {entry.key: entry for entry in write(survey.cell, published.spec)})
    for name, found, expected in _differing(survey, wanted):
        if not _unknowable(name, expected, published):
            said = f"{name}: the checkpoint says {_said(expected)}, the file {_said(found)}"
            yield Finding(f"{said}, as the user set it when the file was made", fault=False, doubt=True)


def _facts(survey: Survey, published: Published) -> Iterator[Finding]:
    """Both sides through the rows of the file's cell, so that each has the same 24 bits and implied values."""
    cell, spec = survey.cell, published.spec
    architecture = published.target.architecture if published.target else None
    yield from (Finding(text) for text in objections(cell, spec, architecture))
    wanted, faults = read_all(cell, {entry.key: entry for entry in write(cell, spec)})
    yield from (Finding(f"the checkpoint: {fault}") for fault in faults)
    for name, found, expected in _differing(survey, wanted | _rewritten(survey)):
        if _unknowable(name, expected, published):
            yield Finding(f"{name}: found {found!r}, which comes from the target; give --target to check it", False)
        else:
            origin = published.reader.origins.get(name, name)
            key = key_of(survey.file, cell, name)
            yield Finding(f"{key}: found {_said(found)}, the checkpoint has {_said(expected)} ({origin})")


def _differing(survey: Survey, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, the file's value and the wanted one of each fact that differs; None where a side has none."""
    for name in sorted(set(wanted) | set(survey.facts)):
        found, expected = survey.facts.get(name), wanted.get(name)
        if found == expected or name == "kind" or (found is None and name in required(survey.cell.kind)):
            continue  # what the file lacks is said already, and other converters do not note the target
        yield name, found, expected


def _unknowable(name: str, expected: Any, published: Published) -> bool:
    """A conversion takes this fact from the target, which is not given."""
    return name in FROM_TARGET and published.target is None and expected is None


def _rewritten(survey: Survey) -> dict[str, Any]:
    """Facts the user gave when the file was rewritten for its runtime."""
    pairs = dict(entry.partition("=")[::2] for entry in noted(survey.file, REWRITTEN))
    try:
        return given_facts({name: text for name, text in pairs.items() if name in SETTABLE})
    except DrafterError:
        return {}


def _said(value: object) -> str:
    return "none" if value is None else repr(value)


def _origin(survey: Survey, published: Published) -> Iterator[Finding]:
    """The digest of config.json our converter noted; another one is another revision, which the facts judge."""
    entry = survey.file.keys.get(CONFIG_HASH)
    if entry is None:
        return
    found = hashlib.sha256(published.checkpoint.config_path.read_bytes()).hexdigest()
    if entry.value != found:
        path = published.checkpoint.config_path
        yield Finding(f"{path}: is not the config.json the file was made from ({CONFIG_HASH})", fault=False)
