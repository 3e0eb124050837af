"""Everything the gates ask of the torch engine, measured in one pass over the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convert_drafter.converters.verify.acceptance import Acceptance, matching
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter
from convert_drafter.converters.verify.in_torch.drafting import Drafting, Reading
from convert_drafter.converters.verify.in_torch.same_drafts import compare
from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.in_torch.texts import Text, write_texts
from convert_drafter.converters.verify.loop import speculative_loop
from convert_drafter.converters.verify.measured import Agreement, Loss, Measured, SweepPoint, Watch
from convert_drafter.converters.verify.pay import StepTimes, lengths_to_time
from convert_drafter.converters.verify.prompts import Encoded
from convert_drafter.converters.verify.sweep import NEW_TOKENS, contexts


@dataclass(frozen=True)
class Bench:
    """The drafters of one verification, ready to draft for one target."""

    target: TorchTarget
    file: Drafting
    original: Drafting | None = None
    twin: Drafting | None = None

    @property
    def layers(self) -> list[int]:
        """Target layers whose states any of them reads."""
        both = [drafting.variant.captures for drafting in (self.file, self.original) if drafting is not None]
        return sorted({layer for captures in both for layer in captures})


def measure(bench: Bench, prompts: Sequence[Encoded], new_tokens: int, watch: Watch) -> Measured:
    """All prompts, one after the other; a prompt that the target answers with nothing but an end is left out."""
    found = Measured()
    for done, text in enumerate(write_texts(bench.target, prompts, new_tokens, bench.layers)):
        watch("drafting", done, len(prompts))
        if len(text.continuation) > 1:
            found = _with_text(found, bench, text)
    watch("drafting", len(prompts), len(prompts))
    return found


def _with_text(found: Measured, bench: Bench, text: Text) -> Measured:
    file, original = bench.file.read(text), bench.original.read(text) if bench.original else None
    if original is not None:
        found = replace(
            found,
            agreement=found.agreement + compare(original, file),
            expected=found.expected + _compared_twin(bench, original, text),
            originals=(*found.originals, original.walk()),
        )
    return replace(
        found,
        prompts=(*found.prompts, text.prompt.name),
        texts=(*found.texts, text.continuation),
        files=(*found.files, file.walk()),
        losses=(*found.losses, *_loss(bench, text)),
    )


def _compared_twin(bench: Bench, original: Reading, text: Text) -> Agreement:
    return Agreement() if bench.twin is None else compare(original, bench.twin.read(text))


def _loss(bench: Bench, text: Text) -> list[Loss]:
    """The real loop, target and all, held against the text that the target wrote alone."""
    drafter = TorchDrafter(bench.file.drafter, bench.target, bench.file.variant.captures)
    count = text.limit - text.prompt_length
    size = bench.file.variant.spec.draft_length
    tokens = speculative_loop(bench.target, drafter, text.prompt.tokens, count, size).tokens
    if tuple(tokens) == text.continuation:
        return []
    at = matching(tokens, text.continuation)
    return [Loss(text.prompt.name, at, bench.target.margin(text.tokens[: text.prompt_length + at]))]


def sweep(bench: Bench, prompts: Sequence[Encoded], lengths: Sequence[int], watch: Watch) -> list[SweepPoint]:
    """Both drafters at each context length."""
    points = []
    for done, length in enumerate(lengths):
        watch("length sweep", done, len(lengths))
        files, originals = list[Acceptance](), list[Acceptance]()
        for text in write_texts(bench.target, contexts(prompts, length), NEW_TOKENS, bench.layers):
            if len(text.continuation) > 1:
                files.append(bench.file.walk(text))
                originals += [bench.original.walk(text)] if bench.original else []
        points.append(SweepPoint(length, tuple(files), tuple(originals)))
    watch("length sweep", len(lengths), len(lengths))
    return points


def time_steps(bench: Bench, prompt: Encoded, new_tokens: int, watch: Watch) -> StepTimes:
    """Medians over the steps of one text, which has to have some, decoded plainly and with a few draft lengths."""
    lengths = lengths_to_time(bench.file.variant.spec.draft_length)
    plain = speculative_loop(bench.target, None, prompt.tokens, new_tokens, 0)
    draft, verify = dict[int, float](), dict[int, float]()
    for done, length in enumerate(lengths):
        watch("timing", done, len(lengths))
        drafter = TorchDrafter(bench.file.drafter, bench.target, bench.file.variant.captures)
        run = speculative_loop(bench.target, drafter, prompt.tokens, new_tokens, length)
        draft[length], verify[length] = run.median_draft_ms, run.median_verify_ms
    watch("timing", len(lengths), len(lengths))
    return StepTimes(plain.median_verify_ms, draft, verify)
