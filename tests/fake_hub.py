"""A hub on loopback: the routes that huggingface_hub asks for, in front of folders, with a count of what it sent.

It can want a token, hand weights over to another address as the real one does, and break transfers off.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fake_uploads import COMMIT, Uploading, Uploads

LARGE = (".safetensors", ".gguf")  # kept apart from the repository, behind a redirect
API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeHub:
    """`repositories` maps ids to folders. `sent` counts bytes of each file, `asked` the ranges asked for."""

    repositories: dict[str, Path]
    tokens: set[str] = field(default_factory=set)  # none: everything is public
    gated: bool = False
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    break_after: int = 0  # bytes of a body before the connection is cut; 0 never
    breaks: int = 0  # how often it still happens
    refuse: Counter[int] = field(default_factory=Counter)  # a status, and how often weights are answered with it
    ranges: bool = True  # whether parts of files are given
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[str] = field(default_factory=list)
    stall: float = 0  # seconds of silence in place of the rest of a body that is broken off
    uploads: Uploads = field(default_factory=Uploads)
    leaked: bool = False  # a token came to the other address
    url: str = ""
    storage: str = ""  # the other address


class Handler(Uploading, BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            self.hub.leaked |= self.headers.get("authorization") is not None
            return self.send_file(Path(path.removeprefix("/cdn")), body)
        if found := API.fullmatch(path):
            return self.api(found[1], found[2], found[3] or "main", body)
        if found := FILE.fullmatch(path):
            return self.file(*found.groups(), body)
        return self.fail(404, "EntryNotFound")

    def folder(self, repository: str, revision: str) -> Path | None:
        """The repository's folder; None when a refusal was sent."""
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        known = self.hub.repositories.get(repository)
        if self.hub.tokens and token not in self.hub.tokens:
            self.fail(401 if not self.hub.gated else 403, "GatedRepo" if self.hub.gated else "RepoNotFound")
        elif known is None:
            self.fail(404, "RepoNotFound")
        elif revision not in {*self.hub.revisions, *self.hub.revisions.values()}:
            self.fail(404, "RevisionNotFound")
        else:
            return known
        return None

    def api(self, repository: str, what: str | None, revision: str, body: bool) -> None:
        if (folder := self.folder(repository, revision)) is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        commit = self.hub.revisions.get(revision, revision)
        if what == "tree":
            answer: object = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
        else:
            siblings = [{"rfilename": name} for name in names]
            answer = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "private": False}
        self.send(200, {"content-type": "application/json"}, json.dumps(answer).encode(), body)

    def file(self, repository: str, revision: str, name: str, body: bool) -> None:
        if (folder := self.folder(repository, revision)) is None:
            return
        path = folder / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        commit = self.hub.revisions.get(revision, revision)
        size = str(path.stat().st_size)
        about = {"x-repo-commit": commit, "etag": f'"{etag(path)}"', "x-linked-size": size}
        if name.endswith(LARGE):
            for status in [status for status, left in self.hub.refuse.items() if left > 0]:
                self.hub.refuse[status] -= 1
                return self.fail(status, "")
            return self.send(302, {**about, "location": f"{self.hub.storage}/cdn{path.resolve()}"}, b"", body)
        return self.send_file(path, body, about)

    def send_file(self, path: Path, body: bool, about: dict[str, str] | None = None) -> None:
        size, status, wanted = path.stat().st_size, 200, self.headers.get("range")
        start, end = 0, size - 1
        if wanted is not None and self.hub.ranges:
            start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            self.hub.asked.append(f"{path.name} {start}-{end}")
            status = 206
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start + 1) if body else b""
        headers = {"content-type": "application/octet-stream", **(about or {})}
        if not body:
            headers["content-length"] = str(size)
        self.send(status, headers, data, body, path.name)

    def send(self, status: int, headers: dict[str, str], data: bytes, body: bool, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if self.hub.breaks > 0 and name.endswith(LARGE) and len(data) > self.hub.break_after > 0:
            self.hub.breaks -= 1
            data, self.close_connection = data[: self.hub.break_after], True
        self.hub.sent[name] += len(data)
        self.wfile.write(data)
        if self.close_connection and self.hub.stall:
            self.wfile.flush()
            threading.Event().wait(self.hub.stall)  # time.sleep is the library's to skip

    def fail(self, status: int, code: str) -> None:
        self.send(status, {"x-error-code": code, "x-error-message": f"{code} {status}"}, b"", body=True)


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Somebody hung up, which a test may have made happen."""


def etag(path: Path) -> str:
    return hashlib.sha1(f"{path.name} {path.stat()}".encode()).hexdigest()


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub(repositories)
    handler = type("Answering", (Handler,), {"hub": hub})
    with Server(("127.0.0.1", 0), handler) as server:
        hub.url, hub.storage = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
