"""Modes in every spelling, and what a server can do of them, by the ids of the systems that behave so."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from fake_llama_server import make, notes
from hypothesis import given
from hypothesis import strategies as st
from server_helps import CURRENT, HELPS, LIST, abilities

from convert_drafter.converters.launch.abilities import Flavour, can, devices, flavour, unprobed
from convert_drafter.converters.launch.modes import DRAFTERS, MODES, NGRAMS, SPEC_TYPES, canonical, unknown, ways_of
from convert_drafter.converters.verify.in_llama_cpp.probe import Abilities, Known, parse_help, probe


@pytest.mark.parametrize("mode", [*MODES, "mtp+ngram", "dflash+ngram-simple"])
def test_a_canonical_mode_is_itself(mode: str) -> None:
    """A3-1."""
    assert canonical(mode) == mode


@pytest.mark.parametrize(
    ("spelling", "mode"),
    [
        pytest.param("default", "auto", id="A3-2 default"),
        pytest.param("draft-mtp", "mtp", id="A3-2 draft-mtp"),
        pytest.param("draft-dflash", "dflash", id="A3-2 draft-dflash"),
        pytest.param("ngram-mod", "ngram", id="A3-2 ngram-mod"),
        pytest.param("ngram-mod,draft-mtp", "mtp+ngram", id="A3-3 list"),
        pytest.param("draft-mtp,ngram-mod", "mtp+ngram", id="A3-3 the other way round"),
        pytest.param("draft-mtp,mtp", "mtp", id="A3-3 twice the same"),
        pytest.param("ngram-mod,ngram", "ngram", id="A3-3 twice the same ngram"),
        pytest.param("none,draft-mtp", "mtp", id="A3-3 none beside another"),
        pytest.param("  AUTO  ", "auto", id="A3-4 case and white space"),
        pytest.param("MTP+Ngram", "mtp+ngram", id="A3-4 plus"),
        pytest.param(" Draft-DFlash ,  ngram-simple", "dflash+ngram-simple", id="A3-4 inside a list"),
        pytest.param(None, None, id="A3-5 None"),
        pytest.param("", None, id="A3-5 empty"),
        pytest.param("   ", None, id="A3-5 white space"),
        pytest.param(",", None, id="A3-5 a comma"),
        pytest.param(42, None, id="A3-5 a number"),
        pytest.param(0, None, id="A3-5 zero"),
        pytest.param(True, None, id="A3-5 True"),
        pytest.param("bogus", "auto", id="A3-5 unknown"),
        pytest.param("mtp,bogus", "auto", id="A3-5 unknown in a list"),
        pytest.param(False, "off", id="T-31 False"),
        pytest.param("false", "off", id="T-31 false"),
        pytest.param("0", "off", id="T-31 0"),
    ],
)
def test_every_spelling_has_its_mode(spelling: object, mode: str | None) -> None:
    assert canonical(spelling) == mode


@pytest.mark.parametrize("word", ["none", "None", "NONE", "  none  ", "disable", "Disabled", "DISABLED", "off", "no"])
def test_no_is_no(word: str) -> None:
    """A3-2, T-31: taken for the default, it turned drafting on."""
    assert canonical(word) == "off" and not unknown(word)


def test_unknown_words_are_told() -> None:
    assert unknown("mtp,bogus+ngram-mod") == ("bogus",)
    assert not unknown("draft-mtp") and not unknown(None) and not unknown(42)


@given(st.one_of(st.text(), st.lists(st.sampled_from([*MODES, "draft-mtp", "none", "x"])).map(",".join), st.booleans()))
def test_canonical_is_settled(value: object) -> None:
    """A3-1: once canonical, always; its ways are known to the server by a name."""
    mode = canonical(value)
    assert canonical(mode) == mode
    if mode is not None:
        assert mode in MODES or len(ways_of(mode)) > 1
        assert set(ways_of(mode)) <= set(SPEC_TYPES)


# --- abilities ---


def test_asked_once_until_the_file_changes(tmp_path: Path) -> None:
    """A3-6: the same path and time, kept; newer, asked again."""
    program = make(tmp_path, help=CURRENT)
    assert probe(program) is probe(program)
    assert can(probe(program), "mtp").known is Known.YES
    make(tmp_path, help=HELPS["current without MTP"])
    os.utime(program, ns=(1, time.time_ns() + 10**9))
    assert can(probe(program), "mtp").known is Known.NO
    assert sum("probed" in entry for entry in notes(program)) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("current", Flavour.CURRENT, id="A3-8 current; A3-7 removed flags do not count"),
        pytest.param("legacy", Flavour.LEGACY, id="A3-8 legacy"),
        pytest.param("neither", Flavour.NEITHER, id="A3-8 neither"),
    ],
)
def test_flavours(name: str, expected: Flavour) -> None:
    assert flavour(abilities(name)) is expected


def test_without_either_spelling_there_is_no_ngram() -> None:
    """A3-8."""
    assert can(abilities("neither"), "ngram").known is Known.NO


@pytest.mark.parametrize(
    ("name", "token"),
    [("current", "draft-mtp"), ("legacy", "mtp"), ("current without MTP", None), ("legacy, no type", None)],
    ids=["A3-9 new token", "A3-9 older token", "A3-9 none", "A3-9 too old"],
)
def test_the_token_of_mtp(name: str, token: str | None) -> None:
    found = abilities(name)
    assert found.spec_type("draft-mtp") == token
    assert can(found, "mtp").known is (Known.YES if token else Known.NO)


def test_a_missing_program_is_no_error(tmp_path: Path) -> None:
    """A3-9, T-33: not found is not no."""
    found = probe(tmp_path / "nothing")
    assert not found.found
    assert {can(found, way).known for way in (*DRAFTERS, *NGRAMS)} == {Known.UNKNOWN}


def test_what_could_not_be_asked_is_unknown_with_the_reason() -> None:
    """T-33."""
    found = can(unprobed("--help did not end"), "mtp")
    assert found.known is Known.UNKNOWN and found.reason == "--help did not end"
    placeholder = Abilities(True, flags=parse_help(CURRENT.replace(LIST, "TYPE")))
    found = can(placeholder, "mtp")
    assert found.known is Known.UNKNOWN and "lists no types" in found.reason


H100 = "  CUDA{}: NVIDIA H100 (PCIe) (81089 MiB, 80000 MiB free)\n"
BLAS = "  BLAS: OpenBLAS (0 MiB, 0 MiB free)\n"
DEVICES: dict[str, tuple[str, Known, int | None]] = {
    "none": ("Available devices:\n  (none)\n", Known.NO, None),
    "one": (f"Available devices:\n{H100.format(0)}", Known.YES, 81089 * 2**20),
    "two": (f"Available devices:\n{BLAS}{H100.format(0)}{H100.format(1)}", Known.YES, 2 * 81089 * 2**20),
    "one of no size": ("Available devices:\n  HTP0: Hexagon (0 MiB, 0 MiB free)\n", Known.YES, None),
    "one that is not told": ("Available devices:\n  CUDA0: NVIDIA H100\n", Known.YES, None),
    "the processor's own": (f"Available devices:\n{BLAS}", Known.NO, None),
    "garbage": ("what?\n", Known.UNKNOWN, None),
}


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name: str, tmp_path: Path) -> None:
    """All devices' memory; a mathematics library is listed as one, and is none that a model could lie in."""
    text, known, memory = DEVICES[name]
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\n")
    program.chmod(0o755)
    found = devices(program, abilities("current"))
    assert found.gpu.known is known and (known is not Known.UNKNOWN or found.gpu.reason)
    assert found.memory == memory


@pytest.mark.parametrize("name", ["legacy", "unprobed", "gone"])
def test_devices_that_cannot_be_told(name: str, tmp_path: Path) -> None:
    """T-33."""
    known: Any = unprobed() if name == "unprobed" else abilities("current" if name == "gone" else name)
    found = devices(tmp_path / "nothing", known).gpu
    assert found.known is Known.UNKNOWN and found.reason
