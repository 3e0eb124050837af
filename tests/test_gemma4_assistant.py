"""Gemma-4 assistants read from their checkpoints: every fact, each refusal, every tensor's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_gemma4_assistant
import numpy as np
import pytest
from published import DELETE, changed, published_config
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.convert import prepare, read_published
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.spec import Rope, SlidingLayers, SlidingWindow

FULL, SLIDING = (f"text_config.rope_parameters.{name}_attention" for name in ("full", "sliding"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma4_assistant.target(tmp_path_factory.mktemp("gemma") / "target")


def spoiled(folder: Path, **changes: Any) -> Path:
    """An assistant with other facts in its config, by dotted paths given with `__` for the dots."""
    made = make_gemma4_assistant.assistant(folder / "assistant")
    path = made / "config.json"
    spelled = {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(json.dumps(changed(json.loads(path.read_text()), spelled)))
    return made


def job(source: Path, target: Path, out: Path, recipe: str = "F32", **options: Any) -> ConvertJob:
    return ConvertJob(source, target, "llama.cpp", recipe, out, **options)


def test_facts(target: Path, tmp_path: Path) -> None:
    spec = read_published(spoiled(tmp_path), target).spec
    assert (spec.kind, spec.layer_count, spec.hidden_size, spec.feed_forward_size) == ("gemma4-assistant", 3, 64, 128)
    assert (spec.head_count, spec.head_dim, spec.kv_head_count, spec.kv_head_counts) == (4, 64, 1, (2, 2, 1))
    assert (spec.target_layer_count, spec.target_hidden_size, spec.vocab_size) == (8, 96, 2048)
    assert spec.rope == Rope(1e6, 64, proportion=0.25)
    assert spec.window == SlidingWindow(48, (True, True, False))
    assert spec.sliding == SlidingLayers(32, 1e4, 32)
    assert spec.causal and spec.logit_softcap is None and spec.draft_length == 3


def test_published_config(tmp_path: Path) -> None:
    """E2B's, in its own widths but a smaller vocabulary."""
    config = changed(published_config("google__gemma-4-E2B-it-assistant"), {"text_config.vocab_size": 64})
    tensors = make_gemma4_assistant.draw(make_gemma4_assistant.assistant_shapes(config), "E2B")
    source = make_gemma4_assistant.write(tmp_path, config, tensors)
    published = read_published(source, None, {"num_target_layers": "35"})
    spec, matcher = published.spec, published.match()
    assert not matcher.problems and not published.reader.unread() and not published.reader.warnings
    assert {drop.source for drop in matcher.dropped} == {
        "masked_embedding.centroids.weight",
        "masked_embedding.token_ordering",
    }
    assert (spec.head_dim, spec.sliding, spec.kv_head_count, spec.kv_head_counts) == (
        512,
        SlidingLayers(256, 1e4, 256),
        1,
        (),
    )
    assert (spec.window, spec.rope) == (SlidingWindow(512, (True,) * 3 + (False,)), Rope(1e6, 512, proportion=0.25))


def test_newer_configs_state_layers_one_by_one(target: Path, tmp_path: Path) -> None:
    """As transformers 5.23 writes them."""
    older = read_published(spoiled(tmp_path / "older"), target).spec
    own = {"2": {"head_dim": 64, "num_key_value_heads": 1}}
    gone = {"text_config__global_head_dim": DELETE, "text_config__num_global_key_value_heads": DELETE}
    newer = read_published(spoiled(tmp_path / "newer", **gone, text_config__per_layer_config=own), target)
    assert newer.spec == older and not newer.reader.unread()


