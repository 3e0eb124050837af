"""Chained heads in torch: the reference against transformers' own layers, over whole texts and without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_mtp
import make_mtp_mimo
import make_mtp_step
import numpy as np
import pytest
from mtp_checkpoints import job

from convert_drafter.converters import convert
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_file import write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.verdict import Outcome

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from step_target import StepTarget, renamed  # noqa: E402
from transformers.models.mimo_v2_flash import modeling_mimo_v2_flash as mimo  # noqa: E402
from transformers.models.mimo_v2_flash.configuration_mimo_v2_flash import MiMoV2FlashConfig  # noqa: E402
from transformers.models.step3p7 import modeling_step3p7 as step  # noqa: E402
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig  # noqa: E402

from convert_drafter.converters.verify.in_torch.reference.mtp import shifted  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.mtp_chain import MtpChain  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    gguf_weights,
    reference,
)
from convert_drafter.converters.verify.job import VerifyJob  # noqa: E402
from convert_drafter.converters.verify.verify import verify  # noqa: E402

DEPTH, LIKE = 5, 1  # a layer of the target that is built as the heads are
TEXT: list[int] = json.loads(make_mtp.PROMPTS.read_text().splitlines()[0])["tokens"][:48]
POSITION = 40  # of the anchor: far enough for the window to matter


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_step.random(tmp_path_factory.mktemp("step") / "target")


@pytest.fixture(scope="module")
def target(source: Path) -> StepTarget:
    return StepTarget(source)


@pytest.fixture(scope="module")
def drafter(source: Path) -> MtpChain:
    published = read_published(source)
    found: MtpChain = reference(published.spec, checkpoint_weights(published))
    return found


@pytest.fixture(scope="module")
def states(target: StepTarget, drafter: MtpChain) -> Any:
    (last,) = captures_of(drafter.spec)
    return target.write(TEXT, 1, [last])[1][last]


class Heads:
    """The heads out of the checkpoint, each a layer of transformers with its joining and its output around it."""

    def __init__(self, folder: Path) -> None:
        self.config = Step3p7TextConfig(**json.loads((folder / "config.json").read_text()))
        self.config._attn_implementation = "eager"
        self.state = renamed({n: t.float() for n, t in load_file(folder / "model.safetensors").items()})
        self.rotary = step.Step3p7RotaryEmbedding(self.config)

    def part(self, head: int, name: str) -> Any:
        return self.state[f"layers.{DEPTH + head}.{name}"]

    def norm(self, x: Any, weight: Any) -> Any:
        norm = step.Step3p7RMSNorm(len(weight), self.config.rms_norm_eps)
        norm.weight.data = weight
        return norm(x)

    def __call__(self, head: int, tokens: list[int], states: Any) -> tuple[Any, Any]:
        """States (S, H) and logits (S, vocab) of one head over a whole text, which begins with the state of nothing."""
        embedded = self.norm(self.state["embed_tokens.weight"][tokens], self.part(head, "enorm.weight"))
        both = torch.cat([embedded, self.norm(states, self.part(head, "hnorm.weight"))], dim=-1)
        layer = step.Step3p7DecoderLayer(self.config, LIKE).eval()
        prefix = f"layers.{DEPTH + head}."
        own = {n.removeprefix(prefix): t for n, t in self.state.items() if n.startswith(prefix)}
        layer.load_state_dict({name: own[name] for name in layer.state_dict()})
        x = (both @ self.part(head, "eh_proj.weight").T)[None]
        back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        mask = torch.where((back >= 0) & (back < self.config.sliding_window), 0.0, -torch.inf)[None, None]
        cos_sin = self.rotary(x, torch.arange(len(tokens))[None], make_mtp_step.SLIDING)
        with torch.no_grad():
            out = layer(x, attention_mask=mask, position_embeddings=cos_sin)[0]
        normed = self.norm(out, self.part(head, "transformer.shared_head.norm.weight"))
        return out, normed @ self.part(head, "transformer.shared_head.output.weight").T


def test_heads_read_the_state_before_the_final_norm(drafter: MtpChain) -> None:
    assert captures_of(drafter.spec) == (DEPTH - 1,)
    assert drafter.spec.draft_length == len(drafter.heads) == 3


def test_drafts_are_those_of_transformers_layers(
    source: Path, target: StepTarget, drafter: MtpChain, states: Any
) -> None:
    """Head i over the target's states, and over each draft beside what the head before it came to."""
    heads, tokens, rows = Heads(source), TEXT[: POSITION + 1], shifted(states[: POSITION + 1])
    context = drafter.until(drafter.read(None, states, TEXT, target.tables), POSITION)
    found = drafter.draft(context, TEXT[POSITION], 3, target.tables)
    for i in range(3):
        state, logits = heads(i, tokens, rows)
        torch.testing.assert_close(found.logits[i], logits[-1], atol=2e-4, rtol=2e-3)
        tokens, rows = [*tokens, int(found.tokens[i])], torch.cat([rows, state[-1:]])


