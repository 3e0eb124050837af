"""Is a reload needed? Resolved against resolved, and None against a number both ways (A3-22 .. A3-25, T-27, T-28)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_llama_server import make
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_checkpoints import job as mtp_job
from mtp_checkpoints import small
from published import PAIR
from server_helps import CURRENT, HELPS

from convert_drafter.converters import ConvertJob, WrongInput, convert
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show_launch
from convert_drafter.converters.launch import launching
from convert_drafter.converters.launch.launching import LaunchJob, launch
from convert_drafter.converters.launch.reload import read_stamp, reasons
from convert_drafter.converters.launch.resolve import Ngram
from convert_drafter.converters.launch.stamp import stamp

SCHEMAS = Path(launching.__file__).parent
Answer = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server, a target with an MTP head as its sidecar, and a DFlash drafter with its target's folder."""
    folder = tmp_path_factory.mktemp("reload")
    make(folder, help=CURRENT)
    make(folder, "older", help=HELPS["current without MTP"])
    convert(mtp_job(small(folder / "mtp"), folder / "mtp.gguf"))
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "Q8_0", folder / "dflash.gguf"))
    return folder


def mtp(folder: Path, **more: Any) -> LaunchJob:
    given = {"mode": "mtp", "device": "gpu", "server": folder / "llama-server"} | more
    return LaunchJob(folder / "mtp.gguf", folder / "mtp", **given)


def dflash(folder: Path, **more: Any) -> LaunchJob:
    return LaunchJob(folder / "dflash.gguf", PAIR / "target", **({"server": folder / "llama-server"} | more))


def why(running: LaunchJob, wanted: LaunchJob) -> list[str]:
    """What differs; through JSON, as it is kept."""
    kept = json.loads(json.dumps(stamp(launch(running))))
    return [reason.what for reason in reasons(kept, stamp(launch(wanted)))]


LENGTH = "draft length asked for"


@pytest.mark.parametrize(
    ("running", "wanted", "differs"),
    [
        pytest.param(8, 2, [LENGTH, "draft length"], id="A3-22 8 and 2"),
        pytest.param(8, 8, [], id="A3-22 8 and 8"),
        pytest.param(8, None, [LENGTH, "draft length"], id="A3-23 T-28 8 and None"),
        pytest.param(None, 8, [LENGTH, "draft length"], id="A3-23 T-28 None and 8"),
        pytest.param(None, None, [], id="A3-23 None and None"),
        pytest.param(None, 2, [LENGTH], id="A3-23 None and the number it resolves to"),
    ],
)
def test_lengths_of_a_head(folder: Path, running: int | None, wanted: int | None, differs: list[str]) -> None:
    assert why(mtp(folder, draft_length=running), mtp(folder, draft_length=wanted)) == differs


def test_a_length_under_auto(folder: Path) -> None:
    """A3-22, T-27: auto resolves to a drafter, so its length counts."""
    assert why(dflash(folder, mode="auto", draft_length=5), dflash(folder, mode="auto", draft_length=3))
    assert why(dflash(folder, mode="auto"), dflash(folder)) == []
    assert why(dflash(folder, mode="auto"), dflash(folder, mode="draft-dflash")) == []


@pytest.mark.parametrize("mode", ["ngram", "ngram-simple", "off"])
def test_without_a_drafter_its_length_does_nothing(folder: Path, mode: str) -> None:
    """A3-24."""
    assert why(mtp(folder, mode=mode, draft_length=8), mtp(folder, mode=mode)) == []


def test_a_mode_that_resolves_to_nothing_is_off(folder: Path) -> None:
    """T-27: asked for is not done."""
    older = folder / "older"
    assert why(mtp(folder, mode="mtp", server=older), mtp(folder, mode="off", server=older)) == []
    assert "server" in why(mtp(folder, server=older), mtp(folder))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"mode": "ngram"}, ["drafter", "drafting"]),
        ({"mode": "mtp+ngram"}, ["drafting"]),
        ({"ngram": Ngram(1, 2, 3)}, []),
        ({"mode": "mtp+ngram", "ngram": Ngram(1, 2, 3)}, ["drafting", "n-gram lengths"]),
        ({"extra": ("--ctx-size", "512")}, ["other options"]),
    ],
)
def test_what_else_differs(folder: Path, change: dict[str, Any], differs: list[str]) -> None:
    assert why(mtp(folder), mtp(folder, **change)) == differs


