"""The command's first step: Ctrl-C in the middle of its imports is answered as at any other time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# tells when it has an answer: the very first thing it does; a test run in the background may have SIGINT ignored
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from convert_drafter.entry import main
before = signal.signal
signal.signal = lambda *arguments: (before(*arguments), print("ready", flush=True))
main()
"""
# a module that its imports come by, and that takes its time
SLOW = "import time, sys\nprint('importing', flush=True)\ntime.sleep(30)\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The package as it is here, whatever is installed."""
    (links := tmp_path / "links" / "convert_drafter").mkdir(parents=True)
    for name in ("converters", "entry", "quant"):
        (links / name).symlink_to(ROOT / name)
    return {**os.environ, "PYTHONPATH": str(links.parent)}


def started(environment: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", START, *words], stdout=-1, stderr=-1, env=environment)


def interrupted(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (130, b"error: interrupted; nothing was left behind")


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1])
def test_ctrl_c_at_once(environment: dict[str, str], seconds: float) -> None:
    """Its imports take a third of a second, and nothing that follows is a traceback."""
    process = started(environment, "convert", "--help")
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    if process.poll() is None:
        interrupted(process)


def test_ctrl_c_in_an_import(environment: dict[str, str], tmp_path: Path) -> None:
    """For certain in the middle of one: `rich` is one that waits."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "rich.py").write_text(SLOW)
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "slow"), environment["PYTHONPATH"]])
    process = started(environment, "list")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"ready\n", b"importing\n"]
    interrupted(process)


def test_the_command_runs_as_ever(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from convert_drafter.entry import main; main()", "quantize", "a", "b", "Q9"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 2 and "found 'Q9', expected a recipe" in done.stderr
    assert max(map(len, done.stderr.splitlines()[4:])) <= 80


def test_who_wants_ctrl_c_ignored_is_obeyed(environment: dict[str, str]) -> None:
    """As a shell starts jobs in the background."""
    ignoring = START.replace("signal.default_int_handler", "signal.SIG_IGN")
    process = subprocess.Popen([sys.executable, "-c", ignoring, "--version"], stdout=-1, stderr=-1, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
