"""A stand-in for llama-server, run as a program: it speaks its --help and its HTTP, and fails in every way on demand.

`make` writes one with a behaviour of its own. The text it writes: each token is the one before plus one, modulo 1000.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from typing import Any

HELP = """----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-t,    --threads N                      number of CPU threads to use during generation (default: -1)
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
-m,    --model FNAME                    model path to load
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold. Values:
                                         - 3: info
                                         - 4: trace (more info)
                                        (default: 3)
--log-colors [on|off|auto]              Set colored logging
-np,   --parallel N                     number of server slots (default: -1, -1 = auto)
--port PORT                             port to listen (default: 8080)
--ui,  --webui, --no-ui, --no-webui     whether to enable the Web UI (default: enabled)
-a,    --alias STRING                   set model name aliases, comma-separated
-cram, --cache-ram N                    set the maximum cache size in MiB (default: 8192)
"""
DRAFTING = """----- speculative params -----

--spec-draft-type-k, -ctkd, --cache-type-k-draft TYPE
                                        KV cache data type for K for the draft model
--spec-draft-type-v, -ctvd, --cache-type-v-draft TYPE
                                        KV cache data type for V for the draft model
--spec-draft-n-max N                    number of tokens to draft for speculative decoding (default: 3)
--spec-draft-n-min N                    minimum number of draft tokens (default: 0)
--spec-draft-p-min, --draft-p-min P     minimum speculative decoding probability (greedy) (default: 0.00)
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-type none,draft-simple,draft-dflash
                                        comma-separated list of types of speculative decoding to use
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max
                                        (env: LLAMA_ARG_DRAFT_MAX)
"""
LEGACY = """----- speculative params -----

-md,   --model-draft FNAME              draft model for speculative decoding (default: unused)
--draft-max, --draft, --draft-n N       number of tokens to draft for speculative decoding (default: 16)
                                        (env: LLAMA_ARG_DRAFT_MAX)
