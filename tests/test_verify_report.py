"""The report of `verify`: the sentence, the terminal, JSON under its schema, and files that are whole or not there."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from rich.console import Console
from sample_verdicts import (
    ALONE,
    EMPTY,
    FAILING,
    HOSTILE,
    LLAMA_CPP,
    PASSING,
    REPAIRED,
    SAMPLES,
    TOO_FEW,
    UNEXPLAINED,
    WRONG_WEIGHTS,
)

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verdict import Outcome, Verdict
from convert_drafter.converters.verify.reports import answer, report

SCHEMA = Path(report.__file__).with_name("verdict.schema.json")
ROOT = Path(__file__).parent.parent
SENTENCES = {
    "passing": "as good as the original: 3.41 tokens per verify step vs 3.38 (95 % interval -1.2% .. +2.9%)",
    "failing": "NOT as good as the original: 1.30 tokens per verify step vs 3.38 (95 % interval -64.1% .. -58.8%)",
    "wrong weights": "NOT good: structure: 2 tensors are not the checkpoint's",
    "unsure": "undecided: 24 more prompts would tell:"
    " 3.33 tokens per verify step vs 3.38 (95 % interval -4.7% .. +2.1%)",
    "too few": "undecided: 2 more prompts would tell: 3.33 tokens per verify step vs 3.38 (95 % interval unknown)",
    "alone": "no fault found: 3.41 tokens per verify step; no original to compare with (--source)",
    "empty": "no answer: no gate could be asked",
}


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    described = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(described)
    return Draft202012Validator(described)


def changed(verdict: Verdict, name: str, **changes: Any) -> Verdict:
    """The verdict with one gate changed."""
    return replace(verdict, gates=tuple(replace(g, **changes) if g.name == name else g for g in verdict.gates))


# --- the sentence ---


@pytest.mark.parametrize(("name", "sentence"), SENTENCES.items(), ids=SENTENCES)
def test_the_verdict_in_words(name: str, sentence: str) -> None:
    assert answer.answer(SAMPLES[name]) == sentence


def test_the_outcome_is_the_worst_of_the_gates_and_agrees_with_the_exit_code() -> None:
    expected = {"passing": "pass", "failing": "fail", "unsure": "undecided", "alone": "pass", "empty": "skipped"}
    assert {name: answer.overall(SAMPLES[name]).value for name in expected} == expected
    for verdict in SAMPLES.values():
        assert (answer.overall(verdict) is Outcome.FAIL) == (verdict.exit_code() == 1)
        strict = answer.overall(verdict) in (Outcome.FAIL, Outcome.UNDECIDED)
        assert strict == (verdict.exit_code(strict=True) == 1)


def test_a_failed_gate_is_never_called_as_good_whatever_the_acceptance() -> None:
    """A file may draft well and still write another text, or be the wrong tensors."""
    for gate in PASSING.gates:
        said = answer.answer(changed(PASSING, gate.name, outcome=Outcome.FAIL))
        assert said.startswith("NOT ")
        assert gate.name == "acceptance" or gate.summary in said


def test_without_a_source_nothing_is_called_as_good_as_the_original() -> None:
    advice = changed(ALONE, "acceptance", outcome=Outcome.ADVICE)
    assert "as good" not in answer.answer(ALONE) + answer.answer(advice)
    few = changed(PASSING, "acceptance", outcome=Outcome.FAIL, summary="3.41, at least 4 were asked for")
    assert answer.answer(few) == "NOT good: acceptance: 3.41, at least 4 were asked for"
    collapsed = changed(ALONE, "acceptance", outcome=Outcome.FAIL, summary="20 % of first drafts")
    assert answer.answer(collapsed) == "NOT good: acceptance: 20 % of first drafts"


@given(st.one_of(st.none(), st.floats(), st.integers(), st.text(), st.booleans()))
def test_a_number_is_finite_or_a_dash(value: object) -> None:
    found = answer.number(value)
    assert found is None or math.isfinite(found)
    assert (answer.shown(value) == "-") == (found is None) == (answer.percent(value) == "-")


# --- terminal ---


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    lines = report.text(SAMPLES[name], width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_terminal_shows_every_gate_and_ends_with_the_verdict(name: str) -> None:
    verdict = SAMPLES[name]
    shown = report.text(verdict, 500)
    for gate in verdict.gates:
        mark, _ = report.MARKS[gate.outcome]
        assert any(line.startswith(f"{mark} {gate.name} ") for line in shown.splitlines()), gate.name
    last = shown.splitlines()[-1] if name != "hostile" else "NOT good"
    assert answer.answer(verdict).startswith(last[:60])


def test_control_characters_never_reach_the_terminal() -> None:
    """A file name may hold an escape sequence, a title change or a bidi override."""
    for shown in (report.text(HOSTILE), report.text(HOSTILE, unicode=False)):
        assert not {c for c in shown if not c.isprintable() and c != "\n"}
    assert "\\x1b[31mred" in report.text(HOSTILE, 500)


def test_markup_in_names_is_shown_as_it_is() -> None:
    buffer = io.StringIO()
    Console(file=buffer, width=500, force_terminal=True, color_system="truecolor").print(report.layout(HOSTILE))
    assert "[bold]" in buffer.getvalue()
    assert "<script>alert(1)</script>" in buffer.getvalue()
    assert "\x1b[31mred" not in buffer.getvalue()


def test_a_terminal_gets_colours_and_a_pipe_none() -> None:
    for terminal in (True, False):
        buffer = io.StringIO()
        colours = "standard" if terminal else None
        Console(file=buffer, force_terminal=terminal, color_system=colours, width=80).print(report.layout(FAILING))
        assert ("\x1b[" in buffer.getvalue()) is terminal
    assert "\x1b" not in report.text(FAILING)


def test_forced_colours_do_not_reach_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in report.text(FAILING)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_terminal_without_unicode_gets_ascii_of_the_same_lines(name: str) -> None:
    ascii_only = report.text(SAMPLES[name], unicode=False)
    assert ascii_only.isascii()
    assert len(ascii_only.splitlines()) == len(report.text(SAMPLES[name]).splitlines())


def test_numbers_that_are_missing_are_dashes() -> None:
    shown = report.text(replace(HOSTILE, gates=HOSTILE.gates[2:], diagnosis=None, repaired=None), 200)
    assert "nan" not in shown
    assert "inf" not in shown
    assert any(line.split()[:4] == ["32", "8", "3.31", "-"] for line in shown.splitlines())


def test_details_are_told_where_they_explain_a_failure_and_not_elsewhere() -> None:
    assert "worst at draft position 7" in report.text(FAILING)
    assert "is a tie" not in report.text(LLAMA_CPP)
    many = tuple(f"tensor {i} is wrong" for i in range(300))
    shown = report.text(changed(WRONG_WEIGHTS, "structure", details=many))
    assert f"and {300 - report.MOST} more" in shown
    assert len(shown.splitlines()) < 60


def test_the_diagnosis_names_the_cause_and_what_to_do() -> None:
    shown = report.text(FAILING, 200)
    assert "cause: RoPE theta 10000 -> 10000000 restores 3.37 of 3.38 tokens per verify step" in shown
    assert "repair: run again with --repair OUT, which writes rope.theta = 10000000" in shown
    assert "repaired: dflash-tiny-theta-repaired.gguf" in report.text(REPAIRED)
    assert "--repair" not in report.text(REPAIRED)
    assert "cause: none of the explanations" in report.text(UNEXPLAINED)
    assert "cause" not in report.text(PASSING)


def test_a_cause_that_no_key_mends_says_so() -> None:
    assert FAILING.diagnosis is not None
    found = FAILING.diagnosis.tried[-1]
    shown = report.text(replace(FAILING, diagnosis=replace(FAILING.diagnosis, found=found)), 200)
    assert "convert the drafter again" in shown
    assert "--repair" not in shown


@pytest.mark.parametrize(
    ("share", "before", "expected"),
    [
        (1.0, 0.0, "█" * 30),
        (0.5, 1.0, "█" * 15 + "░" * 15),
        (0.0, 0.0, ""),
        (1 / 240, 0.1, "▏░░"),
        (2.0, 0.0, "█" * 30),
    ],
)
def test_a_bar_is_what_was_accepted_and_what_was_lost(share: float, before: float, expected: str) -> None:
    assert report.bar(share, before) == expected


def test_the_sweep_marks_where_the_window_and_the_trained_context_end() -> None:
    points = [{"context": c, "prompts": 3, "original": 3.0, "file": 3.0} for c in (32, 48, 64, 128, 256)]
    figures = {"window": 48, "context_length": 128, "points": points}
    assert report.beyond(figures) == ["", "", "past the window (48)", "", "past the trained context (128)"]


# --- JSON ---


@pytest.mark.parametrize("name", SAMPLES)
def test_every_verdict_is_valid_under_the_schema(name: str, schema: Draft202012Validator) -> None:
    data = json.loads(json.dumps(report.as_json(SAMPLES[name]), allow_nan=False))
    schema.validate(data)
    assert (data["schema"], data["version"]) == ("convert-drafter/verdict", 1)


BROKEN: dict[str, Any] = {
    "another gate": lambda d: d["gates"][0].update(name="vibes"),
    "another outcome": lambda d: d["gates"][0].update(outcome="maybe"),
    "advice as the whole outcome": lambda d: d.update(outcome="advice"),
    "another version": lambda d: d.update(version=2),
    "a field more": lambda d: d.update(score=1),
    "a gate's field more": lambda d: d["gates"][0].update(score=1),
    "no answer": lambda d: d.pop("answer"),
    "an acceptance without steps": lambda d: d["gates"][4]["figures"]["file"].pop("steps"),
    "a share above one": lambda d: d["gates"][4]["figures"]["file"].update(rate=1.5),
    "an interval of one end": lambda d: d["gates"][4]["figures"]["interval"].pop(),
    "a length as text": lambda d: d["gates"][4]["figures"]["file"].update(length="3.41"),
    "a tensor without a type": lambda d: d["gates"][0]["figures"]["tensors"][0].pop("type"),
    "a point without a context": lambda d: d["gates"][5]["figures"]["points"][0].pop("context"),
    "a cause without its facts": lambda d: d["diagnosis"]["found"].pop("facts"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_the_schema_does_not_describe_is_not_valid(broken: str, schema: Draft202012Validator) -> None:
    data = report.as_json(FAILING)
    schema.validate(data)
    BROKEN[broken](data)
    assert list(schema.iter_errors(data))


def test_every_field_of_a_gate_is_described_in_the_schema() -> None:
    """A figure that the schema does not know would be undocumented; the schema has a description of each gate's."""
    described = json.loads(SCHEMA.read_text())["$defs"]
    for verdict in SAMPLES.values():
        for gate in verdict.gates:
            known = described.get(gate.name, {"properties": {}})["properties"]
            assert set(gate.figures) <= set(known), gate.name


