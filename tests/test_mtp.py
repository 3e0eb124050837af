"""MTP heads out of their target's checkpoint: what is read of it, how its layers are counted, what is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_mtp
import numpy as np
import pytest
from mtp_checkpoints import (
    DELETE,
    as_multimodal,
    job,
    mixture,
    part_experts,
    planned,
    qwen3_next,
    reconfigure,
    small,
    without,
)
from published import published_config
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import Problems, WrongInput, convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.verdict import Outcome

HEAD = 4  # the first layer after the small target's own
NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "nextn.enorm", "nextn.hnorm")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("mtp") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> GGUFFile:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return read_gguf(out)


def refusal(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args, **options)
    return str(caught.value)


# --- the file ---


def test_the_file_is_its_target_with_all_other_layers_missing(file: GGUFFile) -> None:
    """A5-1: keys of the whole target, the head behind its last layer, and what both share."""
    keys = {key.removeprefix("qwen35."): entry.value for key, entry in file.keys.items()}
    assert file.keys["general.architecture"].value == "qwen35"
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (HEAD + 1, 1)
    assert keys["attention.recurrent_layers"] == (True, True, True, False, False)
    assert keys["ssm.inner_size"] == 64 and keys["ssm.state_size"] == 16
    assert (keys["rope.dimension_count"], keys["rope.dimension_sections"]) == (16, (3, 3, 2, 0))
    shared = {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert {name for name in file.tensors if not name.startswith(f"blk.{HEAD}.")} == shared
    assert len(file.tensors) == len(shared) + 15
    assert len(file.keys["tokenizer.ggml.tokens"].value) == 2048  # type: ignore[arg-type]


def test_every_norm_is_the_checkpoint_s_plus_one(source: Path, file: GGUFFile) -> None:
    """P-42: Qwen3.5 publishes what a norm differs from one by; without the one the drafts are worth nothing."""
    tensors = load_file(source / "model.safetensors")
    names = {f"blk.{HEAD}.{name}.weight" for name in (*NORMS, "nextn.shared_head_norm")} | {"output_norm.weight"}
    stored = {name: file.tensor_bytes(name).view("<f4") for name in names}
    for ours, theirs in (
        (f"blk.{HEAD}.nextn.hnorm.weight", "mtp.pre_fc_norm_hidden.weight"),
        (f"blk.{HEAD}.attn_q_norm.weight", "mtp.layers.0.self_attn.q_norm.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ):
        np.testing.assert_array_equal(stored[ours], tensors[theirs].astype(np.float32) + 1)
    assert all(0.8 < array.mean() < 1.2 for array in stored.values())


def test_a_file_comes_back_as_it_was_published(source: Path, file: GGUFFile) -> None:
    published = read_published(source)
    assert inspect(file.path).kind == published.spec.kind == "mtp-qwen35"
    (structure, pairing) = doctor(file.path, source, source)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())
    assert pairing.outcome is Outcome.PASS


def test_a_tied_target_has_no_output_head(tmp_path: Path) -> None:
    """llama.cpp takes the embedding for it; a copy that some releases keep is left out and told."""
    source = small(tmp_path / "t", tie_word_embeddings=True)
    assert Role.OUTPUT not in {t.key[0] for t in planned(source).plan.tensors}
    both = reconfigure(small(tmp_path / "both"), tie_word_embeddings=True)
    conversion = planned(both)
    assert Role.OUTPUT not in {t.key[0] for t in conversion.plan.tensors}
    assert [drop.source for drop in conversion.plan.dropped] == ["lm_head.weight"]
    untied = without(small(tmp_path / "untied"), "lm_head")
    assert "lm_head.weight: missing (OUTPUT)" in refusal(planned, untied)


def test_a_multimodal_target_gives_the_same_tensors(tmp_path: Path, file: GGUFFile) -> None:
    """Facts in text_config, tensors under model.language_model., and no word of the vision model."""
    source = as_multimodal(small(tmp_path / "t", "model.language_model."))
    conversion = planned(source)
    assert conversion.warnings == ()
    assert conversion.published.reader.origins["layer_count"] == "text_config.mtp_num_hidden_layers"
    assert {t.name for t in conversion.plan.tensors} == set(file.tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_config__rope_parameters__rope_theta": DELETE}, "rope theta: missing (looked at"),
        ({"text_config__rope_parameters__mrope_section": DELETE}, "rope.sections: missing"),
        ({"text_config__rope_parameters__mrope_section": [4, 3]}, "half of 16 rotated dimensions"),
        (
            {"text_config__layer_types": DELETE, "text_config__full_attention_interval": DELETE},
            "linear_attention.layers: missing",
        ),
        ({"text_config__linear_conv_kernel_dim": None}, "--set text_config.linear_conv_kernel_dim=VALUE"),
        ({"tie_word_embeddings": True}, "text_config.tie_word_embeddings = False, tie_word_embeddings = True"),
        ({"text_config__mtp_use_dedicated_embeddings": True}, "text_config.mtp_use_dedicated_embeddings: found True"),
        ({"text_config__attention_bias": True}, "text_config.attention_bias: found True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    source = reconfigure(as_multimodal(small(tmp_path / "t")), **change)
    assert said in refusal(planned, source)


def test_the_partial_rotary_factor_has_no_default(tmp_path: Path) -> None:
    """G: llama.cpp's converter takes a quarter where the key is missing."""
    source = small(tmp_path / "t")
    reconfigure(source, partial_rotary_factor=DELETE, rope_parameters__partial_rotary_factor=DELETE)
    assert "rope.dimensions: missing" in refusal(planned, source)


