"""The `verify` command as a user types it: both engines, answers, exit codes, reports, diagnosis and repair."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ended import gone
from faults import FAULTS, Workspace
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.cli import main

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parent.parent
SCHEMA = next((ROOT / "converters" / "verify").rglob("verdict.schema.json"))
FEW = ("--max-prompts", "6", "--new-tokens", "48", "--contexts", "24,200", "--threads", "1")
PROMPTS = ("--prompts", str(PAIR / "prompts.jsonl"))
SOURCE = ("--source", str(PAIR / "drafter"))
FOLDER = ("--target", str(PAIR / "target"))
Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def gguf(folder: Path) -> tuple[str, str]:
    return ("--target", str(write_target(PAIR / "target", folder / "target-F32.gguf")))


def drafter(folder: Path, recipe: str, runtime: str = "llama.cpp", **settings: str) -> Path:
    name = "-".join([recipe, runtime, *settings.values()])
    out = folder / f"{name}.gguf"
    if not out.exists():
        convert(ConvertJob(PAIR / "drafter", PAIR / "target", runtime, recipe, out, settings=settings))
    return out


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    def run(*words: object) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON; a report that does not fit its schema fails."""
        out = tmp_path / "verdict.json"
        out.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as exit_:
            main(["verify", *map(str, words), *FEW, *PROMPTS, "--json", str(out)])
        assert isinstance(exit_.value.code, int)
        if not out.exists():
            return exit_.value.code, {"error": capsys.readouterr().err}
        verdict = json.loads(out.read_text())
        jsonschema.validate(verdict, json.loads(SCHEMA.read_text()))
        return exit_.value.code, verdict

    return run


def outcomes(verdict: dict[str, Any]) -> dict[str, str]:
    return {gate["name"]: gate["outcome"] for gate in verdict["gates"]}


def figures(verdict: dict[str, Any], gate: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each["figures"] for each in verdict["gates"] if each["name"] == gate)
    return found


def test_a_right_file_passes_in_both_engines(folder: Path, gguf: tuple[str, str], verify: Verify) -> None:
    code, verdict = verify(drafter(folder, "BF16"), *FOLDER, *gguf, *SOURCE)
    assert code == 0
    assert outcomes(verdict) == {
        **dict.fromkeys(("structure", "pairing", "lossless", "same drafts", "acceptance", "length sweep"), "pass"),
        "does it pay": "advice",
        "llama.cpp": "pass",
    }
    assert figures(verdict, "same drafts")["kl"] < 1e-6
    engine = figures(verdict, "llama.cpp")
    assert sum(engine["engine_steps"]) == pytest.approx(sum(engine["steps"]), abs=2)


def test_llama_cpp_alone_asks_every_gate(folder: Path, gguf: tuple[str, str], verify: Verify) -> None:
    code, verdict = verify(drafter(folder, "BF16"), *gguf, *SOURCE)
    assert code == 0 and verdict["engine"] == "llama.cpp"
    assert set(outcomes(verdict).values()) == {"pass", "advice"}
    assert len(figures(verdict, "acceptance")["file"]["by_position"]) == 7
    assert figures(verdict, "does it pay")["measured_speedup"] > 0
    assert {"temperature", "cache_prompt"} <= set(verdict["settings"]["llama.cpp"]["file"]["sampling"])


def test_a_quantized_file_passes_within_its_errors(folder: Path, verify: Verify) -> None:
    code, verdict = verify(drafter(folder, "Q5_K_M"), *FOLDER, *SOURCE)
    found = figures(verdict, "same drafts")
    assert code == 0 and 0 < found["kl"] < found["kl_allowed"]


def test_a_wrong_fact_fails_is_named_and_repaired(folder: Path, verify: Verify, tmp_path: Path) -> None:
    """T-9: the file loads, its text is right, and it drafts nothing that is."""
    file = drafter(folder, "Q8_0", **{"rope_parameters.rope_theta": "10000"})
    repaired = tmp_path / "repaired.gguf"
    code, verdict = verify(file, *FOLDER, *SOURCE, "--repair", repaired)
    assert code == 1
    assert outcomes(verdict)["lossless"] == "pass" and outcomes(verdict)["acceptance"] == "fail"
    assert verdict["diagnosis"]["found"]["facts"] == {"rope.theta": 1e7}
    code, verdict = verify(repaired, *FOLDER, *SOURCE)
    assert code == 0


