"""From numbers to answers: each gate that measures acceptance, decided by one rule and said in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verdict import Diagnosis, Gate, Outcome
from convert_drafter.converters.verify.acceptance import Acceptance, total
from convert_drafter.converters.verify.measured import Measured, SweepPoint
from convert_drafter.converters.verify.pay import Payoff, StepTimes
from convert_drafter.converters.verify.statistics import Difference, compare, length_interval, position_intervals

NO_SOURCE = "no original to compare with: give --source, the checkpoint it was made from"
# A file may be this much further from the original than noise of its own quantization errors is: on the fixture
# thirteen recipes are 1.1 to 1.9 times as far (docs/verify.md). Rounding alone is below 1e-12 nats, a window one token
# too wide 7e-5.
TWIN_FACTOR, ROUNDING_KL = 3.0, 1e-6
FEW_DRAFTS = 300  # a right Q8_0 file was 3.6 times as far on 152 of them: so few do not tell between 3 and 6
COLLAPSED = 0.3  # share of first drafts accepted; a working drafter is far above it, one with a wrong fact below
NO_ROOM = "the target has no room for a context to try"
NOTHING = "nothing was measured: the target ends every text at once"
SWEEP_DROP = 0.15  # at one context length there are few prompts
CLIFF = 0.4  # of the drafts accepted at a shorter context
FEW_STEPS = 16  # below that nothing was really drafted
HALF = 0.5  # of the original's accepted drafts: so far off that few texts tell


def lossless(measured: Measured, tie: float, texts: int | None = None) -> Gate:
    """The text with the drafter is the text without; where two logits differ by rounding only, either is right.

    `texts` is how many were compared, where that is more than the prompts.
    """
    if not measured.prompts:
        return Gate("lossless", Outcome.SKIPPED, NOTHING)
    ties = [loss for loss in measured.losses if loss.margin is not None and loss.margin <= tie]
    wrong = [loss for loss in measured.losses if loss not in ties]
    count = len(measured.prompts) if texts is None else texts
    same = count - len(measured.losses)
    lines = [f"{loss.prompt}: another text from token {loss.at} on{_margin(loss.margin)}" for loss in wrong]
    lines += [f"{loss.prompt}: a rounding tie at token {loss.at}, either text is the target's" for loss in ties]
    outcome = Outcome.FAIL if wrong else Outcome.PASS
    summary = f"{same} of {count} prompts: the same text with the drafter as without"
    figures = {"prompts": count, "same": same, "ties": len(ties)}
    return Gate("lossless", outcome, summary + (f", {len(ties)} rounding ties" if ties else ""), tuple(lines), figures)


def _margin(margin: float | None) -> str:
    return "" if margin is None else f"; its two best tokens are {margin:.2g} nats apart, no tie"


def same_drafts(measured: Measured) -> Gate:
    """Distributions on identical inputs: no further from the original than the file's quantization errors explain."""
    found, name = measured.agreement, "same drafts"
    if not measured.originals:
        return Gate(name, Outcome.SKIPPED, NO_SOURCE)
    allowed = TWIN_FACTOR * measured.expected.kl + ROUNDING_KL
    same = found.kl <= allowed and not found.lacking
    positions = sum(found.compared)
    summary = (
        f"{found.top1:.1%} of {positions:,} drafts equal the original's, KL {found.kl:.2g} nats"
        f" (its quantization explains {allowed:.2g})"
    )
    doubtful = positions < FEW_DRAFTS and found.kl <= 2 * TWIN_FACTOR * measured.expected.kl and not found.lacking
    far = "on so few drafts a near tie or two is as much: more or longer prompts tell"
    far = far if doubtful else "the same inputs give other distributions: a fact or a tensor is not the original's"
    why = () if same else (far,)
    if found.lacking:
        why = (*why, f"its block is shorter: {found.lacking:,} drafts of the original are not there")
    figures = {
        "positions": positions,
        "top1": found.top1,
        "kl": found.kl,
        "kl_allowed": allowed,
        "top1_by_position": list(found.top1_by_position),
    }
    outcome = Outcome.PASS if same else Outcome.UNDECIDED if doubtful else Outcome.FAIL
    return Gate(name, outcome, summary, why, figures)


def acceptance(measured: Measured, max_drop: float, least: float | None) -> Gate:
    """Tokens per verify step: against the original's where there is one, and against what the user asks for."""
    file = total(measured.files)
    if not file.steps:
        return Gate("acceptance", Outcome.FAIL, "no verify step was taken: no prompt had more than one new token")
    gate = _against_original(measured, file, max_drop) if measured.originals else _alone(measured, file)
    if least is not None and file.length < least:
        line = f"{file.length:.2f} tokens per verify step, at least {least:g} were asked for"
        return Gate(gate.name, Outcome.FAIL, gate.summary, (*gate.details, line), gate.figures)
    return gate


def _against_original(measured: Measured, file: Acceptance, max_drop: float) -> Gate:
    original, found = total(measured.originals), compare(measured.originals, measured.files, max_drop)
    summary = (
        f"{file.length:.2f} tokens per verify step, the original {original.length:.2f}:"
        f" {found.relative:+.1%} ({_interval(found)})"
    )
    outcome = {True: Outcome.PASS, False: Outcome.FAIL, None: Outcome.UNDECIDED}[found.holds(max_drop)]
    lines: tuple[str, ...] = ()
    if original.steps < FEW_STEPS or not sum(original.accepted):
        outcome, lines = Outcome.UNDECIDED, (f"{original.steps} verify steps of the original are too few to tell",)
    elif outcome is Outcome.UNDECIDED:
        more = "more prompts" if found.needed is None else f"about {found.needed} more prompts"
        lines = (f"not enough prompts to tell whether it lost more than {max_drop:.0%}: {more} would",)
    elif outcome is Outcome.FAIL:
        lines = (f"it lost more than the {max_drop:.0%} that --max-drop allows",)
    figures = {
        "prompts": found.prompts,
        "original": _figures(original, measured.originals),
        "file": _figures(file, measured.files),
        "difference": found.relative,
        "interval": [found.low, found.high],
        "needed": found.needed,
        "max_drop": max_drop,
    }
    return Gate("acceptance", outcome, summary, lines, figures)


