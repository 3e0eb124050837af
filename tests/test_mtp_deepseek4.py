"""The MTP head of DeepSeek-V4: hyper-connections, one key for all heads, experts in four bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_mtp_deepseek4 as maker
import numpy as np
import pytest
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from planted_faults import Draft, Edit
from published import published_config
from safetensors.numpy import load_file, save_file
from test_mtp import refusal

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS, objections
from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import (
    Compression,
    Experts,
    Indexer,
    Rope,
    RopeScaling,
    SharedKey,
    SlidingWindow,
    Streams,
    Trunk,
)
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.converters.verdict import Outcome

DEPTH, HIDDEN = 3, 64
LAYER = f"blk.{DEPTH}."
CELL = CELLS["mtp-deepseek4", "llama.cpp"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.published(tmp_path_factory.mktemp("deepseek4") / "target")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.plain(tmp_path_factory.mktemp("deepseek4-plain") / "target")


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return out


# --- the file ---


def test_the_file_says_what_head_and_target_are(source: Path, good: Path) -> None:
    """A5-1: what the loader asks of the target's own layers too, each list with an entry for the head."""
    file = read_gguf(good)
    keys = {key.removeprefix("deepseek4."): entry.value for key, entry in file.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["hash_layer_count"]) == (DEPTH + 1, 1, 1)
    assert (keys["hyper_connection.count"], keys["embedding_length_out"]) == (4, 4 * HIDDEN)
    assert keys["attention.compress_ratios"] == (0, 4, 128, 0)
    assert keys["swiglu_clamp_exp"] == keys["swiglu_clamp_shexp"] == (1.5,) * (DEPTH + 1)
    assert (keys["expert_gating_func"], keys["expert_shared_count"], keys["attention.head_count_kv"]) == (4, 1, 1)
    assert (keys["rope.freq_base"], keys["attention.compress_rope_freq_base"]) == (1e4, 16e4)
    assert "attention.sliding_window_pattern" not in keys and keys["attention.sliding_window"] == 64
    layer = f"blk.{DEPTH}."
    assert file.tensors[f"{layer}nextn.eh_proj.weight"].shape == (HIDDEN, 2 * HIDDEN)
    assert file.tensors[f"{layer}ffn_down_exps.weight"].shape == (8, HIDDEN, 32)
    assert file.tensors["output_hc_fn.weight"].shape == (4, 4 * HIDDEN)
    assert len(file.tensors) == 34 and inspect(good).kind == "mtp-deepseek4"
    (structure, pairing) = doctor(good, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


def test_both_projections_are_one_side_by_side(plain: Path, good: Path) -> None:
    parts = load_file(plain / "model.safetensors")
    both = np.concatenate([parts[f"mtp.0.{name}.weight"].astype(np.float32) for name in ("e_proj", "h_proj")], axis=1)
    found = read_gguf(good).tensor_bytes(f"blk.{DEPTH}.nextn.eh_proj.weight").view("<f4")
    np.testing.assert_array_equal(found, both.ravel())


def test_streams_are_made_one_by_the_head_s_own_weights(plain: Path, good: Path) -> None:
    """The target's have the same name in its own file, and are others."""
    parts, found = load_file(plain / "model.safetensors"), read_gguf(good).tensor_bytes("output_hc_fn.weight")
    np.testing.assert_array_equal(found.view("<f4"), parts["mtp.0.hc_head_fn"].ravel())
    assert (parts["mtp.0.hc_head_fn"] != parts["hc_head_fn"]).any()


def test_only_the_head_and_what_it_shares_is_read(plain: Path) -> None:
    names = read_published(plain).checkpoint.tensors
    assert {name for name in names if not name.startswith("mtp.")} == {"embed.weight", "head.weight", "norm.weight"}


def test_the_published_config_is_read(tmp_path: Path) -> None:
    """DeepSeek-V4-Flash: its facts, from its config as it is."""
    source = maker.plain(tmp_path / "t")
    (source / "config.json").write_text(json.dumps(published_config("deepseek-ai__DeepSeek-V4-Flash")))
    published = read_published(source)
    spec, yarn = published.spec, RopeScaling("yarn", 16.0, 65536)
    assert (spec.kind, spec.layers, spec.head_count, spec.head_dim) == ("mtp-deepseek4", range(43, 44), 64, 512)
    assert (spec.kv_head_count, spec.window) == (1, SlidingWindow(128, (True,)))
    assert (spec.shared_key, spec.streams) == (SharedKey(1024, 8, 1024), Streams(4, iterations=20, epsilon=1e-6))
    assert spec.compression == Compression((0, 0, *(4, 128) * 20, 4), 160000.0, yarn)
    assert spec.experts == Experts(256, 6, 2048, "sqrtsoftplus", True, 1.5, limit=10.0)
    assert (spec.rope, spec.indexer, spec.trunk) == (
        Rope(1e4, 64),
        Indexer(64, 128, 512),
        Trunk(hash_layer_count=3),
    )
    assert published.reader.unread() == [] and published.reader.warnings == []
    assert published.reader.origins["compression.scaling.factor"] == "rope_scaling.factor"
    assert objections(CELL, spec) == []
    assert "found shape [48, 64], expected [512, 4096] (head_dim, hidden)" in refusal(planned, source)


# --- facts ---

REQUIRED = {
    "num_hidden_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "head_count",
    "num_key_value_heads": "kv_head_count",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "moe_intermediate_size": "feed_forward_size",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "rope_theta": "rope theta",
    "qk_rope_head_dim": "rope.dimensions",
    "sliding_window": "window.size",
    "q_lora_rank": "shared_key.query_rank",
    "o_groups": "shared_key.output_groups",
    "o_lora_rank": "shared_key.output_rank",
    "hc_mult": "streams.count",
    "hc_sinkhorn_iters": "streams.iterations",
    "hc_eps": "streams.epsilon",
    "n_routed_experts": "experts.count",
    "num_experts_per_tok": "experts.used",
    "n_shared_experts": "experts.shared_feed_forward_size",
    "scoring_func": "experts.scoring",
    "norm_topk_prob": "experts.normed",
    "routed_scaling_factor": "experts.scale",
    "swiglu_limit": "experts.limit",
    "index_n_heads": "indexer.head_count",
    "index_head_dim": "indexer.head_dim",
    "index_topk": "indexer.top_k",
    "compress_ratios": "compression.ratios",
    "compress_rope_theta": "compression.theta",
    "num_hash_layers": "trunk.hash_layer_count",
}


@pytest.mark.parametrize("key", REQUIRED)
def test_a_fact_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    said = refusal(planned, reconfigure(maker.plain(tmp_path / "t"), **{key: DELETE}))
    assert f"{REQUIRED[key]}: missing" in said and key in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func: found 'sigmoid', expected 'sqrtsoftplus'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: found 4, expected 1: all heads share a key"),
        ({"hc_mult": 2}, "streams.count: llama.cpp's graph mixes 4 streams"),
        ({"hc_mult": 0}, "hc_mult: found 0, expected at least 2 streams"),
        ({"hc_eps": -1e-6}, "hc_eps: found -1e-06, expected a number above 0"),
        ({"swiglu_limit": 0}, "swiglu_limit: found 0.0, expected a number above 0"),
        ({"o_groups": 3}, "o_groups: found 3, expected a divisor of head_count 4"),
        ({"num_hash_layers": 4}, "num_hash_layers: found 4, expected at most the target's depth 3"),
        ({"compress_ratios": [0, 4, 128]}, "found 3 entries that end in [4, 128], expected 4: one for each layer"),
        ({"compress_ratios": [0, 4, 128, 4]}, "found 4 entries that end in [128, 4], expected 4"),
        ({"compress_ratios": [0, 4, 64, 0]}, "compress_ratios: found [64], expected none but 0, 4, 128"),
        ({"compress_rope_theta": 0}, "compress_rope_theta: found 0.0, expected a finite number above 0"),
        ({"rope_scaling__type": "linear"}, "found 'linear', expected default, yarn"),
        ({"rope_scaling__factor": DELETE}, "rope.scaling.factor: missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True, expected False"),
        ({"attention_bias": True}, "attention_bias: found True, expected False"),
        ({"n_group": 2}, "n_group: found 2, expected 1"),
        ({"topk_method": "greedy"}, "topk_method: found 'greedy', expected 'noaux_tc'"),
        ({"sliding_window": 0}, "sliding_window: found 0, expected a number of tokens above 0"),
    ],
    ids=str,
)
def test_a_fact_that_is_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(planned, reconfigure(maker.plain(tmp_path / "t"), **change))


