"""llama-server running for a target and perhaps a drafter: its command line, its start, its requests."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import MissingEngine, WrongInput
from convert_drafter.converters.verify.in_llama_cpp import http as http
from convert_drafter.converters.verify.in_llama_cpp.probe import INSTALL, Engine, Known
from convert_drafter.converters.verify.in_llama_cpp.process import Child, EngineFailure, child, ending
from convert_drafter.converters.verify.measured import Watch

DFLASH = "draft-dflash"
DEFAULT_DRAFT_LENGTH = 3  # llama-server's own
PORTS_TO_TRY = 5
TRACE = "4"  # prints how long drafting took
PORT_TAKEN = re.compile(r"couldn't bind|[Aa]ddress already in use")
UNKNOWN_OPTION = re.compile(
    r"error: (?:invalid|unknown) argument.*|.*error while handling argument.*|unknown speculative.*"
)
STATISTICS = re.compile(r"statistics +draft-\S+:.*dur\(b,g,a\) = *[\d.]+, *([\d.]+), *[\d.]+ ms")


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Limits:
    """Seconds until silence is a hang: while loading, and between two tokens of an answer; and a crash's core dump."""

    start: float = 900.0
    token: float = 300.0
    death: float = 10.0
    trace: float = 2.0


LIMITS = Limits()


@dataclass(frozen=True)
class Setup:
    """What to run. `draft_length` None is llama-server's own 3; `threads` None leaves them to it."""

    target: Path
    context: int
    drafter: Path | None = None
    draft_length: int | None = None
    threads: int | None = None
    spec_type: str = DFLASH

    def __post_init__(self) -> None:
        if self.drafter is not None and self.draft_length is None:
            object.__setattr__(self, "draft_length", DEFAULT_DRAFT_LENGTH)


def options(engine: Engine, setup: Setup) -> list[str]:
    """The command line after model and port. What the engine has no flag for is left out, if it can be.

    p_min, the cache types and the draft length are spelled because a default of each has cost somebody half their
    acceptance (T-58, T-59).
    """
    words = ["--ctx-size", str(setup.context), "--parallel", "1"]
    words += [] if setup.threads is None else ["--threads", str(setup.threads)]
    wishes: list[tuple[str, str | None]] = [("no page", None), ("prompt cache", "0"), ("colours", "off")]
    if engine.abilities.can_trace:
        wishes.append(("verbosity", TRACE))
    if setup.drafter is not None:
        wishes += [
            ("spec type", setup.spec_type),
            ("draft length", str(setup.draft_length)),
            ("shortest draft", "0"),
            ("p_min", "0.0"),
            ("draft sampling", "greedy"),
            ("draft key cache", "f16"),
            ("draft value cache", "f16"),
        ]
        wishes += [] if setup.threads is None else [("draft threads", str(setup.threads))]
    for purpose, value in wishes:
        if flag := engine.abilities.flag(purpose):
            words += [flag] if value is None else [flag, value]
    return words


def require_drafting(engine: Engine, spec_type: str = DFLASH) -> None:
    """Raises `MissingEngine` for an engine that says it cannot draft so; one that does not say is given a try."""
    found = engine.abilities
    reasons = [found.drafts(spec_type), *(found.has(purpose) for purpose in ("drafter", "draft length"))]
    if no := next((ability for ability in reasons if ability.known is Known.NO), None):
        raise MissingEngine(f"{_name(engine)} does not know {spec_type}: {no.reason}. Get a newer one: {INSTALL}")


def _name(engine: Engine) -> str:
    return f"{engine.path} (version {engine.version})"