--draft-min, --draft-n-min N            minimum number of draft tokens to use (default: 0)
--draft-p-min P                         minimum speculative decoding probability (greedy) (default: 0.8)
"""
VERSION = "version: 1.2.3 (build 7, commit abc)\nbuilt with a pencil\n"
SOURCE = "/tmp/build-1/llama.cpp/src/model.cpp"


def make(folder: Path, name: str = "llama-server", **behaviour: Any) -> Path:
    """A program in `folder` that behaves so; it notes its starts and requests in `notes` beside it."""
    path = folder / name
    settings = {"help": HELP + DRAFTING, "version": VERSION, "notes": str(folder / f"{name}.notes")} | behaviour
    path.write_text(
        f"#!{sys.executable} -S\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import fake_llama_server\nfake_llama_server.main({settings!r})\n"
    )
    path.chmod(0o755)
    return path


def notes(program: Path) -> list[dict[str, Any]]:
    """What it noted: {"pid", "argv", "environment"} for a start, {"path", "body"} for a request."""
    place = program.with_name(f"{program.name}.notes")
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def note(settings: dict[str, Any], **what: Any) -> None:
    with Path(settings["notes"]).open("a") as out:
        out.write(json.dumps(what) + "\n")


def main(settings: dict[str, Any]) -> None:
    if "--help" in sys.argv:
        note(settings, probed=True)
        time.sleep(settings.get("help_seconds", 0))
        print(settings["help"])
        sys.exit(settings.get("help_status", 0))
    if "--list-devices" in sys.argv:
        print(f"Available devices:\n{settings.get('devices', '  (none)')}")
        sys.exit(0)
    if "--version" in sys.argv:
        sys.exit(settings["version"])  # on standard error, as the real one
    run(settings)


def option(*names: str) -> str | None:
    """Its value on the command line."""
    return next((sys.argv[sys.argv.index(name) + 1] for name in names if name in sys.argv), None)


def run(settings: dict[str, Any]) -> None:
    starts = sum("argv" in entry for entry in notes(Path(sys.argv[0])))
    loose = {name: value for name, value in os.environ.items() if name.startswith(("LLAMA_", "GGML_"))}
    note(settings, pid=os.getpid(), argv=sys.argv[1:], environment=loose)
    if settings.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if settings.get("helper"):
        note(settings, helper=subprocess.Popen(["sleep", "600"]).pid)
    start = settings.get("start", "up")
    if start == "port taken" and starts < settings.get("taken", 1):
        die("0.00.010.000 E start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1", 1)
    if start == "unknown option":
        die("error: invalid argument: --spec-draft-p-min", 1)
    if start == "abort":
        die(f"0.00.010.000 I loading\n0.00.011.000 I \n...\n{SOURCE}:12: GGML_ASSERT(lid <= depth) failed", None)
    if start == "error":
        die(
            "0.00.010.000 I loading the drafter\n0.00.011.000 E reader: failed to read\n"
            "0.00.012.000 E load: error loading model: unknown model architecture: 'x'\n0.00.013.000 E exiting",
            1,
        )
    if start == "never":
        time.sleep(600)
    server = TCPServer(("127.0.0.1", int(option("--port") or 0)), handler(settings))
    print("0.00.020.000 W speculative: clamping the draft to 7", flush=True)
    server.serve_forever(poll_interval=0.02)


def die(words: str, status: int | None) -> None:
    """Say this and end; without a status by an abort."""
    print(words, flush=True)
    if status is None:
        os.abort()
    os._exit(status)


def handler(settings: dict[str, Any]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"
        asked, draft_ms = 0, 0.0

        def log_message(self, *ignored: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/health":
                self.say({"status": "ok"})
            elif self.path == "/props":
                self.say({"model_alias": settings.get("alias") or option("--alias")})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.headers["Authorization"] == f"Bearer {os.environ['LLAMA_API_KEY']}"
            note(settings, path=self.path, body=body)
            if self.path == "/tokenize":
                self.say({"tokens": [ord(letter) for letter in body["content"]]})
            elif self.path == "/apply-template":
                self.say({"prompt": "".join(f"<{m['role']}>{m['content']}" for m in body["messages"])})
            elif self.path == "/completion":
                Handler.asked += 1
                self.complete(body)

        def complete(self, body: dict[str, Any]) -> None:
            how = settings.get("answer", "text") if Handler.asked > 1 else "text"  # the first run is never at fault
            if how == "abort":
                die(f"{SOURCE}:99: get_sub_batch: failed to add embedding at index 1", None)
            elif how == "hang":
                time.sleep(600)
            elif how == "heartbeat":  # alive, says its server, and never answers
                self.head(200)
                while True:
                    self.wfile.write(b": \n\n")
                    time.sleep(0.05)
            elif how == "garbled":
                self.head(200)
                self.wfile.write(b"data: {no json\n\n")
            elif how == "list":
                self.head(200)
                self.wfile.write(b"data: []\n\n")
            elif how == "keyless":
                self.head(200)
                self.wfile.write(b'data: {"stop": true}\n\n')
            elif how in ("refused", "failed"):
                code = 400 if how == "refused" else 500
                self.say({"error": {"code": code, "message": "prompt too long", "type": "some_error"}}, code)
            elif how == "late error":
                self.head(200)
                self.wfile.write(b'data: {"error": {"code": 500, "message": "decode -3"}}\n\n')
            else:
                self.text(body, how)

        def text(self, body: dict[str, Any], how: str) -> None:
            first = (body["prompt"][-1] + 1) % 1000
            tokens = [(first + i) % 1000 for i in range(body["n_predict"])]
            if how == "another text" and option("--spec-type"):
                tokens[5:] = [7] * len(tokens[5:])
            events = self.events(tokens, body)
            print(f"spec: statistics draft-dflash: dur(b,g,a) = 0.001, {Handler.draft_ms}, 0.001 ms", flush=True)
            if not body.get("stream"):
                self.say(events[-1] | {"tokens": tokens})
                return
            self.head(200)
            for event in events[: len(events) // 2 if how == "cut" else None]:
                if how != "unsent" or not event["tokens"] or event["tokens"][0] % 5:
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            if how == "done":
                self.wfile.write(b"data: [DONE]\n\n")

        def events(self, tokens: list[int], body: dict[str, Any]) -> list[dict[str, Any]]:
            """Steps draft as many as asked for, cut at the end, and accept 0, 1, 2, 3, 0, 1 ... of them."""
            length = int(option("--spec-draft-n-max", "--draft-max") or 0)
            found, drafted, accepted, left, step = [], 0, 0, 0, 0
            for i, token in enumerate(tokens):
                room = len(tokens) - i
                if i and not left:
                    draft = min(length, room - 1)
                    matched = min(step % 4, draft)
                    drafted, accepted, left, step = drafted + draft, accepted + matched, matched + 1, step + 1
                    Handler.draft_ms += 2.0 if draft else 0.0
                left -= bool(i)
                counts = {"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {}
                times = {"prompt_ms": 1.0, "predicted_ms": float(step), "cache_n": 0}
                found.append({"stop": False, "tokens": [token], "timings": counts | times})
            end = {"stop": True, "tokens": [], "tokens_predicted": len(tokens), "stop_type": "limit"}
            progress = {"stop": False, "tokens": [], "prompt_progress": {"total": len(body["prompt"])}}
            return [progress, *found, end | {"timings": found[-1]["timings"]}]

        def say(self, answer: Any, status: int = 200) -> None:
            self.head(status)
            self.wfile.write(json.dumps(answer).encode())

        def head(self, status: int) -> None:
            self.send_response(status)
            self.end_headers()

    return Handler
