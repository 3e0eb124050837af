"""R1: no default for a model fact. Every required key of every convertible config, spoiled in every way, is named.

Deleted, null, of another type, or a number that makes no sense: the message has the key and the file (A1-14, T-9).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from published import (
    DELETE,
    SMALL_HIDDEN,
    changed,
    config_beside,
    published_config,
    published_shapes,
    random_tensors,
    scaled_down,
    small_checkpoint,
    small_config,
    tiny_target,
    write_checkpoint,
)

from convert_drafter.converters.checkpoint import TensorHeader
from convert_drafter.converters.config import ConfigReader, leaves, lookup
from convert_drafter.converters.convert import ConvertJob, prepare, read_published
from convert_drafter.converters.dialects import CELLS, doubts, objections
from convert_drafter.converters.drafters import DFLASH, detect
from convert_drafter.converters.errors import DrafterError, WrongInput
from convert_drafter.converters.spec import DrafterSpec

CONVERTIBLE = (
    "z-lab__Qwen3-4B-DFlash-b16",
    "z-lab__Qwen3.5-4B-DFlash",
    "z-lab__Qwen3.5-4B-DFlash@old",
    "z-lab__Qwen3.6-27B-DFlash",
    "z-lab__Qwen3.6-35B-A3B-DFlash",
    "z-lab__Qwen3.5-35B-A3B-DFlash",
    "z-lab__gemma-4-26B-A4B-it-DFlash",
    "z-lab__gpt-oss-120b-DFlash",
    "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash",
    "deepseek-ai__dflash_qwen3_4b_block7",
    "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash",
    "SpecForge__lfm2.5-1.2b-instruct-dflash",
    "SpecForge__qwen2.5-0.5b-dflash",
)
# What two of the files leave to the user, so that they can be read at all.
GIVEN = {
    "z-lab__gpt-oss-120b-DFlash": {"rope_scaling.truncate": True},
    "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash": {"block_size": 8, "num_target_layers": 52},
}
# Every fact a DFlash config has to state, in all its spellings.
REQUIRED: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "feed forward": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv heads": ("num_key_value_heads",),
    "context": ("max_position_embeddings",),
    "vocabulary": ("vocab_size",),
    "epsilon": ("rms_norm_eps",),
    "theta": ("rope_parameters.rope_theta", "rope_theta"),
    "block": ("dflash_config.block_size", "block_size"),
    "mask": ("dflash_config.mask_token_id", "mask_token_id"),
    "captures": ("dflash_config.target_layer_ids", "target_layer_ids"),
    "depth": ("num_target_layers", "dflash_config.num_target_layers"),
}
OTHER_TYPES = ["16", [16], True, {"a": 16}, math.nan, math.inf, -math.inf, 10**400]
BAD: dict[str, list[Any]] = {
    "theta": [*OTHER_TYPES, 0, -1.0],
    "epsilon": [*OTHER_TYPES, 0, -1e-6],
    "mask": [*OTHER_TYPES, 16.5, -1, 2048, 10**18],  # 0 is a token (G-6); 2048 is the size of the vocabulary (T-53)
    "captures": ["1,2", 5, True, {"0": 1}, math.nan, []],
    "block": [*OTHER_TYPES, 16.5, 0, -1, 1],  # one token is the anchor alone
}
BAD_COUNT = [*OTHER_TYPES, 16.5, 0, -1]
BAD_CAPTURE = ["1", None, True, 1.5, math.nan, [1], -1, 1000]


def config_of(name: str) -> dict[str, Any]:
    return scaled_down(changed(published_config(name), GIVEN.get(name, {})))


DEEPSPEC = {"deepseek-ai__dflash_qwen3_4b_block7": {"sample_from_anchor": False}}  # what it has to be asked for
CONFIGS = {name: config_of(name) | DEEPSPEC.get(name, {}) for name in CONVERTIBLE}


def spellings(name: str, fact: str) -> list[str]:
    """The places where this config states the fact."""
    return [path for path in REQUIRED[fact] if lookup(CONFIGS[name], path) is not None]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One weights file per config; the tests put their configs beside links to it."""
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for n, (name, config) in enumerate(CONFIGS.items()):
        made = write_checkpoint(folder / str(n), config, random_tensors(published_shapes(config)))
        files[name] = made / "model.safetensors"
    return files


