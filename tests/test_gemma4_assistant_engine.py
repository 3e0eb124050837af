"""Gemma-4 assistants in the real llama.cpp: the same files as its own converter's, the same drafts as in torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_gemma4_assistant
import pytest
from llama_server import llama_server
from llama_source import run_converter
from published import FIXTURES
from test_against_llama_cpp import RECIPES, differences, facts_of_file, listed_for, verdict
from test_gemma4_assistant import rewritten
from test_mtp_engine import DRAFTING, PROMPTS, Answers, ask, walk
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import ConvertJob, QuantizeJob, convert, quantize
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Outcome

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.5")

from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import gguf_weights, reference  # noqa: E402
from convert_drafter.converters.verify.job import VerifyJob  # noqa: E402
from convert_drafter.converters.verify.verify import verify  # noqa: E402

PROMPT_FILE = FIXTURES / "pair" / "prompts.jsonl"
GOLDEN = FIXTURES / "dialects" / "llama.cpp-gemma4-assistant-differences.json"
# What an assistant and its target are made of beside the fixture's own: as 26B-A4B is, and as E2B is.
PLAIN: dict[str, Any] = {"attention_k_eq_v": False, "num_global_key_value_heads": None}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "heads": ({}, {}),
    "plain": ({**PLAIN, "num_kv_shared_layers": 0}, {**PLAIN, "ordered": True}),
}
# Its flash attention on the CPU adds up in 16 bits, which random weights hear in one draft of twenty.
TIE = 1e-3  # nats; between the best two tokens it is 0.06 in the median
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    for name, (of_target, of_assistant) in PAIRS.items():
        make_gemma4_assistant.target(folder / name / "target", **of_target)
        make_gemma4_assistant.assistant(folder / name / "assistant", **of_assistant)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Path:
    """llama.cpp's files: targets, and assistants in each recipe."""
    out = folder / "llama.cpp"
    out.mkdir()
    runs = [(name, "assistant", recipe) for name in PAIRS for recipe in RECIPES]
    runs += [(name, "target", "F32") for name in PAIRS]
    jobs = [
        [str(folder / name / what), "--outtype", recipe.lower(), "--outfile", str(out / f"{name}-{what}-{recipe}.gguf")]
        for name, what, recipe in runs
    ]
    run_converter(jobs, folder / "converter.log")
    return out


def job(folder: Path, name: str, out: Path, recipe: str = "F32") -> ConvertJob:
    return ConvertJob(folder / name / "assistant", folder / name / "target", "llama.cpp", recipe, out)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_file_is_llama_cpp_s_or_the_difference_is_listed(
    name: str, recipe: str, folder: Path, theirs: Path, tmp_path: Path
) -> None:
    """Key by key, tensor by tensor, byte by byte; each difference has its reason in the golden list."""
    out = tmp_path / "ours.gguf"
    convert(job(folder, name, out, recipe))
    found = differences(*(facts_of_file(read_gguf(f)) for f in (out, theirs / f"{name}-assistant-{recipe}.gguf")))
    listed = listed_for(name, recipe, json.loads(GOLDEN.read_text())["differences"])
    assert not list(verdict(found, listed))


def test_the_golden_list_gives_reasons() -> None:
    for entry in json.loads(GOLDEN.read_text())["differences"]:
        assert entry["names"] and entry["reason"].strip(), entry


@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q2_K"])
def test_a_quantized_assistant_is_llama_quantize_s(folder: Path, tmp_path: Path, recipe: str) -> None:
    """In one pass from the checkpoint and from the BF16 file."""
    plain, ours, once = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "once"))
    convert(job(folder, "heads", plain, "BF16"))
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, ours, recipe))
    assert_same_file(read_gguf(ours), theirs)
    convert(job(folder, "heads", once, recipe))
    assert_same_file(read_gguf(once), theirs)


# --- the same drafts ---


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    found = {name: folder / f"{name}.gguf" for name in PAIRS}
    for name, out in found.items():
        convert(job(folder, name, out))
    return found


@pytest.fixture(scope="module")
def answers(theirs: Path, folder: Path, files: dict[str, Path]) -> dict[str, Answers]:
    return {
        name: ask(theirs / f"{name}-target-F32.gguf", folder / f"{name}.log", "-md", str(file), *DRAFTING, *EXACT)
        for name, file in files.items()
    }


def same_drafts(
    target: TorchTarget, drafter: Any, prompts: Sequence[list[int]], answers: Answers
) -> tuple[int, int, int]:
    """(drafts that the reference drafts as well after the same drafts before them, all drafts, different tokens)"""
    torch.set_num_threads(1)
    captures, pairs = captures_of(drafter.spec), list[tuple[int, int]]()
    for prompt, (tokens, steps) in zip(prompts, answers, strict=True):
        text = [*prompt, *tokens]
        states = target.write(text, 1, captures)[1]
        context = drafter.read(None, torch.cat([states[k] for k in captures], dim=-1), text, target.tables)
        for position, drafts, _ in walk(text, len(prompt), steps):
            until = drafter.until(context, position)
            ours = drafter.draft(until, text[position], len(drafts), target.tables, drafts).tokens.tolist()
            pairs += zip(ours, drafts, strict=True)
    return sum(a == b for a, b in pairs), len(pairs), len({b for _, b in pairs})


