"""DSpark of Gemma-4 layers in torch: its block is a Gemma 4 of transformers' that looks both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_gemma4_dspark
import pytest
from published import PAIR
from safetensors.numpy import load_file

from convert_drafter.converters.convert import read_published

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.5")

from transformers import Gemma4ForCausalLM  # noqa: E402

from convert_drafter.converters.verify.diagnosis.explanations import explanations  # noqa: E402
from convert_drafter.converters.verify.diagnosis.view import Hints, View  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.drafter import Tables  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    reference,
)
from convert_drafter.converters.verify.loop import greedy, speculative_loop  # noqa: E402

CAP = make_gemma4_dspark.CAP
PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()]
NOBODY_S = Tables(torch.zeros(2048, 64), torch.zeros(2048, 64))  # its embedding and head are its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head loud enough for the cap to bite."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gemma")
    make_gemma4_dspark.target(folder / "target", hidden_size=64)
    make_gemma4_dspark.dspark(folder / "drafter", loud=12.0, final_logit_softcapping=CAP)
    return folder


@pytest.fixture(scope="module")
def original(folder: Path) -> View:
    published = read_published(folder / "drafter", folder / "target")
    return View(published.spec, checkpoint_weights(published), published.spec.capture_layers)


@pytest.fixture(scope="module")
def drafter(original: View) -> Any:
    return reference(original.spec, original.weights)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    """The same tensors as a language model, without the drafter's own parts."""
    config = json.loads((folder / "drafter" / "config.json").read_text())
    tensors = load_file(folder / "drafter" / "model.safetensors")
    names = ("layers.", "norm.", "embed_tokens.")
    layers = {f"model.{name}": array for name, array in tensors.items() if name.startswith(names)}
    rope = {name: config["rope_parameters"][name] for name in ("full_attention", "sliding_attention")}
    config |= {"architectures": ["Gemma4ForCausalLM"], "rope_parameters": rope, "use_bidirectional_attention": None}
    place = make_gemma4_dspark.write(folder / "theirs", config, {**layers, "lm_head.weight": tensors["lm_head.weight"]})
    return Gemma4ForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_block_is_a_gemma_4_that_looks_both_ways(drafter: Any, theirs: Any) -> None:
    """Without a context: embeddings, layers, rope far from the start, and the cap, all as transformers has them."""
    tokens, at = torch.tensor([17, *[2047] * 6]), torch.arange(90, 97)
    nothing = drafter.inject(torch.zeros(0, 64), at[:0])
    visible = torch.ones(7, 7, dtype=torch.bool)
    states = drafter(drafter.embed_tokens.weight[tokens], at, nothing, at[:0], visible)
    everything = {"full_attention": torch.zeros(1, 1, 7, 7)}
    wanted = theirs(tokens[None], position_ids=at[None], attention_mask=everything, use_cache=False).logits[0]
    ours = drafter.logits(states, drafter.lm_head.weight)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.abs().max() > 0.9 * CAP and (ours[1] - ours[2]).abs().max() > 0.1


def read(drafter: Any, target: TorchTarget, text: list[int]) -> Any:
    captures = drafter.spec.capture_layers
    states = target.write(text, 1, captures)[1]
    return drafter.read(None, torch.cat([states[k] for k in captures], dim=-1), text, target.tables)


@torch.no_grad()
def test_context_values_are_the_keys_normed_and_not_turned(drafter: Any) -> None:
    """By hand from the checkpoint's k_proj, in every layer."""
    features, at = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.arange(30, 35)
    for layer, (keys, values) in zip(drafter.layers, drafter.inject(features, at), strict=True):
        raw = features @ layer.self_attn.k_proj.weight.T
        normed = raw / (raw.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(values[0], normed, rtol=1e-4, atol=1e-5)
        scaled = normed * layer.self_attn.k_norm.weight
        turning = [*range(8), *range(32, 40)]  # a quarter of the pairs, which are (k, k + 32)
        standing = [d for d in range(64) if d not in turning]
        torch.testing.assert_close(keys[0][:, standing], scaled[:, standing], rtol=1e-4, atol=1e-5)
        assert (keys[0][:, turning] - scaled[:, turning]).abs().max() > 0.1


def test_the_markov_bias_is_added_to_capped_logits(drafter: Any, original: View) -> None:
    """As the model was trained; llama.cpp adds it to plain ones, which the facts without a cap are."""
    plain = reference(replace(original.spec, logit_softcap=None), original.weights)
    context = drafter.inject(torch.randn(6, 64, generator=torch.Generator().manual_seed(2)), torch.arange(6))
    capped, raw = (d.draft(context, 5, 7, NOBODY_S, [9] * 7).logits for d in (drafter, plain))
    w1, w2 = drafter.markov_head.markov_w1.weight, drafter.markov_head.markov_w2.weight
    bias = w1[[5, *[9] * 6]] @ w2.T
    torch.testing.assert_close(capped - bias, CAP * torch.tanh((raw - bias) / CAP), rtol=1e-4, atol=1e-4)
    assert (capped.argmax(-1) != raw.argmax(-1)).any()


def test_the_loop_writes_the_target_s_own_text(folder: Path, drafter: Any) -> None:
    target = TorchTarget(folder / "target")
    target.end_tokens = frozenset()
    for prompt in PROMPTS[:2]:
        plain = greedy(target, prompt, 30)
        assert speculative_loop(target, TorchDrafter(drafter, target), prompt, 30, 7).tokens == plain.tokens
    context = read(drafter, target, PROMPTS[0][:20])
    assert drafter.draft(context, 5, 3, target.tables).logits.shape == (3, 2048)


def test_what_may_be_wrong_is_tried(original: View) -> None:
    """A fact of its own that the source has otherwise, and what nobody needs a source for."""
    spoilt = replace(original, spec=replace(original.spec, attention_scale=0.125, activation="silu"))
    found = list(explanations(spoilt, Hints(original=original)))
    for explanation in found:
        reference(explanation.view.spec, explanation.view.weights)  # every shape is the reference's
    assert "activation: silu -> gelu_pytorch_tanh, as the source has it" in {each.name for each in found}
    assert "attention_scale: 0.125 -> 1" in {each.name for each in explanations(spoilt, Hints())}
