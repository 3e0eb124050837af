"""A catalog of deployments: which models it names as the drafters of others, and what it says of a model outright.

The layout is AIMA's (assets with variants, `default_config.speculative_config.model`), but any file of mappings is
walked, so a list of vLLM or SGLang launches does as well.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convert_drafter.converters.errors import WrongInput, WrongUsage
from convert_drafter.converters.model_key import normalize_model_key, path_words
from convert_drafter.converters.weight_files import reading

SPECULATIVE, MODEL = "speculative_config", "model"
STANDALONE, UI, ROLE, DRAFT = "standalone_deploy", "ui", "role", "draft"
LIMIT, MOST_NODES = 2**26, 2_000_000  # bytes of a file; values in it, anchors of YAML counted where they are used


@dataclass(frozen=True)
class Named:
    """A drafter that a catalog names, and the keys of everything it stands in: its parents."""

    drafter: str
    parents: frozenset[str]


def read_catalog(path: Path) -> Any:
    """A YAML, TOML or JSON file as plain data. Raises `WrongUsage` for another suffix, `WrongInput` for bad text."""
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        raise WrongUsage(f"{path}: a catalog is {', '.join(PARSERS)}, found {path.suffix or 'no suffix'}")
    with reading(path):
        if path.stat().st_size > LIMIT:
            raise WrongInput(f"{path}: found {path.stat().st_size} bytes, expected a catalog of at most {LIMIT}")
        raw = path.read_bytes()
    try:
        return parse(raw.decode("utf-8-sig"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise WrongInput(f"{path}: not valid {path.suffix[1:].upper()}: {_one_line(error)}") from error


PARSERS = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".toml": tomllib.loads,
    ".json": lambda text: json.loads(text) if text.strip() else None,
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def speculative_draft_model_keys(catalog: Any) -> frozenset[str]:
    """The normalised keys of every model a catalog names in a `speculative_config`; empty for an empty one.

    What is not a mapping, or names no model, is passed over; a parent that names itself is no drafter.
    """
    return frozenset(named.drafter for named in drafters_named(catalog))


def drafters_named(catalog: Any) -> tuple[Named, ...]:
    """Every drafter a catalog names, with its parents' keys."""
    found = (Named(key, parents) for key, parents in _walk(catalog) if key and key not in parents)
    return tuple(dict.fromkeys(found))


def _walk(catalog: Any) -> Iterator[tuple[str, frozenset[str]]]:
    """(drafter's key, keys of everything around it) of each speculative_config with a model."""
    waiting: list[tuple[Any, frozenset[str], frozenset[int]]] = [(catalog, frozenset(), frozenset())]
    for _ in range(MOST_NODES):
        if not waiting:
            return
        node, parents, above = waiting.pop()
        if id(node) in above:  # an anchor of YAML that holds itself
            continue
        above |= {id(node)}
        if isinstance(node, Mapping):
            parents |= _names(node)
            spec = node.get(SPECULATIVE)
            model = spec.get(MODEL) if isinstance(spec, Mapping) else None
            if isinstance(model, str):
                yield _key(model), parents
            for key, value in reversed(list(node.items())):
                inner = parents | {_key(key)} if isinstance(key, str) and isinstance(value, Mapping) else parents
                waiting.append((value, inner, above))
        elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
            waiting += [(value, parents, above) for value in reversed(node)]
    raise WrongInput(f"catalog: found more than {MOST_NODES} values, expected a list of deployments")


def _names(node: Mapping[Any, Any]) -> frozenset[str]:
    """What a mapping calls itself: `name`, `model`, and the same below `metadata`."""
    places = [node, node["metadata"]] if isinstance(node.get("metadata"), Mapping) else [node]
    values = [place.get(word) for place in places for word in ("name", "id", MODEL)]
    aliases = [alias for place in places if isinstance(place.get("aliases"), list) for alias in place["aliases"]]
    return frozenset(_key(value) for value in (*values, *aliases) if isinstance(value, str))


def _key(text: str) -> str:
    return normalize_model_key(path_words(text))


# --- annotating ---


def annotate_models_from_catalog(
    rows: Sequence[Mapping[str, Any] | None], catalog: Any
) -> list[Mapping[str, Any] | None]:
    """Rows as copies, those whose `name` the catalog names as a drafter marked: not deployed alone, role draft.

    Each of the two fields is set only where it is not yet; None stays None, and nothing given is changed.
    """
    keys = speculative_draft_model_keys(catalog)
    return [None if row is None else marked(row) if _row_key(row) in keys else dict(row) for row in rows]


def marked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row with the marks of a drafter, where it has no others."""
    ui = row.get(UI) if isinstance(row.get(UI), Mapping) else {}
    assert isinstance(ui, Mapping)
    out = dict(row)
    if row.get(STANDALONE) is None:
        out[STANDALONE] = False
    if not ui.get(ROLE):
        out[UI] = {**ui, ROLE: DRAFT}
    return out


def _row_key(row: Mapping[str, Any]) -> str | None:
    name = row.get("name")
    return _key(name) if isinstance(name, str) else None


def stated(catalog: Any) -> dict[str, dict[str, Any]]:
    """What a catalog says outright of models it lists: key -> `standalone_deploy` and `ui`, where they are set."""
    said: dict[str, dict[str, Any]] = {}
    waiting, left = [catalog], MOST_NODES
    seen: set[int] = set()
    while waiting and left:
        node, left = waiting.pop(), left - 1
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Mapping):
            fields = {key: node[key] for key in (STANDALONE, UI) if node.get(key) is not None}
            for key in _names(node) if fields else ():
                said.setdefault(key, {}).update(fields)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return said
