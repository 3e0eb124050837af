"""EAGLE-3: how its configs are read, what is refused by name, and how its tensors get into a file and back.

G-n are the config traps, T-n the traps of other converters.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import make
from planted_faults import Draft
from published import (
    CONFIGS,
    DELETE,
    FIXTURES,
    PAIR,
    changed,
    eagle3_shapes,
    published_config,
    random_tensors,
    scaled_down,
    tiny_target,
    write_checkpoint,
)
from safetensors.numpy import load_file

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.convert import Published, prepare, read_published
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.drafters.rope import llama3_factors
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.ops import COPY, INTERLEAVE_ROPE, INVERSE, PERMUTE_ROPE, then
from convert_drafter.converters.spec import Llama3Bands
from convert_drafter.converters.verdict import Outcome

EAGLE = FIXTURES / "pair-eagle3"
IDS, NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config.eagle_aux_hidden_state_layer_ids"
BY_HAND = {IDS: "[2, 18, 33]"}
NO_IDS, NO_THETA, NO_CONTEXT = "capture layers: missing", "rope theta: missing", "context_length: missing"
SPECFORGE = (
    "gemma3-1b-eagle3", "longcat-flash-eagle3", "phi4-eagle3", "qwen2-5-vl-7b-eagle3", "qwen2.5-0.5b-eagle3",
    "qwen2.5-vl-32b-eagle3", "qwen3-30B-A3B-eagle3", "qwen3-4b-eagle3", "qwen3-8b-eagle3",
    "qwen3-coder-30B-A3B-instruct-eagle3", "qwen3-coder-480B-A35B-instruct-eagle3", "qwen3-coder-next-eagle3",
    "qwen3-next-80b-a3b-eagle3", "qwen3.5-35b-a3b-eagle3", "qwq-32B-eagle3", "llama3-70B-ealge3",
)  # fmt: skip
ONLY_IDS = (*(f"SpecForge__{name}" for name in SPECFORGE), "TorchSpec__qwen3_8b_eagle3")
# What is asked for one after the other, and what the user answers.
ASKED: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    **dict.fromkeys(ONLY_IDS, ((NO_IDS,), BY_HAND)),
    "SpecForge__qwen3-235B-A22B-eagle3": ((), {}),
    "SpecForge__gpt-oss-120B-eagle3": ((NO_THETA,), {"rope_theta": "150000"}),
    "SpecForge__deepseek-v3-671b-eagle3": ((NO_THETA,), {"rope_theta": "10000"}),
    "SpecForge__ling-flash-2.0-eagle3": ((NO_IDS, NO_THETA), BY_HAND | {"rope_theta": "600000"}),
    "SpecForge__llama4-scout-17B-16E-eagle3": ((NO_IDS, NO_THETA), BY_HAND | {"rope_theta": "500000"}),
    "SafeAILab__EAGLE3-traineagle3-LLaMA3.1-8B": ((NO_IDS, NO_THETA), BY_HAND | {"rope_theta": "500000"}),
    "RedHatAI__Qwen3-8B-speculator.eagle3": ((NO_CONTEXT,), {"max_position_embeddings": "40960"}),
    "RedHatAI__gpt-oss-20b-speculator.eagle3": (
        (NO_IDS, NO_CONTEXT),
        BY_HAND | {"max_position_embeddings": "131072"},
    ),
}
REFUSED = {
    "SpecForge__qwen3-30B-A3B-eagle3.1": "fc_norm: found True, expected False; EAGLE-3.1",
    "unknown__Qwen3-235B-A22B-speculators-eagle3.1": "norm_output: found True, expected False; EAGLE-3.1",
    "SpecForge__deepseek-v2-lite-eagle3": "rope_scaling.mscale: a scaling parameter no runtime's",
    "TorchSpec__kimi_k25_eagle3": "rope_scaling.mscale: a scaling parameter no runtime's",
    "TorchSpec__kimi_k25_eagle3_mla": "Eagle3DeepseekV2ForCausalLM on eagle3 tensors",
    "TorchSpec__qwen3_8b_eagle3_mla": "Eagle3DeepseekV2ForCausalLM on eagle3 tensors",
}
CAPTURES = {
    "SpecForge__qwen3-235B-A22B-eagle3": (1, 46, 90),  # in eagle_config: outputs
    "SpecForge__gpt-oss-120B-eagle3": (1, 17, 33),
    "SpecForge__deepseek-v3-671b-eagle3": (1, 29, 57),
}


def checkpoint(folder: Path, config: dict[str, Any], extra: dict[str, tuple[int, ...]] | None = None) -> Path:
    flat = config | config.get("transformer_layer_config", {})
    return write_checkpoint(folder, config, random_tensors(eagle3_shapes(flat) | (extra or {})))


def published(tmp_path: Path, name: str, settings: dict[str, str] | None = None, **changes: Any) -> Published:
    config = scaled_down(changed(published_config(name), changes))
    flat = config | config.get("transformer_layer_config", {})
    target = tiny_target(tmp_path / "target", architectures=["Qwen3ForCausalLM"], hidden_size=flat["hidden_size"],
                         num_hidden_layers=94)  # fmt: skip
    return read_published(checkpoint(tmp_path / "drafter", config), target, settings)


# --- published configs ---


def test_every_published_config_is_here() -> None:
    found = {path.stem for path in CONFIGS.glob("*.json") if "eagle3" in path.stem or "ealge3" in path.stem}
    assert found == ASKED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", ASKED)
def test_what_a_config_lacks_is_asked_for_and_never_guessed(name: str, tmp_path: Path) -> None:
    """T-52, P-15: llama.cpp's converter writes a triple of its own where it finds no ids."""
    fragments, answers = ASKED[name]
    for n in range(len(fragments)):
        with pytest.raises(WrongInput) as caught:
            published(tmp_path / str(n), name, dict(list(answers.items())[:n]))
        assert fragments[n] in str(caught.value) and "--set" in str(caught.value)
    found = published(tmp_path / "all", name, answers)
    assert found.match().problems == []
    assert found.reader.unread() == [] and found.reader.warnings == []
    spec = found.spec
    assert spec.capture_layers == CAPTURES.get(name, (1, 17, 32))
    assert (spec.causal, spec.window, spec.block_size, spec.draft_length) == (True, None, None, 3)
    assert spec.norm_before_residual is name.startswith("RedHat") and spec.norm_before_fc is ("gpt-oss-20b" in name)


