"""The torch engine: any target that transformers has, caches that shrink, and the trained pair drafting as measured."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_server import llama_server
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.errors import DrafterError, MissingEngine, Problems, WrongInput, WrongUsage
from convert_drafter.converters.roles import Role
from convert_drafter.converters.verify.loop import Decoded, Request, greedy, serve, speculative_loop

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafting import Drafting, variant  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.dflash import DFlash  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import CHUNK, quiet, uncuttable  # noqa: E402
from convert_drafter.converters.verify.in_torch.texts import Text  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, gguf_weights, reference  # noqa: E402
from convert_drafter.converters.verify.prompts import Encoded  # noqa: E402

VOCAB, WINDOW, NEW = 200, 16, 200
PROMPT = [random.Random(3).randrange(VOCAB) for _ in range(40)]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # wide enough that a text varies and two logits are seldom equal
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SLIDING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 16,
}
# name -> (config class, model class, what the config has beside SHAPE)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"num_hidden_layers": 3}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {"num_hidden_layers": 4, **LINEAR}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SLIDING),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
}
HYBRID = {"qwen3_5", "lfm2"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch")


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, folder: Path) -> Iterator[TorchTarget]:
    """A random model of each family, seldom repeating itself."""
    yield TorchTarget(write_tiny(request.param, folder / request.param))


def write_tiny(name: str, out: Path) -> Path:
    config_class, model_class, more = MODELS[name]
    torch.manual_seed(1)
    with quiet():
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**SHAPE, **more))
        if name == "gemma3":  # its scaled embeddings would drown out what the layers say
            model.get_input_embeddings().weight.data /= 20
        model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def own(tiny: TorchTarget) -> list[int]:
    """What it writes after PROMPT, by transformers' own loop and cache."""
    text = own_text(tiny, PROMPT, NEW)
    assert len(set(text)) > 20
    return text


class Scripted:
    """Knows the text and gets `right(step, count)` of its drafts right; `wrong` says what it drafts instead."""

    def __init__(
        self,
        text: Sequence[int],
        right: Callable[[int, int], int],
        wrong: Callable[[int], Any] = lambda t: (t + 1) % VOCAB,
    ) -> None:
        self.text, self.right, self.wrong, self.length, self.step = list(text), right, wrong, 0, 0

    def prefill(self, tokens: Sequence[int]) -> None:
        self.length = len(tokens)

    def draft(self, anchor: int, count: int) -> list[int]:
        assert anchor == self.text[self.length]
        known = self.text[self.length + 1 : self.length + 1 + count]
        right, self.step = self.right(self.step, count), self.step + 1
        return [*known[:right], *map(self.wrong, known[right:])]

    def advance(self, matched: int) -> None:
        self.length += matched + 1

    def rollback(self) -> None:
        self.length += 1


RANDOM = random.Random(5)
PATTERNS: dict[str, tuple[Callable[[int, int], int], Callable[[int], Any]]] = {
    "perfect": (lambda step, count: count, lambda token: token),
    "always wrong": (lambda step, count: 0, lambda token: (token + 1) % VOCAB),
    "random": (lambda step, count: RANDOM.randrange(count + 1), lambda token: RANDOM.randrange(VOCAB)),
    "one more right each step": (lambda step, count: step % (count + 1), lambda token: (token + 1) % VOCAB),
    "hostile": (lambda step, count: step % 2, lambda token: [-1, VOCAB, float("nan"), 2**40][token % 4]),
}


# --- any target ---


def own_text(target: TorchTarget, prompt: Sequence[int], count: int) -> list[int]:
    """transformers' own greedy text, by its own loop and cache."""
    ids = torch.tensor([list(prompt)])
    with quiet():
        mask = torch.ones_like(ids)  # else the pad token would be hidden where the prompt has it
        out = target.model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    text: list[int] = out[0, len(prompt) :].tolist()
    return text