def test_a_target_whose_context_is_not_stretched_is_taken(tmp_path: Path) -> None:
    spec = planned(maker.plain(tmp_path / "t", rope_scaling=None)).published.spec
    assert spec.compression == Compression((0, 4, 128), 160000.0)


# --- tensors ---


def test_the_head_is_counted_by_tensors_and_by_the_config(tmp_path: Path) -> None:
    """A5-2, both ways."""
    gone = without(maker.plain(tmp_path / "gone"), "mtp.")
    assert "num_nextn_predict_layers: 1, but there is no tensor of an MTP head" in refusal(planned, gone)
    unsaid = reconfigure(maker.plain(tmp_path / "unsaid"), num_nextn_predict_layers=DELETE)
    assert "--set num_nextn_predict_layers=1" in refusal(planned, unsaid)
    more = maker.plain(tmp_path / "more", num_nextn_predict_layers=3, compress_ratios=[0, 4, 128, 0, 0, 0])
    said = refusal(planned, reconfigure(more, num_nextn_predict_layers=1))
    assert "num_nextn_predict_layers: 1, but the tensors are mtp.0, mtp.1, mtp.2, expected as many layers" in said
    said = refusal(planned, reconfigure(without(more, "mtp.2."), num_nextn_predict_layers=3))
    assert "num_nextn_predict_layers: 3, but the tensors are mtp.0, mtp.1" in said
    two = maker.plain(tmp_path / "two", num_nextn_predict_layers=2, compress_ratios=[0, 4, 128, 0, 0])
    assert "layer_count: llama.cpp drafts with a head of one layer" in refusal(planned, two)


