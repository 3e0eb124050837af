"""What a folder of safetensors is: by the names of its tensors, by its config second, by its own name last."""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.checkpoint import Headers, header_of, open_checkpoint
from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.drafters import KINDS, MTP, signature_of
from convert_drafter.converters.drafters.captures import CAPTURES, CAPTURES_PLUS_ONE
from convert_drafter.converters.drafters.mtp import refuse_without_head
from convert_drafter.converters.drafters.refused import OTHER_KINDS
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.model_key import model_words, path_words, plays_a_part, split_name, storage_label
from convert_drafter.converters.plan import plain_name
from convert_drafter.converters.scan.found import Artifact, By, Head, Shape, What
from convert_drafter.converters.scan.walk import Place
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import read_target
from convert_drafter.converters.weight_files import CONFIG, INDEX, files_in

FORMAT = "safetensors"
FIRST_LAYER = re.compile(r"(language_model\.|model\.|transformer\.)*(layers|h|blocks)\.0\.")
EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|lm_head|wte|shared_head\.head)\.")
ADAPTER = re.compile(r".*\.lora_[AB]\b")
VERIFIER = "speculators_config.verifier.name_or_path"
EAGLE3_CAPTURES = 3  # states that every EAGLE-3 fuses (arXiv 2503.01840); a config without their list may be one
MOST = 3  # problems of one folder that are told here


@dataclass(frozen=True)
class Contents:
    """What can be read of a folder: tensors (None where only the index names them), config, and what is wrong."""

    headers: Mapping[str, Any]
    config: dict[str, Any]
    faults: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()  # weight files that the index does not name


def describe_folder(place: Place, n_bytes: int) -> Artifact:
    """The artifact in this folder, whatever is wrong with it."""
    folder, contents = place.path, _contents(place)
    repository, revision = place.origin
    name = _name(folder, repository)
    artifact = Artifact(
        folder, FORMAT, place.files, n_bytes, _spelled(name), What.UNKNOWN, By.NAME,
        quant=_quant(contents, name), weights=_weights(contents), repository=repository, revision=revision,
        faults=contents.faults, architecture=_architecture(contents.config),
    )  # fmt: skip
    return _of_tensors(artifact, contents, name)


# --- reading ---


def _contents(place: Place) -> Contents:
    try:
        found = open_checkpoint(place.path)
    except DrafterError as error:
        return _what_is_there(place, error)
    return Contents(found.tensors, found.config, (), found.unused)


def _what_is_there(place: Place, error: DrafterError) -> Contents:
    """Of a folder that is no whole checkpoint."""
    faults = [line.removeprefix(f"{place.path}: ").removeprefix(f"{place.path}/") for line in _lines(error)]
    more = [f"and {len(faults) - MOST} more"] if len(faults) > MOST else []
    headers: dict[str, Any] = {}
    for index in files_in(place.path, INDEX):
        named = _json(index).get("weight_map")
        headers |= dict.fromkeys(named) if isinstance(named, dict) else {}
    for path in place.files:
        headers |= header_of(path)
    return Contents(headers, _json(place.path / CONFIG), (*faults[:MOST], *more))


def _lines(error: DrafterError) -> list[str]:
    return list(error.problems) if isinstance(error, Problems) else [str(error)]


def _json(path: Path) -> dict[str, Any]:
    """An object, empty where there is none that can be read: what is wrong with it is said elsewhere."""
    try:
        return json_object(str(path), path.read_bytes())
    except (OSError, WrongInput):
        return {}


# --- what it is ---


def _of_tensors(artifact: Artifact, contents: Contents, name: str) -> Artifact:
    names = list(contents.headers)
    found = signature_of(names)
    trunk = any(FIRST_LAYER.match(each) for each in names)
    if found == MTP or (found in OTHER_KINDS and trunk and "inside" in found):
        inside = trunk and _is_model(names)
        return _with_head(artifact, contents, found) if inside else _head_alone(artifact, contents)
    if found is not None:
        why = (f"{found} is not converted yet: {OTHER_KINDS[found]}",) if found not in KINDS else ()
        return _drafter(artifact, contents, found, why)
    if names and all(ADAPTER.match(each) for each in names):
        return replace(artifact, what=What.PART, told_by=By.TENSORS, kind="adapter")
    if is_helper_config(contents.config):
        note = "its config says that it is a drafter; its tensors are those of no kind that is known"
        known = replace(artifact, what=What.DRAFTER, told_by=By.CONFIG, notes=(*artifact.notes, note))
        return replace(known, shape=_shape_of_config(contents))
    if trunk or (names and contents.config):
        return _target(artifact, contents, name)
    what = What.DRAFTER if plays_a_part(name) else What.UNKNOWN
    return replace(artifact, what=what, told_by=By.NAME)


