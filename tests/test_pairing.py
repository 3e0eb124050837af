"""Pairing: whose drafter a file is, told by shapes, vocabulary and what it notes; both sides are always named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted_faults import Draft
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, WrongInput, convert
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Gate, Outcome

Edit = Callable[[Draft], Any]
RUNTIMES = ("llama.cpp", "ik_llama.cpp", "lucebox")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairing")


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[..., Path]:
    def make(runtime: str = "llama.cpp") -> Path:
        out = folder / f"{runtime}.gguf"
        if not out.exists():
            convert(ConvertJob(PAIR / "drafter", PAIR / "target", runtime, "Q8_0", out))
        return out

    return make


@pytest.fixture(scope="module")
def target_gguf(folder: Path) -> Path:
    return write_target(PAIR / "target", folder / "target.gguf")


def target(out: Path, tokenizer: Callable[[dict[str, Any]], Any] = lambda raw: None, **config: Any) -> Path:
    """The pair's target without weights, its config and tokenizer changed."""
    folder = out / "target"
    folder.mkdir()
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(PAIR / "target" / name, folder / name)
    raw = json.loads((PAIR / "target" / "tokenizer.json").read_text())
    tokenizer(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    known = json.loads((PAIR / "target" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


def spoilt(made: Path, out: Path, edit: Edit) -> Path:
    draft = Draft.of(made)
    edit(draft)
    return draft.write(out / "spoilt.gguf")


def pairing(path: Path, target: Path) -> Gate:
    gates = doctor(path, target)
    assert [gate.name for gate in gates] == ["structure", "pairing"]
    return gates[1]


def faults(gate: Gate) -> list[str]:
    return [line for line in gate.details if not line.startswith("note: ")]


# --- the right pair ---


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_pair_in_every_dialect(made: Callable[..., Path], target_gguf: Path, runtime: str) -> None:
    """The target's folder and its GGUF say the same."""
    for path in (PAIR / "target", target_gguf):
        gate = pairing(made(runtime), path)
        assert (gate.outcome, gate.details) == (Outcome.PASS, ())
        assert gate.summary.endswith("6 layers, hidden size 256, 2048 tokens")


@pytest.mark.parametrize("runtime", ["llama.cpp", "ik_llama.cpp"])
def test_a_foreign_file_is_told_by_its_tokens(made: Callable[..., Path], tmp_path: Path, runtime: str) -> None:
    """Older files note no hash and no target; the tokenizer in them is as good as a hash."""
    gate = pairing(spoilt(made(runtime), tmp_path, forget), PAIR / "target")
    assert gate.outcome is Outcome.PASS
    assert gate.details == ("note: target: the file does not say which one it was made for",)


def forget(draft: Draft) -> None:
    for key in [key for key in draft.keys if key.startswith("drafter.")]:
        del draft.keys[key]


def test_what_cannot_be_compared_is_undecided(made: Callable[..., Path], tmp_path: Path) -> None:
    """A foreign Lucebox file has neither tokens nor a hash of them: silence would be a lie."""
    gate = pairing(spoilt(made("lucebox"), tmp_path, forget), PAIR / "target")
    assert gate.outcome is Outcome.UNDECIDED
    assert "vocabulary: not compared: the file has neither tokens nor their hash" in gate.details[0]


# --- shapes ---


def test_another_hidden_size(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = pairing(made(), target(tmp_path, hidden_size=320))
    assert gate.outcome is Outcome.FAIL
    assert any("target_hidden_size: the file has 256" in f and "has 320" in f for f in faults(gate))
    assert any("fc.weight: the file has 768 columns" in f and "3 capture layers * 320 = 960" in f for f in faults(gate))


def test_t61_a_target_of_fewer_layers(made: Callable[..., Path], tmp_path: Path) -> None:
    """T-61: capture layers 0, 2 and 4 of a target with four."""
    gate = pairing(spoilt(made(), tmp_path, forget), target(tmp_path, num_hidden_layers=4))
    assert gate.outcome is Outcome.FAIL
    assert "capture_layers: the file has layers 4, counted from 0 (dflash.target_layers)" in faults(gate)[0]
    assert "has 4 layers" in faults(gate)[0]


def test_another_depth_than_noted(made: Callable[..., Path], tmp_path: Path) -> None:
    """Deep enough for every capture layer, and another model all the same."""
    gate = pairing(made(), target(tmp_path, num_hidden_layers=8))
    assert gate.outcome is Outcome.FAIL
    assert "target_layer_count: the file has 6 (drafter.target.block_count), the target" in faults(gate)[0]


def test_another_vocabulary_size(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = pairing(made(), target(tmp_path, vocab_size=2304))
    assert gate.outcome is Outcome.FAIL
    assert any("vocab_size: the file has 2048" in f and "has 2304" in f for f in faults(gate))
    assert any("vocabulary: the file has 2048 tokens" in f for f in faults(gate))


def test_t53_a_mask_beyond_the_targets_embedding(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = pairing(spoilt(made(), tmp_path, lambda draft: draft.set("mask_token_id", 9999)), PAIR / "target")
    assert gate.outcome is Outcome.FAIL
    assert "mask_token_id: the file has 9999" in faults(gate)[0]


# --- vocabulary ---


def swapped_tokens(raw: dict[str, Any]) -> None:
    """Two ordinary tokens change places: same size, other ids."""
    vocab = raw["model"]["vocab"]
    one, other = [text for text, token_id in vocab.items() if token_id in (500, 501)]
    vocab[one], vocab[other] = vocab[other], vocab[one]


@pytest.mark.parametrize("runtime", ["llama.cpp", "ik_llama.cpp"])
def test_t61_other_tokens_are_counted(made: Callable[..., Path], tmp_path: Path, runtime: str) -> None:
    gate = pairing(made(runtime), target(tmp_path, swapped_tokens))
    assert gate.outcome is Outcome.FAIL
    (fault,) = faults(gate)
    assert fault.startswith("vocabulary: 2 of 2048 tokens differ, the first is 500: the file has '")
    assert "the target target '" in fault


def test_t61_other_tokens_by_hash_alone(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = pairing(made("lucebox"), target(tmp_path, swapped_tokens))
    assert gate.outcome is Outcome.FAIL
    (fault,) = faults(gate)
    recorded = str(read_gguf(made("lucebox")).keys["drafter.vocab.sha256"].value)
    assert f"the file notes {recorded[:12]}..., the target target has " in fault


def test_a_renamed_special_token_is_a_note(made: Callable[..., Path], tmp_path: Path) -> None:
    """Repackaged targets rename padding; a drafter is fed ids."""

    def edit(raw: dict[str, Any]) -> None:
        entry = next(t for t in raw["added_tokens"] if t["id"] == 2044)
        raw["model"]["vocab"].pop(entry["content"], None)
        entry["content"] = "<|renamed|>"

    folder = target(tmp_path, edit)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in [k for k, v in config.items() if k == "added_tokens_decoder" or k == "pad_token"]:
        del config[key]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    gate = pairing(made(), folder)
    assert gate.outcome is Outcome.PASS
    assert "1 of 2048 tokens differ, the first is 2044" in gate.details[0]
    assert gate.details[0].endswith("special tokens only, which a drafter does not read")


def test_a_tokenizer_that_cannot_be_read_is_undecided(made: Callable[..., Path], tmp_path: Path) -> None:
    folder = target(tmp_path)
    (folder / "tokenizer.json").unlink()
    gate = pairing(made(), folder)
    assert gate.outcome is Outcome.UNDECIDED
    assert "vocabulary: not compared: the target's tokenizer cannot be read" in gate.details[0]


# --- who it was made for ---


@pytest.mark.parametrize(
    ("noted", "there", "same"),
    [
        ("Qwen3.6-27B", "Qwen3.6-27B", True),
        ("Qwen3.6-27B", "Qwen3.6 27B Instruct", True),
        ("Qwen3.6-27B", "qwen3.6-27b-q4_k_m", True),
        ("Qwen3.5-27B", "Qwen3.6-27B", False),
        ("Qwen3-4B", "Qwen3.5-4B", False),
        ("Qwen3-4B", "Qwen3-14B", False),
    ],
)
def test_t61_the_name_it_was_made_for(
    made: Callable[..., Path], tmp_path: Path, noted: str, there: str, same: bool
) -> None:
    """Generations share vocabulary and shape; only the name tells them, and a name proves nothing."""
    path = spoilt(made(), tmp_path, lambda draft: draft.set("drafter.target.name", noted))
    gate = pairing(path, target(tmp_path, _name_or_path=there))
    assert gate.outcome is (Outcome.PASS if same else Outcome.UNDECIDED)
    if not same:
        assert repr(noted) in gate.details[0] and repr(there) in gate.details[0]


def test_another_architecture_than_noted(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = pairing(made(), target(tmp_path, architectures=["LlamaForCausalLM"]))
    assert gate.outcome is Outcome.FAIL
    (fault,) = faults(gate)
    assert "Qwen3ForCausalLM (drafter.target.architecture)" in fault and "LlamaForCausalLM" in fault


def test_revisions_of_one_repository(made: Callable[..., Path], tmp_path: Path) -> None:
    """Another revision of the same target is no fault: templates and cards change."""
    cache = tmp_path / "models--Qwen--Qwen3-Tiny" / "snapshots"
    for revision in ("a" * 40, "b" * 40):
        (cache / revision).mkdir(parents=True)
        for file in (PAIR / "target").iterdir():
            (cache / revision / file.name).symlink_to(file)
    convert(ConvertJob(PAIR / "drafter", cache / ("a" * 40), "llama.cpp", "Q8_0", tmp_path / "d.gguf"))
    assert pairing(tmp_path / "d.gguf", cache / ("a" * 40)).details == ()
    gate = pairing(tmp_path / "d.gguf", cache / ("b" * 40))
    assert gate.outcome is Outcome.PASS
    assert gate.details[0].startswith("note: revision: the file has aaaa")


# --- what the runtime does with such a target ---


def unnoted(draft: Draft) -> None:
    draft.keys.pop("drafter.target.architecture", None)


def test_a_target_that_hands_out_nothing(made: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp stops at an assertion for a target whose graph keeps its hidden states to itself."""
    path = spoilt(made(), tmp_path, unnoted)
    gate = pairing(path, target(tmp_path, architectures=["PhiForCausalLM"]))
    assert gate.outcome is Outcome.UNDECIDED
    assert "target architecture PhiForCausalLM: not known to hand out hidden states in llama.cpp" in gate.details[0]


def test_the_last_layer_is_captured(made: Callable[..., Path], tmp_path: Path) -> None:
    path = spoilt(made(), tmp_path, lambda draft: draft.set("dflash.target_layers", (1, 3, 6)))
    gate = pairing(path, PAIR / "target")
    assert gate.outcome is Outcome.FAIL
    assert "llama.cpp has no state after the last layer of Qwen3ForCausalLM" in faults(gate)[0]


def test_a_target_that_scales_its_embeddings(made: Callable[..., Path], tmp_path: Path) -> None:
    path = spoilt(made(), tmp_path, unnoted)
    gate = pairing(path, target(tmp_path, architectures=["Gemma4ForCausalLM"]))
    assert gate.outcome is Outcome.FAIL
    assert "embedding_scale: the file has none, the target target multiplies its embeddings by 16" in faults(gate)[0]


def test_a_target_with_mrope_is_a_note(made: Callable[..., Path], tmp_path: Path) -> None:
    rope = {"rope_theta": 1e7, "rope_type": "default", "mrope_section": [11, 11, 10]}
    gate = pairing(made(), target(tmp_path, rope_parameters=rope))
    assert gate.outcome is Outcome.PASS
    assert gate.details[0].startswith("note: M-RoPE: the file has no sections, the target target positions with M-RoPE")


# --- what is no target ---


def test_what_is_no_target(made: Callable[..., Path], tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, PAIR / "prompts.jsonl"):
        with pytest.raises(WrongInput):
            doctor(made(), path)


def test_a_file_that_cannot_be_read_is_not_paired(made: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(made().read_bytes()[:5000])
    gate = pairing(tmp_path / "cut.gguf", PAIR / "target")
    assert gate.outcome is Outcome.SKIPPED
