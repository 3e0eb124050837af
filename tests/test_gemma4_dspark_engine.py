"""DSpark of Gemma-4 layers in the real llama.cpp: its own converter's files, and the drafts of the torch reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_gemma4_dspark
import pytest
from llama_source import run_converter
from published import FIXTURES
from test_against_llama_cpp import differences, facts_of_file, listed_for, verdict
from test_gemma4_assistant import rewritten
from test_gemma4_assistant_engine import EXACT, same_drafts
from test_mtp_engine import PROMPTS, ask
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import ConvertJob, QuantizeJob, VerifyJob, convert, quantize, verify
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Outcome

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.5")

from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import gguf_weights, reference  # noqa: E402

PROMPT_FILE = FIXTURES / "pair" / "prompts.jsonl"
GOLDEN = FIXTURES / "dialects" / "llama.cpp-gemma4-dspark-differences.json"
WHOLE_HEADS = {"full_attention": {"rope_theta": 1_000_000.0, "rope_type": "default"}}
WINDOW = {"dflash_config": {"use_swa": True, "swa_window_size": 24}}
# What llama.cpp's converter takes: as published but for the cap, and what it has branches for.
CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "tied, whole heads turn": {"tie_word_embeddings": True, "rope_parameters": WHOLE_HEADS},
    "a window": WINDOW,
    "no confidence head": {"enable_confidence_head": False},
}
RECIPES = {"published": ("F32", "F16", "BF16", "Q8_0")}
TEXTS = PROMPTS[2:3]  # which does not end early
LOUD = 12.0  # of the head, for logits around the cap
DRAFTING = ("--spec-type", "draft-dspark", "--spec-draft-n-max", "7", "--spec-draft-p-min", "0")
CACHE = ("--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32")
RUNS = [(name, recipe) for name in CASES for recipe in RECIPES.get(name, ("F32",))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    make_gemma4_dspark.target(folder / "target", hidden_size=64)
    for name, changes in CASES.items():
        make_gemma4_dspark.dspark(folder / name, **changes)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Path:
    """llama.cpp's files: the target, and drafters in each recipe."""
    out = folder / "llama.cpp"
    out.mkdir()
    target = ["--target-model-dir", str(folder / "target")]
    jobs = [
        [str(folder / name), *target, "--outtype", recipe.lower(), "--outfile", str(out / f"{name}-{recipe}.gguf")]
        for name, recipe in RUNS
    ]
    run_converter(
        [*jobs, [str(folder / "target"), "--outtype", "f32", "--outfile", str(out / "target.gguf")]],
        folder / "converter.log",
    )
    return out


def converted(folder: Path, name: str, out: Path, recipe: str = "F32") -> Path:
    convert(ConvertJob(folder / name, folder / "target", "llama.cpp", recipe, out))
    return out


@pytest.mark.parametrize(("name", "recipe"), RUNS)
def test_a_file_is_llama_cpp_s_or_the_difference_is_listed(
    name: str, recipe: str, folder: Path, theirs: Path, tmp_path: Path
) -> None:
    """Key by key, tensor by tensor, byte by byte; each difference has its reason in the golden list."""
    ours = converted(folder, name, tmp_path / "ours.gguf", recipe)
    found = differences(*(facts_of_file(read_gguf(file)) for file in (ours, theirs / f"{name}-{recipe}.gguf")))
    problems = list(verdict(found, listed_for(name, recipe, json.loads(GOLDEN.read_text())["differences"])))
    assert not problems, "\n".join(problems)


def test_the_golden_list_gives_reasons() -> None:
    for entry in json.loads(GOLDEN.read_text())["differences"]:
        assert entry["names"] and entry["reason"].strip(), entry


@pytest.mark.parametrize("recipe", ["Q6_K", "Q4_K_M"])
def test_a_quantized_drafter_is_llama_quantize_s(folder: Path, tmp_path: Path, recipe: str) -> None:
    """There are no values, of which a mixture makes some larger."""
    plain = converted(folder, "published", tmp_path / "plain.gguf", "BF16")
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, tmp_path / "ours.gguf", recipe))
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs)


# --- the same drafts ---


@pytest.mark.parametrize("name", ["published", "tied, whole heads turn", "a window"])
def test_drafts_are_the_reference_s(name: str, folder: Path, theirs: Path, tmp_path: Path) -> None:
    """At F32 at least 99 of 100 drafts, of prompts longer than the window."""
    torch.set_num_threads(1)
    file = converted(folder, name, tmp_path / "ours.gguf")
    options = ("-md", str(file), *DRAFTING, *CACHE, *EXACT)
    answers = ask(theirs / "target.gguf", tmp_path / "server.log", *options, prompts=TEXTS)
    same, drafted, tokens = same_drafts(TorchTarget(folder / "target"), reference(*gguf_weights(file)), TEXTS, answers)
    print(f"{name}: {same} of {drafted} drafts, {tokens} different tokens")
    assert drafted > 700 and tokens > 100 and same >= 0.99 * drafted, (same, drafted, tokens)


def test_llama_cpp_leaves_the_cap_out(folder: Path, theirs: Path, tmp_path: Path) -> None:
    """Of logits that a cap bites: what it drafts is what the facts without one draft, and so the note says."""
    make_gemma4_dspark.dspark(folder / "capped", loud=LOUD, final_logit_softcapping=make_gemma4_dspark.CAP)
    file = converted(folder, "capped", tmp_path / "ours.gguf")
    options = ("-md", str(file), *DRAFTING, *CACHE, *EXACT)
    answers = ask(theirs / "target.gguf", tmp_path / "server.log", *options, prompts=TEXTS)
    target, (spec, weights) = TorchTarget(folder / "target"), gguf_weights(file)
    assert spec.logit_softcap == make_gemma4_dspark.CAP
    as_there = same_drafts(target, reference(replace(spec, logit_softcap=None), weights), TEXTS, answers)
    as_trained = same_drafts(target, reference(spec, weights), TEXTS, answers)
    print(f"of {as_there[1]} drafts {as_there[0]} without the cap, {as_trained[0]} with it")
    assert as_there[0] >= 0.99 * as_there[1] > 700 and as_trained[0] < 0.95 * as_there[1]


def test_verify_names_a_lost_scale(folder: Path, tmp_path: Path) -> None:
    """Random drafts are never accepted, but they are others than the original's."""
    file = converted(folder, "published", tmp_path / "ours.gguf")
    spoilt = rewritten(file, tmp_path / "spoilt.gguf", attention__scale=0.125)
    shape: dict[str, Any] = {"max_prompts": 1, "new_tokens": 12, "contexts": (24,), "threads": 1}
    job = VerifyJob(file, (folder / "target",), folder / "published", prompts=PROMPT_FILE, **shape)
    told = {path: verify(replace(job, file=path, diagnose=path is spoilt)) for path in (file, spoilt)}
    gates = {path: {gate.name: gate.outcome for gate in verdict.gates} for path, verdict in told.items()}
    assert gates[file]["structure"] is gates[file]["same drafts"] is gates[file]["lossless"] is Outcome.PASS
    assert gates[spoilt]["structure"] is gates[spoilt]["same drafts"] is Outcome.FAIL
    diagnosis = told[spoilt].diagnosis
    assert diagnosis is not None and diagnosis.found is not None
    assert diagnosis.found.name == "attention_scale: 0.125 -> 1, as the source has it"
