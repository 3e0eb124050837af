"""Another project's program as our child: it cannot outlive us, it is stopped for certain, its last words are kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import BinaryIO

from convert_drafter.converters.errors import DrafterError

NO_ANSWER = {"SIGKILL": 3, "SIGILL": 4}  # exit codes of ends that say nothing of the file
STOP_SECONDS = 5.0  # what a program asked to stop has until it is killed
LAST_WORDS = 15  # lines of a log that a message shows
TAIL_BYTES = 1 << 18
# Sent before exec, PR_SET_PDEATHSIG (1) ends a child whose parent is killed where no `finally` runs; it is a program
# of its own because code between fork and exec is not safe beside other threads. See prctl(2).
TETHER = """import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))
if os.getppid() != int(sys.argv[1]): os._exit(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])"""
STAMP = re.compile(r"^(?:\d+\.\d{2}\.\d{3}\.\d{3} )?(?:([EWIDT]) )?")  # llama.cpp's own: "0.01.538.360 E "
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
BUILD_FOLDER = re.compile(r"\S*/(?=(?:src|common|ggml|tools)/[\w./-]+:\d+:)")
NOISE = re.compile(r"^(?:[\W\d]*|\[New LWP.*|#\d+ .*|\S+\(\S*\+0x.*|\t.*|ptrace: .*|.*GGML_BACKTRACE.*)$")
ABORTED = re.compile(r"\.(?:c|cc|cpp|cu|m|metal|h|hpp):\d+: ")


class EngineFailure(DrafterError):
    """The engine crashed, hung or answered nonsense. With a drafter that is an answer (1), without the target's (3).

    Some ends say nothing of any file: a system out of memory (3), an engine built for another processor (4).

    `phase` is what it was doing, `status` how it ended (negative: by that signal), None where it did not end;
    `reason` is the most telling line of its log, `log` the last ones.
    """

    def __init__(self, phase: str, what: str, log: Log, status: int | None = None, with_drafter: bool = True) -> None:
        self.phase, self.what, self.status = phase, what, status
        self.log, self.with_drafter = log.tail, with_drafter
        self.reason = log.reason or next(iter(log.tail[-1:] if status is not None else ()), "")
        self.exit_code = NO_ANSWER.get(self.signal or "", 1 if with_drafter else 3)
        told = f": {self.reason}" if self.reason else ""
        lines = "".join(f"\n    {line}" for line in self.log)
        super().__init__(f"llama-server {what} while {phase}{told}" + (f"\n  its last lines:{lines}" if lines else ""))

    @property
    def signal(self) -> str | None:
        """The signal's name where one ended it (SIGABRT after a failed GGML_ASSERT)."""
        return _signal_name(self.status)


def _signal_name(status: int | None) -> str | None:
    if status is None or 0 <= status <= 128:
        return None
    with suppress(ValueError):  # a shell in between adds 128 to the number
        return signal.Signals(-status if status < 0 else status - 128).name
    return None


def ending(status: int) -> str:
    """How a program ended, in words."""
    name = _signal_name(status)
    if name == "SIGILL":
        return "stopped at an instruction this processor does not have (SIGILL: it was built for another one)"
    if name == "SIGKILL":
        return "was killed (SIGKILL), as a system out of memory does,"
    return f"was ended by {name}" if name else f"ended with exit status {status}"


@dataclass(frozen=True)
class Log:
    """What a program wrote, as text."""

    text: str

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(level, line) without time stamps, build folders and noise; a level is E, W, I, D, T or none."""
        found = []
        for raw in COLOURS.sub("", self.text).splitlines():
            stamp = STAMP.match(raw)
            rest = raw[stamp.end() :] if stamp else raw
            if not NOISE.match(rest):
                found.append((stamp.group(1) or "" if stamp else "", BUILD_FOLDER.sub("", rest.rstrip())))
        return found

    @property
    def tail(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for _, line in self.lines[-LAST_WORDS:]))

    @property
    def reason(self) -> str:
        """A failed assertion, else the first error about a model, else the first error."""
        lines = self.lines
        errors = [line for level, line in lines if level == "E" or re.search(r"(?i)\berror\b|what\(\)", line)]
        candidates = (
            *(line for _, line in reversed(lines) if ABORTED.search(line)),
            *(line for line in errors if "error loading model" in line and "failed to load model from" not in line),
            *errors,
        )
        return next(iter(candidates), "")

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for level, line in self.lines if level == "W"))


class Child:
    """A running program; its standard output and errors go to a file without a name."""

    def __init__(self, process: subprocess.Popen[bytes], log: BinaryIO) -> None:
        self._process, self._log = process, log

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self, wait: float = 0.0) -> int | None:
        """How it ended, None while it runs; waits for that up to so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(wait) if wait else self._process.poll()
        return None

    def log(self, most: int = TAIL_BYTES) -> Log:
        """The end of what it wrote, at most so many bytes; nothing once it is stopped."""
        if self._log.closed:
            return Log("")
        size = os.fstat(self._log.fileno()).st_size
        data = os.pread(self._log.fileno(), most, max(0, size - most))
        return Log(data.decode("utf-8", errors="replace"))


@contextmanager
def child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Child]:
    """The program while the block runs, and no longer, however the block ends. Raises `OSError` if it cannot start.

    It gets a process group of its own: Ctrl-C is ours to handle, and what it starts itself is stopped with it.
    """
    tethered = [*_tether(), *command]
    with TemporaryFile() as log:
        process: subprocess.Popen[bytes] | None = None
        try:
            process = subprocess.Popen(
                tethered,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            yield Child(process, log)
        finally:
            if process is not None:
                _stop(process)


def _tether() -> list[str]:
    if not sys.platform.startswith("linux") or not sys.executable:
        return []
    return [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid())]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then kill it and everything in its group; a Ctrl-C meanwhile only hurries."""
    try:
        _send(process, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _send(process, signal.SIGKILL)
        process.wait()


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def output_of(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of a short program; None for one that is still running after so many seconds."""
    deadline = time.monotonic() + seconds
    with child(command) as running:
        status = running.status(wait=max(0.01, deadline - time.monotonic()))
        return status, running.log().text