def is_helper_config(config: object) -> bool:
    """Whether a config calls its model another one's helper: by its model type, a dflash_config, or its class.

    The words are oMLX's (`is_helper_model_config`); anything that is no object or of odd types says nothing.
    """
    if not isinstance(config, Mapping):
        return False
    family, named = config.get("model_type"), config.get("architectures")
    classes = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return (
        (isinstance(family, str) and family.lower().endswith(("_assistant", "_mtp")))
        or isinstance(config.get("dflash_config"), Mapping)
        or any(re.search("draft|assistant|mtp", each.lower()) for each in classes if isinstance(each, str))
    )


def _is_model(names: Collection[str]) -> bool:
    """Whether there is more than the layers of a head: a first layer that is none."""
    heads = {plain.split(".")[1] for name in names if ".eh_proj." in (plain := plain_name(name)) and "layers." in plain}
    return "0" not in heads


def _target(artifact: Artifact, contents: Contents, name: str) -> Artifact:
    faults = [*artifact.faults]
    if contents.config and not artifact.faults:
        try:
            refuse_without_head(ConfigReader(contents.config, CONFIG), len(contents.headers))
        except WrongInput as error:
            faults.append(str(error))
    notes = ("its name is a drafter's; its tensors are a model's",) if plays_a_part(name) else ()
    known = replace(artifact, what=What.TARGET, told_by=By.TENSORS, faults=tuple(faults), notes=notes)
    return _beside(replace(known, shape=_target_shape(artifact.path)), contents)


def _with_head(artifact: Artifact, contents: Contents, found: str | None) -> Artifact:
    known = replace(artifact, what=What.TARGET, told_by=By.TENSORS, shape=_target_shape(artifact.path))
    if found != MTP:
        return replace(known, head=Head("", f"{found} is not converted yet: {OTHER_KINDS[str(found)]}"))
    try:
        return replace(known, head=Head(read_published(artifact.path).spec.kind))
    except DrafterError as error:
        return replace(known, head=Head("", _reason(artifact.path, error)))


def _beside(target: Artifact, contents: Contents) -> Artifact:
    """A head in a file that the index does not name (A5-3); two such files are one too many."""
    heads = [path for path in contents.beside if signature_of(header_of(path)) == MTP]
    if not heads:
        return target
    names = ", ".join(path.name for path in heads)
    if len(heads) > 1:
        fault = f"MTP heads in {names}: expected one; keep the one that belongs to this release"
        return replace(target, faults=(*target.faults, fault), head=Head("", "which of them is its head is not said"))
    note = f"in {names}, which the index does not name: `convert` reads only what the index names"
    return replace(target, head=Head("", note))


def _head_alone(artifact: Artifact, contents: Contents) -> Artifact:
    return _drafter(artifact, contents, "MTP head", ())


def _drafter(artifact: Artifact, contents: Contents, kind: str, notes: Iterable[str]) -> Artifact:
    verifier = lookup(contents.config, VERIFIER)
    recorded = {"repository": verifier, "name": path_words(verifier)} if isinstance(verifier, str) and verifier else {}
    known = replace(artifact, what=What.DRAFTER, told_by=By.TENSORS, kind=kind, recorded=recorded, notes=tuple(notes))
    if artifact.faults or known.notes:
        return replace(known, shape=_shape_of_config(contents, kind))
    try:
        spec = read_published(artifact.path).spec
    except DrafterError as error:
        note = f"`convert` refuses it as it is: {_reason(artifact.path, error)}"
        return replace(known, shape=_shape_of_config(contents, kind), notes=(note,), lacks=note)
    return replace(known, kind=spec.kind, shape=_shape_of_spec(spec))


def _shape_of_spec(spec: DrafterSpec) -> Shape:
    hidden, depth = spec.target_hidden_size, spec.target_layer_count
    return Shape(hidden, depth, spec.vocab_size, None, spec.capture_layers, spec.layer_count)


