"""Conversion from end to end: what lands in the file, and that nothing half made ever does."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from published import (
    DELETE,
    PAIR,
    changed,
    dflash_shapes,
    random_tensors,
    small_checkpoint,
    small_config,
    write_checkpoint,
    write_safetensors,
)

from convert_drafter.converters import ConvertJob, DrafterError, Problems, WrongInput, WrongUsage, convert, prepare
from convert_drafter.converters.dialects import RUNTIMES, find_cell, read
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.repository import source_of
from convert_drafter.converters.spec import spec_from
from convert_drafter.converters.tokenizer import vocabulary_hash
from convert_drafter.quant import TYPES, dequantize, quantize

VOCAB = 2048  # the tokenizer of the fixture's target


def job(source: Path, out: Path, target: Path | None = None, **options: Any) -> ConvertJob:
    settings = {"runtime": "lucebox", "recipe": "F32", **options}
    return ConvertJob(source, target, settings.pop("runtime"), settings.pop("recipe"), out, **settings)


def values(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor as f32, in torch order."""
    stored = file.tensors[name]
    return dequantize(file.tensor_bytes(name), TYPES[stored.type.name], stored.shape)


def tiny_target(folder: Path, **changes: Any) -> Path:
    """A target's folder without weights: config and tokenizer files are enough."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PAIR / "target" / name, folder / name)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "vocab_size": VOCAB,
        "eos_token_id": VOCAB - 2,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tiny_target(tmp_path / "target")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "drafter", vocab_size=VOCAB, **{"dflash_config.mask_token_id": VOCAB - 1})


# --- what is in the file ---


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_file_holds_the_checkpoint(source: Path, target: Path, tmp_path: Path, recipe: str, runtime: str) -> None:
    """T-14: every tensor under its name and in its type, every fact behind its key, for each recipe and runtime."""
    conversion = prepare(job(source, tmp_path / "out.gguf", target, runtime=runtime, recipe=recipe))
    report = convert(conversion.job)
    file = read_gguf(report.out)
    assert report.out_bytes == report.out.stat().st_size
    assert spec_from(read(find_cell("dflash", runtime), file.keys)) == conversion.published.spec
    assert set(file.tensors) == {t.name for t in conversion.plan.tensors}
    original = random_tensors(dflash_shapes(small_config()))
    for tensor in conversion.plan.tensors:
        weights = original[tensor.header.name].astype(np.float32)
        kind = tensor.choice.type
        assert (kind.name == "F32") == (weights.ndim == 1 or recipe == "F32")
        assert file.tensors[tensor.name].type.name == kind.name
        assert file.tensor_bytes(tensor.name).tobytes() == quantize(weights, kind).tobytes()


def test_gguf_package_reads_it(source: Path, target: Path, tmp_path: Path) -> None:
    convert(job(source, tmp_path / "out.gguf", target, runtime="llama.cpp", recipe="Q8_0"))
    reader = GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["dflash.rope.freq_base"].contents() == 1e7
    assert reader.fields["dflash.target_layers"].contents() == [2, 4]
    assert reader.fields["tokenizer.ggml.mask_token_id"].contents() == VOCAB - 1
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == VOCAB
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds["fc.weight"] == GGMLQuantizationType.Q8_0
    assert kinds["blk.1.attn_q_norm.weight"] == GGMLQuantizationType.F32


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["A1-25 BF16", "F16", "F32"])
def test_own_type_is_copied_bit_for_bit(tmp_path: Path, dtype: Any) -> None:
    config = small_config()
    tensors = random_tensors(dflash_shapes(config), dtype)
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    recipe = {ml_dtypes.bfloat16: "BF16", np.float16: "F16", np.float32: "F32"}[dtype]
    convert(job(source, tmp_path / "out.gguf", recipe=recipe))
    copied = read_gguf(tmp_path / "out.gguf").tensor_bytes("dflash.fc.weight")
    assert copied.tobytes() == tensors["fc.weight"].tobytes()


def test_slabs_do_not_change_the_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(job(source, tmp_path / "a.gguf", recipe="Q8_0"))
    monkeypatch.setattr(sys.modules[convert.__module__], "SLAB_WEIGHTS", 130)
    convert(job(source, tmp_path / "b.gguf", recipe="Q8_0"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_interleaved_rope_rows_become_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-57: the layout comes from the drafter's own config; a slab never cuts through a head."""
    monkeypatch.setattr(sys.modules[convert.__module__], "SLAB_WEIGHTS", 16 * 64)
    source = small_checkpoint(tmp_path / "drafter", rope_is_neox_style=False)
    convert(job(source, tmp_path / "out.gguf"))
    file = read_gguf(tmp_path / "out.gguf")
    original = random_tensors(dflash_shapes(small_config()))
    order = [*range(0, 16, 2), *range(1, 16, 2)]  # per head: even dimensions, then odd ones
    q = original["layers.1.self_attn.q_proj.weight"].astype(np.float32).reshape(4, 16, 64)[:, order]
    assert np.array_equal(values(file, "blk.1.attn_q.weight"), q.reshape(64, 64))
    norm = original["layers.1.self_attn.k_norm.weight"].astype(np.float32)[order]
    assert np.array_equal(values(file, "blk.1.attn_k_norm.weight"), norm)
    v = original["layers.1.self_attn.v_proj.weight"].astype(np.float32)
    assert np.array_equal(values(file, "blk.1.attn_v.weight"), v)


