"""The order of a verification, what it refuses to start, and llama.cpp held against torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from published import PAIR

from convert_drafter.converters import ConvertJob, convert, doctor
from convert_drafter.converters.cli import main
from convert_drafter.converters.errors import MissingEngine, WrongInput, WrongUsage
from convert_drafter.converters.verdict import Cause, Diagnosis, Gate, Outcome, Verdict
from convert_drafter.converters.verify.acceptance import Acceptance
from convert_drafter.converters.verify.engine_gate import engine_gate
from convert_drafter.converters.verify.job import MEASURED, EngineAnswer, VerifyJob
from convert_drafter.converters.verify.measured import Measured, Watch

verify_module = sys.modules["convert_drafter.converters.verify.verify"]
TARGET = PAIR / "target"


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "drafter.gguf"
    convert(ConvertJob(PAIR / "drafter", TARGET, "llama.cpp", "Q8_0", out))
    return out


def answered(*gates: Gate, **measured: object) -> EngineAnswer:
    return EngineAnswer(gates, {}, replace(Measured(), **measured))


def never(job: VerifyJob, before: Sequence[Gate], watch: Watch) -> EngineAnswer:
    raise AssertionError("nothing is to be measured")


def good(job: VerifyJob, before: Sequence[Gate], watch: Watch) -> EngineAnswer:
    return answered(*(Gate(name, Outcome.PASS, "fine") for name in MEASURED))


def verified(job: VerifyJob, monkeypatch: pytest.MonkeyPatch, run: object = good) -> Verdict:
    monkeypatch.setattr(verify_module, "find_engine", lambda name, job: run)
    return verify_module.verify(job)


def test_gates_come_in_the_order_they_are_asked(drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verified(VerifyJob(drafter, (TARGET,)), monkeypatch)
    assert [gate.name for gate in verdict.gates] == ["structure", "pairing", *MEASURED]
    assert verdict.exit_code() == 0 and verdict.engine == "torch"


def test_a_refused_pair_is_not_measured(drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-61: pairing is decided by what the files say, not by acceptance."""
    other = tmp_path / "other"
    shutil.copytree(TARGET, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    verdict = verified(VerifyJob(drafter, (other,)), monkeypatch, never)
    assert verdict.exit_code() == 1
    outcomes = {gate.name: gate.outcome for gate in verdict.gates}
    assert outcomes["pairing"] is Outcome.FAIL
    assert {outcomes[name] for name in MEASURED} == {Outcome.SKIPPED}


def test_a_file_that_is_not_all_there_is_not_measured(
    drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T-70: a truncated file is an answer, not an error."""
    half = tmp_path / "half.gguf"
    half.write_bytes(drafter.read_bytes()[: drafter.stat().st_size // 2])
    verdict = verified(VerifyJob(half, (TARGET,)), monkeypatch, never)
    assert verdict.exit_code() == 1
    outcomes = {gate.name: gate.outcome for gate in verdict.gates}
    assert outcomes["structure"] is Outcome.FAIL
    assert {outcomes[name] for name in MEASURED} == {Outcome.SKIPPED}


def test_undecided_fails_only_when_strict() -> None:
    verdict = Verdict("f", "t", None, "torch", {}, (Gate("acceptance", Outcome.UNDECIDED, "?"),))
    assert (verdict.exit_code(), verdict.exit_code(strict=True)) == (0, 1)


def test_engines_follow_from_the_targets(drafter: Path) -> None:
    gguf = Path("target.gguf")
    assert VerifyJob(drafter, (TARGET,)).engines == ("torch",)
    assert VerifyJob(drafter, (gguf,)).engines == ("llama.cpp",)
    assert VerifyJob(drafter, (gguf, TARGET)).engines == ("torch", "llama.cpp")
    assert VerifyJob(drafter, (gguf, TARGET), engine="llama.cpp").engines == ("llama.cpp",)
    for targets, engine in (((TARGET,), "llama.cpp"), ((gguf,), "torch")):
        with pytest.raises(WrongUsage, match=f"--engine {engine} runs the target from"):
            _ = VerifyJob(drafter, targets, engine=engine).engines


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"file": Path("nowhere.gguf")}, WrongInput, "nowhere.gguf: nothing there"),
        ({"file": TARGET}, WrongInput, "is a folder, expected a drafter's GGUF"),
        ({"targets": (Path("nowhere"),)}, WrongInput, "nowhere: nothing there, expected the target"),
        ({"targets": (TARGET, PAIR)}, WrongUsage, "one folder"),
        ({"source": PAIR / "nowhere"}, WrongInput, "nowhere"),
    ],
)
def test_what_cannot_be_verified_is_said_first(
    drafter: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        verified(replace(VerifyJob(drafter, (TARGET,)), **change), monkeypatch, never)


def test_a_repaired_file_never_lies_on_an_input(drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-24"""
    with pytest.raises(WrongUsage):
        verified(VerifyJob(drafter, (TARGET,), repair=drafter), monkeypatch, never)


def test_without_torch_the_way_to_get_it_is_said(drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-7"""
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    with pytest.raises(MissingEngine, match=r"torch and transformers: pip install") as found:
        verify_module.verify(VerifyJob(drafter, (TARGET,)))
    assert found.value.exit_code == 4


def test_the_orchestration_imports_no_torch() -> None:
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, matplotlib=None, jinja2=None); "
    modules = ("verify", "gates", "loop", "statistics", "reports.report", "reports.html", "diagnosis.repair")
    names = ", ".join(f"convert_drafter.converters.verify.{name}" for name in modules)
    subprocess.run([sys.executable, "-c", f"{blocked}import {names}"], check=True)


# --- llama.cpp against torch ---

TEXTS = ((1, 2, 3), (4, 5, 6))


def walks(*steps: int) -> tuple[Acceptance, ...]:
    return tuple(Acceptance(n, 127, (n,) * 7, (n // 2,) * 7) for n in steps)


def test_the_same_steps_in_both_engines_pass() -> None:
    torch = answered(prompts=("a", "b"), texts=TEXTS, files=walks(30, 40))
    gate = engine_gate(torch, answered(prompts=("a", "b"), texts=TEXTS, files=walks(30, 39)))
    assert gate.outcome is Outcome.PASS
    assert gate.summary == "69 verify steps in llama.cpp, 70 in torch, on 2 prompts with the same text"
    assert gate.details == ("b: 39 verify steps, 40 in torch",)
    assert gate.figures == {"steps": [30, 40], "engine_steps": [30, 39]}


def test_more_steps_in_the_engine_fail() -> None:
    torch = answered(prompts=("a", "b"), texts=TEXTS, files=walks(30, 40))
    gate = engine_gate(torch, answered(prompts=("a", "b"), texts=TEXTS, files=walks(90, 110)))
    assert gate.outcome is Outcome.FAIL


def test_prompts_with_other_texts_are_left_out() -> None:
    """The target's precision changes the text; like is compared with like."""
    torch = answered(prompts=("a", "b"), texts=TEXTS, files=walks(30, 40))
    gate = engine_gate(torch, answered(prompts=("a", "b"), texts=(TEXTS[0], (9,)), files=walks(30, 90)))
    assert gate.outcome is Outcome.PASS
    assert gate.details[-1].endswith("precision changes: 1 prompts")
    nothing = engine_gate(torch, answered(prompts=("a",), texts=((9,),), files=walks(90)))
    assert nothing.outcome is Outcome.SKIPPED


def test_an_engine_s_own_fault_is_the_gate_s() -> None:
    crashed = answered(Gate("lossless", Outcome.FAIL, "llama-server stopped", ("GGML_ASSERT",)))
    gate = engine_gate(answered(prompts=("a",), texts=TEXTS[:1], files=walks(30)), crashed)
    assert gate.outcome is Outcome.FAIL and gate.details == ("GGML_ASSERT",)
    assert engine_gate(answered(), answered(Gate("lossless", Outcome.SKIPPED, "no"))).outcome is Outcome.SKIPPED


# --- what is never written, and what is no number ---


@pytest.mark.parametrize("place", ["target/config.json", "drafter/model.safetensors"])
@pytest.mark.parametrize("option", ["--json", "--html", "--repair"])
def test_nothing_is_written_over_a_file_of_an_input(
    drafter: Path, tmp_path: Path, option: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """T-24: sources are never modified, nor are the files in a source's folder."""
    shutil.copytree(PAIR, tmp_path / "pair")
    path = tmp_path / "pair" / place
    before = path.read_bytes()
    inputs = ("--target", str(tmp_path / "pair" / "target"), "--source", str(tmp_path / "pair" / "drafter"))
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(drafter), *inputs, option, str(path)])
    assert exit_.value.code in (2, 3) and path.read_bytes() == before
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ("--max-drop", "nan"),
        ("--min-acceptance-length", "nan"),
        ("--max-drop", "2"),
        ("--max-prompts", "0"),
        ("--new-tokens", "2"),
        ("--contexts", "0"),
        ("--contexts", "1,x"),
        ("--template", "novalue"),
        ("--html", "-"),
    ],
)
def test_an_option_that_is_no_value_is_wrong_usage(drafter: Path, words: tuple[str, str]) -> None:
    """T-3"""
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(drafter), "--target", str(TARGET), *words])
    assert exit_.value.code == 2


def test_a_failed_repair_leaves_the_verdict(drafter: Path, tmp_path: Path) -> None:
    cause = Cause("capture layers all one lower", 3.0, facts={"capture_layers": (-1, 1, 3)})
    verdict = Verdict("f", "t", None, "torch", {}, (), Diagnosis(1.2, 3.4, cause, (cause,)))
    found = verify_module._repaired(VerifyJob(drafter, (TARGET,), repair=tmp_path / "out.gguf"), verdict)
    assert found.diagnosis == verdict.diagnosis and found.repaired is None
    assert found.notes[0].startswith("not repaired: ") and not list(tmp_path.iterdir())


def test_what_the_user_overruled_is_a_doubt(tmp_path: Path) -> None:
    """A file made with --set against what the checkpoint says is right only if that was meant."""
    out = tmp_path / "set.gguf"
    settings = {"rope_parameters.rope_theta": "10000"}
    convert(ConvertJob(PAIR / "drafter", TARGET, "llama.cpp", "Q8_0", out, settings=settings))
    structure, _ = doctor(out, TARGET, PAIR / "drafter")
    assert structure.outcome is Outcome.UNDECIDED
    assert structure.details[0].startswith("rope.theta: the checkpoint says 10000000.0, the file 10000.0")
