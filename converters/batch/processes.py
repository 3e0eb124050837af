"""An executor of processes on this machine: one that is killed takes only its own call with it.

`ProcessPoolExecutor` breaks as a whole when one of its processes is killed, and every job that ran beside goes with it
(its documentation: BrokenProcessPool). Here each process has a pipe of its own, and a new one takes its place.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from convert_drafter.converters.encoding import PATIENCE
from convert_drafter.converters.errors import DrafterError, WrongUsage

STOP_SECONDS = 20.0  # what a process asked to stop has until it is killed: a slab to encode, a server to end
SPAWN = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks


class ProcessLost(DrafterError):
    """A process ended in the middle of a call."""

    def __init__(self, status: int | None) -> None:
        ending = f"ended with exit status {status}"
        if status is not None and status < 0:
            with suppress(ValueError):
                ending = f"was ended by {signal.Signals(-status).name}"
        memory = "; a system out of memory does that: allow fewer --workers" if status == -signal.SIGKILL else ""
        super().__init__(f"its process {ending}{memory}")


class Processes(Executor):
    """`count` processes, started when they are needed. `memory` bounds what each may hold, in bytes (Linux)."""

    def __init__(self, count: int, memory: int | None = None) -> None:
        if memory is not None and not sys.platform.startswith("linux"):
            raise WrongUsage("--memory-limit: only Linux can bound the memory of a process; leave it out")
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._memory = memory
        self._busy: set[_Process] = set()
        self._stopped = False
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="process")

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return self._threads.submit(self._call, call, arguments, named)

    def _call(self, call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        idle = self._idle.get()
        process = idle if idle is not None and idle.is_alive else _Process(self._memory)
        self._busy.add(process)
        try:
            if self._stopped:
                raise ProcessLost(None)
            return process.call(call, arguments, named)
        finally:
            self._busy.discard(process)
            self._idle.put(process if process.is_alive else None)

    def stop(self) -> None:
        """End every process now, each as if it were interrupted: what it was writing is taken away."""
        self._stopped = True
        busy, until = list(self._busy), time.monotonic() + STOP_SECONDS
        for process in busy:
            process.terminate()
        for process in busy:
            process.wait_or_kill(until - time.monotonic())
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.shutdown()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._idle.empty():
            if process := self._idle.get():
                process.close()


class _Process:
    """A process that waits for calls, and our end of its pipe."""

    def __init__(self, memory: int | None) -> None:
        self._ours, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs, memory), daemon=True)
        with _without_interrupts():
            self._process.start()
        theirs.close()

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def call(self, call: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        try:
            self._ours.send((call, arguments, named))
            good, value = self._ours.recv()
        except (EOFError, OSError) as error:
            self._process.join(STOP_SECONDS)
            if self.is_alive:
                self._process.kill()
                self._process.join()
            raise ProcessLost(self._process.exitcode) from error
        if good:
            return value
        raise value

    def terminate(self) -> None:
        self._process.terminate()

    def wait_or_kill(self, seconds: float) -> None:
        """By its sentinel: only one thread may ask the system how a child ended, and another one does."""
        if not wait([self._process.sentinel], max(0.0, seconds)):
            self._process.kill()

    def close(self) -> None:
        self._ours.close()
        self._process.join(STOP_SECONDS)
        if self.is_alive:
            self._process.kill()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A child begins with this thread's mask: Ctrl-C at a terminal goes to all processes, and only we answer it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, memory: int | None) -> None:
    """The process: answers calls until the pipe is closed, by us or by our end."""
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to every process; we end this one ourselves
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, which cleans up
    sys.setswitchinterval(PATIENCE)
    with suppress(KeyboardInterrupt, EOFError, OSError):
        if memory is not None:
            _bound(memory)
        while True:
            call, arguments, named = pipe.recv()
            try:
                answer = (True, call(*arguments, **named))
            except Exception as error:
                answer = (False, error)
            pipe.send(answer)


def _bound(memory: int) -> None:
    """Data only: torch and numpy reserve addresses that they never use, which RLIMIT_AS would count (setrlimit(2))."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


__all__ = ["ProcessLost", "Processes"]
