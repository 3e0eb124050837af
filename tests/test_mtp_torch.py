"""MTP heads in torch: the reference against itself, what the trained head is worth, and what each fault costs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import make_mtp
import numpy as np
import pytest
from mtp_checkpoints import job

from convert_drafter.converters import convert, doctor
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_file import write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verdict import Outcome

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_drafter.converters.verify.acceptance import total  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp, shifted  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import FINAL, captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    gguf_weights,
    reference,
)
from convert_drafter.converters.verify.job import VerifyJob  # noqa: E402
from convert_drafter.converters.verify.loop import greedy, speculative_loop  # noqa: E402
from convert_drafter.converters.verify.verify import verify  # noqa: E402

Weights = Mapping[TensorKey, np.ndarray]
Plant = Callable[[DrafterSpec, dict[TensorKey, np.ndarray]], tuple[DrafterSpec, dict[TensorKey, np.ndarray]]]
RECORDED = json.loads((make_mtp.TRAINED.parent / "acceptance.json").read_text())
PROMPTS = [json.loads(line)["tokens"] for line in make_mtp.PROMPTS.read_text().splitlines()]
COUNT = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp.trained(tmp_path_factory.mktemp("mtp") / "target")


@pytest.fixture(scope="module")
def target(source: Path) -> TorchTarget:
    target = TorchTarget(source)
    target.end_tokens = frozenset()
    return target


@pytest.fixture(scope="module")
def head(source: Path) -> tuple[DrafterSpec, dict[TensorKey, np.ndarray]]:
    published = read_published(source)
    return published.spec, dict(checkpoint_weights(published))


def length(target: TorchTarget, drafter: Any, prompts: list[list[int]], count: int = COUNT) -> float:
    texts = [speculative_loop(target, TorchDrafter(drafter, target), prompt, count, 3) for prompt in prompts]
    assert [text.tokens for text in texts] == [greedy(target, prompt, count).tokens for prompt in prompts]
    return total(text.acceptance for text in texts).length


# --- the reference ---


def test_the_fixture_drafts_as_recorded(target: TorchTarget, head: tuple[DrafterSpec, Weights]) -> None:
    """Its texts are the target's own, in the verify steps that train_mtp.py counted."""
    drafter = reference(*head)
    texts = [speculative_loop(target, TorchDrafter(drafter, target), p, 128, 3) for p in PROMPTS[:2]]
    steps = [text.acceptance.steps for text in texts]
    assert steps == pytest.approx(RECORDED["verify_steps"][:2], abs=1)  # a tie may fall the other way elsewhere
    assert RECORDED["acceptance_length"] > 3


def test_a_head_reads_the_state_after_the_final_norm(target: TorchTarget, head: tuple[DrafterSpec, Weights]) -> None:
    """And not the last layer's: llama.cpp hands out what comes after output_norm (src/models/qwen35.cpp)."""
    assert captures_of(head[0]) == (FINAL,)
    last = target.layer_count - 1
    _, states = target.write(PROMPTS[0], 1, [FINAL, last])
    norm = target.model.get_decoder().norm
    torch.testing.assert_close(norm(states[last]), states[FINAL])
    assert not torch.allclose(states[last], states[FINAL], atol=0.1)
    # this head drafts as well from either, and only its logits tell
    drafter, tokens = reference(*head), PROMPTS[0]
    logits = [
        drafter.draft(
            drafter.read(None, states[layer][:-1], tokens, target.tables), tokens[-1], 1, target.tables
        ).logits
        for layer in (FINAL, last)
    ]
    assert (logits[0] - logits[1]).abs().max() > 0.05


def test_reading_in_pieces_is_reading_at_once(target: TorchTarget, head: tuple[DrafterSpec, Weights]) -> None:
    """The state of the last position of a piece meets the first token of the next."""
    drafter, tokens = reference(*head), PROMPTS[0]
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    whole = drafter.read(None, states, tokens, target.tables)
    pieces = None
    for start, stop in ((0, 1), (1, 30), (30, len(states))):
        pieces = drafter.read(pieces, states[start:stop], tokens, target.tables)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    first = drafter.until(whole, 20)
    again = drafter.read(None, states[:20], tokens, target.tables)
    assert [part.shape for part in first] == [part.shape for part in again]


