"""How `scan` looks: 80 columns for people, a documented schema for programs, and an exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mtp_checkpoints import small
from scan_tree import drafter_gguf, everything, small_gguf

from convert_drafter.converters import scan
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show_scan
from convert_drafter.converters.scan.found import Scan
from convert_drafter.converters.scan.report import SCHEMA_FILE, VERSION, as_json

SCHEMA = json.loads(SCHEMA_FILE.read_text())
DOCS = (Path(__file__).parent.parent / "docs" / "scan.md").read_text()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    root = everything(tmp_path_factory.mktemp("m"))
    small(root / "Qwen3.5-Tiny")
    return scan(root)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return int(str(exit_.value.code)), out, err


def test_a_table_fits_80_columns(found: Scan) -> None:
    lines = show_scan.scanned(found).splitlines()
    wide = [line for line in lines if len(line) > show_scan.WIDTH]
    assert all(line.split() in (line.split()[:1], [*line.split()[:1], "\\"]) for line in wide)  # one argument: a path
    assert all(line.rstrip() == line for line in lines)


def test_every_copy_and_every_fault_is_shown(found: Scan) -> None:
    text = re.sub(r"\s+", "", show_scan.scanned(found))
    for each in found.artifacts:
        assert re.sub(r"\s+", "", str(each.path.relative_to(found.root))) in text
        for remark in (*each.faults, *each.notes):
            assert re.sub(r"\s+", "", remark) in text
    for skipped in found.skipped:
        assert re.sub(r"\s+", "", skipped.reason) in text
    assert "MTPheadinside(mtp-qwen35)" in text and "forQwen3-Tiny,asitrecords" in text


def test_a_command_can_be_copied(found: Scan) -> None:
    """Lines that end in a backslash are one command to a shell."""
    text = show_scan.scanned(found).replace("\\\n", " ")
    (mend,) = {each.mend for each in found.artifacts if each.mend}
    assert mend.split() in [line.split() for line in text.splitlines()]


def test_json_is_what_its_schema_says(found: Scan) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = json.loads(json.dumps(as_json(found)))
    jsonschema.validate(data, SCHEMA)
    assert data["version"] == SCHEMA["properties"]["version"]["const"] == VERSION
    assert data["counts"]["variants"] == sum(len(model["variants"]) for model in data["models"])
    assert {pair["basis"] for pair in data["pairs"]} >= {"inside", "recorded", "shapes", "name"}
    drafters = [model for model in data["models"] if model["what"] == "drafter"]
    assert drafters and all(model["ui"] == {"role": "draft"} and not model["standalone_deploy"] for model in drafters)


def test_the_schema_takes_nothing_else(found: Scan) -> None:
    data: dict[str, Any] = json.loads(json.dumps(as_json(found)))
    data["models"][0]["variants"][0]["new"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, SCHEMA)


def test_every_field_is_documented() -> None:
    """Each with a row of its own in docs/scan.md."""
    places = [SCHEMA, *(SCHEMA["$defs"][name] for name in ("model", "variant", "pair"))]
    for place in places:
        for name in place["properties"]:
            assert re.search(rf"^\| `{name}`", DOCS, re.MULTILINE), name
    assert f"version {VERSION}" in DOCS


def test_exit_status_and_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Faults are entries and no failure; a scan that cannot be made is one."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    code, out, err = run(capsys, "scan", str(tmp_path))
    assert (code, err) == (0, "") and "1 with faults (!)" in " ".join(out.split())
    code, out, err = run(capsys, "scan", str(tmp_path), "--json")
    assert (code, err) == (0, "") and json.loads(out)["counts"]["faulty"] == 1
    code, out, err = run(capsys, "scan", str(tmp_path / "broken.gguf"))
    assert (code, out) == (2, "") and err.startswith("error: ") and "`inspect` reads one file" in err
    code, out, err = run(capsys, "scan", str(tmp_path), "--catalog", str(tmp_path / "no.yaml"))
    assert (code, out) == (3, "") and "no.yaml: cannot be read" in err


def test_a_folder_without_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "readme.txt").write_text("nothing")
    code, out, _ = run(capsys, "scan", str(tmp_path))
    assert code == 0 and "no model in it: looked for .safetensors and .gguf files" in " ".join(out.split())


def test_names_cannot_speak_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_gguf(tmp_path / "m\x1b[31mred\x07.gguf", general__name="\x1b]0;title\x07")
    _, out, _ = run(capsys, "scan", str(tmp_path))
    assert "\x1b" not in out and "\x07" not in out and "\\x1b[31mred" in out


def test_several_drafters_of_one_model_for_several_targets(tmp_path: Path) -> None:
    """What differs between copies is said at each copy."""
    drafter_gguf(tmp_path / "X-DFlash-BF16.gguf")
    small_gguf(tmp_path / "X-DFlash-Q4_K_M.gguf", "dflash", ("fc.weight",))
    small_gguf(tmp_path / "X.gguf")
    text = show_scan.scanned(scan(tmp_path))
    assert text.count("for X, by its name alone") == 1
