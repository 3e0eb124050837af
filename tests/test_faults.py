"""The bench: every planted fault is found by verify and explained by its diagnosis, every right file passes.

`fault_bench.py` runs all of it and records it in fixtures/faults.json.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fault_bench import EVERY, GOOD, KINDS, gates_of, llama_cpp_says, of_kind, recorded, table, target_file
from faults import ALL, NOTHING, REFUSED, RIGHT, Case, Fault, Good, Workspace
from kind_faults import KIND_FAULTS
from published import FIXTURES

LEAST = 30  # faults, and right files a third of that
EXPLAINED = {  # one of each family that test_diagnose.py has not; the record has all
    "dflash": ("capture layers reversed", "window pattern swapped"),
    "dflash2": ("convolution taps reversed", "codebooks swapped"),
    "dspark": ("sample_from_anchor flipped", "Markov matrices swapped"),
    "eagle3": ("embedding and feature exchanged", "llama3 factors lost", "d2t as offsets"),
    "mtp": ("all queries, then all gates", "their norms swapped"),
}  # fmt: skip
OTHER_KINDS = [kind for kind in KINDS if kind != "dflash"]
# Every fourth of DFlash's, every sixth of the others' and those that are explained, every second of the right files:
# all take an hour and more, and the record has them all.
EACH = {"dflash": 4}
RUN = [f for i, f in enumerate(EVERY) if i % EACH.get(f.kind, 6) == 0 or f.name in EXPLAINED[f.kind]]


def identity(item: Fault | Good) -> str:
    return f"{item.kind} {item.name}"


# --- the catalogue itself ---


def test_the_catalogue_is_large_enough_and_names_its_traps() -> None:
    assert len(ALL) >= LEAST and len(RIGHT) >= LEAST / 3
    every = (*ALL, *KIND_FAULTS)
    assert len({(fault.kind, fault.name) for fault in every}) == len(every)
    assert all(re.fullmatch(r"(T|P|A\d|G)-\d+", trap) for fault in every for trap in fault.ids)
    for kind in OTHER_KINDS:
        assert len(of_kind(kind, EVERY)) >= 20 and len(of_kind(kind, GOOD)) >= 4


def test_every_fault_is_planted(tmp_path: Path) -> None:
    """A plant that changes nothing would pass every test: each file is another one than it was made from."""
    space = Workspace(tmp_path)
    right = {space.converted(recipe).read_bytes() for recipe in ("BF16", "F32", "Q8_0", "Q4_0")}
    right |= {space.converted("BF16", "lucebox").read_bytes()}
    for fault in EVERY:
        case, its = fault.case(space), space.of(fault.checkpoint)
        another_target = case.target != its.target
        made_of = right if its is space else {its.converted("F32").read_bytes(), its.converted("BF16").read_bytes()}
        assert another_target or case.file.read_bytes() not in made_of, fault.name
        case.file.unlink()


# --- verify, in torch ---


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


@pytest.mark.engine
@pytest.mark.parametrize("fault", RUN, ids=identity)
def test_a_planted_fault_is_found(space: Workspace, fault: Fault) -> None:
    """The expected gate says so, the exit status is 1, and the gates that fail are those of the table."""
    fails, verdict = gates_of(fault.case(space), diagnose=False, kind=fault.kind)
    assert fails == recorded(fault.kind)["verify"][fault.name]["fails"]
    if fault.gate == REFUSED:
        assert fails == [REFUSED]
        return
    outcomes = {gate.name: str(gate.outcome) for gate in verdict.gates}
    assert outcomes[fault.gate] == fault.outcome, outcomes
    assert verdict.exit_code(strict=True) == 1


@pytest.mark.engine
@pytest.mark.parametrize("fault", [f for f in EVERY if f.name in EXPLAINED[f.kind]], ids=identity)
def test_a_planted_fault_is_explained(space: Workspace, fault: Fault) -> None:
    """The cause is the planted one."""
    _, verdict = gates_of(fault.case(space), diagnose=True, kind=fault.kind)
    assert verdict.diagnosis is not None and fault.cause is not None
    found = verdict.diagnosis.found
    assert (found is None) is (fault.cause == NOTHING), [cause.name for cause in verdict.diagnosis.tried[:3]]
    assert found is None or found.name.startswith(fault.cause)


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_names_every_cause(kind: str) -> None:
    """The whole catalogue: every fault is caught, and every cause that was asked for is the planted one."""
    verified = recorded(kind)["verify"]
    assert set(verified) == {fault.name for fault in of_kind(kind, EVERY)}
    for fault in of_kind(kind, EVERY):
        said = verified[fault.name]
        wanted = f"{fault.gate}{'?' * (fault.outcome == 'undecided')}"
        assert wanted in said["fails"], fault.name
        if fault.cause is not None and fault.measured:
            cause = said["cause"]
            assert cause is None if fault.cause == NOTHING else (cause or "").startswith(fault.cause), fault.name


@pytest.mark.parametrize(("place", "kinds"), [("faults", ["dflash"]), ("faults of other kinds", OTHER_KINDS)])
def test_the_table_of_the_documentation_is_the_record(place: str, kinds: list[str]) -> None:
    """R2"""
    assert f"<!-- table: {place} -->\n{table(*kinds)}\n" in (FIXTURES.parent / "docs" / "verify.md").read_text()


def test_the_numbers_of_the_documentation_are_the_catalogue_s() -> None:
    """R2"""
    planted, right = len(EVERY) + len(ALL) - len(of_kind("dflash", EVERY)), len(GOOD)
    said = f"A bench of {planted} planted faults and {right} right files"
    assert said in (FIXTURES.parent / "CHANGELOG.md").read_text()


@pytest.mark.engine
@pytest.mark.parametrize("good", GOOD[::2], ids=identity)
def test_a_right_file_passes(space: Workspace, good: Good, tmp_path: Path) -> None:
    """No gate fails: neither in structure nor in drafts nor in acceptance, whatever its types and dialect."""
    case = good.case(space)
    copy = tmp_path / "drafter.gguf"
    copy.write_bytes(case.file.read_bytes())
    _, verdict = gates_of(Case(copy, case.target, case.source), diagnose=False, kind=good.kind)
    assert verdict.exit_code() == 0, [(gate.name, gate.summary, gate.details) for gate in verdict.gates]


# --- what llama.cpp alone says ---


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_says_is_recorded(kind: str) -> None:
    says = recorded(kind)["says"]
    named = {item.name for item in (*of_kind(kind, (*ALL, *KIND_FAULTS)), *of_kind(kind, GOOD))}
    assert set(says) <= named
    silent = [name for name, answer in says.items() if answer["runs"] and answer["same_text"] and not answer["warns"]]
    assert len(silent) > (LEAST if kind == "dflash" else 10), "the faults this project exists for: nothing is said"


SAMPLE = {
    "dflash": (
        "theta 1e4", "mask token is the padding", "theta missing", "block size missing", "a shape wrong", "half a file",
    ),
    "dflash2": ("codebooks swapped", "one codebook missing"),
    "dspark": ("sample_from_anchor flipped",),
    "eagle3": ("q and k not permuted", "no d2t"),
    "mtp": ("state and embedding exchanged", "declared and absent"),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_says_it_again(space: Workspace, tmp_path: Path, kind: str) -> None:
    """The record is reproducible: the same files run or do not, with the same acceptance up to rounding ties."""
    target: Path | None = None
    for fault in (fault for fault in (*ALL, *KIND_FAULTS) if fault.kind == kind and fault.name in SAMPLE[kind]):
        case, before = fault.case(space), recorded(kind)["says"][fault.name]
        target = target or target_file(case.target, tmp_path / "target.gguf", kind)
        (place := tmp_path / fault.name.replace(" ", "-")).mkdir()
        now = llama_cpp_says(case, target, place, kind)
        assert now["runs"] == before["runs"], fault.name
        if now["runs"]:
            assert now["same_text"] == before["same_text"], fault.name
            assert now["acceptance_length"] == pytest.approx(before["acceptance_length"], abs=0.1), fault.name
