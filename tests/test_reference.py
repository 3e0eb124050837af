"""The torch reference against the algorithm written down a second time: numpy, f64, one head and position at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import dflash_shapes, random_tensors, small_checkpoint, small_config, tiny_target, write_checkpoint

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import Convolution, DrafterSpec, Rope, RopeScaling, Selector, SlidingWindow

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_drafter.converters.verify.in_torch.reference.dflash import DFlash, block_visibility  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.drafter import Tables  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.rope import attention_factor, frequencies, rotate  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    Weights,
    checkpoint_weights,
    gguf_weights,
    parameter_names,
    reference,
)

SPEC = DrafterSpec(
    kind="dflash",
    layer_count=2,
    hidden_size=24,
    feed_forward_size=32,
    head_count=4,
    kv_head_count=2,
    head_dim=8,
    context_length=64,
    vocab_size=40,
    norm_epsilon=1e-5,
    rope=Rope(theta=1000.0, dimensions=8),
    block_size=5,
    mask_token_id=39,
    capture_layers=(0, 2),
    target_layer_count=4,
    target_hidden_size=20,
    causal=False,
)
YARN = RopeScaling("yarn", 4.0, 16)
OWN_TABLES = ((Role.TOKEN_EMBEDDING, None), (Role.OUTPUT, None))
BIASES = {Role.ATTN_Q_BIAS: 32, Role.ATTN_K_BIAS: 16, Role.ATTN_V_BIAS: 16, Role.ATTN_OUTPUT_BIAS: 24}
SINKS = {Role.ATTN_SINKS: 4}
DFLASH2 = {"kind": "dflash2", "convolution": Convolution(2, 4), "selector": Selector(6, 5)}
DSPARK = {"kind": "dspark", "markov_rank": 6, "confidence_head": False, "sample_from_anchor": False}
# what a drafter may have: changes of the spec, tensors per layer, tensors once
VARIANTS: dict[str, tuple[dict[str, Any], dict[Role, int], list[Role]]] = {
    "plain": ({}, {}, []),
    "rotary dimensions": ({"rope": Rope(1000.0, 4)}, {}, []),
    "linear": ({"rope": Rope(1000.0, 8, RopeScaling("linear", 3.0))}, {}, []),
    "YaRN": ({"rope": Rope(1000.0, 8, YARN)}, {}, []),
    "YaRN, its numbers given": (
        {"rope": Rope(1000.0, 8, replace(YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=0.5))},
        {},
        [],
    ),
    "theta of the context": ({"context_theta": 50.0}, {}, []),
    "window": ({"window": SlidingWindow(4, (True, False))}, {}, []),
    "causal": ({"causal": True}, {}, []),
    "value scale": ({"attention_value_scale": 0.7}, {}, []),
    "value scale and biases": ({"attention_value_scale": 0.7}, BIASES, []),
    "embedding scale": ({"embedding_scale": 4.9}, {}, []),
    "logits": ({"logit_scale": 0.3, "logit_softcap": 5.0}, {}, []),
    "biases": ({}, BIASES, []),
    "sinks": ({}, SINKS, []),
    "sinks in a window": ({"window": SlidingWindow(3, (False, True)), "causal": True}, SINKS, []),
    "own embedding": ({}, {}, [Role.TOKEN_EMBEDDING]),
    "own head": ({}, {}, [Role.OUTPUT]),
    "own embedding and head": ({}, {}, [Role.TOKEN_EMBEDDING, Role.OUTPUT]),
    "reduced vocabulary": ({"draft_vocab_size": 24}, {}, [Role.TOKEN_EMBEDDING, Role.OUTPUT, Role.DRAFT_TO_TARGET]),
    "DFlash2": (DFLASH2, {}, []),
    "DFlash2, three taps, all channels alike": (DFLASH2 | {"convolution": Convolution(3, 24)}, {}, []),
    "DSpark": (DSPARK, {}, []),
    "DSpark from the anchor": (DSPARK | {"sample_from_anchor": True}, {}, []),
    "DSpark, reduced vocabulary": (
        DSPARK | {"draft_vocab_size": 24}, {}, [Role.TOKEN_EMBEDDING, Role.OUTPUT, Role.DRAFT_TO_TARGET]
    ),
}  # fmt: skip


def made(name: str) -> tuple[DrafterSpec, Weights]:
    """A variant's facts and random weights."""
    changes, layered, once = VARIANTS[name]
    spec = replace(SPEC, **changes)
    shapes = {key: tuple(value.shape) for key, value in DFlash(spec).state_dict().items()}
    names = parameter_names(spec)
    weights: dict[Any, tuple[int, ...]] = {key: shapes[name] for key, name in names.items() if name in shapes}
    weights |= {(role, i): (size,) for role, size in layered.items() for i in range(spec.layer_count)}
    rows = spec.draft_vocab_size or spec.vocab_size
    weights |= {key: (rows if key[0] is Role.OUTPUT else 40, 24) for key in OWN_TABLES if key[0] in once}
    rng = np.random.default_rng(1)
    made = {key: rng.standard_normal(shape).astype(np.float32) * 0.4 for key, shape in weights.items()}
    if Role.DRAFT_TO_TARGET in once:
        made[Role.DRAFT_TO_TARGET, None] = rng.permutation(spec.vocab_size)[:rows].astype(np.float32)
    return spec, made


