"""MTP heads with latent attention: what is read of the checkpoint, its one matrix of keys and values, the cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_latent
import numpy as np
import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from hypothesis import strategies as st
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from planted_faults import Draft, Edit
from published import FIXTURES, published_config, write_checkpoint
from quantized_sources import tensors_of
from safetensors.numpy import load_file
from test_mtp import refusal
from test_quantized import BY_NAME

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS, Cell, objections, read, write
from convert_drafter.converters.drafters import KINDS, mtp_latent
from convert_drafter.converters.errors import BadFact
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.spec import (
    DrafterSpec,
    Experts,
    Indexer,
    LatentAttention,
    Rope,
    RopeScaling,
    Trunk,
    spec_from,
)
from convert_drafter.converters.verdict import Outcome

DEPTH, HEADS, PLAIN, TURNED, VALUE, STATE = 3, 4, 32, 24, 48, 96
MAKERS: dict[str, Callable[..., Path]] = {
    "mtp-deepseek2": make_mtp_latent.flash,
    "mtp-glm-dsa": make_mtp_latent.dsa,
    "mtp-deepseek32": make_mtp_latent.v32,
}
by_kind = pytest.mark.parametrize("kind", MAKERS)
LAYER = f"model.layers.{DEPTH}."
KEYS, VALUES = f"blk.{DEPTH}.attn_k_b.weight", f"blk.{DEPTH}.attn_v_b.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latent")
    return {kind: make(folder / kind) for kind, make in MAKERS.items()}


def test_every_family_is_here() -> None:
    assert list(MAKERS) == [kind.name for kind in mtp_latent.FAMILIES]


# --- the file ---


@by_kind
def test_the_file_keeps_one_state_for_all_heads(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """A5-1: what llama.cpp keeps of a position, and what it is for each head."""
    out = tmp_path / "mtp.gguf"
    convert(job(sources[kind], out))
    file = read_gguf(out)
    arch = file.keys["general.architecture"].value
    keys = {key.removeprefix(f"{arch}."): entry.value for key, entry in file.keys.items()}
    attention = {key.removeprefix("attention."): value for key, value in keys.items()}
    assert f"mtp-{arch}" == kind == inspect(out).kind
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["leading_dense_block_count"]) == (DEPTH + 1, 1, 1)
    assert (attention["head_count"], attention["head_count_kv"]) == (HEADS, 1)
    assert (attention["key_length"], attention["value_length"]) == (STATE + TURNED, STATE)
    assert (attention["key_length_mla"], attention["value_length_mla"]) == (PLAIN + TURNED, VALUE)
    assert (attention["q_lora_rank"], attention["kv_lora_rank"], keys["rope.dimension_count"]) == (160, STATE, TURNED)
    assert (keys["feed_forward_length"], keys["expert_feed_forward_length"], keys["expert_shared_count"]) == (96, 32, 1)
    assert (keys["expert_gating_func"], keys["expert_weights_norm"]) == (2, True)
    (structure, pairing) = doctor(out, sources[kind], sources[kind])
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


@by_kind
def test_keys_and_values_are_parted_and_keys_transposed(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """Head by head the rows of its keys, then those of its values; the keys' columns become rows."""
    convert(job(sources[kind], tmp_path / "mtp.gguf", recipe="BF16"))
    file = read_gguf(tmp_path / "mtp.gguf")
    both = load_file(sources[kind] / "model.safetensors")[f"{LAYER}self_attn.kv_b_proj.weight"]
    keys, values = np.split(both.reshape(HEADS, PLAIN + VALUE, STATE), [PLAIN], axis=1)
    assert (file.tensors[KEYS].shape, file.tensors[VALUES].shape) == ((HEADS, STATE, PLAIN), (HEADS, VALUE, STATE))
    np.testing.assert_array_equal(file.tensor_bytes(KEYS).view(both.dtype), keys.swapaxes(1, 2).ravel())
    np.testing.assert_array_equal(file.tensor_bytes(VALUES).view(both.dtype), values.ravel())


