"""Pairing drafters with targets: what a file records of its target first, shapes and vocabulary second, names last.

A drafter of the wrong generation fits by its shapes and is accepted nearly as often (T-61), so a pair is only stated
where exactly one target is left, and never against what a file records or its name says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from convert_drafter.converters.errors import DrafterError
from convert_drafter.converters.model_key import model_words, normalize_model_key, path_words
from convert_drafter.converters.scan.catalog import Named
from convert_drafter.converters.scan.found import Artifact, Candidate, Model, Pair, Shape, What
from convert_drafter.converters.target import read_target, target_tokenizer

INSIDE, RECORDED, CATALOG, SHAPES, NAME = "inside", "recorded", "catalog", "shapes", "name"
Hash = Callable[[Path], str | None]


def pair(models: Sequence[Model], named: Sequence[Named] = ()) -> tuple[Pair, ...]:
    """A pair for every drafter: those inside their target, then each drafter of its own with its target or without."""
    targets = [model for model in models if model.what is What.TARGET]
    known = _Targets(targets)
    inside = [
        Pair(variant, model, INSIDE, ("an MTP head in its target's own files",))
        for model in targets
        for variant in model.variants
        if variant.head is not None
    ]
    apart = [variant for model in models if model.what is What.DRAFTER for variant in model.variants]
    return (*inside, *(_pair(drafter, known, named) for drafter in apart))


class _Targets:
    """Targets with their shapes, by hidden size: few of many have to be held against a drafter."""

    def __init__(self, targets: Sequence[Model]) -> None:
        self.hash_of: Hash = cache(_vocabulary_of_folder)
        self.shapes = [(target, _shape(target)) for target in targets]
        self.by_width: dict[int | None, list[tuple[Model, Shape]]] = {}
        self.by_key: dict[str, list[tuple[Model, Shape]]] = {}
        for target, shape in self.shapes:
            self.by_width.setdefault(shape.hidden_size, []).append((target, shape))
            for key in {target.key, *(_own_key(each) for each in target.variants)}:
                self.by_key.setdefault(key, []).append((target, shape))

    def near(self, drafter: Artifact) -> list[tuple[Model, Shape]]:
        """Those of its width or of none that is known, and those that it records."""
        width = drafter.shape.hidden_size
        if width is None:
            return self.shapes
        recorded = (path_words(drafter.recorded.get(word, "")) for word in ("repository", "name"))
        others = [each for name in recorded if name for each in self.by_key.get(normalize_model_key(name), ())]
        every = [*self.by_width.get(width, ()), *self.by_width.get(None, ()), *others]
        return list({id(target): (target, shape) for target, shape in every}.values())


def _pair(drafter: Artifact, targets: _Targets, named: Sequence[Named]) -> Pair:
    judged = [_judge(drafter, target, shape, targets.hash_of) for target, shape in targets.near(drafter)]
    fitting = [each for each in judged if not each.against]
    if _records(drafter):
        return _by_record(drafter, judged, fitting)
    if parents := {parent for each in named if each.drafter == _key(drafter) for parent in each.parents}:
        listed = [each for each in fitting if each.target.key in parents]
        if len(listed) == 1:
            return Pair(drafter, listed[0].target, CATALOG, ("the catalog names it as its drafter", *listed[0].fits))
    return _by_shape(drafter, judged, fitting)


def _key(drafter: Artifact) -> str:
    return normalize_model_key(drafter.path.name if drafter.format == "gguf" else drafter.name)


def _by_record(drafter: Artifact, judged: Sequence[Candidate], fitting: Sequence[Candidate]) -> Pair:
    """Only a target that is the recorded one; others that fit are told, and not taken for it."""
    said = drafter.recorded.get("repository") or drafter.recorded.get("name") or "a target"
    same = [each for each in fitting if _is_recorded(drafter, each.target)]
    if len(same) == 1:
        return Pair(drafter, same[0].target, RECORDED, (f"it records that it was made for {said}", *same[0].fits))
    if len(same) > 1:
        return Pair(
            drafter, None, "", (f"it was made for {said}, and {len(same)} targets here may be that",), tuple(same)
        )
    wrong = [each for each in judged if each.against and _is_recorded(drafter, each.target)]
    if wrong:
        return Pair(
            drafter, None, "", (f"it records {said}, but does not fit what is here under this name",), tuple(wrong)
        )
    return Pair(drafter, None, "", (f"it was made for {said}, which is not here",), _told(judged))


def _records(drafter: Artifact) -> bool:
    """Whether it notes a target by a repository, or by a name that is a model's; `target` is everybody's."""
    return any(model_words(path_words(drafter.recorded.get(word, ""))) for word in ("repository", "name"))


def _is_recorded(drafter: Artifact, target: Model) -> bool:
    """The same repository where both tell one, else the same name."""
    repository = drafter.recorded.get("repository", "")
    theirs = {each.repository for each in target.variants if each.repository}
    if "/" in repository and theirs:
        return repository in theirs
    name = path_words(repository) or drafter.recorded.get("name", "")
    return bool(name) and normalize_model_key(name) in {target.key, *(_own_key(each) for each in target.variants)}


def _own_key(target: Artifact) -> str:
    return normalize_model_key(target.name)


def _by_shape(drafter: Artifact, judged: Sequence[Candidate], fitting: Sequence[Candidate]) -> Pair:
    """By shapes and vocabulary; names choose among several, or alone where no shape is known."""
    shaped = [each for each in fitting if len(each.fits) > 1]  # one number alone is a coincidence
    named = _most_specific(drafter, shaped or fitting)
    if len(named) == 1:
        chosen = named[0]
        shared = f"named after {chosen.target.name}"
        return Pair(drafter, chosen.target, SHAPES if shaped else NAME, (*chosen.fits, shared))
    if len(shaped) == 1 and not _differ(drafter, shaped[0].target):
        return Pair(drafter, shaped[0].target, SHAPES, shaped[0].fits)
    if len(shaped) == 1:
        return Pair(drafter, None, "", ("its name is of another model than the one target that fits",), tuple(shaped))
    if shaped:
        return Pair(drafter, None, "", (f"{len(shaped)} targets fit: which is it?",), tuple(shaped))
    if named:
        return Pair(drafter, None, "", (f"{len(named)} targets have its name: which is it?",), tuple(named))
    return Pair(drafter, None, "", ("no target here fits",), _told(judged))


def _told(judged: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those worth showing: with something that speaks for them."""
    return tuple(each for each in judged if len(each.fits) > 1)


