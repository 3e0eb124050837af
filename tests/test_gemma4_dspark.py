"""DSpark of Gemma-4 layers read from its checkpoint: every fact, each refusal, every tensor's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_gemma4_dspark
import numpy as np
import pytest
from published import DELETE, changed, published_config
from safetensors.numpy import load_file, save_file
from test_gemma4_assistant import job, rewritten, with_facts

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.convert import prepare, read_published
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.spec import Rope, SlidingWindow
from convert_drafter.converters.verdict import Outcome

FULL = "rope_parameters.full_attention"
STAYS = float(np.float32(1e30))
PUBLISHED = "deepseek-ai__dspark_gemma4_12b_block7"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma4_dspark.target(tmp_path_factory.mktemp("gemma") / "target", hidden_size=64)


def spoiled(folder: Path, **changes: Any) -> Path:
    """A drafter with other facts in its config alone, by dotted paths given with `__` for the dots."""
    return with_facts(make_gemma4_dspark.dspark(folder / "drafter"), changes)


def test_facts(target: Path, tmp_path: Path) -> None:
    """G-2, G-12: theta beside a null one, and the heads of full layers."""
    published = read_published(spoiled(tmp_path), target)
    spec = published.spec
    assert (spec.kind, spec.layer_count, spec.hidden_size, spec.feed_forward_size) == ("gemma4-dspark", 2, 64, 128)
    assert (spec.head_count, spec.kv_head_count, spec.head_dim) == (4, 1, 64)
    assert spec.rope == Rope(1e6, 64, proportion=0.25)
    assert (spec.capture_layers, spec.target_layer_count, spec.target_hidden_size) == ((1, 4, 6), 8, 64)
    assert (spec.embedding_scale, spec.attention_scale, spec.activation) == (8.0, 1.0, "gelu_pytorch_tanh")
    assert (spec.block_size, spec.mask_token_id, spec.markov_rank) == (7, 2047, 32)
    assert spec.sample_from_anchor and spec.confidence_head and spec.draft_length == 7
    assert not spec.causal and spec.window is None and spec.logit_softcap is None
    assert not published.match().problems and not published.reader.unread() and not published.reader.warnings


def test_published_config(tmp_path: Path) -> None:
    """In its own widths but for the vocabulary and the feed-forward."""
    small = {"vocab_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config = changed(published_config(PUBLISHED), small)
    tensors = {name: np.zeros(shape, np.float16) for name, shape in make_gemma4_dspark.dspark_shapes(config).items()}
    source = make_gemma4_dspark.write(tmp_path, config, tensors)
    published = read_published(source, None)
    spec, matcher = published.spec, published.match()
    assert not matcher.problems and not published.reader.unread() and not published.reader.warnings
    assert (spec.hidden_size, spec.head_count, spec.kv_head_count, spec.head_dim) == (3840, 16, 1, 512)
    assert (spec.rope, spec.logit_softcap) == (Rope(1e6, 512, proportion=0.25), 30.0)
    assert spec.embedding_scale == 3840**0.5 and spec.capture_layers == (5, 17, 29, 41, 46)


REQUIRED = (
    "num_hidden_layers", "layer_types", "hidden_size", "global_head_dim", "num_global_key_value_heads",
    "intermediate_size", "num_attention_heads", "max_position_embeddings", "vocab_size", "rms_norm_eps", "block_size",
    "mask_token_id", "target_layer_ids", "hidden_activation", "attention_k_eq_v", "markov_rank",
    f"{FULL}.rope_theta", f"{FULL}.rope_type", f"{FULL}.partial_rotary_factor",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("value", [DELETE, None], ids=["missing", "null"])
def test_a_missing_fact_is_named(key: str, value: Any, target: Path, tmp_path: Path) -> None:
    """R1: llama.cpp's converter takes GELU, a quarter of the pairs and a theta of 1e6 for granted."""
    with pytest.raises(WrongInput) as caught:
        read_published(spoiled(tmp_path, **{key.replace(".", "__"): value}), target)
    assert "missing" in str(caught.value) and key in str(caught.value) and "--set" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_k_eq_v": False}, "attention_k_eq_v: found False, expected true: llama.cpp norms values only"),
        ({"hidden_activation": "silu"}, "hidden_activation: found 'silu'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types: found sliding_attention, full"),
        ({"layer_types": ["full_attention"]}, "layer_types: found 1 entries"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"enable_moe_block": True}, "enable_moe_block: found True"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input: found 256"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp: found True"),
        ({"draft_vocab_size": 512}, "draft_vocab_size: found 512"),
        ({"markov_head_type": "gated"}, "markov_head_type: found 'gated'"),
        ({"input_embedding_scale": 2.0}, "input_embedding_scale: found 2.0"),
        ({f"{FULL}.factor": 8.0}, "full_attention.factor: found 8.0"),
        ({f"{FULL}.rope_type": "yarn"}, "full_attention.rope_type: found 'yarn'"),
        ({f"{FULL}.rope_type": "default"}, "full_attention.partial_rotary_factor: found 0.25"),
        ({f"{FULL}.partial_rotary_factor": 1.5}, "full_attention.partial_rotary_factor: found 1.5"),
        ({"num_global_key_value_heads": 3}, "num_global_key_value_heads: found 3"),
        ({"dflash_config.use_swa": True}, "dflash_config.swa_window_size"),
        ({"use_sliding_window": True}, "use_sliding_window: found True"),
        ({"architectures": ["DSparkDraftModel"]}, "architectures: DSparkDraftModel on gemma4-dspark tensors"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(
    changes: dict[str, Any], said: str, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput) as caught:
        read_published(spoiled(tmp_path, **{key.replace(".", "__"): value for key, value in changes.items()}), target)
    assert said in str(caught.value)


def test_a_cap_is_carried_with_a_note(target: Path, tmp_path: Path) -> None:
    """llama.cpp's converter refuses it; here the file differs from one without it in that key alone."""
    made = {cap: prepare(job(spoiled(tmp_path / str(cap), final_logit_softcapping=cap), target, tmp_path / "out.gguf"))
            for cap in (30.0, 0.0)}  # fmt: skip
    own = [{(kv.key, kv.value) for kv in made[cap].keys if kv.key.startswith("dflash.")} for cap in made]
    assert own[0] - own[1] == {("dflash.final_logit_softcapping", 30.0)} and not own[1] - own[0]
    notes = [[note.text for note in c.cell.notes if note.concerns(c.published.spec)] for c in made.values()]
    assert len(notes[0]) == len(notes[1]) + 1 and "trained with capped logits" in notes[0][-1]


def test_other_spellings(target: Path, tmp_path: Path) -> None:
    """One rope for all layers; a window of the drafter's own, beside Gemma's which is dead."""
    changes = {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "dflash_config": {"use_swa": True, "swa_window_size": 24},
    }
    spec = read_published(spoiled(tmp_path, **changes), target).spec
    assert spec.rope == Rope(5e5, 64) and spec.window == SlidingWindow(24, (True, True))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("layers.0.self_attn.v_proj.weight", (64, 64), "v_proj.weight: unknown tensor"),
        ("layers.1.layer_scalar", None, "layers.1.layer_scalar: missing (LAYER_SCALE of layer 1)"),
        ("layers.0.post_feedforward_layernorm.weight", None, "missing (FFN_POST_NORM of layer 0)"),
        ("lm_head.weight", None, "lm_head.weight: missing (OUTPUT)"),
        ("embed_tokens.weight", None, "embed_tokens.weight: missing (TOKEN_EMBEDDING)"),
        ("markov_head.markov_w2.weight", None, "markov_head.markov_w2.weight: missing (MARKOV_OUT)"),
        ("layers.0.self_attn.k_proj.weight", (16, 64), "found shape [16, 64], expected [64, 64]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    name: str, shape: tuple[int, ...] | None, said: str, target: Path, tmp_path: Path
) -> None:
    source = make_gemma4_dspark.dspark(tmp_path / "drafter")
    tensors = load_file(source / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if shape is None else {name: np.zeros(shape, np.float32)}), source / "model.safetensors")
    with pytest.raises(Problems) as caught:
        prepare(job(source, target, tmp_path / "out.gguf"))
    assert said in str(caught.value)


