"""Drives the real llama-server for the engine tests: start, complete, stop for certain."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine import llama_binary

START_SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, body: Any = None, timeout: float = 120) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def complete(self, tokens: list[int], count: int) -> dict[str, Any]:
        """Greedy completion; the answer has "tokens" and "timings" with draft_n and draft_n_accepted."""
        body = {
            "prompt": tokens,
            "n_predict": count,
            "temperature": 0,
            "top_k": 1,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer: dict[str, Any] = self.get("/completion", body)
        return answer


@contextmanager
def llama_server(target: Path, *options: str, log: Path) -> Iterator[Server]:
    """A running server on a free loopback port. Fails with the end of its log when it does not come up."""
    port = free_port()
    command = [str(llama_binary("llama-server")), "-m", str(target), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", "2048", "-np", "1", "-t", "1", "--no-webui", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(port)
        wait_until_up(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_up(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.get("/health", timeout=5)["status"] == "ok":
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"llama-server did not come up:\n{log.read_text(errors='replace')[-4000:]}")
