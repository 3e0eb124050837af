"""The MTP head of Qwen4Exp: residual streams, an indexer over groups of positions, a count that is stated twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_qwen4
import numpy as np
import pytest
from cell_keys import keys_of
from mtp_checkpoints import DELETE, job, part_experts, planned, reconfigure, without
from planted_faults import Draft, Edit
from published import published_config
from safetensors.numpy import load_file, save_file
from test_kind_diagnosis import that_mend, view_of
from test_mtp import refusal
from test_mtp_dialect import SPEC, of_kind

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS, objections, read
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.spec import Indexer, Streams, spec_from
from convert_drafter.converters.verdict import Outcome
from convert_drafter.converters.verify.diagnosis.explanations import explanations
from convert_drafter.converters.verify.diagnosis.view import Hints

DEPTH = 4
BLOCK = f"blk.{DEPTH}."
CELL = CELLS["mtp-qwen4exp", "llama.cpp"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_qwen4.random(tmp_path_factory.mktemp("qwen4") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return out


def test_the_file_says_what_the_head_reads_and_chooses(source: Path, file: Path) -> None:
    """A5-1: the target's layers with the head's; nothing of the target's n-gram embedding."""
    found = read_gguf(file)
    keys = {key.removeprefix("qwen4exp."): entry.value for key, entry in found.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (DEPTH + 1, 1)
    assert keys["attention.compress_ratios"] == (0, 0, 0, 4, 4)
    assert keys["attention.recurrent_layers"] == (True, True, True, False, False)
    assert (keys["hyper_connection.count"], keys["hyper_connection.low_rank"]) == (3, 24)
    indexer = [keys[f"attention.indexer.{name}"] for name in ("head_count", "key_length", "top_k")]
    assert indexer == [8, 16, 32]
    assert not any("ple" in key for key in keys) and "output_norm.weight" not in found.tensors
    assert inspect(file).kind == "mtp-qwen4exp"
    (structure, pairing) = doctor(file, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


def test_matrices_are_joined_and_parted_as_llama_cpp_wants_them(source: Path, file: Path) -> None:
    published, found = load_file(source / "model.safetensors"), read_gguf(file)

    def stored(name: str) -> np.ndarray:
        return np.asarray(found.tensor_bytes(BLOCK + name).view("<f4")).reshape(found.tensors[BLOCK + name].shape)

    left, right = (published[f"mtp.fc_{name}.weight"] for name in ("embedding", "hidden"))
    np.testing.assert_array_equal(stored("nextn.eh_proj.weight"), np.concatenate([left, right], axis=1))
    both = published["mtp.layers.0.self_attn.indexer.index_qk_proj.weight"]
    np.testing.assert_array_equal(stored("indexer.q_proj.weight"), both[: 8 * 16])
    np.testing.assert_array_equal(stored("indexer.k_proj.weight"), both[8 * 16 :])
    for name, own in {"hc_attn_norm": "layers.0.attn_hyper_connection.hc_norm", "nextn.hnorm": "pre_fc_norm_hidden",
                      "indexer.k_norm": "layers.0.self_attn.indexer.k_layernorm"}.items():  # fmt: skip
        expected = published[f"mtp.{own}.weight"].astype(np.float32) + 1
        np.testing.assert_array_equal(stored(f"{name}.weight"), expected)


def test_nothing_of_the_config_is_left_unread(source: Path) -> None:
    assert planned(source).warnings == ()


def test_the_fixture_counts_as_the_published_config_does() -> None:
    text, own = published_config("unknown__qwen4_exp")["text_config"], make_mtp_qwen4.qwen4_config()
    assert text == {key: own[key] for key in text}


def as_released(folder: Path) -> Path:
    """A vision model's config, its text model's tensors under another name, each expert by itself."""
    made = part_experts(make_mtp_qwen4.random(folder))
    text = json.loads((made / "config.json").read_text())
    text.pop("architectures")
    whole = {"architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp", "text_config": text}
    (made / "config.json").write_text(
        json.dumps({**whole, "tie_word_embeddings": False, "vision_config": {"depth": 2}})
    )
    return made


def test_the_released_layout_is_the_same_head(source: Path, tmp_path: Path) -> None:
    released = planned(as_released(tmp_path / "t"))
    assert released.published.spec == read_published(source).spec and released.warnings == ()
    assert [t.name for t in released.plan.tensors] == [t.name for t in planned(source).plan.tensors]


def test_layers_go_by_the_names_transformers_saves(source: Path, tmp_path: Path) -> None:
    changes = {
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "mtp__layer_types": ["indexed_attention"],
    }
    saved = reconfigure(make_mtp_qwen4.random(tmp_path / "t"), **changes)
    assert read_published(saved).spec == read_published(source).spec


REQUIRED = {
    "hc_count": "streams.count", "hc_lowrank": "streams.rank", "head_dim": "head_dim",
    "hidden_size": "hidden_size", "indexer_budget": "indexer.top_k", "indexer_compress_ratio": "indexer.pool_size",
    "indexer_head_dim": "indexer.head_dim", "indexer_n_heads": "indexer.head_count",
    "linear_conv_kernel_dim": "linear_attention.kernel_size", "linear_key_head_dim": "linear_attention.key_head_dim",
    "linear_num_key_heads": "linear_attention.key_head_count",
    "linear_num_value_heads": "linear_attention.value_head_count",
    "linear_value_head_dim": "linear_attention.value_head_dim", "max_position_embeddings": "context_length",
    "moe_intermediate_size": "feed_forward_size", "num_attention_heads": "head_count", "num_experts": "experts.count",
    "num_experts_per_tok": "experts.used", "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "kv_head_count", "rms_norm_eps": "norm_epsilon",
    "rope_parameters__mrope_section": "rope.sections", "rope_parameters__partial_rotary_factor": "rope.dimensions",
    "rope_parameters__rope_theta": "rope theta",
    "shared_expert_intermediate_size": "experts.shared_feed_forward_size", "vocab_size": "vocab_size",
}  # fmt: skip


@pytest.mark.parametrize(("key", "field"), REQUIRED.items())
def test_a_missing_key_is_named(tmp_path: Path, key: str, field: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    said = refusal(planned, reconfigure(make_mtp_qwen4.random(tmp_path / "t"), **{key: DELETE}))
    assert f"{field}: missing (looked at" in said and key.replace("__", ".") in said, said


def test_the_types_of_layers_come_from_a_list_or_an_interval(source: Path, tmp_path: Path) -> None:
    made = reconfigure(make_mtp_qwen4.random(tmp_path / "t"), layer_types=DELETE)
    assert read_published(made).spec == read_published(source).spec
    said = refusal(planned, reconfigure(made, full_attention_interval=DELETE))
    assert "linear_attention.layers: missing (looked at layer_types or full_attention_interval)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hc_count": 1}, "hc_count: found 1, expected at least 2 streams"),
        ({"indexer_compress_ratio": 1}, "indexer_compress_ratio: found 1, expected at least 2 positions"),
        ({"indexer_compress_ratio": 5}, "indexer_budget: found 32, expected a multiple of the 5 chosen together"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads: found 2, expected 1"),
        ({"indexer_head_dim": 8}, "indexer_head_dim: found 8, expected at least the 16 rotated dimensions"),
        ({"norm_topk_prob": False}, "norm_topk_prob: found False, expected True"),
        ({"output_gate_type": "silu"}, "output_gate_type: found 'silu', expected 'sigmoid'"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"hidden_act": "gelu"}, "hidden_act: found 'gelu'"),
        ({"layer_types": ["sliding_attention"] * 4}, "linear_attention or full_attention or indexed_attention"),
        ({"mtp__layer_types": ["linear_attention"]}, "mtp.layer_types: found ['linear_attention'], expected 1 of full"),
        ({"mtp__layer_types": []}, "mtp.layer_types: found [], expected 1 of full_attention"),
        ({"mtp__rope_theta": 5e6}, "mtp.rope_theta: found 5000000.0, expected 10000000.0"),
        ({"mtp__mtp_use_hidden_state_from_layer": 2}, "mtp_use_hidden_state_from_layer: found 2, expected None"),
        ({"mtp__hybrid": False}, "mtp.hybrid: found False, expected True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(planned, reconfigure(make_mtp_qwen4.random(tmp_path / "t"), **change))


# --- the count ---


@pytest.mark.parametrize("gone", ["mtp_num_hidden_layers", "mtp__num_hidden_layers"])
def test_one_of_the_two_counts_is_enough(source: Path, tmp_path: Path, gone: str) -> None:
    made = reconfigure(make_mtp_qwen4.random(tmp_path / "t"), **{gone: DELETE})
    assert read_published(made).spec == read_published(source).spec


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"mtp_num_hidden_layers": 2},
            "two places disagree: mtp_num_hidden_layers = 2, mtp.num_hidden_layers = 1, expected one value",
        ),
        ({"mtp__num_hidden_layers": 0}, "mtp_num_hidden_layers = 1, mtp.num_hidden_layers = 0"),
        (
            {"mtp_num_hidden_layers": 2, "mtp__num_hidden_layers": 2},
            "2, but the tensors are mtp.layers.0, expected as many layers",
        ),
        ({"mtp_num_hidden_layers": DELETE, "mtp__num_hidden_layers": DELETE}, "--set mtp_num_hidden_layers=1"),
    ],
    ids=["outer", "nested", "both", "neither"],
)
def test_counts_have_to_be_what_the_tensors_are(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """A5-2: present and undeclared, or declared otherwise."""
    assert said in refusal(planned, reconfigure(make_mtp_qwen4.random(tmp_path / "t"), **change))


@pytest.mark.parametrize("kept", ["mtp_num_hidden_layers", "mtp__num_hidden_layers"])
def test_a_head_that_is_declared_and_absent_is_refused(tmp_path: Path, kept: str) -> None:
    """A5-2: whichever of the two says so."""
    gone = {key: DELETE for key in ("mtp_num_hidden_layers", "mtp__num_hidden_layers") if key != kept}
    made = reconfigure(without(make_mtp_qwen4.random(tmp_path / "t"), "mtp."), **gone)
    assert "1, but there is no tensor of an MTP head" in refusal(planned, made)


# --- tensors ---


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("mtp.fc_hidden", "mtp.fc_hidden.weight: missing, expected fc_embedding and fc_hidden"),
        ("mtp.fc_embedding", "mtp.fc_embedding.weight: missing, expected fc_embedding and fc_hidden"),
        ("mtp.hyper_connection_mixer.hc_norm", "mtp.hyper_connection_mixer.hc_norm.weight: missing (NEXTN_MIX_NORM"),
        ("mtp.layers.0.self_attn.indexer.index_qk_proj", "index_qk_proj.weight (queries): missing (INDEXER_Q_PROJ"),
        ("mtp.layers.0.mlp_hyper_connection.block_inject_weight", "missing (FFN_SHARES of layer 4)"),
        ("lm_head", "lm_head.weight: missing (OUTPUT)"),
    ],
)
def test_an_absent_tensor_is_named(tmp_path: Path, gone: str, said: str) -> None:
    assert said in refusal(planned, without(make_mtp_qwen4.random(tmp_path / "t"), gone))