def test_every_tensor_has_its_place(target: Path, tmp_path: Path) -> None:
    """And a tied embedding needs no head."""
    plan = prepare(job(make_gemma4_dspark.dspark(tmp_path / "whole"), target, tmp_path / "out.gguf")).plan
    assert len(plan.tensors) == 10 + 2 * 13 and not plan.dropped
    tied = make_gemma4_dspark.dspark(tmp_path / "tied", tie_word_embeddings=True)
    names = {tensor.name for tensor in prepare(job(tied, target, tmp_path / "out.gguf")).plan.tensors}
    assert "output.weight" not in names and len(names) == 9 + 2 * 13


# --- a file, and what can be wrong with it ---


@pytest.fixture(scope="module")
def file(target: Path) -> Path:
    out = target.parent / "drafter.gguf"
    convert(job(make_gemma4_dspark.dspark(target.parent / "drafter"), target, out, "Q8_0"))
    return out


def test_a_sound_file(file: Path, target: Path) -> None:
    """A quarter of 32 pairs turns."""
    assert read_gguf(file).tensor_bytes("rope_freqs.weight").view("<f4").tolist() == [1.0] * 8 + [STAYS] * 24
    found = inspect(file)
    assert found.kind == "gemma4-dspark" and found.runtimes == {"llama.cpp": ""}
    gates = doctor(file, target, target.parent / "drafter")
    assert [(gate.outcome, gate.details) for gate in gates] == [(Outcome.PASS, ())] * 2


@pytest.mark.parametrize(
    ("drop", "changes", "said"),
    [
        ("", {"attention__scale": None}, "dflash.attention.scale: missing, expected attention_scale; llama.cpp takes"),
        ("", {"hidden_activation": None}, "dflash.hidden_activation: missing, expected activation; llama.cpp takes"),
        ("", {"embedding_scale": None}, "dflash.embedding_scale: missing, expected embedding_scale; llama.cpp takes"),
        ("", {"attention__scale": 0.125}, "dflash.attention.scale: found 0.125"),
        ("", {"hidden_activation": "silu"}, "dflash.hidden_activation: found 'silu'"),
        ("", {"hidden_activation": "relu"}, "dflash.hidden_activation: found 'relu', expected one of gelu"),
        ("rope_freqs.weight", {}, "rope_factors: in the checkpoint, missing in the file (ROPE_FACTORS)"),
        ("blk.1.layer_output_scale.weight", {}, "blk.1.layer_output_scale.weight: missing (LAYER_SCALE of layer 1)"),
        ("blk.0.post_attention_norm.weight", {}, "blk.0.post_attention_norm.weight: missing"),
        ("markov_w1.weight", {}, "markov_w1.weight: missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(
    drop: str, changes: dict[str, Any], said: str, file: Path, target: Path, tmp_path: Path
) -> None:
    """Without these keys llama.cpp takes SiLU and other scales, without these tensors it leaves out a step."""
    spoilt = rewritten(file, tmp_path / "spoilt.gguf", drop, **changes)
    (structure, _) = doctor(spoilt, target, target.parent / "drafter")
    assert structure.outcome is Outcome.FAIL
    assert any(line.startswith(said) for line in structure.details), structure.details
