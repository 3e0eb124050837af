"""The cells of Qwen's MTP heads: what they write they read back, and what their loader cannot say they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.dialects import CELLS, Cell, objections, read, write
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.spec import (
    DrafterSpec,
    Experts,
    Indexer,
    LinearAttention,
    Rope,
    Streams,
    spec_from,
)

CELL_LIST = [cell for cell in CELLS.values() if any(row.field == "linear_attention.layers" for row in cell.rows)]
by_cell = pytest.mark.parametrize("cell", CELL_LIST, ids=lambda cell: cell.kind)
SPEC = DrafterSpec(
    kind="mtp-qwen35",
    layer_count=1,
    hidden_size=64,
    feed_forward_size=96,
    head_count=4,
    kv_head_count=2,
    head_dim=32,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-6,
    rope=Rope(theta=1e7, dimensions=16, sections=(3, 3, 2, 0)),
    target_layer_count=4,
    target_hidden_size=64,
    causal=True,
    linear_attention=LinearAttention(4, 16, 2, 6, 16, (True, True, True, False), 4),
)
OWN: dict[str, dict[str, Any]] = {"mtp-qwen35": {}, "mtp-qwen35moe": {"experts": Experts(8, 3, 48)}}
OWN["mtp-qwen3next"] = OWN["mtp-qwen35moe"]
OWN["mtp-qwen4exp"] = {
    **OWN["mtp-qwen35moe"],
    "indexer": Indexer(8, 64, 32, pool_size=4),
    "streams": Streams(3, 24),
}


def of_kind(spec: DrafterSpec, cell: Cell) -> DrafterSpec:
    sections = spec.rope.sections if any(row.field == "rope.sections" for row in cell.rows) else None
    return replace(spec, kind=cell.kind, rope=replace(spec.rope, sections=sections), **OWN[cell.kind])


@by_cell
def test_golden_keys(cell: Cell) -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}-{cell.kind}.json").read_text())
    assert golden == {"keys": shown(write(cell, of_kind(SPEC, cell))), "tensors": tensor_names(cell)}


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions that the loader takes."""
    kinds = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=40)))
    sizes, heads = st.integers(1, 512), draw(st.integers(1, 8))
    sections = draw(st.tuples(st.integers(1, 8), st.integers(0, 8), st.integers(0, 8)))
    dimensions, state = 2 * sum(sections), draw(sizes)
    linear = LinearAttention(draw(sizes), state, draw(sizes), draw(sizes), state, kinds, draw(st.none() | sizes))
    hidden = draw(sizes)
    return replace(
        SPEC,
        hidden_size=hidden,
        target_hidden_size=hidden,
        feed_forward_size=draw(sizes),
        kv_head_count=heads,
        head_count=heads * draw(st.integers(1, 8)),
        head_dim=dimensions + draw(st.integers(0, 64)),
        rope=Rope(10.0 ** draw(st.integers(2, 8)), dimensions, sections=(*sections, 0)),
        target_layer_count=len(kinds),
        linear_attention=linear,
    )


@by_cell
@given(spec=specs())
def test_what_is_written_comes_back(cell: Cell, spec: DrafterSpec) -> None:
    assert_comes_back(cell, of_kind(spec, cell))


@by_cell
def test_a_count_that_is_not_the_rows_own_is_a_contradiction(cell: Cell) -> None:
    """A5-2: block_count counts the head, the list of layers as well."""
    keys = keys_of(cell, of_kind(SPEC, cell))
    name = f"{cell.arch}.block_count"
    with pytest.raises(WrongInput, match="target_layer_count = 5"):
        read(cell, {**keys, name: replace(keys[name], value=6)})
    own = {key: entry for key, entry in keys.items() if not key.startswith("drafter.")}
    with pytest.raises(BadFact, match=r"linear_attention\.layers"):
        spec_from({"kind": cell.kind, **read(cell, {**own, name: replace(keys[name], value=6)})})


@by_cell
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_count": 2}, "layer_count: llama.cpp drafts with a head of one layer"),
        ({"logit_softcap": 30.0}, "logit_softcap = 30.0: llama.cpp has no key for it"),
        (
            {"linear_attention": LinearAttention(4, 16, 2, 6, 32, (True, True, True, False))},
            "linear_attention.value_head_dim: llama.cpp loads value heads as wide as key heads",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_the_loader_cannot_carry_is_refused(cell: Cell, change: dict[str, object], said: str) -> None:
    assert any(line.startswith(said) for line in objections(cell, replace(of_kind(SPEC, cell), **change)))  # type: ignore[arg-type]
