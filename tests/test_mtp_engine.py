"""MTP heads in the real llama.cpp: the same files as its own converter's, the same drafts as the reference's."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import make_mtp
import make_mtp_mimo
import numpy as np
import pytest
from llama_server import llama_server
from llama_source import run_converter
from mtp_checkpoints import SOURCES, job
from published import FIXTURES
from test_against_llama_cpp import differences, facts_of_file, listed_for, verdict
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import QuantizeJob, convert, quantize
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import write_conversion
from convert_drafter.converters.gguf_file import write_gguf
from convert_drafter.converters.gguf_read import read_gguf

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from step_target import StepTarget  # noqa: E402

from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import gguf_weights, reference  # noqa: E402
from convert_drafter.converters.verify.job import VerifyJob  # noqa: E402
from convert_drafter.converters.verify.verify import verify  # noqa: E402

GOLDEN = FIXTURES / "dialects" / "llama.cpp-mtp-differences.json"
RECORDED = json.loads((make_mtp.TRAINED.parent / "acceptance.json").read_text())
PROMPTS = [json.loads(line)["tokens"] for line in make_mtp.PROMPTS.read_text().splitlines()]
NEW_TOKENS = 128
RECIPES = ("F32", "F16", "BF16", "Q8_0")
RANDOM = [name for name in SOURCES if name not in ("trained", "mimo-ranks")]  # FP8 weights are another target's
RELEASED = "stop processing"  # the line after a prompt's last draft
TRACED = re.compile(r"draft candidate +0, pos +(\d+): +(\d+) ")  # what llama-server drafts, as its trace has it
# What is computed in 32 bits throughout: flash attention rounds to 16, which flips a choice of experts now and then.
EXACT = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
DRAFTING = [
    *("--spec-type", "draft-mtp", "--spec-draft-n-max", "3", "--spec-draft-p-min", "0"),
    *("--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32", "-ctk", "f32", "-ctv", "f32"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mtp")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Path]:
    return {name: make(folder / name) for name, make in SOURCES.items()}


@pytest.fixture(scope="module")
def theirs(folder: Path, sources: dict[str, Path]) -> Path:
    """llama.cpp's files: heads alone, trunks alone, both together. A process for each, as its flags stay set."""
    out = folder / "llama.cpp"
    out.mkdir()
    for flag in ("--mtp", "--no-mtp", ""):
        recipes = RECIPES if flag == "--mtp" else RECIPES[:1]
        runs = [(name, path, recipe) for name, path in sources.items() for recipe in recipes]
        jobs = [
            [str(path), *filter(None, [flag]), "--outtype", recipe.lower(), "--outfile", str(out / file)]
            for name, path, recipe in runs
            for file in [f"{name}{flag}-{recipe}.gguf"]
        ]
        run_converter(jobs, folder / f"converter{flag}.log")
    return out


def listed(name: str, mode: str, arch: str, recipe: str) -> dict[str, tuple[str | None, str | None]]:
    """What the golden list says of a family's head `mode` (alone, attached), where `{a}` is the architecture."""
    entries: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["differences"]
    for entry in entries:
        entry["names"] = [key.format(a=arch) for key in entry["names"]]
        entry["cases"] = "all" if mode in entry["cases"] else entry["cases"]
    return listed_for(f"{name} {mode}", recipe, entries)


def unlisted(name: str, mode: str, ours: Path, theirs: Path, recipe: str = "F32") -> list[str]:
    files = [read_gguf(path) for path in (ours, theirs)]
    found = differences(*map(facts_of_file, files))
    return list(verdict(found, listed(name, mode, str(files[0].keys["general.architecture"].value), recipe)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SOURCES)
def test_a_head_s_file_is_llama_cpp_s_or_the_difference_is_listed(
    name: str, recipe: str, sources: dict[str, Path], theirs: Path, tmp_path: Path
) -> None:
    """Key by key, tensor by tensor, byte by byte; each difference has its reason in the golden list."""
    out = tmp_path / "ours.gguf"
    convert(job(sources[name], out, recipe=recipe))
    assert not unlisted(name, "alone", out, theirs / f"{name}--mtp-{recipe}.gguf", recipe)


@pytest.mark.parametrize("name", SOURCES)
def test_an_attached_head_is_llama_cpp_s_whole_file(
    name: str, sources: dict[str, Path], theirs: Path, tmp_path: Path
) -> None:
    """Its trunk with our head is its conversion of both."""
    out = tmp_path / "attached.gguf"
    write_conversion(prepare_attach(job(sources[name], out, attach=theirs / f"{name}--no-mtp-F32.gguf")))
    assert not unlisted(name, "attached", out, theirs / f"{name}-F32.gguf")


@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS"])
def test_a_quantized_head_is_llama_quantize_s(sources: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    """In one pass from the checkpoint and from the BF16 file; the target's depth counts in the mixture."""
    plain, ours, once = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "once"))
    convert(job(sources["trained"], plain, recipe="BF16"))
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, ours, recipe))
    assert_same_file(read_gguf(ours), theirs)
    convert(job(sources["trained"], once, recipe=recipe))
    assert_same_file(read_gguf(once), theirs)