def refusal(folder: Path, weights: Path, config: dict[str, Any]) -> str:
    source = config_beside(folder / "drafter", weights, config)
    with pytest.raises(WrongInput) as caught:
        read_published(source)
    message = str(caught.value)
    assert message.startswith(f"{source / 'config.json'}: "), message
    return message


# --- the table itself ---


def test_every_config_states_every_fact() -> None:
    for name in CONVERTIBLE:
        for fact in REQUIRED:
            assert spellings(name, fact), f"{name} does not state {fact}"
    for fact, paths in REQUIRED.items():
        seen = {path for name in CONVERTIBLE for path in spellings(name, fact)}
        assert seen == set(paths) - {"dflash_config.num_target_layers"}, fact  # that one is Laguna's alone


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_unspoiled_configs_are_read(name: str, weights: dict[str, Path], tmp_path: Path) -> None:
    published = read_published(config_beside(tmp_path / "drafter", weights[name], CONFIGS[name]))
    assert isinstance(published.spec, DrafterSpec)
    assert published.spec.layer_count == CONFIGS[name]["num_hidden_layers"]


# --- missing ---


@pytest.mark.parametrize("value", [DELETE, None], ids=["deleted", "null"])
@pytest.mark.parametrize("fact", REQUIRED)
@pytest.mark.parametrize("name", CONVERTIBLE)
def test_missing_facts_are_named(name: str, fact: str, value: Any, weights: dict[str, Path], tmp_path: Path) -> None:
    """R1, A1-3, T-9, T-12, T-52, T-53, T-54: in none of its places, and no guess instead."""
    config = changed(CONFIGS[name], dict.fromkeys(spellings(name, fact), value))
    if fact == "captures":  # the cross-checks state nothing themselves
        config = changed(config, {"eagle_aux_hidden_state_layer_ids": DELETE})
    message = refusal(tmp_path, weights[name], config)
    assert "missing (looked at " in message
    for path in spellings(name, fact):
        assert path in message, "every place that was looked at is named"
    assert "--set" in message


DOUBLED = [(n, fact, path) for n in CONVERTIBLE for fact in REQUIRED for path in spellings(n, fact)
           if len(spellings(n, fact)) > 1]  # fmt: skip


def test_some_facts_are_stated_twice() -> None:
    assert {fact for _, fact, _ in DOUBLED} == {"theta", "block", "mask", "captures"}


@pytest.mark.parametrize(("name", "fact", "path"), DOUBLED)
def test_one_of_two_places_is_enough(name: str, fact: str, path: str, weights: dict[str, Path], tmp_path: Path) -> None:
    whole = read_published(config_beside(tmp_path / "whole", weights[name], CONFIGS[name])).spec
    for n, value in enumerate((DELETE, None)):
        config = changed(CONFIGS[name], {path: value})
        assert read_published(config_beside(tmp_path / str(n), weights[name], config)).spec == whole


@pytest.mark.parametrize(("name", "fact", "path"), [case for case in DOUBLED if case[1] != "theta"])
def test_two_places_that_disagree_are_both_named(
    name: str, fact: str, path: str, weights: dict[str, Path], tmp_path: Path
) -> None:
    """T-54, G-10; theta's warning instead is in test_rope.py."""
    value = lookup(CONFIGS[name], path)
    other = [*value[:-1], value[-1] - 1] if isinstance(value, list) else value + 1
    message = refusal(tmp_path, weights[name], changed(CONFIGS[name], {path: other}))
    for place in spellings(name, fact):
        assert f"{place} = " in message


# --- wrong ---

WRONG = [(name, fact, path) for name in CONVERTIBLE for fact in REQUIRED for path in spellings(name, fact)]


def is_refused(source: Path, config: dict[str, Any], path: str) -> bool:
    """True for an error that names the file and the key."""
    (source / "config.json").write_text(json.dumps(config))
    try:
        read_published(source)
    except WrongInput as error:
        return str(error).startswith(f"{source / 'config.json'}: ") and path in str(error)
    return False


