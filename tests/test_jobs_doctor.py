"""`doctor --jobs`: what would fail at night is found before it, and nothing is changed (T-35)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from batches import jobs_file
from other_tokenizers import swapped, write_tokenizer
from published import PAIR, small_checkpoint, small_config, write_checkpoint

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.batch import preflight as module
from convert_drafter.converters.batch.preflight import Preflight, preflight
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show_batch
from convert_drafter.converters.commands.jobs_file import survey_jobs
from convert_drafter.converters.errors import MissingEngine

SCHEMA = json.loads((Path(module.__file__).parent / "doctor.schema.json").read_text())
JOB = '[[job]]\nname = "a"\nsource = "source"\nfor = "lucebox"\nquant = "BF16"\nout = "new/folder/a.gguf"\n'
QUANTIZE = '[[job]]\nname = "q"\ndo = "quantize"\nsource = "new/folder/a.gguf"\nquant = "Q8_0"\nout = "q.gguf"\n'


def look(folder: Path, text: str) -> Preflight:
    found = preflight(*survey_jobs(jobs_file(folder, text)))
    jsonschema.validate(show_batch.preflight_json(folder / "jobs.toml", found), SCHEMA)
    return found


def faults(folder: Path, text: str) -> list[str]:
    return [fault for check in look(folder, text).checks for fault in check.faults]


def everything(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


def test_a_batch_that_can_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jobs_file(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--jobs", str(path)])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[1].startswith("  ok     first-BF16 (convert; job 'first', line 5): ")
    assert shown.endswith("\n3 tasks can begin\n")
    assert all(len(line) <= 80 for line in shown.splitlines()[1:])
    assert everything(tmp_path) == before


def nothing(place: Path) -> None:
    pass


def a_file(place: Path) -> None:
    place.write_text("text")


def empty(place: Path) -> None:
    place.mkdir()


def no_weights(place: Path) -> None:
    shutil.copytree(PAIR / "drafter", place, ignore=shutil.ignore_patterns("*.safetensors"))


def no_config(place: Path) -> None:
    shutil.copytree(PAIR / "drafter", place, ignore=shutil.ignore_patterns("config.json"))


def broken_link(place: Path) -> None:
    place.symlink_to(place.with_name("nowhere"))


def no_tensor(place: Path) -> None:
    write_checkpoint(place, small_config(), {})


PLACES: list[tuple[Callable[[Path], None], str]] = [
    (nothing, "there is nothing of this name; expected a checkpoint's folder"),
    (a_file, "expected a checkpoint's folder or its .safetensors file; for a file beside config.json give the folder"),
    (empty, "no weights: looked for"),
    (no_weights, "no weights: looked for"),
    (no_config, "config.json: not found; download it with the weights"),
    (broken_link, "there is nothing of this name"),
    (no_tensor, "found no tensor in model.safetensors"),
]


@pytest.mark.parametrize(("place", "message"), PLACES, ids=[place.__name__ for place, _ in PLACES])
def test_a_source_has_config_and_weights(tmp_path: Path, place: Callable[[Path], None], message: str) -> None:
    """T-35: that something is there is too little."""
    place(tmp_path / "source")
    (found,) = faults(tmp_path, JOB)
    assert found.startswith(str(tmp_path / "source"))
    assert message in found


VERIFY = '[[job]]\nname = "v"\ndo = "verify"\nfile = "a.gguf"\ntarget = "target"\nengine = "torch"\n'


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (nothing, "target: nothing there, expected the target's folder or its GGUF file"),
        (a_file, "target: "),
        (empty, "target: an empty folder, expected the target's Hugging Face files"),
        (no_config, "target: no config.json in it"),
        (broken_link, "target: a link to nothing"),
    ],
)
def test_a_target_has_config_and_weights(
    tmp_path: Path, place: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_engine", lambda name, job: None)
    place(tmp_path / "target")
    assert any(message in fault for fault in faults(tmp_path, VERIFY.replace('engine = "torch"\n', "")))


def test_a_target_without_weights_serves_a_conversion_but_no_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_engine", lambda name, job: None)
    shutil.copytree(PAIR / "target", tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "source").symlink_to(PAIR / "drafter")
    job = JOB.replace("lucebox", "llama.cpp") + 'target = "target"\n'
    assert faults(tmp_path, job) == []
    (found,) = faults(tmp_path, job + "verify = true\n")
    assert found.startswith(f"{tmp_path}/target: no weights: looked for")


def test_engines_prompts_and_files_of_a_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, job: object) -> None:
        raise MissingEngine(f"the {name} engine needs something")

    monkeypatch.setattr(module, "find_engine", missing)
    (tmp_path / "target").symlink_to(PAIR / "target")
    text = VERIFY + 'prompts = "absent.txt"\nsource = "absent"\n'
    found = faults(tmp_path, text)
    assert found[0] == "the torch engine needs something"
    assert [any(word in fault for fault in found) for word in ("absent.txt", "/absent:", "a.gguf")] == [True] * 3
    (wrong,) = [f for f in faults(tmp_path, VERIFY.replace('"torch"', '"llama.cpp"')) if "--engine" in f]
    assert wrong == "--engine llama.cpp runs the target from a GGUF: give that with --target"


def test_contradictions_of_a_conversion(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "source")
    assert faults(tmp_path, JOB) == []
    assert "rope theta" in faults(tmp_path, JOB + 'set.rope_parameters.rope_theta = "null"\n')[0]
    assert "heads" in faults(tmp_path, JOB + "set.num_key_value_heads = 3\n")[0]
    assert "tokenizer" in faults(tmp_path, JOB.replace("lucebox", "llama.cpp"))[0]
    attached = faults(tmp_path, JOB + f'attach = "{PAIR}/drafter/model.safetensors"\n')
    assert "--attach: a dflash drafter is a model of its own, expected an MTP head" in attached
    assert "tensor-type" in faults(tmp_path, JOB + "tensor-type = { nothing-like-it = 'Q8_0' }\n")[0]


def test_a_kind_without_a_cell(tmp_path: Path) -> None:
    (tmp_path / "source").symlink_to(PAIR.parent / "pair-eagle3")
    (found,) = faults(tmp_path, JOB + f'target = "{PAIR}/target"\n')
    assert "lucebox has no loader for eagle3 drafters; it loads: dflash" in found


def test_problems_of_the_file_itself_are_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jobs_file(tmp_path, JOB.replace("source =", "suorce ="))
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--jobs", str(path)])
    assert exit_.value.code == 1
    shown = capsys.readouterr().out
    assert "  FAULT  job 'a', line 1: suorce: found a key that nobody reads; did you mean\n         source?" in shown
    assert shown.endswith("2 problems of the file itself\n")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "source")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    assert "is a folder, expected the name of a file" in faults(tmp_path, JOB.replace("new/folder/a", "folder"))[0]
    assert f"{tmp_path}/file is no folder" in faults(tmp_path, JOB.replace("new/folder", "file/more"))[0]
    same = JOB.replace("new/folder/a.gguf", "source/model.safetensors")
    assert "is the same file as the source" in faults(tmp_path, same)[0]
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "no file can be made" in faults(tmp_path, JOB.replace("new/folder", "closed"))[0]


def test_space_for_every_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_checkpoint(tmp_path / "source")
    (disk,) = look(tmp_path, JOB).disks
    (both,) = look(tmp_path, JOB + QUANTIZE).disks
    assert both.needed == 2 * disk.needed  # at most as much as its source, which is not there yet
    with pytest.raises(SystemExit):
        main(
            ["convert", str(tmp_path / "source"), "--for", "lucebox", "--quant", "BF16", "-o", str(tmp_path / "a.gguf")]
        )
    size = (tmp_path / "a.gguf").stat().st_size
    assert size <= disk.needed < size * 1.1
    (again,) = look(tmp_path, JOB.replace("new/folder/", "")).disks
    assert size * 0.9 < again.needed <= disk.needed  # it grows beside the old one
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk.needed - 1))
    found = look(tmp_path, JOB)
    assert found.faulty
    assert show_batch.preflight(Path("jobs.toml"), found).endswith("\nnot enough space")


def test_jobs_name_their_targets_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--jobs", str(jobs_file(tmp_path)), "--target", "x"])
    assert exit_.value.code == 2
    assert "leave --target and --source out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--jobs", str(jobs_file(tmp_path)), "--parallel", "2"])
    assert exit_.value.code == 2 and "only --strict and --json go with it" in capsys.readouterr().err


def test_jobs_may_stand_in_any_order(tmp_path: Path) -> None:
    """A batch waits for what a later job makes, so this is no fault; and they are told in the file's order."""
    small_checkpoint(tmp_path / "source")
    found = look(tmp_path, QUANTIZE + JOB)
    assert [check.task.name for check in found.checks] == ["q", "a"] and not found.faulty
    assert "is made by an earlier task" in found.checks[0].notes[0]
    assert found.checks[0].n_bytes == found.checks[1].n_bytes


