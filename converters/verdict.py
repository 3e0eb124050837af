"""What verifying says: gates that pass or fail, each with its numbers, and one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

NO = 1  # exit status where a fault was found


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"  # too few prompts to tell
    SKIPPED = "skipped"  # could not be asked, and why
    ADVICE = "advice"  # measured, with nothing to pass


@dataclass(frozen=True)
class Gate:
    """One question and its answer. `summary` is one line, `details` are lines below it, `figures` are plain data."""

    name: str
    outcome: Outcome
    summary: str
    details: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cause:
    """An explanation of low acceptance that was tried. `length` is the acceptance length with it mended.

    `facts` (field path -> value) repair the file where the fault is in its metadata; none where no key mends it.
    """

    name: str
    length: float
    kl: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Explanations tried, the best first. `found` is the one that restores acceptance, None where none does."""

    file_length: float
    goal: float | None  # the original's acceptance length, None without a source
    found: Cause | None
    tried: tuple[Cause, ...]


@dataclass(frozen=True)
class Verdict:
    """Everything a verification found. `settings` tell how it was measured."""

    file: str
    target: str
    source: str | None
    engine: str
    settings: Mapping[str, Any]
    gates: tuple[Gate, ...]
    diagnosis: Diagnosis | None = None
    repaired: str | None = None
    notes: tuple[str, ...] = ()  # said beside the verdict, no part of it

    def exit_code(self, strict: bool = False) -> int:
        """0 where every gate holds, 1 where one fails; undecided counts as failed when `strict`."""
        wrong = {Outcome.FAIL, Outcome.UNDECIDED} if strict else {Outcome.FAIL}
        return NO if any(gate.outcome in wrong for gate in self.gates) else 0
