"""`doctor` of a checkpoint: what would go wrong in converting and serving it, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
from fake_llama_server import make
from mtp_checkpoints import small
from other_tokenizers import Change, swapped, write_tokenizer
from published import PAIR
from server_helps import CURRENT, HELPS

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters import preflight as flight
from convert_drafter.converters.cli import main
from convert_drafter.converters.errors import MissingEngine
from convert_drafter.converters.preflight import Plans, preflight
from convert_drafter.converters.verdict import Gate, Outcome

SCHEMA = json.loads((Path(flight.__file__).parent / "diagnosis.schema.json").read_text())
DRAFTER, TARGET = PAIR / "drafter", PAIR / "target"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("server"), help=CURRENT)


@pytest.fixture
def plans(server: Path, tmp_path: Path) -> Callable[..., Plans]:
    return lambda **more: Plans(**({"server": server, "out": tmp_path / "out.gguf"} | more))


def gates(source: Path, target: Path | None, plans: Plans) -> dict[str, Gate]:
    return {gate.name: gate for gate in preflight(source, target, plans)}


def test_a_pair_that_is_right(plans: Callable[..., Plans], tmp_path: Path) -> None:
    """Every gate passes, and nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    found = gates(DRAFTER, TARGET, plans())
    assert list(found) == ["paths", "facts", "tokenizer", "settings", "batching", "engine", "disk"]
    assert {gate.outcome for gate in found.values()} == {Outcome.PASS}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_head_in_its_target(plans: Callable[..., Plans], tmp_path: Path) -> None:
    found = gates(small(tmp_path / "mtp"), None, plans())
    assert {gate.outcome for gate in found.values()} == {Outcome.PASS}
    assert found["tokenizer"].summary == "the checkpoint is its own target"


