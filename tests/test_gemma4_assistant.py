"""Gemma-4 assistants read from their checkpoints: every fact, each refusal, every tensor's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_gemma4_assistant
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from published import DELETE, changed, published_config
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import ConvertJob, QuantizeJob, convert, doctor, inspect, quantize
from convert_drafter.converters.convert import prepare, read_published
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.launch.files import source_of_way
from convert_drafter.converters.launch.launching import LaunchJob, launch
from convert_drafter.converters.spec import Rope, SlidingLayers, SlidingWindow
from convert_drafter.converters.target import CachedLayer, read_target
from convert_drafter.converters.verdict import Outcome

FULL, SLIDING = (f"text_config.rope_parameters.{name}_attention" for name in ("full", "sliding"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma4_assistant.target(tmp_path_factory.mktemp("gemma") / "target")


def spoiled(folder: Path, **changes: Any) -> Path:
    """An assistant with other facts in its config, by dotted paths given with `__` for the dots."""
    return with_facts(make_gemma4_assistant.assistant(folder / "assistant"), changes)


def with_facts(made: Path, changes: dict[str, Any]) -> Path:
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
    # its four layers are run for every token, so they say nothing of a draft's length (common/speculative.cpp: the
    # memory is the target's, so that heads are not chained)
    way = source_of_way(CELLS["gemma4-assistant", "llama.cpp"], spec, source)
    assert spec.layer_count == 4 and (spec.draft_length, way.limit, way.usual, way.head) == (3, None, 3, False)


def test_launching_an_assistant(target: Path, tmp_path: Path) -> None:
    """A model of its own: `auto` takes it whatever its target's size; vLLM is given it, SGLang documents no way."""
    made = make_gemma4_assistant.assistant(tmp_path / "assistant")
    out = convert(job(made, target, tmp_path / "a.gguf")).out
    decided = launch(LaunchJob(out, target, device="gpu", draft_length=6))
    assert (decided.resolved.ways, decided.resolved.draft_length, decided.drafter) == (("mtp",), 6, out)
    vllm = launch(LaunchJob(made, target, engine="vllm"))
    said = {"method": "mtp", "model": str(made), "num_speculative_tokens": 1}
    assert json.loads(vllm.words[-1]) == said and vllm.drafter == made
    with pytest.raises(WrongUsage, match="sglang documents nothing of gemma4-assistant drafters"):
        launch(LaunchJob(made, target, engine="sglang"))
    assert "NGRAM" in launch(LaunchJob(made, target, engine="sglang", mode="ngram")).words


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


# --- a file, and what can be wrong with it ---


def rewritten(file: Path, out: Path, drop: str = "", **values: Any) -> Path:
    """The file without a tensor, or with other values under keys of its architecture; None takes a key away."""
    source = read_gguf(file)
    keys = dict(source.keys)
    for name, value in values.items():
        key = f"{keys['general.architecture'].value}.{name.replace('__', '.')}"
        keys[key] = replace(keys[key], value=value)
        if value is None:
            del keys[key]
    kept = [tensor for tensor in source.tensors.values() if tensor.name != drop]
    write_gguf(out, list(keys.values()), kept, lambda tensor: source.slabs(tensor.name))
    return out


@pytest.fixture(scope="module")
def file(target: Path) -> Path:
    out = target.parent / "assistant.gguf"
    convert(job(make_gemma4_assistant.assistant(target.parent / "assistant"), target, out))
    return out


def findings(file: Path, target: Path, with_source: bool = True) -> str:
    source = target.parent / "assistant" if with_source else None
    bad = [gate for gate in doctor(file, target, source) if gate.outcome is Outcome.FAIL]
    return "\n".join(line for gate in bad for line in gate.details)


