"""The heads of MiMo-V2: one matrix of three, values narrower than keys, a count that no key states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import make_mtp_mimo
import ml_dtypes
import numpy as np
import pytest
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import WrongInput, convert, doctor, inspect
from convert_drafter.converters.checkpoint import open_checkpoint, read_rows
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.verdict import Outcome

DEPTH, COUNT = 6, 3
QKV = "model.mtp.layers.1.self_attn.{}_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_mimo.random(tmp_path_factory.mktemp("mimo") / "target")


@pytest.fixture(scope="module")
def file(source: Path) -> GGUFFile:
    out = source.parent / "heads.gguf"
    convert(job(source, out))
    return read_gguf(out)


def refusal(source: Path, **options: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        planned(source, **options)
    return str(caught.value)


# --- the file ---


def test_three_heads_that_nobody_counts(source: Path, file: GGUFFile) -> None:
    """A5-2: llama.cpp's converter takes three, whatever there is; here their tensors count."""
    conversion = planned(source)
    reader, spec = conversion.published.reader, conversion.published.spec
    assert (conversion.warnings, spec.layers, spec.draft_length) == ((), range(6, 9), COUNT)
    assert reader.origins["layer_count"] == "tensor names"
    keys = {key.removeprefix("mimo2."): entry.value for key, entry in file.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"]) == (DEPTH + COUNT, COUNT)
    assert keys["attention.sliding_window_pattern"] == (0, 1, 1, 1, 1, 0, 1, 1, 1)
    assert keys["attention.head_count_kv"] == (1, 2, 2, 2, 2, 1, 2, 2, 2)
    assert (keys["attention.key_length"], keys["attention.value_length"]) == (48, 32)
    assert (keys["rope.freq_base"], keys["rope.freq_base_swa"], keys["rope.dimension_count"]) == (5e6, 1e4, 16)
    assert file.tensors["blk.6.attn_qkv.weight"].shape == (4 * 48 + 2 * 48 + 2 * 32, 64)
    assert file.tensors["blk.6.attn_output.weight"].shape == (64, 4 * 32)


@pytest.mark.parametrize("heads", [1, 2])
def test_fewer_heads_are_as_many(tmp_path: Path, heads: int) -> None:
    conversion = planned(make_mtp_mimo.random(tmp_path / "t", heads=heads))
    assert conversion.published.spec.layer_count == heads
    assert {tensor.key[1] for tensor in conversion.plan.tensors} == {None, *range(DEPTH, DEPTH + heads)}


def test_three_matrices_become_one(file: GGUFFile, tmp_path: Path) -> None:
    """MiMo-V2-Flash: llama.cpp's graph of a head stops without; the same file as of a checkpoint that has one."""
    source = make_mtp_mimo.flash(tmp_path / "t")
    out = tmp_path / "heads.gguf"
    convert(job(source, out))
    found = read_gguf(out)
    assert found.tensors == file.tensors
    assert all((found.tensor_bytes(name) == file.tensor_bytes(name)).all() for name in found.tensors)
    assert doctor(out, source, source)[0].outcome is Outcome.PASS


def test_rows_of_the_one_are_those_of_the_three(tmp_path: Path) -> None:
    """Whichever are asked for: none, of one part, across their borders."""
    source = make_mtp_mimo.flash(tmp_path / "t")
    (match,) = (m for k, m in read_published(source).match().matches.items() if k == (Role.ATTN_QKV, 7))
    tensors = load_file(source / "model.safetensors")
    whole = np.concatenate([tensors[QKV.format(part)] for part in "qkv"])
    for start, stop in ((0, 0), (0, 1), (190, 200), (100, 340), (288, 289), (0, len(whole))):
        np.testing.assert_array_equal(read_rows(match.header, start, stop), whole[start:stop])


def test_a_file_comes_back_as_it_was_published(source: Path, file: GGUFFile) -> None:
    published = read_published(source)
    assert inspect(file.path).kind == published.spec.kind == "mtp-mimo2"
    assert inspect(file.path).runtimes == {"llama.cpp": ""}
    (structure, pairing) = doctor(file.path, source, source)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())
    assert pairing.outcome is Outcome.PASS


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hybrid_layer_pattern": DELETE}, "trunk.sliding_layers: missing (looked at hybrid_layer_pattern)"),
        ({"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern: found [0, 1], expected 0 (full) or 1 (sliding)"),
        ({"swa_rope_theta": DELETE}, "rope.theta: missing (looked at swa_rope_theta"),
        ({"rope_theta": DELETE}, "rope theta: missing (looked at"),
        ({"partial_rotary_factor": DELETE}, "rope.dimensions: missing (looked at partial_rotary_factor"),
        ({"v_head_dim": DELETE}, "value_head_dim: missing (looked at v_head_dim)"),
        ({"swa_v_head_dim": 48}, "swa_v_head_dim: found 48, expected 32; llama.cpp's MiMo-V2 has them alike"),
        ({"swa_num_key_value_heads": DELETE}, "kv_head_count: missing (looked at swa_num_key_value_heads)"),
        ({"sliding_window_size": 25}, "sliding_window_size: found 25, expected 24; llama.cpp reads sliding_window"),
        ({"layernorm_epsilon": DELETE}, "norm_epsilon: missing (looked at layernorm_epsilon)"),
        ({"topk_method": "greedy"}, "topk_method: found 'greedy'"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: found 2.5"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            "yarn scaling",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: found True"),
        (
            {"num_nextn_predict_layers": 1},
            "num_nextn_predict_layers: 1, but the tensors are mtp.layers.0, mtp.layers.1",
        ),
        ({"add_swa_attention_sink_bias": False}, "attention_sink_bias: unknown tensor [4]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_fact_that_is_missing_or_another_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    assert said in refusal(reconfigure(make_mtp_mimo.random(tmp_path / "t"), **change))


def test_an_incomplete_head_is_named(tmp_path: Path) -> None:
    source = without(
        make_mtp_mimo.flash(tmp_path / "t"), QKV.format("k"), "model.mtp.layers.2.self_attn.attention_sink"
    )
    said = refusal(source)
    assert "mtp.layers.1.self_attn.qkv_proj.weight: missing (ATTN_QKV of layer 7)" in said
    assert "mtp.layers.2.self_attn.attention_sink_bias: missing (ATTN_SINKS of layer 8)" in said


def test_parts_of_other_types_are_not_put_together(tmp_path: Path) -> None:
    source = make_mtp_mimo.flash(tmp_path / "t")
    path = source / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, QKV.format("v"): tensors[QKV.format("v")].astype(np.float32)}, path)
    said = refusal(source)
    assert f"{QKV.format('v')}: found F32 [64, 64] beside BF16 [192, 64] of {QKV.format('q')}" in said


