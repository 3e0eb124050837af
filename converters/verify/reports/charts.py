"""The charts of a page: for each one its words, its drawing in two sizes and its numbers as a table.

A chart is there only where its figures are. Importing this needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert_drafter.converters.verdict import Verdict
from convert_drafter.converters.verify.reports import answer, plots
from convert_drafter.converters.verify.reports.answer import UNIT, figures, number, part, percent, series, shown

COMPARED = (("original", "original"), ("file", "this file"))


@dataclass(frozen=True)
class Row:
    """Cells of a table's row as text; `note` is its CSS class."""

    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """`drawing` is SVG: "wide" for a desk, "narrow" for a telephone. `legend` is CSS class and words of each key."""

    id: str
    title: str
    lead: str
    caption: str
    drawing: Mapping[str, str]
    legend: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def charts(verdict: Verdict) -> list[Chart]:
    """Every chart whose figures the verdict has, in the order of the page."""
    return [chart for make in (_by_position, _by_length, _speedup, _tensors) for chart in make(verdict)]


def _drawn(name: str, label: str, draw: plots.Draw, high: int, left: tuple[int, int] = (46, 46)) -> dict[str, str]:
    """Both sizes of a drawing; `left` is the room for its labels in each."""
    sizes = {"wide": plots.WIDE, "narrow": plots.NARROW}
    return {
        size: plots.svg(f"{name}-{size}", label, draw, width, high, room)
        for (size, width), room in zip(sizes.items(), left, strict=True)
    }


def certainty(verdict: Verdict) -> Chart | None:
    """The difference to the original with its interval."""
    found = figures(verdict, "acceptance")
    difference, *ends = (number(x) for x in (found.get("difference"), *series(found, "interval")))
    if difference is None or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    most = number(found.get("max_drop"))
    label = f"Difference to the original {percent(difference, '+.1f')}, {answer.interval(verdict)}"
    caption = "Difference to the original, dashed, and its 95 % interval."
    caption += f" Dotted: a drop of {percent(most, 'g')}, the most that counts as good." if most else ""
    drawn = _drawn("certainty", label, plots.interval(difference, ends[0], ends[1], most), 72, (14, 14))
    return Chart("certainty", "How sure", "", caption, drawn)


def _by_position(verdict: Verdict) -> Iterator[Chart]:
    found = figures(verdict, "acceptance")
    file, original = (series(part(found, name), "by_position") for name in ("file", "original"))
    if not file:
        return
    before = [original[i] if i < len(original) else None for i in range(len(file))]
    rows = [
        Row((str(i), *((percent(one),) if original else ()), percent(other)))
        for i, (one, other) in enumerate(zip(before, file, strict=True), start=1)
    ]
    title = "Acceptance by draft position"
    yield Chart(
        id="by-position",
        title=title,
        lead="The share of drafts that the target accepts, at each position of the draft.",
        caption="The first draft is the easiest: each one hangs on those before it.",
        drawing=_drawn("by-position", title, plots.by_position(original, file), 300),
        legend=COMPARED if original else COMPARED[1:],
        columns=("draft position", *(("original",) if original else ()), "this file"),
        rows=tuple(rows),
    )


def _by_length(verdict: Verdict) -> Iterator[Chart]:
    found = figures(verdict, "length sweep")
    points, window, trained = series(found, "points"), number(found.get("window")), number(found.get("context_length"))
    if not points:
        return
    compared = any(number(point.get("original")) is not None for point in points)
    marks = {"Sliding window": window, "Trained context": trained}
    facts = [f"{what} {at:,.0f} tokens" for what, at in marks.items() if at]
    title, label = "Acceptance by context length", f"{UNIT.capitalize()} by context length"
    yield Chart(
        id="by-length",
        title=title,
        lead="A wrong window, theta or position shows only from some length on.",
        caption=". ".join([f"{UNIT.capitalize()}; at 1 every draft is refused", *facts]) + ".",
        drawing=_drawn("by-length", label, plots.by_length(points, window, trained), 300),
        legend=COMPARED if compared else COMPARED[1:],
        columns=("tokens of context", "prompts", *(("original",) if compared else ()), "this file"),
        rows=tuple(_point(point, compared) for point in points),
    )


def _point(point: Mapping[str, Any], compared: bool) -> Row:
    lengths = [shown(point.get(name)) for name in ("original", "file")]
    return Row((f"{point['context']:,}", shown(point.get("prompts"), ".0f"), *lengths[not compared :]))


def _speedup(verdict: Verdict) -> Iterator[Chart]:
    found = figures(verdict, "does it pay")
    values, best = series(found, "speedup"), found.get("best_length")
    if not values:
        return
    rows = (Row((str(i), shown(v)), "best" if i == best else "") for i, v in enumerate(values, start=1))
    yield Chart(
        id="speedup",
        title="Does it pay",
        lead="How many times as fast as the target alone: this machine's times with the acceptance above.",
        caption=_times(found),
        drawing=_drawn("speedup", "Speed-up by draft length", plots.speedup(values, best), 280),
        legend=(("best", "best"), ("other", "other draft lengths"), ("alone", "target alone")),
        columns=("drafted tokens", "speed-up"),
        rows=tuple(rows),
    )


def _times(found: Mapping[str, Any]) -> str:
    """What a step costs, from which length drafting pays, and what the engine showed."""
    names = (("draft_ms", "drafting"), ("verify_ms", "verifying"), ("plain_ms", "one token of the target alone"))
    times = [f"{what} {shown(found[name], '.1f')} ms" for name, what in names if number(found.get(name)) is not None]
    longest = len(series(found, "speedup"))
    sentences = [f"With {longest} drafted tokens: {', '.join(times)}"] if times else []
    if number(found.get("break_even")) is not None:
        sentences.append(f"So many pay above {shown(found['break_even'])} {UNIT}")
    if number(found.get("measured_speedup")) is not None:
        sentences.append(f"The engine itself ran {shown(found['measured_speedup'])} times as fast")
    return "".join(f"{sentence}. " for sentence in sentences).strip()


def _tensors(verdict: Verdict) -> Iterator[Chart]:
    every = series(figures(verdict, "structure"), "tensors")
    rows = sorted((row for row in every if number(row["relative"])), key=lambda row: -row["relative"])
    exact = sum(number(row["relative"]) == 0 for row in every)
    if not rows:
        return
    wrong = [row["name"] for row in rows if answer.over(row)]
    few = len(rows) <= plots.NAMED
    label = "Relative error of each tensor and the error its type explains"
    caption = f"{_off(wrong, len(rows))}."
    caption += f" {exact} more {'is' if exact == 1 else 'are'} exact." if exact else ""
    keys = {"dot": "error", "over": "more than allowed", "allowed" if few else "level": "allowed"}
    high, left = (64 + 22 * len(rows), (214, 124)) if few else (320, (58, 54))
    yield Chart(
        id="tensors",
        title="Errors of tensors",
        lead="Root mean square error against the checkpoint, relative to the tensor's own size.",
        caption=caption,
        drawing=_drawn("tensors", label, plots.tensors(rows), high, left),
        legend=tuple((key, words) for key, words in keys.items() if wrong or key != "over"),
    )


def _off(wrong: list[str], count: int) -> str:
    if not wrong:
        return f"None of {count} is further off than its type explains"
    names = ", ".join(wrong[:5]) + " ..." * (len(wrong) > 5)
    return f"{len(wrong)} of {count} further off than their type explains: {names}"
