"""Charts of a verdict as SVG that stands in a page: its colours are the page's CSS variables, its text is text.

matplotlib draws them, without its global figures; the same numbers give the same bytes. Importing this needs
matplotlib: only html.py does, when it makes a page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from convert_drafter.converters.errors import plain
from convert_drafter.converters.verify.reports.answer import number, over

WIDE, NARROW = 720, 336  # CSS pixels: a desk and a telephone
# matplotlib has to be given colours: each of these stands for a variable of page.css and is replaced by it
VARIABLES = ("ink", "quiet", "line", "original", "file", "bad", "card")
INK, QUIET, LINE, ORIGINAL, FILE, BAD, CARD = STANDING = tuple(f"#0{i}0a0{i}" for i in range(1, 8))
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "convert-drafter", "font.size": 12, "font.family": "DejaVu Sans",
    "axes.unicode_minus": False, "text.usetex": False, "text.parse_math": False, "path.simplify": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.edgecolor": QUIET, "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "text.color": INK, "grid.color": LINE, "grid.linewidth": 1, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 2, "lines.markersize": 6,
}  # fmt: skip
NAMED = 24  # tensors that get a row each; more become one curve
NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}
Draw = Callable[[Axes, int], None]


def svg(name: str, label: str, draw: Draw, width: int, height: int, left: int = 46) -> str:
    """One chart of `width` x `height` CSS pixels. `name` keeps its ids apart from other charts' on the page."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        draw(axes, width)
        top, right, bottom = 16, 14, 40 if axes.get_xlabel() else 22
        box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes.set_position(box)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=NO_DATE, transparent=True)
    return _for_page(buffer.getvalue(), name, label)


def _for_page(drawn: str, name: str, label: str) -> str:
    """The drawing without its prolog, font and global style, in the page's colours, under ids of its own."""
    view = re.search(r'viewBox="[^"]*"', drawn)
    inner = drawn[drawn.index(">", drawn.index("<svg ")) + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inner)
    inner = re.sub(r"font-family: [^;\"]*; ?|font-style: [^;\"]*; ?", "", inner)
    inner = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", inner)
    for colour, variable in zip(STANDING, VARIABLES, strict=True):
        inner = inner.replace(colour, f"var(--{variable})")
    return f'<svg {view[0] if view else ""} role="img" aria-label="{escape(plain(label))}">{inner}'


def _values(numbers: Sequence[Any]) -> list[float]:
    return [math.nan if (found := number(each)) is None else found for each in numbers]


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], original: bool) -> None:
    """The original dashed with hollow marks, the file solid: told apart without colour too."""
    under: dict[str, Any] = {"color": ORIGINAL, "ls": (0, (3, 2)), "lw": 3, "mfc": CARD, "mew": 2, "ms": 10}
    look = under if original else {"color": FILE}
    axes.plot(xs, ys, marker="o", clip_on=False, zorder=3 + (not original), **look)


# --- acceptance by draft position ---


def by_position(original: Sequence[Any], file: Sequence[Any]) -> Draw:
    """The share of accepted drafts at each draft position, 0 to 100 %."""

    def draw(axes: Axes, width: int) -> None:
        for values, first in ((original, True), (file, False)):
            if values:
                _line(axes, range(1, len(values) + 1), [100 * v for v in _values(values)], first)
        size = max(len(file), len(original))
        axes.set(ylim=(0, 100), xlim=(0.7, size + 0.3), xlabel="draft position")
        axes.set_yticks(range(0, 101, 25), [f"{y}%" for y in range(0, 101, 25)])
        step = math.ceil(size / (width / 32))
        axes.set_xticks(range(1, size + 1, step))
        axes.grid(axis="y")

    return draw


# --- acceptance length by context length ---


