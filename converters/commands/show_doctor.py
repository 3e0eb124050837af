"""How a diagnosis looks: text for people, plain data for --json. Nothing is printed here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert_drafter.converters.verdict import Gate, Outcome

SCHEMA, VERSION = "convert-drafter/diagnosis", 1
WIDTH, MOST = 80, 24  # columns of a line, details shown of one gate
MARKS = {
    Outcome.PASS: "ok", Outcome.FAIL: "FAULT", Outcome.UNDECIDED: "unclear", Outcome.SKIPPED: "skipped",
    Outcome.ADVICE: "note",
}  # fmt: skip


def diagnosis(path: Path, gates: Sequence[Gate]) -> str:
    """A line for each gate with its outcome, details below it."""
    lines = [str(path)]
    for gate in gates:
        lines += _folded(f"{gate.name:<10} {MARKS[gate.outcome]:<8}{gate.summary}", first="  ", rest=" " * 21)
        for detail in gate.details[:MOST]:
            lines += _folded(f"- {detail}", first="    ", rest="      ")
        if len(gate.details) > MOST:
            lines.append(f"    - and {len(gate.details) - MOST} more; --json has all of them")
        lines += _tensors(gate.figures)
    return "\n".join(lines)


def _folded(text: str, first: str, rest: str) -> list[str]:
    options = {"break_long_words": False, "break_on_hyphens": False, "initial_indent": first}
    return textwrap.wrap(text, WIDTH, subsequent_indent=rest, **options)  # type: ignore[arg-type]


def _tensors(figures: Mapping[str, Any]) -> list[str]:
    """The largest relative error of each type."""
    worst: dict[str, dict[str, Any]] = {}
    for tensor in figures.get("tensors", ()):
        if tensor["relative"] > worst.get(tensor["type"], {"relative": 0.0})["relative"]:
            worst[tensor["type"]] = tensor
    return [
        f"    {kind:<8} error at most {found['relative']:8.3%} of {found['name']} (allowed {found['allowed']:.3%})"
        for kind, found in worst.items()
    ]


def diagnosis_json(path: Path, gates: Sequence[Gate]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "file": str(path),
        "gates": [
            {
                "name": gate.name,
                "outcome": gate.outcome.value,
                "summary": gate.summary,
                "details": list(gate.details),
                "figures": dict(gate.figures),
            }
            for gate in gates
        ],
    }
