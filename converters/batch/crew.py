"""Who does the work: processes on this machine, or a Dask cluster. Each is a `concurrent.futures` executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.batch.processes import Processes
from convert_drafter.converters.batch.task import Task
from convert_drafter.converters.encoding import MOST_CORES, available_cores
from convert_drafter.converters.errors import MissingEngine, WrongInput, WrongUsage
from convert_drafter.converters.repository import repository_of

INSTALL = 'pip install "convert-drafter[batch]"'
CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Crew:
    """An executor and how it is to be used.

    `width` tasks are handed to it at a time (all of them without it); `threads` is what a task that names no number may
    use; a task whose process is lost is tried `attempts` times. `alone`: verifications run one at a time, because they
    measure speed and hold a target in memory. `ready` makes a task fit to travel, `stop` ends what runs.
    """

    executor: Executor
    width: int | None
    threads: int | None
    attempts: int
    alone: bool
    stop: Callable[[], None]
    ready: Callable[[Task], Task] = lambda task: task
    advice: str = ""


@contextmanager
def crew(
    workers: int | None = None, memory: int | None = None, scheduler: str | None = None, tasks: int | None = None
) -> Iterator[Crew]:
    """The crew that was asked for, let go at the end. Raises `WrongUsage`, `MissingEngine` or `WrongInput`."""
    if scheduler is None:
        with local(workers, memory, tasks) as found:
            yield found
        return
    given = {"--workers": workers, "--memory-limit": memory}
    if extra := [name for name, value in given.items() if value is not None]:
        raise WrongUsage(f"{extra[0]}: is for this machine; with --scheduler it is told to `dask worker`")
    with cluster(scheduler) as found:
        yield found


@contextmanager
def local(workers: int | None = None, memory: int | None = None, tasks: int | None = None) -> Iterator[Crew]:
    """Processes here: as many as keep every core busy, where one encodes with up to `MOST_CORES` of them."""
    count = workers or -(-available_cores() // MOST_CORES)
    count = max(1, min(count, tasks or count))
    threads = max(1, min(MOST_CORES, available_cores() // count))
    with Processes(count, memory) as executor:
        yield Crew(executor, count, threads, attempts=2, alone=True, stop=executor.stop)


@contextmanager
def cluster(address: str) -> Iterator[Crew]:
    """A Dask cluster's workers, which see the same files; how many tasks each takes at a time is theirs to say."""
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingEngine(f"--scheduler needs dask.distributed: {INSTALL}") from error
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        found = f"no Dask scheduler answers ({error or type(error).__name__})"
        raise WrongInput(
            f"--scheduler {address}: {found}; start one with `dask scheduler`, expected tcp://HOST:PORT"
        ) from error
    with client:
        executor = client.get_executor(pure=False)
        yield Crew(
            executor, width=None, threads=1, attempts=1, alone=False, stop=lambda: executor.shutdown(wait=False),
            ready=absolute, advice="; is convert-drafter installed for the cluster's workers, and their memory enough?",
        )  # fmt: skip


def absolute(value: Any) -> Any:
    """The same with every path absolute: a worker on the cluster runs in another folder, and has the same hub."""
    if isinstance(value, Path):
        return value if repository_of(value) is not None else value.absolute()
    if isinstance(value, tuple):
        return tuple(map(absolute, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: absolute(getattr(value, field.name)) for field in fields(value)})
    return value
