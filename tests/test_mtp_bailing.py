"""The MTP head of Ling 3.0: latent attention with a gate for each head, behind layers of delta attention."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_bailing
import numpy as np
import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from planted_faults import Draft, Edit
from published import FIXTURES
from safetensors.numpy import load_file
from test_mtp import refusal
from test_mtp_latent import SPEC, specs

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS, read, write
from convert_drafter.converters.errors import BadFact
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DeltaAttention, DrafterSpec, LatentAttention, spec_from
from convert_drafter.converters.verdict import Outcome

DEPTH = 4
LAYER = f"model.layers.{DEPTH}."
CELL = CELLS["mtp-bailingmoe3", "llama.cpp"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_bailing.random(tmp_path_factory.mktemp("bailing") / "target")


def test_the_file_says_what_each_layer_keeps(source: Path, tmp_path: Path) -> None:
    """A5-1: one latent key for all heads, or a state; the head is like the former."""
    out = tmp_path / "mtp.gguf"
    convert(job(source, out))
    file = read_gguf(out)
    keys = {key.removeprefix("bailingmoe3."): entry.value for key, entry in file.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["leading_dense_block_count"]) == (DEPTH + 1, 1, 1)
    assert keys["attention.head_count_kv"] == (0, 1, 0, 1, 1)
    assert (keys["attention.key_length"], keys["attention.value_length"]) == (96 + 24, 16)
    assert (keys["attention.key_length_mla"], keys["attention.value_length_mla"]) == (32 + 24, 48)
    assert (keys["kda.head_dim"], keys["kda.safe_gate"], keys["kda.gate_lower_bound"]) == (16, True, -5.0)
    assert (keys["expert_shared_feed_forward_length"], keys["expert_shared_count"]) == (32, 1)
    assert file.tensors[f"blk.{DEPTH}.attn_gate.weight"].shape == (4, 64)
    assert f"blk.{DEPTH}.layer_output_norm.weight" in file.tensors and "token_embd.weight" in file.tensors
    assert inspect(out).kind == "mtp-bailingmoe3"
    (structure, pairing) = doctor(out, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


def test_queries_may_come_out_of_a_narrow_state(tmp_path: Path) -> None:
    """Ling-3.0-tiny, as llama.cpp's converter knows it."""
    conversion = planned(make_mtp_bailing.random(tmp_path / "t", q_lora_rank=160))
    assert conversion.published.spec.latent_attention == LatentAttention(96, 48, 160)
    roles = {tensor.key[0] for tensor in conversion.plan.tensors}
    assert {Role.ATTN_Q_A, Role.ATTN_Q_A_NORM, Role.ATTN_Q_B} <= roles and Role.ATTN_Q not in roles
    source = without(make_mtp_bailing.random(tmp_path / "u"), f"{LAYER}attention.q_proj")
    assert "layers.4.attention.q_proj.weight: missing (ATTN_Q of layer 4)" in refusal(planned, source)


