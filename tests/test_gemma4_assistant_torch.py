"""Gemma-4 assistants in torch: the reference against transformers' own, and what a target has to hand out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_gemma4_assistant
import pytest

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.errors import Problems, WrongInput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.5")

from transformers import Gemma4TextConfig  # noqa: E402
from transformers.models.gemma4_assistant import Gemma4AssistantForCausalLM  # noqa: E402

from convert_drafter.converters.verify.diagnosis.explanations import explanations  # noqa: E402
from convert_drafter.converters.verify.diagnosis.view import Hints, View  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.gemma4_assistant import Context  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import (  # noqa: E402
    FINAL,
    FULL,
    SLIDING,
    captures_of,
    last_owner,
)
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    gguf_weights,
    reference,
)
from convert_drafter.converters.verify.loop import greedy, speculative_loop  # noqa: E402

PROMPTS = [
    json.loads(line)["tokens"]
    for line in (make_gemma4_assistant.PAIR_TARGET.parent / "prompts.jsonl").read_text().splitlines()
]
DRAFTS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    make_gemma4_assistant.target(folder / "target")
    make_gemma4_assistant.assistant(folder / "assistant")
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> TorchTarget:
    target = TorchTarget(folder / "target")
    target.end_tokens = frozenset()
    return target


def assistant(folder: Path, target: Path) -> Any:
    published = read_published(folder, target)
    return reference(published.spec, checkpoint_weights(published))


@pytest.fixture(scope="module")
def drafter(folder: Path) -> Any:
    return assistant(folder / "assistant", folder / "target")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """transformers' own. Its 5.23 refuses a config whose every layer shares, as an assistant's does: put right here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(lambda self: ["reuse"] * self.num_hidden_layers))
        return Gemma4AssistantForCausalLM.from_pretrained(folder / "assistant", dtype=torch.float32).eval()


@torch.no_grad()
def drafted_by_transformers(model: Any, context: Context, anchor: int, count: int, table: Any) -> tuple[Any, Any]:
    """Its candidate generator's loop: tokens (count,) and logits (count, vocab)."""
    shared = {
        "sliding_attention": tuple(part[None] for part in context.sliding),
        "full_attention": tuple(part[None] for part in context.full),
    }
    state, token, tokens, rows = context.states[-1:], anchor, [], []
    for _ in range(count):
        embedded = table[[token]] * table.shape[1] ** 0.5
        out = model(
            inputs_embeds=torch.cat([embedded, state], dim=-1)[None],
            position_ids=torch.tensor([[len(context.states)]]),
            shared_kv_states=shared,
        )
        state, token = out.last_hidden_state[0], int(out.logits[0, 0].argmax())
        tokens.append(token)
        rows.append(out.logits[0, 0])
    return torch.tensor(tokens), torch.stack(rows)


def read(drafter: Any, target: TorchTarget, text: list[int]) -> Context:
    captures = captures_of(drafter.spec)
    states = target.write(text, 1, captures)[1]
    context: Context = drafter.read(None, torch.cat([states[k] for k in captures], dim=-1), text, target.tables)
    return context


@pytest.mark.parametrize("length", [3, 20, 40])
def test_drafts_are_transformers_own(length: int, drafter: Any, theirs: Any, target: TorchTarget) -> None:
    """Within the window: beyond it transformers looks at two keys more."""
    for prompt in PROMPTS[:4]:
        context = read(drafter, target, prompt[:length])
        ours = drafter.draft(context, prompt[length], DRAFTS, target.tables)
        tokens, logits = drafted_by_transformers(theirs, context, prompt[length], DRAFTS, target.embedding)
        assert ours.tokens.tolist() == tokens.tolist()
        torch.testing.assert_close(ours.logits, logits, rtol=1e-3, atol=1e-4)


def test_a_sliding_layer_looks_as_far_as_the_target_s(drafter: Any, theirs: Any, target: TorchTarget) -> None:
    """Fewer than 48 positions back, the anchor's included: with those keys alone transformers drafts the same."""
    prompt = PROMPTS[0]
    length = 60
    context = read(drafter, target, prompt[:length])
    near = context._replace(sliding=tuple(part[:, length - 47 :] for part in context.sliding))
    ours = drafter.draft(context, prompt[length], DRAFTS, target.tables)
    _, logits = drafted_by_transformers(theirs, near, prompt[length], DRAFTS, target.embedding)
    torch.testing.assert_close(ours.logits, logits, rtol=1e-3, atol=1e-4)
    _, further = drafted_by_transformers(theirs, context, prompt[length], DRAFTS, target.embedding)
    assert (ours.logits - further).abs().max() > 1e-3


def test_keys_and_values_are_those_of_the_last_layers_with_some(target: TorchTarget) -> None:
    """Eight layers, of which the last two look at layers 4 and 5: transformers hands out the same to its assistant."""
    prompt = PROMPTS[0][:60]
    assert [last_owner(target.model.config, f"{kind}_attention") for kind in ("sliding", "full")] == [4, 5]
    states = target.write(prompt, 1, [SLIDING, FULL])[1]
    with torch.no_grad():
        asked = {"logits_to_keep": torch.arange(len(prompt)), "return_shared_kv_states": True}
        shared = target.model(torch.tensor([prompt]), **asked).shared_kv_states
    for layer, kind in ((SLIDING, "sliding_attention"), (FULL, "full_attention")):
        both = torch.cat([part[0].transpose(0, 1).flatten(1) for part in shared[kind]], dim=-1)
        torch.testing.assert_close(states[layer], both, rtol=1e-4, atol=1e-5)


