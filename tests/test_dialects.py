"""The hub proved: what a cell writes it reads back, and what it cannot say it refuses to write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from cell_keys import keys_of, shown, tensor_names
from gguf import GGUFValueType
from hypothesis import find, given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.dialects import CELLS, Cell, cell_of_names, doubts, find_cell, objections, read, write
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.spec import (
    HEADS,
    Convolution,
    DrafterSpec,
    Rope,
    RopeScaling,
    Selector,
    SlidingWindow,
    facts_of,
    spec_from,
)

# heads have test_mtp_dialect.py, and assistants test_gemma4_assistant_dialect.py
CELL_LIST = [cell for cell in CELLS.values() if cell.kind not in {*HEADS, "gemma4-assistant"}]
by_runtime = pytest.mark.parametrize("cell", CELL_LIST, ids=lambda cell: f"{cell.runtime} {cell.kind}")

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
YARN = RopeScaling("yarn", 4.0, 4096, attention_factor=0.5)
FULL = replace(
    PLAIN,
    causal=True,
    rope=Rope(1e6, 8, YARN, (4, 0, 0, 0)),
    attention_value_scale=0.5,
    embedding_scale=16.0,
    logit_scale=0.25,
    logit_softcap=30.0,
)
GEMMA4 = {"embedding_scale": 8.0, "attention_scale": 1.0, "activation": "gelu_pytorch_tanh"}
SMALLEST: dict[str, dict[str, Any]] = {  # for random widths
    "dflash": {},
    "dflash2": {"convolution": Convolution(2, 1), "selector": Selector(4, 1)},
    "dspark": {"markov_rank": 1, "confidence_head": False, "sample_from_anchor": False},
    "gemma4-dspark": {"markov_rank": 1, "confidence_head": False, "sample_from_anchor": True} | GEMMA4,
    "eagle3": {"norm_before_residual": True, "norm_before_fc": False},
}
CHAIN: dict[str, Any] = {"block_size": None, "mask_token_id": None, "causal": True}  # drafts token by token
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
RICHEST_EAGLE3 = replace(
    PLAIN,
    **CHAIN,
    **SMALLEST["eagle3"] | {"norm_before_fc": True},
    kind="eagle3",
    layer_count=1,
    rope=Rope(1e6, 16, YARN),
    target_hidden_size=96,
    draft_vocab_size=200,
    window=None,
)
# What a kind has beside it.
OWN: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dspark": {
        "markov_rank": 32,
        "confidence_head": True,
        "sample_from_anchor": True,
        "draft_vocab_size": 200,
        "logit_scale": None,
        "logit_softcap": None,
    },
    "gemma4-dspark": {
        "markov_rank": 32,
        "confidence_head": True,
        "sample_from_anchor": True,
        "logit_scale": None,
        **GEMMA4,
    },
    "dflash2": {"convolution": Convolution(2, 16), "selector": Selector(24, 7)},
    "eagle3": {**CHAIN, **SMALLEST["eagle3"]},
}


@by_runtime
def test_golden_keys(cell: Cell) -> None:
    """Every key, GGUF type and value of the richest spec a cell carries, and every tensor name, as on record.

    T-51: capture layers per dialect; T-5: element types; A1-17: Lucebox's key list.
    """
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}-{cell.kind}.json").read_text())
    assert golden == {"keys": shown(write(cell, richest(cell))), "tensors": tensor_names(cell)}


def richest(cell: Cell) -> DrafterSpec:
    return RICHEST_EAGLE3 if cell.kind == "eagle3" else of_kind(RICHEST[cell.runtime], cell)


def of_kind(spec: DrafterSpec, cell: Cell) -> DrafterSpec:
    return replace(spec, kind=cell.kind, **OWN[cell.kind])


@by_runtime
def test_richest_spec_comes_back(cell: Cell) -> None:
    spec = richest(cell)
    assert objections(cell, spec) == []
    assert spec_from(read(cell, keys_of(cell, spec))) == spec


floats = st.floats(2.0**-10, 2.0**26, width=32).map(lambda x: float(f"{x:.6g}"))
sizes = st.integers(1, 2**20)


# What a plain drafter does not have; a few of them at a time, so that some specs are accepted everywhere.
UNUSUAL = (
    "scaling", "yarn parameters", "partial rotary", "causal", "norm_epsilon", "window", "wide target",
    "context_theta", "attention_value_scale", "embedding_scale", "logit_scale", "logit_softcap",
)  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions."""
    unusual = draw(st.sets(st.sampled_from(UNUSUAL), max_size=4))
    layers, kv, depth = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(4, 90))
    head_dim, hidden, vocab = 2 * draw(st.integers(1, 128)), draw(sizes), draw(st.integers(2, 300_000))
    slides = draw(st.lists(st.booleans(), min_size=layers, max_size=layers)) if "window" in unusual else []
    some = st.integers(0, depth - 2)
    captures = draw(st.lists(some, min_size=1, max_size=min(depth - 1, draw(st.sampled_from([8, 20]))), unique=True))
    scaling = None
    if "scaling" in unusual:
        method, attention = draw(st.sampled_from(["linear", "yarn"])), draw(st.none() | floats)
        scaling = RopeScaling(method, draw(floats), draw(sizes), attention_factor=attention)
        if "yarn parameters" in unusual:
            names = draw(st.sets(st.sampled_from(["extrapolation_factor", "beta_fast", "beta_slow"]), min_size=1))
            scaling = replace(scaling, **{name: draw(floats) for name in sorted(names)})
    dimensions = 2 * draw(st.integers(1, head_dim // 2)) if "partial rotary" in unusual else head_dim
    return replace(
        PLAIN,
        layer_count=layers,
        kv_head_count=kv,
        head_count=kv * draw(st.integers(1, 16)),
        head_dim=head_dim,
        hidden_size=hidden,
        feed_forward_size=draw(sizes),
        target_hidden_size=hidden + 32 * ("wide target" in unusual),
        vocab_size=vocab,
        mask_token_id=draw(st.integers(0, vocab - 1)),
        norm_epsilon=draw(floats) if "norm_epsilon" in unusual else 1e-6,
        rope=Rope(draw(floats), dimensions, scaling),
        block_size=draw(st.integers(2, 64)),
        capture_layers=tuple(captures),
        target_layer_count=depth,
        causal="causal" in unusual,
        window=SlidingWindow(draw(sizes), tuple(slides)) if any(slides) else None,
        **{name: draw(floats) if name in unusual else None for name in UNUSUAL[7:]},
    )


# Written by hand after the loaders, not after the cells: the facts no key of theirs carries.
YARN_PARAMETERS = {f"rope.scaling.{name}" for name in ("extrapolation_factor", "beta_fast", "beta_slow")}
NO_KEY = {
    "llama.cpp": {"context_theta", *YARN_PARAMETERS},
    "ik_llama.cpp": {"embedding_scale", "logit_scale", "logit_softcap", *YARN_PARAMETERS},
    "lucebox": {
        "context_theta", "attention_value_scale", "embedding_scale", "logit_scale", "logit_softcap", *YARN_PARAMETERS,
        *(f"rope.scaling.{name}" for name in ("method", "factor", "original_context_length", "attention_factor")),
    },
}  # fmt: skip
NO_KEY_OF = {
    ("llama.cpp", "eagle3"): NO_KEY["llama.cpp"]
    | {"window.size", "window.layers", "attention_value_scale", "embedding_scale", "logit_scale", "logit_softcap"}
}
LIMITS: dict[str, dict[str, Callable[[DrafterSpec], bool]]] = {
    "llama.cpp": {
        "target_hidden_size": lambda s: s.target_hidden_size == s.hidden_size,
        "logit_scale": lambda s: "dspark" not in s.kind or s.logit_scale is None,
        "logit_softcap": lambda s: s.kind != "dspark" or s.logit_softcap is None,
        "selector.top_k": lambda s: s.selector is None or s.hidden_size >= 2,
    },
    "ik_llama.cpp": {"capture_layers": lambda s: len(s.capture_layers) <= 8},
    "lucebox": {
        "target_hidden_size": lambda s: s.target_hidden_size == s.hidden_size,
        "capture_layers": lambda s: len(s.capture_layers) <= 16,
        "hidden_size": lambda s: s.hidden_size <= 131_072,
        "feed_forward_size": lambda s: s.feed_forward_size <= 524_288,
        "norm_epsilon": lambda s: s.norm_epsilon == 1e-6,
        "rope.dimensions": lambda s: s.rope.dimensions == s.head_dim,
        "causal": lambda s: not s.causal,
    },
}
LIMITS_OF: dict[tuple[str, str], dict[str, Callable[[DrafterSpec], bool]]] = {
    ("llama.cpp", "eagle3"): {
        "capture_layers": lambda s: len(s.capture_layers) == 3,
        "layer_count": lambda s: s.layer_count == 1,
        "rope.dimensions": lambda s: s.rope.dimensions == s.head_dim,
    }
}


@by_runtime
@given(spec=specs())
def test_what_is_written_comes_back_or_is_refused(cell: Cell, spec: DrafterSpec) -> None:
    """read(write(spec)) == spec for every spec the cell accepts; the others are refused naming exactly what is lost."""
    spec = of_cell(spec, cell)
    refused = {line.split(":")[0].split(" =")[0] for line in objections(cell, spec)}
    pair = cell.runtime, cell.kind
    broken = {name for name, holds in LIMITS_OF.get(pair, LIMITS[cell.runtime]).items() if not holds(spec)}
    assert refused == NO_KEY_OF.get(pair, NO_KEY[cell.runtime]) & set(facts_of(spec)) | broken
    if not refused:
        assert spec_from(read(cell, keys_of(cell, spec))) == spec


@by_runtime
def test_the_specs_above_are_not_all_refused(cell: Cell) -> None:
    find(specs(), lambda spec: not objections(cell, of_cell(spec, cell)))
    find(specs(), lambda spec: bool(objections(cell, of_cell(spec, cell))))


def of_cell(spec: DrafterSpec, cell: Cell) -> DrafterSpec:
    chain = CHAIN if cell.kind == "eagle3" else {}
    return replace(spec, kind=cell.kind, **SMALLEST[cell.kind], **chain)


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


def test_capturing_the_last_layer_depends_on_the_target_in_llama_cpp() -> None:
    """G-8: only some of llama.cpp's targets hand out the state after their last layer."""
    spec, cell = replace(PLAIN, capture_layers=(4, 11)), find_cell("dflash", "llama.cpp")
    assert "last layer" in doubts(cell, spec)[0]
    assert "no state after it" in objections(cell, spec, "Qwen3ForCausalLM")[0]
    assert doubts(cell, spec, "mimo2") == objections(cell, spec, "mimo2") == []


def test_a_target_that_may_not_hand_out_hidden_states_is_doubted() -> None:
    cell = find_cell("dflash", "llama.cpp")
    assert "target architecture PhiForCausalLM" in doubts(cell, PLAIN, "PhiForCausalLM")[0]
    assert doubts(cell, PLAIN, "Qwen3ForCausalLM") == doubts(cell, PLAIN) == []


@pytest.mark.parametrize("parameter", ["extrapolation_factor", "beta_fast", "beta_slow"])
@pytest.mark.parametrize("runtime", ["llama.cpp", "ik_llama.cpp"])
def test_yarn_parameters_no_loader_reads_are_refused(runtime: str, parameter: str) -> None:
    """llama.cpp reads the yarn_* keys for Grok and Mistral only; its own converter writes them all the same."""
    scaling = replace(RopeScaling("yarn", 4.0, 4096), **{parameter: 0.5})
    (objection,) = objections(find_cell("dflash", runtime), replace(PLAIN, rope=Rope(1e7, 16, scaling)))
    assert objection.startswith(f"rope.scaling.{parameter} = 0.5")


def test_attention_factor_is_what_ggml_does_not_multiply_in_itself() -> None:
    """ggml multiplies 0.1 ln(factor) + 1 in; transformers takes the whole factor (modeling_rope_utils.py)."""
    scaling = RopeScaling("yarn", 32.0, 4096, attention_factor=1.0)
    keys = keys_of(find_cell("dflash", "llama.cpp"), replace(PLAIN, rope=Rope(1e7, 16, scaling)))
    assert keys["dflash.rope.scaling.attn_factor"].value == pytest.approx(1 / (1 + 0.1 * math.log(32)))


def test_lucebox_s_own_yarn_is_not_walked_into() -> None:
    """P-34: 8 layers of width 2048 switch on the scaling of one drafter."""
    spec = replace(PLAIN, layer_count=8, window=None, hidden_size=2048, target_hidden_size=2048)
    (objection,) = objections(find_cell("dflash", "lucebox"), spec)
    assert "YaRN" in objection


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
    """llama.cpp and its fork read both 32-bit integers, Lucebox INT32 alone (A1-38)."""
    if element is GGUFValueType.UINT32 and cell.runtime != "lucebox":
        ending = "target_layers" if cell.runtime == "llama.cpp" else "target_layer_ids"
        assert read(cell, respelled(keys_of(cell, PLAIN), ending, element=element))["capture_layers"] == (4, 1, 9)
        return
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


def test_tokens_that_are_no_list_are_refused() -> None:
    cell = find_cell("dflash", "llama.cpp")
    tokens = KeyValue("tokenizer.ggml.tokens", GGUFValueType.STRING, "<mask>")
    with pytest.raises(WrongInput, match="tokens: found STRING, expected an array of STRING"):
        read(cell, {**keys_of(cell, PLAIN), tokens.key: tokens})


def test_two_keys_of_one_fact_have_to_agree() -> None:
    cell = find_cell("dflash", "llama.cpp")
    with pytest.raises(WrongInput, match=r"value_length: found 32, but another key says head_dim = 16"):
        read(cell, respelled(keys_of(cell, PLAIN), "value_length", value=32))


def test_every_cell_names_every_role_of_its_kind_or_says_it_has_none() -> None:
    for cell in CELL_LIST:
        rules = KINDS[cell.kind].rules(ConfigReader({}, "config.json"))
        required = {rule.role for rule in rules if rule.needed(richest(cell))}
        assert all(cell.tensor_name((role, 0 if role.per_layer else None)) for role in required)


def test_architecture_and_telling_tensor_tell_cells_apart() -> None:
    told = [(cell.telling, 0 if cell.telling and cell.telling.per_layer else None) for cell in CELL_LIST]
    names = [() if key[0] is None else (cell.tensor_name(key),) for cell, key in zip(CELL_LIST, told, strict=True)]
    found = [cell_of_names(cell.arch, there) for cell, there in zip(CELL_LIST, names, strict=True)]
    assert found == CELL_LIST
    gemma = find_cell("gemma4-dspark", "llama.cpp")
    assert cell_of_names("dflash", ("markov_w1.weight", "blk.1.post_ffw_norm.weight")) is gemma
    assert cell_of_names("llama", ()) is None


def test_a_missing_cell_names_what_the_runtime_loads() -> None:
    with pytest.raises(WrongUsage, match="lucebox has no loader for eagle3 drafters; it loads: dflash"):
        find_cell("eagle3", "lucebox")