@pytest.mark.parametrize("name", REFUSED)
def test_other_builds_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """G-27."""
    with pytest.raises(WrongInput) as caught:
        published(tmp_path, name, BY_HAND)
    assert REFUSED[name] in str(caught.value)


def test_llama_3_scaling_is_read_whole(tmp_path: Path) -> None:
    found = published(tmp_path, "SpecForge__llama3-70B-ealge3", BY_HAND)
    assert found.spec.rope.llama3 == Llama3Bands(8.0, 1.0, 4.0, 4096)
    assert "rope_factors" in {match.header.name for match in found.match().matches.values()}


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_llama_3_scaling_has_no_defaults(key: str, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=rf"rope_scaling\.{key}"):
        published(tmp_path, "SpecForge__llama3-70B-ealge3", BY_HAND, **{f"rope_scaling.{key}": DELETE})


def test_llama_3_factors_are_transformers() -> None:
    """The published numbers of Llama 3.1: the shortest wavelengths stay, the longest are 8 times as long."""
    factors = llama3_factors(500_000.0, 128, Llama3Bands(8.0, 1.0, 4.0, 8192))
    assert factors[:29] == (1.0,) * 29 and factors[-1] == 8.0
    assert list(factors) == sorted(factors) and len(factors) == 64
    wavelength = 2 * np.pi * 500_000 ** (62 / 128)
    kept = (8192 / wavelength - 1) / 3
    assert factors[31] == pytest.approx(1 / ((1 - kept) / 8 + kept)) and 1 < factors[31] < 8


# --- facts ---

BASE = "SpecForge__qwen3-235B-A22B-eagle3"