def _most_specific(drafter: Artifact, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Targets all of whose name is in the drafter's, those with the longest such name."""
    words = model_words(drafter.name)
    within = [each for each in candidates if (own := model_words(each.target.name)) and own <= words]
    longest = max((len(model_words(each.target.name)) for each in within), default=0)
    return [each for each in within if len(model_words(each.target.name)) == longest]


def _differ(drafter: Artifact, target: Model) -> bool:
    """Whether both are called after a model and neither name is a part of the other."""
    ours = _own_words(drafter)
    theirs = [_own_words(each) for each in target.variants]
    return bool(ours) and all(words and not (ours <= words or words <= ours) for words in theirs)


def _own_words(artifact: Artifact) -> frozenset[str]:
    """Of its repository's or its own path's name; a folder above it says nothing against a pair."""
    return model_words(path_words(artifact.repository or "") or artifact.path.name)


# --- shapes ---


def _judge(drafter: Artifact, target: Model, theirs: Shape, hash_of: Hash) -> Candidate:
    """What of their shapes and vocabularies agrees, and what does not; the vocabulary is asked where all else fits."""
    fits, against = list[str](), list[str]()
    ours = drafter.shape
    for what, one, other in (
        ("hidden size", ours.hidden_size, theirs.hidden_size),
        ("layers", ours.depth, theirs.depth),
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
    ):
        if one is not None and other is not None:
            unit = " tokens" if what == "vocabulary" else ""
            same = f"{what} {one}{unit}"
            (fits if one == other else against).append(same if one == other else f"{same}, the target {other}")
    if ours.captures and theirs.depth is not None and max(ours.captures) >= theirs.depth:
        against.append(f"reads layer {max(ours.captures)}, the target has {theirs.depth} layers, counted from 0")
    if not against and ours.vocab_sha256 and fits:
        hashes = {each for each in _hashes(target, hash_of) if each}
        if ours.vocab_sha256 in hashes:
            fits.append("the same tokens")
        elif hashes:
            against.append("other tokens")
    return Candidate(target, tuple(fits), tuple(against))


def _shape(target: Model) -> Shape:
    """Of all copies the first that tells each number."""
    shapes = [variant.shape for variant in target.variants]

    def first(name: str) -> int | None:
        return next((value for shape in shapes if (value := getattr(shape, name)) is not None), None)

    return Shape(first("hidden_size"), first("depth"), first("vocab_size"))


def _hashes(target: Model, hash_of: Hash) -> Iterator[str | None]:
    """Of the copies' tokens; a folder's tokenizer is read only where no GGUF tells."""
    stored = [variant.shape.vocab_sha256 for variant in target.variants if variant.shape.vocab_sha256]
    folders = [variant.path for variant in target.variants if variant.format == "safetensors"]
    yield from stored or map(hash_of, folders)


def _vocabulary_of_folder(folder: Path) -> str | None:
    try:
        return target_tokenizer(folder, read_target(folder).vocab_size).vocab_sha256
    except DrafterError:
        return None