def test_a_sound_file_has_no_findings(file: Path, target: Path, tmp_path: Path) -> None:
    assert findings(file, target) == ""
    small = tmp_path / "small.gguf"
    quantize(QuantizeJob(file, small, "Q4_K_M-drafter", allow_requantize=True))
    assert findings(small, target) == ""
    inspection = inspect(file)
    assert inspection.kind == "gemma4-assistant" and inspection.runtimes == {"llama.cpp": ""}


@pytest.mark.parametrize(
    ("drop", "change", "said"),
    [
        ("", {"rope__freq_base_swa": None}, "freq_base_swa: missing, expected sliding.theta; llama.cpp takes 10000"),
        ("", {"rope__freq_base": None}, "rope.freq_base: missing, expected rope.theta; llama.cpp takes 10000"),
        ("", {"rope__dimension_count_swa": None}, "rope.dimension_count_swa: missing, expected sliding.dimensions"),
        ("", {"attention__sliding_window": None}, "attention.sliding_window: missing, expected window.size"),
        ("", {"attention__sliding_window_pattern": None}, "attention.sliding_window_pattern: missing"),
        ("", {"attention__key_length_swa": None}, "attention.key_length_swa: missing"),
        ("", {"embedding_length_out": None}, "embedding_length_out: missing, expected target_hidden_size"),
        ("", {"embedding_length_out": 64}, "target_hidden_size: llama.cpp takes an assistant that is as wide"),
        ("", {"embedding_length_out": 128}, "nextn.post_projection.weight: found shape [96, 64], expected [128, 64]"),
        ("", {"attention__key_length_swa": 16}, "length_swa: found 32, but another key says sliding.head_dim = 16"),
        ("", {"attention__shared_kv_layers": 2}, "shared_kv_layers: found 2, but another key says layer_count = 3"),
        ("rope_freqs.weight", {}, "rope_freqs.weight: missing (ROPE_FACTORS)"),
        ("blk.1.layer_output_scale.weight", {}, "blk.1.layer_output_scale.weight: missing (LAYER_SCALE of layer 1)"),
        ("nextn.pre_projection.weight", {}, "nextn.pre_projection.weight: missing (NEXTN_PRE_PROJ)"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else next(iter(value), "dropped"),
)  # fmt: skip
def test_faults_that_the_file_shows(
    drop: str, change: dict[str, Any], said: str, file: Path, target: Path, tmp_path: Path
) -> None:
    assert said in findings(rewritten(file, tmp_path / "spoilt.gguf", drop, **change), target, with_source=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope__freq_base_swa": 1e6}, "rope.freq_base_swa: found 1000000.0, the checkpoint has 10000.0"),
        ({"rope__freq_base": 1e4}, "rope.freq_base: found 10000.0, the checkpoint has 1000000.0"),
        ({"attention__sliding_window": 8}, "attention.sliding_window: found 8, the checkpoint has 48"),
        ({"attention__head_count_kv": (1, 1, 1)}, "head_count_kv: found (1, 1, 1), the checkpoint has (2, 2, 1)"),
        ({"rope__dimension_count_swa": 16}, "rope.dimension_count_swa: found 16, the checkpoint has 32"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_faults_that_the_checkpoint_shows(
    change: dict[str, Any], said: str, file: Path, target: Path, tmp_path: Path
) -> None:
    assert said in findings(rewritten(file, tmp_path / "spoilt.gguf", **change), target)


def test_factors_that_turn_whole_heads_are_found(file: Path, target: Path, tmp_path: Path) -> None:
    source, out = read_gguf(file), tmp_path / "spoilt.gguf"

    def data(tensor: Any) -> Any:
        whole = tensor.name == "rope_freqs.weight"
        return [np.ones(32, np.float32)] if whole else source.slabs(tensor.name)

    write_gguf(out, list(source.keys.values()), list(source.tensors.values()), data)
    assert "rope_freqs.weight (F32): 24 of 32 weights are not the checkpoint's" in findings(out, target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_dim": 16}, "head_dim of sliding layers: the drafter has 32, the target"),
        ({"global_head_dim": 32}, "head_dim of full layers: the drafter has 64, the target"),
        ({"num_key_value_heads": 4}, "kv_head_count of sliding layers: the drafter has 2, the target"),
        ({"num_global_key_value_heads": 2}, "kv_head_count of full layers: the drafter has 1, the target"),
        (
            {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["full_attention"] * 2},
            "ends with full and full layers, an assistant looks at sliding and full",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_a_target_whose_cache_is_another_one(
    change: dict[str, Any], said: str, file: Path, target: Path, tmp_path: Path
) -> None:
    """What llama.cpp never asks: it reads the target's memory with the assistant's widths."""
    other = make_gemma4_assistant.target(tmp_path / "target", **change)
    assert said in findings(file, other, with_source=False)
    with pytest.raises(Problems) as caught:
        prepare(job(target.parent / "assistant", other, tmp_path / "out.gguf"))
    assert said in str(caught.value)


ROPE = make_gemma4_assistant.text_config()["rope_parameters"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sliding_window": 64}, "window of sliding layers: the drafter has 48, the target"),
        (
            {"rope_parameters": {**ROPE, "sliding_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
            "theta of sliding layers: the drafter has 10000, the target",
        ),
        (
            {"rope_parameters": {**ROPE, "full_attention": {**ROPE["full_attention"], "rope_theta": 5e5}}},
            "theta of full layers: the drafter has 1000000, the target",
        ),
    ],
    ids=["window", "sliding theta", "full theta"],
)
def test_a_target_that_turns_or_sees_its_keys_otherwise_is_doubtful(
    change: dict[str, Any], said: str, file: Path, target: Path, tmp_path: Path
) -> None:
    other = make_gemma4_assistant.target(tmp_path / "target", **change)
    gate = next(gate for gate in doctor(file, other) if gate.name == "pairing")
    assert gate.outcome is Outcome.UNDECIDED and any(said in line for line in gate.details)
    warnings = prepare(job(target.parent / "assistant", other, tmp_path / "out.gguf")).warnings
    assert any(said in warning for warning in warnings)


def test_a_target_s_last_layers_are_read_alike_from_config_and_gguf(target: Path, tmp_path: Path) -> None:
    of_folder = read_target(target).last_layers
    assert of_folder == (CachedLayer(32, 2, 1e4, 48), CachedLayer(64, 1, 1e6, None))
    newer = json.loads((target / "config.json").read_text())
    del newer["global_head_dim"], newer["num_global_key_value_heads"]
    newer["per_layer_config"] = {"7": {"head_dim": 64, "num_key_value_heads": 1}}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    assert read_target(tmp_path).last_layers == of_folder
    u32, f32, array = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY
    slides = tuple(kind == "sliding_attention" for kind in newer["layer_types"])
    keys = [
        KeyValue("general.architecture", GGUFValueType.STRING, "gemma4"),
        KeyValue("gemma4.block_count", u32, 8),
        KeyValue("gemma4.embedding_length", u32, 96),
        KeyValue("gemma4.vocab_size", u32, 2048),
        KeyValue("gemma4.attention.sliding_window", u32, 48),
        KeyValue("gemma4.attention.sliding_window_pattern", array, slides, GGUFValueType.BOOL),
        KeyValue("gemma4.attention.key_length", u32, 64),
        KeyValue("gemma4.attention.key_length_swa", u32, 32),
        KeyValue("gemma4.attention.head_count_kv", array, tuple(2 - (not s) for s in slides), GGUFValueType.INT32),
        KeyValue("gemma4.rope.freq_base", f32, 1e6),
        KeyValue("gemma4.rope.freq_base_swa", f32, 1e4),
    ]
    norm = StoredTensor("output_norm.weight", (96,), GGMLQuantizationType.F32)
    write_gguf(tmp_path / "target.gguf", keys, [norm], lambda tensor: [np.ones(96, np.float32)])
    assert read_target(tmp_path / "target.gguf").last_layers == of_folder
