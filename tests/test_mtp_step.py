"""The heads of Step-3.5: what is read of the config, what is refused, and what is found in a spoilt file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_step
import numpy as np
import pytest
from make_mtp_step import FULL, SLIDING, TYPES
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file

from convert_drafter.converters import WrongInput, convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_file import write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.verdict import Outcome

DEPTH, COUNT = 5, 3
NORMS = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "nextn.enorm", "nextn.hnorm", "nextn.shared_head_norm")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_step.random(tmp_path_factory.mktemp("step") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> GGUFFile:
    out = source.parent / "heads.gguf"
    convert(job(source, out))
    return read_gguf(out)


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        planned(source, **options)
    return str(caught.value)


def rewritten(file: GGUFFile, out: Path, **values: Any) -> Path:
    """The file with other values of some keys, named without their architecture, `.` as `__`."""
    wanted = {f"step35.{name.replace('__', '.')}": value for name, value in values.items()}
    keys = [replace(k, value=wanted[k.key]) if k.key in wanted else k for k in file.keys.values()]
    write_gguf(out, keys, list(file.tensors.values()), lambda tensor: file.slabs(tensor.name))
    return out


# --- the file ---


def test_three_heads_with_an_output_of_their_own(file: GGUFFile) -> None:
    """A5-1: lists have an entry for each layer, the heads' last."""
    keys = {key.removeprefix("step35."): entry.value for key, entry in file.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (DEPTH + COUNT, COUNT)
    assert keys["attention.head_count"] == (4, 6, 6, 6, 4, 6, 6, 6)
    assert keys["attention.sliding_window_pattern"] == tuple(kind == SLIDING for kind in TYPES)
    assert (keys["rope.freq_base"], keys["rope.freq_base_swa"]) == (5e6, 1e4)
    heads = {name for name in file.tensors if name.startswith("blk.")}
    assert len(heads) == COUNT * 17 and min(heads) > f"blk.{DEPTH}"
    own = file.tensor_bytes(f"blk.{DEPTH}.nextn.shared_head_head.weight")
    assert not np.array_equal(own, file.tensor_bytes("output.weight"))


def test_every_norm_is_the_checkpoint_s_plus_one(source: Path, file: GGUFFile) -> None:
    """P-42."""
    tensors = load_file(source / "model.safetensors")
    for ours, theirs in (("nextn.hnorm", "hnorm"), ("nextn.shared_head_norm", "transformer.shared_head.norm")):
        stored = file.tensor_bytes(f"blk.6.{ours}.weight").view("<f4")
        np.testing.assert_array_equal(stored, tensors[f"model.layers.6.{theirs}.weight"].astype(np.float32) + 1)
    means = [file.tensor_bytes(f"blk.{i}.{name}.weight").view("<f4").mean() for i in (5, 6, 7) for name in NORMS]
    assert all(0.8 < mean < 1.2 for mean in means)


def test_a_file_comes_back_as_it_was_published(source: Path, file: GGUFFile) -> None:
    published = read_published(source)
    assert inspect(file.path).kind == published.spec.kind == "mtp-step35"
    assert inspect(file.path).runtimes == {"llama.cpp": ""}
    (structure, pairing) = doctor(file.path, source, source)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())
    assert pairing.outcome is Outcome.PASS


def test_nobody_leaves_a_key_unread(source: Path) -> None:
    conversion = planned(source)
    assert conversion.warnings == ()
    spec = conversion.published.spec
    assert (spec.layers, spec.draft_length) == (range(5, 8), COUNT)
    assert (spec.head_count, spec.kv_head_count, spec.window and spec.window.size) == (6, 2, 24)
    assert (spec.rope.theta, spec.rope.dimensions) == (1e4, 32)
    assert spec.trunk is not None and spec.trunk.expert_clamps == (0.0, 0.0, 0.0, 7.0, 7.0)


