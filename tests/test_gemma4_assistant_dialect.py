"""The cell of Gemma-4 assistants: what it writes it reads back, and what its loader cannot say it refuses to write."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cell_keys import keys_of, shown, tensor_names
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.dialects import doubts, find_cell, objections, read, write
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.spec import DrafterSpec, Rope, SlidingLayers, SlidingWindow, spec_from

CELL = find_cell("gemma4-assistant", "llama.cpp")
KV_HEADS = "gemma4-assistant.attention.head_count_kv"
SPEC = DrafterSpec(
    kind="gemma4-assistant",
    layer_count=3,
    hidden_size=64,
    feed_forward_size=128,
    head_count=4,
    kv_head_count=1,
    kv_head_counts=(2, 2, 1),
    head_dim=64,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-6,
    rope=Rope(theta=1e6, dimensions=64, proportion=0.25),
    target_layer_count=8,
    target_hidden_size=96,
    causal=True,
    window=SlidingWindow(48, (True, True, False)),
    sliding=SlidingLayers(32, 1e4, 32),
    logit_softcap=30.0,
)


def read_back(spec: DrafterSpec) -> DrafterSpec:
    return spec_from({"kind": CELL.kind, **read(CELL, keys_of(CELL, spec))})


def without_proportion(spec: DrafterSpec) -> DrafterSpec:
    """What it comes to is a tensor, not a key."""
    return replace(spec, rope=replace(spec.rope, proportion=None))


def test_golden_keys() -> None:
    """Every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / "llama.cpp-gemma4-assistant.json").read_text())
    assert golden == {"keys": shown(write(CELL, SPEC)), "tensors": tensor_names(CELL)}


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    """Any spec without contradictions that the loader takes."""
    sizes, halves = st.integers(1, 512), st.integers(1, 64)
    layers = (True, *draw(st.lists(st.booleans(), max_size=12)), False)
    kv_heads, own = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim, sliding, hidden = 2 * draw(halves), 2 * draw(halves), draw(sizes)
    return replace(
        SPEC,
        layer_count=len(layers),
        hidden_size=hidden,
        target_hidden_size=hidden + draw(sizes),
        feed_forward_size=draw(sizes),
        head_count=kv_heads * own,
        kv_head_count=kv_heads,
        kv_head_counts=tuple(own if slides else kv_heads for slides in layers) if draw(st.booleans()) else (),
        head_dim=head_dim,
        rope=Rope(10.0 ** draw(st.integers(2, 8)), head_dim),
        target_layer_count=draw(sizes),
        window=SlidingWindow(draw(sizes), layers),
        sliding=SlidingLayers(sliding, 10.0 ** draw(st.integers(2, 8)), sliding),
        logit_softcap=draw(st.none() | st.just(30.0)),
    )


@given(spec=specs())
def test_what_is_written_comes_back(spec: DrafterSpec) -> None:
    assert objections(CELL, spec) == []
    assert read_back(spec) == spec


def test_keys_of_llama_cpp_alone_tell_all_facts_but_the_depth() -> None:
    keys = {name: entry for name, entry in keys_of(CELL, SPEC).items() if not name.startswith("drafter.")}
    found = spec_from({"kind": CELL.kind, "target_layer_count": 8, **read(CELL, keys)})
    assert found == without_proportion(SPEC)


def test_heads_are_a_list_where_layers_differ_and_a_number_where_they_do_not() -> None:
    entry = keys_of(CELL, SPEC)[KV_HEADS]
    assert (entry.type, entry.element, entry.value) == (GGUFValueType.ARRAY, GGUFValueType.INT32, (2, 2, 1))
    entry = keys_of(CELL, replace(SPEC, kv_head_counts=()))[KV_HEADS]
    assert (entry.type, entry.value) == (GGUFValueType.UINT32, 1)
    wrong = KeyValue(KV_HEADS, GGUFValueType.STRING, "2, 2, 1")
    with pytest.raises(WrongInput, match=f"{KV_HEADS}: found STRING, expected UINT32"):
        read(CELL, {**keys_of(CELL, SPEC), KV_HEADS: wrong})


def test_layers_have_their_own_heads() -> None:
    sliding, full = SPEC.of_layer(0), SPEC.of_layer(2)
    assert (sliding.head_dim, sliding.kv_head_count, sliding.rope) == (32, 2, Rope(1e4, 32))
    assert (full.head_dim, full.kv_head_count, full.rope) == (64, 1, SPEC.rope)
    assert SPEC.of_layer(None) is SPEC and SPEC.of_layer(3) is SPEC


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kv_head_counts": (2, 1)}, "kv_head_counts"),
        ({"kv_head_counts": (2, 3, 1)}, "kv_head_counts"),
        ({"window": None}, "window.layers"),
        ({"sliding": None}, "sliding.dimensions"),
    ],
)
def test_contradictions(change: dict[str, object], field: str) -> None:
    with pytest.raises(BadFact) as caught:
        replace(SPEC, **change)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_hidden_size": 64}, "target_hidden_size: llama.cpp takes an assistant that is as wide as its target"),
        ({"embedding_scale": 8.0}, "embedding_scale = 8.0: llama.cpp has no key for it"),
        ({"causal": False}, "causal = False: llama.cpp has no key for it"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_the_loader_cannot_carry_is_refused(change: dict[str, object], said: str) -> None:
    assert any(line.startswith(said) for line in objections(CELL, replace(SPEC, **change)))  # type: ignore[arg-type]


def test_another_target_is_doubtful() -> None:
    assert doubts(CELL, SPEC, "gemma4") == doubts(CELL, SPEC, "Gemma4ForConditionalGeneration") == []
    assert len(doubts(CELL, SPEC, "Qwen3ForCausalLM")) == 1
