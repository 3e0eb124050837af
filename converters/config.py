"""ConfigReader: typed reads of a raw config.json that remember where every fact came from.

The raw JSON is read, never a library's idea of it: transformers fills missing keys with its own defaults, which is
how a missing theta becomes 10000 without a word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, cast

from convert_drafter.converters.errors import WrongInput, WrongUsage

T = TypeVar("T")
JSON_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
INNER = "transformer_layer_config"  # speculators' layout: the drafter's layers are described one level down
# What both levels say of themselves, and no fact of the drafter's layers.
OUTER = frozenset({
    "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "_name_or_path", "name_or_path",
    "tie_word_embeddings",
})  # fmt: skip
ADVICE = "if you know it, give it with --set {path}=VALUE"


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; null, a missing key and a parent that is no object are all None."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted paths of every value that is not null and not an object."""
    for key, value in config.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        elif value is not None:
            yield path


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def override(config: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `config` with the user's `--set PATH=JSON` values in it (bare words count as strings)."""
    out = cast(dict[str, Any], json.loads(json.dumps(config)))
    for path, text in settings.items():
        *parents, last = path.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        if not last:
            raise WrongUsage(f"--set {path}={text}: expected KEY=VALUE or PARENT.KEY=VALUE")
        try:
            node[last] = json.loads(text)
        except json.JSONDecodeError:
            node[last] = text
        except (ValueError, RecursionError) as error:
            raise WrongUsage(f"--set {path}: a value nobody can read: {error}") from error
    return out


def lifted(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], frozenset[str]]:
    """A config with what speculators' layout nests at the top level, and the keys that were nested.

    Raises `WrongInput` for a key that both levels have with different values.
    """
    inner = config.get(INNER)
    if not isinstance(inner, Mapping):
        return dict(config), frozenset()
    nested = {key: value for key, value in inner.items() if value is not None}
    outer = {key: value for key, value in config.items() if key != INNER}
    for key in sorted(nested.keys() - OUTER):
        if outer.get(key, nested[key]) not in (None, nested[key]):
            shown = f"{key} = {outer[key]!r}, {INNER}.{key} = {nested[key]!r}"
            raise WrongInput(
                f"{where}: two places disagree: {shown}, expected one value; settle it with --set {key}=VALUE"
            )
    nested = {key: value for key, value in nested.items() if key not in OUTER or outer.get(key) is None}
    return outer | nested, frozenset(nested)


class ConfigReader:
    """Reads one config; `where` names it in messages, `settings` are the user's own facts.

    `origins` maps each spec field to the place its value came from; `warnings` collects what is doubtful.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, settings: Mapping[str, str] | None = None) -> None:
        self.settings = {path.removeprefix(f"{INNER}."): text for path, text in (settings or {}).items()}
        told = {key: value for key, value in raw.items() if key not in self.settings}
        lifted_raw, self._nested = lifted(told, where)
        self.raw = override(lifted_raw, self.settings)
        self.speculators = bool(self._nested) or any(key.startswith("speculators_") for key in raw)
        self.where = where
        self.origins: dict[str, str] = {}
        self.warnings: list[str] = []
        self._read: set[str] = set()
        self._entered: str | None = None

    # --- reading ---

    def enter(self, section: str) -> None:
        """From here on a path is looked up in this object as well, if there is one, and before the top level.

        A multimodal model's text config lies in an object of its own; what both places say has to agree.
        """
        self._entered = section if isinstance(lookup(self.raw, section), Mapping) else None

    def places(self, *paths: str) -> tuple[str, ...]:
        """Where these paths are looked up, in this order."""
        if self._entered is None:
            return paths
        return tuple(place for path in paths for place in (f"{self._entered}.{path}", path))

    def find(self, field: str, kind: type[T], *paths: str) -> T | None:
        """The value at the first path that is set, or None. Paths that are set and disagree are an error."""
        values = {path: self._typed(kind, path) for path in self.places(*paths)}
        found = {path: value for path, value in values.items() if value is not None}
        if not found:
            return None
        found = {path: value for path, value in found.items() if path in self.settings} or found  # the user settles it
        path, value = next(iter(found.items()))
        if any(other != value for other in found.values()):
            shown = ", ".join(f"{p} = {v!r}" for p, v in found.items())
            raise self.error(field, f"two places disagree: {shown}", "one value; settle it with --set")
        self.note(field, path)
        return value

    def get(self, field: str, kind: type[T], *paths: str) -> T:
        """Like `find`, but a value that is nowhere is an error naming every place looked at."""
        value = self.find(field, kind, *paths)
        if value is None:
            raise self.missing(field, JSON_NAMES.get(kind, "a value"), *paths)
        return value

    def find_list(self, field: str, kind: type[T], *paths: str) -> tuple[T, ...] | None:
        """Like `find` for an array of `kind`."""
        found = self.find(field, list, *paths)
        if found is None:
            return None
        path = self.origins[field]
        return tuple(self._convert(kind, item, f"{path}[{n}]") for n, item in enumerate(found))

    def expect(self, path: str, allowed: Any, meaning: str) -> None:
        """State an assumption: the value at `path`, when set, is `allowed`; otherwise an error saying what it means."""
        for place in self.places(path):
            self._read.add(place)
            value = lookup(self.raw, place)
            if value is not None and value != allowed:
                raise self.error(place, f"found {value!r}", f"{allowed!r}; {meaning}")

    def section(self, path: str) -> Mapping[str, Any]:
        """The object at `path`, or an empty one; what is no object is passed over (T-6)."""
        found = (lookup(self.raw, place) for place in self.places(path))
        return next((value for value in found if isinstance(value, Mapping) and value), {})

    def ignore(self, *paths: str) -> None:
        """Mark keys as known and without meaning for the drafter."""
        self._read.update(self.places(*paths))

    # --- reporting ---

    def note(self, field: str, origin: str) -> None:
        self._read.add(origin)
        self.origins[field] = f"--set {origin}" if origin in self.settings else self._place(origin)

    def _place(self, path: str) -> str:
        """Where the config itself has a path."""
        return f"{INNER}.{path}" if path.split(".")[0] in self._nested and path not in self.settings else path

    def warn(self, message: str) -> None:
        self.warnings.append(f"{self.where}: {message}")

    def unread(self) -> list[str]:
        """Keys that nobody read and nobody knows to be meaningless."""
        return [
            self._place(p) for p in leaves(self.raw) if not any(p == r or p.startswith(f"{r}.") for r in self._read)
        ]

    def error(self, what: str, found: str, expected: str) -> WrongInput:
        return WrongInput(f"{self.where}: {self._place(what)}: {found}, expected {expected}")

    def missing(self, field: str, expected: str, *paths: str) -> WrongInput:
        places = self.places(*paths)
        advice = ADVICE.format(path=places[0])
        return self.error(field, f"missing (looked at {' or '.join(places)})", f"{expected}; {advice}")

    # --- conversion ---

    def _typed(self, kind: type[T], path: str) -> T | None:
        self._read.add(path)
        value = lookup(self.raw, path)
        return None if value is None else self._convert(kind, value, path)

    def _convert(self, kind: type[T], value: Any, path: str) -> T:
        """The only casts are int to float and a whole float to int; a bool is never a number."""
        if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
            if _finite(value) and (kind is float or value == int(value)):
                return kind(value)  # type: ignore[call-arg]
        elif kind not in (int, float) and isinstance(value, kind):
            return value
        raise self.error(path, f"found {value!r}", JSON_NAMES.get(kind, "an array" if kind is list else kind.__name__))
