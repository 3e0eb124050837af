"""The report of `verify` as one HTML page that needs nothing else: styles and charts stand in it, no script runs.

jinja2 fills the templates beside this file and escapes every value; matplotlib draws the charts (charts.py). Both come
with the `verify` extra, and are imported when a page is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import MissingEngine, WrongUsage, plain
from convert_drafter.converters.verdict import Verdict
from convert_drafter.converters.verify.job import INSTALL
from convert_drafter.converters.verify.reports import answer, report
from convert_drafter.converters.verify.reports.answer import UNIT, figures, number, part, percent, series, shown

TEMPLATES = Path(__file__).with_name("templates")
NARROW = "\u00a0%"  # no line ends between a number and its percent sign
Tensor = Mapping[str, Any]
# how the table of tensors can be sorted: CSS name, words, sort key
ORDERS: tuple[tuple[str, str, Callable[[Tensor], Any]], ...] = (
    ("error", "error", lambda row: -_or_least(row["relative"])),
    ("share", "share of allowed", lambda row: -_or_least(_share(row))),
    ("largest", "largest weight error", lambda row: -_or_least(row["max"])),
    ("name", "name", lambda row: row["name"]),
    ("type", "type", lambda row: row["type"]),
    ("place", "place in the file", lambda row: 0),
)


def page(verdict: Verdict) -> str:
    """The page as text. Raises `MissingEngine` where jinja2 or matplotlib is not installed."""
    _check_installed()
    jinja2 = _needed("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    rendered: str = environment.get_template("page.html").render(_content(verdict))
    return rendered.strip() + "\n"


def check(place: Path | None) -> None:
    """Raise where a page for this place could not be made, without making it: `MissingEngine`, `WrongUsage` for `-`."""
    if place is None:
        return
    if str(place) == "-":
        raise WrongUsage("--html -: expected a file name; --json - prints the verdict for programs")
    _check_installed()


def _check_installed() -> None:
    for name in ("jinja2", "matplotlib"):
        _needed(name)


def write_page(verdict: Verdict, path: Path) -> None:
    """Write `page` under `path`, completely or not at all. Raises also `WrongInput` for a place it cannot have."""
    report.write_text(page(verdict), path, verdict)


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingEngine(f"an HTML report needs {name}, which is not installed: {INSTALL}") from error


def _visible(value: Any) -> Any:
    """Control characters of names from files are shown, not sent; markup of our own is left alone."""
    return plain(value).replace(" %", NARROW) if type(value) is str else value


def _content(verdict: Verdict) -> dict[str, Any]:
    """What the templates show, by name."""
    charts = importlib.import_module("convert_drafter.converters.verify.reports.charts")  # needs matplotlib
    headline, _, sentence = answer.answer(verdict).partition(": ")
    return {
        "verdict": verdict,
        "name": Path(verdict.file).name or verdict.file,
        "outcome": answer.overall(verdict).value,
        "marks": {outcome.value: mark for outcome, (mark, _) in report.MARKS.items()},
        "headline": _sentence(headline),
        "sentence": _sentence(sentence),
        "lengths": list(_lengths(verdict)),
        "certainty": charts.certainty(verdict),
        "diagnosis": _diagnosis(verdict),
        "charts": charts.charts(verdict),
        "tensors": _tensors(verdict),
        "orders": [(name, words) for name, words, _ in ORDERS],
        "command": str(verdict.settings.get("command") or "").split(),
        "settings": list(_flat(_unwrapped(verdict))),
    }


def _lengths(verdict: Verdict) -> Iterator[tuple[str, str, str]]:
    """CSS class, name and value of the numbers under the headline."""
    found = figures(verdict, "acceptance")
    file, original = (number(part(found, name).get("length")) for name in ("file", "original"))
    if original is not None:
        yield "original", "original", shown(original)
    if file is not None:
        yield "file", "this file", shown(file)
    if file is not None and original is not None:
        yield "", "difference", report.change(original, file)


def _diagnosis(verdict: Verdict) -> dict[str, Any] | None:
    """The cause in words and the explanations that were tried; None where nothing was diagnosed."""
    repair, found = answer.repair(verdict), verdict.diagnosis
    if found is None:
        return {"cause": "", "repair": list(map(_sentence, repair)), "columns": (), "rows": ()} if repair else None
    rows = [
        {
            "cells": (cause.name, shown(cause.length), shown(cause.kl, ".2g")),
            "note": "best" if cause == found.found else "",
        }
        for cause in found.tried
    ]
    columns = ("explanation", UNIT, "KL in nats")
    return {
        "cause": _sentence(answer.cause(found).removeprefix("cause: ")),
        "repair": list(map(_sentence, repair)),
        "columns": columns,
        "rows": rows,
    }


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _unwrapped(verdict: Verdict) -> Mapping[str, Any]:
    """Settings but the command; those of the only engine need not name it."""
    rest = {name: value for name, value in verdict.settings.items() if name != "command"}
    only = rest.get(verdict.engine)
    return {**only, **{n: v for n, v in rest.items() if n != verdict.engine}} if isinstance(only, Mapping) else rest


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Settings as name and value; the name of a group stands before its members'."""
    for name, value in settings.items():
        title = f"{above}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{title}: ")
        else:
            yield title, ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)


# --- the table of tensors ---


def _tensors(verdict: Verdict) -> list[dict[str, Any]]:
    """Its rows, the largest error first; the place of each in every order is a CSS variable."""
    rows: list[Tensor] = list(series(figures(verdict, "structure"), "tensors"))
    places = {name: _places(rows, key) for name, _, key in ORDERS}
    cells = [
        {
            "cells": (
                row["name"],
                row["type"],
                _error(row["relative"]),
                _error(row["allowed"]),
                shown(row["max"], ".2e"),
            ),
            "over": answer.over(row),
            "order": ";".join(f"--{name}:{place[i]}" for name, place in places.items()),
        }
        for i, row in enumerate(rows)
    ]
    return [cell for _, cell in sorted(zip(places["error"], cells, strict=True), key=lambda pair: pair[0])]


def _places(rows: list[Tensor], key: Callable[[Tensor], Any]) -> list[int]:
    """For each row its place when sorted."""
    order = sorted(range(len(rows)), key=lambda i: key(rows[i]))
    return sorted(range(len(rows)), key=order.__getitem__)


def _error(value: object) -> str:
    return "exact" if number(value) == 0 else percent(value, ".3g")


def _share(row: Tensor) -> float | None:
    found, allowed = number(row["relative"]), number(row["allowed"])
    return found / allowed if found is not None and allowed else found


def _or_least(value: object) -> float:
    return -1.0 if (found := number(value)) is None else found