def test_a_chain_continues_from_what_it_is_told_to_follow(
    target: TorchTarget, head: tuple[DrafterSpec, Weights]
) -> None:
    drafter, tokens = reference(*head), PROMPTS[0]
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    context = drafter.read(None, states[:-1], tokens, target.tables)
    free = drafter.draft(context, tokens[len(states) - 1], 3, target.tables)
    same = drafter.draft(context, tokens[len(states) - 1], 3, target.tables, free.tokens.tolist())
    torch.testing.assert_close(free.logits, same.logits)
    other = drafter.draft(context, tokens[len(states) - 1], 3, target.tables, [7, 8, 9])
    torch.testing.assert_close(free.logits[0], other.logits[0])
    assert not torch.allclose(free.logits[1], other.logits[1], atol=0.1)


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(source: Path, target: TorchTarget) -> None:
    """The decoder layer as transformers computes Qwen3.5's, norms less one and all, over the same joined input."""
    from safetensors.torch import load_file
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

    config = target.model.config
    state = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    layer = qwen.Qwen3_5DecoderLayer(config, 0).eval()
    own = {n.removeprefix("mtp.layers.0."): t for n, t in state.items() if n.startswith("mtp.layers.0.")}
    layer.load_state_dict(own)
    published = read_published(source)
    drafter: Mtp = reference(published.spec, checkpoint_weights(published))
    tokens = torch.tensor(PROMPTS[0][:40])
    states = target.write(PROMPTS[0][:40], 1, [FINAL])[1][FINAL]
    joined = drafter.head.join(target.embedding[tokens], shifted(states))
    at = torch.arange(40)
    rotary = qwen.Qwen3_5TextRotaryEmbedding(config)(joined[None], at[None, None].expand(3, 1, -1))
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    expected = layer(joined[None], position_embeddings=rotary, attention_mask=mask)
    nothing = torch.zeros(published.spec.kv_head_count, 0, published.spec.head_dim)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    found, _ = drafter.head(target.embedding[tokens], shifted(states), at, (nothing, nothing), visible)
    normed = drafter.head.norm(expected[0] if isinstance(expected, tuple) else expected)
    torch.testing.assert_close(found, normed.reshape(found.shape), atol=2e-4, rtol=2e-3)


# --- faults ---


def less_one(*roles: Role) -> Plant:
    """P-42: norms as they are published."""
    return lambda spec, weights: (spec, {k: w - 1 if k[0] in roles else w for k, w in weights.items()})


NORMS = [role for role in Role if role.name.endswith("_NORM") and role is not Role.OUTPUT_NORM]


def hidden_first(spec: DrafterSpec, weights: dict[TensorKey, np.ndarray]) -> tuple[DrafterSpec, dict[Any, np.ndarray]]:
    """MiMo joins the target's state and the embedding in the other order."""
    columns = {k: np.roll(w, spec.hidden_size, axis=1) if k[0] is Role.NEXTN_PROJ else w for k, w in weights.items()}
    return spec, columns


def gates_first(spec: DrafterSpec, weights: dict[TensorKey, np.ndarray]) -> tuple[DrafterSpec, dict[Any, np.ndarray]]:
    """All queries, then all gates, instead of both for each head."""

    def parted(w: np.ndarray) -> np.ndarray:
        heads = w.reshape(spec.head_count, 2, spec.head_dim, -1)
        return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(w.shape)

    return spec, {k: parted(w) if k[0] is Role.ATTN_Q else w for k, w in weights.items()}


@pytest.mark.parametrize(
    ("plant", "most"),
    [
        pytest.param(less_one(*NORMS), 1.3, id="P-42 no norm plus one"),
        pytest.param(less_one(Role.NEXTN_STATE_NORM), 2.8, id="P-42 hnorm less one"),
        pytest.param(hidden_first, 1.3, id="hidden first"),
        pytest.param(gates_first, 2.8, id="gates first"),
    ],
)
def test_a_planted_fault_costs_drafts_and_never_the_text(
    target: TorchTarget, head: tuple[DrafterSpec, dict[TensorKey, np.ndarray]], plant: Plant, most: float
) -> None:
    """The right head commits 3.2 tokens per verify step."""
    wrong = length(target, reference(*plant(*head)), [PROMPTS[0], PROMPTS[8]])
    assert wrong < most, wrong


def test_norms_without_the_one_are_found(source: Path, tmp_path: Path) -> None:
    """P-42: doctor says by what, verify what it costs."""
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    convert(job(source, good))
    file = read_gguf(good)

    def data(tensor: Any) -> Any:
        values = file.tensor_bytes(tensor.name).view("<f4")
        return [values - np.float32(1) if tensor.name.endswith("norm.weight") else values]

    write_gguf(bad, list(file.keys.values()), list(file.tensors.values()), data)
    (structure,) = doctor(bad, source=source)
    assert structure.outcome is Outcome.FAIL
    assert len([line for line in structure.details if "it is the checkpoint's minus 1" in line]) == 8
    prompts = make_mtp.PROMPTS
    asked = VerifyJob(bad, (source,), source=source, prompts=prompts, max_prompts=2, new_tokens=32, contexts=(64,))
    verdict = verify(asked)
    outcomes = {gate.name: gate.outcome for gate in verdict.gates}
    assert outcomes["lossless"] is Outcome.PASS and outcomes["same drafts"] is Outcome.FAIL


@pytest.mark.parametrize("recipe", ["F32", "Q8_0"])
def test_a_file_is_as_good_as_its_checkpoint(source: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "mtp.gguf"
    convert(job(source, out, recipe=recipe))
    prompts = make_mtp.PROMPTS
    asked = VerifyJob(out, (source,), source=source, prompts=prompts, max_prompts=3, new_tokens=32, contexts=(64,))
    outcomes = {gate.name: gate.outcome for gate in verify(asked).gates}
    assert {outcomes[name] for name in ("structure", "pairing", "lossless", "same drafts")} == {Outcome.PASS}
    spec, weights = gguf_weights(out)
    assert spec == read_published(source).spec and len(weights) == 17
