"""Behaviours of the systems this one learns from, and the silent fallbacks of today's converters and runtimes.

A1-n are what Lucebox's config-driven converter promises; P-n the places where a converter or a loader guesses without
a word, each of them here the right value or an error; G-n the config traps.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from published import (
    DELETE,
    SMALL_VOCAB,
    dflash_shapes,
    random_tensors,
    small_checkpoint,
    small_config,
    tiny_target,
    write_checkpoint,
)

from convert_drafter.converters import (
    Conversion,
    ConvertJob,
    DrafterError,
    Problems,
    WrongInput,
    convert,
    prepare,
)
from convert_drafter.converters.commands import show
from convert_drafter.converters.convert import launch_command, read_published
from convert_drafter.converters.dialects import RUNTIMES, find_cell, lucebox, objections, read, write
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.recipe_rules import Facts
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, facts_of
from convert_drafter.converters.type_choice import Candidate, choose_types
from convert_drafter.quant import TYPES

LLAMA, IK, LUCEBOX = "llama.cpp", "ik_llama.cpp", "lucebox"
MASK = SMALL_VOCAB - 1
LAYER_TYPES = ["sliding_attention", "full_attention"]
every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)
Changes = Mapping[str, Any]


def drafter(folder: Path, **changes: Any) -> Path:
    """A small checkpoint with the vocabulary and the mask token of the fixture's tokenizer."""
    return small_checkpoint(folder, **{"vocab_size": SMALL_VOCAB, "dflash_config.mask_token_id": MASK, **changes})


def target(folder: Path, **config: Any) -> Path:
    """The target of `drafter`; made once."""
    facts = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 6}
    return folder if folder.exists() else tiny_target(folder, **{**facts, **config})


def job(tmp_path: Path, source: Path, runtime: str, recipe: str = "F32") -> ConvertJob:
    return ConvertJob(source, target(tmp_path / "target"), runtime, recipe, tmp_path / "out.gguf")


def planned(tmp_path: Path, runtime: str, **changes: Any) -> Conversion:
    return prepare(job(tmp_path, drafter(tmp_path / "drafter", **changes), runtime))


def keys_of(conversion: Conversion) -> dict[str, Any]:
    """Values by key, the architecture's prefix left out."""
    return {kv.key.removeprefix(f"{conversion.cell.arch}."): kv.value for kv in conversion.keys}


def spec_of(tmp_path: Path, **changes: Any) -> DrafterSpec:
    return read_published(drafter(tmp_path / "drafter", **changes)).spec


# --- the config: each silent fallback is the right value or an error (P-1 .. P-8, P-11, P-25 .. P-28, P-30, P-31) ---

SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
NESTED = {"full_attention": {"rope_theta": 2e6, "rope_type": "default", "partial_rotary_factor": 0.5}}
FULL = ["full_attention", "full_attention"]