@pytest.mark.parametrize(("name", "fact", "path"), WRONG)
def test_wrong_values_are_named(name: str, fact: str, path: str, weights: dict[str, Path], tmp_path: Path) -> None:
    """T-9, T-22, T-53: a string, list, flag, object, NaN or senseless number is never used, cast or passed over."""
    source = config_beside(tmp_path / "drafter", weights[name], CONFIGS[name])
    bad = BAD.get(fact, BAD_COUNT)
    if fact == "theta" and path != spellings(name, fact)[0]:
        bad = OTHER_TYPES  # a number there is superseded by the nested one, with a warning: test_rope.py
    passed = [value for value in bad if not is_refused(source, changed(CONFIGS[name], {path: value}), path)]
    assert passed == []


CAPTURES = [(name, path) for name in CONVERTIBLE for path in spellings(name, "captures")]


@pytest.mark.parametrize(("name", "path"), CAPTURES)
def test_wrong_capture_layers_are_named(name: str, path: str, weights: dict[str, Path], tmp_path: Path) -> None:
    """T-12, T-51: an entry that is no layer of the target, or that is there twice."""
    source = config_beside(tmp_path / "drafter", weights[name], CONFIGS[name])
    listed = lookup(CONFIGS[name], path)
    lists = [[*listed[:-1], bad] for bad in (*BAD_CAPTURE, listed[0])]
    passed = [bad for bad in lists if not is_refused(source, changed(CONFIGS[name], {path: bad}), path)]
    assert passed == []


@pytest.mark.parametrize(("name", "path"), [c for c in CAPTURES if lookup(CONFIGS[c[0]], "num_target_layers") == 36])
def test_the_layer_after_the_last_is_out_of_range(
    name: str, path: str, weights: dict[str, Path], tmp_path: Path
) -> None:
    """T-51: id 48 in a 48-block target; G-9: a count of captures under the key of the depth."""
    listed = [*lookup(CONFIGS[name], path)[:-1], 36]
    message = refusal(tmp_path / "last", weights[name], changed(CONFIGS[name], {path: listed}))
    assert f"{path}: found" in message and "depth 36" in message
    message = refusal(tmp_path / "count", weights[name], changed(CONFIGS[name], {"num_target_layers": 5}))
    assert path in message and "depth 5" in message


# --- captures against fc, and the other list ---


def test_capture_count_has_to_divide_fc(tmp_path: Path) -> None:
    """T-13: 25600 / 2816 is not 9."""
    source = small_checkpoint(tmp_path / "d")
    config = small_config(**{"dflash_config.target_layer_ids": [1, 2, 3]})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongInput, match=r"config\.json: fc\.weight: 128 columns, expected a multiple of 3"):
        read_published(source)


