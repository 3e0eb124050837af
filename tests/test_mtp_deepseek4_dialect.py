"""The cell of DeepSeek-V4's head: every fact goes into the keys and comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cell_keys import assert_comes_back, keys_of, shown, tensor_names
from hypothesis import given
from hypothesis import strategies as st
from published import FIXTURES
from test_mtp_layers_dialect import BASE

from convert_drafter.converters.dialects import CELLS, objections, read, write
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.spec import (
    Compression,
    DrafterSpec,
    Experts,
    Indexer,
    Rope,
    RopeScaling,
    SharedKey,
    SlidingWindow,
    Streams,
    Trunk,
    facts_of,
    spec_from,
)

CELL = CELLS["mtp-deepseek4", "llama.cpp"]
SPEC = replace(
    BASE,
    kind="mtp-deepseek4",
    kv_head_count=1,
    rope=Rope(theta=1e4, dimensions=16),
    window=SlidingWindow(128, (True,)),
    experts=Experts(8, 3, 48, scoring="sqrtsoftplus", normed=True, scale=1.5, limit=10.0),
    shared_key=SharedKey(40, 2, 24),
    streams=Streams(4, iterations=20, epsilon=1e-6),
    indexer=Indexer(4, 64, 512),
    compression=Compression((0, 4, 128, 4), 160000.0, RopeScaling("yarn", 16.0, 65536)),
    trunk=Trunk(hash_layer_count=1),
)


def test_golden_keys() -> None:
    """A5-1: every key, GGUF type and value, and every tensor name, as on record."""
    golden = json.loads((FIXTURES / "dialects" / f"{CELL.runtime}-{CELL.kind}.json").read_text())
    assert golden == {"keys": shown(write(CELL, SPEC)), "tensors": tensor_names(CELL)}


@st.composite
def specs(draw: st.DrawFn) -> DrafterSpec:
    sizes, depth, hidden = st.integers(1, 512), draw(st.integers(1, 12)), draw(st.integers(1, 512))
    groups, width, count = draw(st.integers(1, 4)), draw(sizes), draw(st.integers(2, 64))
    scaling = st.builds(RopeScaling, st.just("yarn"), st.integers(2, 64).map(float), sizes)
    return replace(
        SPEC,
        hidden_size=hidden,
        target_hidden_size=hidden,
        feed_forward_size=width,
        head_count=groups * draw(st.integers(1, 8)),
        target_layer_count=depth,
        window=SlidingWindow(draw(sizes), (True,)),
        experts=replace(
            SPEC.experts,
            count=count,
            used=draw(st.integers(1, count)),
            shared_feed_forward_size=width * draw(st.integers(1, 3)),
            normed=draw(st.booleans()),
            limit=draw(st.integers(1, 40)) / 4,
        ),
        shared_key=SharedKey(draw(sizes), groups, draw(sizes)),
        streams=Streams(4, iterations=draw(sizes), epsilon=10.0 ** -draw(st.integers(3, 8))),
        indexer=Indexer(draw(sizes), draw(sizes), draw(sizes)),
        compression=Compression(
            tuple(draw(st.lists(st.sampled_from((0, 4, 128)), min_size=depth, max_size=depth))),
            float(draw(sizes)),
            draw(st.none() | scaling),
        ),
        trunk=Trunk(hash_layer_count=draw(st.integers(0, depth))),
    )


@given(spec=specs())
def test_what_is_written_comes_back(spec: DrafterSpec) -> None:
    assert_comes_back(CELL, spec)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer_count": 2, "window.layers": (True, True)}, "layer_count: llama.cpp drafts with a head of one layer"),
        ({"streams.count": 2}, "streams.count: llama.cpp's graph mixes 4 streams"),
        ({"experts.groups": 2}, "experts.groups = 2: llama.cpp has no key for it"),
        ({"logit_softcap": 30.0}, "logit_softcap = 30.0: llama.cpp has no key for it"),
    ],
    ids=str,
)
def test_what_the_loader_cannot_carry_is_refused(change: dict[str, Any], said: str) -> None:
    spec = spec_from({**facts_of(SPEC), **change})
    assert any(line.startswith(said) for line in objections(CELL, spec))


def test_yarn_s_other_numbers_may_be_lost() -> None:
    """They turn the target's compressed keys, of which a head has none."""
    assert objections(CELL, spec_from({**facts_of(SPEC), "compression.scaling.beta_fast": 16.0})) == []


@pytest.mark.parametrize(
    ("ending", "value", "said"),
    [
        ("block_count", 6, "target_layer_count = 5"),
        ("attention.compress_ratios", (0, 4, 128, 4, 128), r"compress_ratios: found \[128\] for the head"),
        ("swiglu_clamp_shexp", (7.0,) * 5, "experts.limit = 10.0"),
        ("embedding_length_out", 100, "no multiple of 64 wide states"),
    ],
)
def test_a_key_that_contradicts_another_is_named(ending: str, value: Any, said: str) -> None:
    keys, name = keys_of(CELL, SPEC), f"{CELL.arch}.{ending}"
    with pytest.raises(WrongInput, match=said):
        read(CELL, {**keys, name: replace(keys[name], value=value)})


@pytest.mark.parametrize("ending", ["compress_ratios", "hash_layer_count", "output_lora_rank", "sliding_window"])
def test_a_key_that_is_absent_leaves_a_fact_out(ending: str) -> None:
    keys: dict[str, KeyValue] = {n: e for n, e in keys_of(CELL, SPEC).items() if not n.endswith(ending)}
    with pytest.raises(BadFact):
        spec_from({"kind": CELL.kind, **read(CELL, keys)})
