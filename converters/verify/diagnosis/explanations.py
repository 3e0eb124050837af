"""What may be wrong with a drafter's file: every explanation of a low acceptance that is tried, the likeliest first.

Each is the drafter with one thing mended, made of its facts and weights alone. The faults are those that converters
and runtimes have made: a default written for a fact that was not found, a list counted from another number, rows in
the checkpoint's order, a norm without its one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import SlidingWindow
from convert_drafter.converters.verify.diagnosis import weight_explanations
from convert_drafter.converters.verify.diagnosis.view import (
    Explanation,
    Family,
    Hints,
    View,
    changes,
    shown,
    with_facts,
)

THETAS = (1e7, 1e6, 1e4, 5e6, 5e5, 1e8)
MASKS = (248070, 248077, 151669, 201818)  # Qwen3.5's, Qwen3.6's, MiMo's, Muse's
BLOCK_SIZES = (8, 16, 4)
WINDOWS = (2048, 4096, 1024, 512, 128)
EPSILONS = (1e-6, 1e-5)


def explanations(view: View, hints: Hints) -> Iterator[Explanation]:
    """All that can be tried on this drafter, in order, made one at a time: weights are large. None twice."""
    tried = {(view.spec, view.captures)}
    for family in FAMILIES:
        for explanation in family(view, hints):
            facts = (explanation.view.spec, explanation.view.captures)
            if facts not in tried or not same_weights(explanation.view, view):
                tried.add(facts)
                yield explanation


def same_weights(one: View, other: View) -> bool:
    """The same arrays: nothing was done to any of them, as to norms that a drafter does not have."""
    same = one.weights.keys() == other.weights.keys()
    return same and all(one.weights[key] is array for key, array in other.weights.items())


def layers_needed(view: View, hints: Hints) -> list[int]:
    """Target layers whose states some explanation reads, -1 the embedding's output: what texts have to hold."""
    mended = (explanation.view.captures for family in CAPTURING for explanation in family(view, hints))
    return sorted({layer for layers in (view.captures, *mended) for layer in layers})


# --- facts ---


def fact(view: View, name: str, value: Any, why: str = "") -> Iterator[Explanation]:
    """One fact with another value."""
    new = with_facts(view, {name: value})
    if new is not None:
        old = view.facts().get(name)
        yield Explanation(name, f"{shown(old)} -> {shown(value)}{f', {why}' if why else ''}", new)


# Facts that the same weights can be read with; the others are shapes.
BEHAVIOUR = (
    "rope.theta", "sliding.theta", "sliding.dimensions", "capture_layers", "window", "mask_token_id", "block_size",
    "causal", "rope.dimensions", "rope.scaling", "norm_epsilon", "context_theta", "attention_value_scale",
    "attention_scale", "activation", "embedding_scale", "logit_scale", "logit_softcap", "norm_before_residual",
    "sample_from_anchor", "selector.top_k",
)  # fmt: skip


def source_facts(view: View, hints: Hints) -> Iterator[Explanation]:
    """Each fact in which the file differs from its source, by itself, then all of them."""
    if hints.original is None:
        return
    wanted = changes(view, hints.original)
    parts = [{n: v for n, v in wanted.items() if n == name or n.startswith(f"{name}.")} for name in BEHAVIOUR]
    groups = {_group(name, part): part for name, part in zip(BEHAVIOUR, parts, strict=True) if part}
    if len(groups) > 1:
        groups[" and ".join(groups)] = {name: value for part in parts for name, value in part.items()}
    for about, part in groups.items():
        new = with_facts(view, part)
        if new is not None:
            old = view.facts()
            moved = ", ".join(f"{shown(old.get(name))} -> {shown(value)}" for name, value in part.items())
            yield Explanation(about, f"{moved}, as the source has it", new)


def _group(name: str, part: Mapping[str, Any]) -> str:
    """A single fact by its path, several of one feature by the feature's name."""
    return next(iter(part)) if len(part) == 1 else name