def test_the_golden_list_gives_reasons() -> None:
    for entry in json.loads(GOLDEN.read_text())["differences"]:
        assert entry["names"] and entry["reason"].strip(), entry


# --- the same drafts ---


@pytest.fixture(scope="module")
def head(folder: Path, sources: dict[str, Path]) -> Path:
    out = folder / "head.gguf"
    convert(job(sources["trained"], out))
    return out


Answers = list[tuple[list[int], list[list[int]]]]  # of each prompt: its text, the drafts of each step


def ask(model: Path, log: Path, *options: str, prompts: Sequence[list[int]] = PROMPTS) -> Answers:
    """Texts and drafts as llama-server has them; without options the target alone."""
    answers: Answers = []
    with llama_server(model, *EXACT, *(("-lv", "5", *options) if options else ()), log=log) as server:
        for prompt in prompts:
            start = log.stat().st_size
            tokens = server.complete(prompt, NEW_TOKENS)["tokens"]
            steps: list[list[int]] = []
            for place, token in TRACED.findall(written(log, start)) if options else ():
                if place == "0":
                    steps.append([])
                steps[-1].append(int(token))
            answers.append((tokens, steps))
    return answers


def written(log: Path, start: int) -> str:
    """What the server wrote of a prompt, all of it: a thread of its own writes, in order, and may be late."""
    deadline = time.monotonic() + 60
    while RELEASED not in (text := log.read_bytes()[start:].decode(errors="replace")):
        assert time.monotonic() < deadline, f"{log}: no {RELEASED!r} after the answer"
        time.sleep(0.01)
    return text


def walk(
    text: Sequence[int], first: int, steps: list[list[int]], replays: bool = False
) -> Iterator[tuple[int, list[int], int]]:
    """Each step's place in the text, its drafts, and how many are right; a step that is run again commits one more."""
    position = first
    for drafts in steps:
        if position >= len(text):
            return
        following = text[position + 1 :]
        right = next((i for i, (a, b) in enumerate(zip(drafts, following, strict=False)) if a != b), len(drafts))
        yield position, drafts, right
        position += right + 1 + (replays and right < len(drafts))


@pytest.fixture(scope="module")
def alone(theirs: Path, folder: Path) -> Answers:
    return ask(theirs / "trained--no-mtp-F32.gguf", folder / "alone.log")


@pytest.fixture(scope="module")
def separate(theirs: Path, folder: Path, head: Path) -> Answers:
    return ask(theirs / "trained--no-mtp-F32.gguf", folder / "separate.log", "-md", str(head), *DRAFTING)


