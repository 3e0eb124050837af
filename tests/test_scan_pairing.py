"""Which drafter `scan` gives to which target: what is recorded, then shapes and tokens, then names; or to none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from published import PAIR, dflash_shapes, small_checkpoint, small_config
from scan_tree import drafter_gguf, hub, small_folder, small_gguf
from target_gguf import write_target

from convert_drafter.converters import scan
from convert_drafter.converters.scan.found import Pair

SHAPES = {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 256}


def target(folder: Path, **config: Any) -> Path:
    """A target's folder with these numbers and a tensor of a first layer."""
    said = {"architectures": ["Qwen3ForCausalLM"], **SHAPES, **config}
    return small_folder(folder, said, ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"))


def pair_of(root: Path) -> Pair:
    """The one drafter's."""
    (pair,) = scan(root).pairs
    return pair


def name_of(pair: Pair) -> str | None:
    return None if pair.target is None else pair.target.name


# --- how many candidates (T-48) ---


def test_no_target(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "X-DFlash")
    pair = pair_of(tmp_path)
    assert (pair.target, pair.basis, pair.candidates) == (None, "", ())


def test_one_target_that_fits(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "drafter")
    target(tmp_path / "X")
    target(tmp_path / "Wide", hidden_size=128)
    target(tmp_path / "Deep", num_hidden_layers=7)
    target(tmp_path / "Wordy", vocab_size=300)
    pair = pair_of(tmp_path)
    assert (name_of(pair), pair.basis) == ("X", "shapes")
    assert pair.evidence == ("hidden size 64", "layers 6", "vocabulary 256 tokens")


def test_two_targets_that_fit(tmp_path: Path) -> None:
    """Neither is stated; both are shown."""
    small_checkpoint(tmp_path / "drafter")
    for name in ("X", "Y"):
        target(tmp_path / name)
    pair = pair_of(tmp_path)
    assert pair.target is None and "2 targets fit" in pair.evidence[0]
    assert [each.target.name for each in pair.candidates] == ["X", "Y"]


def test_names_choose_among_targets_that_fit(tmp_path: Path) -> None:
    """The longest name that is a part of the drafter's."""
    small_checkpoint(tmp_path / "Qwen3-4B-Instruct-DFlash-b16")
    for name in ("Qwen3-4B", "Qwen3-4B-Instruct", "Qwen3-8B", "Qwen3-4B-Instruct-Coder"):
        target(tmp_path / name)
    pair = pair_of(tmp_path)
    assert (name_of(pair), pair.basis) == ("Qwen3-4B-Instruct", "shapes")


def test_quants_of_one_target_are_one(tmp_path: Path) -> None:
    drafter_gguf(tmp_path / "d" / "dflash-m-BF16.gguf")
    for name in ("m-F32.gguf", "m-unfused.gguf"):
        write_target(PAIR / "target", tmp_path / name)
    pair = pair_of(tmp_path)
    assert pair.target is not None and len(pair.target.variants) == 2


# --- what rules a target out ---


def test_the_wrong_generation(tmp_path: Path) -> None:
    """T-61: layers are captured that the target does not have, or its name says another generation."""
    small_checkpoint(tmp_path / "Qwen3-4B-DFlash")
    target(tmp_path / "Qwen3.5-4B")
    pair = pair_of(tmp_path)
    assert pair.target is None and "name is of another model" in pair.evidence[0]
    assert [each.target.name for each in pair.candidates] == ["Qwen3.5-4B"]
    config = tmp_path / "Qwen3.5-4B" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    assert pair_of(tmp_path).target is None and not pair_of(tmp_path).candidates[0].fits[2:]


def test_other_tokens(tmp_path: Path) -> None:
    """T-61: equal shapes and another vocabulary are told by the tokens' hash, of a GGUF and of a folder."""
    other = tmp_path / "other"
    shutil.copytree(PAIR / "target", other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))
    assert path.read_text() != (PAIR / "target" / "tokenizer.json").read_text()
    drafter_gguf(tmp_path / "drafter.gguf")
    pair = pair_of(tmp_path)
    assert pair.target is None and [each.against for each in pair.candidates] == [("other tokens",)]
    write_target(PAIR / "target", tmp_path / "same.gguf")
    pair = pair_of(tmp_path)
    assert name_of(pair) == "same" and pair.evidence[-1] == "the same tokens"


