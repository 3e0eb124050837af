"""Rotary embedding as configs spell it: theta from its many places, scaling, rotated dimensions, M-RoPE sections.

A wrong theta loads, drafts, and is rarely right; so there is no default and no guess (A1-1, A1-7, G-1).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from published import DELETE, small_checkpoint, tiny_target

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import ConvertJob, prepare, read_published
from convert_drafter.converters.drafters.rope import read_rope
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.ops import COPY, PERMUTE_ROPE
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import Rope, RopeScaling

WHERE = "drafter/config.json"
HEAD_DIM = 16
FULL, SLIDING = "full_attention", "sliding_attention"
M10, M1 = 10_000_000, 1_000_000
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def read(
    config: dict[str, Any], layer_types: tuple[str, ...] = (FULL,), mrope: bool | None = False, **settings: str
) -> tuple[Rope, ConfigReader]:
    reader = ConfigReader(config, WHERE, {key.replace("__", "."): value for key, value in settings.items()})
    return read_rope(reader, HEAD_DIM, layer_types, mrope), reader


def refusal(config: dict[str, Any], *args: Any, **options: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        read(config, *args, **options)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ") or "rope." in message.split(":")[0]  # a bare fact gets its file later
    return message


def theta(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": parameters}


# --- theta: the twelve cases ---

TWELVE = [
    pytest.param(theta(rope_theta=M10), 1e7, "rope_parameters.rope_theta", id="A1-3.1 nested 10M"),
    pytest.param(
        {**theta(rope_theta=M10), "rope_theta": M1}, 1e7, "rope_parameters.rope_theta", id="A1-3.2 nested beats top"
    ),
    pytest.param({"rope_theta": M10}, 1e7, "rope_theta", id="A1-3.3 top-level 10M alone"),
    pytest.param({"rope_theta": M1}, 1e6, "rope_theta", id="A1-3.4 genuine 1M at top"),
    pytest.param(theta(rope_theta=M1), 1e6, "rope_parameters.rope_theta", id="A1-3.5 genuine 1M nested"),
    pytest.param({"rope_theta": 500000}, 500000.0, "rope_theta", id="A1-3.6 int becomes float"),
    pytest.param({}, None, None, id="A1-3.7 empty config"),
    pytest.param(theta(), None, None, id="A1-3.8 empty rope_parameters"),
    pytest.param({"rope_theta": None}, None, None, id="A1-3.9 top-level null"),
    pytest.param(
        {**theta(rope_theta=None), "rope_theta": M10}, 1e7, "rope_theta", id="A1-3.10 nested null falls through"
    ),
    pytest.param({**theta(rope_theta=None), "rope_theta": None}, None, None, id="A1-3.11 null everywhere"),
    pytest.param(
        {"rope_scaling": None, "rope_parameters": None, "max_position_embeddings": 262144, "model_type": "qwen3"},
        None,
        None,
        id="A1-3.12 no silent 1M",
    ),
]


@pytest.mark.parametrize(("config", "expected", "origin"), TWELVE)
def test_twelve_cases(config: dict[str, Any], expected: float | None, origin: str | None) -> None:
    if expected is None:
        message = refusal(config)
        assert "rope theta: missing" in message
        assert "rope_parameters.rope_theta or" in message and "or rope_theta" in message, "both places are named (A1-1)"
        assert "1000000" not in message
    else:
        rope, reader = read(config)
        assert (type(rope.theta), rope.theta, reader.origins["rope.theta"]) == (float, expected, origin)


@pytest.mark.parametrize("shape", [None, [], [M10], 3, 1e7, "x", True, {}])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_what_is_no_object_falls_through_to_the_top_level(key: str, shape: Any) -> None:
    """T-6, A1-4, G-2, T-56"""
    rope, _ = read({key: shape, "rope_theta": M10})
    assert rope == Rope(1e7, HEAD_DIM)
    assert "rope theta: missing" in refusal({key: shape})


@pytest.mark.parametrize("value", ["1e7", "", [M10], True, {"a": 1}, math.nan, math.inf, -math.inf, 10**400, 0, -1.0])
@pytest.mark.parametrize(
    "path",
    ["rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta", f"rope_parameters.{FULL}.rope_theta"],
)
def test_senseless_theta_is_named(path: str, value: Any) -> None:
    """T-22; a list, one theta per layer, is another model."""
    config: Any = value
    for part in reversed(path.split(".")):
        config = {part: config}
    assert f"{path}: found" in refusal(config)


# --- theta: per layer type, elsewhere, and both ---


def per_type(full: Any, sliding: Any, **more: Any) -> dict[str, Any]:
    return theta(**{FULL: {"rope_theta": full}, SLIDING: {"rope_theta": sliding}}, **more)


@pytest.mark.parametrize(
    ("layer_types", "expected"),
    [
        pytest.param((FULL, FULL), 1e6, id="G-2 only full layers: the sliding theta is dead"),
        pytest.param((SLIDING,), 1e4, id="only sliding layers"),
    ],
)
def test_theta_of_the_layer_types_in_use(layer_types: tuple[str, ...], expected: float) -> None:
    """G-2: rope_theta null beside per-layer-type objects, as Gemma-4's drafter has it."""
    rope, reader = read(per_type(1e6, 1e4, rope_theta=None, rope_type="default"), layer_types)
    assert rope.theta == expected
    assert reader.origins["rope.theta"] == f"rope_parameters.{layer_types[0]}.rope_theta"
    assert reader.unread() == [], "the dead theta is no unread key"


