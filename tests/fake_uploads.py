"""How a hub takes files: a repository is made, large files go to a storage by git-lfs' batch API, then comes a commit.

Protocol: docs/api/batch.md of git-lfs, and the hub's own multipart transfer as huggingface_hub's lfs.py speaks it. What
a commit names has to be in the storage, whole and with its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from fake_hub import FakeHub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf")


@dataclass
class Uploads:
    """`committed` are the files of the commit, `stored` large ones by hash; `received` counts bytes of each."""

    made: list[dict[str, Any]] = field(default_factory=list)  # repositories that were wanted
    committed: dict[str, bytes] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    received: Counter[str] = field(default_factory=Counter)
    part_size: int = 0  # bytes of a part; 0: a file goes up as one
    breaks: int = 0  # how often the storage hangs up in the middle of a file
    refuse: dict[str, int] = field(default_factory=dict)  # "commit", "batch", "storage": the status it is answered with
    spoil: bool = False  # what is stored is not what was sent
    leaked: bool = False  # a token came to the storage


class Uploading(BaseHTTPRequestHandler):
    hub: FakeHub

    def fail(self, status: int, code: str) -> None:
        raise NotImplementedError

    def send(self, status: int, headers: dict[str, str], data: bytes, body: bool, name: str = "") -> None:
        raise NotImplementedError

    def send_json(self, answer: object) -> None:
        self.send(200, {"content-type": "application/json"}, json.dumps(answer).encode(), body=True)

    def do_POST(self) -> None:
        raw, path = self.body(), urlsplit(self.path).path
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if path.startswith("/complete/"):  # of a file in parts: its address is the permission
            return self.complete(path.rpartition("/")[2], json.loads(raw))
        if self.hub.tokens and token not in self.hub.tokens:
            return self.fail(401, "")
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(raw))
        if path.endswith("/preupload/main"):
            return self.preupload(json.loads(raw)["files"])
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(raw))
        if path.startswith("/verify/"):
            return self.verify(json.loads(raw))
        if path.endswith("/commit/main"):
            return self.commit([json.loads(line) for line in raw.splitlines()])
        return self.fail(404, "")

    def body(self) -> bytes:
        """Of the length that was told, or in chunks."""
        if (self.headers.get("transfer-encoding") or "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def refused(self, what: str) -> bool:
        status = self.hub.uploads.refuse.get(what)
        if status is not None:
            self.fail(status, "")
        return status is not None

    def create(self, asked: dict[str, Any]) -> None:
        self.hub.uploads.made.append(asked)
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def preupload(self, files: list[dict[str, Any]]) -> None:
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in files}
        self.send_json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, asked: dict[str, Any]) -> None:
        if not self.refused("batch"):
            assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
            self.send_json(
                {"transfer": "basic", "objects": [self.actions(o["oid"], o["size"]) for o in asked["objects"]]}
            )

    def actions(self, oid: str, size: int) -> dict[str, Any]:
        """Where a file goes; nowhere if it is there."""
        told = {"oid": oid, "size": size}
        if oid in self.hub.uploads.stored:
            return told
        upload: dict[str, Any] = {"href": f"{self.hub.storage}/lfs/{oid}"}
        if step := self.hub.uploads.part_size:
            parts = {f"{i + 1:05}": f"{self.hub.storage}/lfs/{oid}-{i + 1}" for i in range(-(-size // step))}
            upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(step), **parts}}
        return {**told, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}}

    def do_PUT(self) -> None:
        """The storage, at its own address."""
        uploads, name = self.hub.uploads, self.path.rpartition("/")[2]
        uploads.leaked |= self.headers.get("authorization") is not None
        if uploads.breaks > 0:
            uploads.breaks -= 1
            self.rfile.read(1000)
            self.close_connection = True
            return
        data = self.body()
        if self.refused("storage"):
            return
        uploads.received[name] += len(data)
        uploads.stored[name] = data[:-1] + b"!" if uploads.spoil else data
        self.send(200, {"etag": f'"{hashlib.md5(data).hexdigest()}"'}, b"", body=True)

    def complete(self, oid: str, asked: dict[str, Any]) -> None:
        parts = [self.hub.uploads.stored.pop(f"{oid}-{part['partNumber']}") for part in asked["parts"]]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        if asked["oid"] != oid or [part["etag"] for part in asked["parts"]] != etags:
            return self.fail(400, "")
        self.hub.uploads.stored[oid] = b"".join(parts)
        return self.send_json({"success": True})

    def whole(self, oid: str) -> bool:
        data = self.hub.uploads.stored.get(oid)
        return data is not None and hashlib.sha256(data).hexdigest() == oid

    def verify(self, asked: dict[str, Any]) -> None:
        if not self.whole(asked["oid"]):
            self.hub.uploads.stored.pop(asked["oid"], None)
            return self.fail(422, "")
        return self.send_json({})

    def commit(self, entries: list[dict[str, Any]]) -> None:
        if self.refused("commit"):
            return
        new: dict[str, bytes] = {}
        for key, value in ((entry["key"], entry["value"]) for entry in entries):
            if key == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if not self.whole(value["oid"]) or len(self.hub.uploads.stored[value["oid"]]) != value["size"]:
                    return self.fail(400, "")
                new[value["path"]] = self.hub.uploads.stored[value["oid"]]
        self.hub.uploads.committed |= new
        address = f"{self.hub.url}/me/tiny/commit/{COMMIT}"
        return self.send_json({"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})