# --- what is recorded ---


def test_the_recorded_repository_goes_before_everything(tmp_path: Path) -> None:
    snapshot = hub(tmp_path / "hub", "Qwen/Qwen3-Tiny", PAIR / "target")
    hub(tmp_path / "hub", "someone/Qwen3-Tiny-Tuned", PAIR / "target", "a" * 40)
    config = tmp_path / "hub" / "models--someone--Qwen3-Tiny-Tuned" / "snapshots" / ("a" * 40) / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text)  # a release of its own, of the same shapes and tokens
    drafter_gguf(tmp_path / "Qwen3-Tiny-Tuned-DFlash.gguf", target=snapshot)
    pair = pair_of(tmp_path)
    assert (name_of(pair), pair.basis) == ("Qwen3-Tiny", "recorded")
    assert "made for Qwen/Qwen3-Tiny" in pair.evidence[0] and "the same tokens" in pair.evidence


def test_a_recorded_target_that_is_not_here(tmp_path: Path) -> None:
    """Another that fits is told, and not taken for it."""
    snapshot = hub(tmp_path / "elsewhere", "Qwen/Qwen3-Tiny", PAIR / "target")
    drafter_gguf(tmp_path / "here" / "Qwen3.5-Tiny-DFlash.gguf", target=snapshot)
    write_target(PAIR / "target", tmp_path / "here" / "Qwen3.5-Tiny.gguf")
    pair = pair_of(tmp_path / "here")
    assert pair.target is None and "made for Qwen/Qwen3-Tiny, which is not here" in pair.evidence[0]
    assert [each.target.name for each in pair.candidates] == ["Qwen3.5-Tiny"]


def test_a_recorded_target_that_does_not_fit(tmp_path: Path) -> None:
    config = small_config()
    config |= {"speculators_config": {"verifier": {"name_or_path": "Qwen/Qwen3-Tiny"}}}
    small_folder(tmp_path / "d", config, tuple(dflash_shapes(config)))
    target(tmp_path / "Qwen3-Tiny", hidden_size=128, num_hidden_layers=3)
    pair = pair_of(tmp_path)
    assert pair.target is None and "does not fit" in pair.evidence[0]
    assert "layers 6, the target 3" in pair.candidates[0].against


def test_speculators_record_their_verifier(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "d", speculators_config={"verifier": {"name_or_path": "/models/Qwen3-Tiny"}})
    target(tmp_path / "Qwen3-Tiny")
    target(tmp_path / "Qwen3-Tiny-Other")
    pair = pair_of(tmp_path)
    assert (name_of(pair), pair.basis) == ("Qwen3-Tiny", "recorded")


# --- names alone ---


def test_a_name_alone(tmp_path: Path) -> None:
    """Where no shape is known."""
    small_gguf(tmp_path / "Qwen3-Tiny-DSpark.gguf", "dspark")
    for name in ("Qwen3-Tiny", "Qwen3-Small"):
        small_gguf(tmp_path / f"{name}.gguf")
    pair = pair_of(tmp_path)
    assert (name_of(pair), pair.basis, pair.evidence) == ("Qwen3-Tiny", "name", ("named after Qwen3-Tiny",))


def test_a_name_of_two(tmp_path: Path) -> None:
    small_gguf(tmp_path / "Qwen3-Tiny-DSpark.gguf", "dspark")
    for width in (32, 64):
        small_gguf(tmp_path / str(width) / "Qwen3-Tiny.gguf", arch__embedding_length=width, arch__block_count=1)
    pair = pair_of(tmp_path)
    assert pair.target is None and pair.evidence == ("2 targets have its name: which is it?",)


@pytest.mark.parametrize("name", ["mtp-Qwen3-Tiny-Q8_0", "Qwen3-Tiny-MTP", "dflash-Qwen3-Tiny-BF16"])
def test_both_conventions_of_names(tmp_path: Path, name: str) -> None:
    """A0-7, D0: the role word before or behind."""
    small_gguf(tmp_path / f"{name}.gguf", "dspark")
    small_gguf(tmp_path / "Qwen3-Tiny-Q4_K_M.gguf")
    assert name_of(pair_of(tmp_path)) == "Qwen3-Tiny"
