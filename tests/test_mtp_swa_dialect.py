"""The cells of chained heads: lists with an entry for each layer, of which the last ones are the heads'."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.dialects import Cell, llama_cpp_mtp_swa, objections, read, write
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.spec import (
    DrafterSpec,
    Experts,
    Rope,
    SlidingWindow,
    Trunk,
    spec_from,
)

CELL_LIST = llama_cpp_mtp_swa.CELLS
by_cell = pytest.mark.parametrize("cell", CELL_LIST, ids=lambda cell: cell.kind)
SPEC = DrafterSpec(
    kind="mtp-step35",
    layer_count=3,
    hidden_size=64,
    feed_forward_size=96,
    head_count=6,
    kv_head_count=2,
    head_dim=32,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-5,
    rope=Rope(theta=1e4, dimensions=32),
    target_layer_count=4,
    target_hidden_size=64,
    causal=True,
    window=SlidingWindow(16, (True, True, True)),
    trunk=Trunk(
        sliding_layers=(False, True, True, False),
        head_counts=(4, 6, 6, 4),
        kv_head_counts=(1, 2, 2, 1),
        rope_theta=5e6,
        experts=Experts(8, 3, 48, "sigmoid", True, 3.0),
        expert_feed_forward_size=24,
        dense_layer_count=1,
        expert_clamps=(0.0, 0.0, 0.7, 7.0),
        shared_clamps=(0.0, 0.0, 0.0, 16.0),
    ),
)


def of_kind(spec: DrafterSpec, cell: Cell) -> DrafterSpec:
    return OF_KIND[cell.kind](spec)


def as_mimo(spec: DrafterSpec) -> DrafterSpec:
    """The same with heads of one number, values of another width, and no more of the mixture than MiMo-V2 has."""
    assert spec.trunk is not None and spec.trunk.experts is not None
    experts = Experts(spec.trunk.experts.count, spec.trunk.experts.used, scoring="sigmoid", groups=1, groups_used=1)
    bare = {"head_counts": (), "expert_clamps": (), "shared_clamps": (), "dense_layer_count": None}
    return replace(
        spec,
        kind="mtp-mimo2",
        value_head_dim=spec.head_dim + 8,
        attention_value_scale=0.707,
        trunk=replace(spec.trunk, experts=experts, **bare),
    )


OF_KIND: dict[str, Any] = {"mtp-step35": lambda spec: spec, "mtp-mimo2": as_mimo}


@by_cell
def test_golden_keys(cell: Cell) -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}-{cell.kind}.json").read_text())
    assert golden == {"keys": shown(write(cell, of_kind(SPEC, cell))), "tensors": tensor_names(cell)}


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions that the loader takes."""
    slides = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=40)))
    count, sizes, kv_heads = draw(st.integers(1, 5)), st.integers(1, 512), draw(st.integers(1, 8))
    heads, hidden, dimensions = kv_heads * draw(st.integers(1, 8)), draw(sizes), 2 * draw(st.integers(1, 64))
    numbers = st.integers(0, 64).map(lambda n: n / 4)
    clamps = st.just(()) | st.lists(numbers, min_size=len(slides), max_size=len(slides)).map(tuple)
    return replace(
        SPEC,
        layer_count=count,
        hidden_size=hidden,
        target_hidden_size=hidden,
        feed_forward_size=draw(sizes),
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=dimensions,
        rope=Rope(10.0 ** draw(st.integers(2, 8)), dimensions),
        target_layer_count=len(slides),
        window=SlidingWindow(draw(sizes), (True,) * count),
        trunk=Trunk(
            sliding_layers=slides,
            head_counts=tuple(draw(sizes) for _ in slides),
            kv_head_counts=tuple(draw(sizes) for _ in slides),
            rope_theta=10.0 ** draw(st.integers(2, 8)),
            experts=Experts(64, draw(st.integers(1, 64)), draw(sizes), "sigmoid", draw(st.booleans()), 2.5),
            expert_feed_forward_size=draw(sizes),
            dense_layer_count=draw(st.none() | st.integers(0, 8)),
            expert_clamps=draw(clamps),
            shared_clamps=draw(clamps),
        ),
    )


@by_cell
@given(spec=specs())
def test_what_is_written_comes_back(cell: Cell, spec: DrafterSpec) -> None:
    assert_comes_back(cell, of_kind(spec, cell))


@by_cell
def test_heads_are_counted_alike_everywhere(cell: Cell) -> None:
    """A5-2: block_count counts the heads, and so do all lists."""
    keys = keys_of(cell, of_kind(SPEC, cell))
    name = f"{cell.arch}.block_count"
    with pytest.raises(WrongInput, match="target_layer_count = 5"):
        read(cell, {**keys, name: replace(keys[name], value=8)})
    own = {key: entry for key, entry in keys.items() if not key.startswith("drafter.")}
    with pytest.raises(BadFact, match=r"trunk\.\w+: found .* one entry for each of the target's 5 layers"):
        spec_from({"kind": cell.kind, **read(cell, {**own, name: replace(keys[name], value=8)})})


@by_cell
def test_heads_that_do_not_slide_are_another_model(cell: Cell) -> None:
    """T-55: in llama.cpp a head without its window has another theta as well."""
    keys = keys_of(cell, of_kind(SPEC, cell))
    name = f"{cell.arch}.attention.sliding_window_pattern"
    value = (*keys[name].value[:-1], type(keys[name].value[0])(False))  # type: ignore[index]
    with pytest.raises(WrongInput, match=r"sliding_window_pattern: found .* for the MTP heads, expected all to slide"):
        read(cell, {**keys, name: replace(keys[name], value=value)})


@by_cell
def test_heads_of_several_widths_are_told(cell: Cell) -> None:
    keys = keys_of(cell, of_kind(SPEC, cell))
    name = f"{cell.arch}.attention.head_count_kv"
    value = (*keys[name].value[:-1], 1)  # type: ignore[index]
    with pytest.raises(WrongInput, match=r"found \[1, 2\] for the 3 MTP heads, expected one number for all"):
        read(cell, {**keys, name: replace(keys[name], value=value)})


@by_cell
def test_what_the_loader_cannot_carry_is_refused(cell: Cell) -> None:
    spec = replace(of_kind(SPEC, cell), logit_softcap=30.0)
    assert objections(cell, spec) == [
        "logit_softcap = 30.0: llama.cpp has no key for it and would run with none",
    ]
