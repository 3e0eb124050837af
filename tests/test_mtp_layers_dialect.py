"""The cells of heads that are layers behind their target's last: every fact goes into the keys and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES

from convert_drafter.converters.dialects import CELLS, objections, read, write
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.spec import NO_ROPE, DrafterSpec, Experts, Rope, StateSpace, Trunk, facts_of, spec_from

BASE = DrafterSpec(
    kind="mtp-hy_v3",
    layer_count=1,
    hidden_size=64,
    feed_forward_size=48,
    head_count=4,
    kv_head_count=2,
    head_dim=32,
    context_length=4096,
    vocab_size=256,
    norm_epsilon=1e-5,
    rope=Rope(theta=1e7, dimensions=32),
    target_layer_count=4,
    target_hidden_size=64,
    causal=True,
    experts=Experts(8, 3, 48, scoring="sigmoid", normed=True, scale=2.5),
    trunk=Trunk(feed_forward_size=96),
)
SPECS = {
    "mtp-hy_v3": BASE,
    "mtp-glm4moe": replace(
        BASE,
        kind="mtp-glm4moe",
        rope=Rope(theta=1e6, dimensions=16),
        experts=Experts(8, 3, 96, scoring="sigmoid", normed=True, scale=1.5, groups=4, groups_used=2),
        trunk=Trunk(1, 96),
    ),
    "mtp-cohere2moe": replace(
        BASE,
        kind="mtp-cohere2moe",
        experts=Experts(8, 3, 96, scoring="softmax", normed=True),
        trunk=Trunk(1, 96, 512, (False, True, True, True)),
        logit_scale=0.25,
        layer_norm_epsilon=1e-5,
    ),
    "mtp-nemotron_h_moe": replace(
        BASE,
        kind="mtp-nemotron_h_moe",
        rope=NO_ROPE,
        experts=Experts(8, 3, 48, "sigmoid", normed=True, scale=2.5, groups=1, groups_used=1, latent_size=40),
        trunk=Trunk(attention_layers=(False, False, True, False), mixture_layers=(False, True, False, True)),
        state_space=StateSpace(4, 16, 2, 8, 16),
    ),
}
by_kind = pytest.mark.parametrize("kind", SPECS)


def cell_of(kind: str) -> Any:
    return CELLS[kind, "llama.cpp"]


@by_kind
def test_golden_keys(kind: str) -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    cell = cell_of(kind)
    golden = json.loads((FIXTURES / "dialects" / f"{cell.runtime}-{kind}.json").read_text())
    assert golden == {"keys": shown(write(cell, SPECS[kind])), "tensors": tensor_names(cell)}


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """Widths and counts that contradict nothing."""
    sizes, heads, hidden, width = (
        st.integers(1, 512),
        draw(st.integers(1, 8)),
        draw(st.integers(1, 512)),
        draw(st.integers(1, 512)),
    )
    count = draw(st.integers(2, 64))
    return {
        "hidden_size": hidden,
        "target_hidden_size": hidden,
        "feed_forward_size": width,
        "kv_head_count": heads,
        "head_count": heads * draw(st.integers(1, 8)),
        **dict.fromkeys(("norm_epsilon", "layer_norm_epsilon"), 10.0 ** -draw(st.integers(3, 8))),
        "experts.count": count,
        "experts.used": draw(st.integers(1, count)),
        "experts.shared_feed_forward_size": width * draw(st.integers(1, 4)),
        "experts.normed": draw(st.booleans()),
        "trunk.feed_forward_size": draw(sizes),
        "trunk.window_size": draw(sizes),
        **{f"state_space.{name}": draw(sizes) for name in ("kernel_size", "state_size", "head_count", "head_dim")},
        "experts.latent_size": draw(sizes),
    }


@by_kind
@given(change=changes())
def test_what_is_written_comes_back(kind: str, change: dict[str, Any]) -> None:
    facts = facts_of(SPECS[kind])
    if "experts.groups" in facts:  # a divisor of the experts that holds the used ones
        change = {**change, "experts.groups": 1, "experts.groups_used": 1}
    spec = spec_from({**facts, **{name: value for name, value in change.items() if name in facts}})
    assert_comes_back(cell_of(kind), spec)


@by_kind
def test_a_depth_that_is_not_the_rows_own_is_a_contradiction(kind: str) -> None:
    """A5-2: block_count counts the head."""
    keys, name = keys_of(cell_of(kind), SPECS[kind]), f"{cell_of(kind).arch}.block_count"
    with pytest.raises(WrongInput, match="target_layer_count = 5"):
        read(cell_of(kind), {**keys, name: replace(keys[name], value=6)})


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        *((kind, {"layer_count": 2}, "layer_count: llama.cpp drafts with a head of one layer") for kind in SPECS),
        *((kind, {"logit_softcap": 30.0}, "logit_softcap = 30.0: llama.cpp has no key for it") for kind in SPECS),
        ("mtp-hy_v3", {"rope.dimensions": 16}, "rope.dimensions: llama.cpp stops where less than a whole head"),
        ("mtp-hy_v3", {"experts.groups": 2}, "experts.groups = 2: llama.cpp has no key for it"),
        ("mtp-cohere2moe", {"rope.dimensions": 16}, "rope.dimensions: llama.cpp stops where less than a whole head"),
        (
            "mtp-cohere2moe",
            {"trunk.sliding_layers": (False,) * 4},
            "trunk.sliding_layers: llama.cpp stops at a target of which no layer slides",
        ),
        (
            "mtp-nemotron_h_moe",
            {"rope.theta": 1e4, "rope.dimensions": 32},
            "rope.theta = 10000.0: llama.cpp has no key",
        ),
        ("mtp-hy_v3", {"logit_scale": 0.5}, "logit_scale = 0.5: llama.cpp has no key for it"),
    ],
)
def test_what_the_loader_cannot_carry_is_refused(kind: str, change: dict[str, Any], said: str) -> None:
    spec = spec_from({**facts_of(SPECS[kind]), **change})
    assert any(line.startswith(said) for line in objections(cell_of(kind), spec))
