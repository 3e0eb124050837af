"""EAGLE-3 in torch against the algorithm written a second time: plain loops in numpy, without any cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Rope, RopeScaling

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

from convert_drafter.converters.verify.in_torch.reference.drafter import Tables  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.rope import attention_factor, frequencies  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import Weights, parameter_names, reference  # noqa: E402

VOCAB, TEXT, ANCHOR = 40, (3, 17, 8, 30, 22, 9, 1), 11
SPEC = DrafterSpec(
    kind="eagle3",
    layer_count=1,
    hidden_size=24,
    feed_forward_size=32,
    head_count=4,
    kv_head_count=2,
    head_dim=8,
    context_length=64,
    vocab_size=VOCAB,
    norm_epsilon=1e-6,
    rope=Rope(theta=1000.0, dimensions=8),
    capture_layers=(0, 4, 2),
    target_layer_count=6,
    target_hidden_size=24,
    causal=True,
    norm_before_residual=False,
    norm_before_fc=False,
)
NARROW = {"hidden_size": 16, "target_hidden_size": 24}
OWN = [Role.TOKEN_EMBEDDING, Role.OUTPUT]
VARIANTS: dict[str, tuple[dict[str, Any], list[Role]]] = {
    "plain": ({}, []),
    "norm before the residual": ({"norm_before_residual": True}, []),
    "norm before the fusion": ({"norm_before_fc": True}, []),
    "both norms, narrower than the target": ({"norm_before_residual": True, "norm_before_fc": True, **NARROW}, OWN),
    "own embedding": ({}, [Role.TOKEN_EMBEDDING]),
    "own head": ({}, [Role.OUTPUT]),
    "reduced vocabulary": ({"draft_vocab_size": 24}, [Role.OUTPUT, Role.DRAFT_TO_TARGET]),
    "YaRN": ({"rope": Rope(1000.0, 8, RopeScaling("yarn", 4.0, 16))}, []),
    "factors of the pairs": ({}, [Role.ROPE_FACTORS]),
}


def made(name: str) -> tuple[DrafterSpec, Weights]:
    changes, roles = VARIANTS[name]
    spec = replace(SPEC, **changes)
    hidden, wide, d, rows = spec.hidden_size, 3 * spec.target_hidden_size, spec.head_dim, spec.draft_vocab_size or VOCAB
    shapes: dict[tuple[Role, int | None], tuple[int, ...]] = {
        (Role.FUSION, None): (hidden, wide),
        (Role.OUTPUT_NORM, None): (hidden,),
        (Role.ATTN_NORM, 0): (hidden,),
        (Role.ATTN_NORM_2, 0): (hidden,),
        (Role.ATTN_Q, 0): (spec.head_count * d, 2 * hidden),
        (Role.ATTN_K, 0): (spec.kv_head_count * d, 2 * hidden),
        (Role.ATTN_V, 0): (spec.kv_head_count * d, 2 * hidden),
        (Role.ATTN_OUTPUT, 0): (hidden, spec.head_count * d),
        (Role.FFN_NORM, 0): (hidden,),
        (Role.FFN_GATE, 0): (spec.feed_forward_size, hidden),
        (Role.FFN_UP, 0): (spec.feed_forward_size, hidden),
        (Role.FFN_DOWN, 0): (hidden, spec.feed_forward_size),
    }
    shapes |= {(Role.FUSION_NORM, None): (wide,)} if spec.norm_before_fc else {}
    shapes |= {(Role.TOKEN_EMBEDDING, None): (VOCAB, hidden)} if Role.TOKEN_EMBEDDING in roles else {}
    shapes |= {(Role.OUTPUT, None): (rows, hidden)} if Role.OUTPUT in roles else {}
    rng = np.random.default_rng(2)
    weights = {key: rng.standard_normal(shape).astype(np.float32) * 0.4 for key, shape in shapes.items()}
    if Role.DRAFT_TO_TARGET in roles:
        weights[Role.DRAFT_TO_TARGET, None] = rng.permutation(VOCAB)[:rows].astype(np.float32)
    if Role.ROPE_FACTORS in roles:
        weights[Role.ROPE_FACTORS, None] = np.array([1, 1.5, 4, 8], np.float32)
    return spec, weights


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The target's embedding and head, and the captured states of the text."""
    rng = np.random.default_rng(1)
    shapes = ((VOCAB, 24), (VOCAB, 24), (len(TEXT), 72))
    embedding, head, captured = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return embedding, head, captured