def test_without_a_source_a_collapse_fails(folder: Path, verify: Verify) -> None:
    file = drafter(folder, "Q8_0", **{"rope_parameters.rope_theta": "10000"})
    code, verdict = verify(file, *FOLDER)
    assert code == 1 and outcomes(verdict)["same drafts"] == "skipped"
    assert outcomes(verdict)["acceptance"] == "fail"


def test_without_a_source_a_diagnosis_tells(folder: Path, verify: Verify) -> None:
    """Nobody knows what acceptance should be; that another theta drafts twice as well says enough."""
    file = drafter(folder, "Q8_0", **{"rope_parameters.rope_theta": "1000000"})
    assert verify(file, *FOLDER)[0] == 0
    code, verdict = verify(file, *FOLDER, "--diagnose")
    assert code == 1 and outcomes(verdict)["acceptance"] == "fail"
    assert "rope.theta" in verdict["diagnosis"]["found"]["facts"]
    assert verify(drafter(folder, "Q8_0"), *FOLDER, "--diagnose")[0] == 0


def test_a_least_length_decides(folder: Path, verify: Verify) -> None:
    file = drafter(folder, "Q8_0")
    assert verify(file, *FOLDER, "--min-acceptance-length", "2")[0] == 0
    assert verify(file, *FOLDER, "--min-acceptance-length", "7")[0] == 1


def test_too_few_prompts_are_undecided(folder: Path, verify: Verify) -> None:
    words = (drafter(folder, "Q3_K_M"), *FOLDER, *SOURCE, "--max-drop", "0.1")
    code, verdict = verify(*words, "--max-prompts", "3")
    if outcomes(verdict)["acceptance"] == "undecided":  # the last --max-prompts counts
        assert code == 0
        assert verify(*words, "--strict")[0] == 1


def test_a_file_that_stops_the_engine_is_an_answer(folder: Path, gguf: tuple[str, str], verify: Verify) -> None:
    """llama.cpp computes with F32 norms only: an assertion stops it. `doctor` has foreseen it."""
    fault = next(fault for fault in FAULTS if fault.name == "norms of 16 bits")
    file = fault.case(Workspace(folder)).file
    code, verdict = verify(file, *gguf)
    assert code == 1
    assert outcomes(verdict)["structure"] == outcomes(verdict)["lossless"] == "fail"
    lossless = next(gate for gate in verdict["gates"] if gate["name"] == "lossless")
    assert "SIGABRT" in lossless["summary"] and any("unsupported types" in line for line in lossless["details"])


def test_a_file_for_another_runtime_needs_torch(folder: Path, gguf: tuple[str, str], verify: Verify) -> None:
    file = drafter(folder, "Q8_0", "ik_llama.cpp")
    code, said = verify(file, *gguf)
    assert code == 4 and "a file for ik_llama.cpp, which llama-server does not load" in said["error"]
    assert verify(file, *FOLDER, *SOURCE)[0] == 0


def test_a_target_in_bfloat16_is_compared_with_itself(folder: Path, verify: Verify) -> None:
    code, verdict = verify(drafter(folder, "BF16"), *FOLDER, *SOURCE, "--dtype", "bfloat16")
    assert code == 0 and figures(verdict, "same drafts")["kl"] < 1e-6


def test_an_interrupted_verification_leaves_nothing(folder: Path, gguf: tuple[str, str], tmp_path: Path) -> None:
    """Ctrl-C: no report, no server."""
    file, page = drafter(folder, "BF16"), tmp_path / "page.html"
    words = ["verify", str(file), *gguf, *SOURCE, "--html", str(page)]
    program = [sys.executable, "-m", "convert_drafter.converters.cli", *words]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not _children(process.pid):
        time.sleep(0.2)
    children = _children(process.pid)
    assert children, "the server never started"
    background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # started with &, so is what we start
    os.kill(process.pid, signal.SIGTERM if background else signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not page.exists() and not list(tmp_path.iterdir())
    assert all(map(gone, children))  # one that was just being started ends a moment after us, by its tether


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