def test_an_indexer_is_kept_though_no_head_of_llama_cpp_hears_it(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "mtp.gguf"
    convert(job(sources["mtp-glm-dsa"], out))
    file = read_gguf(out)
    keys = {k.removeprefix("glm-dsa.attention.indexer."): e.value for k, e in file.keys.items()}
    assert (keys["head_count"], keys["key_length"], keys["top_k"], keys["types"]) == (4, 64, 2048, (True,) * DEPTH)
    assert sum(".indexer." in name for name in file.tensors) == 5
    assert "was trained to look at those its indexer chooses" in CELLS["mtp-glm-dsa", "llama.cpp"].notes[0].text
    bare = without(make_mtp_latent.dsa(tmp_path / "bare"), f"{LAYER}self_attn.indexer.")
    assert len(planned(bare).plan.tensors) == len(file.tensors) - 5
    half = without(make_mtp_latent.dsa(tmp_path / "half"), f"{LAYER}self_attn.indexer.wk.")
    assert "self_attn.indexer.wk.weight: missing (INDEXER_K of layer 3)" in refusal(planned, half)


def test_the_published_config_is_read(tmp_path: Path) -> None:
    """GLM-5.1: its facts, from its config as it is."""
    source = make_mtp_latent.dsa(tmp_path / "t", num_hidden_layers=78)
    (source / "config.json").write_text(json.dumps(published_config("zai-org__GLM-5.1")))
    published = read_published(source)
    spec = published.spec
    assert (spec.kind, spec.layers, spec.head_count, spec.head_dim) == ("mtp-glm-dsa", range(78, 79), 64, 256)
    assert spec.latent_attention == LatentAttention(query_rank=2048, kv_rank=512, value_head_dim=256)
    assert spec.indexer == Indexer(32, 128, 2048, (True,) * 78)
    assert spec.experts == Experts(256, 8, 2048, "sigmoid", True, 2.5, 1, 1)
    assert (spec.rope, spec.trunk) == (Rope(1e6, 64), Trunk(3, 12288))
    assert published.reader.unread() == []
    assert objections(CELLS["mtp-glm-dsa", "llama.cpp"], spec) == []
    said = refusal(planned, source)
    rows = "28672 rows: 64 heads of 192 for the key and 256 for the value"
    assert f"kv_b_proj.weight: found shape [320, 96], expected {rows}" in said


# --- facts ---


@by_kind
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q_lora_rank": None}, "latent_attention.query_rank: missing (looked at q_lora_rank)"),
        ({"kv_lora_rank": DELETE}, "latent_attention.kv_rank: missing (looked at kv_lora_rank)"),
        ({"v_head_dim": DELETE}, "latent_attention.value_head_dim: missing (looked at v_head_dim)"),
        ({"qk_nope_head_dim": DELETE}, "head_dim: missing (looked at qk_nope_head_dim)"),
        ({"qk_rope_head_dim": DELETE}, "rope.dimensions: missing (looked at qk_rope_head_dim)"),
        ({"qk_nope_head_dim": 0, "qk_head_dim": 24}, "qk_rope_head_dim: found 24, expected below head_dim 24"),
        ({"qk_head_dim": 48}, "qk_head_dim: found 48, expected 56"),
        ({"head_dim": 56}, "head_dim: found 56, expected 24"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: found 2, expected 4"),
        ({"rope_theta": DELETE, "rope_parameters__rope_theta": DELETE}, "rope theta: missing"),
        ({"rope_interleave": False}, "rope_interleave: found False, expected True"),
        ({"attention_bias": True}, "attention_bias: found True, expected False"),
        ({"rope_parameters__partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
        ({"scoring_func": "softmax"}, "scoring_func: found 'softmax', expected 'sigmoid'"),
        (
            {"first_k_dense_replace": DELETE},
            "dense_layer_count: missing (looked at first_k_dense_replace or mlp_layer_types)",
        ),
        ({"first_k_dense_replace": 4}, "trunk.dense_layer_count: llama.cpp's head is a mixture"),
        ({"mlp_layer_types": ["dense", "sparse", "dense"]}, "expected 3: dense ones, then sparse ones"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "first_k_dense_replace: found 1, expected 2"),
        ({"n_shared_experts": 0}, "n_shared_experts: found 0, expected a number above 0"),
        ({"n_group": 4, "topk_group": 4}, "experts.groups_used: llama.cpp chooses among fewer groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(
    kind: str, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(MAKERS[kind](tmp_path / "t"), **change))


@by_kind
def test_another_scaling_is_refused(kind: str, tmp_path: Path) -> None:
    change = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": DELETE, "rope_theta": 1e6}
    said = refusal(planned, reconfigure(MAKERS[kind](tmp_path / "t"), **change))
    assert ("found 'linear', expected default, yarn" if kind == "mtp-deepseek32" else "found linear scaling") in said


YARN = RopeScaling("yarn", 4.0, 512, attention_factor=1.0, log_multiplier=1.0)


def test_yarn_is_deepseek_s(sources: dict[str, Path]) -> None:
    """The paper's factor is not in what rotates but, squared, in all scores."""
    published = read_published(sources["mtp-deepseek32"])
    assert published.spec.rope == Rope(1e4, TURNED, YARN)
    assert published.reader.origins["rope.scaling.log_multiplier"] == "rope_scaling.mscale_all_dim"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"mscale": DELETE},
            "rope.scaling.attention_factor: missing (looked at rope_parameters.mscale or rope_scaling.m",
        ),
        ({"mscale_all_dim": DELETE}, "rope.scaling.log_multiplier: missing"),
        ({"mscale_all_dim": 0.5, "mscale": 0.5}, "rope.scaling.log_multiplier: llama.cpp scales the scores"),
        ({"mscale": 0.5}, "rope.scaling.attention_factor = 0.9391"),
        ({"attention_factor": 0.9}, "rope_scaling.attention_factor: found 0.9, expected none beside mscale"),
        ({"beta_fast": 16}, "rope.scaling.beta_fast = 16.0: llama.cpp has no key for it"),
        ({"original_max_position_embeddings": DELETE}, "rope.scaling.original_context_length: missing"),
        ({"truncate": False}, "rope_scaling.truncate: found False"),
    ],
    ids=str,
)
def test_yarn_that_llama_cpp_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    changes = {f"rope_scaling__{key}": value for key, value in change.items()}
    assert said in refusal(planned, reconfigure(make_mtp_latent.v32(tmp_path / "t"), **changes))


