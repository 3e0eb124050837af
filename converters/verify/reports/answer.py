"""A verdict in words: the overall outcome, one sentence, and its numbers as people read them.

Figures come from measurements: a number may be missing, NaN or infinite (an interval from too few prompts), and is
then shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from convert_drafter.converters.verdict import Cause, Diagnosis, Gate, Outcome, Verdict

UNKNOWN = "-"
UNIT = "tokens per verify step"


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    return found if math.isfinite(found := float(value)) else None


def shown(value: object, form: str = ".2f") -> str:
    """A number in this format, a dash where there is none."""
    return UNKNOWN if (found := number(value)) is None else format(found, form)


def percent(value: object, form: str = ".1f") -> str:
    """A share as a person reads it: 0.796 -> 79.6 %. "+.1f" keeps the sign of a difference."""
    return UNKNOWN if (found := number(value)) is None else f"{found * 100:{form}}%"


def figures(verdict: Verdict, gate: str) -> Mapping[str, Any]:
    """What a gate measured; empty where it was not asked."""
    return next((g.figures for g in verdict.gates if g.name == gate), {})


def part(measured: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside of figures; empty where it is missing or null."""
    return measured.get(name) or {}


def series(measured: Mapping[str, Any], name: str) -> Sequence[Any]:
    """A list inside of figures; empty where it is missing or null."""
    return measured.get(name) or ()


def over(tensor: Mapping[str, Any]) -> bool:
    """Is it not the checkpoint's? As the gate says, or else where its error is larger than its type explains."""
    if "wrong" in tensor:
        return bool(tensor["wrong"])
    found, allowed = number(tensor["relative"]), number(tensor["allowed"])
    return found is not None and allowed is not None and found > allowed


def overall(verdict: Verdict) -> Outcome:
    """One outcome for the file: fail before undecided before pass; skipped where no gate could be asked."""
    found = {gate.outcome for gate in verdict.gates}
    decisive = (Outcome.FAIL, Outcome.UNDECIDED, Outcome.PASS)
    return next((outcome for outcome in decisive if outcome in found), Outcome.SKIPPED)


def interval(verdict: Verdict) -> str:
    """The 95 % interval of the relative difference in words; empty where nothing was compared."""
    ends = series(figures(verdict, "acceptance"), "interval")
    if not ends:
        return ""
    if any(number(end) is None for end in ends):
        return "95 % interval unknown"
    return f"95 % interval {percent(ends[0], '+.1f')} .. {percent(ends[1], '+.1f')}"


def measured(verdict: Verdict) -> str:
    """Acceptance length against the original's, with its interval; empty where it was not measured."""
    found = figures(verdict, "acceptance")
    file, original = (number(part(found, name).get("length")) for name in ("file", "original"))
    if file is None:
        return ""
    if original is None:
        return f"{file:.2f} {UNIT}"
    spread = interval(verdict)
    return f"{file:.2f} {UNIT} vs {original:.2f}" + (f" ({spread})" if spread else "")


def answer(verdict: Verdict) -> str:
    """The verdict as one sentence: yes, no or undecided first, the numbers after it."""
    sentences = {Outcome.FAIL: _no, Outcome.UNDECIDED: _undecided, Outcome.PASS: _yes}
    return sentences.get(overall(verdict), _nothing)(verdict)


def _no(verdict: Verdict) -> str:
    failed = [gate for gate in verdict.gates if gate.outcome is Outcome.FAIL]
    ends = series(figures(verdict, "acceptance"), "interval")
    fallen = any(gate.name == "acceptance" for gate in failed) and all((number(end) or 0) < 0 for end in ends)
    if fallen and ends and (numbers := measured(verdict)):
        return f"NOT as good as the original: {numbers}"
    return f"NOT good: {_reasons(failed)}"


def _undecided(verdict: Verdict) -> str:
    open_gates = [gate for gate in verdict.gates if gate.outcome is Outcome.UNDECIDED]
    if any(gate.name == "acceptance" and gate.outcome is Outcome.PASS for gate in verdict.gates):
        return f"undecided, but {_yes(verdict)}: {', '.join(gate.name for gate in open_gates)} cannot tell"
    if not (numbers := measured(verdict)) or all(gate.name != "acceptance" for gate in open_gates):
        return f"undecided: {_reasons(open_gates)}"
    needed = number(figures(verdict, "acceptance").get("needed"))
    if needed is None:
        return f"undecided: {numbers}"
    return f"undecided: {needed:.0f} more prompt{'s' * (needed != 1)} would tell: {numbers}"


def _yes(verdict: Verdict) -> str:
    numbers = measured(verdict)
    if numbers and part(figures(verdict, "acceptance"), "original"):
        return f"as good as the original: {numbers}"
    if numbers:
        return f"no fault found: {numbers}; no original to compare with (--source)"
    return f"no fault found; {_count(verdict, Outcome.PASS)} of {len(verdict.gates)} gates were asked and hold"


def _nothing(verdict: Verdict) -> str:
    return "no answer: no gate could be asked"


def _reasons(gates: Sequence[Gate]) -> str:
    return "; ".join(f"{gate.name}: {gate.summary}" for gate in gates)


def _count(verdict: Verdict, outcome: Outcome) -> int:
    return sum(gate.outcome is outcome for gate in verdict.gates)


def cause(diagnosis: Diagnosis) -> str:
    """What was found: "cause: RoPE theta 10000 -> 10000000 restores 3.37 of 3.38 tokens per verify step"."""
    if (found := diagnosis.found) is None:
        return "cause: none of the explanations that were tried restores acceptance"
    goal = "" if diagnosis.goal is None else f" of {shown(diagnosis.goal)}"
    return f"cause: {found.name} restores {shown(found.length)}{goal} {UNIT}"


def repair(verdict: Verdict) -> tuple[str, ...]:
    """What to do about the cause that was found, a line each."""
    if verdict.repaired:
        return (f"repaired: {verdict.repaired}",)
    found = verdict.diagnosis.found if verdict.diagnosis else None
    if found is None:
        return ()
    if not found.facts:
        return ("no key of the file mends this: convert the drafter again from its checkpoint",)
    return (f"repair: run again with --repair OUT, which writes {facts(found)}",)


def facts(found: Cause) -> str:
    """The facts that mend a file: "rope.theta = 10000000"."""
    return ", ".join(f"{name} = {_fact(value)}" for name, value in found.facts.items())


def _fact(value: object) -> str:
    return "none" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
