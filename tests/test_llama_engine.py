"""The real llama-server through the package's own engine: what it measures, and how it fails on which file."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import llama_binary
from planted_faults import Draft, T, retyped
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.errors import MissingEngine, WrongInput
from convert_drafter.converters.verify.acceptance import total
from convert_drafter.converters.verify.in_llama_cpp import serving as llama_serving
from convert_drafter.converters.verify.in_llama_cpp.answers import EngineRun, compare, complete, run_prompts
from convert_drafter.converters.verify.in_llama_cpp.probe import Engine, Known, find_server, libraries
from convert_drafter.converters.verify.in_llama_cpp.process import EngineFailure
from convert_drafter.converters.verify.in_llama_cpp.serving import Server, Setup, serving
from convert_drafter.converters.verify.in_llama_cpp.tokens import ServerTokenizer, logit_gap

pytestmark = pytest.mark.engine

LINES = [json.loads(line) for line in (PAIR / "prompts.jsonl").read_text().splitlines()]
PROMPTS = [line["tokens"] for line in LINES]
TORCH: dict[str, Any] = json.loads((PAIR / "acceptance.json").read_text())
NEW_TOKENS, DRAFT_LENGTH = 128, 7
THREADS = 1  # two servers of two threads each spin against each other on two cores
FEW = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return find_server(llama_binary("llama-server"))


@pytest.fixture(scope="module")
def target(folder: Path) -> Path:
    return write_target(PAIR / "target", folder / "target.gguf")


@pytest.fixture(scope="module")
def drafter(target: Path, folder: Path) -> Callable[[str], Path]:
    def converted(recipe: str) -> Path:
        out = folder / f"drafter-{recipe}.gguf"
        if not out.exists():
            convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", recipe, out))
        return out

    return converted


@pytest.fixture(scope="module")
def alone(engine: Engine, target: Path) -> EngineRun:
    return run_prompts(engine, target, PROMPTS, NEW_TOKENS, threads=THREADS)


@pytest.fixture(scope="module")
def server(engine: Engine, target: Path) -> Iterator[Server]:
    """The target alone."""
    with serving(engine, Setup(target, 512, threads=THREADS)) as running:
        yield running


def test_todays_help_is_understood(engine: Engine) -> None:
    """A3-7, A3-8: the new flavour, whose old spelling is only there to say that it is gone."""
    found = engine.abilities
    assert found.flag("draft length") == "--spec-draft-n-max" and "--draft-max" not in found.flags
    assert all(found.has(purpose).known is Known.YES for purpose in ("p_min", "draft key cache", "draft value cache"))
    assert found.drafts("draft-dflash").known is Known.YES
    assert found.drafts("draft-of-tomorrow").known is Known.NO
    assert engine.version != "unknown" and found.can_trace


@pytest.mark.skipif(shutil.which("ldd") is None, reason="nobody says what a program loads")
def test_its_libraries_are_those_that_it_loads(engine: Engine) -> None:
    """ldd names what it is linked with; those of its own folder are all hashed into a stamp."""
    listed = subprocess.run(["ldd", engine.path], capture_output=True, text=True, check=True).stdout
    loaded = {Path(path).resolve() for path in re.findall(r"=> (\S+)", listed)}
    own = {path for path in loaded if path.parent == engine.path.resolve().parent}
    assert len(own) > 3 and own <= set(libraries(engine.path))


@pytest.mark.parametrize(("recipe", "slack"), [("F32", 0.01), ("BF16", 0.01), ("Q8_0", 0.03)])
def test_a_run_is_lossless_and_counts_as_torch_does(
    engine: Engine, target: Path, drafter: Callable[[str], Path], alone: EngineRun, recipe: str, slack: float
) -> None:
    """T-50, T-69: text for text the target's own; torch's verify steps, and its acceptance by draft position."""
    run = run_prompts(engine, target, PROMPTS, NEW_TOKENS, drafter(recipe), DRAFT_LENGTH, THREADS)
    found = compare(run, alone)
    assert (found.same, found.prompts) == (16, 16) and found.speedup is not None
    walk = total(answer.acceptance for answer in run.answers)
    assert walk.steps == pytest.approx(sum(TORCH["verify_steps"]), rel=slack)
    assert walk.steps == sum(answer.verify_steps for answer in run.answers)
    assert walk.committed == sum(len(answer.tokens) - 1 for answer in run.answers) == walk.steps + sum(walk.accepted)
    assert sum(walk.drafted) == sum(answer.drafted for answer in run.answers)
    assert walk.by_position == pytest.approx(TORCH["by_position"], abs=0.03)
    assert run.settings["cached_tokens"] == 0
    assert run.draft_ms is not None and run.step_ms is not None and 0 < run.draft_ms < run.step_ms


def test_a_draft_longer_than_the_block_is_cut_and_said(
    engine: Engine, target: Path, drafter: Callable[[str], Path]
) -> None:
    run = run_prompts(engine, target, PROMPTS[:1], 24, drafter("F32"), 20, THREADS)
    assert len(run.answers[0].acceptance.drafted) == 7
    assert any("exceeds the trained block size 8" in line for line in run.settings["warnings"])


def test_the_text_in_pieces_is_the_text_in_one(server: Server, alone: EngineRun) -> None:
    answer = complete(server, PROMPTS[0], 32, "a prompt")
    body = {"prompt": PROMPTS[0], "n_predict": 32, "temperature": 0, "top_k": 1, "return_tokens": True}
    assert tuple(server.complete(body, "a prompt")["tokens"]) == answer.tokens == alone.answers[0].tokens[:32]


def test_the_servers_tokenizer_is_the_targets(server: Server) -> None:
    tokenizer = ServerTokenizer(server)
    assert tokenizer.encode(LINES[0]["text"]) == PROMPTS[0]
    assert tokenizer.has_chat_template()
    tokens = tokenizer.encode_chat(({"role": "user", "content": "def f():"},), {})
    assert tokens[0] == 2045 and tokens[-1] == tokenizer.encode("<|im_start|>assistant\n")[-1]


def test_two_logits_are_apart(server: Server) -> None:
    assert 0 < logit_gap(server, PROMPTS[0]) < 30


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        pytest.param([2**20], "the prompt: llama-server refuses it: Prompt contains invalid tokens", id="no token"),
        pytest.param([300] * 600, "refuses it: .*exceeds the available context size", id="too long"),
    ],
)
def test_what_the_server_refuses_is_the_prompts_fault(server: Server, tokens: list[int], says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        complete(server, tokens, 4, "the prompt")


def test_a_port_that_somebody_has(engine: Engine, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        free = llama_serving._free_port
        ports = iter([somebody.getsockname()[1]])
        monkeypatch.setattr(llama_serving, "_free_port", lambda: next(ports, 0) or free())
        with serving(engine, Setup(target, 256)) as running:
            assert running.where.port != somebody.getsockname()[1]


def test_an_option_nobody_knows_is_the_engines_fault(
    engine: Engine, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_serving, "options", lambda *ignored: ["--option-of-tomorrow"])
    with (
        pytest.raises(MissingEngine, match="error: invalid argument: --option-of-tomorrow"),
        serving(engine, Setup(target, 256)),
    ):
        pass


@dataclass(frozen=True)
class Failure:
    """How the engine ends on a file: while loading it or in the first answer, by which signal, with which words."""

    edit: Callable[[Draft], Any]
    phase: str
    signal: str | None
    says: str


LOADING, FIRST = "loading", "the first run"
FAILURES = {
    "T-53 no mask token": Failure(
        lambda d: d.drop("mask_token_id"), FIRST, "SIGABRT", "failed to add embedding at index 1"
    ),
    "T-53 mask token beyond the vocabulary": Failure(
        lambda d: d.set("mask_token_id", 2048), FIRST, "SIGABRT", "failed to add embedding at index 1"
    ),
    "T-51 capture layer at the target's depth": Failure(
        lambda d: d.set("dflash.target_layers", (1, 3, 6)), FIRST, "SIGABRT", "layer input tensor is null"
    ),
    "T-51 capture layer beyond the target": Failure(
        lambda d: d.set("dflash.target_layers", (1, 3, 7)), LOADING, "SIGABRT", "lid <= model.hparams.n_layer()"
    ),
    "T-17 F16 norm": Failure(
        retyped("blk.0.attn_norm.weight", "F16"), LOADING, "SIGABRT", "binary_op: unsupported types"
    ),
    "T-12 no capture layers": Failure(
        lambda d: d.drop("dflash.target_layers"), LOADING, None, "requires 'target_layers'"
    ),
    "T-16 window without pattern": Failure(
        lambda d: d.drop("sliding_window_pattern"), LOADING, None, "sliding_window_pattern"
    ),
    "unknown architecture": Failure(
        lambda d: d.set("general.architecture", "dflash-draft", T.STRING),
        LOADING,
        None,
        "unknown model architecture: 'dflash-draft'",
    ),
    "T-19 a tensor is missing": Failure(
        lambda d: d.tensors.pop("blk.1.ffn_up.weight"), LOADING, None, "'blk.1.ffn_up.weight' not found"
    ),
}


def fails(engine: Engine, target: Path, file: Path) -> EngineFailure:
    with pytest.raises(EngineFailure) as found:
        run_prompts(engine, target, PROMPTS[:1], 16, file, DRAFT_LENGTH, THREADS)
    error = found.value
    assert error.exit_code == 1 and error.log and "/llama.cpp/" not in str(error)
    print(f"RESULT {file.stem}: {error.phase}; {error.what}; {error.status} {error.signal}; {error.reason}")
    return error


@pytest.mark.parametrize("name", FAILURES)
def test_how_the_engine_ends_on_a_faulty_file(
    engine: Engine, target: Path, drafter: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    failure, draft = FAILURES[name], Draft.of(drafter("F32"))
    failure.edit(draft)
    found = fails(engine, target, draft.write(tmp_path / f"{name.replace(' ', '-')}.gguf"))
    assert failure.phase in found.phase
    assert found.signal == failure.signal
    assert failure.says in found.reason


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        pytest.param(lambda data: data[:-100000], "data is not within the file bounds", id="T-70 weights cut off"),
        pytest.param(lambda data: data[:3000], "failed to read key-value pairs", id="header cut off"),
        pytest.param(lambda data: b"hello" * 99, "invalid magic", id="no GGUF"),
    ],
)
def test_how_the_engine_ends_on_a_broken_file(
    engine: Engine,
    target: Path,
    drafter: Callable[[str], Path],
    tmp_path: Path,
    cut: Callable[[bytes], bytes],
    says: str,
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(cut(drafter("F32").read_bytes()))
    found = fails(engine, target, path)
    assert (found.signal, found.status) == (None, 1) and "loading" in found.phase
    assert says in found.reason


def test_a_target_of_another_width(
    engine: Engine, target: Path, drafter: Callable[[str], Path], tmp_path: Path
) -> None:
    found = fails(engine, narrow(target, tmp_path / "narrow.gguf"), drafter("F32"))
    assert (found.signal, found.phase) == ("SIGABRT", "loading drafter-F32.gguf")
    assert "GGML_ASSERT(ggml_can_repeat(b, a)) failed" in found.reason


def narrow(target: Path, out: Path) -> Path:
    """The first half of every hidden state."""
    draft = Draft.of(target)
    for name in draft.tensors:
        weights = draft.weights(name)
        if name.endswith(("attn_output.weight", "ffn_down.weight")) or weights.shape == (256,):
            draft.put(name, np.ascontiguousarray(weights[:128]))
        elif weights.ndim == 2:
            draft.put(name, np.ascontiguousarray(weights[:, :128]))
    draft.set("qwen3.embedding_length", 128)
    return draft.write(out)


@pytest.mark.parametrize(
    ("edit", "collapses"),
    [
        pytest.param(lambda d: d.set("rope.freq_base", 1e6), True, id="A1-43 another theta"),
        pytest.param(lambda d: d.drop("dflash.block_size"), False, id="A6-1 no block size"),
    ],
)
def test_what_the_engine_runs_without_a_word(
    engine: Engine,
    target: Path,
    drafter: Callable[[str], Path],
    alone: EngineRun,
    tmp_path: Path,
    edit: Callable[[Draft], Any],
    collapses: bool,
) -> None:
    """Lossless all the same; without a block size it takes 16 for it, which costs nothing at a draft length of 7."""
    draft = Draft.of(drafter("F32"))
    edit(draft)
    few, file = PROMPTS[:FEW], draft.write(tmp_path / "edited.gguf")
    run = run_prompts(engine, target, few, NEW_TOKENS, file, DRAFT_LENGTH, THREADS)
    assert compare(run, EngineRun(alone.prompts[:FEW], alone.answers[:FEW])).same == FEW
    walk, right = total(answer.acceptance for answer in run.answers), sum(TORCH["verify_steps"][:FEW])
    print(f"RESULT {'theta' if collapses else 'block size'}: {walk.steps} steps, {right} with all facts right")
    assert walk.steps > 1.3 * right if collapses else walk.steps == pytest.approx(right, rel=0.02)