def target_of(folder: Path) -> Any:
    """The target in torch: of a Step-3.5 transformers has only the decoder, of a MiMo-V2.5 the Flash of its weights."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    if family == "mimo_v2":
        return TorchTarget(make_mtp_mimo.flash(folder.with_name(f"{folder.name}-in-three")))
    return StepTarget(folder) if family == "step3p5" else TorchTarget(folder)


def same_drafts(
    folder: Path,
    head: Path,
    prompts: Sequence[list[int]],
    answers: Answers,
    replays: bool = False,
    centred: bool = False,
) -> tuple[int, int]:
    """(drafts that the reference drafts as well after the same drafts before them, all drafts)

    `replays`: llama-server cannot take back a target's rejected tokens (qwen3next) and runs the step again with those
    that were right. Its head then reads the anchor with the state of the last rejected draft, not of the token before.
    """
    torch.set_num_threads(1)
    target, drafter = target_of(folder), reference(*gguf_weights(head))
    (last,) = captures_of(drafter.spec)
    if centred:  # llama-server takes the mean away before the last norm of a nemotron_h_moe's head
        weight, epsilon = drafter.head.norm.weight, drafter.head.norm.epsilon
        drafter.head.norm = torch.nn.LayerNorm(len(weight), epsilon, bias=False)
        drafter.head.norm.weight = weight
    same = drafted = 0
    for prompt, (tokens, steps) in zip(prompts, answers, strict=True):
        text = [*prompt, *tokens]
        states = target.write(text, 1, [last])[1][last]
        context = drafter.read(None, states, text, target.tables)
        for position, drafts, right in walk(text, len(prompt), steps, replays):
            until = drafter.until(context, position)
            ours = drafter.draft(until, text[position], len(drafts), target.tables, drafts).tokens.tolist()
            same += sum(a == b for a, b in zip(ours, drafts, strict=True))
            drafted += len(drafts)
            if replays and right < len(drafts):
                state = target.write([*text[: position + 1], *drafts], 1, [last])[1][last][-1:]
                embedded = drafter.tables(target.tables).embedding[[text[position]]]
                keys, values = drafter.head.keys_values(embedded, state, torch.tensor([position]))
                context.keys[..., position : position + 1, :] = keys
                context.values[..., position : position + 1, :] = values
    return same, drafted


def test_drafts_are_the_reference_s(sources: dict[str, Path], head: Path, separate: Answers) -> None:
    """At F32 at least 99 of 100 drafts."""
    same, drafted = same_drafts(sources["trained"], head, PROMPTS, separate)
    assert drafted > 1500 and same >= 0.99 * drafted, (same, drafted)


@pytest.mark.parametrize("name", RANDOM)
def test_drafts_of_any_other_shape_are_the_reference_s(
    name: str, sources: dict[str, Path], theirs: Path, folder: Path
) -> None:
    """Partly rotated heads, an output head, linear layers, experts, all families; random weights nobody accepts.

    Each prompt has a server of its own: a second one's first position reads the last state of the text before, which
    such a head hears.
    """
    out, prompts = folder / f"{name}.gguf", PROMPTS[:3]
    convert(job(sources[name], out))
    model, options = theirs / f"{name}--no-mtp-F32.gguf", ("-md", str(out), *DRAFTING)
    answers = [ask(model, folder / f"{name}-{i}.log", *options, prompts=[p])[0] for i, p in enumerate(prompts)]
    ((text, _),) = ask(model, folder / f"{name}-alone.log", prompts=prompts[:1])
    assert answers[0][0] == text
    otherwise = {"replays": name == "next", "centred": name == "nemotron"}
    same, drafted = same_drafts(sources[name], out, prompts, answers, **otherwise)
    assert drafted > 500 and same >= 0.99 * drafted, (same, drafted)


def test_texts_are_the_target_s_own_and_drafts_are_accepted_as_recorded(alone: Answers, separate: Answers) -> None:
    """T-50."""
    assert [text for text, _ in separate] == [text for text, _ in alone]
    assert acceptance_length(separate) == pytest.approx(RECORDED["acceptance_length"], rel=0.03)


def acceptance_length(answers: Answers) -> float:
    pairs = zip(PROMPTS, answers, strict=False)
    rights = [right for p, (t, s) in pairs for _, _, right in walk([*p, *t], len(p), s)]
    return 1 + sum(rights) / len(rights)


def test_an_attached_head_drafts_the_same(
    sources: dict[str, Path], theirs: Path, folder: Path, separate: Answers
) -> None:
    """One file, no -md: llama-server takes the head out of the target itself."""
    out = folder / "attached.gguf"
    write_conversion(prepare_attach(job(sources["trained"], out, attach=theirs / "trained--no-mtp-F32.gguf")))
    assert ask(out, folder / "attached.log", *DRAFTING, prompts=PROMPTS[:4]) == separate[:4]


@pytest.mark.parametrize("name", RANDOM)
def test_a_head_of_any_family_leaves_the_text_alone(
    name: str, sources: dict[str, Path], theirs: Path, folder: Path
) -> None:
    """T-50, with the head attached; each prompt has a server of its own."""
    trunk, out = theirs / f"{name}--no-mtp-F32.gguf", folder / f"{name}-attached.gguf"
    write_conversion(prepare_attach(job(sources[name], out, attach=trunk)))
    for i, prompt in enumerate(PROMPTS[:2]):
        (alone, _), *_ = ask(trunk, folder / f"{name}-alone-{i}.log", prompts=[prompt])
        (text, steps), *_ = ask(out, folder / f"{name}-attached-{i}.log", *DRAFTING, prompts=[prompt])
        assert text == alone and steps


@pytest.mark.parametrize("name", ["step", "mimo-flash"])
def test_attached_chains_draft_the_same(name: str, sources: dict[str, Path], theirs: Path, folder: Path) -> None:
    """Each head out of the target's own file, three tokens a step and no more."""
    alone, out, base = folder / f"{name}-chain.gguf", folder / f"{name}-attached.gguf", f"{name}--no-mtp-F32.gguf"
    convert(job(sources[name], alone))
    write_conversion(prepare_attach(job(sources[name], out, attach=theirs / base)))
    options: dict[str, Any] = {"prompts": PROMPTS[:1]}
    longer = [*DRAFTING[:2], "--spec-draft-n-max", "5", *DRAFTING[4:]]
    separate = ask(theirs / base, folder / f"{name}-longer.log", "-md", str(alone), *longer, **options)
    attached = ask(out, folder / f"{name}-attached.log", *longer, **options)
    assert attached == separate
    assert {len(drafts) for _, steps in attached for drafts in steps[:-4]} == {3}


