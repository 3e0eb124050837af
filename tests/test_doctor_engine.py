"""Doctor against the real llama-server: what it refuses doctor has failed, and what doctor passes it runs.

llama.cpp stops at some faults while loading and at others in the first draft, so each file is asked for tokens.
"""

from __future__ import annotations

import http.client
import subprocess
import urllib.error
from pathlib import Path

import pytest
from engine import llama_binary
from llama_server import llama_server
from planted_faults import BYTES, HARMLESS, RUNS_ANYWAY, STRUCTURE, Draft
from published import PAIR, dflash_shapes, random_tensors, small_config, tiny_target, write_checkpoint
from target_gguf import write_target
from test_doctor import RECIPES
from test_tensor_errors import write_importance

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.verdict import Outcome

pytestmark = pytest.mark.engine

PROMPT = list(range(300, 332))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def target(folder: Path) -> Path:
    return write_target(PAIR / "target", folder / "target.gguf")


@pytest.fixture(scope="module")
def drafter(target: Path, folder: Path) -> Path:
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", "Q8_0", folder / "drafter.gguf"))
    return folder / "drafter.gguf"


def runs(target: Path, drafter: Path, log: Path) -> bool:
    """Whether the server loads the file, drafts with it, and is alive afterwards."""
    options = ("-md", str(drafter), "--spec-type", "draft-dflash", "--spec-draft-n-max", "7", "-t", "1", "-td", "1")
    try:
        with llama_server(target, *options, log=log) as server:
            drafted = server.complete(PROMPT, 12)["timings"].get("draft_n", 0)
            return bool(drafted and server.get("/health")["status"] == "ok")
    except (AssertionError, urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def planted(drafter: Path, out: Path, name: str) -> Path:
    if name in BYTES:
        out.write_bytes(BYTES[name][1](drafter.read_bytes()))
        return out
    draft = Draft.of(drafter)
    {**STRUCTURE, **HARMLESS}[name].edit(draft)
    return draft.write(out)


@pytest.mark.parametrize("name", [*STRUCTURE, *BYTES])
def test_what_the_server_refuses_doctor_has_failed(target: Path, drafter: Path, tmp_path: Path, name: str) -> None:
    """And what it runs without a word, drafting nonsense, doctor has failed as well."""
    path = planted(drafter, tmp_path / "spoilt.gguf", name)
    assert doctor(path, target)[0].outcome is Outcome.FAIL
    assert runs(target, path, tmp_path / "log") is (name in RUNS_ANYWAY)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_doctor_passes_the_server_runs(target: Path, drafter: Path, tmp_path: Path, name: str) -> None:
    path = planted(drafter, tmp_path / "odd.gguf", name)
    assert [gate.outcome for gate in doctor(path, target)] == [Outcome.PASS] * 2
    assert runs(target, path, tmp_path / "log")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_and_runs(target: Path, folder: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "drafter.gguf"
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", recipe, out))
    assert [gate.outcome for gate in doctor(out, target, PAIR / "drafter")] == [Outcome.PASS] * 2
    assert runs(target, out, tmp_path / "log")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q2_K", "IQ4_XS"])
def test_files_of_llama_quantize_pass(target: Path, folder: Path, tmp_path: Path, recipe: str, weighted: bool) -> None:
    """Made by the other tool, held against the checkpoint."""
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", "BF16", tmp_path / "bf16.gguf"))
    options = ["--imatrix", str(write_importance(tmp_path / "imatrix.gguf", tmp_path / "bf16.gguf"))]
    command = [str(llama_binary("llama-quantize")), *(options if weighted else []), str(tmp_path / "bf16.gguf")]
    done = subprocess.run([*command, str(tmp_path / "out.gguf"), recipe, "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gates = doctor(tmp_path / "out.gguf", target, PAIR / "drafter")
    assert [(gate.outcome, gate.details) for gate in gates] == [(Outcome.PASS, ())] * 2
    assert ("bit for bit" in gates[0].summary) is not weighted or "10 of 25" in gates[0].summary
    assert runs(target, tmp_path / "out.gguf", tmp_path / "log")


def test_every_pairing_fault_that_stops_the_server(target: Path, folder: Path, tmp_path: Path) -> None:
    """T-13, T-61: a drafter of another width, which llama.cpp finds out in the first prompt at the latest."""
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    source = write_checkpoint(tmp_path / "d", config, random_tensors(dflash_shapes(config)))
    other = tiny_target(tmp_path / "t", architectures=["Qwen3ForCausalLM"], hidden_size=64, num_hidden_layers=6,
                        eos_token_id=2046)  # fmt: skip
    convert(ConvertJob(source, other, "llama.cpp", "F16", tmp_path / "narrow.gguf"))
    gates = doctor(tmp_path / "narrow.gguf", target)
    assert [gate.outcome for gate in gates] == [Outcome.PASS, Outcome.FAIL]
    assert not runs(target, tmp_path / "narrow.gguf", tmp_path / "log")
