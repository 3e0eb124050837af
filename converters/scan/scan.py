"""The scan of a folder: headers only, nothing run, nothing written. A folder goes in, everything below it comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import DrafterError, WrongUsage
from convert_drafter.converters.model_key import normalize_model_key
from convert_drafter.converters.scan.catalog import (
    DRAFT,
    ROLE,
    STANDALONE,
    UI,
    Named,
    drafters_named,
    marked,
    read_catalog,
    stated,
)
from convert_drafter.converters.scan.found import Artifact, By, Model, Scan, Skipped, What
from convert_drafter.converters.scan.group import group
from convert_drafter.converters.scan.in_folder import FORMAT as FOLDERS
from convert_drafter.converters.scan.in_folder import describe_folder
from convert_drafter.converters.scan.in_gguf import FORMAT as FILES
from convert_drafter.converters.scan.in_gguf import describe_gguf
from convert_drafter.converters.scan.mend import with_redialect
from convert_drafter.converters.scan.pair import pair
from convert_drafter.converters.scan.settle import settle
from convert_drafter.converters.scan.walk import Place, Walk
from convert_drafter.converters.weight_files import CONFIG

Watch = Callable[[str, int, int], None]
NOT_ALONE = (DRAFT, "component")
UI_ROLES = {What.TARGET: "model", What.DRAFTER: DRAFT, What.PART: "component", What.UNKNOWN: "unknown"}


def scan(root: Path, catalog: Path | None = None, watch: Watch = lambda phase, done, total: None) -> Scan:
    """Every model artifact below `root`: what it is, its quants as one model, the target of each drafter.

    `catalog` is a YAML, TOML or JSON file that names drafters (`speculative_config.model`). `watch` hears of the
    artifacts looked at. Broken files are entries with the reason. Raises `WrongUsage` for what is no folder,
    `WrongInput` for a catalog that cannot be read.
    """
    if not root.is_dir():
        state = "is a file, expected a folder; `inspect` reads one file" if root.exists() else "there is no such folder"
        raise WrongUsage(f"{root}: {state}")
    said = None if catalog is None else read_catalog(catalog)
    walk, artifacts = Walk(root), dict[tuple[tuple[int, int], ...], Artifact]()
    for count, place in enumerate(walk.places(), 1):
        watch("looking", count, 0)
        _add(artifacts, place, walk.skipped)
    named = drafters_named(said)
    stated_of, keys = stated(said), frozenset(each.drafter for each in named)
    models = group(_marked(with_redialect(each), stated_of, keys) for each in artifacts.values())
    models, pairs = settle(models, pair(models, named))
    return Scan(
        root,
        models,
        pairs,
        tuple(sorted(walk.skipped, key=lambda each: each.path)),
        catalog,
        tuple(_unfound(catalog, models, named)),
    )


def _add(artifacts: dict[tuple[tuple[int, int], ...], Artifact], place: Place, skipped: list[Skipped]) -> None:
    """Describe a place, or note it as another path to files that are described already."""
    try:
        states = [path.stat() for path in (*place.files, *_config(place))]
    except OSError as error:
        skipped.append(Skipped(place.path, f"cannot be read: {error.strerror or error}"))
        return
    same = tuple((state.st_dev, state.st_ino) for state in states)
    if same and same in artifacts:
        known = artifacts[same]
        artifacts[same] = replace(known, also=(*known.also, place.path))
        return
    n_bytes = sum(state.st_size for state in states[: len(place.files)])
    artifacts[same or ((0, len(artifacts)),)] = _described(place, n_bytes)


def _config(place: Place) -> list[Path]:
    config = place.path / CONFIG
    return [config] if place.folder and config.is_file() else []


def _described(place: Place, n_bytes: int) -> Artifact:
    """What the headers say; what cannot be read is an entry with the reason."""
    try:
        return describe_folder(place, n_bytes) if place.folder else describe_gguf(place, n_bytes)
    except (DrafterError, OSError) as error:
        name, form = place.path.name, FOLDERS if place.folder else FILES
        why = f"cannot be read: {error}".removeprefix(f"{place.path}: ")
        return Artifact(place.path, form, place.files, n_bytes, name, What.UNKNOWN, By.NAME, faults=(why,))


def _marked(artifact: Artifact, said: Mapping[str, Mapping[str, Any]], named: frozenset[str]) -> Artifact:
    """With what a user interface needs: deployed alone or not, and the role it is shown in.

    What the catalog says outright stays; then come the drafters that it names, and then what the headers tell.
    """
    keys = [normalize_model_key(artifact.name), normalize_model_key(artifact.path.name)]
    row: Mapping[str, Any] = next((said[key] for key in keys if key in said), {})
    if artifact.what is What.DRAFTER or named & set(keys):
        row = marked(row)
    ui = row.get(UI)
    role = ui.get(ROLE) if isinstance(ui, Mapping) else None
    alone = row.get(STANDALONE)
    if not isinstance(alone, bool):
        alone = artifact.what is What.TARGET and role not in NOT_ALONE
    return replace(
        artifact, standalone_deploy=alone, ui_role=role if isinstance(role, str) else UI_ROLES[artifact.what]
    )


def _unfound(catalog: Path | None, models: Iterable[Model], named: Sequence[Named]) -> Iterable[str]:
    """Drafters that a catalog names and that are not here; and that it names none, as many a file is no catalog."""
    if catalog is not None and not named:
        return [f"{catalog}: names no drafter: there is no speculative_config.model in it but a parent's own"]
    artifacts = [each for model in models for each in model.variants]
    here = {normalize_model_key(name) for each in artifacts for name in (each.name, each.path.name)}
    absent = sorted({each.drafter for each in named} - here)
    return [f"{key}: the catalog names it as a drafter, and it is not here" for key in absent]