def test_what_a_target_tells(tiny: TorchTarget) -> None:
    assert tiny.architecture.endswith("ForCausalLM") and tiny.layer_count == len(tiny.layers)
    assert tiny.embedding.shape == tiny.head.shape == (VOCAB, 64) == (tiny.vocab_size, tiny.hidden_size)
    assert tiny.theta in (1e4, 1e6) and tiny.context_length == 2048 and tiny.end_tokens == frozenset()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_speculative_is_greedy(tiny: TorchTarget, own: list[int], pattern: str) -> None:
    """T-43, A4-4: 200 tokens, whatever is accepted, on layers of every kind."""
    drafter = Scripted([*PROMPT, *own, 0], *PATTERNS[pattern])
    assert list(speculative_loop(tiny, drafter, PROMPT, NEW, 5).tokens) == own


def test_plain_decoding_and_writing(tiny: TorchTarget, own: list[int]) -> None:
    assert list(greedy(tiny, PROMPT, NEW).tokens) == own
    assert tiny.write(PROMPT, NEW)[0] == own
    assert tiny.write(PROMPT, 1)[0] == own[:1] and tiny.write(PROMPT, 0)[0] == []


def test_a_long_prompt_is_read_in_pieces(tiny: TorchTarget) -> None:
    prompt = [random.Random(i).randrange(VOCAB) for i in range(2 * CHUNK + 77)]
    tokens, states = tiny.write(prompt, 10, [0])
    assert tokens == own_text(tiny, prompt, 10)
    assert states[0].shape == (len(prompt) + 9, 64)