def test_a_head_without_a_stretched_context_is_taken(tmp_path: Path) -> None:
    spec = planned(make_mtp_latent.v32(tmp_path / "t", rope_scaling=None)).published.spec
    assert spec.rope == Rope(1e4, TURNED)


def test_a_head_published_in_fp8_converts_like_its_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    """DeepSeek's own storage: blocks with a scale each, parted where no block ends."""
    config, source = make_mtp_latent.v32_config(), BY_NAME["fp8 blocks, partial"]
    raw, weights = tensors_of(source, make_mtp_latent.shapes(config))
    whole = {"quantized": ({**config, "quantization_config": dict(source.config)}, raw), "plain": (config, weights)}
    files = []
    for name, (facts, tensors) in whole.items():
        folder, out = write_checkpoint(tmp_path / name, facts, tensors), tmp_path / f"{name}.gguf"
        convert(job(folder, out, target=sources["mtp-deepseek32"], recipe="Q8_0"))
        files.append(read_gguf(out))
    assert files[0].tensors == files[1].tensors
    assert all((files[0].tensor_bytes(name) == files[1].tensor_bytes(name)).all() for name in files[0].tensors)


def test_a_list_of_layers_tells_the_dense_ones(tmp_path: Path) -> None:
    change = {"first_k_dense_replace": DELETE, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    spec = planned(reconfigure(make_mtp_latent.flash(tmp_path / "t"), **change)).published.spec
    assert spec.trunk == Trunk(1, 96)


@pytest.mark.parametrize("depth", [26, 27])
def test_a_depth_that_llama_cpp_takes_for_another_model_is_refused(tmp_path: Path, depth: int) -> None:
    """deepseek2.cpp tells models whose queries have no narrow state by their depth."""
    source = make_mtp_latent.flash(tmp_path / "t", num_hidden_layers=depth)
    assert "target_layer_count: llama.cpp takes a target of this depth for one whose queries" in refusal(
        planned, source
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, (True, True, True)),
        ({"index_topk_freq": 1}, (True, True, True)),
        ({"indexer_types": ["full", "shared", "full"]}, (True, False, True)),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, (True, False, True)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, (True, True, True)),
        ({"index_topk_freq": 4}, "indexer.layers: missing (looked at index_skip_topk_offset)"),
        ({"index_topk_freq": 0, "index_skip_topk_offset": 1}, "index_topk_freq: found 0, expected a number above 0"),
        ({"indexer_types": ["full", "half", "full"]}, "indexer_types: found half, expected full or shared"),
        ({"indexer_types": ["full"]}, "indexer_types: found (True,), expected one entry for each of the target's 3"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave: found False, expected True"),
    ],
    ids=str,
)
def test_which_layers_choose_is_stated_or_counted(tmp_path: Path, change: dict[str, Any], expected: Any) -> None:
    source = reconfigure(make_mtp_latent.dsa(tmp_path / "t"), **change)
    if isinstance(expected, str):
        assert expected in refusal(planned, source)
    else:
        spec = planned(source).published.spec
        assert spec.indexer is not None and spec.indexer.layers == expected