def test_only_the_head_and_what_it_shares_is_read(source: Path) -> None:
    names = read_published(source).checkpoint.tensors
    assert {name for name in names if not name.startswith(LAYER)} == {
        "lm_head.weight",
        "model.norm.weight",
        "model.word_embeddings.weight",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_lora_rank": DELETE}, "latent_attention.kv_rank: missing (looked at kv_lora_rank)"),
        ({"head_dim": DELETE}, "delta_attention.head_dim: missing (looked at head_dim)"),
        ({"short_conv_kernel_size": DELETE}, "delta_attention.kernel_size: missing"),
        ({"kda_lower_bound": DELETE}, "delta_attention.lower_bound: missing (looked at kda_lower_bound)"),
        ({"kda_lower_bound": 5.0}, "kda_lower_bound: found 5.0, expected a finite number below 0"),
        ({"kda_safe_gate": False}, "kda_safe_gate: found False, expected True: llama.cpp has no other"),
        ({"no_kda_lora": DELETE}, "no_kda_lora: missing"),
        ({"gated_attention_proj_granularity_type": "elementwise"}, "found 'elementwise', expected 'head_wise'"),
        ({"layer_group_size": DELETE}, "delta_attention.layers: missing (looked at layer_group_size)"),
        ({"layer_group_size": 3}, "layer_group_size: found 3, expected a divisor of num_hidden_layers = 4"),
        ({"layer_types": ["full_attention"] * 4}, "expected full_attention for every layer_group_size = 2"),
        ({"expert_swiglu_limit_list": [0.0] * 5}, "llama.cpp keeps a limit for each layer"),
        ({"moe_shared_expert_intermediate_size": 48}, "found 48, expected 32, 1 shared experts of 32"),
        ({"score_function": "softmax"}, "score_function: found 'softmax', expected 'sigmoid'"),
        ({"use_bias": True}, "use_bias: found True, expected False"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: found 1, expected 4"),
        ({"rope_theta": DELETE}, "rope theta: missing"),
        ({"num_nextn_predict_layers": 0}, "--set num_nextn_predict_layers=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(make_mtp_bailing.random(tmp_path / "t"), **change))


# --- planted faults ---

FAULTS: dict[str, tuple[Edit, str]] = {
    "no gate": (lambda draft: draft.tensors.pop(f"blk.{DEPTH}.attn_gate.weight"), "attn_gate.weight: missing"),
    "gates of other heads": (
        lambda draft: draft.put(f"blk.{DEPTH}.attn_gate.weight", draft.weights(f"blk.{DEPTH}.attn_gate.weight")[::-1]),
        f"blk.{DEPTH}.attn_gate.weight (F32): ",
    ),
    "a gate without a bound": (lambda draft: draft.set("kda.safe_gate", False), "kda.safe_gate: found"),
    "no state anywhere": (
        lambda draft: draft.set("attention.head_count_kv", (1,) * (DEPTH + 1)),
        "the checkpoint has (True, False, True, False)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(source: Path, tmp_path: Path, name: str) -> None:
    edit, says = FAULTS[name]
    convert(job(source, tmp_path / "good.gguf"))
    draft = Draft.of(tmp_path / "good.gguf")
    edit(draft)
    (gate, _) = doctor(draft.write(tmp_path / "bad.gguf"), source, source)
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


# --- the cell ---


def as_ling(spec: DrafterSpec) -> DrafterSpec:
    depth, width = spec.target_layer_count, spec.feed_forward_size
    assert spec.experts is not None
    return replace(
        spec,
        kind="mtp-bailingmoe3",
        experts=replace(spec.experts, shared_feed_forward_size=width),
        delta_attention=DeltaAttention(4, 16, -5.0, tuple(i % 2 == 0 for i in range(depth))),
    )


def test_golden_keys() -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / f"{CELL.runtime}-{CELL.kind}.json").read_text())
    assert golden == {"keys": shown(write(CELL, as_ling(SPEC))), "tensors": tensor_names(CELL)}


@given(spec=specs())
def test_what_is_written_comes_back(spec: DrafterSpec) -> None:
    assert_comes_back(CELL, as_ling(spec))


def test_what_each_layer_keeps_is_asked_for() -> None:
    keys = {name: entry for name, entry in keys_of(CELL, as_ling(SPEC)).items() if not name.endswith("head_count_kv")}
    with pytest.raises(BadFact, match=r"delta_attention\.layers"):
        spec_from({"kind": CELL.kind, **read(CELL, keys)})


# --- in torch ---


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(source: Path) -> None:
    """The decoder layer as transformers computes it, with its gates."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers.models.bailing_hybrid")
    from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp, shifted
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.text import FINAL
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    torch.set_num_threads(1)
    tokens, at, published = list(range(7, 47)), torch.arange(40), read_published(source)
    target = TorchTarget(source)
    drafter: Mtp = reference(published.spec, checkpoint_weights(published))
    layer = target.model.get_decoder().layers[DEPTH - 1]
    layer.load_state_dict(head_state(source))
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    embedding = drafter.tables(target.tables).embedding[torch.tensor(tokens)]
    joined = drafter.head.join(embedding, shifted(states))
    rotary = target.model.get_decoder().rotary_emb(joined[None], position_ids=at[None])
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    nothing = torch.zeros(4, 0, 56), torch.zeros(4, 0, 48)
    with torch.no_grad():
        expected = layer(joined[None], position_embeddings=rotary, attention_mask=mask, position_ids=at[None])
        found, _ = drafter.head(embedding, shifted(states), at, nothing, torch.ones(40, 40, dtype=torch.bool).tril())
        normed = drafter.head.norm(expected)
    torch.testing.assert_close(found, normed.reshape(found.shape), atol=2e-4, rtol=2e-3)


RENAMED = {".attention.": ".self_attn.", ".dense.": ".o_proj.", "expert_bias": "e_score_correction_bias"}


def head_state(source: Path) -> dict[str, Any]:
    """The head's layer by transformers' names, which has the experts in two tensors."""
    import torch

    state = {}
    for name, array in load_file(source / "model.safetensors").items():
        if name.startswith(LAYER):
            short = name.removeprefix(LAYER[:-1])
            for old, new in RENAMED.items():
                short = short.replace(old, new)
            state[short[1:]] = torch.from_numpy(array.astype(np.float32))
    experts = {name: state.pop(name) for name in list(state) if ".experts." in name}
    gate, up, down = (
        torch.stack([experts[f"mlp.experts.{i}.{part}_proj.weight"] for i in range(8)])
        for part in ("gate", "up", "down")
    )
    outside = ("eh_proj", "enorm", "hnorm", "final_layernorm")
    own = {name: tensor for name, tensor in state.items() if not name.startswith(outside)}
    return {**own, "mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}
