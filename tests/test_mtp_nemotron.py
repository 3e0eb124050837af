"""The MTP head of Nemotron-H with experts: two layers of the checkpoint in one of the file, and a target of three kinds
of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_nemotron
import numpy as np
import pytest
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file
from test_mtp import refusal

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.verdict import Outcome

DEPTH = 5  # M E M * E
ARCH = "nemotron_h_moe."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_nemotron.random(tmp_path_factory.mktemp("nemotron") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> Path:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return out


def keys_of(file: GGUFFile) -> dict[str, Any]:
    return {key.removeprefix(ARCH): entry.value for key, entry in file.keys.items()}


def test_the_file_says_what_each_layer_of_the_target_is(source: Path, file: Path) -> None:
    """A5-1: the head's layer, the last, has keys and values and a feed-forward; a Mamba layer has neither."""
    found = read_gguf(file)
    keys = keys_of(found)
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (DEPTH + 1, 1)
    assert keys["attention.head_count_kv"] == (0, 0, 0, 2, 0, 2)
    assert keys["feed_forward_length"] == (0, 32, 0, 0, 32, 32)
    assert (keys["ssm.inner_size"], keys["ssm.state_size"], keys["ssm.time_step_rank"]) == (128, 16, 8)
    assert (keys["ssm.group_count"], keys["ssm.conv_kernel"], keys["moe_latent_size"]) == (2, 4, 48)
    assert keys["attention.layer_norm_epsilon"] == keys["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert not {key for key in keys if key.startswith("rope.")}
    assert len(found.tensors) == 18 + 3
    bias = load_file(source / "model.safetensors")["mtp.layers.1.mixer.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(found.tensor_bytes(f"blk.{DEPTH}.exp_probs_b.bias").view("<f4"), bias)
    assert inspect(file).kind == "mtp-nemotron_h_moe"
    (structure, pairing) = doctor(file, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


def test_experts_as_wide_as_the_model_have_no_projections_around_them(tmp_path: Path) -> None:
    """Nemotron 3 Nano."""
    source, out = make_mtp_nemotron.random(tmp_path / "t", moe_latent_size=None), tmp_path / "out.gguf"
    convert(job(source, out))
    found = read_gguf(out)
    assert planned(source).warnings == () and "moe_latent_size" not in keys_of(found)
    assert found.tensors[f"blk.{DEPTH}.ffn_up_exps.weight"].shape == (8, 32, 64)
    assert not [name for name in found.tensors if "latent" in name]


def test_newer_names_of_layers_say_the_same(source: Path, tmp_path: Path) -> None:
    """transformers 5 saves lists of names where the published configs have patterns of letters."""
    types = ["linear_attention", "moe", "mamba", "full_attention", "moe"]
    lists = {"layers_block_type": types, "mtp_layers_block_type": ["attention", "moe"]}
    gone = dict.fromkeys(("hybrid_override_pattern", "mtp_hybrid_override_pattern"), DELETE)
    other = planned(reconfigure(make_mtp_nemotron.random(tmp_path / "t"), **lists, **gone))
    assert (other.published.spec, other.warnings) == (planned(source).published.spec, ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"hybrid_override_pattern": DELETE},
            "trunk.mixture_layers: missing (looked at hybrid_override_pattern or lay",
        ),
        ({"hybrid_override_pattern": "MEM*-"}, "hybrid_override_pattern: found -, expected Mamba, attention and mixt"),
        (
            {"hybrid_override_pattern": "MEM*"},
            "hybrid_override_pattern: found 4 layers, expected num_hidden_layers = 5",
        ),
        ({"mtp_hybrid_override_pattern": "*-"}, "mtp_hybrid_override_pattern: found '*-', expected '*E'"),
        ({"mtp_layers_block_type": ["moe", "attention"]}, "mtp_layers_block_type: found moe, attention, expected"),
        ({"norm_eps": 1e-6}, "layer_norm_epsilon = 1e-05, norm_eps = 1e-06"),
        ({"ssm_state_size": DELETE}, "state_space.state_size: missing (looked at ssm_state_size)"),
        ({"moe_shared_expert_intermediate_size": DELETE}, "experts.shared_feed_forward_size: missing"),
        ({"n_shared_experts": 2}, "n_shared_experts: found 2, expected 1"),
        ({"moe_latent_size": None}, "fc1_latent_proj.weight: unknown tensor"),
        ({"attention_bias": True}, "attention_bias: found True, expected False"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act: found 'silu', expected 'relu2'"),
        ({"sliding_window": 64}, "sliding_window: found 64, expected None"),
        ({"num_nextn_predict_layers": 2}, "2, but the tensors are mtp.layers.0, mtp.layers.1, expected two layers for"),
        ({"num_nextn_predict_layers": 0}, "--set num_nextn_predict_layers=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(make_mtp_nemotron.random(tmp_path / "t"), **change))


def test_declared_but_absent_or_half_of_it(tmp_path: Path) -> None:
    """A5-2: quantized copies keep the count of a head that they were saved without."""
    source = without(make_mtp_nemotron.random(tmp_path / "t"), "mtp.layers.1.")
    assert "1, but the tensors are mtp.layers.0, expected two layers for each" in refusal(
        planned, reconfigure(source, num_nextn_predict_layers=1)
    )
    said = refusal(planned, without(source, "mtp."))
    assert "num_nextn_predict_layers: 1, but there is no tensor of an MTP head" in said


def test_a_puzzle_s_head_is_refused_by_name(tmp_path: Path) -> None:
    """Its layers have widths of their own, and llama.cpp's converter drops its head."""
    source = make_mtp_nemotron.random(tmp_path / "t", architectures=["NemotronHPuzzleForCausalLM"])
    said = "the MTP head of NemotronHPuzzleForCausalLM, no runtime loads it: llama.cpp's converter drops it"
    assert said in refusal(planned, source)


def test_an_absent_expert_is_named(tmp_path: Path) -> None:
    source = without(make_mtp_nemotron.random(tmp_path / "t"), "mtp.layers.1.mixer.experts.5.up_proj")
    assert "mtp.layers.1.mixer.experts.up_proj.weight: expert 5 and 0 more are absent" in refusal(planned, source)


def test_only_the_head_and_what_it_shares_is_read(source: Path) -> None:
    """T-64."""
    names = read_published(source).checkpoint.tensors
    assert {name.split(".")[0] for name in names} == {"mtp", "backbone", "lm_head"}
    assert not [name for name in names if name.startswith("backbone.layers.")]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("attention.head_count_kv", (0, 0, 0, 2, 0, 0), "found [0, 0, 0, 2, 0, 0], expected one number: the head's"),
        ("attention.head_count_kv", (0, 0, 0, 2, 0, 1), "found [0, 0, 0, 2, 0, 1], expected one number: the head's"),
        ("feed_forward_length", (0, 32, 0, 32, 32, 32), "feed_forward_length: found"),
        ("ssm.inner_size", 100, "100 is no multiple of 8 Mamba heads"),
    ],
)
def test_doctor_names_what_differs(source: Path, file: Path, tmp_path: Path, name: str, value: Any, said: str) -> None:
    """The third makes a mixture of an attention layer of the target."""
    found, bad = read_gguf(file), tmp_path / "bad.gguf"

    def entry(entry: KeyValue) -> KeyValue:
        return replace(entry, value=value) if entry.key == f"{ARCH}{name}" else entry

    write_gguf(bad, list(map(entry, found.keys.values())), list(found.tensors.values()), lambda t: found.slabs(t.name))
    (structure, *_) = doctor(bad, source, source)
    assert structure.outcome is Outcome.FAIL and any(said in line for line in structure.details), structure.details


def test_the_reference_is_two_layers_of_transformers_with_the_head_s_weights(source: Path, tmp_path: Path) -> None:
    """Nothing rotated, squared ReLU, a width of the experts' own, the bias of the choice, the scale, the shared one."""
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    from convert_drafter.converters.verify.in_torch.target import load_model
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    longer = make_mtp_nemotron.random(tmp_path / "longer")
    tensors = load_file(longer / "model.safetensors")
    moved = {
        f"backbone.layers.{DEPTH + int(name[11])}.{name[13:]}" if name.startswith("mtp.layers.") else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"))
    }
    save_file(moved, longer / "model.safetensors")
    reconfigure(longer, hybrid_override_pattern="MEM*E*E", num_hidden_layers=DEPTH + 2, num_nextn_predict_layers=0)
    layers = load_model(longer, "float32").get_decoder().layers[DEPTH:]
    published = read_published(source)
    drafter = reference(published.spec, checkpoint_weights(published))
    x, at = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)), torch.arange(40)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = layers[1](layers[0](x[None], attention_mask=visible[None, None]))[0]
        layer = drafter.head.layers[0]
        found = layer(x, at, layer.keys_values(x, at), visible)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
