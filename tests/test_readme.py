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
BATCH_PAGE = (ROOT / "docs" / "batch.md").read_text()
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


def test_make_rules_skip_by_stamp(tmp_path: Path) -> None:
    """The Makefile's pattern rules, with a virtual environment that is already there."""
    jobs = re.search(r"```make\n((?:.*\n)*?)```", BATCH_PAGE)
    command = re.search(r"^\$ make (.+)$", BATCH_PAGE, re.MULTILINE)
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

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *words], cwd=tmp_path, capture_output=True, text=True, env=environment)

    assert make(*shlex.split(command[1])).returncode == 0
    names = [f"tiny-{recipe}.gguf{end}" for recipe in ("BF16", "Q8_0") for end in ("", ".stamp.json")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    for words, made in ((), False), (("RUNTIME=lucebox",), True), (("RUNTIME=lucebox",), False):
        os.utime(tmp_path / "out" / "tiny-Q8_0.gguf", (1, 1))
        done = make("out/tiny-Q8_0.gguf", *words)
        assert (done.returncode, "out/tiny-Q8_0.gguf is up to date\n" in done.stdout) == (0, not made)
        assert ((tmp_path / "out" / "tiny-Q8_0.gguf").stat().st_mtime > 1) is made
    missing = make("out/other-Q8_0.gguf")
    assert missing.returncode != 0
    assert "set SRC_other to the checkpoint of other" in missing.stderr


@pytest.mark.parametrize("name", ["README.md", "docs/batch.md"])
def test_batch_commands_do_what_the_pages_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The nightly recipe, and the page's own example, with the page's jobs.toml."""
    jobs = re.search(r"```toml\n((?:.*\n)*?)```", BATCH_PAGE)
    shown = re.search(r"```text\n((?:.*\n)*?)```", BATCH_PAGE)
    assert jobs is not None and shown is not None
    (tmp_path / "jobs.toml").write_text(jobs[1])
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(?:- run: |\$ )(convert-drafter .*)$", (ROOT / name).read_text(), re.MULTILINE)
    commands = [part for line in lines for part in line.split(" && ") if "jobs.toml" in part]
    assert len(commands) == (2 if name == "README.md" else 1)
    for _ in range(2):
        for command in commands:
            with pytest.raises(SystemExit) as exit_:
                main(shlex.split(command)[1:])
            assert exit_.value.code == 0
        out = capfd.readouterr().out
    assert out.endswith(shown[1])


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