def respelled(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("mtp.0.h_proj", "mtp.0.h_proj.weight: missing, expected beside mtp.0.e_proj.weight"),
        ("mtp.0.e_proj", "mtp.0.e_proj.weight: missing, expected beside mtp.0.h_proj.weight"),
        ("mtp.0.hc_head_fn", "mtp.0.hc_head_fn: missing (STREAMS_OUT)"),
        ("mtp.0.hc_ffn_scale", "mtp.0.hc_ffn_scale: missing (FFN_STREAMS_SCALE of layer 3)"),
        ("mtp.0.attn.attn_sink", "mtp.0.attn.attn_sink: missing (ATTN_SINKS of layer 3)"),
        ("mtp.0.ffn.gate.bias", "mtp.0.ffn.gate.bias: missing (FFN_ROUTER_BIAS of layer 3)"),
        ("mtp.0.ffn.experts.5.w2", "mtp.0.ffn.experts.w2.weight: expert 5 and 0 more are absent"),
        ("mtp.0.norm", "mtp.0.norm.weight: missing (NEXTN_OUTPUT_NORM of layer 3)"),
        ("head.", "head.weight: missing (OUTPUT)"),
    ],
)
def test_a_part_that_is_absent_is_named(tmp_path: Path, gone: str, said: str) -> None:
    assert said in refusal(planned, without(maker.plain(tmp_path / "t"), gone))


def test_projections_that_are_not_alike_are_named(tmp_path: Path) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        tensors["mtp.0.h_proj.weight"] = tensors["mtp.0.h_proj.weight"][:, :32].copy()

    said = refusal(planned, respelled(maker.plain(tmp_path / "t"), cut))
    assert "mtp.0.h_proj.weight: found BF16 [64, 32], expected BF16 [64, 64] as mtp.0.e_proj.weight" in said


def test_what_chooses_experts_for_images_is_left_out(tmp_path: Path) -> None:
    """The vision variant; llama.cpp's graph of the head takes tokens alone."""
    bias = {"mtp.0.ffn.gate.bias_vl": np.zeros(8, np.float32)}
    conversion = planned(respelled(maker.plain(tmp_path / "t"), lambda tensors: tensors.update(bias)))
    assert [drop.source for drop in conversion.plan.dropped] == ["mtp.0.ffn.gate.bias_vl"]


