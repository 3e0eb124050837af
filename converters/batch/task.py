"""What a batch does: tasks, each one file to make or to verify, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from convert_drafter.converters.convert import ConvertJob
from convert_drafter.converters.quantize import QuantizeJob
from convert_drafter.converters.stamp import Verification

Job = ConvertJob | QuantizeJob | Verification


@dataclass(frozen=True)
class Task:
    """One job of a batch. `where` is its place in jobs.toml, `after` names the tasks whose results it reads."""

    name: str
    job: Job
    where: str
    after: tuple[str, ...] = ()

    @property
    def does(self) -> str:
        return {ConvertJob: "convert", QuantizeJob: "quantize", Verification: "verify"}[type(self.job)]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files and folders that it reads."""
        if isinstance(self.job, Verification):
            return self.job.job.inputs
        beside = (self.job.target, self.job.attach) if isinstance(self.job, ConvertJob) else ()
        return tuple(path for path in (self.job.source, self.job.importance, *beside) if path is not None)

    @property
    def outputs(self) -> tuple[Path, ...]:
        if isinstance(self.job, Verification):
            return (self.job.json, *([self.job.html] if self.job.html else ()))
        return (self.job.out,)


class Status(StrEnum):
    DONE = "done"
    UP_TO_DATE = "up to date"
    FAILED = "failed"
    NOT_RUN = "not run"  # what it reads was not made
    INTERRUPTED = "interrupted"


GOOD = (Status.DONE, Status.UP_TO_DATE)


@dataclass(frozen=True)
class Failure:
    """Why a task failed, in words for people; `exit_code` is what its own command would have ended with."""

    message: str
    exit_code: int
    traceback: str | None = None  # where it is a fault of ours


@dataclass(frozen=True)
class Result:
    """What became of a task. Plain data: it may come from another machine.

    `reasons` say why it was made, `figures` what was made, `stamp` what from; `seconds` are the whole time it took.
    `worker` is the process that did it (host, pid, the most memory it held so far in bytes).
    """

    task: str
    status: Status
    seconds: float = 0.0
    started: str | None = None  # ISO 8601, UTC
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    stamp: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    attempts: int = 1


@dataclass(frozen=True)
class Summary:
    """The results of a whole batch, in the order of its tasks."""

    results: tuple[Result, ...]
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        return any(result.status not in GOOD for result in self.results)


def linked(tasks: Sequence[Task]) -> tuple[list[Task], list[str]]:
    """Tasks that know whose results they read, and what is wrong among them: one place for two, a circle."""
    makers: dict[Path, Task] = {}
    problems = []
    for task in tasks:
        for path in task.outputs:
            first = makers.setdefault(place(path), task)
            if first is not task:
                problems.append(
                    f"{task.where}: {path}: written by task {first.name!r} too ({first.where}), expected a place of its"
                    " own; {name}, {quant} and {for} in a path tell tasks apart"
                )
    found = [replace(task, after=_makers_of(task, makers)) for task in tasks]
    return found, problems or list(_circles(found))


def place(path: Path) -> Path:
    """One spelling for one place; what a link points to counts."""
    return path.absolute().parent.resolve() / path.name


def _makers_of(task: Task, makers: Mapping[Path, Task]) -> tuple[str, ...]:
    found = (makers.get(place(path)) for path in task.inputs)
    return tuple(dict.fromkeys(maker.name for maker in found if maker is not None))


def _circles(tasks: Sequence[Task]) -> Iterable[str]:
    waiting = {task.name: set(task.after) for task in tasks}
    while free := [name for name, after in waiting.items() if not after & waiting.keys()]:
        for name in free:
            del waiting[name]
    for task in tasks:
        if task.name in waiting:
            names = ", ".join(sorted(waiting[task.name] & waiting.keys()))
            yield f"{task.where}: reads what {names} makes, which in turn waits for it; expected no circle"