@pytest.mark.parametrize(
    ("changes", "captures", "origin"),
    [
        ({}, (1, 46, 90), NESTED),
        ({NESTED: DELETE, IDS: [2, 47, 91]}, (1, 46, 90), IDS),
        ({NESTED: DELETE, "aux_hidden_state_layer_ids": [91, 2, 47]}, (90, 1, 46), "aux_hidden_state_layer_ids"),
        ({IDS: [2, 47, 91]}, (1, 46, 90), IDS),
        ({NESTED: [], IDS: [2, 47, 91]}, (1, 46, 90), IDS),
        ({NESTED: [0, 46, 93]}, (0, 46, 93), NESTED),
    ],
    ids=["outputs", "states", "another name, unsorted", "both agree", "an empty list (ModelOpt)", "first and last"],
)
def test_capture_layers(changes: dict[str, Any], captures: tuple[int, ...], origin: str, tmp_path: Path) -> None:
    """6.2: state k is what goes into layer k, output k what comes out of it."""
    found = published(tmp_path, BASE, None, **changes)
    assert found.spec.capture_layers == captures and found.reader.origins["capture_layers"] == origin


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({IDS: [2, 46, 91]}, "two places disagree"),
        ({NESTED: DELETE, IDS: [0, 47, 91]}, "state 0 is the embedding's output"),
        ({NESTED: [1, 46, 90, 93]}, "found 4 ids, expected three; where fc reads three"),
        ({NESTED: [1, 46]}, "found 2 ids, expected three"),
        ({NESTED: [1, 46, 46]}, "each target layer once"),
        ({NESTED: [1, 46, 94]}, "below the target's depth 94"),
        ({NESTED: DELETE}, NO_IDS),
        ({"num_hidden_layers": 4}, "num_hidden_layers: found 4, expected 1: llama.cpp"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"eagle_config.norm_output": True}, "eagle_config.norm_output: found True"),
        ({"parallel_draft_step": 4}, "parallel_draft_step: found 4, expected 1; P-EAGLE"),
        ({"eagle_config.use_mtp_layernorm": True}, "use_mtp_layernorm: found True"),
        ({"norm_before_fc": True, "eagle_config.norm_before_fc": False}, "two places disagree"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "found 'ntk', expected default, linear or yarn or ll"),
    ],
)
def test_what_contradicts_or_is_another_model_is_refused(
    changes: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    with pytest.raises(WrongInput) as caught:
        published(tmp_path, BASE, None, **changes)
    assert fragment in str(caught.value)


def test_the_user_settles_the_capture_layers(tmp_path: Path) -> None:
    found = published(tmp_path, BASE, {IDS: "[3, 48, 92]"})
    assert found.spec.capture_layers == (2, 47, 91)
    assert found.reader.origins["capture_layers"] == f"--set {IDS}"


def test_speculators_have_to_say_what_vllm_and_llama_cpp_take_differently(tmp_path: Path) -> None:
    name, settings = "RedHatAI__Qwen3-8B-speculator.eagle3", {"max_position_embeddings": "40960"}
    assert (
        published(tmp_path / "1", name, settings).reader.origins["rope.theta"] == "transformer_layer_config.rope_theta"
    )
    with pytest.raises(WrongInput, match="norm_before_residual: missing"):
        published(tmp_path / "2", name, settings, norm_before_residual=DELETE)


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("midlayer.self_attn.kv_b_proj.weight", "multi-head latent attention"),
        ("layers.0.self_attn.kv_a_proj_with_mqa.weight", "multi-head latent attention"),
        ("midlayer.mlp.experts.0.up_proj.weight", "a mixture of experts"),
        ("midlayer.self_attn.q_norm.weight", "norms of queries and keys"),
        ("fc_norm.0.weight", "EAGLE-3.1's norm"),
        ("mask_hidden", "P-EAGLE"),
    ],
)
def test_tensors_of_another_build_are_refused_by_name(extra: str, what: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "drafter", scaled_down(published_config(BASE)), {extra: (4,)})
    with pytest.raises(WrongInput) as caught:
        read_published(source, None, {"num_target_layers": "94"})
    assert what in str(caught.value)


def prepared(tmp_path: Path, changes: dict[str, Any], *without: str, extra: tuple[str, ...] = ()) -> Any:
    config = scaled_down(changed(published_config(BASE), changes))
    shapes = {name: shape for name, shape in eagle3_shapes(config).items() if name not in without}
    shapes |= dict.fromkeys(extra, (32,))
    source = write_checkpoint(tmp_path / "drafter", config, random_tensors(shapes))
    target = tiny_target(tmp_path / "target", architectures=["Qwen3ForCausalLM"], hidden_size=96, num_hidden_layers=94)
    return prepare(ConvertJob(source, target, "llama.cpp", "F32", tmp_path / "out.gguf"))