def _interval(found: Difference) -> str:
    return f"95 % interval {found.low:+.1%} to {found.high:+.1%}, {found.prompts} prompts"


def _alone(measured: Measured, file: Acceptance) -> Gate:
    summary = f"{file.length:.2f} tokens per verify step, {file.rate:.0%} of drafts accepted; {NO_SOURCE}"
    figures = {"prompts": len(measured.files), "file": _figures(file, measured.files)}
    if not sum(file.drafted):
        return Gate("acceptance", Outcome.FAIL, summary, ("nothing was drafted at all",), figures)
    if len(file.drafted) > 1 and file.by_position[0] < COLLAPSED:
        share = f"{file.by_position[0]:.0%}"
        line = f"{share} of first drafts are right: collapsed, a working drafter has most of them right"
        return Gate("acceptance", Outcome.FAIL, summary, (line,), figures)
    return Gate("acceptance", Outcome.ADVICE, summary, (), figures)


def _figures(walk: Acceptance, each: Sequence[Acceptance]) -> dict[str, Any]:
    """The sum over prompts, with the intervals that these prompts give."""
    several = len(walk.drafted) > 1  # an engine may tell only the sum over all positions
    length, positions = length_interval(each), position_intervals(each) if several else ()
    return {
        "length": walk.length,
        "length_interval": None if length is None else list(length),
        "rate": walk.rate,
        "steps": walk.steps,
        "by_position": list(walk.by_position) if several else [],
        "by_position_interval": [None if found is None else list(found) for found in positions],
    }


def outdone(gate: Gate, diagnosis: Diagnosis) -> Gate:
    """Acceptance without an original: a drafter that drafts clearly better with one fact changed is not right."""
    if gate.name != "acceptance" or diagnosis.found is None:
        return gate
    better = f"{diagnosis.found.length:.2f} tokens per verify step with {diagnosis.found.name}"
    return replace(gate, outcome=Outcome.FAIL, details=(*gate.details, better))


def length_sweep(points: Sequence[SweepPoint], spec: DrafterSpec) -> Gate:
    """Acceptance by context length; a length at which the file collapses and the original does not is a fault."""
    if not any(point.files for point in points):
        return Gate("length sweep", Outcome.SKIPPED, NOTHING if points else NO_ROOM)
    told = [(point, total(point.files), total(point.originals)) for point in points if point.files]
    fallen = [
        f"with {point.context} tokens of context {file.length:.2f} per verify step, the original {original.length:.2f}"
        for point, file, original in told
        if point.originals and _collapsed(point, file, original)
    ]
    cliffs = [] if fallen else _cliffs(told)
    summary = ", ".join(f"{point.context}: {file.length:.2f}" for point, file, _ in told)
    outcome = Outcome.FAIL if fallen else Outcome.PASS if any(p.originals for p in points) else Outcome.ADVICE
    figures = {
        "window": spec.window.size if spec.window else None,
        "context_length": spec.context_length,
        "points": [
            {
                "context": point.context,
                "prompts": len(point.files),
                "original": original.length if point.originals else None,
                "file": file.length,
            }
            for point, file, original in told
        ],
    }
    return Gate("length sweep", outcome, f"tokens per verify step by context: {summary}", (*fallen, *cliffs), figures)


def _collapsed(point: SweepPoint, file: Acceptance, original: Acceptance) -> bool:
    """Worse beyond doubt; where few texts leave a doubt, so far off that it is none."""
    holds = compare(point.originals, point.files, SWEEP_DROP).holds(SWEEP_DROP)
    return holds is False or (holds is None and file.length - 1 < HALF * (original.length - 1))


def _cliffs(told: Sequence[tuple[SweepPoint, Acceptance, Acceptance]]) -> list[str]:
    """Falls between neighbouring lengths, and whether the original has them."""
    out = []
    for (before, near, near_original), (after, far, far_original) in pairwise(told):
        if _falls(near, far):
            whose = "the original has it too" if _falls(near_original, far_original) else "the original has not"
            told_by = whose if after.originals else NO_SOURCE
            out.append(f"a cliff between {before.context} and {after.context} tokens of context; {told_by}")
    return out


def _falls(near: Acceptance, far: Acceptance) -> bool:
    return far.length - 1 < CLIFF * (near.length - 1)


def does_it_pay(found: Payoff, times: StepTimes, engine: str) -> Gate:
    """Advice, in the times of the engine that measured."""
    n = found.length
    best = found.best_length
    pays = found.speedup[best - 1] > 1
    advice = f"draft {best}: {found.speedup[best - 1]:.2f}x" if pays else "no draft length pays"
    summary = f"{advice} in {engine}; {n} drafts pay above {found.break_even:.2f} tokens per verify step"
    figures = {
        "draft_ms": times.draft[n],
        "verify_ms": times.verify[n],
        "plain_ms": times.plain,
        "break_even": found.break_even,
        "best_length": best,
        "speedup": list(found.speedup),
        "measured_speedup": None,
    }
    return Gate("does it pay", Outcome.ADVICE, summary, (), figures)
