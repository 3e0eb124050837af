"""Small batches for tests, and work that is slow, killed or out of memory at a known moment, in whatever process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from published import small_checkpoint

from convert_drafter.converters.batch import work
from convert_drafter.converters.batch.crew import Crew
from convert_drafter.converters.batch.task import Result, Task

JOBS = """\
[defaults]
for = "lucebox"
out = "out/{name}-{quant}.gguf"

[[job]]
name = "first"
source = "drafter"
quant = ["BF16", "Q8_0"]

[[job]]
name = "second"
source = "drafter"
quant = "F16"
"""


def jobs_file(folder: Path, text: str = JOBS) -> Path:
    """A jobs.toml beside a small checkpoint."""
    if not (folder / "drafter").exists():
        small_checkpoint(folder / "drafter")
    path = folder / "jobs.toml"
    path.write_text(text)
    return path


@contextmanager
def threads(width: int = 1) -> Iterator[Crew]:
    """A crew of threads: quick, and as good an executor as any."""
    with ThreadPoolExecutor(width) as executor:
        yield Crew(executor, width, 1, attempts=2, alone=True, stop=lambda: executor.shutdown(cancel_futures=True))


# --- work for processes: these have to be found by their names in another one ---

MIDDLE = "BATCH_MIDDLE"  # names the folder where a task in the middle of its work leaves its name


def while_writing(task: Task, code: str | None, rehash: bool, deed: Callable[[Path], None]) -> Result:
    """Do a task as always, but for the `deed` once a part of its file is written; it gets a place for a mark."""
    write = work.write_conversion

    def hindered(decided: work.ConvertJob) -> object:  # type: ignore[name-defined]
        return write(decided, lambda n_bytes: deed(Path(os.environ[MIDDLE]) / task.name))

    with patch.object(work, "write_conversion", hindered):
        return work.run_task(task, code, rehash)


def mark(path: Path) -> bool:
    """True the first time."""
    if path.exists():
        return False
    path.write_text(str(os.getpid()))
    return True


def _wait(place: Path) -> None:
    if mark(place):
        time.sleep(120)


def _killed(place: Path) -> None:
    mark(place)
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_once(place: Path) -> None:
    if mark(place):
        os.kill(os.getpid(), signal.SIGKILL)


def slow_second(task: Task, code: str | None, rehash: bool) -> Result:
    """Everything as always, but the task "second" stands still in the middle the first time."""
    return while_writing(task, code, rehash, _wait) if task.name == "second" else work.run_task(task, code, rehash)


def killed_second(task: Task, code: str | None, rehash: bool) -> Result:
    return while_writing(task, code, rehash, _killed) if task.name == "second" else work.run_task(task, code, rehash)


def killed_once(task: Task, code: str | None, rehash: bool) -> Result:
    return while_writing(task, code, rehash, _killed_once)