def thetas(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-9, A1-7: a theta that was not found where the converter looked becomes a default."""
    if hints.theta is not None:
        yield from fact(view, "rope.theta", hints.theta, "the target's own")
    for name in ("rope.theta", "sliding.theta") if view.spec.sliding else ("rope.theta",):
        for value in THETAS:
            yield from fact(view, name, value)


def captures(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-51: counted from one or from zero, or in an order that is not fc's."""
    ids, depth = view.captures, view.spec.target_layer_count
    if not view.spec.capture_layers:  # it reads the final state
        return
    ways = {
        "all one higher": tuple(k + 1 for k in ids),
        "all one lower": tuple(k - 1 for k in ids),
        "reversed": ids[::-1],
        "sorted": tuple(sorted(ids)),
    } | {f"rotated by {n}": (*ids[n:], *ids[:n]) for n in range(1, len(ids))}
    for how, new in ways.items():
        if min(new) >= -1 and max(new) < depth:
            yield from fact(view, "capture_layers", new, how)


def in_chains(view: View) -> bool:
    """Drafts token by token: there is no block and no mask token."""
    return view.spec.block_size is None


def masks(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-53: another model's mask token, or the tokenizer's own."""
    if in_chains(view):
        return
    for token in (*MASKS, view.spec.vocab_size - 1, *hints.tokens):
        yield from fact(view, "mask_token_id", token)


def blocks(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-54."""
    if in_chains(view):
        return
    for size in BLOCK_SIZES:
        yield from fact(view, "block_size", size)


def windows(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-55, T-16: a window lost, on the wrong layers, or as wide as another drafter's."""
    layers, window = view.spec.layer_count, view.spec.window
    if window is None and in_chains(view):  # no cell of theirs has one that may be missing
        return
    all_but_last = (*[True] * (layers - 1), False)
    patterns = {all_but_last, (True,) * layers}
    if window is None:
        for size in WINDOWS:
            for pattern in (all_but_last, (True,) * layers) if layers > 1 else ((True,),):
                yield from windowed(view, SlidingWindow(size, pattern))
        return
    if view.spec.sliding is None:  # else which layers slide is seen by the shapes of their tensors
        yield from windowed(view, None)
        for pattern in (window.layers[::-1], tuple(not slides for slides in window.layers), *sorted(patterns)):
            if any(pattern):
                yield from windowed(view, SlidingWindow(window.size, pattern))
    for size in (window.size // 2, window.size * 2, *WINDOWS):
        if size:
            yield from windowed(view, SlidingWindow(size, window.layers))


def windowed(view: View, window: SlidingWindow | None) -> Iterator[Explanation]:
    old = view.spec.window
    about = "window" if old is None or window is None else "window.layers" if old.size == window.size else "window.size"

    def text(one: SlidingWindow | None) -> str:
        return "none" if one is None else f"{one.size} on {shown(one.layers)}"

    yield Explanation(about, f"{text(old)} -> {text(window)}", replace(view, spec=replace(view.spec, window=window)))


def single_facts(view: View, hints: Hints) -> Iterator[Explanation]:
    """What is one value or another."""
    spec = view.spec
    if spec.norm_before_residual is not None:  # vLLM and llama.cpp take another one where a config says nothing
        yield from fact(view, "norm_before_residual", not spec.norm_before_residual)
    if spec.sample_from_anchor is not None:  # and another one here
        yield from fact(view, "sample_from_anchor", not spec.sample_from_anchor)
    if not in_chains(view):
        yield from fact(view, "causal", not spec.causal)
    factors = Role.ROPE_FACTORS in weight_explanations.roles_of(view)  # one for each rotary pair
    for dimensions in () if factors else (spec.head_dim, spec.head_dim // 2, spec.head_dim // 4):
        yield from fact(view, "rope.dimensions", dimensions)
    if spec.rope.scaling is not None:
        rope = replace(spec.rope, scaling=None)
        mended = f"{spec.rope.scaling.method} -> none"
        yield Explanation("rope.scaling", mended, replace(view, spec=replace(spec, rope=rope)))
    for scale in () if in_chains(view) else (None, math.sqrt(spec.hidden_size)):  # no runtime scales a chain's
        yield from fact(view, "embedding_scale", scale)
    yield from fact(view, "attention_value_scale", None)
    if spec.attention_scale is not None:
        yield from fact(view, "attention_scale", 1.0)
    yield from fact(view, "context_theta", None)
    for epsilon in EPSILONS:
        yield from fact(view, "norm_epsilon", epsilon)


FAMILIES: tuple[Family, ...] = (
    source_facts, weight_explanations.source_tensors, thetas, captures, masks, blocks, windows, single_facts,
    weight_explanations.token_ids, weight_explanations.rotary_rows, weight_explanations.norms,
    weight_explanations.swaps, weight_explanations.gated_queries, weight_explanations.kernels,
    weight_explanations.by_columns,
)  # fmt: skip
CAPTURING: tuple[Family, ...] = (source_facts, captures)
