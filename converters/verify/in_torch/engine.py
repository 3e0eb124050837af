"""The torch engine: the target by transformers, the drafters of checkpoint and file by our reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from transformers import AutoTokenizer

from convert_drafter.converters.convert import read_published
from convert_drafter.converters.doctor import STRUCTURE
from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.errors import MissingEngine, WrongInput
from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.source_facts import IGNORED, noted, recorded_settings
from convert_drafter.converters.target import read_target
from convert_drafter.converters.verdict import Diagnosis, Gate, Outcome
from convert_drafter.converters.verify import gates
from convert_drafter.converters.verify.acceptance import total
from convert_drafter.converters.verify.diagnosis.diagnose import diagnose
from convert_drafter.converters.verify.in_torch.bench import Bench, measure, sweep, time_steps
from convert_drafter.converters.verify.in_torch.drafting import Drafting, Variant, variant
from convert_drafter.converters.verify.in_torch.same_drafts import quantization_errors, twin
from convert_drafter.converters.verify.in_torch.target import TorchTarget, first_line
from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, file_weights
from convert_drafter.converters.verify.job import EngineAnswer, VerifyJob
from convert_drafter.converters.verify.measured import Measured, Watch
from convert_drafter.converters.verify.pay import payoff
from convert_drafter.converters.verify.prompts import Messages, PromptSet, ask
from convert_drafter.converters.verify.sweep import lengths_to_sweep

# Two best tokens this close are a tie, in nats: a few times what the type's digits leave of logits around 30.
TIES = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.05}
SMALL = 2**27  # parameters
TIMED_TOKENS = 64


class HubTokenizer:
    """The target's own tokenizer, from its folder."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise WrongInput(f"{folder}: its tokenizer cannot be read: {first_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        try:
            tokens: list[int] = self._tokenizer(text)["input_ids"]
        except (TypeError, ValueError) as error:  # half of a surrogate pair is no text
            raise WrongInput(f"the text {text[:40]!r}: its tokenizer refuses it: {first_line(error)}") from error
        return tokens

    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode_chat(self, messages: Messages, options: Mapping[str, Any]) -> list[int]:
        words = {**options, "tokenize": False, "add_generation_prompt": True}
        try:
            text = self._tokenizer.apply_chat_template([dict(message) for message in messages], **words)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            said = f"the target's chat template refuses {messages[0]['content'][:40]!r}"
            raise WrongInput(f"{self._tokenizer.name_or_path}: {said}: {first_line(error)}") from error
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens


def run_torch(job: VerifyJob, before: Sequence[Gate], watch: Watch) -> EngineAnswer:
    """Every measuring gate in torch; what the gates `before` fail is diagnosed even if these hold.

    Raises `WrongInput` for a target, source or prompts that cannot be read.
    """
    assert job.folder is not None  # job.engines has seen to it
    try:
        return _run(job, job.folder, before, watch)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        advice = "a smaller --dtype, or the target's GGUF in llama.cpp"
        raise MissingEngine(f"{job.folder}: not enough memory to run it in {job.dtype}: try {advice}") from error


def _run(job: VerifyJob, folder: Path, before: Sequence[Gate], watch: Watch) -> EngineAnswer:
    watch("loading", 0, 3)
    target = TorchTarget(folder, job.dtype)
    with _threads(job.threads, target):
        prompts = _prompts(job, folder, target)
        watch("loading", 1, 3)
        drafter = read_drafter_file(job.file, target=read_target(folder))
        file = variant(job.file.name, drafter.spec, file_weights(drafter))
        watch("loading", 2, 3)
        original = _variant_of_source(job, drafter)
        bench = _bench(target, file, original, _allowed(drafter, before))
        watch("loading", 3, 3)
        measured = measure(bench, prompts.prompts, job.new_tokens, watch)
        found = _gates(job, bench, prompts, measured, watch)
        doubtful = original is None or any(gate.outcome is Outcome.FAIL for gate in (*before, *found))
        diagnosis = _diagnosis(job, bench, prompts, watch) if doubtful and (job.diagnose or job.repair) else None
        if original is None and diagnosis is not None:
            found = [gates.outdone(gate, diagnosis) for gate in found]
    return EngineAnswer(tuple(found), _settings(job, prompts, target), measured, diagnosis)


def _gates(job: VerifyJob, bench: Bench, prompts: PromptSet, measured: Measured, watch: Watch) -> list[Gate]:
    spec = bench.file.variant.spec
    lengths = lengths_to_sweep(job.contexts, spec, bench.target.context_length)
    points = sweep(bench, prompts.prompts, lengths, watch)
    found = [
        gates.lossless(measured, TIES[job.dtype]),
        gates.same_drafts(measured),
        gates.acceptance(measured, job.max_drop, job.least_length),
        gates.length_sweep(points, spec),
    ]
    timed = next((prompt for prompt in prompts.prompts if prompt.name in measured.prompts), None)
    if timed is not None:
        times = time_steps(bench, timed, min(job.new_tokens, TIMED_TOKENS), watch)
        found.append(gates.does_it_pay(payoff(total(measured.files), times), times, "torch on this machine"))
    return found


def _diagnosis(job: VerifyJob, bench: Bench, prompts: PromptSet, watch: Watch) -> Diagnosis:
    original = bench.original.variant if bench.original else None
    return diagnose(bench.file.variant, original, bench.target, prompts.prompts, job.new_tokens, watch)


def _prompts(job: VerifyJob, folder: Path, target: TorchTarget) -> PromptSet:
    return ask(job.prompts, job.max_prompts, HubTokenizer(folder), target.vocab_size, job.template)


def _variant_of_source(job: VerifyJob, drafter: DrafterFile) -> Variant | None:
    if job.source is None:
        return None
    settings, ignore = {**recorded_settings(drafter.file), **job.settings}, noted(drafter.file, IGNORED)
    try:
        published = read_published(job.source, job.folder, job.settings, ignore)
    except WrongInput:  # what the file's own conversion needed to be told
        published = read_published(job.source, job.folder, settings, ignore)
    return variant(job.source.name, published.spec, checkpoint_weights(published))


def _allowed(drafter: DrafterFile, before: Sequence[Gate]) -> dict[TensorKey, float]:
    """What the structure gate found each tensor's type to explain, relative to the tensor's own size."""
    compared = next((gate.figures.get("tensors", ()) for gate in before if gate.name == STRUCTURE), ())
    allowed = {tensor["name"]: tensor["allowed"] for tensor in compared}
    return {key: allowed[stored.name] for key, stored in drafter.tensors.items() if stored.name in allowed}


def _bench(target: TorchTarget, file: Variant, original: Variant | None, allowed: dict[TensorKey, float]) -> Bench:
    if original is None:
        return Bench(target, Drafting(file, target))
    noisy = twin(original, quantization_errors(original, file, allowed))
    return Bench(target, Drafting(file, target), Drafting(original, target), Drafting(noisy, target))


def _settings(job: VerifyJob, prompts: PromptSet, target: TorchTarget) -> dict[str, Any]:
    return {
        **prompts.settings,
        "new_tokens": job.new_tokens,
        "sampling": "greedy",
        "target_dtype": job.dtype,
        "drafter_dtype": "float32",
        "target_architecture": target.architecture,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def _threads(count: int | None, target: TorchTarget) -> Iterator[None]:
    """All cores, but one for a small target: there handing work over costs more than the work."""
    before = torch.get_num_threads()
    small = sum(table.numel() for table in target.model.parameters()) < SMALL
    torch.set_num_threads(count or (1 if small else before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
