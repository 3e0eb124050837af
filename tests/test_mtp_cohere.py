"""The MTP head of Cohere2-MoE: what is read of it, what is refused, and its layer as transformers computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_cohere
import numpy as np
import pytest
from head_layer import head_and_layer
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file
from test_mtp import refusal

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Outcome

DEPTH = 5
OWN = f"model.layers.{DEPTH}."
SLIDES = (False, True, True, True, False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_cohere.random(tmp_path_factory.mktemp("cohere") / "target")


@pytest.fixture(scope="module")
def centred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_cohere.centred(tmp_path_factory.mktemp("cohere-centred") / "target")


def converted(source: Path) -> Path:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return out


def keys_of(path: Path) -> dict[str, Any]:
    return {key.removeprefix("cohere2moe."): entry.value for key, entry in read_gguf(path).keys.items()}


def test_the_file_says_what_the_target_s_own_layers_are(source: Path) -> None:
    """A5-1: a window and its layers, the first layer's width, the scale of logits; the head has none of the window."""
    file = converted(source)
    keys, found = keys_of(file), read_gguf(file)
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["leading_dense_block_count"]) == (DEPTH + 1, 1, 1)
    assert (keys["attention.sliding_window"], keys["attention.sliding_window_pattern"]) == (32, SLIDES)
    assert (keys["feed_forward_length"], keys["expert_feed_forward_length"], keys["logit_scale"]) == (96, 32, 0.25)
    assert (keys["expert_gating_func"], keys["expert_weights_norm"]) == (2, False)
    assert keys["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert not {"attention.layer_norm_epsilon", "expert_shared_count"} & set(keys)
    assert len(found.tensors) == 13 + 2
    rows = load_file(source / "model.safetensors")[f"{OWN}self_attn.q_proj.weight"]  # neighbours, as llama.cpp's graph
    np.testing.assert_array_equal(found.tensor_bytes(f"blk.{DEPTH}.attn_q.weight").view("<f4"), rows.ravel())
    assert inspect(file).kind == "mtp-cohere2moe"
    (structure, pairing) = doctor(file, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


def test_norms_that_take_the_mean_away_have_a_key_of_their_own(centred: Path) -> None:
    file = converted(centred)
    keys = keys_of(file)
    assert keys["attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert "attention.layer_norm_rms_epsilon" not in keys
    assert (keys["expert_shared_count"], keys["expert_shared_feed_forward_length"]) == (2, 64)
    (structure, _) = doctor(file, centred, centred)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": DELETE}, "rope theta: missing"),
        ({"rms_norm_eps": DELETE, "layer_norm_eps": DELETE}, "norm_epsilon: missing (looked at rms_norm_eps or layer"),
        ({"expert_selection_fn": DELETE}, "experts.scoring: missing (looked at expert_selection_fn)"),
        ({"expert_selection_fn": "tanh"}, "expert_selection_fn: found 'tanh', expected one of softmax, sigmoid"),
        ({"expert_selection_fn": "softmax"}, "norm_topk_prob: found False beside softmax"),
        ({"norm_topk_prob": DELETE}, "experts.normed: missing"),
        ({"logit_scale": DELETE}, "logit_scale: missing"),
        ({"sliding_window": DELETE}, "trunk.window_size: missing (looked at sliding_window)"),
        ({"layer_types": DELETE}, "trunk.sliding_layers: missing (looked at layer_types)"),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types: found (False, False, False, False), expected one entry",
        ),
        (
            {"layer_types": ["full_attention"] * 5},
            "trunk.sliding_layers: llama.cpp stops at a target of which no layer",
        ),
        ({"layer_types": ["chunked"] * 5}, "layer_types: found chunked, expected sliding_attention or full_attention"),
        ({"first_k_dense_replace": DELETE}, "trunk.dense_layer_count: missing (looked at first_k_dense_replace or mlp"),
        (
            {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 3},
            "first_k_dense_replace: found 1, expected 2; as many dense layers as mlp_layer_types has",
        ),
        (
            {"mlp_layer_types": ["sparse", "dense"] * 2},
            "mlp_layer_types: found ['sparse', 'dense', 'sparse', 'dense'], expected 5: dense ones, then sparse",
        ),
        ({"prefix_dense_sliding_window_pattern": 4}, "prefix_dense_sliding_window_pattern: found 4, expected 1"),
        ({"shared_expert_combination_strategy": "sum"}, "shared_expert_combination_strategy: found 'sum'"),
        ({"use_parallel_block": False}, "use_parallel_block: found False"),
        ({"num_shared_experts": 1}, "shared_experts.up_proj.weight: missing"),
        ({"num_nextn_predict_layers": 0}, "--set num_nextn_predict_layers=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(make_mtp_cohere.random(tmp_path / "t"), **change))


def test_a_list_says_as_much_as_a_count(source: Path, tmp_path: Path) -> None:
    changed = {"first_k_dense_replace": DELETE, "mlp_layer_types": ["dense", *["sparse"] * 4]}
    other = planned(reconfigure(make_mtp_cohere.random(tmp_path / "t"), **changed))
    assert (other.published.spec, other.warnings) == (planned(source).published.spec, ())


def test_a_shared_expert_that_nobody_counts_is_named(tmp_path: Path) -> None:
    uncounted = reconfigure(make_mtp_cohere.centred(tmp_path / "t"), num_shared_experts=0)
    assert "shared_experts.up_proj.weight: unknown tensor" in refusal(planned, uncounted)


def test_a_head_without_a_norm_of_its_own_takes_its_target_s(source: Path, tmp_path: Path) -> None:
    """As llama.cpp's graph does; anything else of a head has to be there."""
    bare = without(make_mtp_cohere.random(tmp_path / "t"), f"{OWN}shared_head.norm")
    assert len(planned(bare).plan.tensors) == len(planned(source).plan.tensors) - 1
    assert f"layers.{DEPTH}.eh_proj" not in refusal(planned, without(bare, f"{OWN}hnorm"))


def changed_key(file: Path, out: Path, name: str, **changes: Any) -> Path:
    """The file with one key changed."""
    found = read_gguf(file)

    def entry(entry: KeyValue) -> KeyValue:
        return replace(entry, **changes) if entry.key == f"cohere2moe.{name}" else entry

    write_gguf(out, list(map(entry, found.keys.values())), list(found.tensors.values()), lambda t: found.slabs(t.name))
    return out


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("attention.layer_norm_epsilon", {"key": "cohere2moe.attention.layer_norm_rms_epsilon"}, "layer_norm_epsilon"),
        ("expert_gating_func", {"value": 2}, "cohere2moe.expert_gating_func: found 'sigmoid'"),
        ("attention.sliding_window_pattern", {"value": (True, *SLIDES[1:])}, "sliding_window_pattern: found"),
        ("logit_scale", {"value": 0.5}, "cohere2moe.logit_scale: found 0.5"),
    ],
)
def test_doctor_names_what_differs(
    centred: Path, tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    """The first makes RMS norms of norms that take the mean away: both have the same one weight."""
    bad = changed_key(converted(centred), tmp_path / "bad.gguf", name, **changes)
    (structure, *_) = doctor(bad, centred, centred)
    assert structure.outcome is Outcome.FAIL and any(said in line for line in structure.details), structure.details


@pytest.mark.parametrize("family", ["source", "centred"])
def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Side by side under one norm of either kind, rotated neighbours, sigmoid and softmax, the mean with the shared
    experts. Only layers that slide are rotated in transformers, so the layer slides, over everything there is."""
    torch = pytest.importorskip("torch")
    types = [("sliding" if slides else "full") + "_attention" for slides in (*SLIDES, True)]
    changes = {"layer_types": types, "sliding_window": 2048}
    found, expected = head_and_layer(request.getfixturevalue(family), tmp_path / "longer", DEPTH, **changes)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