def test_the_depth_page_names_every_field_of_the_schema() -> None:
    page = (ROOT / "docs" / "verify.md").read_text()

    def names(part: Any) -> set[str]:
        if isinstance(part, list):
            return set().union(*map(names, part))
        if not isinstance(part, dict):
            return set()
        own = set(part["properties"]) if isinstance(part.get("properties"), dict) else set()
        return own.union(*map(names, part.values()))

    missing = {name for name in names(json.loads(SCHEMA.read_text())) if f"`{name}`" not in page}
    assert not missing


def test_numbers_survive_the_way_through_json() -> None:
    data = json.loads(json.dumps(report.as_json(FAILING)))
    by_name = {gate["name"]: gate for gate in data["gates"]}
    for gate in FAILING.gates:
        assert by_name[gate.name]["figures"] == gate.figures
    assert FAILING.diagnosis is not None
    assert data["diagnosis"]["found"]["length"] == FAILING.diagnosis.tried[0].length
    assert data["diagnosis"]["found"]["facts"] == {"rope.theta": 10000000.0}
    assert data["settings"] == FAILING.settings


def test_what_is_no_number_is_null_and_what_is_no_json_is_plain() -> None:
    assert report.as_json(TOO_FEW)["gates"][0]["figures"]["interval"] == [None, None]
    odd = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": (math.nan, np.inf), "d": Path("x"), 3: np.bool_(True)}
    data = report.as_json(replace(EMPTY, settings=odd))
    assert data["settings"] == {"a": 0.5, "b": [1, 2], "c": [None, None], "d": "x", "3": True}


