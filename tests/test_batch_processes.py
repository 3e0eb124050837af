"""Batches on real processes: interrupted, killed and out of memory, and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import MIDDLE, jobs_file, killed_once, killed_second

from convert_drafter.converters.batch import processes, schedule
from convert_drafter.converters.batch.crew import local
from convert_drafter.converters.batch.processes import Processes, ProcessLost
from convert_drafter.converters.batch.schedule import run_tasks
from convert_drafter.converters.batch.task import Result, Summary
from convert_drafter.converters.commands.jobs_file import read_jobs

NAMES = ["first-BF16", "first-Q8_0", "second"]
FILES = [f"{name}.gguf{end}" for name in ("first-BF16", "first-Q8_0", "second-F16") for end in ("", ".stamp.json")]
INTERRUPTED = """
import sys
from batches import slow_second
from convert_drafter.converters.batch import processes, schedule
from convert_drafter.converters.cli import main
schedule.run_task = slow_second
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture
def middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where tasks leave a mark in the middle of their work."""
    place = tmp_path / "middle"
    place.mkdir()
    monkeypatch.setenv(MIDDLE, str(place))
    return place


def run(path: Path, workers: int = 2) -> Summary:
    tasks = read_jobs(path)
    with local(workers) as crew:
        return run_tasks(tasks, crew)


def outcomes(found: Summary) -> dict[str, str]:
    return {result.task: result.status.value for result in found.results}


def made(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").iterdir())


@pytest.mark.parametrize("whole_group", [True, False], ids=["Ctrl-C at a terminal", "one process"])
def test_interrupted_and_taken_up_again(tmp_path: Path, middle: Path, whole_group: bool) -> None:
    path = jobs_file(tmp_path)
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    batch = subprocess.Popen(
        [sys.executable, str(script), "batch", str(path), "--workers", "1"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (middle / "second").exists() and time.monotonic() < until and batch.poll() is None:
        time.sleep(0.05)
    assert "second-F16.gguf.partial" in made(tmp_path)
    (os.killpg if whole_group else os.kill)(batch.pid, signal.SIGINT)
    out, err = batch.communicate(timeout=120)
    assert batch.returncode == 130, err
    assert "Traceback" not in err
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["first-BF16", "done"], ["first-Q8_0", "done"], ["second", "interrupted"],
    ]  # fmt: skip
    assert made(tmp_path) == FILES[:4]
    with pytest.raises(ProcessLookupError):  # nobody is left at work
        os.kill(int((middle / "second").read_text()), 0)
    assert outcomes(run(path)) == {**dict.fromkeys(NAMES, "up to date"), "second": "done"}
    assert made(tmp_path) == FILES


def test_a_killed_process_fails_its_own_task_alone(
    tmp_path: Path, middle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jobs_file(tmp_path)
    monkeypatch.setattr(schedule, "run_task", killed_second)
    found = run(path)
    assert outcomes(found) == {**dict.fromkeys(NAMES, "done"), "second": "failed"}
    lost = found.results[2]
    assert lost.failure is not None
    assert lost.failure.message.startswith("its process was ended by SIGKILL; a system out of memory does that")
    assert lost.failure.message.endswith(", 2 times")
    assert lost.attempts == 2
    assert made(tmp_path) == FILES[:4]
    monkeypatch.undo()
    assert outcomes(run(path)) == {**dict.fromkeys(NAMES, "up to date"), "second": "done"}


def test_a_process_killed_once_is_tried_again(tmp_path: Path, middle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jobs_file(tmp_path)
    monkeypatch.setattr(schedule, "run_task", killed_once)
    found = run(path)
    assert outcomes(found) == dict.fromkeys(NAMES, "done")
    assert [result.attempts for result in found.results] == [2, 2, 2]
    assert made(tmp_path) == FILES


# --- the executor ---


def test_what_does_not_end_by_itself_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in the middle of other people's code may not hear that it has to stop."""
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.5)
    with Processes(1) as executor:
        assert executor.submit(signal.signal, signal.SIGTERM, signal.SIG_IGN).result()
        deaf = executor.submit(time.sleep, 600)
        while not deaf.running():
            time.sleep(0.01)
        executor.stop()
        with pytest.raises(ProcessLost, match="ended by SIGKILL"):
            deaf.result()


def test_calls_and_their_errors_come_back() -> None:
    with Processes(2) as executor:
        assert list(executor.map(abs, range(-3, 3))) == [3, 2, 1, 0, 1, 2]
        with pytest.raises(ZeroDivisionError):
            executor.submit(divmod, 1, 0).result()
        assert executor.submit(os.getpid).result() != os.getpid()


def test_an_idle_process_that_was_killed_is_replaced() -> None:
    with Processes(1) as executor:
        first = executor.submit(os.getpid).result()
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 30
        while time.monotonic() < until and _is_there(first):
            time.sleep(0.05)
        with pytest.raises(ProcessLost, match="exit status 7"):
            executor.submit(os._exit, 7).result()
        assert executor.submit(os.getpid).result() != first


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux bounds a process's memory")
def test_memory_is_bounded_for_each_process() -> None:
    """What asks for more fails by itself; the process lives on."""
    with Processes(1, memory=1 << 30) as executor:
        process = executor.submit(os.getpid).result()
        with pytest.raises(MemoryError):
            executor.submit(np.ones, 1 << 28).result()  # 2 GiB
        assert executor.submit(len, b"abc").result() == 3
        assert executor.submit(os.getpid).result() == process


def test_a_task_out_of_memory_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jobs_file(tmp_path)
    monkeypatch.setattr(schedule, "run_task", greedy_second)
    with local(1, memory=1 << 30) as crew:
        found = run_tasks(read_jobs(path), crew)
    assert outcomes(found) == {**dict.fromkeys(NAMES, "done"), "second": "failed"}
    failure = found.results[2].failure
    assert failure is not None
    assert failure.message.startswith("out of memory: allow more (--memory-limit), or give the job fewer threads")


def greedy_second(task: Any, code: str | None, rehash: bool) -> Result:
    from unittest.mock import patch

    from convert_drafter.converters.batch import work

    greed: Callable[[Any], Any] = lambda job: np.ones(1 << 28)  # noqa: E731
    with patch.object(work, "prepare", greed if task.name == "second" else work.prepare):
        return work.run_task(task, code, rehash)