def test_dspark_in_a_target_is_another_matter(tmp_path: Path) -> None:
    stage = {"mtp.0.main_proj.weight": np.zeros((64, 64), np.float32)}
    source = respelled(maker.plain(tmp_path / "t"), lambda tensors: tensors.update(stage))
    assert "those of DSpark inside DeepSeek-V4, which is not converted yet" in refusal(planned, source)


def test_a_head_cannot_go_into_its_target_s_file(source: Path, tmp_path: Path) -> None:
    """llama.cpp reads one output_hc_* for both: with the target's, one draft in thirteen of this one is another."""
    with pytest.raises(WrongUsage, match=r"a mtp-deepseek4 drafter stays beside its target: .*output_hc_\*"):
        prepare_attach(job(source, tmp_path / "out.gguf", attach=tmp_path / "trunk.gguf"))


# --- as it is stored ---


@pytest.mark.parametrize("recipe", ["F32", "Q8_0", "Q4_K_M"])
def test_a_head_converts_like_its_weights(source: Path, plain: Path, recipe: str, tmp_path: Path) -> None:
    """8-bit and 4-bit floats with powers of two are BF16 numbers; `meant` in the fixture is another way to them."""
    halved = maker.halved(tmp_path / "halved")
    files: list[GGUFFile] = []
    for i, folder in enumerate((plain, source, halved)):
        convert(job(folder, tmp_path / f"{i}.gguf", recipe=recipe))
        files.append(read_gguf(tmp_path / f"{i}.gguf"))
    first, *others = files
    for file in others:
        assert file.tensors == first.tensors
        assert all((file.tensor_bytes(name) == first.tensor_bytes(name)).all() for name in first.tensors)


def test_four_bits_stay_what_they_are_as_mxfp4(good: Path, source: Path, tmp_path: Path) -> None:
    """A block's scale may be another power of two; no weight is another number."""
    convert(job(source, tmp_path / "out.gguf", recipe="MXFP4_MOE"))
    draft, exact = Draft.of(tmp_path / "out.gguf"), Draft.of(good)
    for part in ("gate", "up", "down"):
        name = f"blk.{DEPTH}.ffn_{part}_exps.weight"
        assert draft.tensors[name][0].type.name == "MXFP4"
        np.testing.assert_array_equal(draft.weights(name), exact.weights(name))


def test_the_mixing_of_streams_is_kept_in_a_drafter_s_recipe(plain: Path) -> None:
    """At 8 bits, or at what the user says of all of it."""
    mixing = {f"{LAYER}hc_attn_fn.weight", f"{LAYER}hc_ffn_fn.weight", "output_hc_fn.weight"}

    def types(**options: Any) -> set[str]:
        tensors = planned(plain, **options).plan.tensors
        return {tensor.choice.type.name for tensor in tensors if tensor.name in mixing}

    assert types(recipe="Q4_K_M") == {"Q4_K"} and types(recipe="Q4_K_M-drafter") == {"Q8_0"}
    assert types(recipe="Q4_K_M", options=TypeOptions(tensor_types=(("hc_", "F32"),))) == {"F32"}


def spoiled(folder: Path, name: str, start: int, new: bytes) -> Path:
    """Change bytes of one tensor's entry in the file's header, to others of the same length."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    at = data.index(b'"%s"' % name.encode()) + start
    path.write_bytes(data[:at] + new + data[at + len(new) :])
    return folder


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """DeepSeek's own name for a scale is said beside the usual one."""
    name = "mtp.0.e_proj.scale"
    lost = spoiled(maker.published(tmp_path / "lost"), name, 1, b"mtp.0.e_proj.scalE")
    said = refusal(planned, lost)
    assert "mtp.0.e_proj.weight (F8_E4M3): missing mtp.0.e_proj.weight_scale_inv or mtp.0.e_proj.scale, its" in said
    expert = "mtp.0.ffn.experts.3.w1.scale"
    lost = spoiled(maker.published(tmp_path / "expert"), expert, 1, expert.replace("scale", "scalE").encode())
    assert "mtp.0.ffn.experts.3.w1.weight (I8): missing mtp.0.ffn.experts.3.w1.weight_scale" in refusal(planned, lost)