REFUSED: list[tuple[str, Changes, str]] = [
    ("P-1 P-34 no theta", {"rope_parameters": DELETE}, "rope theta: missing (looked at rope_parameters.rope_theta"),
    ("P-3 no epsilon, though the library has one", {"rms_norm_eps": DELETE, "model_type": "qwen3"}, "norm_epsilon"),
    ("P-3 no theta, though the library has one", {"rope_parameters": None, "model_type": "qwen3"}, "rope theta"),
    ("P-4 llama3", {"rope_parameters.rope_type": "llama3"}, "found 'llama3', expected default, linear or yarn"),
    ("P-4 dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "found 'dynamic'"),
    ("P-4 unknown", {"rope_parameters.rope_type": "spiral"}, "found 'spiral'"),
    ("P-5 P-37 no mask", {"dflash_config.mask_token_id": DELETE}, "mask_token_id: missing"),
    ("P-6 P-37 no block size", {"block_size": DELETE}, "block_size: missing"),
    (
        "P-7 P-31 only the ids of another counting",
        {"dflash_config.target_layer_ids": DELETE, "aux_hidden_state_layer_ids": [2, 4]},
        "only aux_hidden_state_layer_ids = [2, 4], whose counting differs",
    ),
    ("P-7 no capture layers", {"dflash_config.target_layer_ids": DELETE}, "capture layers: missing"),
    (
        "P-8 sliding and not",
        {"layer_types": LAYER_TYPES, "sliding_window": 48, "use_sliding_window": False},
        "use_sliding_window: false, but layer_types has sliding layers",
    ),
    ("P-8 sliding without a size", {"layer_types": LAYER_TYPES, "use_sliding_window": True}, "window.size: missing"),
    ("P-17 mask beyond the vocabulary", {"dflash_config.mask_token_id": SMALL_VOCAB}, "mask_token_id: found 2048"),
    ("P-37 no hidden size", {"hidden_size": DELETE}, "hidden_size: missing"),
]


@pytest.mark.parametrize(("changes", "fragment"), [pytest.param(c, f, id=name) for name, c, f in REFUSED])
def test_where_others_guess_the_key_is_named(tmp_path: Path, changes: Changes, fragment: str) -> None:
    source = drafter(tmp_path / "drafter")
    (source / "config.json").write_text(json.dumps(small_config(**{"vocab_size": SMALL_VOCAB, **changes})))
    with pytest.raises(WrongInput) as caught:
        read_published(source)
    assert str(caught.value).startswith(f"{source / 'config.json'}: ")
    assert fragment in str(caught.value)


READ: list[tuple[str, Changes, Changes]] = [
    ("P-2 parameters per layer type", {"rope_parameters": NESTED}, {"rope.theta": 2e6, "rope.dimensions": 8}),
    (
        "P-2 parameters per layer type beside the types",
        {"rope_parameters": NESTED, "layer_types": FULL},
        {"rope.theta": 2e6, "rope.dimensions": 8},
    ),
    (
        "P-2 null does not hide the scaling",
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": SCALING},
        {"rope.theta": 1e4, "rope.scaling.method": "yarn", "rope.scaling.factor": 4.0},
    ),
    ("P-3 qwen3", {"model_type": "qwen3"}, {"rope.theta": 1e7, "norm_epsilon": 1e-6}),
    ("P-3 llama", {"model_type": "llama"}, {"rope.theta": 1e7, "norm_epsilon": 1e-6}),
    ("P-3 unknown", {"model_type": "never heard of"}, {"rope.theta": 1e7, "norm_epsilon": 1e-6}),
    ("P-5 mask at the top", {"dflash_config.mask_token_id": DELETE, "mask_token_id": 7}, {"mask_token_id": 7}),
    ("P-26 mask 0", {"dflash_config.mask_token_id": 0}, {"mask_token_id": 0}),
    (
        "P-8 sliding without the switch",
        {"layer_types": LAYER_TYPES, "sliding_window": 48},
        {"window.size": 48, "window.layers": (True, False)},
    ),
    ("P-11 nobody says causal", {}, {"causal": False}),
    ("P-11 causal", {"is_causal": True}, {"causal": True}),
    ("P-25 theta at the top", {"rope_parameters": DELETE, "rope_theta": 5e5}, {"rope.theta": 5e5}),
    (
        "P-31 both lists",
        {"aux_hidden_state_layer_ids": [2, 4]},
        {"capture_layers": (1, 3)},
    ),
]


@pytest.mark.parametrize(("changes", "expected"), [pytest.param(c, e, id=name) for name, c, e in READ])
def test_where_others_guess_the_fact_is_right(tmp_path: Path, changes: Changes, expected: Changes) -> None:
    facts = facts_of(spec_of(tmp_path, **changes))
    assert {name: facts.get(name) for name in expected} == expected


def test_backbone_rotary_base_is_not_lost(tmp_path: Path) -> None:
    """P-9: a base of the context's own, which llama.cpp and Lucebox have no key for."""
    conversion = planned(tmp_path, IK, **{"dflash_config.backbone_rotary_base": 5e6})
    assert keys_of(conversion)["dflash.backbone_rotary_base"] == 5e6
    for runtime in (LLAMA, LUCEBOX):
        with pytest.raises(Problems, match=f"context_theta = 5000000.0: {runtime} has no key"):
            planned(tmp_path, runtime, **{"dflash_config.backbone_rotary_base": 5e6})


def test_mrope_sections_fit_the_rotated_part_of_the_head(tmp_path: Path) -> None:
    """P-10: half of a head of 16 is rotated, so 4 pairs, not 8."""
    target(tmp_path / "target", rope_parameters={"mrope_section": [2, 1, 1], "rope_theta": 1e7})
    conversion = planned(tmp_path, LLAMA, partial_rotary_factor=0.5)
    keys = keys_of(conversion)
    assert keys["rope.dimension_count"] == 8
    assert keys["rope.dimension_sections"] == (4, 0, 0, 0)


@pytest.mark.parametrize("runtime", [LLAMA, IK])
@pytest.mark.parametrize(("config", "causal"), [({}, False), ({"is_causal": True}, True)])
def test_causality_is_always_written(tmp_path: Path, runtime: str, config: Changes, causal: bool) -> None:
    """P-11"""
    assert keys_of(planned(tmp_path, runtime, **config))["attention.causal"] is causal


# --- keys that have to be in every file ---

ALWAYS: dict[str, dict[str, Any]] = {
    LLAMA: {"block_size": 8, "tokenizer.ggml.mask_token_id": MASK, "target_layers": (2, 4)},
    IK: {"dflash.block_size": 8, "dflash.mask_token_id": MASK, "dflash.target_layer_ids": (1, 3)},
    LUCEBOX: {"dflash.block_size": 8, "dflash.mask_token_id": MASK, "dflash.target_layer_ids": (1, 3)},
}


@every_runtime
def test_keys_with_a_loader_s_default_are_always_written(tmp_path: Path, runtime: str) -> None:
    """P-17, P-18, P-25, P-26, P-33: also where the value is what the loader would take without the key."""
    config = {"num_key_value_heads": 4, "block_size": 16, "rope_parameters.rope_theta": 10000}
    keys = keys_of(planned(tmp_path, runtime, **config))
    always = {"attention.head_count_kv": 4, "attention.key_length": 16, "attention.value_length": 16}
    expected = {**always, "rope.freq_base": 10000.0, "vocab_size": SMALL_VOCAB, **ALWAYS[runtime]}
    expected |= {name: 16 for name in expected if name.endswith("block_size")}
    assert {name: keys.get(name) for name in expected} == expected


@every_runtime
@pytest.mark.parametrize("place", ["rope_parameters.rope_theta", "rope_theta", "rope_scaling.rope_theta"])
def test_theta_reaches_its_key_from_every_place(tmp_path: Path, runtime: str, place: str) -> None:
    """P-1, P-25, P-28: 5e5 is nobody's default."""
    config = {"rope_parameters": DELETE, place: 500000}
    if place.startswith("rope_parameters"):
        config = {place: 500000}
    theta = keys_of(planned(tmp_path, runtime, **config))["rope.freq_base"]
    assert (type(theta), theta) == (float, 500000.0)


@every_runtime
def test_window_reaches_its_keys(tmp_path: Path, runtime: str) -> None:
    """P-27"""
    keys = keys_of(planned(tmp_path, runtime, layer_types=LAYER_TYPES, sliding_window=48, use_sliding_window=True))
    assert keys["attention.sliding_window"] == 48
    assert keys["attention.sliding_window_pattern"] == (True, False)


@every_runtime
@pytest.mark.parametrize("mask", [0, 1])
def test_a_small_mask_token_is_written(tmp_path: Path, runtime: str, mask: int) -> None:
    """P-26, G-6: a loader's default is written out, too."""
    keys = keys_of(planned(tmp_path, runtime, **{"dflash_config.mask_token_id": mask}))
    assert [value for key, value in keys.items() if key.endswith("mask_token_id")] == [mask]


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    """P-17"""
    target(tmp_path / "target", vocab_size=SMALL_VOCAB + 8)
    with pytest.raises(DrafterError, match="vocab_size: the drafter has 2048, the target target has 2056"):
        planned(tmp_path, LLAMA)


def test_the_launch_line_names_type_and_draft_length(tmp_path: Path) -> None:
    """P-23, P-24: llama.cpp drafts 3 tokens unless told otherwise; a block of 8 is the anchor and 7 drafted."""
    llama = shlex.split(launch_command(planned(tmp_path, LLAMA)))
    assert llama[llama.index("--spec-type") + 1] == "draft-dflash"
    assert llama[llama.index("--spec-draft-n-max") + 1] == "7"
    ik = shlex.split(launch_command(planned(tmp_path, IK)))
    assert ik[ik.index("--spec-type") + 1] == "dflash:n_max=7"


# --- Lucebox ---


def test_lucebox_without_a_config_has_no_constants_to_fall_back_to(tmp_path: Path) -> None:
    """P-28"""
    source = drafter(tmp_path / "drafter")
    (source / "config.json").unlink()
    with pytest.raises(WrongInput, match=r"config\.json: not found"):
        prepare(job(tmp_path, source, LUCEBOX))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "name",
    [
        "candidate_selector.hidden_projection.weight",
        "layers.0.attention_conv.base_kernel",
        "layers.0.self_attn.sinks",
        "embed_tokens.weight",
        "lm_head.weight",
        "nobody.knows.weight",
    ],
)
def test_lucebox_loses_no_tensor(tmp_path: Path, name: str) -> None:
    """P-29: selector, convolutions, sinks, embedding and head; every one of them is named or its kind is."""
    config = small_config()
    shapes = {**dflash_shapes(config), name: (256, 64) if "sinks" not in name else (4,)}
    source = write_checkpoint(tmp_path / "drafter", config, random_tensors(shapes))
    kernel = {f"dflash_config.{key}": "2" for key in ("conv_kernel_size", "conv_group_size")}
    selector = {f"dflash_config.{key}": "2" for key in ("selector_rank", "selector_top_k")}
    settings = kernel | selector if "candidate" in name else {}
    with pytest.raises(DrafterError) as caught:
        convert(ConvertJob(source, None, LUCEBOX, "F32", tmp_path / "out.gguf", settings=settings))
    assert name in str(caught.value) or "lucebox has no loader for dflash2 drafters" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_capture_layers_have_to_be_as_many_as_fc_s(tmp_path: Path) -> None:
    """P-30: the ids are never dropped for the runtime to guess."""
    source = drafter(tmp_path / "drafter")
    config = small_config(**{"vocab_size": SMALL_VOCAB, "dflash_config.target_layer_ids": [0, 1, 3]})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongInput, match=r"fc\.weight: .*3 capture layers"):
        prepare(job(tmp_path, source, LUCEBOX))


