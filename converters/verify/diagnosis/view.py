"""A drafter as its file shows it, and as an explanation would have it: facts and weights, without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert_drafter.converters.errors import BadFact
from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.spec import DrafterSpec, facts_of, spec_from

Array = NDArray[np.float32]
Weights = dict[TensorKey, Array]


@dataclass(frozen=True)
class View:
    """A drafter as its file shows it, or with something mended.

    `captures` are zero-based target layers, -1 the embedding's output, which a spec cannot hold.
    """

    spec: DrafterSpec
    weights: Weights
    captures: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        return facts_of(self.spec) | {"capture_layers": self.captures}


@dataclass(frozen=True)
class Explanation:
    """One thing that may be wrong: the fact or role, what was done to it, and the drafter with it mended."""

    about: str
    mended: str
    view: View

    @property
    def name(self) -> str:
        return f"{self.about}: {self.mended}"


@dataclass(frozen=True)
class Hints:
    """What is known beside the file: its target's theta and special tokens, and the original, if there is one."""

    theta: float | None = None
    tokens: tuple[int, ...] = ()
    original: View | None = None


Family = Callable[[View, Hints], Iterator[Explanation]]


def changes(before: View, after: View) -> dict[str, Any]:
    """Field path -> value of every fact that differs, None where `after` has none: what repairs the file."""
    old, new = before.facts(), after.facts()
    return {name: new.get(name) for name in (*old, *(n for n in new if n not in old)) if old.get(name) != new.get(name)}


def with_facts(view: View, new: Mapping[str, Any]) -> View | None:
    """The drafter with other facts (None for "has none"); None where they contradict each other."""
    known = facts_of(view.spec) | {"capture_layers": view.spec.capture_layers} | dict(new)
    captures = new.get("capture_layers", view.captures)
    if any(not 0 <= k < view.spec.target_layer_count for k in captures):
        known["capture_layers"] = view.spec.capture_layers  # what the spec cannot hold, only the view does
    try:
        spec = spec_from({name: value for name, value in known.items() if value is not None})
    except BadFact:
        return None
    return View(spec, view.weights, tuple(captures))


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(shown, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)