def test_final_states_are_those_of_every_position(target: TorchTarget) -> None:
    """Where layers share a cache transformers would compute them for the asked rows alone."""
    prompt = PROMPTS[0][:30]
    states = target.write(prompt, 1, [FINAL, 7])[1]
    with torch.no_grad():
        whole = target.model.model(torch.tensor([prompt]), logits_to_keep=torch.arange(30)).last_hidden_state[0]
    assert states[7].shape == states[FINAL].shape == (30, 96)
    torch.testing.assert_close(states[FINAL], whole, rtol=1e-4, atol=1e-5)


def test_a_target_without_such_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    other = TorchTarget(make_gemma4_assistant.PAIR_TARGET)
    with pytest.raises(WrongInput, match="qwen3: found no layer of sliding_attention"):
        other.write(PROMPTS[0][:8], 1, [SLIDING])


def test_a_context_grown_in_pieces_is_the_whole(drafter: Any, target: TorchTarget) -> None:
    prompt, captures = PROMPTS[1][:70], captures_of(drafter.spec)
    whole = read(drafter, target, prompt)
    states = target.write(prompt, 1, captures)[1]
    context = None
    for start, stop in ((0, 1), (1, 33), (33, 70)):
        piece = torch.cat([states[k][start:stop] for k in captures], dim=-1)
        context = drafter.read(context, piece, prompt, target.tables)
    for one, other in ((context, whole), (drafter.until(context, 33), read(drafter, target, prompt[:33]))):
        for a, b in zip(
            (one.states, *one.sliding, *one.full), (other.states, *other.sliding, *other.full), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_keys_of_other_heads_are_refused(drafter: Any, target: TorchTarget) -> None:
    """96 of a state, and twice 2 * 32 and 1 * 64 of keys and values."""
    with pytest.raises(
        WrongInput, match=r"found 224 columns .*, expected 352: its heads are of another width or number"
    ):
        drafter.read(None, torch.zeros(3, 224), [1, 2, 3], target.tables)


def test_drafts_follow_what_they_are_told(drafter: Any, target: TorchTarget) -> None:
    context = read(drafter, target, PROMPTS[2][:50])
    free = drafter.draft(context, 7, DRAFTS, target.tables)
    again = drafter.draft(context, 7, DRAFTS, target.tables, free.tokens.tolist())
    other = drafter.draft(context, 7, DRAFTS, target.tables, [5])
    torch.testing.assert_close(free.logits, again.logits)
    torch.testing.assert_close(free.logits[0], other.logits[0])
    assert (free.logits[1] - other.logits[1]).abs().max() > 1e-3


def test_the_loop_writes_the_target_s_own_text(drafter: Any, target: TorchTarget) -> None:
    """T-43, with rejected drafts in nearly every step: what a sliding layer holds is cut as well."""
    for prompt in PROMPTS[:2]:
        plain = greedy(target, prompt, 40)
        assert speculative_loop(target, TorchDrafter(drafter, target), prompt, 40, 3).tokens == plain.tokens


def test_the_file_is_the_checkpoint(folder: Path, drafter: Any, target: TorchTarget, tmp_path: Path) -> None:
    out = tmp_path / "assistant.gguf"
    convert(ConvertJob(folder / "assistant", folder / "target", "llama.cpp", "F32", out))
    other = reference(*gguf_weights(out))
    context = read(drafter, target, PROMPTS[3][:60])
    ours, theirs = (d.draft(context, 9, DRAFTS, target.tables) for d in (drafter, other))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)


def test_an_assistant_of_another_width_does_not_fit(target: TorchTarget, tmp_path: Path) -> None:
    wide = make_gemma4_assistant.target(tmp_path / "target", hidden_size=128)
    other = assistant(make_gemma4_assistant.assistant(tmp_path / "assistant", backbone=128), wide)
    with pytest.raises(Problems, match="target_hidden_size: found 128, expected the target's 96"):
        TorchDrafter(other, target)


def test_what_may_be_wrong_is_tried_on_an_assistant_too(folder: Path) -> None:
    """Layers have heads of two widths: what is made of it has to fit each of them."""
    published = read_published(folder / "assistant", folder / "target")
    spec, weights = published.spec, checkpoint_weights(published)
    assert spec.sliding is not None and spec.window is not None
    original = View(spec, weights, captures_of(spec))
    spoilt = replace(spec, sliding=replace(spec.sliding, theta=1e6), window=replace(spec.window, size=8))
    found = list(explanations(replace(original, spec=spoilt), Hints(original=original)))
    for explanation in found:
        reference(explanation.view.spec, explanation.view.weights)  # every shape is the reference's
    names = {explanation.name for explanation in found}
    assert "sliding.theta: 1000000 -> 10000, as the source has it" in names
    assert "window.size: 8 -> 48, as the source has it" in names
    assert any(name.startswith("sliding.theta and window.size: ") for name in names)
    assert {"NEXTN_PRE_PROJ: embedding and state exchanged", "RoPE rows of q and k: pairs -> halves"} <= names
    assert not any(name.startswith(("layers:", "rope.dimensions", "window.layers")) for name in names)
