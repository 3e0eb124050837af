"""Stamps: what a file was made from, so that it is made again exactly when that changes. Never by mtime.

A stamp holds what was *decided* from the settings, not the settings as they were wished: every metadata key to write,
every tensor's name, shape and type, and the SHA-256 of each file whose bytes go in. So a target's new tokenizer, a
recipe that learned a rule and a changed config are noticed, and a path that moved is not. Beside it stand the hashes of
what was made: a file under the right name that is another one is no result.

Source of the idea: T-27 and T-28, comparing wish with wish lets a stale file stand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convert_drafter.converters.convert import Conversion
from convert_drafter.converters.destination import OURS, write_whole
from convert_drafter.converters.drafters import needed
from convert_drafter.converters.errors import DrafterError, WrongInput
from convert_drafter.converters.file_hash import FileHash, hash_file
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_model import parts_of
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_tensors
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.plan import PlannedTensor
from convert_drafter.converters.provenance import tool_version
from convert_drafter.converters.quantize import Quantization
from convert_drafter.converters.spec import facts_of
from convert_drafter.converters.verify.job import VerifyJob

SCHEMA, VERSION = "convert-drafter/stamp", 1
ENDING = ".stamp.json"
OURS_BESIDE = (*OURS, ".verdict.json", ENDING)  # what a verification does not read in a model's folder
DIGITS = 16  # of a digest that is only compared: 64 bits, nobody forges a stamp of their own
HERE = Path(__file__).parent
# the code that decides no byte of a GGUF, and that which decides no verdict
BESIDE_FILES, BESIDE_VERDICTS = ("batch", "commands", "verify", "cli.py"), ("batch", "commands", "cli.py")


@dataclass(frozen=True)
class Verification:
    """A verification and the reports to write of it; `strict` makes an undecided one fail."""

    job: VerifyJob
    json: Path
    html: Path | None = None
    strict: bool = False


Decided = Conversion | Quantization | Verification


@dataclass(frozen=True)
class Wanted:
    """What is about to be made: what was decided, the files whose bytes go in (by stamp's name), what comes out."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, Path]
    outputs: tuple[Path, ...]


@dataclass(frozen=True)
class Stamp:
    """What a file was made from, and the hash of each file that was made, by its name."""

    settings: Mapping[str, Any]
    inputs: Mapping[str, FileHash]
    outputs: Mapping[str, FileHash] = field(default_factory=dict)


@dataclass(frozen=True)
class Standing:
    """Where a result stands: `reasons` why it has to be made, none where it is up to date."""

    wanted: Wanted
    stamp: Stamp
    reasons: tuple[str, ...]

    @property
    def up_to_date(self) -> bool:
        return not self.reasons


def stamp_path(out: Path) -> Path:
    return out.with_name(out.name + ENDING)


def standing(decided: Decided, rehash: bool = False) -> Standing:
    """Hold what was decided against the stamp beside the result; `rehash` reads every file again.

    Raises `WrongInput` for an input that cannot be read.
    """
    wanted = WANTED[type(decided)](decided)
    known = read_stamp(wanted.outputs[0])
    before = known or Stamp({}, {})
    stamp = Stamp(
        json.loads(json.dumps(wanted.settings)),
        {name: hash_file(path, before.inputs.get(name), rehash) for name, path in wanted.inputs.items()},
    )
    absent = [f"{path}: not there" for path in wanted.outputs if not path.exists()]
    reasons = absent or (["no stamp of an earlier run"] if known is None else list(_differences(before, stamp)))
    kept = () if reasons else wanted.outputs
    made = {path.name: hash_file(path, before.outputs.get(path.name), rehash) for path in kept}
    reasons += [f"{name}: not the file that was made" for name in made if _other(made, before.outputs, name)]
    result = Standing(wanted, replace(stamp, outputs=made), tuple(reasons))
    if result.up_to_date and result.stamp != known:
        _write(result.stamp, wanted.outputs[0])  # the same content in another place: what was read is remembered
    return result


def record(before: Standing) -> Stamp:
    """Write the stamp of what has just been made. Raises `WrongInput` where a source changed meanwhile."""
    wanted = before.wanted
    for name, path in wanted.inputs.items():
        if hash_file(path, before.stamp.inputs[name]).sha256 != before.stamp.inputs[name].sha256:
            raise WrongInput(f"{path}: changed while {wanted.outputs[0]} was made of it; run it again")
    stamp = replace(before.stamp, outputs={path.name: hash_file(path) for path in wanted.outputs})
    _write(stamp, wanted.outputs[0])
    return stamp


def if_changed(decided: Decided, asked: bool, make: Callable[[], Any]) -> Any:
    """Make it and stamp it, or None where it was asked and nothing changed; plainly make it where it was not asked."""
    if not asked:
        return make()
    found = standing(decided)
    if found.up_to_date:
        return None
    made = make()
    record(found)
    return made


# --- the file ---


def read_stamp(out: Path) -> Stamp | None:
    """The stamp beside a result; None where there is none, or none that this version wrote."""
    path = stamp_path(out)
    try:
        found = json_object(str(path), path.read_bytes())
        if (found["schema"], found["version"]) != (SCHEMA, VERSION):
            return None
        inputs, outputs = (_hashes(found[part]) for part in ("inputs", "outputs"))
        return Stamp(dict(found["settings"]), inputs, outputs)
    except (OSError, DrafterError, KeyError, TypeError, ValueError, AttributeError):
        return None  # a stamp that cannot be read proves nothing


def _hashes(found: Mapping[str, Any]) -> dict[str, FileHash]:
    return {name: FileHash(str(e["sha256"]), tuple(e["seen"]) if e["seen"] else None) for name, e in found.items()}


def _write(stamp: Stamp, out: Path) -> None:
    content = {"schema": SCHEMA, "version": VERSION, **asdict(stamp)}
    write_whole(json.dumps(content, indent=1) + "\n", stamp_path(out))


def _differences(before: Stamp, now: Stamp) -> Iterator[str]:
    """In words; digests are not shown, they tell nobody anything."""
    for name in dict.fromkeys((*now.settings, *before.settings)):
        old, new = before.settings.get(name), now.settings.get(name)
        if old != new:
            yield f"{name}: changed" if name in DIGESTS else f"{name}: was {old!r}, is {new!r}"
    for name in dict.fromkeys((*now.inputs, *before.inputs)):
        if _other(now.inputs, before.inputs, name):
            yield f"{name}: {'new' if name not in before.inputs else 'gone' if name not in now.inputs else 'changed'}"


def _other(now: Mapping[str, FileHash], before: Mapping[str, FileHash], name: str) -> bool:
    return name not in now or name not in before or now[name].sha256 != before[name].sha256


# --- what was decided ---

DIGESTS = ("code", "facts", "keys", "tensors")


def _of_conversion(found: Conversion) -> Wanted:
    job, checkpoint = found.job, found.published.checkpoint
    settings = {
        **_versions("numpy", "ml_dtypes", "gguf", beside=BESIDE_FILES),
        "kind": found.published.kind.name,
        "runtime": job.runtime,
        "recipe": job.recipe,
        "set": dict(sorted(job.settings.items())),
        "ignore-tensor": sorted(job.ignore),
        "types": asdict(job.options),
        "report": job.measure,
        "facts": _digest(f"{name}={value!r}" for name, value in facts_of(found.published.spec).items()),
        "keys": _digest(map(_key, found.keys)),
        "tensors": _digest(map(_planned, found.plan.tensors)),
    }
    inputs = {f"source/{path.name}": path for path in (checkpoint.config_path, *checkpoint.files)}
    attach = fetch_tensors(job.attach, found.base).path if job.attach and found.base else None
    beside = {"imatrix": job.importance, "attach": attach}
    return Wanted(settings, inputs | {name: path for name, path in beside.items() if path}, (job.out,))


def _of_quantization(found: Quantization) -> Wanted:
    job = found.job
    settings = {
        **_versions("numpy", "gguf", beside=BESIDE_FILES),
        "recipe": job.recipe,
        "types": asdict(job.options),
        "report": job.measure,
        "keys": _digest(map(_key, found.keys)),
        "tensors": _digest(f"{r.stored.name} {r.stored.shape} {r.choice.type.name}" for r in found.recodings),
    }
    source = fetch_tensors(job.source, found.file).path
    inputs = {"source": source, **({"imatrix": job.importance} if job.importance else {})}
    return Wanted(settings, inputs, (job.out,))


def _of_verification(found: Verification) -> Wanted:
    """Nothing is decided before a verification runs: its settings are the job's, without what changes no answer."""
    source = found.job.source
    job = replace(found.job.fetched(), source=None if source is None else fetch(source, Part.DRAFTER, needed))
    wished = {
        "max-prompts": job.max_prompts, "new-tokens": job.new_tokens, "max-drop": job.max_drop,
        "min-acceptance-length": job.least_length, "contexts": job.contexts, "dtype": job.dtype,
        "template": dict(job.template), "set": dict(job.settings), "diagnose": job.diagnose,
    }  # fmt: skip
    packages = ("torch", "transformers") if "torch" in job.engines else ()
    versions = _versions("numpy", "gguf", *packages, beside=BESIDE_VERDICTS)
    settings = {**versions, "engines": job.engines, "strict": found.strict, "html": found.html is not None, **wished}
    outputs = tuple(filter(None, (found.json, found.html)))
    return Wanted(settings, dict(_read_by(job, outputs)), outputs)


WANTED: dict[type, Callable[[Any], Wanted]] = {
    Conversion: _of_conversion, Quantization: _of_quantization, Verification: _of_verification
}  # fmt: skip


def _read_by(job: VerifyJob, outputs: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Every file that a verification may read: a model's folder whole, but for what we write into it."""
    roots = {"file": job.file, "folder": job.folder, "gguf": job.gguf, "source": job.source, "prompts": job.prompts}
    for name, root in roots.items():
        if root is None:
            continue
        if not root.is_dir():
            yield name, root
            yield from ((f"{name}/{part.name}", part) for part in parts_of(root) if part != root and part.exists())
            continue
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not hidden and not path.name.endswith(OURS_BESIDE) and path not in outputs:
                yield f"{name}/{path.relative_to(root).as_posix()}", path
    if "llama.cpp" in job.engines:
        from convert_drafter.converters.verify.in_llama_cpp.probe import find_server, libraries

        program = find_server(job.server).path
        yield "llama-server", program
        yield from ((f"llama-server/{path.name}", path) for path in libraries(program))


def _planned(tensor: PlannedTensor) -> str:
    header = tensor.header
    source = f"{header.file.name} {header.name} {header.stored} {header.dtype} {header.start} {header.end}"
    return f"{tensor.name} {tensor.shape} {tensor.choice.type.name} {tensor.op.name} {source}"


def _key(entry: KeyValue) -> str:
    return f"{entry.key} {entry.type!r} {entry.element!r} {entry.value!r}"


def _digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part}\n".encode("utf-8", "backslashreplace"))
    return found.hexdigest()[:DIGITS]


def _versions(*packages: str, beside: tuple[str, ...]) -> dict[str, str]:
    """This program, by version and code: a checkout changes without its version; and what it computes with."""
    ours = {"convert-drafter": tool_version(), "code": code_digest(beside)}
    return ours | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@cache
def code_digest(beside: tuple[str, ...] = ()) -> str:
    """Of the package's own files, prompts and templates included, without those that lie `beside` the matter."""
    import convert_drafter.quant

    found = hashlib.sha256()
    for root in (HERE, Path(convert_drafter.quant.__file__).parent):
        for path in sorted(root.rglob("*")):
            place = path.relative_to(root)
            if path.is_file() and "__pycache__" not in place.parts and place.parts[0] not in beside:
                found.update(f"{root.name}/{place.as_posix()}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:DIGITS]


__all__ = ["Stamp", "Standing", "Verification", "code_digest", "if_changed", "read_stamp", "record", "standing"]