# --- counting ---


@by_kind
def test_the_head_is_counted_by_tensors_and_by_the_config(kind: str, tmp_path: Path) -> None:
    """A5-2, both ways."""
    gone = without(MAKERS[kind](tmp_path / "gone"), LAYER)
    assert "num_nextn_predict_layers: 1, but there is no tensor of an MTP head" in refusal(planned, gone)
    unsaid = reconfigure(MAKERS[kind](tmp_path / "unsaid"), num_nextn_predict_layers=DELETE)
    assert "--set num_nextn_predict_layers=1" in refusal(planned, unsaid)
    two = MAKERS[kind](tmp_path / "two", num_nextn_predict_layers=2)
    assert "layer_count: llama.cpp drafts with a head of one layer" in refusal(planned, two)


def test_a_part_of_the_attention_that_is_absent_is_named(tmp_path: Path) -> None:
    source = without(make_mtp_latent.flash(tmp_path / "t"), f"{LAYER}self_attn.kv_b_proj", f"{LAYER}self_attn.q_a_lay")
    said = refusal(planned, source)
    assert "self_attn.kv_b_proj.weight (keys): missing (ATTN_K_B of layer 3)" in said
    assert "self_attn.kv_b_proj.weight (values): missing (ATTN_V_B of layer 3)" in said
    assert "self_attn.q_a_layernorm.weight: missing (ATTN_Q_A_NORM of layer 3)" in said