def test_capture_count_of_another_length_finds_no_runtime(tmp_path: Path) -> None:
    """T-12: one id short; fc still divides, but its parts are not the target's width."""
    config = small_config(hidden_size=SMALL_HIDDEN, **{"dflash_config.target_layer_ids": [1, 2, 3, 4, 5]})
    source = write_checkpoint(tmp_path / "d", config, random_tensors(published_shapes(config)))
    config["dflash_config"]["target_layer_ids"] = [1, 2, 3, 4]
    (source / "config.json").write_text(json.dumps(config))
    facts = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": SMALL_HIDDEN, "num_hidden_layers": 6}
    with pytest.raises(WrongInput, match=r"config\.json: fc\.weight: 480 columns = 4 capture layers \* 120"):
        read_published(source, tiny_target(tmp_path / "target", **facts))
    with pytest.raises(WrongInput, match="target_hidden_size"):
        prepare(ConvertJob(source, None, "lucebox", "F32", tmp_path / "out.gguf"))


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [2, 5]}, ["dflash_config.target_layer_ids", "[2, 5]", "one higher"]),
        ({"aux_hidden_state_layer_ids": [1, 3]}, ["dflash_config.target_layer_ids", "aux_hidden_state_layer_ids"]),
        (
            {"dflash_config.target_layer_ids": DELETE, "aux_hidden_state_layer_ids": [2, 4]},
            ["dflash_config.target_layer_ids", "only aux_hidden_state_layer_ids = [2, 4]", "differs by exporter"],
        ),
        ({"num_aux_layers": 3}, ["num_aux_layers: found 3, expected 2"]),
        ({"target_hidden_size": 128}, ["target_hidden_size: found 128, expected 64"]),
        ({"v_head_dim": 32}, ["v_head_dim: found 32, expected 16"]),
        ({"draft_vocab_size": 512}, ["draft_vocab_size: found 512, expected at most 256"]),
        ({"hidden_act": "gelu"}, ["hidden_act: found 'gelu', expected 'silu'"]),
        ({"hidden_activation": "gelu_pytorch_tanh"}, ["hidden_activation: found 'gelu_pytorch_tanh'"]),
        ({"markov_rank": 256}, ["markov_rank: found 256", "DSpark"]),
        ({"dflash_config.markov_rank": 1}, ["dflash_config.markov_rank: found 1", "DSpark"]),
        ({"sample_from_anchor": True}, ["sample_from_anchor: found True"]),
        ({"dflash_config.sample_from_anchor": True}, ["dflash_config.sample_from_anchor: found True"]),
        (
            {"transformer_layer_config": {"hidden_size": 96}},
            ["two places disagree", "transformer_layer_config.hidden_size"],
        ),
        ({"dflash_config.backbone_rotary_base": 0}, ["dflash_config.backbone_rotary_base: found 0.0"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads: found 3", "head_count 4"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers: found 1000000000000", "25"]),
        ({"num_target_layers": 6, "dflash_config.num_target_layers": 7}, ["num_target_layers = 6", "= 7"]),
    ],
)
def test_other_contradictions(tmp_path: Path, changes: dict[str, Any], fragments: list[str]) -> None:
    """G-7, G-13, G-24 and what else a config can say against its own tensors and kind."""
    source = small_checkpoint(tmp_path / "d")
    (source / "config.json").write_text(json.dumps(small_config(**changes)))
    with pytest.raises(WrongInput) as caught:
        read_published(source)
    for fragment in (str(source / "config.json"), *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("key", ["eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids"])
def test_the_list_that_is_one_higher_is_a_cross_check(tmp_path: Path, key: str) -> None:
    """G-7: Laguna and Nemotron carry both lists."""
    published = read_published(small_checkpoint(tmp_path / "d", **{key: [2, 4]}))
    assert published.spec.capture_layers == (1, 3)
    assert published.reader.origins["capture_layers"] == "dflash_config.target_layer_ids"


def test_capture_order_is_kept(tmp_path: Path) -> None:
    """The order is that of fc's columns, so it is never sorted."""
    source = small_checkpoint(tmp_path / "d", **{"dflash_config.target_layer_ids": [5, 0]})
    assert read_published(source).spec.capture_layers == (5, 0)


# --- what may be missing ---


def test_mask_token_zero_is_a_token(tmp_path: Path) -> None:
    """G-6"""
    assert (
        read_published(small_checkpoint(tmp_path / "d", **{"dflash_config.mask_token_id": 0})).spec.mask_token_id == 0
    )


@pytest.mark.parametrize("value", [None, [], 3, "x", True])
def test_dflash_config_that_is_no_object(tmp_path: Path, value: Any) -> None:
    """T-11: treated as absent, so the top level counts."""
    top = {"mask_token_id": 250, "target_layer_ids": [1, 3]}
    assert read_published(small_checkpoint(tmp_path / "top", dflash_config=None, **top)).spec.mask_token_id == 250
    source = small_checkpoint(tmp_path / "d")
    (source / "config.json").write_text(json.dumps({**small_config(), "dflash_config": value, **top}))
    assert read_published(source).spec.capture_layers == (1, 3)
    (source / "config.json").write_text(json.dumps({**small_config(), "dflash_config": value}))
    with pytest.raises(WrongInput, match=r"config\.json: capture layers: missing \(looked at dflash_config\."):
        read_published(source)


@pytest.mark.parametrize("value", [DELETE, None])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_head_dim_comes_from_the_tensor(tmp_path: Path, value: Any, prefix: str) -> None:
    """T-10, G-11, A1-12: rows of k_proj, never a default and never hidden_size / heads (here 64 / 4 = 16)."""
    config = small_config(head_dim=24)
    tensors = {f"{prefix}{name}": array for name, array in random_tensors(published_shapes(config)).items()}
    source = write_checkpoint(tmp_path / "d", changed(config, {"head_dim": value}), tensors)
    published = read_published(source)
    assert published.spec.head_dim == 24
    assert "k_proj" in published.reader.origins["head_dim"]


@pytest.mark.parametrize("value", ["16", [16], True, {}, math.nan, 16.5, 0, -16, 15])
def test_wrong_head_dim_is_named(tmp_path: Path, value: Any) -> None:
    source = small_checkpoint(tmp_path / "d")
    (source / "config.json").write_text(json.dumps(small_config(head_dim=value)))
    with pytest.raises(WrongInput, match=r"config\.json: head_dim"):
        read_published(source)


def test_head_dim_that_no_tensor_tells_is_missing(tmp_path: Path) -> None:
    source = small_checkpoint(tmp_path / "d")
    config = small_config(head_dim=DELETE, num_key_value_heads=3)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongInput, match=r"config\.json: head_dim: missing .*k_proj\.weight with a multiple of 3 rows"):
        read_published(source)