def with_target(drafter: Artifact, target: Path) -> Artifact:
    """A folder's drafter beside its target, which tells what the drafter's config does not; as it is otherwise."""
    try:
        spec = read_published(drafter.path, target).spec
    except DrafterError:
        return drafter
    note = f"its config says too little of its target: `convert` needs --target {shlex.quote(str(target))}"
    return replace(drafter, kind=spec.kind, shape=_shape_of_spec(spec), notes=(*drafter.other_notes, note), lacks="")


def _reason(folder: Path, error: DrafterError) -> str:
    lines = _lines(error)
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0].removeprefix(f"{folder}/").removeprefix(f"{folder}: ") + more


# --- what it says ---


def _target_shape(folder: Path) -> Shape:
    try:
        target = read_target(folder)
    except WrongInput:
        return Shape()
    return Shape(target.hidden_size, target.layer_count, target.vocab_size, layers=target.layer_count)


def _shape_of_config(contents: Contents, kind: str = "") -> Shape:
    """What a drafter's config says of its target outright, where it does not say all that a conversion asks."""
    try:
        raw = ConfigReader(contents.config, CONFIG).raw
    except WrongInput:
        return Shape()
    nested = [raw, *(raw[key] for key in ("dflash_config", "eagle_config") if isinstance(raw.get(key), Mapping))]

    def number(*names: str) -> int | None:
        values = (place.get(name) for place in nested for name in names)
        return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)

    captures = _captures(nested)
    count = len(captures) or (EAGLE3_CAPTURES if kind == "eagle3" else 0)
    return Shape(
        number("target_hidden_size") or _fused_width(contents.headers, count),
        number("num_target_layers"),
        number("vocab_size"),
        captures=captures,
        layers=number("num_hidden_layers"),
    )


def _captures(places: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Its capture layers counted from 0, at least: lists of the second kind are one higher, or count as the first."""
    for paths, more in ((CAPTURES, 0), (CAPTURES_PLUS_ONE, 1)):
        keys = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
        lists = (value for key in keys for place in places if isinstance(value := place.get(key), list) and value)
        if (found := next(lists, None)) is not None:
            whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= more for each in found)
            return tuple(each - more for each in found) if whole else ()
    return ()


def _fused_width(headers: Mapping[str, Any], captures: int) -> int | None:
    """fc's columns over the number of capture layers: it reads so many of the target's states side by side."""
    fusion = headers.get("fc.weight") or headers.get("model.fc.weight")
    if fusion is None or len(fusion.shape) != 2 or not captures or fusion.shape[1] % captures:
        return None
    return int(fusion.shape[1] // captures)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else config.get("model_type")
    return first if isinstance(first, str) else ""


def _quant(contents: Contents, name: str) -> str:
    """The scheme its config names, else what its own name says, else the type that most weights have."""
    said = contents.config.get("quantization_config")
    if isinstance(said, Mapping) and isinstance(said.get("quant_method"), str):
        bits = said.get("bits")
        scheme = said.get("quant_algo") or said.get("format") or ""
        words = [said["quant_method"], f"{bits}bit" if isinstance(bits, int) else scheme if bits is None else ""]
        return "-".join(word for word in words if isinstance(word, str) and word)
    counts: Counter[str] = Counter()
    for header in contents.headers.values():
        if header is not None:
            counts[header.dtype] += header.n_bytes
    return storage_label(name) or max(counts, key=lambda each: counts[each], default="")


def _weights(contents: Contents) -> int | None:
    """Weights without embedding and head; not told where a scheme packs several into one number."""
    headers: Headers = {name: header for name, header in contents.headers.items() if header is not None}
    if "quantization_config" in contents.config or len(headers) < len(contents.headers):
        return None
    inside = (header for name, header in headers.items() if not EMBEDDINGS.match(name) and name not in ("d2t", "t2d"))
    return sum(math.prod(header.shape) for header in inside)


def _name(folder: Path, repository: str | None) -> str:
    """The repository's, else the folder's; where that is everybody's, the one above."""
    if repository:
        return repository.split("/")[-1]
    place = folder.absolute()
    return next((name for name in (place.name, place.parent.name) if model_words(name)), place.name)


def _spelled(name: str) -> str:
    return name[: len(split_name(name)[0])]
