"""The bench: every planted fault is found by verify and explained by its diagnosis, every right file passes.

`fault_bench.py` runs all of it and records it in fixtures/faults.json.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fault_bench import failing, llama_cpp_says, recorded, table, verdict_of
from faults import ALL, FAULTS, NOTHING, RIGHT, Case, Fault, Good, Workspace
from published import FIXTURES, PAIR
from target_gguf import write_target

LEAST = 30  # faults, and right files a third of that
EXPLAINED = (  # one of each family; the record has all
    "theta 1e4", "capture layers reversed", "window pattern swapped", "mask token is the padding", "causal",
    "norms minus one", "rotary rows interleaved", "gate and up swapped", "one matrix is noise",
    "a random drafter of the same shapes",
)  # fmt: skip


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


@pytest.mark.engine
@pytest.mark.parametrize("fault", FAULTS, ids=identity)
def test_a_planted_fault_is_found(space: Workspace, fault: Fault) -> None:
    """The expected gate says so, the exit status is 1, and the gates that fail are those of the table."""
    verdict = verdict_of(fault.case(space), diagnose=False)
    outcomes = {gate.name: str(gate.outcome) for gate in verdict.gates}
    assert outcomes[fault.gate] == fault.outcome, outcomes
    assert verdict.exit_code(strict=True) == 1
    assert failing(verdict.gates) == recorded()["verify"][fault.name]["fails"]


@pytest.mark.engine
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in EXPLAINED], ids=identity)
def test_a_planted_fault_is_explained(space: Workspace, fault: Fault) -> None:
    """The cause is the planted one."""
    verdict = verdict_of(fault.case(space), diagnose=True)
    assert verdict.diagnosis is not None and fault.cause is not None
    found = verdict.diagnosis.found
    assert (found is None) is (fault.cause == NOTHING), [cause.name for cause in verdict.diagnosis.tried[:3]]
    assert found is None or found.name.startswith(fault.cause)


def test_the_record_names_every_cause() -> None:
    """The whole catalogue: every fault is caught, and every cause that was asked for is the planted one."""
    verified = recorded()["verify"]
    assert set(verified) == {fault.name for fault in FAULTS}
    for fault in FAULTS:
        said = verified[fault.name]
        assert said["fails"], fault.name
        if fault.cause is not None and fault.measured:
            cause = said["cause"]
            assert cause is None if fault.cause == NOTHING else (cause or "").startswith(fault.cause), fault.name


def test_the_table_of_the_documentation_is_the_record() -> None:
    """R2"""
    assert f"<!-- table: faults -->\n{table()}\n" in (FIXTURES.parent / "docs" / "verify.md").read_text()


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