def test_heads_of_three_matrices_do_not_run(theirs: Path, folder: Path) -> None:
    """llama.cpp's own file of a MiMo-V2-Flash: why ours has one matrix."""
    options, log = ("-md", str(theirs / "mimo-flash--mtp-F32.gguf"), *DRAFTING), folder / "three.log"
    with (
        pytest.raises(AssertionError, match="did not come up"),
        llama_server(theirs / "mimo-flash--no-mtp-F32.gguf", *options, log=log),
    ):
        raise RuntimeError("it came up")
    assert "MIMO2 MTP requires fused attn_qkv" in log.read_text(errors="replace")


def write_less_one(head: Path, out: Path) -> None:
    """A head's file with its norms as they are published."""
    file = read_gguf(head)

    def data(tensor: Any) -> Any:
        values = file.tensor_bytes(tensor.name).view("<f4")
        return [values - np.float32(1) if tensor.name.endswith("norm.weight") else values]

    write_gguf(out, list(file.keys.values()), list(file.tensors.values()), data)


def test_norms_without_the_one_cost_drafts_and_never_the_text(
    theirs: Path, folder: Path, head: Path, alone: Answers
) -> None:
    """P-42 in the real engine."""
    out = folder / "norms.gguf"
    write_less_one(head, out)
    options = ("-md", str(out), *DRAFTING)
    answers = ask(theirs / "trained--no-mtp-F32.gguf", folder / "norms.log", *options, prompts=PROMPTS[:4])
    assert [text for text, _ in answers] == [text for text, _ in alone[:4]]
    assert acceptance_length(answers) < 1.3


def test_verify_names_norms_without_the_one(sources: dict[str, Path], folder: Path, head: Path) -> None:
    """P-42: the diagnosis of a file that drafts 1.1 tokens where the original drafts 2.6."""
    out, source = folder / "diagnosed.gguf", sources["trained"]
    write_less_one(head, out)
    prompts = make_mtp.PROMPTS
    shape = {"max_prompts": 4, "new_tokens": 32, "contexts": (64,), "diagnose": True}
    diagnosis = verify(VerifyJob(out, (source,), source=source, prompts=prompts, **shape)).diagnosis
    assert diagnosis is not None and diagnosis.found is not None
    assert diagnosis.found.name == "norms: one added"


def test_a_count_without_the_head_does_not_load(theirs: Path, folder: Path) -> None:
    """A5-2: the file that a converter makes of a checkpoint saved without its head."""
    file, out = read_gguf(theirs / "trained-F32.gguf"), folder / "declared.gguf"
    kept = [tensor for tensor in file.tensors.values() if not tensor.name.startswith("blk.7.")]
    write_gguf(out, list(file.keys.values()), kept, lambda tensor: file.slabs(tensor.name))
    with (
        pytest.raises(AssertionError, match=r"tensor 'blk\.7\.attn_norm\.weight' not found"),
        llama_server(out, *DRAFTING, log=folder / "declared.log"),
    ):
        raise RuntimeError("it came up")