class Oracle:
    """dialects' pseudo code, literally; every array f64."""

    def __init__(self, spec: DrafterSpec, weights: Weights) -> None:
        self.spec, self.w = spec, {key: array.astype(np.float64) for key, array in weights.items()}

    def norm(self, x: np.ndarray, role: Role, layer: int | None) -> np.ndarray:
        return x / math.sqrt(np.mean(x**2) + self.spec.norm_epsilon) * self.w[role, layer]

    def heads(self, x: np.ndarray, role: Role, bias: Role, layer: int) -> np.ndarray:
        y = self.w[role, layer] @ x + self.w.get((bias, layer), 0.0)
        return y.reshape(-1, self.spec.head_dim)

    def turned(self, head: np.ndarray, position: int, theta: float) -> np.ndarray:
        """ggml's rope_yarn, pair by pair."""
        n, s = self.spec.rope.dimensions, self.spec.rope.scaling
        out = head.copy()
        for pair in range(n // 2):
            angle, size = position * theta ** (-2 * pair / n), 1.0
            if s is not None:
                mix = 0.0
                if s.method == "yarn":
                    size = s.attention_factor or 0.1 * math.log(s.factor) + 1
                    assert s.original_context_length
                    fast, slow = (
                        n * math.log(s.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                        for turns in (s.beta_fast or 32.0, s.beta_slow or 1.0)
                    )
                    low, high = max(0, math.floor(fast)), min(n - 1, math.ceil(slow))
                    mix = 1 - min(1.0, max(0.0, (pair - low) / max(0.001, high - low)))
                angle = angle / s.factor * (1 - mix) + angle * mix
            a, b = head[pair], head[pair + n // 2]
            out[pair] = size * (a * math.cos(angle) - b * math.sin(angle))
            out[pair + n // 2] = size * (b * math.cos(angle) + a * math.sin(angle))
        return out

    def keys_values(self, x: np.ndarray, position: int, theta: float, layer: int) -> tuple[Any, Any]:
        keys = self.heads(x, Role.ATTN_K, Role.ATTN_K_BIAS, layer)
        keys = np.array([self.turned(self.norm(k, Role.ATTN_K_NORM, layer), position, theta) for k in keys])
        return keys, self.heads(x, Role.ATTN_V, Role.ATTN_V_BIAS, layer)

    def attention(self, q: np.ndarray, head: int, p: int, seen: list[tuple[int, Any, Any]], layer: int) -> np.ndarray:
        window = self.spec.window
        if window is not None and window.layers[layer]:
            seen = [entry for entry in seen if p - entry[0] < window.size]
        group = head // (self.spec.head_count // self.spec.kv_head_count)
        scores = [q @ k[group] / math.sqrt(self.spec.head_dim) for _, k, _ in seen]
        sink = self.w.get((Role.ATTN_SINKS, layer))
        below = sum(math.exp(s) for s in scores) + (0 if sink is None else math.exp(sink[head]))
        return sum(math.exp(s) / below * v[group] for s, (_, _, v) in zip(scores, seen, strict=True))

    def filtered(self, xs: list[Any], us: list[Any], side: int, base: Role, projection: Role, layer: int) -> list[Any]:
        """Dialects 7.2, one channel group at a time; `us` are the sublayer's normed inputs."""
        conv = self.spec.convolution
        if conv is None:
            return xs
        groups, out = self.spec.hidden_size // conv.group_size, []
        for t, u in enumerate(us):
            dynamic, y = (self.w[projection, layer] @ u).reshape(2, conv.kernel_size, groups), np.zeros_like(u)
            for tap in range(min(conv.kernel_size, t + 1)):
                for g in range(groups):
                    part = slice(g * conv.group_size, (g + 1) * conv.group_size)
                    weight = self.w[base, layer][side, tap, part] + dynamic[side, tap, g]
                    y[part] += weight * xs[t - tap][part]
            out.append(y)
        return out

    def chosen(self, hidden: list[Any], logits: np.ndarray, anchor: int) -> tuple[list[int], np.ndarray]:
        """The walk from draft to draft; logits over the target's vocabulary, as the choice saw them."""
        spec, out, before, tokens = self.spec, [], anchor, list[int]()
        d2t = self.w.get((Role.DRAFT_TO_TARGET, None))
        for row, state in zip(logits, hidden, strict=True):
            if spec.markov_rank:
                row = row + self.w[Role.MARKOV_OUT, None] @ self.w[Role.MARKOV_IN, None][before]
            if d2t is not None:
                row, own = np.full(spec.vocab_size, -1e30), row
                for i, token in enumerate(d2t):
                    row[int(token)] = own[i]
            best = int(row.argmax())
            if spec.selector is not None:
                s = self.w[Role.SELECTOR_HIDDEN, None] @ state
                pull = self.w[Role.SELECTOR_PREDECESSOR, None][before] * s
                likeliest = sorted(range(len(row)), key=lambda c: -row[c])[: spec.selector.top_k]
                row = row.copy()
                scores = {c: row[c] + self.w[Role.SELECTOR_SUCCESSOR, None][c] @ pull for c in likeliest}
                for c, score in scores.items():
                    row[c] = score
                best = max(scores, key=lambda c: scores[c])
            tokens.append(best)
            out.append(row)
            before = best
        return tokens, np.array(out)

    def draft(
        self, embedding: np.ndarray, head: np.ndarray, captured: np.ndarray, anchor: int, n: int
    ) -> tuple[list[int], np.ndarray]:
        spec, theta, start = self.spec, self.spec.rope.theta, len(captured)
        own = self.w.get((Role.TOKEN_EMBEDDING, None))
        head = self.w.get((Role.OUTPUT, None), head if own is None else own)
        embedding = embedding if own is None else own
        features = [self.norm(self.w[Role.FUSION, None] @ c, Role.FUSION_NORM, None) for c in captured]
        h = [
            embedding[t] * (spec.embedding_scale or 1)
            for t in [anchor] + [spec.mask_token_id] * (n - bool(spec.sample_from_anchor))
        ]
        for layer in range(spec.layer_count):
            context = [(p, *self.keys_values(c, p, spec.context_theta or theta, layer)) for p, c in enumerate(features)]
            conv = (Role.ATTN_CONV_BASE, Role.ATTN_CONV_PROJ, layer)
            normed = [self.norm(x, Role.ATTN_NORM, layer) for x in h]
            u, outputs = self.filtered(normed, normed, 0, *conv), []
            block = [(start + i, *self.keys_values(x, start + i, theta, layer)) for i, x in enumerate(u)]
            for i, x in enumerate(u):
                seen = [*context, *(block[: i + 1] if spec.causal else block)]
                queries = self.heads(x, Role.ATTN_Q, Role.ATTN_Q_BIAS, layer)
                turned = [self.turned(self.norm(q, Role.ATTN_Q_NORM, layer), start + i, theta) for q in queries]
                o = np.concatenate([self.attention(q, j, start + i, seen, layer) for j, q in enumerate(turned)])
                o = self.w[Role.ATTN_OUTPUT, layer] @ o + self.w.get((Role.ATTN_OUTPUT_BIAS, layer), 0.0)
                outputs.append(o * (spec.attention_value_scale or 1))
            h = [a + b for a, b in zip(h, self.filtered(outputs, normed, 1, *conv), strict=True)]
            conv = (Role.FFN_CONV_BASE, Role.FFN_CONV_PROJ, layer)
            normed, outputs = [self.norm(x, Role.FFN_NORM, layer) for x in h], []
            for z in self.filtered(normed, normed, 0, *conv):
                gate, up = self.w[Role.FFN_GATE, layer] @ z, self.w[Role.FFN_UP, layer] @ z
                outputs.append(self.w[Role.FFN_DOWN, layer] @ (gate / (1 + np.exp(-gate)) * up))
            h = [a + b for a, b in zip(h, self.filtered(outputs, normed, 1, *conv), strict=True)]
        final = [self.norm(x, Role.OUTPUT_NORM, None) for x in h[len(h) - n :]]
        logits = np.array([head @ x for x in final]) * (spec.logit_scale or 1)
        cap = spec.logit_softcap
        return self.chosen(final, logits if cap is None else cap * np.tanh(logits / cap), anchor)


def inputs(positions: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A target's embedding and head, and captured states."""
    rng = np.random.default_rng(2)
    shapes = ((40, 24), (40, 24), (positions, 2 * 20))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def drafted(spec: DrafterSpec, weights: Weights, anchor: int, count: int, positions: int = 7) -> Any:
    drafter = reference(spec, weights)
    embedding, head, captured = map(torch.from_numpy, inputs(positions))
    context = drafter.inject(drafter.fuse(captured), torch.arange(positions))
    found = drafter.draft(context, anchor, count, Tables(embedding, head))
    return found.tokens.tolist(), found.logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_algorithm_written_twice(name: str) -> None:
    spec, weights = made(name)
    tokens, logits = Oracle(spec, weights).draft(*inputs(), 11, 4)
    found = drafted(spec, weights, 11, 4)
    assert found[0] == tokens
    np.testing.assert_allclose(found[1], logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_every_fact_changes_the_drafts(name: str) -> None:
    """Else the comparison above would say nothing about it."""
    spec, weights = made(name)
    plain = {key: array for key, array in weights.items() if key in made("plain")[1]}
    assert np.abs(drafted(spec, weights, 11, 4)[1] - drafted(SPEC, plain, 11, 4)[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["DFlash2", "DSpark"])
def test_drafts_follow_what_they_are_told(name: str) -> None:
    """Each is drafted as if those before it had been these; the first one has none before it."""
    spec, weights = made(name)
    drafter = reference(spec, weights)
    embedding, head, captured = map(torch.from_numpy, inputs())
    context, tables = drafter.read(None, captured, (), Tables(embedding, head)), Tables(embedding, head)
    free = drafter.draft(context, 11, 4, tables)
    same = drafter.draft(context, 11, 4, tables, free.tokens.tolist())
    assert torch.equal(free.logits, same.logits) and drafter.depends
    other = drafter.draft(context, 11, 4, tables, [(int(token) + 1) % 40 for token in free.tokens])
    assert torch.equal(free.logits[0], other.logits[0])
    assert not torch.equal(free.logits[1:], other.logits[1:])


@pytest.mark.parametrize("count", [1, 4])
def test_context_is_computed_once(count: int) -> None:
    """A context grown position by position is the one made at once; a prefix of it is the context of a shorter text."""
    spec, weights = made("theta of the context")
    drafter = reference(spec, weights)
    captured = torch.from_numpy(inputs()[2])
    features = drafter.fuse(captured)
    whole = drafter.inject(features, torch.arange(7))
    for layer, (keys, values) in enumerate(whole):
        assert keys.shape == values.shape == (2, 7, 8)
        steps = [drafter.inject(features[i : i + count], torch.arange(7)[i : i + count]) for i in range(0, 7, count)]
        torch.testing.assert_close(torch.cat([step[layer][0] for step in steps], -2), keys)
        torch.testing.assert_close(torch.cat([step[layer][1] for step in steps], -2), values)


def test_leading_dimensions() -> None:
    """Training works on batches: rows do not see each other."""
    drafter = reference(*made("sinks in a window"))
    rng = np.random.default_rng(3)
    captured = torch.from_numpy(rng.standard_normal((3, 7, 40)).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal((3, 4, 24)).astype(np.float32))
    at, visible = torch.arange(7, 11), block_visibility(4, 7, True)
    context = drafter.inject(drafter.fuse(captured), torch.arange(7))
    assert context[0][0].shape == (3, 2, 7, 8)
    out = drafter(x, at, context, torch.arange(7), visible)
    for row in range(3):
        alone = [(k[row], v[row]) for k, v in context]
        torch.testing.assert_close(out[row], drafter(x[row], at, alone, torch.arange(7), visible))


def test_a_head_in_fewer_bits_is_widened() -> None:
    drafter = reference(*made("plain"))
    hidden = torch.randn(3, 24)
    head = torch.randn(70000, 24).bfloat16()
    torch.testing.assert_close(drafter.logits(hidden, head), hidden @ head.float().T, rtol=1e-5, atol=1e-5)


# --- rope against transformers ---


@pytest.mark.parametrize("dimensions", [64, 32])
@pytest.mark.parametrize("theta", [1e4, 1e7])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 8.0),
        RopeScaling("yarn", 4.0, 4096),
        RopeScaling("yarn", 64.0, 4096, attention_factor=1.0),
        RopeScaling("yarn", 40.0, 8192, beta_fast=16.0, beta_slow=2.0),
    ],
    ids=str,
)
def test_rope_is_that_of_transformers(scaling: RopeScaling | None, theta: float, dimensions: int) -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    parameters: dict[str, Any] = {"rope_theta": theta, "rope_type": scaling.method if scaling else "default"}
    if scaling is not None:
        stated = {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context_length,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        }
        parameters |= {key: value for key, value in stated.items() if value is not None}
    length = int((scaling.original_context_length or 4096) * scaling.factor) if scaling else 4096
    oracle = Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=dimensions, rope_parameters=parameters, max_position_embeddings=length)
    )
    rope = Rope(theta, dimensions, scaling)
    torch.testing.assert_close(frequencies(rope, theta, 4096).float(), oracle.inv_freq, rtol=2e-5, atol=0)
    assert attention_factor(scaling) == pytest.approx(oracle.attention_scaling)
    positions, x = torch.tensor([0, 1, 100, 3000]), torch.randn(1, 2, 4, dimensions)
    expected = apply_rotary_pos_emb(x, x, *oracle(x, positions[None]))[0]
    torch.testing.assert_close(rotate(x, positions, rope, theta, 4096), expected, rtol=1e-3, atol=2e-3)


def test_a_scaling_that_names_no_length_stretches_the_trained_one() -> None:
    rope = Rope(1e4, 64, RopeScaling("yarn", 4.0))
    named = Rope(1e4, 64, RopeScaling("yarn", 4.0, 2048))
    assert torch.equal(frequencies(rope, 1e4, 2048), frequencies(named, 1e4, 1))


def test_extrapolation_factor() -> None:
    """ggml's: how much of YaRN's own mixing is done; 1 is all of it."""
    plain, linear = (frequencies(Rope(1e4, 64, s), 1e4, 0) for s in (None, RopeScaling("linear", 4.0)))
    whole, half = (
        frequencies(Rope(1e4, 64, RopeScaling("yarn", 4.0, 2048, extrapolation_factor=f)), 1e4, 0) for f in (1.0, 0.5)
    )
    torch.testing.assert_close(half, (whole + linear) / 2)
    assert torch.equal(whole[:5], plain[:5]) and torch.allclose(whole[-5:], linear[-5:])


def test_an_unknown_scaling() -> None:
    with pytest.raises(ValueError, match=r"rope.scaling.method: found 'longrope'"):
        frequencies(Rope(1e4, 64, RopeScaling("longrope", 4.0)), 1e4, 2048)


# --- weights from files ---

OPTIONAL: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "sinks": ("llama.cpp", {}, {f"layers.{i}.self_attn.attention_sink_bias": (4,) for i in range(2)}),
    "own tables": (
        "ik_llama.cpp",
        {"tie_word_embeddings": False},
        {"embed_tokens.weight": (2048, 64), "lm_head.weight": (2048, 64)},
    ),
    "own embedding": ("llama.cpp", {}, {"embed_tokens.weight": (2048, 64)}),
    "theta of the context": ("ik_llama.cpp", {"dflash_config.backbone_rotary_base": 5000.0}, {}),
    "nothing more": ("lucebox", {}, {}),
}


@pytest.mark.parametrize(("runtime", "changes", "more"), OPTIONAL.values(), ids=OPTIONAL)
def test_a_file_drafts_like_its_checkpoint(
    tmp_path: Path, runtime: str, changes: dict[str, Any], more: dict[str, tuple[int, ...]]
) -> None:
    """Through every dialect and with every tensor a drafter may have."""
    config = small_config(vocab_size=2048, **changes)
    folder = write_checkpoint(tmp_path / "drafter", config, random_tensors({**dflash_shapes(config), **more}))
    target = tiny_target(
        tmp_path / "target", architectures=["Qwen3ForCausalLM"], hidden_size=64, num_hidden_layers=6, eos_token_id=2046
    )
    convert(ConvertJob(folder, target, runtime, "F32", tmp_path / "d.gguf"))
    published = read_published(folder)
    spec, weights = gguf_weights(tmp_path / "d.gguf", {"target_layer_count": "6"})
    assert {key for key, _ in weights} >= {role for role in Role if role.name in ("FUSION", "ATTN_Q", "FFN_DOWN")}
    a = reference(published.spec, checkpoint_weights(published))
    b = reference(spec, weights)
    rng = np.random.default_rng(4)
    embedding, head = (torch.from_numpy(rng.standard_normal((2048, 64)).astype(np.float32)) for _ in range(2))
    captured = torch.from_numpy(rng.standard_normal((9, 128)).astype(np.float32))
    tables = Tables(embedding, head)
    logits = [m.draft(m.read(None, captured, (), tables), 17, 5, tables).logits.numpy() for m in (a, b)]
    assert np.array_equal(*logits)


def test_weights_are_shared_not_copied() -> None:
    spec, weights = made("plain")
    before = reference(spec, weights).fc.weight
    weights[Role.FUSION, None][0, 0] = 7
    assert before[0, 0] == 7


def test_a_weight_that_is_missing() -> None:
    spec, weights = made("plain")
    del weights[Role.FFN_UP, 1]
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.up_proj.weight"):
        reference(spec, weights)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    """`WrongInput` with all problems; another kind of file is named."""
    from convert_drafter.converters.gguf_file import write_gguf
    from convert_drafter.converters.gguf_read import read_gguf

    good = tmp_path / "good.gguf"
    convert(ConvertJob(small_checkpoint(tmp_path / "c"), None, "lucebox", "F32", good))
    file = read_gguf(good)
    kept = [t for t in file.tensors.values() if "ffn_up" not in t.name]
    write_gguf(tmp_path / "cut.gguf", list(file.keys.values()), kept, lambda tensor: file.slabs(tensor.name))
    with pytest.raises(Problems, match=r"2 problems\n.*blk.0.ffn_up.weight: missing"):
        gguf_weights(tmp_path / "cut.gguf")
    with pytest.raises(WrongInput):
        gguf_weights(tmp_path / "c" / "config.json")