# --- paths (T-35) ---


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def without_weights(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(DRAFTER / "config.json", folder)
    return folder


def without_config(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(DRAFTER / "model.safetensors", folder)
    return folder


def truncated(folder: Path) -> Path:
    folder = without_weights(folder)
    (folder / "model.safetensors").write_bytes((DRAFTER / "model.safetensors").read_bytes()[:-1000])
    return folder


def broken_link(path: Path) -> Path:
    path.symlink_to(path.with_name("gone"))
    return path


def a_file(path: Path) -> Path:
    path.write_text("hello")
    return path


def no_weights_in_it(path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    path.write_text("hello")
    return path


BROKEN = {
    "T-35 empty folder": (empty, "no weights"),
    "T-35 folder without weights": (without_weights, "no weights"),
    "T-35 folder without config": (without_config, "config.json"),
    "T-35 broken link": (broken_link, "link"),
    "T-35 file": (no_weights_in_it, ""),
    "T-70 truncated": (truncated, "model.safetensors"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_drafter_that_leads_nowhere(plans: Callable[..., Plans], tmp_path: Path, name: str) -> None:
    broken, says = BROKEN[name]
    found = gates(broken(tmp_path / "drafter"), TARGET, plans())
    assert list(found) == ["paths"] and found["paths"].outcome is Outcome.FAIL
    assert any(says in detail for detail in found["paths"].details)


@pytest.mark.parametrize("broken", [empty, broken_link, a_file, lambda path: path], ids=lambda b: f"T-35 {b.__name__}")
def test_a_target_that_leads_nowhere(
    plans: Callable[..., Plans], tmp_path: Path, broken: Callable[[Path], Path]
) -> None:
    found = gates(DRAFTER, broken(tmp_path / "target"), plans())
    assert list(found) == ["paths"] and found["paths"].outcome is Outcome.FAIL


def test_a_target_without_weights_is_enough_to_convert(plans: Callable[..., Plans], tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(TARGET, target, ignore=shutil.ignore_patterns("*.safetensors"))
    found = gates(DRAFTER, target, plans())
    assert found["paths"].outcome is Outcome.PASS and "a config without weights" in found["paths"].details[1]


# --- facts ---


def changed(folder: Path, **changes: Any) -> Path:
    shutil.copytree(DRAFTER, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_fact_that_is_missing(plans: Callable[..., Plans], tmp_path: Path) -> None:
    source = changed(tmp_path / "d", rope_parameters=None, rope_theta=None)
    found = gates(source, TARGET, plans())
    assert list(found) == ["paths", "facts"] and found["facts"].outcome is Outcome.FAIL
    assert "rope theta: missing" in found["facts"].details[0]


def test_a_key_nobody_reads_is_a_warning(plans: Callable[..., Plans], tmp_path: Path) -> None:
    source = changed(tmp_path / "d", something_new=1)
    assert gates(source, TARGET, plans())["facts"].outcome is Outcome.ADVICE
    strict = gates(source, TARGET, plans(strict=True))["facts"]
    assert strict.outcome is Outcome.FAIL and "something_new" in strict.details[0]


def test_no_target(plans: Callable[..., Plans]) -> None:
    found = gates(DRAFTER, None, plans())
    assert found["facts"].outcome is Outcome.FAIL and "--target" in found["facts"].details[0]


# --- tokenizer (A2-23) ---


def with_tokenizer(folder: Path, change: Change = lambda raw: None) -> Path:
    return write_tokenizer(shutil.copytree(DRAFTER, folder), change)


def test_a_drafter_with_its_target_s_tokenizer(plans: Callable[..., Plans], tmp_path: Path) -> None:
    """A2-23."""
    gate = gates(with_tokenizer(tmp_path / "d"), TARGET, plans())["tokenizer"]
    assert gate.outcome is Outcome.PASS and "2048 tokens, sha256" in gate.summary


def test_a_drafter_with_another_tokenizer(plans: Callable[..., Plans], tmp_path: Path) -> None:
    """A2-23, T-61: as many tokens, two of them in each other's place."""
    gate = gates(with_tokenizer(tmp_path / "d", swapped), TARGET, plans())["tokenizer"]
    assert gate.outcome is Outcome.FAIL and "2 of 2048 tokens differ" in gate.details[1]


def test_a_tokenizer_that_cannot_be_read(plans: Callable[..., Plans], tmp_path: Path) -> None:
    gate = gates(with_tokenizer(tmp_path / "d", lambda raw: raw.pop("model")), TARGET, plans())["tokenizer"]
    assert gate.outcome is Outcome.UNDECIDED and gate.details


# --- serving ---


@pytest.mark.parametrize(
    ("more", "says"),
    [
        pytest.param({"mode": "mtp,dflash"}, "mtp and dflash exclude each other", id="T-41 two drafters"),
        pytest.param({"mode": "mtp"}, "this is a drafter of dflash, not of mtp", id="another kind"),
        pytest.param({"mode": "bogus"}, "unknown 'bogus'", id="A3-5 unknown"),
        pytest.param({"draft_length": 8}, "the drafter gives 7 at most", id="A6-8 longer than the block"),
        pytest.param({"mode": "ngram", "draft_length": 3}, "uses no drafter, so it does nothing", id="of none"),
        pytest.param({"mode": "off", "draft_length": 3}, "uses no drafter, so it does nothing", id="of off"),
    ],
)
def test_settings_that_contradict(plans: Callable[..., Plans], more: dict[str, Any], says: str) -> None:
    gate = gates(DRAFTER, TARGET, plans(**more))["settings"]
    assert gate.outcome is Outcome.FAIL and any(says in detail for detail in gate.details)


@pytest.mark.parametrize(
    "more", [{"mode": "dflash+ngram"}, {"mode": "draft-dflash", "draft_length": 7}, {"mode": "off"}]
)
def test_settings_that_do_not(plans: Callable[..., Plans], more: dict[str, Any]) -> None:
    assert gates(DRAFTER, TARGET, plans(**more))["settings"].outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("parallel", "strict", "outcome"),
    [(1, True, Outcome.PASS), (4, False, Outcome.ADVICE), (4, True, Outcome.FAIL)],
    ids=["A2-20 one", "A2-20 T-36 warning", "T-36 strict"],
)
def test_a_drafter_with_batching(plans: Callable[..., Plans], parallel: int, strict: bool, outcome: Outcome) -> None:
    assert gates(DRAFTER, TARGET, plans(parallel=parallel, strict=strict))["batching"].outcome is outcome


def test_what_the_engine_can(plans: Callable[..., Plans], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-33: yes, no, unknown, and nobody to ask."""
    old = make(tmp_path, "old", help=HELPS["legacy"])
    assert gates(DRAFTER, TARGET, plans(server=old))["engine"].outcome is Outcome.FAIL
    silent = make(tmp_path, "silent", help="no options at all")
    assert gates(DRAFTER, TARGET, plans(server=silent))["engine"].outcome is Outcome.UNDECIDED
    assert gates(DRAFTER, TARGET, plans(server=tmp_path / "nothing"))["engine"].outcome is Outcome.FAIL
    assert gates(DRAFTER, TARGET, plans(runtime="lucebox"))["engine"].outcome is Outcome.SKIPPED

    def nobody(path: Path | None) -> None:
        raise MissingEngine("llama-server not found")

    monkeypatch.setattr(flight, "find_server", nobody)
    assert gates(DRAFTER, TARGET, plans(server=None))["engine"].outcome is Outcome.SKIPPED


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free", "outcome"), [(1000, Outcome.FAIL), (10**9, Outcome.PASS)])
def test_free_space(plans: Callable[..., Plans], monkeypatch: pytest.MonkeyPatch, free: int, outcome: Outcome) -> None:
    monkeypatch.setattr(flight.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    gate = gates(DRAFTER, TARGET, plans(recipe="Q8_0"))["disk"]
    assert gate.outcome is outcome and gate.summary.startswith("2.1 MiB for out.gguf")


def test_a_folder_that_is_not_there(plans: Callable[..., Plans], tmp_path: Path) -> None:
    found = gates(DRAFTER, TARGET, plans(out=tmp_path / "nowhere" / "out.gguf"))
    assert found["facts"].outcome is Outcome.FAIL and "there is no folder" in found["facts"].details[0]


# --- the command ---


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *map(str, words)])
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out + captured.err


def test_the_command(server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [DRAFTER, "--target", TARGET, "--server", server, "-o", tmp_path / "out.gguf"]
    status, text = ask(capsys, *words, "--parallel", "4")
    assert status == 0 and "batching   note    a drafter beside 4 sequences at a time" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    status, text = ask(capsys, *words, "--parallel", "4", "--strict", "--json")
    found = json.loads(text)
    jsonschema.validate(found, SCHEMA)
    assert status == 1 and [g["name"] for g in found["gates"] if g["outcome"] == "fail"] == ["batching"]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_file_is_asked_how_it_would_be_served(
    server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the check of the file itself, where anything is said about serving."""
    file = tmp_path / "dflash.gguf"
    convert(ConvertJob(DRAFTER, TARGET, "llama.cpp", "Q8_0", file))
    status, text = ask(capsys, file, "--json")
    assert status == 0 and [gate["name"] for gate in json.loads(text)["gates"]] == ["structure"]
    jsonschema.validate(json.loads(text), SCHEMA)
    status, text = ask(capsys, file, "--server", server, "--mode", "mtp")
    assert status == 1 and "this is a drafter of dflash, not of mtp" in text and "engine     ok" in text


def test_a_checkpoint_has_no_source(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = ask(capsys, DRAFTER, "--source", DRAFTER)
    assert status == 2 and "is a folder, expected a drafter's GGUF" in text