def test_deepseek_v3_stays_refused(tmp_path: Path) -> None:
    """Its layers are the same; llama.cpp's converter drops its head."""
    source = make_mtp_latent.flash(tmp_path / "t", architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")
    assert "the MTP head of DeepseekV3ForCausalLM, no runtime loads it" in refusal(planned, source)


# --- planted faults ---


def both_of(draft: Draft) -> np.ndarray:
    """The checkpoint's one matrix, (heads, keys and values, state)."""
    return np.concatenate([draft.weights(KEYS).swapaxes(1, 2), draft.weights(VALUES)], axis=1)


def values_first(draft: Draft) -> None:
    values, keys = np.split(both_of(draft), [VALUE], axis=1)
    draft.put(KEYS, keys.swapaxes(1, 2))
    draft.put(VALUES, values)


def not_by_head(draft: Draft) -> None:
    """All keys, then all values, instead of both for each head."""
    keys, values = np.split(both_of(draft).reshape(-1, STATE), [HEADS * PLAIN])
    draft.put(KEYS, keys.reshape(HEADS, PLAIN, STATE).swapaxes(1, 2))
    draft.put(VALUES, values.reshape(HEADS, VALUE, STATE))


def not_transposed(draft: Draft) -> None:
    draft.put(KEYS, draft.weights(KEYS).swapaxes(1, 2).reshape(HEADS, STATE, PLAIN))


def turned_in_halves(draft: Draft) -> None:
    """Rows in the order that other architectures want: all first ones of the pairs, then all second ones."""
    name = f"blk.{DEPTH}.attn_kv_a_mqa.weight"
    state, turned = np.split(draft.weights(name), [STATE])
    draft.put(name, np.concatenate([state, turned[::2], turned[1::2]]))


FAULTS: dict[str, tuple[Edit, str]] = {
    "values first": (values_first, f"{KEYS} (F32): "),
    "not by head": (not_by_head, f"{VALUES} (F32): "),
    "keys not transposed": (not_transposed, f"{KEYS} (F32): "),
    "turned in halves": (turned_in_halves, "its rows are in another order: row 1"),
    "one state for each head": (lambda draft: draft.set("attention.head_count_kv", 4), "head_count_kv: found 4"),
    "keys without what rotates": (
        lambda draft: draft.set("attention.key_length", STATE),
        "another key says latent_attention.kv_rank = 96",
    ),
    "no width of a head's key": (lambda draft: draft.drop("key_length_mla"), "attention.key_length_mla: missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    edit, says = FAULTS[name]
    convert(job(sources["mtp-deepseek2"], tmp_path / "good.gguf"))
    draft = Draft.of(tmp_path / "good.gguf")
    edit(draft)
    (gate, _) = doctor(draft.write(tmp_path / "bad.gguf"), sources["mtp-deepseek2"], sources["mtp-deepseek2"])
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


# --- the cells ---

CELL_LIST = [CELLS[kind, "llama.cpp"] for kind in MAKERS]
by_cell = pytest.mark.parametrize("cell", CELL_LIST, ids=lambda cell: cell.kind)
SPEC = DrafterSpec(
    kind="mtp-deepseek2",
    layer_count=1,
    hidden_size=64,
    feed_forward_size=32,
    head_count=4,
    kv_head_count=1,
    head_dim=56,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-5,
    rope=Rope(theta=1e6, dimensions=24),
    target_layer_count=5,
    target_hidden_size=64,
    causal=True,
    latent_attention=LatentAttention(96, 48, 160),
    experts=Experts(8, 3, 64, "sigmoid", True, 1.8, 4, 2),
    trunk=Trunk(1, 96),
)
OWN: dict[str, dict[str, Any]] = {
    "mtp-deepseek2": {},
    "mtp-glm-dsa": {"indexer": Indexer(4, 64, 2048, (True, False, True, True, False))},
    "mtp-deepseek32": {"indexer": Indexer(4, 64, 2048)},
}


def of_kind(spec: DrafterSpec, cell: Cell) -> DrafterSpec:
    scaling = YARN if cell.kind == "mtp-deepseek32" else None
    return replace(spec, kind=cell.kind, rope=replace(spec.rope, scaling=scaling), **OWN[cell.kind])


@by_cell
def test_golden_keys(cell: Cell) -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}-{cell.kind}.json").read_text())
    assert golden == {"keys": shown(write(cell, of_kind(SPEC, cell))), "tensors": tensor_names(cell)}


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions that the loader takes."""
    sizes, groups = st.integers(1, 512), draw(st.integers(2, 8))
    width, hidden, turned = draw(sizes), draw(sizes), 2 * draw(st.integers(1, 64))
    count = groups * draw(st.integers(2, 4))
    used, choice = draw(st.integers(1, groups - 1)), draw(st.booleans())
    return replace(
        SPEC,
        hidden_size=hidden,
        target_hidden_size=hidden,
        feed_forward_size=width,
        head_count=draw(sizes),
        head_dim=turned + draw(st.integers(1, 64)),
        rope=Rope(10.0 ** draw(st.integers(2, 8)), turned),
        latent_attention=LatentAttention(draw(sizes), draw(sizes), draw(sizes)),
        experts=Experts(count, 2, width * draw(st.integers(1, 4)), "sigmoid", choice, 2.5, groups, used),
        trunk=Trunk(draw(st.integers(0, 5)), draw(sizes)),
    )


@by_cell
@given(spec=specs())
def test_what_is_written_comes_back(cell: Cell, spec: DrafterSpec) -> None:
    assert_comes_back(cell, of_kind(spec, cell))


@by_cell
@pytest.mark.parametrize(
    ("key", "field"),
    [("rope.dimension_count", "rope.dimensions"), ("expert_shared_count", "experts.shared_feed_forward_size")],
)
def test_a_key_the_loader_needs_is_asked_for(cell: Cell, key: str, field: str) -> None:
    keys = keys_of(cell, of_kind(SPEC, cell))
    for name in [name for name in keys if name.endswith((key, "attention.key_length"))]:
        keys.pop(name)
    with pytest.raises(BadFact, match=field):
        spec_from({"kind": cell.kind, **read(cell, keys)})


@pytest.mark.parametrize(
    ("depth", "vocab", "scoring"), [(47, 154880, "sigmoid"), (48, 154880, "sigmoid"), (47, 2048, "softmax")]
)
def test_without_a_key_the_scores_are_those_of_a_known_model(depth: int, vocab: int, scoring: str) -> None:
    """deepseek2.cpp knows GLM-4.7-Flash by its depth and vocabulary."""
    cell = CELLS["mtp-deepseek2", "llama.cpp"]
    spec = replace(SPEC, target_layer_count=depth, vocab_size=vocab)
    keys = {name: entry for name, entry in keys_of(cell, spec).items() if not name.endswith("gating_func")}
    assert read(cell, keys)["experts.scoring"] == scoring


def test_without_a_list_all_layers_choose_unless_the_context_is_glm_5_2_s() -> None:
    """glm-dsa.cpp: the published pattern, from 2^20 tokens on."""
    cell = CELLS["mtp-glm-dsa", "llama.cpp"]
    spec = replace(of_kind(SPEC, cell), target_layer_count=8, indexer=Indexer(4, 64, 2048, (True,) * 8))
    for context, layers in ((202752, (True,) * 8), (2**20, (True, True, True, False, False, False, True, False))):
        written = keys_of(cell, replace(spec, context_length=context))
        keys = {name: entry for name, entry in written.items() if not name.endswith("indexer.types")}
        assert read(cell, keys)["indexer.layers"] == layers


# --- in torch ---


@by_kind
def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(kind: str, sources: dict[str, Path]) -> None:
    """The decoder layer as transformers computes it: narrow states, pairs of neighbours that rotate, the mixture."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp, shifted
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.text import FINAL
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    torch.set_num_threads(1)
    source, tokens, at = sources[kind], list(range(7, 47)), torch.arange(40)
    target, published = TorchTarget(source), read_published(source)
    drafter: Mtp = reference(published.spec, checkpoint_weights(published))
    layer = target.model.get_decoder().layers[DEPTH - 1]
    layer.load_state_dict(head_state(source))
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    embedding = drafter.tables(target.tables).embedding[torch.tensor(tokens)]
    joined = drafter.head.join(embedding, shifted(states))
    rotary = target.model.get_decoder().rotary_emb(joined[None], position_ids=at[None])
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    nothing = torch.zeros(HEADS, 0, PLAIN + TURNED), torch.zeros(HEADS, 0, VALUE)
    with torch.no_grad():
        expected = layer(joined[None], position_embeddings=rotary, attention_mask=mask, position_ids=at[None])
        found, _ = drafter.head(embedding, shifted(states), at, nothing, torch.ones(40, 40, dtype=torch.bool).tril())
        normed = drafter.head.norm(expected[0] if isinstance(expected, tuple) else expected)
    torch.testing.assert_close(found, normed.reshape(found.shape), atol=2e-4, rtol=2e-3)


def head_state(source: Path) -> dict[str, Any]:
    """The head's layer by transformers' names, which has the experts in two tensors."""
    import torch

    own = {n.removeprefix(LAYER): t for n, t in load_file(source / "model.safetensors").items() if n.startswith(LAYER)}
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in own.items()}
    experts = {name: state.pop(name) for name in list(state) if ".experts." in name}
    gate, up, down = (
        torch.stack([experts[f"mlp.experts.{i}.{part}_proj.weight"] for i in range(8)])
        for part in ("gate", "up", "down")
    )
    outside = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(outside)}
    return {**state, "mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}


def test_the_kinds_say_what_they_are() -> None:
    assert all("MTP head of" in KINDS[kind].summary for kind in MAKERS)
