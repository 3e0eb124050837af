"""Grouping: every quant of one model under one entry, none of them hidden."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from convert_drafter.converters.model_key import base_key, normalize_model_key
from convert_drafter.converters.scan.found import Artifact, Model, What
from convert_drafter.converters.scan.mend import check_sizes

# What has to agree between two copies of one model, where both tell.
Print = tuple[str | int | None, ...]


def group(artifacts: Iterable[Artifact]) -> tuple[Model, ...]:
    """Models in the order of what they are and their keys; copies of one share name, use and shapes."""
    ordered = sorted(artifacts, key=lambda each: (list(What).index(each.what), _key(each), str(each.path)))
    models = []
    for (what, key), same_name in groupby(ordered, key=lambda each: (each.what, _key(each))):
        for copies in _alike(list(same_name)):
            variants = check_sizes(copies)
            kind = next((each.kind for each in variants if each.kind), "")
            models.append(Model(key, _title(variants), what, kind, variants))
    return tuple(models)


def _key(artifact: Artifact) -> str:
    """What `mtp-X-Q8_0.gguf` and the folder `X-MTP` share; the name itself where that names no model."""
    return (base_key(artifact.name) if artifact.what is What.DRAFTER else "") or normalize_model_key(artifact.name)


def _alike(artifacts: Sequence[Artifact]) -> Iterator[list[Artifact]]:
    """Parts whose shapes agree; one that does not tell its own goes with the others if they are one."""
    parts: list[tuple[Print, list[Artifact]]] = []
    for artifact in sorted(artifacts, key=lambda each: _print(each).count(None)):
        mark = _print(artifact)
        fitting = [i for i, (other, _) in enumerate(parts) if _agree(mark, other)]
        if len(fitting) > 1:
            fitting = [i for i in fitting if _namesake(artifact, parts[i][1])] or fitting
        if len(fitting) == 1:
            parts[fitting[0]][1].append(artifact)
        else:
            parts.append((mark, [artifact]))
    for _, part in parts:
        yield sorted(part, key=lambda each: (-each.n_bytes, str(each.path)))


def _namesake(artifact: Artifact, part: Sequence[Artifact]) -> bool:
    """Whether another has the same name with the word for its kind, which says more where nothing else does."""
    own = normalize_model_key(artifact.name)
    return any(normalize_model_key(each.name) == own for each in part)


def _print(artifact: Artifact) -> Print:
    shape = artifact.shape
    return (artifact.kind or None, shape.hidden_size, shape.layers)


def _agree(one: Print, other: Print) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(one, other, strict=True))


def _title(variants: Sequence[Artifact]) -> str:
    """The name as a repository or folder spells it, which is nearer to its publisher's than a file's."""
    named = [each for each in variants if each.repository or each.format == "safetensors"]
    return (named or list(variants))[0].name
