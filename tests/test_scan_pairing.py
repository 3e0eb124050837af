"""Which drafter `scan` gives to which target: what is recorded, then shapes and tokens, then names; or to none."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from published import (
    DELETE,
    PAIR,
    SMALL_VOCAB,
    dflash_shapes,
    eagle3_shapes,
    published_config,
    random_tensors,
    scaled_down,
    small_checkpoint,
    small_config,
    write_checkpoint,
)
from scan_tree import drafter_gguf, hub, small_folder, small_gguf
from target_gguf import write_target

from convert_drafter.converters import scan
from convert_drafter.converters.cli import main
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.scan.found import Artifact, Pair, Scan, What

SHAPES = {"hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 256}


def target(folder: Path, **config: Any) -> Path:
    """A target's folder with these numbers and a tensor of a first layer."""
    said = {"architectures": ["Qwen3ForCausalLM"], **SHAPES, **config}
    return small_folder(folder, said, ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"))


def pair_of(root: Path) -> Pair:
    """The one drafter's."""
    (pair,) = scan(root).pairs
    return pair


def drafter_of(found: Scan, runtime: str = "") -> Artifact:
    """The one drafter, or the one for a runtime."""
    (only,) = [
        each for each in found.artifacts if each.what is What.DRAFTER and (not runtime or each.runtime == runtime)
    ]
    return only


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


# --- what a drafter alone does not tell ---


def test_a_config_without_the_target_s_depth(tmp_path: Path) -> None:
    """Its capture layers still rule a target out; the one that is left tells the depth, and `convert` takes it."""
    small_checkpoint(tmp_path / "drafter", num_target_layers=DELETE)
    target(tmp_path / "Shallow", num_hidden_layers=3)
    found = scan(tmp_path)
    assert found.pairs[0].target is None and "target_layer_count: missing" in drafter_of(found).notes[0]
    target(tmp_path / "X")
    found = scan(tmp_path)
    (pair,) = found.pairs
    assert (name_of(pair), pair.basis) == ("X", "shapes")
    assert drafter_of(found) is pair.drafter and pair.drafter.shape.depth == 6
    (note,) = pair.drafter.notes
    assert note.endswith(f"`convert` needs --target {tmp_path / 'X'}")
    assert read_published(pair.drafter.path, tmp_path / "X").spec.target_layer_count == 6


def test_what_a_target_does_not_tell_either_is_still_said(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "drafter", num_target_layers=DELETE, rms_norm_eps=DELETE)
    target(tmp_path / "X")
    (pair,) = scan(tmp_path).pairs
    assert name_of(pair) == "X" and "refuses it as it is" in pair.drafter.notes[0]


def test_an_eagle3_without_capture_layers_in_its_config(tmp_path: Path) -> None:
    """It fuses three states, whatever its config lists, so fc tells the target's width."""
    config = scaled_down(published_config("SpecForge__qwen3-4b-eagle3"))
    write_checkpoint(tmp_path / "drafter", config, random_tensors(eagle3_shapes(config)))
    for name, width in (("X", 96), ("Wide", 128)):
        target(tmp_path / name, hidden_size=width, vocab_size=SMALL_VOCAB)
    (pair,) = scan(tmp_path).pairs
    assert (name_of(pair), pair.evidence) == ("X", ("hidden size 96", f"vocabulary {SMALL_VOCAB} tokens"))
    assert "capture layers: missing" in pair.drafter.notes[0]


def test_the_line_that_rewrites_a_dialect_has_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect without a tokenizer takes it of the target that was found; the line does what it says."""
    monkeypatch.chdir(tmp_path)
    drafter_gguf(Path("luce drafter.gguf"), "lucebox")
    assert "takes more than it says" in drafter_of(scan(Path())).notes[0]
    write_target(PAIR / "target", Path("target.gguf"))
    drafter = drafter_of(scan(Path()))
    assert drafter.notes == ("llama.cpp does not know its dialect, lucebox's (qwen35-dflash-draft)",)
    words = shlex.split(drafter.mend)
    assert words[:5] == ["convert-drafter", "redialect", "luce drafter.gguf", "--target", "target.gguf"]
    with pytest.raises(SystemExit) as exit_:
        main(words[1:])
    assert exit_.value.code == 0 and drafter_of(scan(Path()), "llama.cpp").faults == ()


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