class Oracle:
    """Dialects 7.5, one number after the other; every pair is computed anew for every draft."""

    def __init__(self, spec: DrafterSpec, weights: Weights) -> None:
        self.spec = spec
        self.w = {key: array.astype(np.float64) for key, array in weights.items()}

    def norm(self, x: np.ndarray, role: Role, layer: int | None) -> np.ndarray:
        out: np.ndarray = x / math.sqrt((x * x).mean() + self.spec.norm_epsilon) * self.w[role, layer]
        return out

    def turned(self, head: np.ndarray, position: int) -> np.ndarray:
        rope, half = self.spec.rope, self.spec.rope.dimensions // 2
        turns = frequencies(rope, rope.theta, self.spec.context_length).numpy()
        turns = turns / self.w.get((Role.ROPE_FACTORS, None), 1.0)
        out, size = head.copy(), attention_factor(rope.scaling)
        for k in range(half):
            cos, sin = math.cos(position * turns[k]) * size, math.sin(position * turns[k]) * size
            a, b = head[k], head[k + half]
            out[k], out[k + half] = a * cos - b * sin, b * cos + a * sin
        return out

    def state(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """What the layer makes of the last of these pairs (embedding, feature), which sees them all."""
        spec, d, last = self.spec, self.spec.head_dim, len(pairs) - 1
        normed = [self.norm(g, Role.ATTN_NORM_2, 0) for _, g in pairs]
        u = [np.concatenate([self.norm(x, Role.ATTN_NORM, 0), b]) for (x, _), b in zip(pairs, normed, strict=True)]
        queries = (self.w[Role.ATTN_Q, 0] @ u[last]).reshape(-1, d)
        outputs = []
        for n, query in enumerate(queries):
            group, q = n // (spec.head_count // spec.kv_head_count), self.turned(query, last)
            keys = [self.turned((self.w[Role.ATTN_K, 0] @ x).reshape(-1, d)[group], p) for p, x in enumerate(u)]
            values = [(self.w[Role.ATTN_V, 0] @ x).reshape(-1, d)[group] for x in u]
            scores = [math.exp(q @ key / math.sqrt(d)) for key in keys]
            outputs.append(sum(s * value for s, value in zip(scores, values, strict=True)) / sum(scores))
        h = normed[last] if spec.norm_before_residual else pairs[last][1]
        h = h + self.w[Role.ATTN_OUTPUT, 0] @ np.concatenate(outputs)
        z = self.norm(h, Role.FFN_NORM, 0)
        gate, up = self.w[Role.FFN_GATE, 0] @ z, self.w[Role.FFN_UP, 0] @ z
        out: np.ndarray = h + self.w[Role.FFN_DOWN, 0] @ (gate / (1 + np.exp(-gate)) * up)
        return out

    def draft(self, count: int, told: list[int] | None = None) -> tuple[list[int], np.ndarray]:
        embedding, head, captured = inputs()
        embedding = self.w.get((Role.TOKEN_EMBEDDING, None), embedding)
        head = self.w.get((Role.OUTPUT, None), head)
        if self.spec.norm_before_fc:
            captured = np.array([self.norm(c, Role.FUSION_NORM, None) for c in captured])
        features = [self.w[Role.FUSION, None] @ c for c in captured]
        following = [*TEXT[1:], ANCHOR]  # a feature goes with the token after its position
        pairs = [(embedding[t], g) for t, g in zip(following, features, strict=True)]
        tokens, rows = list[int](), []
        for i in range(count):
            state = self.state(pairs)
            row = head @ self.norm(state, Role.OUTPUT_NORM, None)
            if (d2t := self.w.get((Role.DRAFT_TO_TARGET, None))) is not None:
                row, own = np.full(VOCAB, -1e30), row
                row[d2t.astype(int)] = own
            rows.append(row)
            tokens.append(int(row.argmax()))
            pairs.append((embedding[tokens[-1] if told is None else told[i]], state))
        return tokens, np.array(rows)


def drafted(spec: DrafterSpec, weights: Weights, count: int, told: list[int] | None = None) -> Any:
    drafter = reference(spec, weights)
    embedding, head, captured = map(torch.from_numpy, inputs())
    tables = Tables(embedding, head)
    found = drafter.draft(drafter.read(None, captured, TEXT, tables), ANCHOR, count, tables, told)
    return found.tokens.tolist(), found.logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_algorithm_written_twice(name: str) -> None:
    spec, weights = made(name)
    tokens, logits = Oracle(spec, weights).draft(4)
    found = drafted(spec, weights, 4)
    assert found[0] == tokens
    np.testing.assert_allclose(found[1], logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_every_fact_changes_the_drafts(name: str) -> None:
    """Else the comparison above would say nothing about it."""
    spec, weights = made(name)
    plain = replace(SPEC, hidden_size=spec.hidden_size)
    kept = {key: array for key, array in weights.items() if key in made("plain")[1] or spec.hidden_size == 16}
    kept.pop((Role.FUSION_NORM, None), None)
    assert np.abs(drafted(spec, weights, 4)[1] - drafted(plain, kept, 4)[1]).max() > 1e-3


def test_drafts_follow_what_they_are_told() -> None:
    spec, weights = made("plain")
    told = [5, 6, 7, 8]
    tokens, logits = Oracle(spec, weights).draft(4, told)
    found = drafted(spec, weights, 4, told)
    assert found[0] == tokens
    np.testing.assert_allclose(found[1], logits, rtol=1e-4, atol=5e-5)
    free = drafted(spec, weights, 4)
    assert (found[1][0] == free[1][0]).all() and (found[1][1:] != free[1][1:]).any()


@pytest.mark.parametrize("pieces", [(7,), (1, 6), (3, 3, 1), (1,) * 7])
def test_a_text_may_be_read_in_pieces(pieces: tuple[int, ...]) -> None:
    """The last pair of a piece is completed by the first token of the next one."""
    spec, weights = made("norm before the fusion")
    drafter = reference(spec, weights)
    embedding, head, captured = map(torch.from_numpy, inputs())
    tables, context, start = Tables(embedding, head), None, 0
    for size in pieces:
        context = drafter.read(context, captured[start : start + size], TEXT, tables)
        start += size
    whole = drafter.read(None, captured, TEXT, tables)
    assert len(context.features) == 7 and context.past.keys.shape[-2] == 6
    for ours, theirs in zip((context.features, *context.past), (whole.features, *whole.past), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_context_may_be_cut(length: int) -> None:
    spec, weights = made("plain")
    drafter = reference(spec, weights)
    embedding, head, captured = map(torch.from_numpy, inputs())
    tables = Tables(embedding, head)
    cut = drafter.until(drafter.read(None, captured, TEXT, tables), length)
    short = drafter.read(None, captured[:length], TEXT[:length], tables)
    ours, theirs = (drafter.draft(context, ANCHOR, 3, tables).logits for context in (cut, short))
    torch.testing.assert_close(ours, theirs)


def test_parameters_carry_the_checkpoint_s_names() -> None:
    spec, weights = made("both norms, narrower than the target")
    names = parameter_names(spec)
    assert names[Role.ATTN_Q, 0] == "layers.0.self_attn.q_proj.weight" and names[Role.FUSION_NORM, None] == (
        "input_norm.weight"
    )
    assert {names[key] for key in weights} == reference(spec, weights).state_dict().keys()