def test_four_bits_without_powers_of_two_are_refused(tmp_path: Path) -> None:
    source = reconfigure(maker.published(tmp_path / "t"), quantization_config__scale_fmt=DELETE)
    assert "experts.0.w1.weight_scale_inv (F8_E8M0): I8 mtp.0.ffn.experts.0.w1.weight has no such part" in refusal(
        planned, source
    )


# --- planted faults ---


def exchanged(draft: Draft) -> None:
    """State and embedding the other way round."""
    name = f"{LAYER}nextn.eh_proj.weight"
    embedding, state = np.split(draft.weights(name), 2, axis=1)
    draft.put(name, np.concatenate([state, embedding], axis=1))


def of_the_target(draft: Draft) -> None:
    """What makes one state of the target's streams."""
    draft.put("output_hc_base.weight", draft.weights("output_hc_base.weight") + 1)


FAULTS: dict[str, tuple[Edit, str]] = {
    "state first": (exchanged, f"{LAYER}nextn.eh_proj.weight (F32): "),
    "the target's collapse": (of_the_target, "output_hc_base.weight (F32): "),
    "gate for up": (
        lambda draft: draft.swap(f"{LAYER}ffn_gate_exps.weight", f"{LAYER}ffn_up_exps.weight"),
        f"{LAYER}ffn_gate_exps.weight (F32): ",
    ),
    "streams around the wrong part": (
        lambda draft: draft.swap(f"{LAYER}hc_attn_fn.weight", f"{LAYER}hc_ffn_fn.weight"),
        f"{LAYER}hc_attn_fn.weight (F32): ",
    ),
    "no sinks": (lambda draft: draft.tensors.pop(f"{LAYER}attn_sinks.weight"), f"{LAYER}attn_sinks.weight: missing"),
    "a head that is compressed": (
        lambda draft: draft.set("compress_ratios", (0, 4, 128, 4)),
        "compress_ratios: found [4] for the head, expected 0",
    ),
    "ratios of another target": (lambda draft: draft.set("compress_ratios", (0, 4, 4, 0)), "compress_ratios"),
    "no limit": (lambda draft: draft.drop("swiglu_clamp_exp"), "swiglu_clamp_exp"),
    "limits that differ": (
        lambda draft: draft.set("swiglu_clamp_exp", (1.5, 1.5, 1.5, 7.0)),
        "swiglu_clamp: found [1.5, 7.0], expected one number for all layers",
    ),
    "another scoring": (lambda draft: draft.set("expert_gating_func", 2), "expert_gating_func"),
    "wide states of three streams": (
        lambda draft: draft.set("embedding_length_out", 3 * HIDDEN),
        "embedding_length_out: found 3, but another key says streams.count = 4",
    ),
    "the compressed layers' theta": (lambda draft: draft.set("rope.freq_base", 160000.0), "rope.freq_base"),
    "a wider window": (lambda draft: draft.set("attention.sliding_window", 128), "attention.sliding_window"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(source: Path, good: Path, tmp_path: Path, name: str) -> None:
    edit, says = FAULTS[name]
    draft = Draft.of(good)
    edit(draft)
    (gate, *_) = doctor(draft.write(tmp_path / "bad.gguf"), source, source)
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


def test_a_router_of_another_type_is_only_told(source: Path, good: Path, tmp_path: Path) -> None:
    """llama.cpp's own converter leaves this one in BF16, and its server runs it."""
    draft, name = Draft.of(good), f"{LAYER}ffn_gate_inp.weight"
    draft.put(name, draft.weights(name), "BF16")
    (gate, *_) = doctor(draft.write(tmp_path / "router.gguf"), source, source)
    assert gate.outcome is Outcome.PASS
    assert any(f"{name}: found BF16: rounded, a router may choose" in line for line in gate.details), gate.details


def test_every_tensor_has_a_role_of_its_own(plain: Path) -> None:
    """No tensor of a head is left over, and none is there twice."""
    conversion = planned(plain)
    roles = [tensor.key for tensor in conversion.plan.tensors]
    assert len(set(roles)) == len(roles) == 34 and conversion.plan.dropped == ()
    assert {Role.STREAMS_OUT, Role.STREAMS_OUT_BASE, Role.STREAMS_OUT_SCALE} <= {role for role, _ in roles}
