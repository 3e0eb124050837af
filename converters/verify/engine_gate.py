"""llama.cpp held against torch on the same prompts: the same text, the same number of verify steps."""

from __future__ import annotations

from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.converters.verify.acceptance import total
from convert_drafter.converters.verify.job import STEP_SLACK, EngineAnswer

NAME = "llama.cpp"


def engine_gate(torch: EngineAnswer, llama: EngineAnswer) -> Gate:
    """Steps are compared on prompts where both engines' targets write the same text: precision changes texts."""
    failed = next((gate for gate in llama.gates if gate.outcome is Outcome.FAIL), None)
    if failed is not None:
        return Gate(NAME, Outcome.FAIL, f"{failed.name}: {failed.summary}", failed.details)
    if not llama.measured.prompts:
        return Gate(NAME, Outcome.SKIPPED, next((gate.summary for gate in llama.gates), "not measured"))
    texts = dict(zip(torch.measured.prompts, torch.measured.texts, strict=True))
    ours = dict(zip(torch.measured.prompts, torch.measured.files, strict=True))
    theirs = zip(llama.measured.prompts, llama.measured.texts, llama.measured.files, strict=True)
    shared = [(name, ours[name], walk) for name, text, walk in theirs if texts.get(name) == text]
    other = len(llama.measured.prompts) - len(shared)
    if not shared:
        return Gate(NAME, Outcome.SKIPPED, "its target writes other texts than torch's: no step to compare")
    steps, engine_steps = total(a for _, a, _ in shared).steps, total(b for _, _, b in shared).steps
    apart = sum(abs(a.steps - b.steps) for _, a, b in shared)
    same = apart <= max(2, STEP_SLACK * steps)
    worse = Outcome.UNDECIDED if other else Outcome.FAIL  # another precision moves steps where it moves texts
    summary = f"{engine_steps} verify steps in llama.cpp, {steps} in torch, on {len(shared)} prompts with the same text"
    lines = [f"{name}: {b.steps} verify steps, {a.steps} in torch" for name, a, b in shared if a.steps != b.steps]
    if other:
        lines.append(f"left out for their texts, which the targets' precision changes: {other} prompts")
    figures = {"steps": [a.steps for _, a, _ in shared], "engine_steps": [b.steps for _, _, b in shared]}
    return Gate(NAME, Outcome.PASS if same else worse, summary, tuple(lines), figures)