@pytest.mark.parametrize(
    ("other", "found"), [((np.float32, (64, 64)), "F32 [64, 64]"), ((np.float16, (32, 64)), "F16 [32, 64]")]
)
def test_halves_of_one_matrix_are_alike(tmp_path: Path, other: tuple[Any, tuple[int, int]], found: str) -> None:
    made, (kind, shape) = make_mtp_qwen4.random(tmp_path / "t"), other
    path = made / "model.safetensors"
    save_file({**load_file(path), "mtp.fc_hidden.weight": np.zeros(shape, kind)}, path)
    expected = f"found {found} beside BF16 [64, 64] of mtp.fc_embedding.weight, expected two matrices with as many rows"
    assert f"mtp.fc_hidden.weight: {expected}" in refusal(planned, made)


def test_only_the_head_and_what_it_shares_is_read(source: Path) -> None:
    names = read_published(source).checkpoint.tensors
    assert {name for name in names if not name.startswith("mtp.")} == {"lm_head.weight", "model.embed_tokens.weight"}


FAULTS: dict[str, tuple[Edit, str]] = {
    "a norm without its one": (
        lambda draft: draft.put(f"{BLOCK}hc_attn_norm.weight", draft.weights(f"{BLOCK}hc_attn_norm.weight") - 1),
        "off by up to 1; it is the checkpoint's minus 1",
    ),
    "streams exchanged": (
        lambda draft: draft.put(f"{BLOCK}nextn.hnorm.weight", np.roll(draft.weights(f"{BLOCK}nextn.hnorm.weight"), 64)),
        f"{BLOCK}nextn.hnorm.weight (F32): ",
    ),
    "state and embedding exchanged": (
        lambda draft: draft.put(
            f"{BLOCK}nextn.eh_proj.weight", np.roll(draft.weights(f"{BLOCK}nextn.eh_proj.weight"), 64, axis=1)
        ),
        f"{BLOCK}nextn.eh_proj.weight (F32): ",
    ),
    "no mixer": (
        lambda draft: draft.tensors.pop(f"{BLOCK}nextn.hc_head_up.weight"),
        f"{BLOCK}nextn.hc_head_up.weight: missing (NEXTN_MIX_UP of layer {DEPTH})",
    ),
    "one stream less": (lambda draft: draft.set("hyper_connection.count", 2), "hyper_connection.count"),
    "the head looks everywhere": (
        lambda draft: draft.set("attention.compress_ratios", (0, 0, 0, 4, 0)),
        "attention.compress_ratios: found [0, 0, 0, 4, 0], expected one size, the head's, and zeros",
    ),
    "groups of two sizes": (
        lambda draft: draft.set("attention.compress_ratios", (0, 0, 0, 8, 4)),
        "attention.compress_ratios: found [0, 0, 0, 8, 4]",
    ),
    "no groups": (lambda draft: draft.drop("attention.compress_ratios"), "qwen4exp.attention.compress_ratios: missing"),
    "another budget": (lambda draft: draft.set("indexer.top_k", 64), "indexer.top_k"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(source: Path, file: Path, tmp_path: Path, name: str) -> None:
    edit, says = FAULTS[name]
    draft = Draft.of(file)
    edit(draft)
    (gate, *_) = doctor(draft.write(tmp_path / "bad.gguf"), source, source)
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


def test_norms_without_their_one_are_named(file: Path, tmp_path: Path) -> None:
    """P-42: those of the streams and of the indexer as well."""
    draft = Draft.of(file)
    for name in [name for name in draft.tensors if name.endswith("norm.weight")]:
        draft.put(name, draft.weights(name) - 1)
    bad, right = view_of(draft.write(tmp_path / "bad.gguf")), view_of(file)
    (found, *_) = that_mend(bad, Hints(), right)
    assert found.name == "norms: one added"


# --- the cell ---


def test_a_layer_that_chooses_otherwise_than_the_head_is_a_contradiction() -> None:
    keys = keys_of(CELL, of_kind(SPEC, CELL))
    name = "qwen4exp.attention.compress_ratios"
    assert keys[name].value == (0, 0, 0, 4, 4)
    with pytest.raises(WrongInput, match=r"compress_ratios: found \[4, 2\]"):
        read(CELL, {**keys, name: replace(keys[name], value=(4, 2))})
    with pytest.raises(BadFact, match=r"indexer\.pool_size"):
        spec_from({"kind": CELL.kind, **read(CELL, {k: v for k, v in keys.items() if k != name})})


@pytest.mark.parametrize("layers", [0, 1])
def test_a_target_that_looks_everywhere_is_another(source: Path, file: Path, tmp_path: Path, layers: int) -> None:
    """What llama.cpp's converter writes beside a transformers that renames full layers: with a head it stops."""
    trunk = trunk_of(file, tmp_path / "trunk.gguf", (0, 0, 0, 4 * layers))
    asked = job(source, tmp_path / "attached.gguf", attach=trunk)
    if layers:
        (changed,) = (e.value for e in prepare_attach(asked).keys if e.key.endswith("compress_ratios"))
        assert changed == (0, 0, 0, 4, 4)
    else:
        said = "qwen4exp.attention.compress_ratios: found (0, 0, 0, 0), expected (0, 0, 0, 4)"
        assert said in refusal(prepare_attach, asked)


def trunk_of(file: Path, out: Path, ratios: tuple[int, ...]) -> Path:
    """The file as if it were its target's: what it says of layers without the head's, none of its tensors."""
    draft = Draft.of(file)
    draft.drop("nextn_predict_layers")
    draft.set("qwen4exp.block_count", DEPTH)
    draft.set("attention.recurrent_layers", (True, True, True, False))
    draft.set("attention.compress_ratios", ratios)
    for name in [name for name in draft.tensors if name.startswith(BLOCK)]:
        draft.tensors.pop(name)
    return draft.write(out)


def test_streams_and_groups_are_facts() -> None:
    with pytest.raises(BadFact, match=r"streams\.count"):
        Streams(1, 8)
    with pytest.raises(BadFact, match=r"indexer\.top_k"):
        Indexer(4, 16, 30, pool_size=4)
    assert objections(CELL, of_kind(SPEC, CELL)) == []


# --- in torch ---


@pytest.fixture(scope="module")
def layers(source: Path) -> tuple[Any, Any, Any]:
    """The reference, the target, and transformers' layer with the head's weights."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    torch.set_num_threads(1)
    published, target = read_published(source), TorchTarget(source)
    layer = qwen.Qwen4ExpTextDecoderLayer(target.model.config.get_text_config(), DEPTH - 1).eval()
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in head_state(source).items()}
    layer.load_state_dict(state)
    return reference(published.spec, checkpoint_weights(published)), target, layer


def head_state(source: Path) -> dict[str, np.ndarray]:
    prefix = "mtp.layers.0."
    tensors = load_file(source / "model.safetensors").items()
    return {name.removeprefix(prefix): array for name, array in tensors if name.startswith(prefix)}


COUNT = 70  # positions: more than the indexer's budget and a group


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(layers: tuple[Any, Any, Any]) -> None:
    """Streams mixed and shared out, the indexer's choice, gates and experts, over the same joined input."""
    import torch

    from convert_drafter.converters.verify.in_torch.reference.mtp import shifted
    from convert_drafter.converters.verify.in_torch.text import captures_of

    drafter, target, layer = layers
    tokens, at = list(range(7, 7 + COUNT)), torch.arange(COUNT)
    (last,) = captures_of(drafter.spec)
    assert last == DEPTH - 1
    states = target.write(tokens, 1, [last])[1][last]
    assert states.shape == (COUNT, 3 * 64)  # all streams
    head = drafter.head
    x = head.join(target.embedding[torch.tensor(tokens)], shifted(states))
    rotary = target.model.get_decoder().rotary_emb(x[None], at[None, None].expand(3, 1, -1))
    mask = torch.full((COUNT, COUNT), -torch.inf).triu(1)[None, None]
    seen = torch.ones(COUNT, COUNT, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = layer(x[None], position_embeddings=rotary, attention_mask=mask)[0]
        known = head.layers[0].keys_values(x, at)
        found = head.layers[0](x, at, known, seen)
        chosen = head.layers[0].self_attn.indexer(head.layers[0].attn_streams(x), at, known[2], seen)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
    assert chosen.sum(-1).max() == 32 + 3 and seen.sum(-1).max() == COUNT


def test_the_mixer_is_transformers_with_the_head_s_weights(source: Path, layers: tuple[Any, Any, Any]) -> None:
    """What the output head reads."""
    import torch
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextGatedResidual

    drafter, target, _ = layers
    prefix = "mtp.hyper_connection_mixer."
    mixer = Qwen4ExpTextGatedResidual(target.model.config.get_text_config(), use_combine=False)
    found = load_file(source / "model.safetensors").items()
    own = {n.removeprefix(prefix): torch.from_numpy(a.astype(np.float32)) for n, a in found if n.startswith(prefix)}
    mixer.load_state_dict(own)
    states = torch.randn(5, 3 * 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(drafter.head.norm(states), mixer(states), atol=1e-5, rtol=1e-4)


def test_what_the_indexer_leaves_out_is_heard(layers: tuple[Any, Any, Any]) -> None:
    """Beyond its budget the head drafts otherwise than one that looks everywhere, before that alike."""
    import torch

    from convert_drafter.converters.verify.in_torch.weights import reference

    drafter, target, _ = layers
    everywhere = replace(drafter.spec, indexer=replace(drafter.spec.indexer, top_k=4096))
    names = {name: key for key, name in drafter.parameter_names(drafter.spec).items()}
    weights = {names[name]: tensor.numpy() for name, tensor in drafter.state_dict().items()}
    other = reference(everywhere, weights)
    states = target.write(list(range(7, 7 + COUNT)), 1, [DEPTH - 1])[1][DEPTH - 1]
    for length, alike in ((30, True), (COUNT - 1, False)):
        tokens = list(range(7, 7 + length))
        rows = [
            one.draft(one.read(None, states[:length], tokens, target.tables), 7 + length, 1, target.tables).logits
            for one in (drafter, other)
        ]
        assert torch.allclose(*rows, atol=1e-4) is alike


def test_whatever_a_diagnosis_tries_can_be_run(file: Path, layers: tuple[Any, Any, Any]) -> None:
    """Also other widths of what is rotated, which the indexer's heads may not have."""
    from convert_drafter.converters.verify.in_torch.weights import reference

    _, target, _ = layers
    view, tokens = view_of(file), list(range(7, 7 + COUNT))
    states = target.write(tokens, 1, [DEPTH - 1])[1][DEPTH - 1]
    tried = [explanation.view for explanation in explanations(view, Hints(1e6, (7, 9), view))]
    assert {other.spec.rope.dimensions for other in tried} == {8, 16}
    for other in tried:
        drafter = reference(other.spec, other.weights)
        context = drafter.read(None, states, tokens, target.tables)
        assert drafter.draft(context, 7, 1, target.tables).logits.isfinite().all()