@pytest.mark.parametrize("kept", range(1, 6))
def test_a_cut_leaves_no_trace(tiny: TorchTarget, kept: int) -> None:
    """T-42, A4-5: the arrays shrink; recurrent states are those of the kept tokens."""
    tiny.capture([0])
    tiny.prefill(PROMPT)
    tiny.verify([5, 6, 7, 8, 9])
    tiny.keep(kept)
    fresh = tiny.session()
    fresh.prefill([*PROMPT, *[5, 6, 7, 8, 9][:kept]])
    for layer, same in zip(tiny._text.cache.layers, fresh._text.cache.layers, strict=True):
        if type(layer).__name__ == "DynamicLayer":
            assert layer.keys.shape[-2] == layer.values.shape[-2] == len(PROMPT) + kept
            torch.testing.assert_close(layer.keys, same.keys, atol=1e-4, rtol=1e-3)
        else:
            for a, b in zip(tensors(vars(layer)), tensors(vars(same)), strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert tiny.captured(0, len(PROMPT) + kept)[0].shape == (len(PROMPT) + kept, 64)
    assert tiny.verify([3]) == fresh.verify([3])


def tensors(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [tensor for part in value.values() for tensor in tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_only_hybrids_have_layers_that_cannot_be_cut(tiny: TorchTarget) -> None:
    """Else the snapshots above would test nothing, or a sliding layer would cost a second forward."""
    tiny.prefill(PROMPT)
    kinds = {type(layer).__name__ for layer in tiny._text.cache.layers}
    assert bool(uncuttable(tiny._text.cache)) == ("LinearAttentionLayer" in kinds)
    assert ("LinearAttentionLayer" in kinds) == any(name in tiny.name for name in HYBRID)


def test_states_are_those_after_each_layer(tiny: TorchTarget) -> None:
    """Capture layer k is `hidden_states[k + 1]`; the last one is taken before the final norm."""
    every = range(-1, tiny.layer_count)
    tokens, states = tiny.write(PROMPT, 30, every)
    text = torch.tensor([[*PROMPT, *tokens[:-1]]])
    with quiet(), torch.inference_mode():
        out = tiny.model(text, output_hidden_states=True).hidden_states
    assert sorted(states) == list(every)
    for layer in range(-1, tiny.layer_count - 1):
        # A recurrent layer sums a chunk in another order than token by token; how far apart depends on the processor.
        torch.testing.assert_close(states[layer], out[layer + 1][0], atol=3e-2, rtol=1e-3)
    assert not torch.allclose(states[tiny.layer_count - 1], out[-1][0], atol=1e-2, rtol=1e-2)


def test_states_of_a_verified_text(tiny: TorchTarget) -> None:
    """After rejections and cuts they are those that a text written in one go has."""
    tokens, states = tiny.write(PROMPT, 60, [-1, 1])
    drafter = Scripted([*PROMPT, *tokens, 0], *PATTERNS["one more right each step"])
    tiny.capture([-1, 1])
    speculative_loop(tiny, drafter, PROMPT, 60, 5)
    found = tiny.captured(10, 95)
    for layer in (-1, 1):
        torch.testing.assert_close(found[layer], states[layer][10:95], atol=1e-2, rtol=1e-3)


def test_captures_add_up(folder: Path) -> None:
    """Two drafters may read one target."""
    target = TorchTarget(write_tiny("qwen3", folder / "captures"))
    target.capture([2, 0])
    target.capture([-1])
    target.prefill(PROMPT)
    assert sorted(target.captured(0, 3)) == [-1, 0, 2]


def test_margin(tiny: TorchTarget) -> None:
    with quiet(), torch.inference_mode():
        best, second = tiny.model(torch.tensor([PROMPT])).logits[0, -1].topk(2).values.tolist()
    assert tiny.margin(PROMPT) == pytest.approx(best - second, rel=1e-3)


def test_several_texts_at_once(tiny: TorchTarget) -> None:
    """A4-1, A4-3 with real caches: sessions share weights and nothing else."""
    prompts = [PROMPT, PROMPT[:7], PROMPT[20:]]
    texts = [own_text(tiny, prompt, 30) for prompt in prompts]
    requests = [
        Request(tiny.session(), p, 30, Scripted([*p, *t, 0], *PATTERNS["one more right each step"]), 3 * i)
        for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
    ]
    found = serve(requests, 4)
    assert [list(text.tokens) for text in found] == texts
    assert [any(step.speculative for step in text.steps) for text in found] == [True, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(folder: Path, dtype: str) -> None:
    target = TorchTarget(write_tiny("qwen3", folder / "other"), dtype)
    tokens, states = target.write(PROMPT, 5, [1])
    assert len(tokens) == 5 and states[1].dtype == torch.float32
    assert target.embedding.dtype == getattr(torch, dtype)


def test_end_tokens(folder: Path) -> None:
    """The generation config's, one or several; without any the model config's."""
    path = write_tiny("qwen3", folder / "ends")
    own = TorchTarget(path).write(PROMPT, 20)[0]
    stated = path / "generation_config.json"
    for ends, expected in (([own[9], 7], {own[9], 7}), (own[4], {own[4]})):
        stated.write_text(json.dumps({"eos_token_id": ends}))
        target = TorchTarget(path)
        assert target.end_tokens == expected
        first = next(i for i, token in enumerate(own) if token in expected)
        assert target.write(PROMPT, 20)[0] == own[: first + 1] == list(greedy(target, PROMPT, 20).tokens)
    stated.unlink()
    edit(path, eos_token_id=[1, 2])
    assert TorchTarget(path).end_tokens == {1, 2}


# --- what cannot be read ---


def edit(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def drop(path: Path, name: str) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = {key: array for key, array in load_file(path / "model.safetensors").items() if key != name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[DrafterError], str]] = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), WrongInput, "no file named model.safetensors"),
    "a pickle": (pickled, WrongInput, "no file named model.safetensors"),
    "no config": (lambda p: (p / "config.json").unlink(), WrongInput, "no config.json"),
    "broken config": (lambda p: (p / "config.json").write_text("{"), WrongInput, "not a valid JSON"),
    "unknown type": (lambda p: edit(p, model_type="nosuch"), WrongInput, "nosuch"),
    "wrong value": (lambda p: edit(p, num_hidden_layers="six"), WrongInput, "num_hidden_layers"),
    "cut file": (lambda p: (p / "model.safetensors").write_bytes(b"12345678"), WrongInput, "cannot read this target"),
    "missing tensor": (lambda p: drop(p, "model.layers.1.mlp.up_proj.weight"), Problems, "layers.1.mlp.up_proj.weight"),
    "other shape": (lambda p: edit(p, intermediate_size=64), Problems, "mlp.down_proj.weight: missing, or of another"),
    "more layers": (lambda p: edit(p, num_hidden_layers=9, layer_types=None), Problems, "and [0-9]+ more"),
}


@pytest.mark.parametrize(("damage", "error", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_is_no_target(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[DrafterError], told: str
) -> None:
    """T-35, R7: never random numbers for a weight that is missing, never a pickle."""
    path = tmp_path / "target"
    shutil.copytree(write_tiny("qwen3", folder / "whole"), path)
    damage(path)
    with pytest.raises(error, match=told) as raised:
        TorchTarget(path)
    assert str(path) in str(raised.value) and "Traceback" not in str(raised.value)


def test_wrong_usage(folder: Path) -> None:
    path = write_tiny("qwen3", folder / "usage")
    with pytest.raises(WrongUsage, match="dtype: found 'int8', expected float32, bfloat16, float16"):
        TorchTarget(path, "int8")
    target = TorchTarget(path)
    with pytest.raises(WrongInput, match=r"tokens \[200\]: expected one or more below 200"):
        target.prefill([VOCAB])
    with pytest.raises(WrongInput, match=r"capture layers \[-9, 3\]: expected 0 to 2"):
        target.capture([-9, 0, 3])
    with pytest.raises(ValueError, match="positions: found 0 to 1"):
        target.captured(0, 1)
    target.prefill(PROMPT)
    target.verify([1, 2])
    with pytest.raises(ValueError, match="count: found 3, expected 1 to 2"):
        target.keep(3)


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "its cache is its own"),
        (
            "Phi",
            {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
            "an output head with a bias",
        ),
    ],
)
def test_a_model_that_cannot_be_verified_on(tmp_path: Path, kind: str, more: dict[str, int], told: str) -> None:
    with quiet():
        config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **more)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    with pytest.raises(WrongInput, match=f"{kind}ForCausalLM: .*{told}"):
        TorchTarget(tmp_path)