@pytest.mark.parametrize("layer_types", [(SLIDING, FULL), ()])
def test_two_thetas_in_use_are_refused(layer_types: tuple[str, ...]) -> None:
    """No runtime's DFlash has two bases; without layer_types both may be in use."""
    message = refusal(per_type(1e6, 1e4), layer_types)
    assert f"rope_parameters.{FULL}.rope_theta = 1000000.0" in message
    assert f"rope_parameters.{SLIDING}.rope_theta = 10000.0" in message
    assert read(per_type(1e6, 1e6), layer_types)[0].theta == 1e6


def test_nested_places_that_disagree_are_refused() -> None:
    message = refusal(theta(rope_theta=1e7, **{FULL: {"rope_theta": 1e6}}))
    assert "rope_parameters.rope_theta = 10000000.0" in message
    assert f"rope_parameters.{FULL}.rope_theta = 1000000.0" in message
    assert "two places disagree" in refusal({**theta(rope_theta=1e7), "rope_scaling": {"rope_theta": 1e6}})


def test_theta_inside_rope_scaling() -> None:
    rope, reader = read({"rope_scaling": {"rope_theta": 1e7}})
    assert (rope.theta, reader.origins["rope.theta"]) == (1e7, "rope_scaling.rope_theta")


@pytest.mark.parametrize("key", ["global_rope_theta", "rope_global_theta", "rope_theta_global", "rotary_emb_base"])
def test_other_names_of_the_top_level_theta(key: str) -> None:
    assert read({key: 1e7})[0].theta == 1e7
    assert "two places disagree" in refusal({key: 1e7, "rope_theta": 1e6})


@pytest.mark.parametrize("key", ["rope_local_base_freq", "swa_rope_theta", "local_rope_theta"])
def test_a_theta_of_the_sliding_layers_alone(key: str) -> None:
    config = {"rope_theta": 1e6, key: 1e4}
    assert f"{key}: found 10000" in refusal(config, (SLIDING, FULL))
    assert read(config, (FULL, FULL))[0].theta == 1e6, "no layer slides"
    assert read({"rope_theta": 1e6, key: 1e6}, (SLIDING,))[0].theta == 1e6