@pytest.mark.parametrize(
    "path",
    [
        "backbone_hidden_size",
        f"{FULL}.rope_theta",
        f"{FULL}.rope_type",
        f"{FULL}.partial_rotary_factor",
        f"{SLIDING}.rope_theta",
        *(
            f"text_config.{key}"
            for key in (
                *("head_dim", "global_head_dim", "hidden_size", "intermediate_size", "layer_types", "vocab_size"),
                *("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps"),
                *("max_position_embeddings", "sliding_window"),
            )
        ),
    ],
)
@pytest.mark.parametrize("value", [DELETE, None], ids=["deleted", "null"])
def test_missing_facts_are_named(path: str, value: Any, target: Path, tmp_path: Path) -> None:
    """R1: none of them has a default here, and all but two have one in transformers."""
    source = spoiled(tmp_path, **{path: value})
    with pytest.raises(WrongInput, match=r"missing \(looked at ") as caught:
        read_published(source, target)
    assert path in str(caught.value) and "--set" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config__hidden_activation": "gelu"}, "hidden_activation: found 'gelu'"),
        ({"text_config__attention_bias": True}, "attention_bias: found True"),
        ({"text_config__enable_moe_block": True}, "enable_moe_block: found True"),
        ({"text_config__hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input: found 256"),
        ({"text_config__use_double_wide_mlp": True}, "use_double_wide_mlp: found True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: found False"),
        ({"text_config__num_kv_shared_layers": 2}, "num_kv_shared_layers: found 2, expected all 3 layers"),
        ({"text_config__use_bidirectional_attention": "all"}, "use_bidirectional_attention: found 'all'"),
        ({f"{FULL}.factor": 8.0}, "full_attention.factor: found 8.0"),
        ({f"{FULL}.rope_type": "default"}, "full_attention.rope_type: found 'default', expected 'proportional'"),
        ({f"{FULL}.partial_rotary_factor": 1.5}, "full_attention.partial_rotary_factor: found 1.5"),
        ({f"{SLIDING}.rope_type": "linear"}, "sliding_attention.rope_type: found 'linear'"),
        ({f"{SLIDING}.partial_rotary_factor": 0.5}, "sliding_attention.partial_rotary_factor: found 0.5"),
        ({f"{SLIDING}.rope_theta": 0}, "sliding_attention.rope_theta: found 0"),
        ({"text_config__layer_types": ["full_attention"] * 3}, "layer_types: found full_attention, full_attention"),
        ({"text_config__layer_types": ["sliding_attention"] * 3}, "the last one full"),
        ({"text_config__layer_types": ["sliding_attention", "full_attention"]}, "layer_types: found 2 entries"),
        ({"text_config__attention_k_eq_v": False}, "num_global_key_value_heads: found 1 without attention_k_eq_v"),
        ({"text_config__num_key_value_heads": 3}, "num_global_key_value_heads: found (3, 3, 1)"),
        ({"text_config__per_layer_config": {"0": {"head_dim": 16}}}, "per_layer_config.0.head_dim: found 16"),
        ({"text_config__per_layer_config": {"2": {"head_dim": 16}}}, "two places disagree"),
        ({"backbone_hidden_size": 128}, "backbone_hidden_size: found 128, expected 96, the hidden size of the target"),
        ({"architectures": ["Gemma4ForCausalLM"]}, "architectures: Gemma4ForCausalLM on gemma4-assistant tensors"),
    ],
    ids=lambda value: next(iter(value)).removeprefix("text_config__") if isinstance(value, dict) else "",
)
def test_what_no_runtime_computes_is_refused_by_name(
    changes: dict[str, Any], said: str, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput) as caught:
        read_published(spoiled(tmp_path, **changes), target)
    assert said in str(caught.value)


def test_an_assistant_as_wide_as_its_target_is_refused(tmp_path: Path) -> None:
    """llama.cpp takes the missing width of a target for its own."""
    wide = make_gemma4_assistant.target(tmp_path / "target", hidden_size=64)
    source = make_gemma4_assistant.assistant(tmp_path / "assistant", backbone=64)
    with pytest.raises(Problems, match=r"target_hidden_size: llama\.cpp takes an assistant that is as wide as its"):
        prepare(job(source, wide, tmp_path / "out.gguf"))


def test_every_tensor_has_its_place(target: Path, tmp_path: Path) -> None:
    source = make_gemma4_assistant.assistant(tmp_path / "assistant", ordered=True)
    conversion = prepare(job(source, target, tmp_path / "out.gguf"))
    assert len(conversion.plan.tensors) == 5 + 3 * 11
    reasons = {drop.source: drop.reason for drop in conversion.plan.dropped}
    assert set(reasons) == {"masked_embedding.centroids.weight", "masked_embedding.token_ordering"}
    assert all("llama.cpp looks among all" in reason for reason in reasons.values())
    shapes = {tensor.name: tensor.shape for tensor in conversion.plan.tensors}
    assert shapes["nextn.pre_projection.weight"] == (64, 192) and shapes["nextn.post_projection.weight"] == (96, 64)
    assert shapes["blk.0.attn_q.weight"] == (128, 64) and shapes["blk.2.attn_q.weight"] == (256, 64)


def test_factors_of_pairs_are_made_of_the_proportion(target: Path, tmp_path: Path) -> None:
    """A quarter of 32 pairs turns; the others' frequencies are divided by 1e30."""
    out = tmp_path / "out.gguf"
    convert(job(spoiled(tmp_path), target, out, "Q8_0"))
    factors = read_gguf(out).tensor_bytes("rope_freqs.weight").view("<f4")
    assert factors.tolist() == [1.0] * 8 + [float(np.float32(1e30))] * 24


def renamed(change: Callable[[dict[str, np.ndarray]], None], folder: Path) -> Path:
    source = make_gemma4_assistant.assistant(folder)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    return source


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("keys", {"model.layers.0.self_attn.k_proj.weight": (64, 64)}, "0.self_attn.k_proj.weight: unknown tensor"),
        ("head", {"lm_head.weight": (2048, 64)}, "lm_head.weight: unknown tensor"),
        ("no scalar", {"model.layers.1.layer_scalar": None}, "layers.1.layer_scalar: missing (LAYER_SCALE of layer 1)"),
        ("no projection", {"post_projection.weight": None}, "post_projection.weight: missing (NEXTN_POST_PROJ)"),
        ("full as sliding", {"model.layers.2.self_attn.q_norm.weight": (32,)}, "found shape [32], expected [64]"),
        ("sliding as full", {"model.layers.0.self_attn.q_norm.weight": (64,)}, "found shape [64], expected [32]"),
        ("backbone", {"pre_projection.weight": (64, 256)}, "found shape [64, 256], expected [64, 192]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    name: str, change: dict[str, tuple[int, ...] | None], said: str, target: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for place, shape in change.items():
            if shape is None:
                del tensors[place]
            else:
                tensors[place] = np.zeros(shape, np.float32)

    with pytest.raises(DrafterError) as caught:
        prepare(job(renamed(spoil, tmp_path / "assistant"), target, tmp_path / "out.gguf"))
    assert said in str(caught.value)
