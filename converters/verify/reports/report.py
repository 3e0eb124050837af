"""What `verify` found, as text for a terminal and as versioned JSON (verdict.schema.json). Nothing is printed here."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convert_drafter.converters.destination import write_whole
from convert_drafter.converters.errors import WrongInput, plain
from convert_drafter.converters.gguf_file import file_access, partial_name
from convert_drafter.converters.verdict import Gate, Outcome, Verdict
from convert_drafter.converters.verify.reports import answer
from convert_drafter.converters.verify.reports.answer import UNIT, number, part, percent, series, shown

SCHEMA, VERSION = "convert-drafter/verdict", 1
WIDTH = 80  # where the width of the terminal is not known
BAR = 30  # columns of a bar that stands for 100 %
EIGHTHS = " ▏▎▍▌▋▊▉"
MARKS = {
    Outcome.PASS: ("✓", "green"),
    Outcome.FAIL: ("✗", "bold red"),
    Outcome.UNDECIDED: ("?", "yellow"),
    Outcome.SKIPPED: ("-", "dim"),
    Outcome.ADVICE: ("i", "cyan"),
}
EXPLAINED = (
    Outcome.FAIL,
    Outcome.UNDECIDED,
    Outcome.ADVICE,
)  # their details are shown; the others' are in JSON and on the page
MOST, TRIED = 12, 5  # details of one gate and explanations shown
GLUE = "\u2800"  # a blank that is no space: rich breaks lines at every space
# what a terminal without Unicode gets in place of a character
ASCII = str.maketrans({"✓": "+", "✗": "X", "█": "#", "░": ".", **dict.fromkeys(EIGHTHS[1:4], " ")})
ASCII |= str.maketrans(dict.fromkeys(EIGHTHS[4:], "#"))


# --- terminal ---


def text(verdict: Verdict, width: int = WIDTH, unicode: bool = True) -> str:
    """The report as plain text of at most `width` columns; without `unicode`, in ASCII alone."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, highlight=False, color_system=None, legacy_windows=False)
    console.print(layout(verdict))
    lines = "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()
    return lines if unicode else lines.translate(ASCII).encode("ascii", "backslashreplace").decode()


def layout(verdict: Verdict) -> RenderableType:
    """The same report with styles, for a console of any width."""
    sections = (_head, _gates, _by_position, _by_length, _speedup, _diagnosis, _last)
    blocks = [block for section in sections for block in section(verdict)]
    return Group(*(item for block in blocks for item in (block, Text())))


def _words(words: str, style: str = "") -> Text:
    """Text that came from a file or a measurement: no markup, no control characters."""
    return Text(plain(words), style, overflow="fold")


@dataclass(frozen=True)
class _Sentence:
    """Words folded at the width of the console, but never between a number and its percent sign."""

    words: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glued = Text(plain(self.words).replace(" %", f"{GLUE}%"), self.style)
        for line in glued.wrap(console, options.max_width, overflow="fold"):
            yield Text(line.plain.replace(GLUE, " "), self.style)