def test_laguna_s_theta_of_the_sliding_layers() -> None:
    config = {"rope_theta": 5e5, "swa_rope_parameters": {"rope_theta": 1e4}}
    assert "swa_rope_parameters.rope_theta: found 10000" in refusal(config, (SLIDING,))


def test_nested_beats_top_level_with_a_warning_naming_both() -> None:
    """A1-1"""
    rope, reader = read({**theta(rope_theta=M10), "rope_theta": M1})
    assert rope.theta == 1e7
    assert reader.warnings == [f"{WHERE}: rope_parameters.rope_theta = 1e+07 is used, rope_theta = 1e+06 is not"]
    assert read({**theta(rope_theta=M10), "rope_theta": 1e7})[1].warnings == [], "equal ones are no doubt (Nemotron)"


def test_the_user_s_theta_is_never_passed_over() -> None:
    config = {**theta(rope_theta=M1), "rope_theta": M1}
    assert read(config, rope_parameters__rope_theta="1e7")[0].theta == 1e7
    message = refusal(config, rope_theta="1e7")
    assert "--set rope_theta: found 1e+07, but rope_parameters.rope_theta = 1e+06 goes before it" in message


def job(source: Path, **options: Any) -> ConvertJob:
    target = options.pop("target", None)
    runtime = options.pop("runtime", "lucebox")
    return ConvertJob(source, target, runtime, "F32", source.parent / "out.gguf", **options)


