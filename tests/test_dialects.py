"""The hub proved: what a cell writes it reads back, and what it cannot say it refuses to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.dialects import CELLS, Cell, cell_of_arch, doubts, find_cell, objections, read, write
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Rope, RopeScaling, SlidingWindow, facts_of, spec_from

CELL_LIST = list(CELLS.values())
by_runtime = pytest.mark.parametrize("cell", CELL_LIST, ids=lambda cell: cell.runtime)

PLAIN = DrafterSpec(
    kind="dflash",
    layer_count=3,
    hidden_size=64,
    feed_forward_size=96,
    head_count=4,
    kv_head_count=2,
    head_dim=16,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-6,
    rope=Rope(theta=1e7, dimensions=16),
    block_size=8,
    mask_token_id=250,
    capture_layers=(4, 1, 9),
    target_layer_count=12,
    target_hidden_size=64,
    causal=False,
    window=SlidingWindow(48, (True, True, False)),
)
YARN = RopeScaling("yarn", 4.0, 4096, 1.0, 0.5, 32.0, 1.0)
FULL = replace(
    PLAIN,
    causal=True,
    rope=Rope(1e6, 8, YARN, (4, 0, 0, 0)),
    attention_value_scale=0.5,
    embedding_scale=16.0,
    logit_scale=0.25,
    logit_softcap=30.0,
)
RICHEST = {
    "llama.cpp": FULL,
    "ik_llama.cpp": replace(
        FULL,
        rope=replace(FULL.rope, sections=None),
        target_hidden_size=96,
        context_theta=5e6,
        embedding_scale=None,
        logit_scale=None,
        logit_softcap=None,
    ),
    "lucebox": PLAIN,
}


def keys_of(cell: Cell, spec: DrafterSpec) -> dict[str, KeyValue]:
    return {kv.key: kv for kv in write(cell, spec)}


@by_runtime
def test_golden_keys(cell: Cell) -> None:
    """Every key, GGUF type and value of the richest spec a cell carries, and every tensor name, as on record.

    T-51: capture layers per dialect; T-5: element types; A1-17: Lucebox's key list.
    """
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}.json").read_text())
    assert golden == {"keys": shown(write(cell, RICHEST[cell.runtime])), "tensors": tensor_names(cell)}


def shown(keys: tuple[KeyValue, ...]) -> dict[str, Any]:
    return {
        kv.key: [kv.type.name if kv.element is None else f"[{kv.element.name}]", json.loads(json.dumps(kv.value))]
        for kv in keys
    }


def tensor_names(cell: Cell) -> dict[str, str | None]:
    return {role.name: cell.tensor_name((role, 2 if role.per_layer else None)) for role in Role}


@by_runtime
def test_richest_spec_comes_back(cell: Cell) -> None:
    spec = RICHEST[cell.runtime]
    assert objections(cell, spec) == []
    assert spec_from(read(cell, keys_of(cell, spec))) == spec


floats = st.floats(2.0**-10, 2.0**26, width=32).map(lambda x: float(f"{x:.6g}"))
sizes = st.integers(1, 2**20)


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions."""
    layers, kv, depth = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(4, 90))
    head_dim = 2 * draw(st.integers(1, 128))
    slides = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    vocab = draw(st.integers(2, 300_000))
    captures = draw(st.lists(st.integers(0, depth - 2), min_size=1, max_size=8, unique=True))
    scaling = draw(
        st.none() | st.builds(RopeScaling, st.sampled_from(["linear", "yarn"]), floats, sizes, floats, floats)
    )
    optional = st.none() | floats
    return replace(
        PLAIN,
        layer_count=layers,
        kv_head_count=kv,
        head_count=kv * draw(st.integers(1, 16)),
        head_dim=head_dim,
        hidden_size=(hidden := draw(sizes)),
        target_hidden_size=hidden,
        vocab_size=vocab,
        mask_token_id=draw(st.integers(0, vocab - 1)),
        norm_epsilon=draw(floats),
        rope=Rope(draw(floats), 2 * draw(st.integers(1, head_dim // 2)), scaling),
        block_size=draw(st.integers(2, 64)),
        capture_layers=tuple(captures),
        target_layer_count=depth,
        causal=draw(st.booleans()),
        window=SlidingWindow(draw(sizes), tuple(slides)) if any(slides) else None,
        context_theta=draw(optional),
        attention_value_scale=draw(optional),
        embedding_scale=draw(optional),
        logit_scale=draw(optional),
        logit_softcap=draw(optional),
    )


@by_runtime
@given(spec=specs())
def test_what_is_written_comes_back_or_is_refused(cell: Cell, spec: DrafterSpec) -> None:
    """read(write(spec)) == spec for every spec the cell accepts; the others are refused naming a fact of theirs."""
    refused = {line.split(":")[0].split(" =")[0] for line in objections(cell, spec)}
    if refused:
        assert refused <= set(facts_of(spec))
    else:
        assert spec_from(read(cell, keys_of(cell, spec))) == spec


@given(spec=specs())
def test_facts_are_flattened_and_built_without_loss(spec: DrafterSpec) -> None:
    assert spec_from(facts_of(spec)) == spec


CANNOT = {
    "llama.cpp": {"context_theta": 5e6, "target_hidden_size": 128},
    "ik_llama.cpp": {
        "embedding_scale": 2.0,
        "logit_scale": 0.5,
        "logit_softcap": 30.0,
        "capture_layers": (0, 1, 2, 3, 4, 5, 6, 7, 8),
    },
    "lucebox": {
        "attention_value_scale": 0.6,
        "logit_softcap": 30.0,
        "logit_scale": 0.5,
        "embedding_scale": 2.0,
        "causal": True,
        "norm_epsilon": 1e-5,
        "rope": Rope(1e7, 8),
        "context_theta": 5e6,
        "target_hidden_size": 128,
    },
}


@pytest.mark.parametrize(("runtime", "field"), [(r, f) for r, facts in CANNOT.items() for f in facts])
def test_a_fact_the_runtime_cannot_carry_is_named(runtime: str, field: str) -> None:
    """P-9, P-34 and the like: today's converters lose these without a word."""
    spec = replace(PLAIN, **{field: CANNOT[runtime][field]})
    (objection,) = objections(find_cell("dflash", runtime), spec)
    assert objection.startswith(field)


def test_yarn_is_refused_for_lucebox() -> None:
    spec = replace(PLAIN, rope=Rope(1e7, 16, RopeScaling("yarn", 4.0, 4096)))
    assert "rope.scaling.method = 'yarn': lucebox has no key" in objections(find_cell("dflash", "lucebox"), spec)[0]


def test_capturing_the_last_layer_is_a_warning_for_llama_cpp() -> None:
    """G-8: only some of llama.cpp's targets hand out the state after their last layer."""
    spec = replace(PLAIN, capture_layers=(4, 11))
    assert "last layer" in doubts(find_cell("dflash", "llama.cpp"), spec)[0]


@by_runtime
def test_no_window_writes_no_window_keys(cell: Cell) -> None:
    """T-16, T-66: a list of zeros would override what the loader does when the key is absent."""
    keys = keys_of(cell, replace(PLAIN, window=None))
    assert [key for key in keys if "sliding" in key] == []


@by_runtime
def test_no_scaling_writes_no_scaling_keys(cell: Cell) -> None:
    """T-56: YaRN keys in a file whose config has no scaling."""
    assert [key for key in keys_of(cell, PLAIN) if "scaling" in key] == []


def respelled(keys: Mapping[str, KeyValue], ending: str, **changes: Any) -> dict[str, KeyValue]:
    (name,) = [key for key in keys if key.endswith(ending)]
    return {**keys, name: replace(keys[name], **changes)}


@pytest.mark.parametrize("element", [GGUFValueType.INT64, GGUFValueType.UINT32], ids=["T-5 INT64", "T-5 UINT32"])
@by_runtime
def test_capture_layers_of_another_element_type_are_refused(cell: Cell, element: GGUFValueType) -> None:
    ending = "target_layers" if cell.runtime == "llama.cpp" else "target_layer_ids"
    with pytest.raises(WrongInput, match=rf"{ending}: found array of {element.name}, expected array of INT32"):
        read(cell, respelled(keys_of(cell, PLAIN), ending, element=element))


def test_a_count_without_its_list_is_refused() -> None:
    """T-2: a loader read uninitialised ids."""
    cell = find_cell("dflash", "lucebox")
    keys = {k: kv for k, kv in keys_of(cell, PLAIN).items() if not k.endswith("target_layer_ids")}
    with pytest.raises(WrongInput, match="n_target_layers: a count without its list"):
        read(cell, keys)


def test_a_count_that_is_not_the_list_s_is_refused() -> None:
    """T-2, A1-36: n_capture and the ids disagree."""
    cell = find_cell("dflash", "lucebox")
    with pytest.raises(WrongInput, match="n_target_layers: found 5, but the list has 3 entries"):
        read(cell, respelled(keys_of(cell, PLAIN), "n_target_layers", value=5))


def test_two_keys_of_one_fact_have_to_agree() -> None:
    cell = find_cell("dflash", "llama.cpp")
    with pytest.raises(WrongInput, match=r"value_length: found 32, but another key says head_dim = 16"):
        read(cell, respelled(keys_of(cell, PLAIN), "value_length", value=32))


def test_every_cell_names_every_role_of_its_kind_or_says_it_has_none() -> None:
    for cell in CELL_LIST:
        rules = KINDS[cell.kind].rules(ConfigReader({}, "config.json"))
        required = {rule.role for rule in rules if not rule.optional}
        assert all(cell.tensor_name((role, 0 if role.per_layer else None)) for role in required)


def test_architectures_tell_cells_apart() -> None:
    assert [cell_of_arch(cell.arch) for cell in CELL_LIST] == CELL_LIST
    assert cell_of_arch("llama") is None


def test_a_missing_cell_names_what_the_runtime_loads() -> None:
    with pytest.raises(WrongUsage, match="lucebox has no loader for eagle3 drafters; it loads: dflash"):
        find_cell("eagle3", "lucebox")
