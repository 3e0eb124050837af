"""`card`: the page of a repository, from what its files and `verify` say; and its way to the hub (on loopback)."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import COMMIT, FakeHub
from published import PAIR, small_checkpoint
from sample_verdicts import PASSING

from convert_drafter.converters import ConvertJob, WrongInput, convert
from convert_drafter.converters.card import making_command, push, read_card, recipe_of
from convert_drafter.converters.card_page import card_text
from convert_drafter.converters.cli import main
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.verify.reports import report

# huggingface_hub sends a file as httpx2 wants it no more
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMES = ("Q8_0", "Q4_K_M", "Q4_K_M-drafter")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("card")
    out = [folder / f"dflash-tiny-{name}.gguf" for name in NAMES]
    for path, name in zip(out, NAMES, strict=True):
        convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", name, path))
    return out


def verdict(path: Path, out: Path, **changes: Any) -> Path:
    """What `verify` wrote of a file, with invented numbers."""
    out.write_text(json.dumps(report.as_json(replace(PASSING, file=str(path))) | changes))
    return out


def front(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


def test_sums_sizes_and_recipes_are_the_files_(files: list[Path]) -> None:
    text = card_text(read_card(files))
    for path, name in zip(files, NAMES, strict=True):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in text
        assert f"| `{path.name}` | {name} | {path.stat().st_size:,} | " in text
    assert "$ llama-server -m TARGET.gguf -md dflash-tiny-Q8_0.gguf --spec-type draft-dflash" in text
    assert "| file | F32 | Q4_K | Q6_K | Q8_0 |" in text
    assert front(text)["tags"] == ["gguf", "speculative-decoding", "dflash", "llama.cpp"]
    assert "base_model" not in front(text) and "## Acceptance" not in text and "## How it was made" not in text


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q5_K_M", "Q4_K_M-drafter", "Q3_K_L", "IQ4_XS-drafter"])
def test_the_recipe_is_found_again_by_the_types(name: str, tmp_path: Path) -> None:
    """A file tells llama.cpp's number of a family; with and without a drafter's floor it is the same."""
    out = tmp_path / "o.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", name, out))
    found = recipe_of(read_drafter_file(out))
    assert found is not None and RECIPES[found].file_type == RECIPES[name].file_type
    again = tmp_path / "again.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", found, again))
    assert again.read_bytes() == out.read_bytes()


def test_what_was_measured_is_shown_and_nothing_else(files: list[Path], tmp_path: Path) -> None:
    measured = verdict(files[0], tmp_path / "v.json")
    text = card_text(read_card(files, [measured]))
    gate = next(gate for gate in PASSING.gates if gate.name == "acceptance")
    walk: Any = gate.figures["file"]
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{files[0].name}` | {PASSING.engine} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    low, high = walk["length_interval"]
    assert cells[3] == f"{walk['length']:.2f} ({low:.2f} to {high:.2f})" and len(cells) == 6
    assert "%" in cells[5] and " to " in cells[5]
    shares = zip(walk["by_position"], walk["by_position_interval"], strict=True)
    rows = [f"| {i} | {s:.0%} ({low:.0%} to {high:.0%}) |" for i, (s, (low, high)) in enumerate(shares, 1)]
    assert "\n".join(["| position | `dflash-tiny-Q8_0.gguf` |", "|---|---|", *rows]) in text
    assert not [line for line in text.splitlines() if line.startswith(f"| `{files[1].name}` | {PASSING.engine} |")]


def test_engines_that_ran_it_are_named(files: list[Path], tmp_path: Path) -> None:
    settings = {"command": "x", "llama.cpp": {"file": {"llama-server": "b11434"}}, "torch": {"torch": "2.13.0"}}
    both = [verdict(path, tmp_path / f"{path.stem}.json", settings=settings) for path in files[:2]]
    assert "- Verified in llama-server b11434, torch 2.13.0.\n" in card_text(read_card(files, both))
    strange = verdict(files[0], tmp_path / "strange.json", settings=3)
    assert "Verified in" not in card_text(read_card(files, [strange])) + card_text(read_card(files))


def test_positions_of_several_quants_stand_side_by_side(files: list[Path], tmp_path: Path) -> None:
    """Shorter ones end with a dash; a verdict from before there were intervals is shown without."""
    gates = json.loads(json.dumps(report.as_json(PASSING)))["gates"]
    (gate,) = [gate for gate in gates if gate["name"] == "acceptance"]
    gate["figures"]["file"] = {"length": 2.0, "by_position": [0.5, 0.25]}
    older = verdict(files[1], tmp_path / "older.json", gates=gates, engine="llama.cpp")
    text = card_text(read_card(files, [verdict(files[0], tmp_path / "v.json"), older]))
    names = [f"`{path.name}`, {engine}" for path, engine in zip(files, ("torch", "llama.cpp"), strict=False)]
    assert f"| position | {names[0]} | {names[1]} |" in text
    rows = [line for line in text.splitlines() if re.match(r"\| \d \|", line)]
    assert [row.split(" | ")[2].removesuffix(" |") for row in rows[:3]] == ["50%", "25%", "-"]
    assert f"| `{files[1].name}` | llama.cpp | 16 | 2.00 | 3.38 |" in text


def test_a_verdict_of_another_file_or_version_is_refused(files: list[Path], tmp_path: Path) -> None:
    other = verdict(Path("other.gguf"), tmp_path / "other.json")
    with pytest.raises(WrongInput, match=r"other\.json: file: found 'other\.gguf', expected one of dflash-tiny-Q4_K_M"):
        read_card(files, [other])
    newer = verdict(files[0], tmp_path / "newer.json", version=2)
    with pytest.raises(WrongInput, match=r"schema and version: found \('convert-drafter/verdict', 2\)"):
        read_card(files, [newer])


def test_files_of_different_drafters_are_no_repository(files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    convert(ConvertJob(small_checkpoint(tmp_path / "d"), None, "lucebox", "F32", other))
    with pytest.raises(WrongInput, match=r"expected '.*' as .*Q8_0\.gguf has: a card is of one drafter's files"):
        read_card([files[0], other])


def test_names_cannot_break_the_page(files: list[Path]) -> None:
    """A name is somebody else's text."""
    (file,) = read_card(files[:1]).files
    entry = file.drafter.file.keys["general.name"]
    file.drafter.file.keys["general.name"] = replace(entry, value="a|b\n# [x](http://evil) `c` <b>")
    text = card_text(read_card(files[:1]))  # read anew: not changed
    assert "evil" not in text
    hostile = card_text(replace(read_card(files[:1]), files=(file,)))
    (title,) = [line for line in hostile.splitlines() if "evil" in line]
    assert title.startswith("# a\\|b") and "\\[x\\](http" in title and "\\<b\\>" in title


