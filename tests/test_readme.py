"""The README's commands are run and its tables are compared with the code (T-68, R2)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fake_llama_server
import pytest
from server_helps import CURRENT

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show
from convert_drafter.converters.recipes import RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES_PAGE = (ROOT / "docs" / "recipes.md").read_text()
DRAFTERS_PAGE = (ROOT / "docs" / "drafters.md").read_text()
TABLES = {"kinds": DRAFTERS_PAGE, "dialects": DRAFTERS_PAGE, "recipes": RECIPES_PAGE, "kept": RECIPES_PAGE}
EXAMPLE = re.compile(r"<!-- run(?:: (?P<how>[^>]+))? -->\n```console\n\$ (?P<command>.+)\n(?P<output>(?:.*\n)*?)```")
ENGINE = "engine "  # an example that needs torch
EXAMPLES = [
    pytest.param(
        m, id=" ".join(m["command"].split()[:2]), marks=[pytest.mark.engine] * (m["how"] or "").startswith(ENGINE)
    )
    for m in EXAMPLE.finditer(README)
    if m["how"] != "make"
]


def markdown_table(what: str) -> str:
    """A table of `convert-drafter list` as the README shows it."""
    rows = show.LISTS[what]()
    head = [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
    return "\n".join([*head, *(f"| {' | '.join(row.values())} |" for row in rows)])


@pytest.mark.parametrize("what", TABLES)
def test_tables_are_the_code_s(what: str) -> None:
    assert f"<!-- table: {what} -->\n{markdown_table(what)}\n" in TABLES[what]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the fixtures in it, where a command of the README works as it stands."""
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    pair = Path("fixtures/pair")
    (tmp_path / "bin").mkdir()
    fake_llama_server.make(tmp_path / "bin", help=CURRENT)  # whatever is installed on this machine
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for recipe in ("BF16", "Q8_0"):
        convert(ConvertJob(pair / "drafter", pair / "target", "llama.cpp", recipe, Path(f"dflash-tiny-{recipe}.gguf")))
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_the_readme_says(
    example: re.Match[str], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *arguments = shlex.split(example["command"])
    assert program == "convert-drafter"
    how = (example["how"] or "").removeprefix(ENGINE)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == (int(how.split()[1]) if how.startswith("exit") else 0)
    found = "".join(capsys.readouterr())
    assert found.startswith(example["output"]) if how == "first lines" else found == example["output"]


def test_batch_example_makes_its_files(tmp_path: Path) -> None:
    """The Makefile's pattern rules, with a virtual environment that is already there."""
    jobs = re.search(r"```make\n((?:.*\n)*?)```", README)
    command = re.search(r"<!-- run: make -->\n```console\n\$ make (.+)\n", README)
    assert jobs is not None and command is not None
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    (tmp_path / "jobs.mk").write_text(jobs[1])
    tool = tmp_path / ".venv" / "bin" / "convert-drafter"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m convert_drafter.converters.cli "$@"\n')
    tool.chmod(0o755)
    (tool.parent / "python").symlink_to(sys.executable)
    (tmp_path / ".venv" / ".installed").touch()
    environment = {**os.environ, "MAKEFLAGS": ""}
    subprocess.run(["make", *shlex.split(command[1])], cwd=tmp_path, check=True, capture_output=True, env=environment)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".for-llama.cpp",
        "tiny-BF16.gguf",
        "tiny-Q8_0.gguf",
    ]
    first = (tmp_path / "out" / "tiny-Q8_0.gguf").stat().st_mtime_ns
    again = [["make", "out/tiny-Q8_0.gguf"], ["make", "out/tiny-Q8_0.gguf", "RUNTIME=lucebox"]]
    for command_line, made in zip(again, (False, True), strict=True):
        subprocess.run(command_line, cwd=tmp_path, check=True, capture_output=True, env=environment)
        assert ((tmp_path / "out" / "tiny-Q8_0.gguf").stat().st_mtime_ns > first) is made
    missing = subprocess.run(
        ["make", "out/other-Q8_0.gguf"], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert missing.returncode != 0
    assert "set SRC_other to the checkpoint of other" in missing.stderr


def test_batch_rules_are_there_for_every_recipe() -> None:
    """R2."""
    listed = re.search(r"^RECIPES := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    assert listed[1].replace("\\\n", " ").split() == list(RECIPES)


def test_readme_stays_short() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("command", re.findall(r"^\$ make ([a-z-]+)(?= |$)", README, re.MULTILINE))
def test_make_commands_exist(command: str) -> None:
    assert f"\n{command}:" in (ROOT / "Makefile").read_text()


def test_python_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n((?:.*\n)*?)```", README)
    assert code is not None
    (workplace / "drafter").symlink_to(ROOT / "fixtures" / "pair" / "drafter")
    (workplace / "target").symlink_to(ROOT / "fixtures" / "pair" / "target")
    exec(compile(code[1], "README.md", "exec"), {})
    assert "llama-server" in capsys.readouterr().out
