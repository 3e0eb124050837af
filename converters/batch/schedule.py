"""Which task runs when: as soon as what it reads is made, and never for another one's failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

from convert_drafter.converters.batch.crew import Crew
from convert_drafter.converters.batch.task import GOOD, Failure, Result, Status, Summary, Task
from convert_drafter.converters.batch.work import failure_of, run_task
from convert_drafter.converters.errors import DrafterError
from convert_drafter.converters.gguf_file import remove_partial
from convert_drafter.converters.stamp import Verification, code_digest

Tell = Callable[[Task, Result], None]
ENDED = {Status.FAILED: "failed", Status.NOT_RUN: "was not run", Status.INTERRUPTED: "was interrupted"}
FAILED = 3  # exit code of a task whose process was lost: nobody knows better


def run_tasks(
    tasks: Sequence[Task], crew: Crew, rehash: bool = False, tell: Tell = lambda task, result: None
) -> Summary:
    """Do every task that can be done; `tell` hears of each as it ends. An interruption ends what runs, and is told."""
    run = _Run(crew, rehash, tell, {task.name: task for task in tasks})
    interrupted = False
    try:
        run.to_the_end()
    except KeyboardInterrupt:
        interrupted = True
        run.interrupted()
    return Summary(tuple(run.results[task.name] for task in tasks), interrupted)


@dataclass
class _Run:
    crew: Crew
    rehash: bool
    tell: Tell
    waiting: dict[str, Task]
    running: dict[Future[Result], Task] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)

    def to_the_end(self) -> None:
        while self.waiting or self.running:
            self._give_up()
            self._start()
            done, _ = wait(self.running, return_when=FIRST_COMPLETED) if self.running else (set(), None)
            for future in done:
                self._settle(future)

    def interrupted(self) -> None:
        """What ended in the meantime counts; the rest is told as what it is."""
        self.crew.stop()
        for future in list(self.running):
            if future.done() and not future.cancelled() and future.exception() is None:
                self._settle(future)
        for task in self.running.values():
            self._end(task, Result(task.name, Status.INTERRUPTED, attempts=self.attempts[task.name]))
        for task in self.waiting.values():
            self._end(task, Result(task.name, Status.NOT_RUN, attempts=self.attempts.get(task.name, 0)))

    def _give_up(self) -> None:
        """Tasks that wait for what will not be made, and those that wait for them."""
        while lost := [(task, name) for task in self.waiting.values() if (name := self._lost(task))]:
            for task, name in lost:
                del self.waiting[task.name]
                why = Failure(f"waits for {name}, which {ENDED[self.results[name].status]}", FAILED)
                self._end(task, Result(task.name, Status.NOT_RUN, failure=why, attempts=0))

    def _lost(self, task: Task) -> str | None:
        return next(
            (name for name in task.after if name in self.results and self.results[name].status not in GOOD), None
        )

    def _start(self) -> None:
        for task in list(self.waiting.values()):
            if self.crew.width is not None and len(self.running) >= self.crew.width:
                return
            if all(name in self.results for name in task.after) and not self._has_to_wait(task):
                del self.waiting[task.name]
                self.attempts[task.name] = self.attempts.get(task.name, 0) + 1
                self.running[self._submit(task)] = task

    def _has_to_wait(self, task: Task) -> bool:
        busy = any(isinstance(other.job, Verification) for other in self.running.values())
        return self.crew.alone and busy and isinstance(task.job, Verification)

    def _submit(self, task: Task) -> Future[Result]:
        ready = self.crew.ready(with_threads(task, self.crew.threads))
        try:
            return self.crew.executor.submit(run_task, ready, code_digest(), self.rehash)
        except RuntimeError as error:  # an executor that is broken or closed
            lost: Future[Result] = Future()
            lost.set_exception(error)
            return lost

    def _settle(self, future: Future[Result]) -> None:
        task = self.running.pop(future)
        count = self.attempts[task.name]
        try:
            result = replace(future.result(), attempts=count)
        except Exception as error:  # of the executor: `run_task` raises none
            if count < self.crew.attempts:
                self.waiting = {task.name: task, **self.waiting}
                return
            for out in task.outputs:
                remove_partial(out)
            result = Result(task.name, Status.FAILED, failure=self._lost_worker(error, count), attempts=count)
        self._end(task, result)

    def _lost_worker(self, error: Exception, count: int) -> Failure:
        known = isinstance(error, DrafterError)
        what = str(error) if known else f"{type(error).__name__}: {error}"
        times = f", {count} times" if count > 1 else ""
        found = Failure(f"{what}{times}{self.crew.advice}", FAILED)
        return found if known else replace(found, traceback=failure_of(error).traceback)

    def _end(self, task: Task, result: Result) -> None:
        self.results[task.name] = result
        self.tell(task, result)


def with_threads(task: Task, threads: int | None) -> Task:
    """The task with a number of threads, if it names none."""
    job: Any = task.job
    if isinstance(job, Verification):
        asked = job.job if job.job.threads is not None else replace(job.job, threads=threads)
        return replace(task, job=replace(job, job=asked))
    return task if job.threads is not None else replace(task, job=replace(job, threads=threads))


__all__ = ["run_tasks"]