def test_its_layers_do_not_bound_a_draft(theirs: Path, folder: Path, files: dict[str, Path]) -> None:
    """Three layers that all run for every token: six are drafted where six are asked for (unlike chained heads)."""
    options = ["6" if option == "3" else option for option in DRAFTING]
    target, log = theirs / "heads-target-F32.gguf", folder / "long.log"
    ((_, steps),) = ask(target, log, "-md", str(files["heads"]), *options, prompts=PROMPTS[:1])
    assert max(map(len, steps)) == 6


@pytest.mark.parametrize("name", PAIRS)
def test_drafts_are_the_reference_s(
    name: str, folder: Path, files: dict[str, Path], answers: dict[str, Answers]
) -> None:
    """At F32 at least 99 of 100 drafts, of prompts longer than the window."""
    same, drafted, tokens = same_drafts(
        TorchTarget(folder / name / "target"), reference(*gguf_weights(files[name])), PROMPTS, answers[name]
    )
    print(f"{name}: {same} of {drafted} drafts, {tokens} different tokens")
    assert drafted > 3000 and tokens > 200 and same >= 0.99 * drafted, (same, drafted, tokens)


@pytest.mark.parametrize("name", PAIRS)
def test_texts_are_the_target_s_own(name: str, theirs: Path, folder: Path, answers: dict[str, Answers]) -> None:
    """T-50. Random weights come to ties, which tokens of one batch break otherwise than one token: one text may."""
    alone = ask(theirs / f"{name}-target-F32.gguf", folder / f"{name}-alone.log", *EXACT)
    target, parted = TorchTarget(folder / name / "target"), list[float]()
    for prompt, (ours, _), (plain, _) in zip(PROMPTS, answers[name], alone, strict=True):
        if ours != plain:
            at = next(i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b)
            parted.append(target.margin([*prompt, *plain[:at]]))
    print(f"{name}: {len(parted)} of {len(PROMPTS)} texts part, at margins {parted}")
    assert len(parted) <= 1 and all(margin < TIE for margin in parted), parted


# --- what a fault costs ---


@pytest.mark.parametrize(
    "change",
    [{"rope__freq_base_swa": 1e6}, {"attention__sliding_window": 8}],
    ids=["theta of sliding layers", "window"],
)
def test_a_fault_costs_drafts_and_never_the_text(
    change: dict[str, Any],
    theirs: Path,
    folder: Path,
    files: dict[str, Path],
    answers: dict[str, Answers],
    tmp_path: Path,
) -> None:
    """What llama.cpp takes without a word drafts otherwise than the checkpoint."""
    spoilt = rewritten(files["heads"], tmp_path / "spoilt.gguf", **change)
    target, log = theirs / "heads-target-F32.gguf", tmp_path / "spoilt.log"
    found = ask(target, log, "-md", str(spoilt), *DRAFTING, *EXACT, prompts=PROMPTS[:3])
    assert [text for text, _ in found] == [text for text, _ in answers["heads"][:3]]
    same, drafted, _ = same_drafts(
        TorchTarget(folder / "heads" / "target"), reference(*gguf_weights(files["heads"])), PROMPTS[:3], found
    )
    assert same < 0.9 * drafted, (same, drafted)


@pytest.mark.parametrize(
    ("drop", "change", "said"),
    [
        ("rope_freqs.weight", {}, "rope_freqs.weight"),
        ("", {"embedding_length_out": 64}, "embedding_length_out to carry the target hidden size"),
        ("", {"embedding_length_out": 128}, "nextn.post_projection.weight"),
        ("blk.1.layer_output_scale.weight", {}, "blk.1.layer_output_scale.weight"),
    ],
    ids=["factors", "own width", "another width", "scale"],
)
def test_what_does_not_load(
    drop: str, change: dict[str, Any], said: str, theirs: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    spoilt = rewritten(files["heads"], tmp_path / "spoilt.gguf", drop, **change)
    with (
        pytest.raises(AssertionError, match=said),
        llama_server(theirs / "heads-target-F32.gguf", "-md", str(spoilt), *DRAFTING, log=tmp_path / "spoilt.log"),
    ):
        raise RuntimeError("it came up")


def test_verify_names_a_lost_theta(folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Random drafts are never accepted, but they are others than the original's."""
    spoilt = rewritten(files["heads"], tmp_path / "spoilt.gguf", rope__freq_base_swa=1e6)
    source, target = folder / "heads" / "assistant", folder / "heads" / "target"
    shape = {
        "prompts": PROMPT_FILE,
        "max_prompts": 1,
        "new_tokens": 12,
        "contexts": (24,),
        "threads": 1,
        "diagnose": True,
    }
    found = verify(VerifyJob(spoilt, (target,), source=source, **shape))
    gates = {gate.name: gate.outcome for gate in found.gates}
    assert gates["structure"] is gates["same drafts"] is Outcome.FAIL and gates["lossless"] is Outcome.PASS
    assert found.diagnosis is not None and found.diagnosis.found is not None
    assert found.diagnosis.found.name == "sliding.theta: 1000000 -> 10000, as the source has it"


def test_verify_in_llama_cpp(folder: Path, theirs: Path, files: dict[str, Path]) -> None:
    shape = {"prompts": PROMPT_FILE, "max_prompts": 1, "new_tokens": 12, "contexts": (24,), "threads": 1}
    source, target = folder / "heads" / "assistant", theirs / "heads-target-F32.gguf"
    found = verify(VerifyJob(files["heads"], (target,), source=source, **shape))
    gates = {gate.name: gate.outcome for gate in found.gates}
    assert gates["structure"] is gates["pairing"] is gates["lossless"] is Outcome.PASS