def test_each_part_of_a_head_is_heard(drafter: MtpChain, target: StepTarget, states: Any) -> None:
    """Another window, another chain, a gate or an output head exchanged: each changes the third draft's logits."""
    context = drafter.until(drafter.read(None, states, TEXT, target.tables), POSITION)
    right = drafter.draft(context, TEXT[POSITION], 3, target.tables).logits[2]
    weights = _weights(drafter)
    for role in (Role.ATTN_GATE, Role.NEXTN_OUTPUT, Role.NEXTN_OUTPUT_NORM, Role.ATTN_Q_NORM):
        swapped = {**weights, (role, 7): weights[role, 6]}
        other = reference(drafter.spec, swapped).draft(context, TEXT[POSITION], 3, target.tables).logits[2]
        assert (other - right).abs().max() > 0.01, role


def _weights(drafter: MtpChain) -> dict[Any, Any]:
    state, names = drafter.state_dict(), drafter.parameter_names(drafter.spec)
    return {key: state[name].numpy() for key, name in names.items() if name in state}


def test_reading_in_pieces_is_reading_at_once(drafter: MtpChain, target: StepTarget, states: Any) -> None:
    whole = drafter.read(None, states, TEXT, target.tables)
    pieces = None
    for start, stop in ((0, 1), (1, 30), (30, len(states))):
        pieces = drafter.read(pieces, states[start:stop], TEXT, target.tables)
    assert pieces is not None
    for one, other in zip(whole.heads, pieces.heads, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_chain_continues_from_what_it_is_told_to_follow(drafter: MtpChain, target: StepTarget, states: Any) -> None:
    context = drafter.until(drafter.read(None, states, TEXT, target.tables), POSITION)
    free = drafter.draft(context, TEXT[POSITION], 3, target.tables)
    same = drafter.draft(context, TEXT[POSITION], 3, target.tables, free.tokens.tolist())
    torch.testing.assert_close(free.logits, same.logits)
    other = drafter.draft(context, TEXT[POSITION], 3, target.tables, [7, 8])
    torch.testing.assert_close(free.logits[0], other.logits[0])
    assert not torch.allclose(free.logits[1], other.logits[1], atol=0.1)


def test_a_single_head_goes_on_by_itself(tmp_path: Path, target: StepTarget, states: Any) -> None:
    """Its second draft reads its own state before the norm, over what it keeps of the first."""
    made = make_mtp_step.random(tmp_path / "t", **make_mtp_step.cut(1))
    convert(job(made, tmp_path / "one.gguf"))
    spec, weights = gguf_weights(tmp_path / "one.gguf")
    one: MtpChain = reference(spec, weights)
    context = one.until(one.read(None, states, TEXT, target.tables), POSITION)
    found = one.draft(context, TEXT[POSITION], 2, target.tables)
    heads, tokens, rows = Heads(made), TEXT[: POSITION + 1], shifted(states[: POSITION + 1])
    for i in range(2):
        state, logits = heads(0, tokens, rows)
        torch.testing.assert_close(found.logits[i], logits[-1], atol=2e-4, rtol=2e-3)
        tokens, rows = [*tokens, int(found.tokens[i])], torch.cat([rows, state[-1:]])
    assert np.isfinite(found.logits.numpy()).all()


# --- MiMo-V2: sinks, values narrower than keys and weighed, one matrix of three ---


class MimoHeads:
    """The heads out of the checkpoint, each a layer of transformers with its joining and its output around it."""

    def __init__(self, folder: Path) -> None:
        said = json.loads((folder / "config.json").read_text())
        self.config = MiMoV2FlashConfig(**said, mlp_layer_types=["dense"] * said["num_hidden_layers"])
        self.config._attn_implementation = "eager"
        self.state = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
        self.rotary = mimo.MiMoV2FlashRotaryEmbedding(self.config)

    def norm(self, x: Any, weight: Any) -> Any:
        norm = mimo.MiMoV2FlashRMSNorm(len(weight), 1e-5)
        norm.weight.data = weight
        return norm(x)

    def __call__(self, head: int, tokens: list[int], states: Any) -> tuple[Any, Any]:
        prefix = f"model.mtp.layers.{head}."
        own = {n.removeprefix(prefix): t for n, t in self.state.items() if n.startswith(prefix)}
        embedded = self.norm(self.state["model.embed_tokens.weight"][tokens], own["enorm.weight"])
        x = torch.cat([embedded, self.norm(states, own["hnorm.weight"])], dim=-1) @ own["eh_proj.weight"].T
        layer = mimo.MiMoV2FlashDecoderLayer(self.config, LIKE).eval()
        renames = {"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"}
        renames["self_attn.sinks"] = "self_attn.attention_sink_bias"
        layer.load_state_dict({name: own[renames.get(name, name)] for name in layer.state_dict()})
        back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
        mask = torch.where((back >= 0) & (back < self.config.sliding_window), 0.0, -torch.inf)[None, None]
        cos_sin = self.rotary(x[None], torch.arange(len(tokens))[None], "sliding_attention")
        with torch.no_grad():
            out = layer(x[None], attention_mask=mask, position_embeddings=cos_sin)
        out = (out if isinstance(out, torch.Tensor) else out[0]).reshape(len(tokens), -1)
        return out, self.norm(out, own["final_layernorm.weight"]) @ self.state["lm_head.weight"].T


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_mimo.flash(tmp_path_factory.mktemp("mimo") / "target")


def test_mimo_s_drafts_are_those_of_transformers_layers(flash: Path) -> None:
    published = read_published(flash)
    drafter: MtpChain = reference(published.spec, checkpoint_weights(published))
    target = TorchTarget(flash)
    (last,) = captures_of(drafter.spec)
    states = target.write(TEXT, 1, [last])[1][last]
    heads, tokens, rows = MimoHeads(flash), TEXT[: POSITION + 1], shifted(states[: POSITION + 1])
    context = drafter.until(drafter.read(None, states, TEXT, target.tables), POSITION)
    found = drafter.draft(context, TEXT[POSITION], 3, target.tables)
    for i in range(3):
        state, logits = heads(i, tokens, rows)
        torch.testing.assert_close(found.logits[i], logits[-1], atol=2e-4, rtol=2e-3)
        tokens, rows = [*tokens, int(found.tokens[i])], torch.cat([rows, state[-1:]])


@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        pytest.param(None, Outcome.PASS, id="as converted"),
        pytest.param("norm.weight", Outcome.FAIL, id="norms and one more"),
        pytest.param("attn_sinks", Outcome.FAIL, id="sinks lost"),
    ],
)
def test_mimo_is_verified_in_torch(flash: Path, tmp_path: Path, spoil: str | None, outcome: Outcome) -> None:
    """Its target is one that transformers has: a good file passes, a spoilt one drafts otherwise, the text stays."""
    good, out = tmp_path / "good.gguf", tmp_path / "heads.gguf"
    convert(job(flash, good))
    file = read_gguf(good)

    def data(tensor: Any) -> Any:
        values = file.tensor_bytes(tensor.name).view("<f4")
        return [values + np.float32(1 if tensor.name.endswith("norm.weight") else -99)] if hit(tensor) else [values]

    def hit(tensor: Any) -> bool:
        return spoil is not None and spoil in tensor.name

    write_gguf(out, list(file.keys.values()), list(file.tensors.values()), data)
    asked = {"prompts": make_mtp.PROMPTS, "max_prompts": 1, "new_tokens": 12, "contexts": (64,)}
    verdict = verify(VerifyJob(out, (flash,), source=flash, **asked))
    outcomes = {gate.name: gate.outcome for gate in verdict.gates}
    assert (outcomes["lossless"], outcomes["same drafts"]) == (Outcome.PASS, outcome)