class Server:
    """A llama-server that is up. `completions` counts the texts it wrote."""

    def __init__(self, engine: Engine, setup: Setup, process: Child, where: http.Address, limits: Limits) -> None:
        self.engine, self.setup, self.process, self.where, self.limits = engine, setup, process, where, limits
        self.completions = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of this server: names of files, no paths."""
        setup, drafter = self.setup, self.setup.drafter
        return {
            "llama-server": self.engine.version,
            "target": setup.target.name,
            "drafter": drafter and drafter.name,
            "draft_length": setup.draft_length if drafter else None,
            "context": setup.context,
            "threads": setup.threads,
            "options": options(self.engine, setup),
            "warnings": [line for line in self.process.log().warnings if "specul" in line or "draft" in line],
        }

    def post(self, path: str, body: Any, name: str) -> dict[str, Any]:
        """One question. Raises `WrongInput` for one it refuses, `EngineFailure` for a server that fails."""
        with self.reading(name):
            answer = http.ask(self.where, path, body, self.limits.token)
            if not isinstance(answer, dict):
                raise http.Garbled(f"an answer that is {type(answer).__name__}")
            return answer

    def complete(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A completion in one piece."""
        self.completions += 1
        return self.post("/completion", body, name)

    def stream(self, body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
        """A completion's events; the last one stops."""
        self.completions += 1
        with self.reading(name):
            events = list(http.stream(self.where, "/completion", body, self.limits.token))
            if not events or not events[-1].get("stop"):
                raise http.Broken("an answer without an end")
            return events

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn what goes wrong with an answer into what it means."""
        try:
            yield
        except http.Refused as error:
            if error.status < 500:
                raise WrongInput(f"{name}: llama-server refuses it: {error.message}") from error
            raise self.failure(f"answering {name}", f"failed ({error.message})") from error
        except http.Silent as error:
            raise self.failure(f"answering {name}", f"hung: nothing came for {self.limits.token:g} seconds,") from error
        except http.Garbled as error:
            raise self.failure(f"answering {name}", f"answered nonsense: {error},") from error
        except (KeyError, TypeError, ValueError) as error:
            raise self.failure(f"answering {name}", f"answered without what is needed ({error!r})") from error
        except http.Broken as error:
            status = self.process.status(wait=self.limits.death)
            what = f"cut the connection ({error})" if status is None else ending(status)
            raise self.failure(f"answering {name}", what, status) from error

    def failure(self, phase: str, what: str, status: int | None = None) -> EngineFailure:
        """What became of it, with its last lines."""
        return EngineFailure(phase, what, self.process.log(), status, self.setup.drafter is not None)

    def draft_milliseconds(self) -> list[float]:
        """Milliseconds spent drafting, summed up to the end of each completion; none where it is not traced."""
        if self.setup.drafter is None or not self.engine.abilities.can_trace:
            return []
        deadline = time.monotonic() + self.limits.trace  # the log is written by a thread of its own
        while True:
            found = STATISTICS.findall(self.process.log(most=1 << 26).text)
            if len(found) >= self.completions or time.monotonic() > deadline:
                return [float(total) for total in found] if len(found) == self.completions else []
            time.sleep(0.05)


class _PortTaken(Exception):
    pass


@contextmanager
def serving(engine: Engine, setup: Setup, on_progress: Watch = quiet, limits: Limits = LIMITS) -> Iterator[Server]:
    """A server on a free port of this machine while the block runs.

    Raises `MissingEngine` for one that cannot draft so or does not take our options, `WrongInput` for a file that is
    not there, `EngineFailure` where it does not come up.
    """
    for path in (setup.target, setup.drafter):
        if path is not None and not path.is_file():
            raise WrongInput(f"{path}: nothing there, expected a GGUF" if not path.exists() else f"{path}: no file")
    if setup.drafter is not None:
        require_drafting(engine, setup.spec_type)
    for _ in range(PORTS_TO_TRY):
        where, alias = http.Address(_free_port(), secrets.token_hex(16)), f"convert-drafter-{secrets.token_hex(8)}"
        with child(_command(engine, setup, where.port, alias), _environment(where.key)) as process:
            server = Server(engine, setup, process, where, limits)
            try:
                _wait(server, alias, on_progress)
            except _PortTaken:
                continue
            yield server
            return
    raise WrongInput(f"{engine.path}: found {PORTS_TO_TRY} ports taken one after the other, expected a free one")


def _command(engine: Engine, setup: Setup, port: int, alias: str) -> list[str]:
    words = [str(engine.path.absolute()), "--model", str(setup.target), "--host", http.HOST, "--port", str(port)]
    if flag := engine.abilities.flag("alias"):
        words += [flag, alias]
    if setup.drafter is not None:
        words += [engine.abilities.flag("drafter") or "--model-draft", str(setup.drafter)]
    return words + options(engine, setup)


def _environment(key: str) -> dict[str, str]:
    """Ours without what llama-server would take for options; and no debugger started at a crash, which may hang.

    The key is here because anybody may read a command line.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    return kept | {"GGML_NO_BACKTRACE": "1", "LLAMA_API_KEY": key}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((http.HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(server: Server, alias: str, on_progress: Watch) -> None:
    """Until the server says that it is ready."""
    phase = f"loading {(server.setup.drafter or server.setup.target).name}"
    deadline = time.monotonic() + server.limits.start
    on_progress(f"llama.cpp: {phase}", 0, 1)
    pause = 0.02
    while (status := server.process.status(wait=pause)) is None:
        if _is_up(server.where, alias):
            on_progress(f"llama.cpp: {phase}", 1, 1)
            return
        if time.monotonic() > deadline:
            raise server.failure(phase, f"hung: not ready after {server.limits.start:g} seconds,")
        pause = min(0.5, pause * 1.5)
    raise _why_it_ended(server, phase, status)


def _why_it_ended(server: Server, phase: str, status: int) -> Exception:
    """Of a server that was never up: its port, its options, or its files."""
    text = server.process.log().text
    if PORT_TAKEN.search(text):
        return _PortTaken()
    if refused := UNKNOWN_OPTION.search(text):
        said = refused.group().strip()
        return MissingEngine(f"{_name(server.engine)} does not take our options: {said}. Get a newer one: {INSTALL}")
    return server.failure(phase, ending(status), status)


def _is_up(where: http.Address, alias: str) -> bool:
    """Ready, and ours: a stranger may have taken the port."""
    try:
        http.ask(where, "/health", seconds=2.0)
        properties: Mapping[str, Any] = http.ask(where, "/props", seconds=10.0)
    except (http.Refused, http.Garbled, http.Broken, http.Silent):
        return False
    return not isinstance(properties, dict) or properties.get("model_alias", alias) == alias