def test_a_file_that_was_replaced(folder: Path, tmp_path: Path) -> None:
    """T-4: the same path, another file."""
    file = tmp_path / "d.gguf"
    file.write_bytes((folder / "dflash.gguf").read_bytes())
    job = LaunchJob(file, PAIR / "target", server=folder / "llama-server")
    running = stamp(launch(job))
    assert not reasons(running, stamp(launch(job)))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    assert [reason.what for reason in reasons(running, stamp(launch(job)))] == ["drafter"]


def test_a_server_that_was_built_again(folder: Path, tmp_path: Path) -> None:
    """A build without git has the same version always; a new library beside the program is a new server."""
    for name in ("llama-server", "libllama.so"):
        (tmp_path / name).write_bytes((folder / "llama-server").read_bytes())
    (tmp_path / "llama-server").chmod(0o755)
    job = dflash(folder, server=tmp_path / "llama-server")
    running = stamp(launch(job))
    assert not reasons(running, stamp(launch(job)))
    (tmp_path / "libllama.so").write_bytes(b"new")
    (reason,) = reasons(running, stamp(launch(job)))
    assert reason.what == "server" and reason.running["version"] == reason.wanted["version"]
    shown = show_launch.reload([reason])
    assert shown.count(f"{tmp_path}/llama-server") == 2 and shown.count(" bytes)") == 2


JOBS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from([None, "auto", "mtp", "draft-mtp", "ngram", "mtp+ngram", "off", "ngram-simple"]),
        "draft_length": st.none() | st.integers(1, 3),
        "device": st.sampled_from(["gpu", "cpu"]),
        "ngram": st.sampled_from([Ngram(), Ngram(2, 3, 4)]),
    }
)


@settings(max_examples=25)  # each reads the files anew
@given(one=JOBS, other=JOBS)
def test_the_answer_is_the_same_both_ways_and_never_too_seldom(
    folder: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    """A3-25: whoever asks; without a reason the command lines are equal, and different lines have a reason."""
    first, second = (stamp(launch(mtp(folder, **job))) for job in (one, other))
    there, back = reasons(first, second), reasons(second, first)
    assert bool(there) is bool(back)
    assert there or first["command"] == second["command"]
    assert not reasons(first, copy.deepcopy(first))


# --- the command ---


def ask(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main(["launch", *map(str, words)])
    return int(exit_.value.code or 0), capsys.readouterr().out


def test_the_command_answers_yes_and_no(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [folder / "dflash.gguf", "--target", PAIR / "target", "--server", folder / "llama-server"]
    status, text = ask(capsys, *words, "--json")
    jsonschema.validate(json.loads(text), json.loads((SCHEMAS / "launch.schema.json").read_text()))
    running = tmp_path / "running.json"
    running.write_text(text)
    assert status == 0 and read_stamp(running)["resolved"]["mode"] == "dflash"
    status, text = ask(capsys, *words, "--against", running)
    assert (status, text) == (1, "no reload needed: what runs is what would be started\n")
    status, text = ask(capsys, *words, "--against", running, "--draft-length", "3")
    assert status == 0 and text.splitlines() == [
        "reload needed:",
        "  draft length asked for: none -> 3",
        "  draft length: 7 -> 3",
    ]
    status, text = ask(capsys, *words, "--against", running, "--mode", "off", "--json")
    found = json.loads(text)
    jsonschema.validate(found, json.loads((SCHEMAS / "reload.schema.json").read_text()))
    jsonschema.validate(found["launch"], json.loads((SCHEMAS / "launch.schema.json").read_text()))
    assert found["needed"] and [r["what"] for r in found["reasons"]] == ["drafter", "drafting"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=2), "found schema 'convert-drafter/launch' version 2, expected"),
        (lambda d: d.clear(), "found schema None version None"),
        (lambda d: d.pop("resolved"), "resolved.spec_type, resolved.default, resolved.draft_length, resolved.mode"),
        (lambda d: d["files"].pop("target"), "files.target: missing"),
        (lambda d: d.update(resolved=3), "resolved.spec_type"),
    ],
)
def test_a_stamp_that_is_none(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    data = stamp(launch(dflash(folder)))
    change(data)
    path = tmp_path / "running.json"
    path.write_text(json.dumps(data))
    with pytest.raises(WrongInput, match=says) as found:
        read_stamp(path)
    assert "launch --json" in str(found.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}'])
def test_a_file_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "running.json"
    path.write_text(text)
    with pytest.raises(WrongInput, match=r"running\.json"):
        read_stamp(path)
