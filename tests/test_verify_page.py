"""The page of `verify`, as a browser shows it: headless Chromium opens it, and is asked what it sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from chromium import Browser, chromium
from sample_verdicts import ALONE, FAILING, HOSTILE, LLAMA_CPP, MARKUP, PASSING, SAMPLES, WRONG_WEIGHTS

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verify.reports import answer
from convert_drafter.converters.verify.reports.html import page, write_page

pytestmark = pytest.mark.engine

CHARTS = {
    "passing": ["certainty", "by-position", "by-length", "speedup", "tensors"],
    "failing": ["certainty", "by-position", "by-length", "speedup", "tensors"],
    "wrong weights": ["tensors"],
    "alone": ["by-position", "by-length", "speedup"],
    "too few": ["by-position"],
    "empty": [],
}
VISIBLE = """
(selector => [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).map(e => {
    const box = e.getBoundingClientRect(); return [box.width, box.height]}))
"""
CONTRAST = """
(() => {
    const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const numbers = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const found = numbers(getComputedStyle(e).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
    };
    let worst = [99, ""];
    for (const e of document.querySelectorAll("h1,h2,h3,p,dt,dd,li,th,td,summary,figcaption,label,span,svg text")) {
        if (!e.checkVisibility() || !e.textContent.trim()) continue;
        const style = getComputedStyle(e);
        const a = light(numbers(e.closest("svg") ? style.fill : style.color)), b = light(behind(e));
        const found = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (found < worst[0]) worst = [found, e.tagName + ": " + e.textContent.slice(0, 60)];
    }
    return worst;
})()
"""
ROWS = """
[...document.querySelectorAll(".table .row:not(.head)")]
    .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
    .map(row => row.querySelector("span").textContent)
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every sample's page."""
    folder = tmp_path_factory.mktemp("pages")
    written = {name: folder / f"{name.replace(' ', '-')}.html" for name in SAMPLES}
    for name, path in written.items():
        write_page(SAMPLES[name], path)
    return written


# --- as a browser shows it ---


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_loaded_and_nothing_complains(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name])
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.complaints() == []


def test_the_browser_would_have_told(browser: Browser, tmp_path: Path) -> None:
    """What the test above rests on: an image from elsewhere and a failing script do show."""
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://localhost:9/x.png"><script>console.error("no"); nothing()</script>')
    browser.open(bad)
    assert len(browser.requests()) == 2
    assert len(browser.complaints()) >= 2


@pytest.mark.parametrize("width", [320, 400, 800, 1200])
@pytest.mark.parametrize("name", SAMPLES)
def test_no_page_scrolls_sideways(name: str, width: int, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name], width)
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("name", SAMPLES)
def test_the_verdict_is_there_to_read(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name], 400)
    shown = browser.ask("document.querySelector('.banner').innerText").replace("\xa0", " ")
    headline, _, sentence = answer.answer(SAMPLES[name]).partition(": ")
    assert headline[1:] in shown
    if name != "hostile":
        assert sentence[1:] in shown
    assert browser.ask("document.querySelectorAll('.gates > li').length") == len(SAMPLES[name].gates)


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_there_where_their_figures_are(
    name: str, width: int, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width)
    assert browser.ask("[...document.querySelectorAll('figure')].map(each => each.id)") == CHARTS[name]
    sizes = browser.ask(VISIBLE + "('figure svg')")
    assert len(sizes) == len(CHARTS[name])  # one of the two sizes of each
    assert all(box[0] > 250 and box[1] > 50 for box in sizes)


@pytest.mark.parametrize("width", [400, 800])
def test_text_in_charts_stays_readable_and_inside(width: int, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failing"], width)
    heights = browser.ask(VISIBLE + "('svg text')")
    assert heights
    assert min(height for _, height in heights) >= 11
    outside = """[...document.querySelectorAll("svg text")].filter(e => e.checkVisibility()).filter(e => {
        const a = e.getBoundingClientRect(), b = e.closest("section").getBoundingClientRect();
        return a.left < b.left || a.right > b.right}).map(e => e.textContent)"""
    assert browser.ask(outside) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["passing", "failing", "unsure", "wrong weights"])
def test_all_text_has_the_contrast_of_wcag_aa(name: str, dark: bool, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name], 800, dark)
    ratio, where = browser.ask(CONTRAST)
    assert ratio >= 4.5, where