def test_a_multimodal_config_gives_the_same_facts(source: Path, tmp_path: Path) -> None:
    """Step-3.7: the text model's facts in an object of their own."""
    other = make_mtp_step.random(tmp_path / "t")
    text = json.loads((other / "config.json").read_text())
    outer = {"architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7", "image_token_id": 7}
    (other / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {"width": 8}}))
    assert read_published(other).spec == read_published(source).spec
    assert planned(other).warnings == ()


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"layer_types": TYPES[:DEPTH]},
            "layer_types: found 5 entries, expected 8: the target's 5 layers and 3 of its",
        ),
        ({"layer_types": [*TYPES[:-1], FULL]}, "heads of other layers are not converted"),
        ({"layer_types": DELETE}, "trunk.sliding_layers: missing (looked at layer_types)"),
        (
            {"partial_rotary_factors": [1.0] * 8},
            "partial_rotary_factors: found 1.0 of layer 0, expected 8 of them, 0.5",
        ),
        ({"partial_rotary_factors": DELETE}, "rope.dimensions: missing (looked at partial_rotary_factors)"),
        ({"rope_theta": DELETE}, "rope.theta: missing (looked at rope_theta)"),
        ({"rope_theta": [1e4] * 5}, "rope_theta: found 5 entries, expected 8"),
        (
            {"rope_theta": [5e6, 1e4, 1e4, 1e4, 5e6, 1e4, 1e4, 2e4]},
            "rope_theta: found 10000, 20000 of sliding_attention, expected one",
        ),
        ({"yarn_only_types": [FULL, SLIDING]}, "yarn_only_types: found"),
        ({"rope_scaling__rope_type": "yarn"}, "rope_scaling.rope_type: found 'yarn'"),
        ({"rope_scaling__low_freq_factor": DELETE}, "rope.llama3.low_freq_factor: missing"),
        ({"attention_other_setting__head_dim": 64}, "attention_other_setting.head_dim: found 64"),
        ({"sink": True}, "sink: found True, expected False; llama.cpp's Step-3.5 has no attention sinks"),
        ({"zero_centered": False}, "zero_centered: found False"),
        ({"moe_layers_enum": "2,3,4,5"}, "moe_layers_enum: found 5 among the mixtures"),
        (
            {"swiglu_limits_shared": [0.0] * 7 + [16.0]},
            "swiglu_limits_shared: found [0.0, 0.0, 16.0] for the MTP heads",
        ),
        ({"swiglu_limits": [0.0]}, "swiglu_limits: found [0.0], expected a list of 5 or 8 numbers"),
        ({"sliding_window": None}, "window.size: missing (looked at sliding_window)"),
        ({"moe_intermediate_size": DELETE}, "trunk.expert_feed_forward_size: missing"),
        ({"use_qk_norm": False}, "use_qk_norm: found False"),
        ({"use_head_wise_attn_gate": False}, "use_head_wise_attn_gate: found False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fact_that_is_missing_or_another_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what llama.cpp's converter would take instead is no fact."""
    assert said in refusal(reconfigure(make_mtp_step.random(tmp_path / "t"), **change))


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (2, "num_nextn_predict_layers: 2, but the tensors are layers.5.eh_proj, layers.6.eh_proj, layers.7.eh_proj"),
        (DELETE, "3: the checkpoint has tensors of as many; if that is right, give it with --set num_nextn"),
    ],
)
def test_heads_are_counted_by_their_tensors(tmp_path: Path, count: Any, said: str) -> None:
    """A5-2, both ways."""
    source = reconfigure(make_mtp_step.random(tmp_path / "t"), num_nextn_predict_layers=count)
    assert said in refusal(source)


def test_a_head_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = without(make_mtp_step.random(tmp_path / "t"), "model.layers.7.")
    assert "num_nextn_predict_layers: 3, but the tensors are layers.5.eh_proj, layers.6.eh_proj" in refusal(source)


def test_one_theta_of_all_layers_and_no_scaling(tmp_path: Path) -> None:
    source = reconfigure(make_mtp_step.random(tmp_path / "t"), rope_theta=1e4, rope_scaling=None)
    conversion = planned(source)
    spec = conversion.published.spec
    assert spec.trunk is not None and (spec.rope.theta, spec.trunk.rope_theta, spec.trunk.llama3) == (1e4, 1e4, None)
    assert "rope_freqs.weight" not in {tensor.name for tensor in conversion.plan.tensors}


def test_a_single_head_goes_on_by_itself(tmp_path: Path) -> None:
    """Copies that keep the first head alone; llama.cpp chains only several."""
    spec = planned(make_mtp_step.random(tmp_path / "t", **make_mtp_step.cut(1))).published.spec
    assert (spec.layer_count, spec.draft_length) == (1, 3)


# --- what is found in a file ---


def test_norms_without_the_one_are_found(source: Path, file: GGUFFile, tmp_path: Path) -> None:
    """P-42."""

    def data(tensor: Any) -> Any:
        values = file.tensor_bytes(tensor.name).view("<f4")
        return [values - np.float32(1) if "norm.weight" in tensor.name else values]

    out = tmp_path / "norms.gguf"
    write_gguf(out, list(file.keys.values()), list(file.tensors.values()), data)
    (structure,) = doctor(out, source=source)
    assert structure.outcome is Outcome.FAIL
    told = [line for line in structure.details if "it is the checkpoint's minus 1" in line]
    assert len(told) == COUNT * len(NORMS) + 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nextn_predict_layers": 2}, "another key says target_layer_count = 6"),
        ({"nextn_predict_layers": 4}, "another key says target_layer_count = 4"),
        ({"block_count": 7}, "another key says target_layer_count = 4"),
        ({"attention__sliding_window_pattern": (False,) * 8}, "for the MTP heads, expected all to slide"),
        ({"attention__head_count": (4, 6, 6, 6, 4, 6, 6, 4)}, "found [4, 6] for the 3 MTP heads"),
    ],
    ids=["one head less", "one head more", "one layer less", "window lost", "a head of another width"],
)
def test_a_wrong_count_and_a_lost_window_are_found(
    file: GGUFFile, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    """A5-2, T-55: without the checkpoint."""
    (structure,) = doctor(rewritten(file, tmp_path / "bad.gguf", **values))
    assert structure.outcome is Outcome.FAIL
    assert any(said in line for line in structure.details), structure.details


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attention__sliding_window": 12}, "step35.attention.sliding_window: found 12, the checkpoint has 24"),
        ({"rope__freq_base_swa": 5e6}, "step35.rope.freq_base_swa: found 5000000.0, the checkpoint has 10000.0"),
    ],
)
def test_another_window_or_theta_is_found_beside_the_checkpoint(
    source: Path, file: GGUFFile, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    (structure,) = doctor(rewritten(file, tmp_path / "bad.gguf", **values), source=source)
    assert structure.outcome is Outcome.FAIL
    assert any(line.startswith(said) for line in structure.details), structure.details
