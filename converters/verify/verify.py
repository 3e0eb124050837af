"""Verify: a drafter's file and its target in, a verdict out. A job goes in; nothing is printed here.

Structure and pairing are asked of the files alone. What follows runs them: in torch, where the target is a Hugging
Face folder; in llama.cpp, where it is a GGUF; in both, and against each other, where both are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

from convert_drafter.converters.destination import refuse_overwriting
from convert_drafter.converters.doctor import STRUCTURE, doctor
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.errors import DrafterError, MissingEngine, WrongInput, WrongUsage
from convert_drafter.converters.pairing import PAIRING
from convert_drafter.converters.target import read_target
from convert_drafter.converters.verdict import Gate, Outcome, Verdict
from convert_drafter.converters.verify.diagnosis.repair import repair
from convert_drafter.converters.verify.engine_gate import engine_gate
from convert_drafter.converters.verify.job import INSTALL, MEASURED, EngineAnswer, VerifyJob
from convert_drafter.converters.verify.measured import Watch
from convert_drafter.converters.verify.prompts import read_prompts

Run = Callable[[VerifyJob, Sequence[Gate], Watch], EngineAnswer]


def verify(job: VerifyJob, watch: Watch = lambda phase, done, total: None) -> Verdict:
    """Ask every gate in order. Raises `WrongUsage`, `WrongInput` or `MissingEngine`; a fault is in the verdict."""
    job = job.fetched()
    # what is missing is said before anything is measured
    engines = {name: find_engine(name, job) for name in job.engines}
    _check(job)
    target = job.folder or job.gguf
    gates = doctor(job.file, target, job.source, job.settings, _reading(job, watch))
    gates = (*gates[:-1], _paired(job, gates[-1]))
    refused = _refusal(job, gates)
    answers = dict[str, EngineAnswer]()
    for name, run in engines.items():
        try:
            answers[name] = _skipped(refused) if refused else run(job, gates, watch)
        except DrafterError as error:
            if not answers:
                raise
            answers[name] = _skipped(str(error))  # what the first engine measured is not lost
    verdict = Verdict(
        file=str(job.file),
        target=" and ".join(map(str, job.targets)),
        source=None if job.source is None else str(job.source),
        engine=" and ".join(engines),
        settings={"command": job.command} | {name: answer.settings for name, answer in answers.items()},
        gates=(*gates, *_measured_gates(answers)),
        diagnosis=next((answer.diagnosis for answer in answers.values() if answer.diagnosis), None),
    )
    return _repaired(job, verdict)


def _check(job: VerifyJob) -> None:
    for path, what in ((job.file, "a drafter's GGUF"), *((target, "the target") for target in job.targets)):
        if not path.exists():
            raise WrongInput(f"{path}: nothing there, expected {what}")
    if job.file.is_dir():
        raise WrongInput(f"{job.file}: is a folder, expected a drafter's GGUF; `convert` makes one of a checkpoint")
    if len(job.targets) > 2 or len({target.is_dir() for target in job.targets}) < len(job.targets):
        raise WrongUsage("--target: give one folder (torch), one GGUF (llama.cpp), or one of each")
    if job.repair is not None:
        refuse_overwriting(job.repair, job.inputs)
    read_prompts(job.prompts)  # what is wrong with them is said before a target is loaded


def _reading(job: VerifyJob, watch: Watch) -> Callable[[int], None]:
    """Bytes looked at, as progress: the file's once, with a source twice."""
    total, done = job.file.stat().st_size * (1 if job.source is None else 2), 0

    def on_bytes(n: int) -> None:
        nonlocal done
        done += n
        watch("reading", done, total)

    return on_bytes


def find_engine(name: str, job: VerifyJob) -> Run:
    """An engine's run, imported only now: torch takes seconds. Raises `MissingEngine`."""
    if name == "llama.cpp":
        from convert_drafter.converters.verify.in_llama_cpp.engine import ready, run_llama_cpp

        ready(job)
        return run_llama_cpp
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise MissingEngine(f"the torch engine needs {' and '.join(missing)}: {INSTALL}")
    from convert_drafter.converters.verify.in_torch.engine import run_torch

    return run_torch


def _paired(job: VerifyJob, gate: Gate) -> Gate:
    """The pairing with every target: the folder's answer, or the GGUF's where that is the worse one."""
    if job.folder is None or job.gguf is None or gate.outcome is not Outcome.PASS:
        return gate
    return doctor(job.file, job.gguf)[-1]


def _refusal(job: VerifyJob, gates: tuple[Gate, ...]) -> str | None:
    """Why nothing can be measured: a pair that does not belong together, or a file that is not all there."""
    outcomes = {gate.name: gate.outcome for gate in gates}
    if outcomes.get(PAIRING) is Outcome.FAIL:
        return "not measured: this drafter and this target do not belong together"
    if outcomes[STRUCTURE] is Outcome.FAIL and not _can_be_run(job):
        return "not measured: the file cannot be run as it is"
    return None


def _can_be_run(job: VerifyJob) -> bool:
    """Whether every fact and tensor that a drafter needs is there; they may be wrong."""
    try:
        return not read_drafter_file(job.file, target=read_target(job.targets[0])).problems
    except WrongInput:
        return False


def _skipped(reason: str) -> EngineAnswer:
    return EngineAnswer(tuple(Gate(name, Outcome.SKIPPED, reason) for name in MEASURED), {})


def _measured_gates(answers: dict[str, EngineAnswer]) -> tuple[Gate, ...]:
    """One engine's gates; with both, torch's, and llama.cpp held against them in one gate more."""
    if len(answers) < 2:
        return next(iter(answers.values())).gates
    torch, llama = answers["torch"], answers["llama.cpp"]
    return (*torch.gates, engine_gate(torch, llama))


def _repaired(job: VerifyJob, verdict: Verdict) -> Verdict:
    found = verdict.diagnosis.found if verdict.diagnosis else None
    if job.repair is None or found is None or not found.facts:
        return verdict
    try:
        return replace(verdict, repaired=str(repair(job.file, found.facts, job.repair)))
    except (DrafterError, OSError) as error:  # the verdict stands, whatever comes of the repair
        return replace(verdict, notes=(f"not repaired: {error}",))