def test_rows_of_ranks_are_put_in_order(tmp_path: Path) -> None:
    """MiMo-V2.5's FP8: all queries before all keys before all values, each with its own block's scale."""
    source = make_mtp_mimo.ranked(tmp_path / "t")
    (match,) = (m for k, m in read_published(source).match().matches.items() if k == (Role.ATTN_QKV, 7))
    headers, name = open_checkpoint(source).tensors, QKV.format("qkv")
    codes, scale = (read_rows(headers[n], 0, headers[n].rows) for n in (name, f"{name}_scale_inv"))
    rows = codes.astype(np.float32) * scale.repeat(128, axis=0)
    each = len(rows) // 4  # of a rank: 4 of 16 heads, 1 of 4 keys and values, 64 rows each
    starts, heads = (0, 256, 320), (256, 64, 64)
    spans = [(rank * each + start, rows_) for start, rows_ in zip(starts, heads, strict=True) for rank in range(4)]
    expected = np.concatenate([rows[start : start + count] for start, count in spans])
    np.testing.assert_array_equal(read_rows(match.header, 0, len(rows)), expected)
    np.testing.assert_array_equal(read_rows(match.header, 250, 1300), expected[250:1300])


def test_ranks_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    """Neither 4 nor 8 ranks have whole blocks of 352 rows."""
    source = make_mtp_mimo.random(tmp_path / "t")
    path = source / "model.safetensors"
    tensors, name = load_file(path), QKV.format("qkv")
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale_inv": np.ones((3, 1), np.float32)}, path)
    said = refusal(reconfigure(source, quantization_config=make_mtp_mimo.FP8["quantization_config"]))
    assert (
        f"{name}: found 352 rows in FP8" in said and "expected 352 rows of 8 or 4 ranks, each in whole blocks" in said
    )


# --- what is found in a file ---


def test_norms_less_one_are_found(source: Path, file: GGUFFile, tmp_path: Path) -> None:
    """P-42, the other way round: MiMo's norms are published as they multiply."""

    def data(tensor: Any) -> Any:
        values = file.tensor_bytes(tensor.name).view("<f4")
        return [values + np.float32(1) if "norm.weight" in tensor.name else values]

    out = tmp_path / "norms.gguf"
    write_gguf(out, list(file.keys.values()), list(file.tensors.values()), data)
    (structure,) = doctor(out, source=source)
    assert structure.outcome is Outcome.FAIL
    assert any("it is the checkpoint's plus 1" in line for line in structure.details), structure.details


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("nextn_predict_layers", 2, "another key says target_layer_count = 7"),
        ("nextn_predict_layers", 4, "another key says target_layer_count = 5"),
        ("attention.sliding_window_pattern", (0, 1, 1, 1, 1, 0, 0, 0, 0), "for the MTP heads, expected all to slide"),
        ("attention.sliding_window", 12, "mimo2.attention.sliding_window: found 12, the checkpoint has 24"),
        ("attention.value_scale", 1.0, "mimo2.attention.value_scale: found 1.0, the checkpoint has 0.707"),
        ("rope.freq_base_swa", 5e6, "mimo2.rope.freq_base_swa: found 5000000.0, the checkpoint has 10000.0"),
        ("attention.value_length", 48, "blk.6.attn_qkv.weight: found shape [352, 64], expected [384, 64] (qkv rows"),
    ],
)
def test_a_wrong_fact_is_found(source: Path, file: GGUFFile, tmp_path: Path, key: str, value: Any, said: str) -> None:
    name = f"mimo2.{key}"
    entries = {**file.keys, name: KeyValue(name, file.keys[name].type, value, file.keys[name].element)}
    out = tmp_path / "bad.gguf"
    write_gguf(out, list(entries.values()), list(file.tensors.values()), lambda tensor: file.slabs(tensor.name))
    (structure,) = doctor(out, source=source)
    assert structure.outcome is Outcome.FAIL
    assert any(said in line for line in structure.details), structure.details


def test_a_file_of_three_matrices_is_told(file: GGUFFile, tmp_path: Path) -> None:
    """What llama.cpp's own converter makes of a MiMo-V2-Flash: llama-server stops at its first draft."""
    renamed = {t.name: t.name.replace("attn_qkv", "attn_q") for t in file.tensors.values()}
    tensors = [replace(t, name=renamed[t.name]) for t in file.tensors.values()]
    back = {new: old for old, new in renamed.items()}
    out = tmp_path / "three.gguf"
    write_gguf(out, list(file.keys.values()), tensors, lambda tensor: file.slabs(back[tensor.name]))
    (structure,) = doctor(out)
    assert structure.outcome is Outcome.FAIL
    assert any(line.startswith("blk.6.attn_qkv.weight: missing") for line in structure.details), structure.details