def test_strict_refuses_two_thetas(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", rope_theta=M1)
    assert any("rope_theta = 1e+06 is not" in warning for warning in prepare(job(source)).warnings)
    with pytest.raises(Problems) as caught:
        prepare(job(source, strict=True))
    for fragment in ("--strict", "config.json", "rope_parameters.rope_theta = 1e+07", "rope_theta = 1e+06"):
        assert fragment in str(caught.value)
    agreeing = small_checkpoint(tmp_path / "agreeing", rope_theta=M10)
    assert prepare(job(agreeing, strict=True)).published.spec.rope.theta == 1e7


def test_missing_theta_leaves_no_file(tmp_path: Path) -> None:
    """A1-6"""
    source = small_checkpoint(tmp_path / "drafter", **{"rope_parameters.rope_theta": DELETE})
    with pytest.raises(WrongInput, match=r"config\.json: rope theta: missing"):
        prepare(job(source))
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


# --- scaling ---

SCALINGS = [
    pytest.param(None, None, id="T-56 null"),
    pytest.param({}, None, id="empty"),
    pytest.param({"rope_type": "default"}, None, id="default"),
    pytest.param({"rope_type": None}, None, id="null type"),
    pytest.param({"type": "mrope", "rope_type": "default"}, "disagree", id="type and rope_type differ"),
    pytest.param({"type": "mrope"}, None, id="mrope stretches nothing"),
    pytest.param({"rope_type": "linear", "factor": 8}, RopeScaling("linear", 8.0), id="linear"),
    pytest.param({"type": "linear", "factor": 8.0}, RopeScaling("linear", 8.0), id="G-17 spelled type"),
    pytest.param({"rope_type": "linear", "type": "linear", "factor": 8}, RopeScaling("linear", 8.0), id="both names"),
    pytest.param({"rope_type": "linear"}, "{home}.factor", id="linear without factor"),
    pytest.param({"factor": 8.0}, "{home}.rope_type", id="factor without type"),
    pytest.param(YARN, RopeScaling("yarn", 4.0, 4096), id="yarn"),
    pytest.param({**YARN, "truncate": True}, RopeScaling("yarn", 4.0, 4096), id="yarn truncate true"),
    pytest.param({**YARN, "truncate": False}, "{home}.truncate", id="G-17 yarn truncate false"),
    pytest.param(
        {**YARN, "beta_fast": 32.0, "beta_slow": 1, "attention_factor": 1.2, "extrapolation_factor": 1.0},
        RopeScaling("yarn", 4.0, 4096, attention_factor=1.2),
        id="yarn with the paper's parameters spelled out",
    ),
    pytest.param(
        {**YARN, "attn_factor": 1.2}, RopeScaling("yarn", 4.0, 4096, attention_factor=1.2), id="yarn attn_factor"
    ),
    pytest.param(
        {**YARN, "beta_fast": 16, "beta_slow": 2, "extrapolation_factor": 0.5, "attention_factor": 1.138629436},
        RopeScaling("yarn", 4.0, 4096, extrapolation_factor=0.5, beta_fast=16.0, beta_slow=2.0),
        id="yarn with parameters of its own",
    ),
    pytest.param(
        {"rope_type": "linear", "factor": 4.0, "beta_fast": 16}, "{home}.beta_fast: found 16", id="linear with beta"
    ),
    pytest.param({**YARN, "attn_factor": 1.2, "attention_factor": 1.0}, "attn_factor", id="yarn two factors"),
    pytest.param({**YARN, "factor": None}, "{home}.factor", id="yarn without factor"),
    pytest.param(
        {**YARN, "original_max_position_embeddings": None},
        "{home}.original_max_position_embeddings",
        id="yarn without the original length",
    ),
    pytest.param({**YARN, "mscale": 1.0}, "{home}.mscale", id="G-17 mscale"),
    pytest.param({**YARN, "mscale_all_dim": 1.0}, "{home}.mscale_all_dim", id="G-17 mscale_all_dim"),
    pytest.param({**YARN, "mscale": None}, RopeScaling("yarn", 4.0, 4096), id="mscale null"),
    pytest.param({"rope_type": "llama3", "factor": 8.0}, "'llama3'", id="llama3"),
    pytest.param({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'", id="dynamic"),
    pytest.param({"rope_type": "longrope", "short_factor": [1]}, "'longrope'", id="longrope"),
    pytest.param({"type": "su"}, "'su'", id="su"),
    pytest.param({"rope_type": "proportional"}, "'proportional'", id="proportional"),
    pytest.param({"rope_type": 3}, "{home}.rope_type: found 3", id="type is no string"),
    pytest.param({**YARN, "factor": "4"}, "{home}.factor: found '4'", id="factor is a string"),
    pytest.param({**YARN, "factor": math.nan}, "{home}.factor: found nan", id="factor is NaN"),
    pytest.param({**YARN, "factor": 0}, "factor: found 0.0", id="factor is zero"),
    pytest.param({**YARN, "factor": -4}, "factor: found -4.0", id="factor is negative"),
    pytest.param({**YARN, "original_max_position_embeddings": 0}, "original_context_length: found 0", id="length zero"),
]


@pytest.mark.parametrize("home", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("scaling", "expected"), SCALINGS)
def test_scaling(scaling: dict[str, Any] | None, expected: RopeScaling | str | None, home: str) -> None:
    config = {"rope_theta": M10, home: scaling}
    if isinstance(expected, str):
        assert expected.format(home=home) in refusal(config)
    else:
        assert read(config)[0].scaling == expected


@pytest.mark.parametrize("key", ["original_max_position_embeddings", "initial_context_length"])
def test_original_length_beside_the_scaling(key: str) -> None:
    short = {key_: value for key_, value in YARN.items() if key_ != "original_max_position_embeddings"}
    rope, reader = read({"rope_theta": M10, "rope_scaling": short, key: 4096})
    assert rope.scaling == RopeScaling("yarn", 4.0, 4096)
    assert reader.origins["rope.scaling.original_context_length"] == key
    message = refusal({"rope_theta": M10, "rope_scaling": YARN, key: 8192})
    assert "rope_scaling.original_max_position_embeddings = 4096" in message and f"{key} = 8192" in message


@pytest.mark.parametrize(
    ("parameters", "scaling", "expected"),
    [
        ({**YARN, "rope_theta": M10}, YARN, RopeScaling("yarn", 4.0, 4096)),
        ({"rope_theta": M10}, YARN, RopeScaling("yarn", 4.0, 4096)),
        ({**YARN, "rope_theta": M10}, {"type": "yarn", "factor": 8.0}, None),
        ({"rope_theta": M10, "rope_type": "default"}, YARN, None),
        ({**YARN, "rope_theta": M10}, {"rope_type": "default"}, None),
    ],
)
def test_both_homes(parameters: dict[str, Any], scaling: dict[str, Any], expected: RopeScaling | None) -> None:
    """One silent side is no contradiction; a stated "default" is."""
    config = {"rope_parameters": parameters, "rope_scaling": scaling, "original_max_position_embeddings": 4096}
    if expected is None:
        message = refusal(config)
        assert "rope_parameters and rope_scaling disagree" in message and "--set" in message
    else:
        assert read(config)[0].scaling == expected


@pytest.mark.parametrize("kind", ["yarn", "linear", "proportional"])
def test_scaling_per_layer_type_is_refused(kind: str) -> None:
    config = theta(rope_theta=M10, **{FULL: {"rope_type": kind, "factor": 4.0}})
    assert f"rope_parameters.{FULL}.rope_type: found '{kind}'" in refusal(config)


# --- rotated dimensions ---


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"partial_rotary_factor": 0.25}, id="top level (MiMo)"),
        pytest.param({"rope_pct": 0.25}, id="rope_pct"),
        pytest.param({"rope_percent": 0.25}, id="rope_percent"),
        pytest.param(theta(partial_rotary_factor=0.25), id="rope_parameters"),
        pytest.param(theta(**{FULL: {"partial_rotary_factor": 0.25}}), id="per layer type (Gemma-4)"),
        pytest.param({**theta(partial_rotary_factor=0.25), "partial_rotary_factor": 0.25}, id="both places (Qwen3.6)"),
    ],
)
def test_partial_rotary(config: dict[str, Any]) -> None:
    rope, _ = read({"rope_theta": M10, **config})
    assert rope == Rope(1e7, 4)