SLIDES = {"layer_types": ["sliding_attention"], "sliding_window": 64, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("changes", "without", "extra", "fragment"),
    [
        (SLIDES, (), (), "window.size = 64: llama.cpp has no key for it"),
        ({"partial_rotary_factor": 0.5}, (), (), "rope.dimensions: rows are put in llama.cpp's order"),
        ({"norm_before_fc": True}, ("input_norm.weight",), (), "input_norm.weight: missing"),
        ({}, (), ("input_norm.weight",), "input_norm.weight: unknown tensor"),
        ({}, ("d2t",), (), "d2t: missing"),
        ({}, ("lm_head.weight",), (), "lm_head.weight: missing"),
        ({"attention_bias": True}, (), ("midlayer.self_attn.q_proj.bias",), "q_proj.bias"),
    ],
)
def test_what_llama_cpp_cannot_take_is_named(
    changes: dict[str, Any], without: tuple[str, ...], extra: tuple[str, ...], fragment: str, tmp_path: Path
) -> None:
    with pytest.raises(DrafterError) as caught:
        prepared(tmp_path, changes, *without, extra=extra)
    assert fragment in str(caught.value)


def test_a_table_of_another_width_than_the_target_s_has_to_be_there(tmp_path: Path) -> None:
    """Unlike DFlash, EAGLE-3 may be narrower than its target, with an embedding and a head of its own."""
    config = scaled_down(published_config(BASE)) | {"target_hidden_size": 64}
    shapes = eagle3_shapes(config)
    target = tiny_target(tmp_path / "t", architectures=["Qwen3ForCausalLM"], hidden_size=64, num_hidden_layers=94)
    spec = read_published(write_checkpoint(tmp_path / "d", config, random_tensors(shapes)), target).spec
    assert (spec.hidden_size, spec.target_hidden_size) == (96, 64)
    del shapes["embed_tokens.weight"]
    source = write_checkpoint(tmp_path / "e", config, random_tensors(shapes))
    with pytest.raises(WrongInput, match=r"embed_tokens\.weight: missing, and the hidden size 96 is not the"):
        read_published(source, target)


# --- tensors ---


def test_rows_are_interleaved_and_put_back() -> None:
    """As llama.cpp's own converter permutes them: per head (2, d / 2) turned into (d / 2, 2)."""
    rows = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of six
    there = INTERLEAVE_ROPE.apply(rows, 6, 0)
    assert [int(row[0]) // 3 for row in there] == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert (INVERSE[INTERLEAVE_ROPE].apply(there, 6, 0) == rows).all()
    assert then(COPY, INTERLEAVE_ROPE) is then(INTERLEAVE_ROPE, COPY) is INTERLEAVE_ROPE
    both = then(PERMUTE_ROPE, INTERLEAVE_ROPE)
    assert both.by_head and (both.apply(rows, 6, 0) == rows).all()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eagle3") / "drafter.gguf"
    convert(ConvertJob(EAGLE, PAIR / "target", "llama.cpp", "BF16", out))
    return out


def test_the_file_is_the_checkpoint(file: Path) -> None:
    structure, pairing = doctor(file, PAIR / "target", EAGLE)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ()) and pairing.outcome is Outcome.PASS
    assert read_drafter_file(file).spec == read_published(EAGLE, PAIR / "target").spec