def test_dark_mode_turns_page_and_charts(browser: Browser, pages: dict[str, Path]) -> None:
    looks = []
    for dark in (False, True):
        browser.open(pages["failing"], 800, dark)
        line = "getComputedStyle(document.querySelector('#by-position path[style*=\"--file\"]')).stroke"
        looks.append((browser.ask("getComputedStyle(document.body).backgroundColor"), browser.ask(line)))
    (light_page, light_line), (dark_page, dark_line) = looks
    assert sum(map(int, re.findall(r"\d+", light_page))) > 600
    assert sum(map(int, re.findall(r"\d+", dark_page))) < 150
    assert light_line != dark_line


def test_print_is_on_white_whatever_the_screen(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failing"], 800, dark=True, media="print")
    assert browser.ask("getComputedStyle(document.body).color") == "rgb(34, 38, 43)"
    assert browser.ask("getComputedStyle(document.documentElement).colorScheme") == "light only"
    assert browser.pdf().startswith(b"%PDF")


def test_tensors_can_be_sorted_without_a_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["wrong weights"], 1200)
    browser.ask("document.querySelector('.sortable').open = true")
    rows = SAMPLES["wrong weights"].gates[0].figures["tensors"]
    names = [row["name"] for row in rows]
    sortings = {
        "error": sorted(rows, key=lambda row: -row["relative"]),
        "name": sorted(rows, key=lambda row: row["name"]),
        "type": sorted(rows, key=lambda row: row["type"]),
        "largest": sorted(rows, key=lambda row: -row["max"]),
        "place": rows,
    }
    for order, expected in sortings.items():
        browser.ask(f"document.getElementById('by-{order}').click()")
        assert browser.ask(ROWS) == [row["name"] for row in expected], order
    assert set(browser.ask(ROWS)) == set(names)
    assert browser.ask("document.querySelector('.row.head').getBoundingClientRect().height") > 0


def test_markup_in_names_is_text(browser: Browser, pages: dict[str, Path]) -> None:
    """Names come from files: they are shown, they are never markup, and no control character gets through."""
    browser.open(pages["hostile"])
    assert browser.ask("document.querySelectorAll('script, img, b').length") == 0
    assert MARKUP in browser.ask("document.body.innerText")
    assert "49" not in browser.ask("document.querySelector('.banner').innerText")
    written = pages["hostile"].read_text()
    assert not {c for c in written if not c.isprintable()} - {"\n", "\xa0"}


def test_every_chart_has_a_name_and_every_id_is_its_own(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("failing", "hostile", "wrong weights"):
        browser.open(pages[name])
        ids = browser.ask("[...document.querySelectorAll('[id]')].map(each => each.id)")
        assert len(ids) == len(set(ids)), name
        used = "[...document.querySelectorAll('use')].map(each => each.href.baseVal)"
        assert browser.ask(f"{used}.filter(one => !document.querySelector(one))") == []
        labels = browser.ask("[...document.querySelectorAll('svg')].map(e => e.getAttribute('aria-label'))")
        assert labels
        assert all(labels)


def test_the_numbers_under_a_chart_are_the_verdicts(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["failing"])
    table = "[...document.querySelectorAll('#by-length ~ details tr')].map(r => [...r.children].map(c => c.innerText))"
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    head, *rows = browser.ask(table)
    assert head == ["tokens of context", "prompts", "original", "this file"]
    points = next(gate for gate in FAILING.gates if gate.name == "length sweep").figures["points"]
    assert [row[3] for row in rows] == [f"{point['file']:.2f}" for point in points]


# --- the text of the page ---


class Tags(HTMLParser):
    """Open tags, to see that every one is closed in its turn."""

    EMPTY = ("meta", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", SAMPLES)
def test_every_tag_is_closed(name: str) -> None:
    tags = Tags()
    tags.feed(page(SAMPLES[name]))
    tags.close()
    assert tags.open == []


def test_the_same_verdict_gives_the_same_bytes() -> None:
    """R6: no dates, no random names, in any process."""
    code = "import sys, sample_verdicts as s; from convert_drafter.converters.verify.reports.html import page"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", f"{code}; sys.stdout.buffer.write(page(s.PASSING).encode())"]
        made = subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent, env=environment)
        assert made.stdout.decode() == page(PASSING)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page(PASSING)
    assert dict(matplotlib.rcParams) == before


def test_what_was_measured_is_told_once_and_in_words() -> None:
    text = page(LLAMA_CPP)
    assert "The engine itself ran 1.58 times as fast" in text
    assert "With 7 drafted tokens: drafting 3.1 ms, verifying 14.8 ms" in text
    assert "none: nothing to compare with" in page(ALONE)
    assert "2 of 301 further off than their type explains: blk.7.ffn_up.weight" in page(WRONG_WEIGHTS)


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    write_page(HOSTILE, out)
    assert out.read_text().endswith("</html>\n")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(WrongInput, match="cannot be written"):
        write_page(HOSTILE, tmp_path)
