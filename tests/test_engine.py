"""The real llama-server on the real pair: it loads what we write and accepts the drafter's tokens at the torch rate.

`fixtures/pair/acceptance.json` holds what `fixtures/measure_pair.py` measured in torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from llama_server import llama_server
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.gguf_file import write_gguf
from convert_drafter.converters.gguf_read import read_gguf

pytestmark = pytest.mark.engine

PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()]
TORCH: dict[str, Any] = (
    json.loads((PAIR / "acceptance.json").read_text()) if (PAIR / "acceptance.json").exists() else {}
)
NEW_TOKENS = 128


@dataclass(frozen=True)
class Answers:
    texts: list[list[int]]
    drafted: int
    accepted: int
    steps: list[int]  # verify steps of each prompt

    @property
    def acceptance_length(self) -> float:
        """Tokens committed per verify step; the first token of a text is the target's own."""
        return sum(len(text) - 1 for text in self.texts) / sum(self.steps)


def ask(target: Path, log: Path, *options: str, prompts: list[list[int]] = PROMPTS) -> Answers:
    texts, drafted, accepted, steps = [], 0, 0, []
    with llama_server(target, *options, log=log) as server:
        for prompt in prompts:
            answer = server.complete(prompt, NEW_TOKENS)
            timings = answer["timings"]
            texts.append(answer["tokens"])
            drafted += timings.get("draft_n", 0)
            accepted += timings.get("draft_n_accepted", 0)
            steps.append(len(answer["tokens"]) - 1 - timings.get("draft_n_accepted", 0))
    return Answers(texts, drafted, accepted, steps)


def drafting(drafter: Path) -> list[str]:
    options = ["-md", str(drafter), "--spec-type", "draft-dflash", "--spec-draft-n-max", "7"]
    # spelled out, because a default of either has halved somebody's acceptance (T-58, T-59)
    return [*options, "--spec-draft-p-min", "0", "--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def target(folder: Path) -> Path:
    return write_target(PAIR / "target", folder / "target.gguf")


@pytest.fixture(scope="module")
def alone(target: Path, folder: Path) -> Iterator[Answers]:
    """What the target says without a drafter."""
    yield ask(target, folder / "alone.log")


def drafter(target: Path, folder: Path, recipe: str, **settings: str) -> Path:
    out = folder / f"dflash-{recipe}-{len(settings)}.gguf"
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", recipe, out, settings=settings))
    return out


def test_f32_drafter_is_accepted_at_the_torch_rate(target: Path, folder: Path, alone: Answers) -> None:
    """Text for text the target's own (T-50), in as many verify steps as torch needs up to rounding ties."""
    answers = ask(target, folder / "f32.log", *drafting(drafter(target, folder, "F32")))
    assert answers.texts == alone.texts
    assert answers.acceptance_length == pytest.approx(TORCH["acceptance_length"], rel=0.03)
    assert sum(answers.steps) == pytest.approx(sum(TORCH["verify_steps"]), rel=0.03)


@pytest.mark.parametrize(("recipe", "loss"), [("BF16", 0.03), ("F16", 0.03), ("Q8_0", 0.06)])
def test_other_recipes_draft_as_well(target: Path, folder: Path, alone: Answers, recipe: str, loss: float) -> None:
    answers = ask(target, folder / f"{recipe}.log", *drafting(drafter(target, folder, recipe)))
    assert answers.texts == alone.texts
    assert answers.acceptance_length > TORCH["acceptance_length"] * (1 - loss)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"rope_parameters.rope_theta": "1000000"}, id="A1-7 theta"),
        pytest.param({"dflash_config.mask_token_id": "2044"}, id="T-53 mask"),
        pytest.param({"dflash_config.target_layer_ids": "[4, 2, 0]"}, id="T-51 capture layers reversed"),
        pytest.param({"layer_types": '["full_attention", "full_attention"]'}, id="T-55 window"),
    ],
)
def test_a_wrong_fact_costs_acceptance_and_nothing_else(
    target: Path, folder: Path, alone: Answers, settings: dict[str, str]
) -> None:
    """The fault this project exists for, seen in the real engine: right text, file loads, drafts thrown away."""
    out = folder / "wrong.gguf"
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", "F32", out, settings=settings))
    answers = ask(target, folder / "wrong.log", *drafting(out))
    assert answers.texts == alone.texts
    assert answers.acceptance_length < TORCH["acceptance_length"] - 0.3


def test_capture_layers_off_by_one_cost_acceptance(target: Path, folder: Path, alone: Answers) -> None:
    """T-51: the ids as the config has them, zero-based, under llama.cpp's one-based key."""
    good = read_gguf(drafter(target, folder, "F32"))
    name = "dflash.target_layers"
    assert good.keys[name].value == (1, 3, 5)
    keys = {**good.keys, name: replace(good.keys[name], value=(0, 2, 4))}
    out = folder / "zero-based.gguf"
    write_gguf(out, list(keys.values()), list(good.tensors.values()), lambda tensor: good.slabs(tensor.name))
    answers = ask(target, folder / "zero-based.log", *drafting(out))
    assert answers.texts == alone.texts
    assert answers.acceptance_length < TORCH["acceptance_length"] - 0.3