def by_length(points: Sequence[Mapping[str, Any]], window: object, context_length: object) -> Draw:
    """Acceptance length over tokens of context; the window and the trained context where they lie within reach."""
    contexts = [max(int(point["context"]), 1) for point in points]
    lines = {name: _values([point.get(name) for point in points]) for name in ("original", "file")}

    def draw(axes: Axes, width: int) -> None:
        axes.set_xscale("log", base=2)
        for name, values in lines.items():
            _line(axes, contexts, values, name == "original")
        top = max((v for values in lines.values() for v in values if not math.isnan(v)), default=2)
        axes.set(ylim=(0, max(top * 1.18, 1.5)), xlabel="tokens of context")
        low, high = min(contexts), max(contexts)
        marks = [(number(window), "window"), (number(context_length), "trained context")]
        seen = [(at, what) for at, what in marks if at is not None and low / 2 <= at <= 2 * high]
        ends = [low, high, *(at for at, _ in seen)]
        span = max(max(ends) / min(ends), 2)
        axes.set_xlim(min(ends) / span**0.06, max(ends) * span**0.06)
        for at, what in seen:
            _mark(axes, at, what, right=at < math.sqrt(min(ends) * max(ends)))
        _length_ticks(axes, contexts, width)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axes.axhline(1, color=QUIET, lw=1, zorder=1)
        axes.grid(axis="y")

    return draw


def _mark(axes: Axes, at: float, what: str, right: bool) -> None:
    axes.axvline(at, color=QUIET, lw=1, ls=(0, (1, 2)), zorder=1)
    text = f" {what} {at:,.0f} "
    place = axes.get_xaxis_transform()
    axes.text(at, 0.99, text, transform=place, ha="left" if right else "right", va="top", color=QUIET, fontsize=11)


def _length_ticks(axes: Axes, contexts: Sequence[int], width: int) -> None:
    """Labels at the measured lengths, as many as fit."""
    low, high = axes.get_xlim()
    kept: list[int] = []
    for context in sorted(set(contexts), reverse=True):
        room = math.log(kept[-1] / context) / math.log(high / low) * width if kept else math.inf
        if room > 36:
            kept.append(context)
    axes.set_xticks(kept, [f"{n // 1024}k" if n >= 4096 and n % 1024 == 0 else f"{n:,}" for n in kept])
    axes.set_xticks([], minor=True)


# --- errors of tensors ---


def tensors(rows: Sequence[Mapping[str, Any]]) -> Draw:
    """Relative error of each tensor and what its type allows, the largest first. A row each, or a curve of many."""
    return _named(rows) if len(rows) <= NAMED else _curve(rows)