def test_lucebox_s_count_is_of_the_capture_layers_not_of_the_target_s(tmp_path: Path) -> None:
    """P-33"""
    keys = keys_of(planned(tmp_path, LUCEBOX))
    assert keys["dflash.n_target_layers"] == len(keys["dflash.target_layer_ids"]) == 2
    assert keys["drafter.target.block_count"] == 6


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rms_norm_eps": 1e-5}, "norm_epsilon: Lucebox computes every norm with 1e-06"),
        ({"partial_rotary_factor": 0.5}, "rope.dimensions = 8: lucebox has no key"),
        ({"rope_parameters": {"rope_theta": 1e7, **SCALING}}, "rope.scaling.factor = 4.0: lucebox has no key"),
        ({"is_causal": True}, "causal = True: lucebox has no key"),
    ],
)
def test_what_lucebox_ignores_is_refused(tmp_path: Path, changes: Changes, fragment: str) -> None:
    """P-34"""
    with pytest.raises(Problems) as caught:
        planned(tmp_path, LUCEBOX, **changes)
    assert fragment in str(caught.value)


WRONG_ELEMENTS = [
    ("dflash.target_layer_ids", GGUFValueType.ARRAY, GGUFValueType.INT64),
    ("dflash.target_layer_ids", GGUFValueType.ARRAY, GGUFValueType.UINT32),
    ("dflash.target_layer_ids", GGUFValueType.UINT32, None),
    ("attention.sliding_window_pattern", GGUFValueType.ARRAY, GGUFValueType.INT32),
    ("attention.sliding_window_pattern", GGUFValueType.ARRAY, GGUFValueType.UINT8),
    ("attention.sliding_window_pattern", GGUFValueType.BOOL, None),
]