# --- files ---


def test_json_is_written_whole(tmp_path: Path, schema: Draft202012Validator) -> None:
    out = tmp_path / "verdict.json"
    (tmp_path / "verdict.json.partial").write_text("of a killed run")
    report.write_json(HOSTILE, out)
    schema.validate(json.loads(out.read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]
    report.write_json(PASSING, out)
    assert json.loads(out.read_text())["outcome"] == "pass"


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    out.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        report.write_text("\udcff", out, EMPTY)
    assert out.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]


@pytest.mark.parametrize("place", ["missing/verdict.json", "."])
def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    with pytest.raises(WrongInput, match="cannot be written"):
        report.write_json(PASSING, tmp_path / place)


@pytest.mark.parametrize("field", ["file", "target", "source"])
@pytest.mark.parametrize("how", ["itself", "link", "partial"])
def test_a_report_never_takes_the_place_of_what_was_verified(tmp_path: Path, field: str, how: str) -> None:
    """T-24: `--html DRAFTER.gguf` is a typing error away."""
    model = tmp_path / ("out.html.partial" if how == "partial" else "model.gguf")
    model.write_bytes(b"GGUF")
    out = {"itself": model, "link": tmp_path / "link", "partial": tmp_path / "out.html"}[how]
    if how == "link":
        out.symlink_to(model)
    with pytest.raises(WrongInput, match="which was verified"):
        report.write_text("x", out, replace(PASSING, **{field: str(model)}))
    assert model.read_bytes() == b"GGUF"


