"""What a drafter alone leaves open and its target tells, once that is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from convert_drafter.converters.scan.found import Artifact, Model, Pair, What
from convert_drafter.converters.scan.in_folder import with_target
from convert_drafter.converters.scan.mend import with_redialect

TELLS = {"safetensors": with_target, "gguf": with_redialect}


def settle(models: Sequence[Model], pairs: Sequence[Pair]) -> tuple[tuple[Model, ...], tuple[Pair, ...]]:
    """Both with those drafters seen beside their targets that lacked something."""
    found = {
        pair.drafter.path: TELLS[pair.drafter.format](pair.drafter, place)
        for pair in pairs
        if pair.drafter.lacks and pair.target is not None and (place := _place(pair.target)) is not None
    }

    def seen(artifact: Artifact) -> Artifact:
        return found.get(artifact.path, artifact)

    def with_seen(model: Model) -> Model:
        """The same object where nothing changed: pairs name their target by it."""
        variants = tuple(map(seen, model.variants))
        return model if model.what is What.TARGET or variants == model.variants else replace(model, variants=variants)

    if not found:
        return tuple(models), tuple(pairs)
    return tuple(map(with_seen, models)), tuple(replace(pair, drafter=seen(pair.drafter)) for pair in pairs)


def _place(target: Model) -> Path | None:
    """Where its facts are read: a folder before a GGUF, and none that has to be mended first."""
    whole = [each for each in target.variants if not each.faults]
    return next((each.path for each in sorted(whole, key=lambda each: each.format == "gguf")), None)
