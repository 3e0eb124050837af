"""Hunyuan-V3's MTP head: what is read of it, what is refused, and what llama.cpp would not miss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_mtp_hunyuan
import numpy as np
import pytest
from head_layer import head_and_layer
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file
from test_mtp import refusal

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Outcome

DEPTH = 3
OWN = f"model.layers.{DEPTH}."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_hunyuan.random(tmp_path_factory.mktemp("hunyuan") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return out


def test_the_file_says_what_the_target_s_own_layers_are(source: Path, file: Path) -> None:
    """A5-1."""
    found = read_gguf(file)
    keys = {key.removeprefix("hy_v3."): entry.value for key, entry in found.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["feed_forward_length"]) == (DEPTH + 1, 1, 96)
    assert (keys["expert_feed_forward_length"], keys["expert_shared_feed_forward_length"]) == (32, 32)
    assert (keys["expert_gating_func"], keys["expert_weights_norm"]) == (2, True)
    assert keys["expert_weights_scale"] == pytest.approx(2.826)
    assert keys["rope.dimension_count"] == keys["attention.key_length"] == 32
    assert len(found.tensors) == 20 + 3
    bias = load_file(source / "model.safetensors")[f"{OWN}mlp.expert_bias"]
    np.testing.assert_array_equal(found.tensor_bytes(f"blk.{DEPTH}.exp_probs_b").view("<f4"), bias)
    assert inspect(file).kind == "mtp-hy_v3"
    (structure, pairing) = doctor(file, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": DELETE}, "rope theta: missing"),
        ({"head_dim": DELETE}, "head_dim: missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1; llama.cpp rotates whole heads"),
        ({"route_norm": DELETE}, "experts.normed: missing (looked at route_norm)"),
        ({"router_scaling_factor": DELETE}, "experts.scale: missing (looked at router_scaling_factor)"),
        ({"num_shared_experts": 0}, "num_shared_experts: found 0, expected a number above 0"),
        ({"expert_hidden_dim": 48}, "moe_intermediate_size = 32, expert_hidden_dim = 48"),
        ({"intermediate_size": DELETE}, "trunk.feed_forward_size: missing (looked at intermediate_size)"),
        ({"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid: found False"),
        ({"qk_norm": False}, "qk_norm: found False"),
        ({"attention_bias": True}, "attention_bias: found True"),
        ({"moe_router_enable_expert_bias": False}, "mlp.expert_bias: unknown tensor"),
        ({"rope_parameters__rope_type": "yarn", "rope_parameters__factor": 2.0}, "original_context_length: missing"),
        ({"num_nextn_predict_layers": 2}, "but the tensors are layers.3.eh_proj, expected as many layers, from 3 on"),
        ({"num_nextn_predict_layers": DELETE}, "--set num_nextn_predict_layers=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(make_mtp_hunyuan.random(tmp_path / "t"), **change))


def test_nothing_of_the_config_is_left_unread(source: Path) -> None:
    assert planned(source).warnings == ()


@pytest.mark.parametrize("gone", ["mlp.expert_bias", "final_layernorm", "mlp.shared_mlp.up_proj", "eh_proj"])
def test_an_absent_tensor_is_named(tmp_path: Path, gone: str) -> None:
    source = without(make_mtp_hunyuan.random(tmp_path / "t"), OWN + gone)
    assert gone in refusal(planned, source)


def spoilt(
    file: Path,
    out: Path,
    keep: Callable[[StoredTensor], bool] = lambda tensor: True,
    keys: Callable[[KeyValue], bool] = lambda entry: True,
) -> Path:
    """The file without some tensors or keys."""
    found = read_gguf(file)
    kept = [tensor for tensor in found.tensors.values() if keep(tensor)]
    told = [entry for entry in found.keys.values() if keys(entry)]
    write_gguf(out, told, kept, lambda tensor: found.slabs(tensor.name))
    return out


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("exp_probs_b", "mlp.expert_bias: in the checkpoint, missing in the file (FFN_ROUTER_BIAS of layer 3)"),
        (
            "nextn.shared_head_norm.weight",
            "blk.3.nextn.shared_head_norm.weight: missing (NEXTN_OUTPUT_NORM of layer 3)",
        ),
        ("ffn_gate_inp.weight", "blk.3.ffn_gate_inp.weight: missing (FFN_ROUTER of layer 3)"),
    ],
)
def test_doctor_names_what_llama_cpp_goes_without(
    source: Path, file: Path, tmp_path: Path, tensor: str, said: str
) -> None:
    """T-19: llama.cpp's loader takes the whole feed-forward and the norm for optional and drafts without them."""
    bad = spoilt(file, tmp_path / "bad.gguf", lambda stored: not stored.name.endswith(f".{tensor}"))
    (structure, *_) = doctor(bad, source, source)
    assert structure.outcome is Outcome.FAIL and any(said in line for line in structure.details), structure.details


def test_doctor_names_a_key_that_llama_cpp_goes_without(file: Path, tmp_path: Path) -> None:
    """Without it the shares of the chosen experts do not add up to one."""
    bad = spoilt(file, tmp_path / "bad.gguf", keys=lambda entry: not entry.key.endswith("expert_weights_norm"))
    (structure, *_) = doctor(bad)
    assert any("hy_v3.expert_weights_norm: missing" in line for line in structure.details)


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(source: Path, tmp_path: Path) -> None:
    """Norms of queries and keys, the bias of the choice, shares that add up to one, the scale, the shared expert."""
    torch = pytest.importorskip("torch")
    found, expected = head_and_layer(source, tmp_path / "longer", DEPTH)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
