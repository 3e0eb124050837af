"""A local server's JSON over HTTP: whole answers and streamed ones, and each way in which one can fail."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
MOST_BYTES = 1 << 28  # of one answer: a server gone wrong shall not fill the memory


@dataclass(frozen=True)
class Address:
    """A server on this machine; `key` keeps others on it from asking."""

    port: int
    key: str


class Refused(Exception):
    """The server says no: HTTP status, and its own message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Garbled(Exception):
    """An answer that is not the JSON it has to be."""


class Broken(Exception):
    """No connection, or one that ended in the middle."""


class Silent(Exception):
    """Nothing came for too long."""


def ask(where: Address, path: str, body: Any = None, seconds: float = 60.0) -> Any:
    """The JSON that answers a GET, or a POST of `body`. Raises `Refused`, `Garbled`, `Broken` or `Silent`."""
    with _answer(where, path, body, seconds) as response:
        data = response.read(MOST_BYTES)
        if response.status != http.client.OK:
            raise Refused(response.status, _message(data))
        return _parsed(data)


def stream(where: Address, path: str, body: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer. `Silent` where none comes within `seconds` of the one before."""
    with _answer(where, path, body, seconds) as response:
        if response.status != http.client.OK:
            raise Refused(response.status, _message(response.read(MOST_BYTES)))
        last = time.monotonic()
        while line := response.readline(MOST_BYTES):
            kind, _, data = line.partition(b":")
            if kind in (b"data", b"error"):  # a line without a kind is the server's sign of life while it computes
                if data.strip() == b"[DONE]":
                    return
                yield _event(data.strip())
                last = time.monotonic()
            elif time.monotonic() - last > seconds:
                raise Silent


def _event(data: bytes) -> dict[str, Any]:
    event = _parsed(data)
    if not isinstance(event, dict):
        raise Garbled(f"an event that is {type(event).__name__}")
    if "error" in event:
        raise Refused(_status(event), _message(data))
    return event


def _status(event: dict[str, Any]) -> int:
    error = event["error"]
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) else http.client.INTERNAL_SERVER_ERROR


@contextmanager
def _answer(where: Address, path: str, body: Any, seconds: float) -> Iterator[http.client.HTTPResponse]:
    """Straight to the loopback address: a proxy of the environment has no part in it."""
    connection = http.client.HTTPConnection(HOST, where.port, timeout=seconds)
    response: http.client.HTTPResponse | None = None
    try:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {where.key}"}
        connection.request("GET" if data is None else "POST", path, data, headers)
        response = connection.getresponse()
        yield response
    except TimeoutError as error:
        raise Silent from error
    except (OSError, http.client.HTTPException) as error:
        raise Broken(str(error) or type(error).__name__) from error
    finally:
        if response is not None:
            response.close()
        connection.close()


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"{data[:80].decode('utf-8', 'replace')!r} is no JSON") from error


def _message(data: bytes) -> str:
    """What an error's body says, in llama-server's form or any other."""
    try:
        error = json.loads(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, RecursionError, KeyError, TypeError):
        return data[:200].decode("utf-8", "replace").strip() or "no reason given"