def test_places_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    """T-24, R3: a wrong place is told before minutes are spent, and nothing is written by the check."""
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    report.check_places([tmp_path / "a.json", tmp_path / "a.html"], [model, tmp_path / "not/there"])
    for places in ([tmp_path], [tmp_path / "no" / "a.json"], [model], [tmp_path / "a", tmp_path / "a"]):
        with pytest.raises(WrongInput, match=str(places[0])):
            report.check_places(places, [model])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_link_under_the_partial_name_is_not_followed(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("kept")
    (tmp_path / "out.json.partial").symlink_to(treasure)
    report.write_json(PASSING, tmp_path / "out.json")
    assert treasure.read_text() == "kept"
    assert not (tmp_path / "out.json").is_symlink()


# --- imports ---

HEAVY = "torch transformers matplotlib jinja2 jsonschema"


def test_the_report_needs_none_of_the_extras() -> None:
    """T-7: terminal and JSON come up with torch, matplotlib and jinja2 blocked; html.py can be imported."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys("{HEAVY}".split()))
from convert_drafter.converters.verify.reports import report
from convert_drafter.converters.verify.reports import html
from convert_drafter.converters.verdict import Verdict
verdict = Verdict("a.gguf", "b", None, "torch", {{}}, ())
report.text(verdict), report.as_json(verdict)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_page_without_its_extras_says_what_to_install(missing: str) -> None:
    """T-7: found by the import itself, in a fresh process."""
    code = f"""
import sys
sys.modules["{missing}"] = None
from convert_drafter.converters.errors import MissingEngine
from convert_drafter.converters.verify.reports import html
from convert_drafter.converters.verdict import Verdict
try:
    html.page(Verdict("a.gguf", "b", None, "torch", {{}}, ()))
except MissingEngine as error:
    assert 'pip install "convert-drafter[verify]"' in str(error), error
    assert error.exit_code == 4
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