def _limits(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Ends of the axis in percent: a little beyond every error and every allowance."""
    found = [100 * v for row in rows for name in ("relative", "allowed") if (v := number(row[name]))]
    return min(found, default=0.1) / 1.5, max(found, default=1.0) * 1.5


def _dots(axes: Axes, rows: Sequence[Mapping[str, Any]], across: bool, size: float) -> None:
    """Errors as dots, crosses where they are too large, and a bar at what is allowed."""
    for bad, color, marker, extra in ((False, FILE, "o", 0), (True, BAD, "X", 4)):
        errors = [(i, 100 * row["relative"]) for i, row in enumerate(rows) if over(row) is bad]
        axes.plot(*_turned(errors, across), color=color, marker=marker, ms=size + extra, ls="", mew=0, zorder=3)
    bars = [(i, 100 * allowed) for i, row in enumerate(rows) if (allowed := number(row["allowed"]))]
    marker, length = ("|", 12.0) if across else ("_", size + 2)
    axes.plot(*_turned(bars, across), color=QUIET, marker=marker, ms=length, mew=2, ls="")


def _turned(points: Sequence[tuple[int, float]], across: bool) -> tuple[list[float], list[float]]:
    """Coordinates of (row, value) pairs; `across` has the rows one below the other."""
    places, values = [float(place) for place, _ in points], [value for _, value in points]
    return (values, places) if across else (places, values)


def _named(rows: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(axes: Axes, width: int) -> None:
        axes.set_xscale("log")
        axes.set(xlim=_limits(rows), ylim=(len(rows) - 0.4, -0.6), xlabel="relative error")
        _dots(axes, rows, across=True, size=7)
        axes.set_yticks(range(len(rows)), [short(row["name"], 19 if width < WIDE else 34) for row in rows], fontsize=11)
        _percent_ticks(axes.xaxis, _limits(rows))
        axes.grid(axis="both")

    return draw


def _curve(rows: Sequence[Mapping[str, Any]]) -> Draw:
    def draw(axes: Axes, width: int) -> None:
        axes.set_yscale("log")
        axes.set(
            ylim=_limits(rows), xlim=(-0.02 * len(rows), 1.02 * len(rows)), xlabel="tensors, the largest error first"
        )
        _dots(axes, rows, across=False, size=4)
        _percent_ticks(axes.yaxis, _limits(rows))
        axes.grid(axis="y")

    return draw


def _percent_ticks(axis: Any, ends: tuple[float, float]) -> None:
    """1, 2, 5 and 10 where the axis is short, every tenfold where it is long."""
    steps = (1, 2, 5) if ends[1] / ends[0] < 200 else (1,)
    axis.set_major_locator(matplotlib.ticker.LogLocator(10, subs=steps, numticks=12))
    axis.set_major_formatter(lambda value, _: f"{value:g}%")
    axis.set_minor_locator(matplotlib.ticker.NullLocator())


def short(name: str, size: int) -> str:
    """A name in ASCII of at most `size` characters: the font of the measurements knows no more."""
    text = plain(name.removesuffix(".weight").encode("ascii", "backslashreplace").decode())
    keep = (size - 2) // 2
    return text if len(text) <= size else f"{text[:keep]}..{text[-keep:]}"


# --- does it pay ---


def speedup(values: Sequence[Any], best: object) -> Draw:
    """Speed over that without a drafter, by draft length; the best is filled."""
    heights = _values(values)

    def draw(axes: Axes, width: int) -> None:
        lengths = range(1, len(heights) + 1)
        for length, height in zip(lengths, heights, strict=True):
            chosen = length == best
            axes.bar(length, height, 0.62, facecolor=FILE if chosen else LINE, edgecolor=FILE, lw=1.5, zorder=2)
            if (chosen or len(heights) <= width / 40) and not math.isnan(height):
                weight = "bold" if chosen else "normal"
                place: dict[str, Any] = {
                    "xytext": (0, 3),
                    "textcoords": "offset points",
                    "ha": "center",
                    "va": "bottom",
                }
                axes.annotate(f"{height:.2f}", (length, height), fontsize=11, fontweight=weight, **place)
        top = max((h for h in heights if not math.isnan(h)), default=1)
        axes.set(ylim=(0, 1.15 * max(top, 1.0)), xlabel="drafted tokens", xlim=(0.4, len(heights) + 0.6))
        axes.set_xticks(range(1, len(heights) + 1, math.ceil(len(heights) / (width / 32))))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.axhline(1, color=INK, lw=1, ls=(0, (4, 3)), zorder=3)
        axes.grid(axis="y")

    return draw


# --- how sure ---


def interval(difference: float, low: float, high: float, max_drop: float | None) -> Draw:
    """The difference to the original with its 95 % interval, and the largest drop that counts as good."""

    def draw(axes: Axes, width: int) -> None:
        reach = [100 * v for v in (0.0, low, high, -(max_drop or 0.0))]
        pad = 0.12 * max(max(reach) - min(reach), 1.0)
        axes.set(xlim=(min(reach) - pad, max(reach) + pad), ylim=(-1, 1), yticks=[])
        axes.axvline(0, color=ORIGINAL, lw=2, ls=(0, (4, 3)))
        if max_drop is not None:
            axes.axvline(-100 * max_drop, color=QUIET, lw=1, ls=(0, (1, 2)))
        axes.plot([100 * low, 100 * high], [0, 0], color=FILE, lw=3, marker="|", ms=14, mew=3, zorder=3)
        axes.plot([100 * difference], [0], color=FILE, marker="o", ms=10, zorder=4)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5 if width < WIDE else 9, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}%" if value else "0")

    return draw
