"""Every drafter kind in llama-server: its tiny checkpoint converts, loads, and drafts as the torch reference does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from make_checkpoints import CHECKPOINTS, make
from planted_faults import Draft
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, VerifyJob, convert, verify
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.verdict import Outcome

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_drafter.converters.verify.acceptance import total  # noqa: E402
from convert_drafter.converters.verify.in_llama_cpp.answers import run_prompts  # noqa: E402
from convert_drafter.converters.verify.in_llama_cpp.probe import find_server  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, gguf_weights, reference  # noqa: E402
from convert_drafter.converters.verify.loop import speculative_loop  # noqa: E402

COUNT = 64
PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()][:8]
# Tokens per verify step: drafts that nobody accepts would say nothing.
LEAST = {"dspark from the anchor": 1.0}
USUALLY = 1.5


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(PAIR / "target", tmp_path_factory.mktemp("target") / "target.gguf")


@pytest.fixture(scope="module")
def target() -> TorchTarget:
    target = TorchTarget(PAIR / "target")
    target.end_tokens = frozenset()
    return target


@pytest.fixture(scope="module", params=CHECKPOINTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(kind, tmp_path_factory.mktemp(kind) / "drafter")


@pytest.fixture(scope="module")
def file(source: Path, gguf: Path) -> Path:
    out = source.parent / "drafter.gguf"
    convert(ConvertJob(source, gguf, "llama.cpp", "F32", out))
    return out


def test_the_file_is_the_checkpoint(kind: str, source: Path, file: Path, gguf: Path) -> None:
    structure, pairing = doctor(file, gguf, source)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())
    assert pairing.outcome is Outcome.PASS
    published = read_published(source, gguf)
    spec, weights = gguf_weights(file)
    rope = replace(published.spec.rope, llama3=None)  # a file has what it comes to for each pair
    assert spec == replace(published.spec, rope=rope) and spec.kind == kind.split()[0]
    expected = checkpoint_weights(published)
    assert weights.keys() == expected.keys()
    assert all((weights[key] == array).all() for key, array in expected.items())


def test_it_drafts_in_llama_server_as_in_torch(kind: str, file: Path, gguf: Path, target: TorchTarget) -> None:
    """From the same place in a text as many drafts are right, but for a rounding tie here and there."""
    drafter = reference(*gguf_weights(file))
    length = drafter.spec.draft_length
    ours = [speculative_loop(target, TorchDrafter(drafter, target), prompt, COUNT, length) for prompt in PROMPTS]
    how = CELLS[drafter.spec.kind, "llama.cpp"].draft_type
    run = run_prompts(find_server(None), gguf, PROMPTS, COUNT, file, length, threads=1, draft_type=how)
    shared = same = 0
    for text, answer in zip(ours, run.answers, strict=True):
        assert answer.tokens == text.tokens
        assert answer.steps is not None
        here = by_place((step.matched, len(step.tokens)) for step in text.steps)
        there = by_place((step.accepted, step.committed) for step in answer.steps)
        places = sorted(here.keys() & there.keys())[:-1]  # the last drafts are behind the text's end
        shared += len(places)
        same += sum(here[place] == there[place] for place in places)
    assert shared > 0.9 * sum(len(text.steps) - 1 for text in ours)
    assert same >= 0.99 * shared
    assert total(text.acceptance for text in ours).length > LEAST.get(kind, USUALLY)


def by_place(steps: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Of steps (right drafts, committed tokens): how many drafts are right, by the place in the text they start at."""
    found, place = {}, 0
    for right, committed in steps:
        found[place] = right
        place += committed
    return found


@pytest.mark.parametrize("name", ["dflash2", "dspark of speculators"])
def test_verify_passes_a_right_file_and_fails_a_wrong_fact(name: str, tmp_path: Path) -> None:
    """In torch, by what it drafts: the same tensors, and one fact of its kind another."""
    source, file, wrong = make(name, tmp_path / "drafter"), tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    convert(ConvertJob(source, PAIR / "target", "llama.cpp", "Q8_0", file))
    edited = Draft.of(file)
    edited.set(*(("selector_top_k", 2) if name == "dflash2" else ("sample_from_anchor", True)))
    edited.write(wrong)
    outcomes = {}
    for path in (file, wrong):
        job = VerifyJob(
            path,
            (PAIR / "target",),
            source,
            prompts=PAIR / "prompts.jsonl",
            max_prompts=4,
            new_tokens=32,
            contexts=(64,),
        )
        outcomes[path] = {gate.name: gate.outcome for gate in verify(job).gates}
    assert Outcome.FAIL not in outcomes[file].values(), outcomes[file]
    assert outcomes[file]["same drafts"] is outcomes[file]["lossless"] is Outcome.PASS
    assert outcomes[wrong]["same drafts"] is Outcome.FAIL
    assert outcomes[wrong]["lossless"] is Outcome.PASS