# --- from and to the hub ---


def test_source_and_command_are_pinned(hub: FakeHub, tmp_path: Path) -> None:
    """The command on the page makes the same file again."""
    out = tmp_path / "dflash.gguf"
    convert(ConvertJob(Path("org/drafter"), Path("org/pair"), "llama.cpp", "Q4_K_M", out))
    card = read_card([out], license="apache-2.0")
    text = card_text(card)
    head = front(text)
    said = (head["base_model"], head["base_model_relation"], head["license"])
    assert said == ("org/drafter", "quantized", "apache-2.0")
    command = making_command(card.first)
    assert command == (
        f"convert-drafter convert org/drafter@{COMMIT} --target org/pair@{COMMIT} --for llama.cpp --quant Q4_K_M"
        " -o dflash.gguf"
    )
    assert f"$ {command}\n" in text
    before = out.read_bytes()
    out.unlink()
    with pytest.raises(SystemExit) as done:
        main([*shlex.split(command)[1:-1], str(out)])
    assert done.value.code == 0 and out.read_bytes() == before


def test_settings_are_part_of_the_command(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    job = ConvertJob(
        Path("org/drafter"), Path("org/pair"), "llama.cpp", "F16", out, settings={"max_position_embeddings": "99"}
    )
    convert(job)
    assert "--set max_position_embeddings=99" in str(making_command(read_card([out]).first))


def test_files_and_page_go_up_as_one_commit(
    hub: FakeHub,
    files: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.tokens = {"hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SystemExit) as done:
        main(["card", str(files[0]), str(files[1]), "--push", "me/tiny-GGUF", "--private"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"pushed to {hub.url}/me/tiny-GGUF\n"
    assert hub.uploads.made[0]["visibility"] == "private"
    committed = hub.uploads.committed
    assert committed.keys() == {files[0].name, files[1].name, "README.md"}
    assert all(committed[path.name] == path.read_bytes() for path in files[:2])
    assert committed["README.md"].decode() == card_text(read_card(files[:2]))
    sums = {hashlib.sha256(path.read_bytes()).hexdigest(): path.stat().st_size for path in files[:2]}
    assert hub.uploads.received == sums and not hub.uploads.leaked


def test_large_files_go_up_in_parts(hub: FakeHub, files: list[Path]) -> None:
    hub.uploads.part_size = 500_000
    card = read_card(files[:1])
    push(card, card_text(card), "me/tiny")
    size = files[0].stat().st_size
    assert hub.uploads.committed[files[0].name] == files[0].read_bytes()
    assert len(hub.uploads.received) == -(-size // 500_000) > 3 and sum(hub.uploads.received.values()) == size


def test_what_is_there_is_not_sent_again(hub: FakeHub, files: list[Path]) -> None:
    """A commit that was refused costs no second upload."""
    hub.uploads.refuse["commit"] = 403
    card = read_card(files[:2])
    with pytest.raises(WrongInput, match=r"--push me/tiny: .*403.*; `hf auth login` or HF_TOKEN with the right"):
        push(card, card_text(card), "me/tiny")
    assert not hub.uploads.committed
    hub.uploads.refuse.clear()
    push(card, card_text(card), "me/tiny")
    assert hub.uploads.committed.keys() == {files[0].name, files[1].name, "README.md"}
    assert sum(hub.uploads.received.values()) == sum(path.stat().st_size for path in files[:2])


@pytest.mark.parametrize("parts", [0, 500_000])
def test_an_upload_that_breaks_off_is_sent_again(hub: FakeHub, files: list[Path], parts: int) -> None:
    hub.uploads.breaks, hub.uploads.part_size = 3, parts
    card = read_card(files[:1])
    push(card, card_text(card), "me/tiny")
    assert hub.uploads.committed[files[0].name] == files[0].read_bytes()


AGAIN = "nothing was committed; run it again: what arrived whole is not sent twice"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"breaks": 1000}, rf"Error while uploading '.*Q8_0\.gguf' to the Hub\. .*; {AGAIN}$"),
        ({"refuse": {"storage": 503}}, rf"Error while uploading .*503.*; {AGAIN}$"),
        ({"refuse": {"storage": 403}}, r"Error while uploading .*403.*; `hf auth login` or HF_TOKEN"),
        ({"refuse": {"batch": 403}}, r"--push me/tiny: .*403.*; `hf auth login` or HF_TOKEN"),
        ({"spoil": True}, r"Error while uploading .*422.*has a file changed meanwhile\? run it again$"),
    ],
)
def test_an_upload_that_fails_is_one_line(
    hub: FakeHub, files: list[Path], broken: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.uploads = replace(hub.uploads, **broken)
    with pytest.raises(SystemExit) as done:
        main(["card", str(files[0]), "--push", "me/tiny"])
    (line,) = capsys.readouterr().err.splitlines()
    assert done.value.code == 3 and re.search(said, line), line
    assert not hub.uploads.committed


def test_a_storage_that_refuses_by_xet_is_one_line(
    hub: FakeHub, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's other way up, which ends in exceptions of its own; this hub gives it no token."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    card = read_card(files[:1])
    with pytest.raises(WrongInput, match=r"--push me/tiny: .*404.*; `hf auth login` or HF_TOKEN with the right"):
        push(card, card_text(card), "me/tiny")
    assert not hub.uploads.committed


def test_the_page_cannot_have_another_sum_than_its_file(hub: FakeHub, files: list[Path], tmp_path: Path) -> None:
    """A file that changed after it was hashed is not committed."""
    path = tmp_path / "a-Q8_0.gguf"
    path.write_bytes(files[0].read_bytes())
    card = read_card([path])
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(WrongInput, match="has a file changed meanwhile"):
        push(card, card_text(card), "me/tiny")
    assert not hub.uploads.committed


def test_two_files_of_one_name_are_no_repository(files: list[Path], tmp_path: Path) -> None:
    other = tmp_path / files[0].name
    other.write_bytes(files[0].read_bytes())
    with pytest.raises(WrongInput, match=r"Q8_0\.gguf: its name is another file's as well"):
        read_card([files[0], other])


def test_a_push_without_the_right_is_one_message(hub: FakeHub, files: list[Path]) -> None:
    hub.tokens = {"hf_secret"}
    card = read_card(files[:1])
    with pytest.raises(WrongInput, match=r"--push me/tiny: .*401.*; `hf auth login` or HF_TOKEN"):
        push(card, card_text(card), "me/tiny")


def test_the_page_is_written_whole_and_over_no_input(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "README.md"
    with pytest.raises(SystemExit) as done:
        main(["card", str(files[0]), "-o", str(out)])
    assert done.value.code == 0 and out.read_text() == card_text(read_card(files[:1]))
    before = files[0].read_bytes()
    with pytest.raises(SystemExit) as done:
        main(["card", str(files[0]), "-o", str(files[0])])
    assert done.value.code == 2 and files[0].read_bytes() == before