def test_a_transformers_that_forgets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early releases of transformers 5 start a recurrent layer anew for several tokens on a cache."""
    path = write_tiny("qwen3_5", folder / "forgetful")
    monkeypatch.setattr(transformers.DynamicCache, "get_recurrent_state", lambda *_, **__: None)
    with pytest.raises(MissingEngine, match="continues Qwen3_5ForCausalLM wrongly from its cache"):
        TorchTarget(path)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
@pytest.mark.parametrize("module", ["target", "drafter"])
def test_a_missing_package_is_a_missing_engine(missing: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from convert_drafter.converters.errors import MissingEngine\n"
        f"try: import convert_drafter.converters.verify.in_torch.{module}\n"
        "except MissingEngine as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith(f"{missing}: not installed") and 'pip install "convert-drafter[verify]"' in out


def test_nothing_is_printed(folder: Path) -> None:
    path = write_tiny("qwen3_5", folder / "silent")
    code = (
        "from pathlib import Path\nfrom convert_drafter.converters.verify.in_torch.target import TorchTarget\n"
        f"target = TorchTarget(Path({str(path)!r}))\ntarget.write([1, 2, 3], 3, [0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- the trained pair ---

PROMPTS: list[list[int]] = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()]
MEASURED: dict[str, Any] = json.loads((PAIR / "acceptance.json").read_text())
COUNT: int = MEASURED["new_tokens"]
CAPTURES = (0, 2, 4)


@pytest.fixture(scope="module")
def target() -> TorchTarget:
    target = TorchTarget(PAIR / "target")
    target.end_tokens = frozenset({2044, 2046})  # as fixtures/measure_pair.py ends texts
    return target


@pytest.fixture(scope="module")
def drafter() -> DFlash:
    published = read_published(PAIR / "drafter", PAIR / "target")
    return reference(published.spec, checkpoint_weights(published))


@pytest.fixture(scope="module")
def texts(target: TorchTarget) -> list[tuple[list[int], dict[int, Any]]]:
    return [target.write(prompt, COUNT, CAPTURES) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def decoded(target: TorchTarget, drafter: DFlash) -> list[Decoded]:
    return [speculative_loop(target, TorchDrafter(drafter, target), prompt, COUNT, 7) for prompt in PROMPTS]


def test_the_pair_is_lossless(decoded: list[Decoded], texts: list[tuple[list[int], dict[int, Any]]]) -> None:
    """T-50."""
    assert [list(text.tokens) for text in decoded] == [tokens for tokens, _ in texts]


def test_the_pair_drafts_as_measured(decoded: list[Decoded]) -> None:
    """The loop with both caches takes the verify steps that teacher forcing counted, prompt by prompt."""
    assert [len(text.steps) for text in decoded] == MEASURED["verify_steps"]
    committed = sum(text.acceptance.committed for text in decoded)
    assert committed / sum(MEASURED["verify_steps"]) == pytest.approx(MEASURED["acceptance_length"], abs=1e-3)


def test_the_loop_counts_as_teacher_forcing_does(
    target: TorchTarget, decoded: list[Decoded], texts: list[tuple[list[int], dict[int, Any]]]
) -> None:
    """Position by position, drafts behind the end of a text left out by both."""
    published = read_published(PAIR / "drafter", PAIR / "target")
    drafting = Drafting(variant("original", published.spec, checkpoint_weights(published)), target)
    for prompt, (tokens, states), text in zip(PROMPTS, texts, decoded, strict=True):
        known = Text(Encoded("", tuple(prompt)), (*prompt, *tokens), len(prompt) + COUNT, states)
        assert drafting.walk(known) == text.acceptance


def test_a_drafter_of_another_target(folder: Path, drafter: DFlash) -> None:
    target = TorchTarget(write_tiny("qwen3", folder / "another"))
    with pytest.raises(Problems, match="3 problems") as raised:
        TorchDrafter(drafter, target)
    assert "target_hidden_size: found 256, expected the target's 64" in str(raised.value)
    assert "mask_token_id: found 2047, expected a row of the target's 200" in str(raised.value)


def test_the_same_drafts_from_a_file(target: TorchTarget, drafter: DFlash, tmp_path: Path) -> None:
    out = tmp_path / "dflash.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "F32", out))
    from_file = reference(*gguf_weights(out))
    assert all(torch.equal(a, b) for a, b in zip(drafter.parameters(), from_file.parameters(), strict=True))
    for prompt in PROMPTS[:2]:
        a, b = (drafts_of(target, TorchDrafter(model, target), prompt) for model in (drafter, from_file))
        assert a == b and len(a) > 20


def drafts_of(target: TorchTarget, drafter: TorchDrafter, prompt: list[int], captures: Any = None) -> list[list[int]]:
    """Every block drafted in the loop."""
    blocks, plain = list[list[int]](), drafter.draft

    def draft(anchor: int, count: int) -> list[int]:
        blocks.append(plain(anchor, count))
        return blocks[-1]

    drafter.draft = draft  # type: ignore[method-assign]
    speculative_loop(target, drafter, prompt, COUNT, 7)
    return blocks


def test_drafts_are_those_of_teacher_forcing(
    target: TorchTarget, drafter: DFlash, texts: list[tuple[list[int], dict[int, Any]]]
) -> None:
    """T-39, T-40: a context grown step by step, with rejections, drafts as one that was read from the whole text."""
    prompt, (tokens, states) = PROMPTS[0], texts[0]
    text, position = [*prompt, *tokens], len(prompt)
    features = drafter.fuse(torch.cat([states[k] for k in CAPTURES], dim=-1))
    whole = drafter.inject(features, torch.arange(len(features)))
    for block in drafts_of(target, TorchDrafter(drafter, target), prompt):
        context = [(k[:, :position], v[:, :position]) for k, v in whole]
        assert block == drafter.draft(context, text[position], len(block), target.tables).tokens.tolist()
        right = next((i for i, token in enumerate(block) if token != text[position + 1 + i]), len(block))
        position += right + 1


def test_the_context_is_what_was_committed(target: TorchTarget, drafter: DFlash) -> None:
    """T-38, T-39: after every step, both caches hold the text but for its last token, in array shapes."""
    drafting = TorchDrafter(drafter, target)

    def watch(number: int, text: Decoded) -> None:
        length = len(PROMPTS[1]) + len(text.tokens) - 1
        assert drafting.length == length == target._text.length
        assert {k.shape[-2] for pair in drafting.context for k in pair} == {length}
        assert {layer.keys.shape[-2] for layer in target._text.cache.layers} == {length}

    speculative_loop(target, drafting, PROMPTS[1], 40, 7, watch)


def test_a_block_is_never_longer_than_trained(target: TorchTarget, drafter: DFlash) -> None:
    """A6-8."""
    drafting = TorchDrafter(drafter, target)
    anchor = target.prefill(PROMPTS[0])
    drafting.prefill(PROMPTS[0])
    assert [len(drafting.draft(anchor, count)) for count in (0, 1, 7, 8, 100)] == [0, 1, 7, 7, 7]


@pytest.mark.parametrize("captures", [(-1, 1, 3), (4, 2, 0)])
def test_other_capture_layers_draft_worse(target: TorchTarget, drafter: DFlash, captures: tuple[int, ...]) -> None:
    """T-51: one lower (the embedding among them), reversed; each is lossless all the same."""
    own = target.write(PROMPTS[0], COUNT)[0]
    out = speculative_loop(target, TorchDrafter(drafter, target, captures), PROMPTS[0], COUNT, 7)
    assert list(out.tokens) == own
    assert out.acceptance.length < 0.5 * MEASURED["acceptance_length"]


def test_a_drafter_of_nan_is_lossless(target: TorchTarget) -> None:
    """A1-34."""
    published = read_published(PAIR / "drafter", PAIR / "target")
    weights = checkpoint_weights(published)
    weights[Role.FUSION, None] = np.full_like(weights[Role.FUSION, None], np.nan)
    broken = TorchDrafter(reference(published.spec, weights), target)
    own = target.write(PROMPTS[0], 30)[0]
    assert list(speculative_loop(target, broken, PROMPTS[0], 30, 7).tokens) == own


def test_half_a_target_drafts_about_as_well(drafter: DFlash) -> None:
    """A table in bf16 under a drafter in f32."""
    target = TorchTarget(PAIR / "target", "bfloat16")
    own = target.write(PROMPTS[5], COUNT)[0]
    out = speculative_loop(target, TorchDrafter(drafter, target), PROMPTS[5], COUNT, 7)
    assert len(own) == COUNT
    assert out.acceptance.length == pytest.approx((COUNT - 1) / MEASURED["verify_steps"][5], rel=0.25)


def test_llama_server_takes_the_same_steps(decoded: list[Decoded], tmp_path: Path) -> None:
    """The reference and the real engine, prompt by prompt, up to rounding ties: 602 verify steps and 601."""
    gguf = write_target(PAIR / "target", tmp_path / "target.gguf")
    out = tmp_path / "dflash.gguf"
    convert(ConvertJob(PAIR / "drafter", gguf, "llama.cpp", "F32", out))
    options = ["-md", str(out), "--spec-type", "draft-dflash", "--spec-draft-n-max", "7", "--spec-draft-p-min", "0"]
    options += ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32"]
    steps = []
    with llama_server(gguf, *options, log=tmp_path / "log") as server:
        for prompt in PROMPTS:
            answer = server.complete(prompt, COUNT)
            steps.append(len(answer["tokens"]) - 1 - answer["timings"]["draft_n_accepted"])
    ours = [len(text.steps) for text in decoded]
    assert sum(a != b for a, b in zip(ours, steps, strict=True)) <= 2
    assert sum(steps) == pytest.approx(sum(ours), rel=0.01)