@pytest.mark.parametrize(("ending", "kind", "element"), WRONG_ELEMENTS)
def test_lucebox_s_arrays_have_one_element_type_each(
    tmp_path: Path, ending: str, kind: GGUFValueType, element: GGUFValueType | None
) -> None:
    """A1-38, P-34: its loader ignores ids that are not INT32 and a pattern that is not BOOL."""
    conversion = planned(tmp_path, LUCEBOX, layer_types=LAYER_TYPES, sliding_window=48)
    keys = {kv.key: kv for kv in conversion.keys}
    name = f"{conversion.cell.arch}.{ending}"
    right = GGUFValueType.BOOL if "pattern" in ending else GGUFValueType.INT32
    assert (keys[name].type, keys[name].element) == (GGUFValueType.ARRAY, right)
    with pytest.raises(WrongInput, match=f"{ending}: found .*, expected array of {right.name}"):
        read(conversion.cell, {**keys, name: replace(keys[name], type=kind, element=element)})


LUCEBOX_NAMES = {
    "fc.weight": "dflash.fc.weight",
    "hidden_norm.weight": "dflash.hidden_norm.weight",
    "norm.weight": "output_norm.weight",
    "layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
    "layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    "layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
    "layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
    "layers.1.self_attn.q_norm.weight": "blk.1.attn_q_norm.weight",
    "layers.1.self_attn.k_norm.weight": "blk.1.attn_k_norm.weight",
    "layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
    "layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    "layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}


