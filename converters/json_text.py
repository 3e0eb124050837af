"""JSON objects from files of others: no key twice, no text that could be neither shown nor written."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from convert_drafter.converters.errors import WrongInput


def json_object(where: str, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WrongInput(f"{where}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise WrongInput(f"{where}: found {reprlib.repr(found)}, expected a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    "".join(found).encode("utf-8")  # raises on half a surrogate pair, which could be neither shown nor written
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r}")
    return found


def value_at(found: Any, keys: Sequence[str], missing: Any = None) -> Any:
    """The value at a path of keys, which may hold dots; `missing` where one of them is not there."""
    for key in keys:
        found = found.get(key, missing) if isinstance(found, dict) else missing
    return found