def test_queries_and_keys_are_in_llama_cpp_s_order_and_d2t_holds_tokens(file: Path) -> None:
    """P-41, P-43: offsets and halves load as well, and nothing is accepted."""
    source, found = load_file(EAGLE / "model.safetensors"), read_gguf(file)
    config = json.loads((EAGLE / "config.json").read_text())
    for part in ("q", "k", "v"):
        rows = source[f"midlayer.self_attn.{part}_proj.weight"].view(np.uint16)
        halves = rows.reshape(-1, 2, config["head_dim"] // 2, rows.shape[1])
        expected = rows if part == "v" else halves.swapaxes(1, 2).reshape(rows.shape)
        stored = found.tensor_bytes(f"blk.0.attn_{part}.weight").view(np.uint16).reshape(rows.shape)
        assert (stored == expected).all()
    tokens = found.tensor_bytes("d2t").view("<i8")
    assert (tokens == source["d2t"] + np.arange(len(tokens))).all()
    assert (np.flatnonzero(source["t2d"]) == tokens).all()


def test_factors_of_zero_are_a_fault(tmp_path: Path) -> None:
    """Frequencies are divided by them."""
    out = tmp_path / "drafter.gguf"
    convert(ConvertJob(make("eagle3 with llama3 scaling", tmp_path / "e"), PAIR / "target", "llama.cpp", "F32", out))
    draft = Draft.of(out)
    draft.put("rope_freqs.weight", np.zeros_like(draft.weights("rope_freqs.weight")))
    gate = doctor(draft.write(tmp_path / "zeros.gguf"))[0]
    assert gate.outcome is Outcome.FAIL
    assert any("rope_freqs.weight: all 32 weights are zero: frequencies are divided" in line for line in gate.details)


def test_a_key_the_loader_needs_is_missed_whatever_tells_the_fact(file: Path, tmp_path: Path) -> None:
    draft = Draft.of(file)
    draft.drop("eagle3.target_hidden_size")
    gate = doctor(draft.write(tmp_path / "without.gguf"))[0]
    assert any("eagle3.target_hidden_size: missing" in line for line in gate.details)


def unpermuted(draft: Draft) -> None:
    rows = load_file(EAGLE / "model.safetensors")["midlayer.self_attn.k_proj.weight"]
    draft.put("blk.0.attn_k.weight", rows.astype(np.float32), "BF16")


def offsets(draft: Draft) -> None:
    draft.raw("d2t", draft.tensors["d2t"][0].type, load_file(EAGLE / "model.safetensors")["d2t"])


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        pytest.param(unpermuted, "its rows are in another order", id="k not permuted"),
        pytest.param(offsets, "are both token", id="d2t as offsets"),
        pytest.param(
            lambda d: d.set("eagle3.target_layers", (0, 2, 4)), "eagle3.target_layers", id="T-51 zero-based ids"
        ),
        pytest.param(lambda d: d.set("eagle3.target_layers", (2, 3, 5)), "eagle3.target_layers", id="wrong ids"),
        pytest.param(lambda d: d.set("eagle3.target_layers", (1, 3)), "exactly three", id="two ids"),
        pytest.param(lambda d: d.drop("eagle3.target_layers"), "eagle3.target_layers: missing", id="no ids"),
        pytest.param(lambda d: d.drop("rope.freq_base"), "10000 without a word", id="no theta"),
        pytest.param(
            lambda d: d.set("eagle3.norm_before_residual", True), "norm_before_residual", id="another residual"
        ),
        pytest.param(lambda d: d.tensors.pop("d2t"), "d2t", id="P-41 no d2t"),
        pytest.param(
            lambda d: d.set("eagle3.target_hidden_size", 512), "token_embd.weight: missing", id="no table that fits"
        ),
        pytest.param(lambda d: d.set("eagle3.block_count", 2), "eagle3.block_count", id="two layers"),
    ],
)
def test_planted_faults_are_found(edit: Any, fragment: str, file: Path, tmp_path: Path) -> None:
    draft = Draft.of(file)
    edit(draft)
    structure, _ = doctor(draft.write(tmp_path / "spoilt.gguf"), PAIR / "target", EAGLE)
    assert structure.outcome is Outcome.FAIL
    assert fragment in "\n".join((structure.summary, *structure.details))


def test_another_file_s_llama_3_factors_are_compared(tmp_path: Path) -> None:
    """The scaling is a tensor in a file: a checkpoint of other bands is another drafter."""
    bands = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    bands |= {"original_max_position_embeddings": 1024}
    settings = {"rope_scaling": json.dumps(bands)}
    out = tmp_path / "scaled.gguf"
    convert(ConvertJob(EAGLE, PAIR / "target", "llama.cpp", "F32", out, settings=settings))
    stored = read_gguf(out).tensor_bytes("rope_freqs.weight").view("<f4")
    expected = llama3_factors(500_000.0, 64, Llama3Bands(8.0, 1.0, 4.0, 1024))
    assert (stored == np.array(expected, np.float32)).all() and stored[0] == 1 and stored[-1] == 8
    spec = read_drafter_file(out).spec
    assert spec == replace(read_published(EAGLE, PAIR / "target").spec, rope=spec.rope) and spec.rope.scaling is None
    structure, _ = doctor(out, PAIR / "target", EAGLE)
    assert structure.outcome is not Outcome.FAIL  # as it was set, and noted
    plain = tmp_path / "plain.gguf"
    convert(ConvertJob(EAGLE, PAIR / "target", "llama.cpp", "F32", plain))
    lost = doctor(plain, PAIR / "target", EAGLE, settings=settings)[0]
    assert lost.outcome is Outcome.FAIL and any("rope_factors" in line for line in lost.details)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        prepared(tmp_path, SLIDES, "norm.weight", "midlayer.hidden_norm.weight", extra=("moon.weight",))
    for fragment in ("norm.weight: missing", "layers.0.hidden_norm.weight: missing", "moon.weight", "window.size"):
        assert fragment in str(caught.value)