def test_rotary_of_the_whole_head() -> None:
    rope, reader = read({"rope_theta": M10, "partial_rotary_factor": 1.0})
    assert rope.dimensions == HEAD_DIM
    assert reader.origins["rope.dimensions"] == "partial_rotary_factor"
    assert "head_dim" in read({"rope_theta": M10})[1].origins["rope.dimensions"]


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ({**theta(partial_rotary_factor=0.5), "partial_rotary_factor": 0.25}, ["rope_parameters.partial", "= 0.25"]),
        ({"partial_rotary_factor": 0}, ["partial_rotary_factor: found 0.0"]),
        ({"partial_rotary_factor": -0.5}, ["partial_rotary_factor: found -0.5"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor: found 1.5"]),
        ({"partial_rotary_factor": "0.5"}, ["partial_rotary_factor: found '0.5'"]),
        ({"partial_rotary_factor": True}, ["partial_rotary_factor: found True"]),
        ({"partial_rotary_factor": 0.2}, ["rope.dimensions: found 3", "even"]),
        ({"partial_rotary_factor": 0.01}, ["rope.dimensions: found 0"]),
        ({"partial_rotary_factor": 0.5, "rope_is_neox_style": False}, ["partial_rotary_factor: found 0.5", "interl"]),
    ],
)
def test_senseless_partial_rotary(config: dict[str, Any], fragments: list[str]) -> None:
    message = refusal({"rope_theta": M10, **config})
    assert all(fragment in message for fragment in fragments), message


# --- M-RoPE ---


def test_mrope_target_uses_the_temporal_section() -> None:
    rope, reader = read({"rope_theta": M10}, mrope=True)
    assert rope.sections == (8, 0, 0, 0)
    assert "target" in reader.origins["rope.sections"]
    assert read({"rope_theta": M10, "partial_rotary_factor": 0.5}, mrope=True)[0].sections == (4, 0, 0, 0)