def test_the_published_config_is_read(tmp_path: Path) -> None:
    """Qwen3.6-27B: its facts, from its config as it is."""
    source = as_multimodal(small(tmp_path / "t"))
    config = published_config("Qwen__Qwen3.6-27B")
    (source / "config.json").write_text(json.dumps(config))
    problems = refusal(planned, source)
    assert "model.embed_tokens.weight: found shape [2048, 64], expected [248320, 5120] (vocab, hidden)" in problems
    assert "q_proj.weight: found shape [256, 64], expected [12288, 5120] (queries and gates, hidden)" in problems
    spec = read_published(source).spec
    assert (spec.target_layer_count, spec.layer_count, spec.layers) == (64, 1, range(64, 65))
    assert (spec.rope.dimensions, spec.rope.sections) == (64, (11, 11, 10, 0))


# --- counting ---


def test_declared_but_absent(tmp_path: Path) -> None:
    """A5-2: fine-tunes and quantized copies keep the count of a head that they were saved without."""
    source = without(small(tmp_path / "t"), "mtp.")
    said = refusal(planned, source)
    assert "mtp_num_hidden_layers: 1, but there is no tensor of an MTP head" in said
    assert "use the original release" in said


@pytest.mark.parametrize("count", [DELETE, 0], ids=["no key", "0"])
def test_present_but_undeclared(tmp_path: Path, count: Any) -> None:
    """A5-2: the tensors decide, once the user agrees."""
    source = reconfigure(small(tmp_path / "t"), mtp_num_hidden_layers=count)
    said = refusal(planned, source)
    assert "mtp_num_hidden_layers: " in said and "1: the checkpoint has tensors of as many" in said
    assert "--set mtp_num_hidden_layers=1" in said
    assert planned(source, settings={"mtp_num_hidden_layers": "1"}).published.spec.layer_count == 1


def test_another_count_than_declared(tmp_path: Path) -> None:
    """A5-2, both ways."""
    source = reconfigure(small(tmp_path / "two"), mtp_num_hidden_layers=2)
    assert "mtp_num_hidden_layers: 2, but the tensors are mtp.layers.0, expected as many" in refusal(planned, source)
    source = reconfigure(small(tmp_path / "one", mtp_num_hidden_layers=2), mtp_num_hidden_layers=1)
    assert "1, but the tensors are mtp.layers.0, mtp.layers.1, expected as many" in refusal(planned, source)


@pytest.mark.parametrize("count", [2**40, 10**9])
def test_a_nonsense_count_is_refused_without_counting(tmp_path: Path, count: int) -> None:
    source = reconfigure(small(tmp_path / "t"), mtp_num_hidden_layers=count)
    assert f"mtp_num_hidden_layers: {count}, but the tensors are mtp.layers.0" in refusal(planned, source)


def test_a_head_of_two_layers_is_more_than_llama_cpp_runs(tmp_path: Path) -> None:
    source = small(tmp_path / "t", mtp_num_hidden_layers=2)
    assert "layer_count: llama.cpp drafts with a head of one layer" in refusal(planned, source)


def test_an_incomplete_head_is_named(tmp_path: Path) -> None:
    source = without(small(tmp_path / "t"), "mtp.fc", "mtp.layers.0.self_attn.k_norm")
    said = refusal(planned, source)
    assert "mtp.fc.weight: missing (NEXTN_PROJ of layer 4)" in said
    assert "mtp.layers.0.self_attn.k_norm.weight: missing (ATTN_K_NORM of layer 4)" in said


# --- what is read of a large checkpoint ---


def test_shards_without_a_part_of_the_head_need_not_be_there(tmp_path: Path, file: GGUFFile) -> None:
    """T-64: a head of a 54 GB target comes from the few shards that hold it and what it shares."""
    source = small(tmp_path / "t", shards=8)
    needed = {path.name for path in read_published(source).checkpoint.files}
    shards = sorted(source.glob("*.safetensors"))
    assert 0 < len(needed) < len(shards)
    for shard in shards:
        if shard.name not in needed:
            shard.unlink()
    out = tmp_path / "out.gguf"
    convert(job(source, out))
    found = read_gguf(out)
    assert found.tensors == file.tensors
    assert all((found.tensor_bytes(name) == file.tensor_bytes(name)).all() for name in found.tensors)


