"""The llama.cpp engine: target, file and original as llama-server runs them, asked the same gates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.convert import ConvertJob, convert
from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.errors import MissingEngine, WrongInput
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import read_target
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.converters.verify import gates
from convert_drafter.converters.verify.acceptance import total
from convert_drafter.converters.verify.in_llama_cpp.answers import (
    ROUND_CONTEXT,
    Answer,
    Comparison,
    EngineRun,
    compare,
    context_for,
    run_prompts,
)
from convert_drafter.converters.verify.in_llama_cpp.probe import Engine, find_server
from convert_drafter.converters.verify.in_llama_cpp.process import EngineFailure
from convert_drafter.converters.verify.in_llama_cpp.serving import Setup, require_drafting, serving
from convert_drafter.converters.verify.in_llama_cpp.tokens import ServerTokenizer, logit_gap
from convert_drafter.converters.verify.job import MEASURED, STEP_SLACK, EngineAnswer, VerifyJob
from convert_drafter.converters.verify.measured import Loss, Measured, SweepPoint, Watch
from convert_drafter.converters.verify.prompts import Encoded, PromptSet, ask
from convert_drafter.converters.verify.sweep import contexts, lengths_to_sweep

TIE = 0.05  # nats between the two best tokens: batches of one and of eight tokens are summed in other orders
SAME_TYPES = {"F32", "F16", "BF16"}  # with these a file drafts what its checkpoint does


@dataclass(frozen=True)
class Asked:
    """What is asked of every server: prompts, then the sweep's contexts, in one list."""

    prompts: PromptSet
    swept: tuple[tuple[Encoded, ...], ...]

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        """Each text once: a context may be one of the prompts."""
        every = [*self.prompts.prompts, *(context for point in self.swept for context in point)]
        return list(dict.fromkeys(encoded.tokens for encoded in every))


@dataclass(frozen=True)
class Runs:
    """Answers to the same questions: the target alone, with the file, with the original where there is a source."""

    alone: EngineRun
    file: EngineRun
    original: EngineRun | None


def ready(job: VerifyJob) -> Engine:
    """The engine, if it can draft so. Raises `MissingEngine`."""
    engine = find_server(job.server)
    require_drafting(engine)
    return engine


def run_llama_cpp(job: VerifyJob, before: Sequence[Gate], watch: Watch) -> EngineAnswer:
    """Every measuring gate in llama-server, which cannot diagnose: the gates `before` change nothing here.

    Raises `MissingEngine`; what the file makes the engine do is a verdict.
    """
    target = job.gguf
    assert target is not None  # job.engines has seen to it
    drafter = read_drafter_file(job.file, target=read_target(target))
    engine = find_server(job.server)
    if drafter.cell.runtime != "llama.cpp":
        raise MissingEngine(
            f"{job.file}: a file for {drafter.cell.runtime}, which llama-server does not load: verify it in torch"
            " (--target with the target's folder), or `redialect` it"
        )
    require_drafting(engine, drafter.cell.draft_type)
    asked = _asked(job, engine, target, drafter.spec, watch)
    alone = run_prompts(engine, target, asked.tokens, job.new_tokens, threads=job.threads, on_progress=watch)
    settings = _settings(asked, alone)
    try:
        file = _drafting(job, engine, asked, job.file, drafter, watch)
    except EngineFailure as failure:
        if failure.exit_code != 1:
            raise
        return EngineAnswer(_crashed(failure), settings)
    with _original(job, target) as source:
        original = None if source is None else _drafting_original(job, engine, asked, source, watch)
    runs = Runs(alone, file, original)
    measured = _measured(engine, target, asked, runs)
    return EngineAnswer(_gates(job, drafter, asked, runs, measured), settings | {"file": dict(file.settings)}, measured)


def _asked(job: VerifyJob, engine: Engine, target: Path, spec: DrafterSpec, watch: Watch) -> Asked:
    """Prompts and contexts in the target's tokens; its own server encodes them."""
    facts = read_target(target)
    with serving(engine, Setup(target, ROUND_CONTEXT, threads=job.threads), watch) as server:
        prompts = ask(job.prompts, job.max_prompts, ServerTokenizer(server), facts.vocab_size, job.template)
    lengths = lengths_to_sweep(job.contexts, spec, facts.context_length or spec.context_length)
    return Asked(prompts, tuple(contexts(prompts.prompts, length) for length in lengths))


def _drafting(
    job: VerifyJob, engine: Engine, asked: Asked, path: Path, drafter: DrafterFile, watch: Watch
) -> EngineRun:
    assert job.gguf is not None
    length, how = drafter.spec.draft_length, drafter.cell.draft_type
    require_drafting(engine, how)
    count = job.new_tokens
    return run_prompts(engine, job.gguf, asked.tokens, count, path, length, job.threads, watch, draft_type=how)


def _drafting_original(job: VerifyJob, engine: Engine, asked: Asked, original: Path, watch: Watch) -> EngineRun:
    try:
        return _drafting(job, engine, asked, original, read_drafter_file(original), watch)
    except EngineFailure as failure:  # says nothing of the file
        raise WrongInput(f"{job.source}: the original itself does not run there: {failure}") from failure


@contextmanager
def _original(job: VerifyJob, target: Path) -> Iterator[Path | None]:
    """The checkpoint as an F32 GGUF, for as long as it is run."""
    if job.source is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="convert-drafter-") as folder:
        out = Path(folder) / "original-F32.gguf"
        convert(ConvertJob(job.source, target, "llama.cpp", "F32", out, settings=job.settings))
        yield out