@pytest.mark.parametrize("mrope", [True, None])
def test_own_sections_are_the_target_s(mrope: bool | None) -> None:
    """G-14: sections copied from the target's config; without a target they are believed."""
    rope, reader = read(theta(rope_theta=M10, mrope_section=[11, 11, 10]), mrope=mrope)
    assert rope.sections == (8, 0, 0, 0)
    assert reader.origins["rope.sections"] == (
        "the target positions with M-RoPE" if mrope else "rope_parameters.mrope_section"
    )


@pytest.mark.parametrize("mrope", [False, None])
def test_no_sections_without_mrope(mrope: bool | None) -> None:
    assert read({"rope_theta": M10}, mrope=mrope)[0].sections is None


def test_own_sections_for_a_plain_target_are_refused() -> None:
    message = refusal({"rope_theta": M10, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, mrope=False)
    assert "rope_scaling.mrope_section: found [2, 3, 3]" in message and "target" in message


def test_sections_are_checked() -> None:
    assert "mrope_section[1]: found 'x'" in refusal(theta(rope_theta=M10, mrope_section=[1, "x"]), mrope=True)


# --- the layout of the pairs, and what reaches the file ---

TARGET = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 6, "hidden_size": 64}


@pytest.mark.parametrize("target_says", [True, False])
@pytest.mark.parametrize(
    ("drafter", "op"),
    [
        ({}, COPY),
        ({"rope_is_neox_style": True}, COPY),
        ({"rope_is_neox_style": False}, PERMUTE_ROPE),
        ({"dflash_config.rope_is_neox_style": False}, PERMUTE_ROPE),
    ],
)
def test_pair_layout_is_the_drafter_s_own(tmp_path: Path, drafter: dict[str, Any], op: Any, target_says: bool) -> None:
    """T-57: the target's flag says nothing about the drafter's rows."""
    source = small_checkpoint(tmp_path / "drafter", vocab_size=2048, **{"dflash_config.mask_token_id": 2047}, **drafter)
    target = tiny_target(tmp_path / "target", **TARGET, rope_is_neox_style=target_says)
    conversion = prepare(job(source, target=target, runtime="llama.cpp"))
    ops = {tensor.key[0]: tensor.op for tensor in conversion.plan.tensors}
    assert {ops[role] for role in (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_Q_NORM, Role.ATTN_K_NORM)} == {op}
    assert ops[Role.ATTN_V] == COPY


def test_pair_layout_has_one_spelling(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", rope_interleave=True)
    with pytest.raises(WrongInput, match=r"config\.json: rope_interleave: found True.*rope_is_neox_style"):
        read_published(source)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}])
def test_no_scaling_writes_no_scaling_keys(tmp_path: Path, scaling: Any) -> None:
    """T-56"""
    source = small_checkpoint(tmp_path / "drafter", rope_scaling=scaling)
    keys = [kv.key for kv in prepare(job(source)).keys]
    assert "qwen35-dflash-draft.rope.freq_base" in keys
    assert not [key for key in keys if "scaling" in key or "yarn" in key]


def test_facts_that_contradict_name_the_key_and_the_file(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "drafter", partial_rotary_factor=0.2)
    config = json.loads((source / "config.json").read_text())
    assert config["head_dim"] == HEAD_DIM
    with pytest.raises(WrongInput, match=r"config\.json: partial_rotary_factor: found 3, expected an even number"):
        read_published(source)
    scaled = small_checkpoint(
        tmp_path / "scaled", rope_scaling={**YARN, "factor": -4}, **{"rope_parameters.rope_type": DELETE}
    )
    with pytest.raises(WrongInput, match=r"config\.json: rope_scaling\.factor: found -4\.0, expected a finite number"):
        read_published(scaled)