def test_the_trained_head_is_small_beside_its_target(tmp_path: Path) -> None:
    """The fixture itself: what train_mtp.py made, in the names and shapes of a checkpoint."""
    source = make_mtp.trained(tmp_path / "target")
    conversion = planned(source)
    assert (conversion.warnings, len(conversion.plan.tensors), conversion.plan.n_weights) == ((), 17, 1_508_992)
    assert len(conversion.published.checkpoint.others) == 80
    assert conversion.published.target_path == source
    shapes = make_mtp.shapes(make_mtp.text_config())
    tensors = load_file(source / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes


# --- a target that is not the checkpoint ---


def test_the_checkpoint_is_its_own_target(source: Path, tmp_path: Path) -> None:
    other = small(tmp_path / "other", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    said = refusal(planned, source, target=other)
    assert re.search(r"num_hidden_layers: found 4, expected 5, as the target other has", said)


def test_an_unknown_tensor_of_a_head_is_named(tmp_path: Path) -> None:
    path = small(tmp_path / "t") / "model.safetensors"
    save_file({**load_file(path), "mtp.surprise.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(Problems, match=r"mtp\.surprise\.weight: unknown tensor \[3\]"):
        planned(path.parent)


# --- mixtures of experts ---


def test_experts_are_one_tensor_each_projection(tmp_path: Path) -> None:
    """As transformers 5 writes them and as a tensor for each expert: the same file, byte for byte."""
    files = []
    for name, source in (
        ("fused", mixture(tmp_path / "fused")),
        ("parted", part_experts(mixture(tmp_path / "parted"))),
    ):
        convert(job(source, tmp_path / f"{name}.gguf", recipe="BF16"))
        files.append(read_gguf(tmp_path / f"{name}.gguf"))
    fused, parted = files
    assert fused.tensors == parted.tensors
    assert all((fused.tensor_bytes(name) == parted.tensor_bytes(name)).all() for name in fused.tensors)
    shapes = {name.removeprefix("blk.4.ffn_"): tensor.shape for name, tensor in fused.tensors.items()}
    assert shapes["gate_exps.weight"] == shapes["up_exps.weight"] == (8, 32, 64)
    assert shapes["down_exps.weight"] == (8, 64, 32) and shapes["gate_inp_shexp.weight"] == (1, 64)
    assert fused.tensors["blk.4.ffn_gate_inp.weight"].type.name == "F32"
    keys = {key.removeprefix("qwen35moe."): entry.value for key, entry in fused.keys.items()}
    assert (keys["expert_count"], keys["expert_used_count"]) == (8, 3)
    assert (keys["expert_feed_forward_length"], keys["expert_shared_feed_forward_length"]) == (32, 64)
    tensors = load_file(tmp_path / "fused" / "model.safetensors")
    both = tensors["mtp.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(fused.tensor_bytes("blk.4.ffn_up_exps.weight").view(both.dtype), both[:, 32:].ravel())


def test_an_absent_expert_is_named(tmp_path: Path) -> None:
    source = without(part_experts(mixture(tmp_path / "t")), "mtp.layers.0.mlp.experts.5.up_proj")
    assert "mtp.layers.0.mlp.experts.up_proj.weight: expert 5 and 0 more are absent" in refusal(planned, source)
    source = without(part_experts(mixture(tmp_path / "u")), "mtp.layers.0.mlp.experts.7.up_proj")
    assert "experts.up_proj.weight: found shape [7, 32, 64], expected [8, 32, 64]" in refusal(planned, source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts": DELETE}, "experts.count: missing"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: found 9, expected at most the 8 experts there are"),
        ({"norm_topk_prob": False}, "norm_topk_prob: found False"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers: found [1]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mixture_s_facts_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(planned, reconfigure(mixture(tmp_path / "t"), **change))


# --- Qwen3-Next ---


def test_an_older_config_says_less_and_is_enough(tmp_path: Path) -> None:
    """A5-2: no published Qwen3-Next counts its head, so the tensors alone do; its layers follow an interval."""
    source = qwen3_next(tmp_path / "t")
    conversion = planned(source)
    spec, reader = conversion.published.spec, conversion.published.reader
    assert (conversion.warnings, spec.kind, spec.layers) == ((), "mtp-qwen3next", range(4, 5))
    assert reader.origins["layer_count"] == "tensor names"
    assert (spec.rope.theta, spec.rope.dimensions, spec.rope.sections) == (1e7, 16, None)
    assert spec.linear_attention is not None
    assert spec.linear_attention.layers == (True, True, True, False)
    assert reader.origins["linear_attention.layers"] == "full_attention_interval"
    said = refusal(planned, reconfigure(source, full_attention_interval=DELETE))
    assert "linear_attention.layers: missing (looked at layer_types or full_attention_interval)" in said


def test_a_count_that_is_declared_has_to_agree_all_the_same(tmp_path: Path) -> None:
    source = reconfigure(qwen3_next(tmp_path / "t"), mtp_num_hidden_layers=2)
    assert "mtp_num_hidden_layers: 2, but the tensors are mtp.layers.0" in refusal(planned, source)