def test_rows_that_do_not_divide_fall_back_and_say_so(tmp_path: Path) -> None:
    """T-15: a single odd tensor neither kills the job nor changes its type without a word."""
    source = small_checkpoint(tmp_path / "drafter", intermediate_size=100)
    conversion = prepare(job(source, tmp_path / "out.gguf", recipe="Q8_0"))
    fallen = [t for t in conversion.plan.tensors if t.choice.fell_back]
    assert [t.name for t in fallen] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    assert {t.choice.type.name for t in fallen} == {"F16"}
    assert "row 100 is no multiple of 32" in fallen[0].choice.reason


def test_same_input_same_bytes(source: Path, target: Path, tmp_path: Path) -> None:
    """R6."""
    for name in ("a.gguf", "b.gguf"):
        convert(job(source, tmp_path / name, target, runtime="llama.cpp", recipe="Q8_0"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_recipes_differ_only_in_weights(source: Path, target: Path, tmp_path: Path) -> None:
    """T-21: sibling files of one drafter carry the same facts."""
    keys = []
    for recipe in RECIPES:
        convert(job(source, tmp_path / f"{recipe}.gguf", target, runtime="llama.cpp", recipe=recipe))
        file = read_gguf(tmp_path / f"{recipe}.gguf")
        keys.append({k: v for k, v in file.keys.items() if k != "general.file_type"})
    assert all(other == keys[0] for other in keys)


def test_shards_give_the_same_file(source: Path, tmp_path: Path) -> None:
    """T-18, G-20: shards of any name give what one file gives, but for the record of the source files."""
    tensors = random_tensors(dflash_shapes(small_config()))
    split = tmp_path / "split" / "drafter"
    split.mkdir(parents=True)
    (split / "config.json").write_text((source / "config.json").read_text())
    names = sorted(tensors)
    shards = {"dflash_draft_model-1.safetensors": names[:9], "dflash_draft_model-2.safetensors": names[9:]}
    for file, members in shards.items():
        write_safetensors(split / file, {name: tensors[name] for name in members})
    weight_map = {name: file for file, members in shards.items() for name in members}
    (split / "dflash_draft_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(job(source, tmp_path / "one.gguf", recipe="Q8_0"))
    convert(job(split, tmp_path / "two.gguf", recipe="Q8_0"))
    one, two = read_gguf(tmp_path / "one.gguf"), read_gguf(tmp_path / "two.gguf")
    recorded = {"drafter.source.files", "drafter.source.header_sha256"}
    assert {k for k in one.keys if one.keys[k] != two.keys[k]} == recorded
    assert one.tensors == two.tensors
    assert all(np.array_equal(one.tensor_bytes(name), two.tensor_bytes(name)) for name in one.tensors)


def test_own_keys_record_source_target_and_vocabulary(source: Path, target: Path, tmp_path: Path) -> None:
    """T-61: a mismatched pair is found by hash, not by acceptance."""
    options = {"runtime": "llama.cpp", "settings": {"block_size": "4"}}
    convert(job(source, tmp_path / "out.gguf", target, **options))
    file = read_gguf(tmp_path / "out.gguf")
    keys = {k: v.value for k, v in file.keys.items() if k.startswith("drafter.")}
    assert keys["drafter.target.name"] == "target"
    assert keys["drafter.target.architecture"] == "Qwen3ForCausalLM"
    assert keys["drafter.target.block_count"] == 6
    assert keys["drafter.source.files"] == ("model.safetensors",)
    assert keys["drafter.source.settings"] == ("block_size=4",)
    config, weights = (source / "config.json").read_bytes(), (source / "model.safetensors").read_bytes()
    header = weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    assert keys["drafter.source.config_sha256"] == hashlib.sha256(config).hexdigest()
    assert keys["drafter.source.header_sha256"] == (hashlib.sha256(header).hexdigest(),)
    tokens = file.keys["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, tuple) and len(tokens) == VOCAB
    assert keys["drafter.vocab.sha256"] == vocabulary_hash(map(str, tokens))


def test_hub_folders_tell_repository_and_revision(tmp_path: Path) -> None:
    revision = "9a1996ccf887" + "0" * 28
    cached = tmp_path / "models--z-lab--Qwen3.5-4B-DFlash" / "snapshots" / revision
    assert source_of(cached) == ("z-lab/Qwen3.5-4B-DFlash", revision)
    local = tmp_path / "local" / ".cache" / "huggingface" / "download"
    local.mkdir(parents=True)
    (local / "config.json.metadata").write_text(f"{revision}\netag\n1\n")
    assert source_of(tmp_path / "local") == (None, revision)
    assert source_of(tmp_path) == (None, None)


# --- tensors that do not fit ---


def spoiled(tmp_path: Path, edit: str) -> Path:
    """A checkpoint with one thing wrong with its tensors."""
    config = small_config()
    tensors = random_tensors(dflash_shapes(config))
    if edit == "missing":
        del tensors["layers.1.mlp.up_proj.weight"]
    elif edit == "unknown":
        tensors["layers.0.self_attn.gate.weight"] = tensors["norm.weight"]
    elif edit == "misshaped":
        tensors["norm.weight"] = tensors["norm.weight"][:32]
    elif edit == "extra layer":
        tensors["layers.7.input_layernorm.weight"] = tensors["norm.weight"]
    elif edit == "twice":
        tensors["model.norm.weight"] = tensors["norm.weight"]
    elif edit == "integers":
        tensors["norm.weight"] = np.zeros(64, dtype=np.int64)
    elif edit == "biases":
        tensors["layers.0.self_attn.q_proj.bias"] = tensors["norm.weight"]
    elif edit == "own embedding":
        tensors["embed_tokens.weight"] = np.zeros((256, 64), dtype=ml_dtypes.bfloat16)
    return write_checkpoint(tmp_path / "drafter", config, tensors)


SPOILED = {
    "missing": "layers.1.mlp.up_proj.weight: missing (FFN_UP of layer 1)",
    "unknown": "layers.0.self_attn.gate.weight: unknown tensor [64]; leave it out with --ignore-tensor",
    "misshaped": "norm.weight: found shape [32], expected [64] (hidden)",
    "extra layer": "layers.7.input_layernorm.weight: layer 7, but the config counts 2 layers",
    "twice": "norm.weight: OUTPUT_NORM is there twice, also as model.norm.weight",
    "integers": "norm.weight: dtype I64, expected one of F32, F16, BF16",
    "biases": "layers.0.self_attn.q_proj.bias: lucebox has no tensor for ATTN_Q_BIAS of layer 0",
    "own embedding": "embed_tokens.weight: lucebox has no tensor for TOKEN_EMBEDDING",
}


@pytest.mark.parametrize("edit", SPOILED)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, edit: str) -> None:
    """T-19, T-44, T-63: closure both ways, and no file."""
    with pytest.raises(Problems) as caught:
        convert(job(spoiled(tmp_path, edit), tmp_path / "out.gguf"))
    assert SPOILED[edit] in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(dflash_shapes(config))
    del tensors["norm.weight"], tensors["layers.0.self_attn.q_norm.weight"]
    tensors["invented.weight"] = tensors["fc.weight"]
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    with pytest.raises(Problems) as caught:
        prepare(job(source, tmp_path / "out.gguf"))
    assert len(caught.value.problems) == 3


def test_tensors_may_be_left_out_on_purpose(tmp_path: Path) -> None:
    source = spoiled(tmp_path, "own embedding")
    conversion = prepare(job(source, tmp_path / "out.gguf", ignore=("embed_*",)))
    assert [(d.source, d.reason) for d in conversion.plan.dropped] == [
        ("embed_tokens.weight", "--ignore-tensor 'embed_*'")
    ]


def test_a_pattern_that_matches_nothing_is_a_mistake(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Problems, match=r"--ignore-tensor 'embd\*': matches no tensor"):
        prepare(job(source, tmp_path / "out.gguf", ignore=("embd*",)))


def test_left_out_tensors_are_on_record(tmp_path: Path) -> None:
    convert(job(spoiled(tmp_path, "own embedding"), tmp_path / "out.gguf", ignore=("embed_*",)))
    assert read_gguf(tmp_path / "out.gguf").keys["drafter.source.ignored"].value == ("embed_*",)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_without_a_head_has_to_be_tied(tmp_path: Path, target: Path, tied: bool) -> None:
    """G-23: runtimes take a lone embedding for the head too."""
    config = small_config(vocab_size=VOCAB, tie_word_embeddings=tied)
    tensors = random_tensors(dflash_shapes(config) | {"embed_tokens.weight": (VOCAB, 64)})
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    if tied:
        assert prepare(job(source, tmp_path / "o.gguf", target, runtime="llama.cpp")).plan.tensors
        return
    with pytest.raises(Problems, match=r"lm_head\.weight: missing \(OUTPUT\)"):
        prepare(job(source, tmp_path / "o.gguf", target, runtime="llama.cpp"))


def test_a_head_without_an_embedding_is_refused_for_ik(tmp_path: Path, target: Path) -> None:
    config = small_config(vocab_size=VOCAB)
    tensors = random_tensors(dflash_shapes(config) | {"lm_head.weight": (VOCAB, 64)})
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    with pytest.raises(Problems, match=r"OUTPUT: ik_llama\.cpp takes it only with TOKEN_EMBEDDING"):
        prepare(job(source, tmp_path / "o.gguf", target, runtime="ik_llama.cpp"))


def test_all_of_it_comes_at_once_also_without_fc(tmp_path: Path, target: Path) -> None:
    config = small_config(vocab_size=VOCAB)
    tensors = random_tensors(dflash_shapes(config))
    del tensors["fc.weight"], tensors["norm.weight"]
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    with pytest.raises(Problems) as caught:
        prepare(job(source, tmp_path / "o.gguf", target, runtime="llama.cpp"))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("field", ["attention_value_scale", "input_embedding_scale", "output_multiplier"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_scale_that_would_turn_itself_off_is_refused(tmp_path: Path, field: str, value: int) -> None:
    source = small_checkpoint(tmp_path / "drafter", **{f"dflash_config.{field}": value})
    with pytest.raises(WrongInput, match=f"{field}: found"):
        prepare(job(source, tmp_path / "o.gguf"))


def test_the_target_s_repository_and_revision_are_on_record(source: Path, tmp_path: Path) -> None:
    """P-44, T-61: not the folder's name, which is a hash in the hub's cache."""
    folder = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / ("ab" * 20)
    folder.parent.mkdir(parents=True)
    tiny_target(folder)
    convert(job(source, tmp_path / "out.gguf", folder, runtime="llama.cpp"))
    keys = read_gguf(tmp_path / "out.gguf").keys
    assert keys["drafter.target.name"].value == "Qwen3-8B"
    assert keys["drafter.target.repository"].value == "Qwen/Qwen3-8B"
    assert keys["drafter.target.revision"].value == "ab" * 20


def test_the_launch_line_can_be_pasted(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter")
    out = tmp_path / "my drafter.gguf"
    assert f"--draft '{out}'" in convert(job(source, out)).launch


def test_embedding_the_config_disowns_is_dropped_with_the_reason(tmp_path: Path) -> None:
    config = small_config(has_embed_tokens=False)
    tensors = random_tensors(dflash_shapes(config) | {"embed_tokens.weight": (256, 64)})
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    conversion = prepare(job(source, tmp_path / "out.gguf"))
    assert "has_embed_tokens is false" in conversion.plan.dropped[0].reason


@pytest.mark.parametrize(
    ("value", "recipe", "fragment"),
    [
        (np.nan, "F32", "row 5: found nan, expected a finite number"),
        (np.inf, "BF16", "row 5: found inf, expected a finite number"),
        (-np.inf, "Q8_0", "row 5: found -inf, expected a finite number"),
        (1e5, "F16", "row 5: found 99840, expected a finite number up to 65504 (F16); choose BF16 or F32"),
        (-1e8, "Q8_0", "up to 8.31901e+06 (Q8_0)"),
    ],
)
def test_weights_that_cannot_be_stored_are_named(tmp_path: Path, value: float, recipe: str, fragment: str) -> None:
    """G-26 and damaged files: tensor and row are named, and no file stays behind."""
    config = small_config()
    tensors = random_tensors(dflash_shapes(config))
    tensors["layers.1.mlp.up_proj.weight"][5, 3] = value
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    with pytest.raises(WrongInput) as caught:
        convert(job(source, tmp_path / "out.gguf", recipe=recipe))
    assert "layers.1.mlp.up_proj.weight" in str(caught.value)
    assert fragment in str(caught.value)
    assert not list(tmp_path.glob("out*"))


# --- pairing ---


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        pytest.param(
            {"num_hidden_layers": 8}, "num_target_layers: found 6, expected 8, the layers of", id="T-61 depth"
        ),
        pytest.param({"hidden_size": 96}, "expected 2 * 96, the hidden size of the target", id="T-13 width"),
        pytest.param({"vocab_size": VOCAB + 8}, "vocab_size: the drafter has 2048, the target", id="T-53 vocabulary"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    other = tiny_target(tmp_path / "other", **changes)
    with pytest.raises(DrafterError, match=fragment.replace("*", r"\*")):
        prepare(job(source, tmp_path / "out.gguf", other, runtime="llama.cpp"))


def test_a_drafter_that_does_not_state_the_depth_takes_the_target_s(tmp_path: Path, target: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", vocab_size=VOCAB, num_target_layers=DELETE)
    conversion = prepare(job(source, tmp_path / "out.gguf", target, runtime="llama.cpp"))
    assert conversion.published.spec.target_layer_count == 6
    with pytest.raises(WrongInput, match="num_target_layers"):
        prepare(job(source, tmp_path / "out.gguf"))


def test_mrope_target_gives_sections(source: Path, tmp_path: Path) -> None:
    """T-57 and z-lab/dflash#170: a file without them had to be converted again."""
    rope = {"rope_parameters": {"mrope_section": [11, 11, 10], "rope_theta": 1e7}}
    other = tiny_target(tmp_path / "other", **rope)
    convert(job(source, tmp_path / "out.gguf", other, runtime="llama.cpp"))
    assert read_gguf(tmp_path / "out.gguf").keys["dflash.rope.dimension_sections"].value == (8, 0, 0, 0)


def test_gemma_target_scales_the_embedding(source: Path, tmp_path: Path) -> None:
    other = tiny_target(tmp_path / "other", architectures=["Gemma4ForCausalLM"])
    conversion = prepare(job(source, tmp_path / "out.gguf", other, runtime="llama.cpp"))
    assert conversion.published.spec.embedding_scale == 8.0


def test_missing_target_says_what_it_is_for(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"llama\.cpp wants the target's tokenizer"):
        prepare(job(source, tmp_path / "out.gguf", runtime="llama.cpp"))


# --- warnings and --strict ---


def test_unread_keys_are_warned_about_and_refused_when_strict(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", brand_new_feature=3)
    assert "brand_new_feature: nobody reads this key" in prepare(job(source, tmp_path / "o.gguf")).warnings[0]
    with pytest.raises(Problems, match=r"--strict(.|\n)*brand_new_feature"):
        prepare(job(source, tmp_path / "o.gguf", strict=True))


def test_a_clean_checkpoint_has_no_warnings(source: Path, target: Path, tmp_path: Path) -> None:
    assert prepare(job(source, tmp_path / "out.gguf", target, runtime="llama.cpp", strict=True)).warnings == ()


# --- destinations ---


def test_a_plan_writes_nothing(source: Path, tmp_path: Path) -> None:
    """T-23, A1-6: everything is decided before any output exists."""
    before = sorted(tmp_path.rglob("*"))
    prepare(job(source, tmp_path / "out.gguf"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", ["same path", "symlink", "hard link"])
def test_a_source_is_never_overwritten(source: Path, tmp_path: Path, how: str) -> None:
    """T-24."""
    weights = source / "model.safetensors"
    out = {"same path": weights}.get(how, tmp_path / "out.gguf")
    if how == "symlink":
        out.symlink_to(weights)
    elif how == "hard link":
        os.link(weights, out)
    before = weights.read_bytes()
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        convert(job(source, out))
    assert weights.read_bytes() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_the_target_s_files_are_never_overwritten(source: Path, target: Path, name: str) -> None:
    """T-24 for what is read beside the weights."""
    before = (target / name).read_bytes()
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        prepare(job(source, target / name, target, runtime="llama.cpp"))
    assert (target / name).read_bytes() == before


def test_a_target_under_the_partial_name_survives(source: Path, target: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(job(source, tmp_path / "stands-for-a-target.gguf", target, runtime="llama.cpp"))
    precious = (tmp_path / "stands-for-a-target.gguf").rename(tmp_path / "out.gguf.partial")
    with pytest.raises(DrafterError):
        convert(job(source, out, precious, runtime="lucebox"))
    assert precious.is_file()


def test_weights_the_index_does_not_name_are_pointed_out(source: Path, tmp_path: Path) -> None:
    """R3: no tensor is passed over in silence."""
    names = json.dumps({"weight_map": dict.fromkeys(dflash_shapes(small_config()), "model.safetensors")})
    (source / "model.safetensors.index.json").write_text(names)
    write_safetensors(source / "extra.safetensors", {"candidate_selector.x": np.zeros(2, np.float32)})
    assert "extra.safetensors: the index does not name it" in prepare(job(source, tmp_path / "o.gguf")).warnings[0]


def test_a_folder_is_no_destination(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"is a folder, expected a file name ending in \.gguf"):
        prepare(job(source, tmp_path))


def test_a_missing_folder_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="nowhere"):
        convert(job(source, tmp_path / "nowhere" / "out.gguf"))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to write everywhere, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_folder_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        source = small_checkpoint(folder / "drafter")
        (folder / "locked").mkdir(mode=0o555)
        with unprivileged(), pytest.raises(WrongInput, match=r"locked.*Permission denied"):
            convert(job(source, folder / "locked" / "out.gguf"))
        assert not list((folder / "locked").iterdir())


def test_an_old_file_survives_a_failed_run(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"the file from last week")
    with pytest.raises(Problems):
        convert(job(spoiled(tmp_path, "missing"), out))
    assert out.read_bytes() == b"the file from last week"


# The interrupt handler is set by hand: a process started in the background of a shell ignores SIGINT.
SLOW_RUN = """
import signal, sys, time
from pathlib import Path
from convert_drafter.converters import ConvertJob, convert
signal.signal(signal.SIGINT, signal.default_int_handler)
def advance(n):
    print("writing", flush=True)
    time.sleep(0.05)
convert(ConvertJob(Path(sys.argv[1]), None, "lucebox", "F32", Path(sys.argv[2])), advance)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["T-23 SIGKILL", "Ctrl-C"])
def test_a_killed_run_leaves_no_file(source: Path, tmp_path: Path, how: signal.Signals) -> None:
    """T-23, T-65: killed in the middle of writing; the next run succeeds and cleans up."""
    out = tmp_path / "out.gguf"
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, source, out], stdout=-1, stderr=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(how)
    process.communicate(timeout=30)
    assert not out.exists()
    convert(job(source, out))
    assert [path.name for path in tmp_path.glob("out*")] == ["out.gguf"]


def test_two_runs_do_not_write_one_file(source: Path, tmp_path: Path) -> None:
    """The second is told about the first, and the first is not disturbed."""
    out = tmp_path / "out.gguf"
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, source, out], stdout=-1, stderr=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    with pytest.raises(WrongInput, match="another run is writing it"):
        convert(job(source, out))
    process.communicate(timeout=30)
    assert process.returncode == 0
    convert(job(source, tmp_path / "alone.gguf"))
    assert out.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_a_partial_file_that_is_a_link_is_not_followed(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "out.gguf.partial").symlink_to(precious)
    convert(job(source, tmp_path / "out.gguf"))
    assert precious.read_text() == "mine"


def test_a_full_disk_leaves_no_file(source: Path, tmp_path: Path) -> None:
    """A file-size limit plays the full disk; SIGXFSZ is ignored, so the write fails as it would there."""
    code = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n" + SLOW_RUN.replace("time.sleep(0.05)", "")
    out = tmp_path / "out.gguf"
    done = subprocess.run([sys.executable, "-c", code, source, out], capture_output=True, text=True)
    assert "WrongInput" in done.stderr.splitlines()[-1]
    assert "File too large" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_paths_with_spaces_and_accents_work(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "mon bébé drafter 草稿")
    report = convert(job(source, tmp_path / "sortie é 出.gguf"))
    assert report.out.is_file()


def test_speed_of_a_plan_does_not_depend_on_data(tmp_path: Path) -> None:
    """A plan reads headers only: a file whose data is a hole of 2 GB is planned at once."""
    config = changed(small_config(), {"hidden_size": 8192, "intermediate_size": 16384})
    shapes = dflash_shapes(config)
    source = write_checkpoint(tmp_path / "drafter", config, {})
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    start = time.process_time()
    conversion = prepare(job(source, tmp_path / "out.gguf"))
    assert conversion.plan.n_weights * 2 == offset > 1 << 30
    assert time.process_time() - start < 60  # a hang, not a measurement


# --- what a hostile user found ---


def test_a_device_or_pipe_is_no_destination(source: Path, tmp_path: Path) -> None:
    """`-o /dev/null` as root replaced the device by a file."""
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(WrongUsage, match="is a device or a pipe"):
        prepare(job(source, tmp_path / "pipe.gguf"))


def test_a_partial_file_that_another_run_took_over_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Between opening and renaming, the name may come to stand for another run's file."""
    out = tmp_path / "out.gguf"
    partial = tmp_path / "out.gguf.partial"
    taken = []

    def take_over(n: int) -> None:
        if not taken:
            partial.unlink()
            partial.write_bytes(b"another run's")
            taken.append(n)

    with pytest.raises(WrongInput, match="another run is writing it"):
        convert(job(source, out), take_over)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"block_size": 2**33}, "block_size = 8589934592: does not fit"),
        ({"rms_norm_eps": 1e-60}, "norm_epsilon = 1e-60: does not fit"),
        ({"rope_parameters.rope_theta": 1e300}, "rope.theta = 1e+300: does not fit"),
        ({"vocab_size": 200_000_000}, "expected at most 16777216"),
    ],
)
def test_numbers_no_key_can_hold_are_refused_by_the_plan(
    tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    with pytest.raises(DrafterError, match=fragment.replace("+", r"\+")):
        prepare(job(small_checkpoint(tmp_path / "drafter", **changes), tmp_path / "o.gguf"))


def test_the_user_settles_where_two_places_disagree(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", **{"dflash_config.block_size": 4})
    with pytest.raises(WrongInput, match="two places disagree"):
        prepare(job(source, tmp_path / "o.gguf"))
    settled = prepare(job(source, tmp_path / "o.gguf", settings={"block_size": "16"}))
    assert settled.published.spec.block_size == 16


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"\\ud800": 1}', "", "{", "7"])
def test_a_target_s_broken_json_is_one_message(
    source: Path, target: Path, tmp_path: Path, name: str, text: str
) -> None:
    (target / name).write_text(text)
    with pytest.raises(WrongInput, match=r"target"):
        prepare(job(source, tmp_path / "o.gguf", target, runtime="llama.cpp"))


def test_merges_that_are_no_list_are_refused(source: Path, target: Path, tmp_path: Path) -> None:
    """llama-server finds no merges in such a file and stops."""
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = "abc"
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(WrongInput, match=r"model\.merges"):
        prepare(job(source, tmp_path / "o.gguf", target, runtime="llama.cpp"))


def test_an_odd_tensor_name_can_be_left_out_as_the_message_says(tmp_path: Path) -> None:
    config = small_config()
    odd = random_tensors(dflash_shapes(config) | {"a[0]'s": (4,)})
    source = write_checkpoint(tmp_path / "drafter", config, odd)
    with pytest.raises(Problems) as caught:
        prepare(job(source, tmp_path / "o.gguf"))
    option = shlex.split(str(caught.value).split("leave it out with ")[1])
    assert prepare(job(source, tmp_path / "o.gguf", ignore=(option[1],))).plan.dropped[0].source == "a[0]'s"