def test_lucebox_s_tensor_names(tmp_path: Path) -> None:
    """A1-20"""
    names = {t.header.name: t.name for t in planned(tmp_path, LUCEBOX).plan.tensors}
    assert {source: name for source, name in names.items() if not source.startswith("layers.0.")} == LUCEBOX_NAMES


BOUNDS = {
    "layer_count": 1024,
    "hidden_size": 131_072,
    "feed_forward_size": 524_288,
    "head_count": 1024,
    "head_dim": 1024,
}


def sized(spec: DrafterSpec, field: str, value: int) -> DrafterSpec:
    """`spec` with one width changed, and with it what has to be equal to it."""
    changes: dict[str, Any] = {field: value}
    if field == "hidden_size":
        changes["target_hidden_size"] = value
    if field == "head_dim":
        changes["rope"] = replace(spec.rope, dimensions=value // 2 * 2)
    return replace(spec, kv_head_count=1, **changes)


@pytest.mark.parametrize("field", BOUNDS)
def test_lucebox_s_bounds(tmp_path: Path, field: str) -> None:
    """A1-41: its loader refuses more; at the bound a drafter is accepted."""
    cell, spec = find_cell("dflash", LUCEBOX), spec_of(tmp_path)
    assert lucebox.BOUNDS == BOUNDS
    assert objections(cell, sized(spec, field, BOUNDS[field])) == []
    above = objections(cell, sized(spec, field, BOUNDS[field] + 1))
    assert f"{field}: Lucebox loads at most {BOUNDS[field]}" in above
    assert all(line.startswith(field) or line.startswith("rope.dimensions") for line in above)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    """A1-41: n_head % n_head_kv."""
    with pytest.raises(WrongInput, match="num_key_value_heads: found 3, expected a divisor of head_count 4"):
        spec_of(tmp_path, num_key_value_heads=3)


# --- the other config keys (A1-9, A1-10, A1-43) ---

PLAIN_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", PLAIN_KEYS)
def test_null_counts_as_absent(tmp_path: Path, key: str) -> None:
    """A1-9: the same words as for a key that is not there, so nothing depends on how a config was written."""
    source, messages = drafter(tmp_path / "drafter"), []
    for value in (DELETE, None):
        (source / "config.json").write_text(json.dumps(small_config(**{key: value})))
        with pytest.raises(WrongInput) as caught:
            read_published(source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert f"missing (looked at {key}" in messages[0]


def test_null_head_dim_counts_as_absent(tmp_path: Path) -> None:
    """A1-9, A1-12: the one plain key with a second source, the rows of k_proj."""
    source = drafter(tmp_path / "drafter")
    (source / "config.json").write_text(json.dumps(small_config(head_dim=None)))
    assert read_published(source).spec.head_dim == 16


DRAFTER_KEYS = {
    "num_target_layers": ("target_layer_count", 6, 9),
    "mask_token_id": ("mask_token_id", MASK, 251),
    "block_size": ("block_size", 8, 16),
    "target_layer_ids": ("capture_layers", [1, 3], [3, 1]),
}
both_places = pytest.mark.parametrize("key", DRAFTER_KEYS)


@both_places
@pytest.mark.parametrize("place", ["dflash_config.{}", "{}"])
@pytest.mark.parametrize("other", [DELETE, None], ids=["absent", "null"])
def test_drafter_keys_stand_in_dflash_config_or_at_the_top(tmp_path: Path, key: str, place: str, other: Any) -> None:
    """A1-10: where the first place is null or absent, the other one counts."""
    field, value, _ = DRAFTER_KEYS[key]
    places = {f"dflash_config.{key}": other, key: other, place.format(key): value}
    published = read_published(drafter(tmp_path / "drafter", **places))
    assert json.loads(json.dumps(getattr(published.spec, field))) == value
    assert published.reader.origins[field] == place.format(key)


@both_places
def test_two_places_of_a_drafter_key_have_to_agree(tmp_path: Path, key: str) -> None:
    """A1-10: where both are set nobody chooses between them for the user."""
    field, value, other = DRAFTER_KEYS[key]
    places = {f"dflash_config.{key}": value, key: value}
    assert json.loads(json.dumps(getattr(spec_of(tmp_path, **places), field))) == value
    with pytest.raises(WrongInput, match="two places disagree: ") as caught:
        read_published(drafter(tmp_path / "other", **{**places, key: other}))
    assert all(f" {place} = " in str(caught.value) for place in places)


def test_draft_block_size_is_another_name_of_block_size(tmp_path: Path) -> None:
    """A1-10"""
    config = {"block_size": DELETE, "dflash_config.draft_block_size": 12}
    assert spec_of(tmp_path, **config).block_size == 12


@every_runtime
@pytest.mark.parametrize("theta", [DELETE, None], ids=["absent", "null"])
def test_no_theta_no_file(tmp_path: Path, runtime: str, theta: Any) -> None:
    """A1-43, A1-6: loaders only warn about a missing base, so the converter is the only gate."""
    source = drafter(tmp_path / "drafter", **{"rope_parameters.rope_theta": theta})
    with pytest.raises(WrongInput, match=r"rope theta: missing \(looked at rope_parameters\.rope_theta .* rope_theta"):
        convert(job(tmp_path, source, runtime))
    assert not list(tmp_path.glob("out*"))


# --- tensors: types and order ---

Invented = Enum("Invented", {"ENORM": "enorm.weight", "SCALE": "scale", "GATE_BIAS": "blk.{i}.gate.bias"})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("roles", [Role, Invented], ids=["ours", "T-17 invented"])
def test_one_dimension_is_always_f32(roles: Any, recipe: str) -> None:
    """T-17: by the shape, not by a name that ends like a norm's."""
    for shape in ((), (1,), (7,), (32,), (4096,), (1, 4096)):
        tensors = [Candidate(role.value.replace("{i}", "0"), shape, TYPES["F32"]) for role in roles]
        for choice in choose_types(RECIPES[recipe], tensors, Facts("dflash", 1, 0, 8, 8)):
            assert (choice.type.name, choice.fell_back) == ("F32", False)


def test_rows_that_do_not_divide_are_announced(tmp_path: Path) -> None:
    """A1-24: rows of 100 are no whole Q8_0 blocks; the plan, the report and the file all say F16."""
    source = drafter(tmp_path / "drafter", intermediate_size=100)
    report = convert(job(tmp_path, source, LUCEBOX, "Q8_0"))
    types = {name: tensor.type.name for name, tensor in read_gguf(report.out).tensors.items()}
    fallen = {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert {name for name, kind in types.items() if kind == "F16"} == fallen
    assert types["blk.0.ffn_up.weight"] == types["dflash.fc.weight"] == "Q8_0"
    assert "2 of 25 tensors fell back to another type" in show.report(report)
    for text in (show.plan(report.conversion), show.report(report)):
        lines = [line for line in text.splitlines() if "is no multiple of 32" in line]
        assert {line.split()[0].rstrip(":") for line in lines} == fallen


@every_runtime
def test_order_in_the_file(tmp_path: Path, runtime: str) -> None:
    """A1-22: what the drafter has once comes first, then layer by layer, 2 before 10."""
    report = convert(job(tmp_path, drafter(tmp_path / "drafter", num_hidden_layers=11), runtime))
    names = list(read_gguf(report.out).tensors)
    layers = [int(name.split(".")[1]) if name.startswith("blk.") else -1 for name in names]
    assert layers == sorted(layers)
    assert layers[:3] == [-1, -1, -1]
    assert set(layers) == {-1, *range(11)}
    per_layer = [[name.split(".", 2)[2] for name, at in zip(names, layers, strict=True) if at == n] for n in range(11)]
    assert all(layer == per_layer[0] for layer in per_layer), "every layer in the same order"


# --- values, sources and targets ---

SCALARS = (bool, int, float, str)


@every_runtime
def test_values_of_keys_are_python_s_own(tmp_path: Path, runtime: str) -> None:
    """P-40: a numpy integer would decide the element type of an array by itself."""
    conversion = planned(tmp_path, runtime, layer_types=LAYER_TYPES, sliding_window=48)
    for kv in conversion.keys:
        values = kv.value if isinstance(kv.value, tuple) else (kv.value,)
        assert {type(value) for value in values} <= set(SCALARS), kv.key


@pytest.mark.parametrize("value", [np.int64(1), np.int32(1), np.uint32(1), np.bool_(True)], ids=lambda v: v.dtype.name)
def test_a_numpy_value_is_refused_by_the_writer(tmp_path: Path, value: Any) -> None:
    """P-40"""
    arch = KeyValue("general.architecture", GGUFValueType.STRING, "dflash")
    ids = KeyValue("dflash.target_layers", GGUFValueType.ARRAY, (value,), GGUFValueType.INT32)
    with pytest.raises(Problems, match=r"dflash\.target_layers"):
        write_gguf(tmp_path / "out.gguf", (arch, ids), (), lambda tensor: ())
    assert not list(tmp_path.glob("out*"))


def test_numpy_facts_would_not_pass_unnoticed(tmp_path: Path) -> None:
    """P-40: a spec made by hand from an array ends at the writer, not in a file."""
    spec = replace(spec_of(tmp_path), capture_layers=tuple(np.array([1, 3])))
    keys = write(find_cell("dflash", LUCEBOX), spec)
    with pytest.raises(Problems, match="target_layer_ids"):
        write_gguf(tmp_path / "out.gguf", keys, (), lambda tensor: ())


@every_runtime
def test_the_target_s_identity_is_recorded(tmp_path: Path, runtime: str) -> None:
    """P-44: two targets of equal width cannot be told apart by a drafter's tensors."""
    source = drafter(tmp_path / "drafter")
    found = []
    for name, architecture in (("Qwen3.5-4B", "Qwen3ForCausalLM"), ("Qwen3.6-4B", "Qwen3MoeForCausalLM")):
        beside = target(tmp_path / name, architectures=[architecture])
        conversion = prepare(ConvertJob(source, beside, runtime, "F32", tmp_path / "out.gguf"))
        keys = {kv.key: kv.value for kv in conversion.keys}
        assert keys["drafter.target.name"] == name
        assert keys["drafter.target.architecture"] == architecture
        assert (keys["drafter.target.block_count"], keys["drafter.target.embedding_length"]) == (6, 64)
        found.append(keys)
    assert found[0]["drafter.vocab.sha256"] == found[1]["drafter.vocab.sha256"]
    assert found[0] != found[1]


SHARDS = [
    ("dflash_draft_model.safetensors",),
    ("mtp.safetensors",),
    ("weights final (2).safetensors",),
    ("dflash_draft_model-00001-of-00002.safetensors", "dflash_draft_model-00002-of-00002.safetensors"),
    ("a.safetensors", "b.safetensors"),
]


@pytest.mark.parametrize("names", SHARDS, ids=lambda names: names[0])
def test_shards_of_any_name_are_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    """P-45, G-20: never a file without tensors."""
    config = small_config()
    tensors = random_tensors(dflash_shapes(config))
    source = tmp_path / "drafter"
    for n, name in enumerate(names):
        part = {tensor: tensors[tensor] for tensor in list(tensors)[n :: len(names)]}
        write_checkpoint(source, config, part)
        shutil.move(source / "model.safetensors", source / name)
    report = convert(ConvertJob(source, None, LUCEBOX, "F32", tmp_path / "out.gguf"))
    file = read_gguf(report.out)
    assert {t.header.name for t in report.conversion.plan.tensors} == set(tensors)
    assert len(file.tensors) == len(tensors)
    assert file.keys["drafter.source.files"].value == tuple(sorted(names))


@every_runtime
def test_each_file_has_its_own_theta(tmp_path: Path, runtime: str) -> None:
    """G-5: the same publisher, the same shape, 10000 in one and 1000000 in the other; both are right."""
    found = {}
    for theta in (10000, 1000000, 10000):
        source = drafter(tmp_path / str(theta), **{"rope_parameters.rope_theta": theta})
        report = convert(job(tmp_path, source, runtime))
        found[theta] = read_gguf(report.out).keys[f"{report.conversion.cell.arch}.rope.freq_base"].value
    assert found == {10000: 10000.0, 1000000: 1000000.0}


@every_runtime
def test_the_drafter_needs_no_tokenizer_files(tmp_path: Path, runtime: str) -> None:
    """G-21, G-22: most drafters come without; eos may be a list, bos and pad null, auto_map have an empty key."""
    ids = {"eos_token_id": [151329, 151336], "bos_token_id": None, "pad_token_id": None}
    source = drafter(tmp_path / "drafter", auto_map={"": "dflash.DFlashDraftModel"}, **ids)
    assert {path.name for path in source.iterdir()} == {"config.json", "model.safetensors"}
    report = convert(job(tmp_path, source, runtime))
    assert report.conversion.warnings == ()
    keys = read_gguf(report.out).keys
    assert ("tokenizer.ggml.tokens" in keys) == report.conversion.cell.tokenizer


@every_runtime
@pytest.mark.parametrize("role", ["pad_token_id", "eos_token_id", "bos_token_id"])
def test_the_mask_may_be_another_special_token(tmp_path: Path, runtime: str, role: str) -> None:
    """G-25: the Ling recipe masks with its pad token, the LongCat recipe with eos."""
    conversion = planned(tmp_path, runtime, **{role: MASK})
    assert conversion.published.spec.mask_token_id == MASK
    assert conversion.warnings == ()