def test_head_dim_against_the_tensors_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    """A1-13"""
    source = small_checkpoint(tmp_path / "d")
    (source / "config.json").write_text(json.dumps(small_config(head_dim=8)))
    with pytest.raises(
        WrongInput, match=r"k_proj\.weight: found shape \[32, 64\], expected \[16, 64\] \(keys, hidden\)"
    ):
        prepare(ConvertJob(source, None, "lucebox", "F32", tmp_path / "out.gguf"))


@pytest.mark.parametrize("key", ["hidden_act", "architectures", "dtype", "layer_types", "rope_scaling"])
def test_optional_keys_may_be_missing(tmp_path: Path, key: str) -> None:
    whole = read_published(small_checkpoint(tmp_path / "whole")).spec
    assert read_published(small_checkpoint(tmp_path / "d", **{key: DELETE})).spec == whole
    assert read_published(small_checkpoint(tmp_path / "n", **{key: None})).spec == whole


# --- anything at all ---

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.sampled_from(["", "yarn", "16", "silu"])
    | st.sampled_from([10**400, -(10**30), 2**31, 2**64, 1e308]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "factor", "mask_token_id"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
MORE_PATHS = (
    "dflash_config", "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "use_sliding_window",
    "is_causal", "partial_rotary_factor", "head_dim", "dflash_config.use_swa", "dflash_config.swa_window_size",
    "rope_parameters.full_attention", "rope_parameters.rope_type", "rope_parameters.mrope_section", "architectures",
    "final_logit_softcapping", "quantization_config", "rope_is_neox_style", "attention_bias", "has_embed_tokens",
)  # fmt: skip


def headers_of(config: dict[str, Any]) -> dict[str, TensorHeader]:
    shapes = published_shapes(config)
    return {
        name: TensorHeader(name, "BF16", shape, Path("d/model.safetensors"), 0, 0) for name, shape in shapes.items()
    }


HEADERS = {name: headers_of(config) for name, config in CONFIGS.items()}
PATHS = {name: sorted({*leaves(config), *MORE_PATHS}) for name, config in CONFIGS.items()}


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(CONVERTIBLE))
    return name, draw(st.dictionaries(st.sampled_from(PATHS[name]), JSON, min_size=1, max_size=3))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(spoiled(), st.sampled_from([True, False]))
@example((CONVERTIBLE[1], {"dflash_config.target_layer_ids": []}), False)
@example((CONVERTIBLE[0], {"num_hidden_layers": 10**30}), False)
@example((CONVERTIBLE[0], {"num_key_value_heads": 0, "head_dim": None}), False)
def test_any_config_is_read_or_refused_and_never_crashes(case: tuple[str, dict[str, Any]], cells: bool) -> None:
    """Up to three keys hold any JSON: either every fact is there and consistent, or an error of ours names the file."""
    name, changes = case
    config = json.loads(json.dumps(CONFIGS[name]))
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = config
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = value
    reader = ConfigReader(config, "d/config.json")
    try:
        kind = detect(reader, HEADERS[name])
        spec = kind.read_spec(reader, HEADERS[name], None)
        assert kind is DFLASH
        DFLASH.rules(reader)
        DFLASH.dropped(reader)
        reader.unread()
        for cell in CELLS.values() if cells else ():
            objections(cell, spec), doubts(cell, spec)
    except DrafterError as error:
        assert len(str(error)) > 20
        return
    assert 0 <= spec.mask_token_id < spec.vocab_size
    assert math.isfinite(spec.rope.theta) and spec.rope.theta > 0
    assert all(0 <= k < spec.target_layer_count for k in spec.capture_layers)