def test_what_waits_for_a_job_that_cannot_begin_cannot_either(tmp_path: Path) -> None:
    found = look(tmp_path, JOB + QUANTIZE)
    assert [check.faults[-1] for check in found.checks][1:] == ["waits for a, which cannot begin"]
    assert found.checks[1].n_bytes is None
    assert show_batch.preflight(Path("jobs.toml"), found).endswith("\n2 of 2 tasks cannot begin")


def test_a_drafter_with_another_vocabulary(tmp_path: Path) -> None:
    """A2-23: the gate of `doctor DRAFTER --target T` is asked of every job."""
    shutil.copytree(PAIR / "drafter", tmp_path / "source")
    job = JOB.replace("lucebox", "llama.cpp") + f'target = "{PAIR}/target"\n'
    assert faults(tmp_path, job) == []
    write_tokenizer(tmp_path / "source", swapped)
    (found,) = faults(tmp_path, job)
    assert found.startswith("tokenizer: not target's: sha256 of the vocabularies: ")


def test_a_verification_of_another_target_s_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A2-23: pairing is asked before a pair that is none is run all night."""
    monkeypatch.setattr(module, "find_engine", lambda name, job: None)
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "Q8_0", tmp_path / "a.gguf"))
    (tmp_path / "target").symlink_to(PAIR / "target")
    assert faults(tmp_path, VERIFY) == []
    (tmp_path / "target").unlink()
    shutil.copytree(PAIR / "target", tmp_path / "target")
    write_tokenizer(tmp_path / "target", swapped)
    (found,) = faults(tmp_path, VERIFY)
    assert found.startswith("pairing: not ") and "tokens differ" in found


def test_strict_makes_warnings_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T-36."""
    small_checkpoint(tmp_path / "source", never_heard_of=1)
    path = jobs_file(tmp_path, JOB)
    codes = []
    for words in ([], ["--strict"]):
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", "--jobs", str(path), *words])
        codes.append(exit_.value.code)
    assert codes == [0, 1] and "never_heard_of" in capsys.readouterr().out