def _crashed(failure: EngineFailure) -> tuple[Gate, ...]:
    """The file made the engine stop: that is the answer, and nothing else can be measured."""
    summary = f"llama-server {failure.what} while {failure.phase}"
    lines = (failure.reason, *(line for line in failure.log if line != failure.reason))
    rest = (Gate(name, Outcome.SKIPPED, "not measured: the engine stopped") for name in MEASURED[1:])
    return (Gate(MEASURED[0], Outcome.FAIL, summary, tuple(filter(None, lines))), *rest)


def _measured(engine: Engine, target: Path, asked: Asked, runs: Runs) -> Measured:
    prompts = asked.prompts.prompts
    alone, file = (_answers(run, prompts) for run in (runs.alone, runs.file))
    kept = [i for i, answer in enumerate(alone) if len(answer.tokens) > 1]
    original = [] if runs.original is None else _answers(runs.original, prompts)
    return Measured(
        prompts=tuple(prompts[i].name for i in kept),
        texts=tuple(alone[i].tokens for i in kept),
        files=tuple(file[i].acceptance for i in kept),
        originals=tuple(original[i].acceptance for i in kept) if original else (),
        losses=tuple(_losses(engine, target, asked, compare(runs.file, runs.alone), runs)),
    )


def _answers(run: EngineRun, encoded: Sequence[Encoded]) -> list[Answer]:
    by_prompt = dict(zip(run.prompts, run.answers, strict=True))
    return [by_prompt[each.tokens] for each in encoded]


def _losses(engine: Engine, target: Path, asked: Asked, compared: Comparison, runs: Runs) -> Iterator[Loss]:
    """Where a text differs, how far apart the target's two best tokens are there: that tells a tie."""
    differing = [(i, at) for i, at in enumerate(compared.first_difference) if at is not None]
    if not differing:
        return
    names = {each.tokens: each.name for point in (asked.prompts.prompts, *asked.swept) for each in point}
    texts = {i: (*runs.alone.prompts[i], *runs.alone.answers[i].tokens[:at]) for i, at in differing}
    with serving(engine, Setup(target, context_for(list(texts.values()), 1))) as server:
        for i, at in differing:
            yield Loss(names[runs.alone.prompts[i]], at, logit_gap(server, texts[i]))


def _gates(job: VerifyJob, drafter: DrafterFile, asked: Asked, runs: Runs, measured: Measured) -> tuple[Gate, ...]:
    points = [_point(point, runs) for point in asked.swept]
    return (
        gates.lossless(measured, TIE, len(asked.tokens)),
        same_steps(measured, {stored.type.name for stored in drafter.tensors.values()}),
        gates.acceptance(measured, job.max_drop, job.least_length),
        gates.length_sweep(points, drafter.spec),
        _pays(runs, measured),
    )


def _point(point: Sequence[Encoded], runs: Runs) -> SweepPoint:
    alone, file = (_answers(run, point) for run in (runs.alone, runs.file))
    kept = [i for i, answer in enumerate(alone) if len(answer.tokens) > 1]
    original = [] if runs.original is None else _answers(runs.original, point)
    return SweepPoint(
        len(point[0].tokens) if point else 0,
        tuple(file[i].acceptance for i in kept),
        tuple(original[i].acceptance for i in kept) if original else (),
    )


def same_steps(measured: Measured, types: set[str]) -> Gate:
    """The engine gives no distributions: the verify steps of each prompt stand for the drafts."""
    name = "same drafts"
    if not measured.originals:
        return Gate(name, Outcome.SKIPPED, gates.NO_SOURCE)
    pairs = list(zip(measured.prompts, measured.originals, measured.files, strict=True))
    differing = [f"{p}: {b.steps} verify steps, the original {a.steps}" for p, a, b in pairs if a.steps != b.steps]
    original, file = total(measured.originals).steps, total(measured.files).steps
    summary = f"{file} verify steps, the original {original}; {len(differing)} of {len(pairs)} prompts differ"
    figures = {"steps": [a.steps for _, a, _ in pairs], "engine_steps": [b.steps for _, _, b in pairs]}
    if not types <= SAME_TYPES:
        return Gate(name, Outcome.ADVICE, f"{summary}; quantized drafts are judged by the torch engine", (), figures)
    if original < gates.FEW_STEPS:
        return Gate(name, Outcome.UNDECIDED, f"{summary}: too few to tell", (), figures)
    same = abs(file - original) <= max(1, STEP_SLACK * original)
    return Gate(name, Outcome.PASS if same else Outcome.FAIL, summary, tuple(differing), figures)


def _pays(runs: Runs, measured: Measured) -> Gate:
    """Measured, not modelled: tokens per second with the drafter over those without."""
    name, speedup = "does it pay", compare(runs.file, runs.alone).speedup
    plain, step, draft = runs.alone.step_ms, runs.file.step_ms, runs.file.draft_ms
    if speedup is None or not plain or not step:
        return Gate(name, Outcome.SKIPPED, "llama-server told no times")
    length = total(measured.files).length
    pays = (
        f"{speedup:.2f}x the tokens per second" if speedup > 1 else f"it does not: {speedup:.2f}x the tokens per second"
    )
    summary = f"{pays} of llama-server alone; pays above {step / plain:.2f} tokens per verify step, has {length:.2f}"
    figures: dict[str, Any] = {
        "draft_ms": draft,
        "verify_ms": step - draft if draft is not None else None,
        "plain_ms": plain,
        "break_even": step / plain,
        "measured_speedup": speedup,
    }
    return Gate(name, Outcome.ADVICE, summary, (), figures)


def _settings(asked: Asked, alone: EngineRun) -> dict[str, Any]:
    return {**asked.prompts.settings, "target_alone": dict(alone.settings)}
