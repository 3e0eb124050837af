"""How a batch looks: text of at most 80 columns for people, plain data for --json. Nothing is printed here."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convert_drafter.converters.batch.log import log_path
from convert_drafter.converters.batch.preflight import Checked, Preflight
from convert_drafter.converters.batch.task import Result, Status, Summary, Task
from convert_drafter.converters.commands.amounts import count, size
from convert_drafter.converters.commands.show import render, table

WIDTH, NAME = 80, 44  # columns of a line, of a task's name
PREFLIGHT, VERSION = "convert-drafter/jobs-doctor", 1


def summary(tasks: Sequence[Task], found: Summary, logs: Path) -> str:
    """One table in the order of jobs.toml, the failures below it, and what it comes to."""
    rows = table("task", "outcome", ">time", ">size")
    for result in found.results:
        rows.add_row("\n".join(_cut(result.task)), result.status.value, _time(result), _size(result))
    failed = [result for result in found.results if result.status is Status.FAILED]
    said = [line for result in failed for line in _failure(result, logs)]
    counts = Counter(result.status for result in found.results)
    total = ", ".join(f"{counts[status]} {status.value}" for status in Status if counts[status])
    return render(rows, *(["", *said] if said else []), "", f"{count(len(tasks), 'task')}: {total}; logs in {logs}")


def _cut(name: str) -> list[str]:
    return textwrap.wrap(name, NAME, break_on_hyphens=False) or [name]


def _time(result: Result) -> str:
    return duration(result.seconds) if result.status in (Status.DONE, Status.FAILED) else ""


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} h" if hours else f"{minutes}:{seconds:02} min"


def _size(result: Result) -> str:
    found = result.figures.get("out_bytes")
    return "" if found is None else size(found)


def _failure(result: Result, logs: Path) -> Iterator[str]:
    assert result.failure is not None  # a failed task has one
    first, *rest = result.failure.message.splitlines()
    yield from _folded(f"{result.task}: {first}", "", "  ")
    for line in rest:
        yield from _folded(line.strip(), "  ", "    ")
    yield from _folded(f"log: {log_path(logs, result.task)}", "  ", "    ")


def _folded(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def ended(number: int, count: int, result: Result) -> str:
    """A line as a task ends."""
    time = f" ({duration(result.seconds)})" if result.status is Status.DONE else ""
    why = "" if result.failure is None else f": {result.failure.message.splitlines()[0]}"
    return f"[{number}/{count}] {result.task}: {result.status.value}{time}{why}"


# --- doctor --jobs ---


def preflight(path: Path, found: Preflight) -> str:
    lines = [str(path)]
    for problem in found.problems:
        lines += _folded(f"FAULT  {problem}", "  ", " " * 9)
    for check in found.checks:
        lines += _checked(check)
    for disk in found.disks:
        mark = "FAULT" if disk.fault else "ok"
        text = f"{mark:<7}disk of {disk.folder}: {size(disk.needed)} needed at most, {size(disk.free)} free"
        lines += _folded(text, "  ", " " * 9)
    return "\n".join([*lines, "", _answer(found)])


def _checked(check: Checked) -> Iterator[str]:
    told = "" if check.n_bytes is None else f": {size(check.n_bytes)}"
    mark = "FAULT" if check.faults else "ok"
    yield from _folded(f"{mark:<7}{check.task.name} ({check.task.does}; {check.task.where}){told}", "  ", " " * 9)
    for text in (*check.faults, *(f"note: {note}" for note in check.notes)):
        first, *rest = text.splitlines()
        yield from _folded(f"- {first}", " " * 9, " " * 11)
        for line in rest:
            yield from _folded(line.strip(), " " * 11, " " * 13)


def _answer(found: Preflight) -> str:
    faulty = sum(bool(check.faults) for check in found.checks)
    wrong = [f"{faulty} of {count(len(found.checks), 'task')} cannot begin"] if faulty else []
    wrong += [f"{count(len(found.problems), 'problem')} of the file itself"] if found.problems else []
    wrong += ["not enough space"] if any(disk.fault for disk in found.disks) else []
    return "; ".join(wrong) if wrong else f"{count(len(found.checks), 'task')} can begin"


def preflight_json(path: Path, found: Preflight) -> dict[str, Any]:
    return {
        "schema": PREFLIGHT,
        "version": VERSION,
        "file": str(path),
        "faulty": found.faulty,
        "problems": list(found.problems),
        "tasks": [
            {
                "task": check.task.name,
                "does": check.task.does,
                "place": check.task.where,
                "faults": list(check.faults),
                "notes": list(check.notes),
                "bytes": check.n_bytes,
            }
            for check in found.checks
        ],
        "disks": [
            {"folder": str(disk.folder), "needed_bytes": disk.needed, "free_bytes": disk.free} for disk in found.disks
        ],
    }


__all__ = ["ended", "preflight", "preflight_json", "summary"]