def _grid(*columns: str, gap: int = 2) -> Table:
    """A table without lines; a column that begins with ">" is aligned to the right."""
    named = any(column.strip(">") for column in columns)
    made = Table(box=None, pad_edge=False, show_header=named, header_style="bold", padding=(0, gap, 0, 0))
    for column in columns:
        made.add_column(column.strip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def _head(verdict: Verdict) -> Iterator[RenderableType]:
    rows = _grid("", "")
    named = {"file": verdict.file, "target": verdict.target, "source": verdict.source, "engine": verdict.engine}
    for name, value in named.items():
        rows.add_row(Text(name, "dim"), _words(value) if value else Text("none: nothing to compare with", "dim"))
    yield rows


def _gates(verdict: Verdict) -> Iterator[RenderableType]:
    rows = _grid("", "", "", gap=1)
    rows.columns[1].no_wrap = True
    for gate in verdict.gates:
        mark, style = MARKS[gate.outcome]
        quiet = "dim" if gate.outcome is Outcome.SKIPPED else ""
        rows.add_row(Text(mark, style), Text(f"{gate.name} ", quiet or "bold"), _words(gate.summary, quiet))
        for detail in _details(gate):
            rows.add_row("", "", Padding(_words(detail), (0, 0, 0, 2)))
    if verdict.gates:
        yield rows


def _details(gate: Gate) -> Iterator[str]:
    if gate.outcome in EXPLAINED:
        yield from gate.details[:MOST]
        if len(gate.details) > MOST:
            yield f"and {len(gate.details) - MOST} more; --json has all of them"


def _by_position(verdict: Verdict) -> Iterator[RenderableType]:
    found = answer.figures(verdict, "acceptance")
    file, original = (series(part(found, name), "by_position") for name in ("file", "original"))
    if not file:
        return
    rows = _grid("draft position", *((">original",) if original else ()), ">file", "accepted" if original else "")
    rows.columns[0].justify = "right"
    for i, share in enumerate(file):
        before = original[i] if i < len(original) else None
        known = (percent(before), percent(share)) if original else (percent(share),)
        rows.add_row(str(i + 1), *known, bar(number(share) or 0.0, number(before) or 0.0))
    yield rows


def bar(share: float, before: float = 0.0) -> str:
    """`share` of a full bar in eighths of a column, then dots up to `before`: what was lost."""
    eighths = round(8 * BAR * min(max(share, 0.0), 1.0))
    solid = "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
    return solid + "░" * (round(BAR * min(before, 1.0)) - len(solid))


def _by_length(verdict: Verdict) -> Iterator[RenderableType]:
    found = answer.figures(verdict, "length sweep")
    points = series(found, "points")
    if not points:
        return
    compared = any(number(point.get("original")) is not None for point in points)
    columns = (">original", ">file", ">change") if compared else (">file",)
    rows = _grid(">context tokens", ">prompts", *columns, "")
    notes = beyond(found)
    for point, note in zip(points, notes, strict=True):
        before, after = (point.get(name) for name in ("original", "file"))
        numbers = (shown(before), shown(after), change(before, after)) if compared else (shown(after),)
        rows.add_row(f"{point['context']:,}", str(point.get("prompts", "")), *numbers, note)
    yield rows


def change(before: object, after: object) -> str:
    """The relative difference of two lengths."""
    a, b = number(before), number(after)
    return percent(b / a - 1 if a and b is not None else None, "+.1f")


def beyond(found: Mapping[str, Any]) -> list[str]:
    """A note for each point of a length sweep: the first prompt that is longer than the window, or than the context."""
    points = series(found, "points")
    notes = [""] * len(points)
    for name, what in (("window", "the window"), ("context_length", "the trained context")):
        limit = number(found.get(name))
        longer = [i for i, point in enumerate(points) if limit is not None and point["context"] > limit]
        if longer:
            notes[longer[0]] = f"past {what} ({limit:,.0f})"
    return notes


def _speedup(verdict: Verdict) -> Iterator[RenderableType]:
    found = answer.figures(verdict, "does it pay")
    best = found.get("best_length")
    each = [f"{shown(x)}{' (best)' * (i == best)}" for i, x in enumerate(series(found, "speedup"), start=1)]
    if each:
        yield _Sentence(f"speed-up with 1 to {len(each)} drafted tokens: {', '.join(each)}")


def _diagnosis(verdict: Verdict) -> Iterator[RenderableType]:
    if (diagnosis := verdict.diagnosis) is None:
        yield from (_Sentence(line) for line in answer.repair(verdict))
        return
    yield Group(_Sentence(answer.cause(diagnosis), "bold"), *map(_Sentence, answer.repair(verdict)))
    if len(diagnosis.tried) > 1 or not diagnosis.found:
        rows = _grid("tried", f">{UNIT}", ">KL in nats")
        for cause in diagnosis.tried[:TRIED]:
            rows.add_row(_words(cause.name), shown(cause.length), shown(cause.kl, ".2g"))
        yield rows


def _last(verdict: Verdict) -> Iterator[RenderableType]:
    yield _Sentence(answer.answer(verdict), MARKS[answer.overall(verdict)][1])


# --- JSON ---


def as_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict as JSON of version `VERSION`; a number that is not finite becomes null."""
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "outcome": answer.overall(verdict).value,
        "answer": answer.answer(verdict),
        "file": verdict.file,
        "target": verdict.target,
        "source": verdict.source,
        "engine": verdict.engine,
        "gates": [_gate_json(gate) for gate in verdict.gates],
        "diagnosis": asdict(verdict.diagnosis) if verdict.diagnosis else None,
        "repaired": verdict.repaired,
        "settings": verdict.settings,
    }
    return {name: _json(value) for name, value in data.items()}


def _gate_json(gate: Gate) -> dict[str, Any]:
    return {name: getattr(gate, name) for name in ("name", "outcome", "summary", "details", "figures")}


def _json(value: Any) -> Any:
    """Plain JSON data: numpy numbers and arrays, tuples, enums and paths have no place in it."""
    if isinstance(value, Mapping):
        return {str(name): _json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _json(value.tolist())
    if isinstance(value, float):
        return number(value)
    return value if value is None or isinstance(value, (bool, int)) else str(value)


def check_places(places: Sequence[Path], taken: Sequence[Path] = ()) -> None:
    """Raise `WrongInput` where a report could not be written, or would take the place of a file or another report."""
    for i, place in enumerate(places):
        if place.is_dir():
            raise WrongInput(f"{place}: cannot be written: it is a folder; give a file name")
        if not place.parent.is_dir():
            raise WrongInput(f"{place}: cannot be written: there is no folder {place.parent}")
        if not os.access(place.parent, os.W_OK):
            raise WrongInput(f"{place}: cannot be written: no file can be made in {place.parent}")
        for other in taken:
            _differ(place, other)
        if place.absolute() in {earlier.absolute() for earlier in places[:i]}:
            raise WrongInput(f"{place}: found for two reports, expected a place for each")


def write_json(verdict: Verdict, path: Path) -> None:
    """Write `as_json` under `path`, completely or not at all. Raises `WrongInput` for a place it cannot have."""
    write_text(json.dumps(as_json(verdict), indent=2, allow_nan=False) + "\n", path, verdict)


def write_text(content: str, path: Path, verdict: Verdict) -> None:
    """UTF-8 under `path`, completely or not at all, over none of the files that were verified."""
    for taken in (verdict.file, verdict.target, verdict.source, verdict.repaired):
        if taken is not None:
            _differ(path, Path(taken))
    write_whole(content, path)


def _differ(place: Path, taken: Path) -> None:
    """Raise `WrongInput` where a report, or the file it grows in, would be a model."""
    with file_access(place, "written"):
        same = [path for path in (place, partial_name(place)) if _same(path, taken)]
    if same:
        raise WrongInput(f"{place}: found {taken}, which was verified; expected another place for the report")


def _same(path: Path, other: Path) -> bool:
    """Is it this file, or one in this folder?"""
    if not (path.exists() and other.exists()):
        return False
    return path.samefile(other) or (other.is_dir() and path.resolve().is_relative_to(other.resolve()))
