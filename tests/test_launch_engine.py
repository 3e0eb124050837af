"""The printed line in the real llama-server: it starts as it stands, answers, and drafts are accepted."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import make_mtp
import pytest
from engine import llama_binary
from llama_server import llama_server
from llama_source import run_converter
from make_checkpoints import make
from mtp_checkpoints import SOURCES
from mtp_checkpoints import job as mtp_job
from published import FIXTURES, PAIR
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import write_conversion
from convert_drafter.converters.gguf_model import read_model
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.launch.abilities import Flavour, can, devices, flavour
from convert_drafter.converters.launch.launching import PLACING, Launch, LaunchJob, launch
from convert_drafter.converters.launch.modes import SPEC_TYPES, WAYS
from convert_drafter.converters.verify.in_llama_cpp.probe import FLAGS, Known, find_server

pytestmark = pytest.mark.engine

PAIR_PROMPTS = [json.loads(line)["tokens"] for line in (PAIR / "prompts.jsonl").read_text().splitlines()][:2]
MTP_PROMPTS = [json.loads(line)["tokens"] for line in make_mtp.PROMPTS.read_text().splitlines()][:2]
NEW_TOKENS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's target with a drafter of two kinds; a target of Qwen3.5 with its head beside it and in it."""
    folder = tmp_path_factory.mktemp("launch")
    target = write_target(PAIR / "target", folder / "target.gguf")
    convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", "Q8_0", folder / "dflash.gguf"))
    convert(ConvertJob(FIXTURES / "pair-eagle3", target, "llama.cpp", "Q8_0", folder / "eagle3.gguf"))
    for kind in ("dspark", "dspark from the anchor", "dflash2"):
        source = make(kind, folder / f"checkpoint {kind}")
        convert(ConvertJob(source, target, "llama.cpp", "F32", folder / f"{kind}.gguf"))
    source = SOURCES["trained"](folder / "qwen35")
    options = ["--no-mtp", "--outtype", "f32", "--outfile", str(folder / "trunk.gguf")]
    run_converter([[str(source), *options]], folder / "converter.log")
    convert(mtp_job(source, folder / "head.gguf"))
    write_conversion(prepare_attach(mtp_job(source, folder / "both.gguf", attach=folder / "trunk.gguf")))
    return folder


def served(decided: Launch, log: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The answers of a server started with the printed line."""
    program, model, target, *options = shlex.split(decided.line)
    assert (program, model) == (str(llama_binary("llama-server")), "-m")
    with llama_server(Path(target), *options, log=log) as server:
        return [server.complete(prompt, NEW_TOKENS) for prompt in prompts]


LEAST = {"dspark from the anchor": 0.0}  # its places are trained for the token after them
CASES = {
    "dflash": ("dflash.gguf", "target.gguf", None, PAIR_PROMPTS, "draft-dflash"),
    "eagle3": ("eagle3.gguf", "target.gguf", None, PAIR_PROMPTS, "draft-eagle3"),
    "dflash2": ("dflash2.gguf", "target.gguf", None, PAIR_PROMPTS, "draft-dflash"),
    "dspark": ("dspark.gguf", "target.gguf", "draft-dspark", PAIR_PROMPTS, "draft-dspark"),
    "dspark from the anchor": ("dspark from the anchor.gguf", "target.gguf", None, PAIR_PROMPTS, "draft-dspark"),
    "dflash and ngram": ("dflash.gguf", "target.gguf", "dflash+ngram", PAIR_PROMPTS, "ngram-mod,draft-dflash"),
    "a head beside its target": ("head.gguf", "trunk.gguf", "mtp", MTP_PROMPTS, "draft-mtp"),
    "a head in its target": ("both.gguf", None, "mtp", MTP_PROMPTS, "draft-mtp"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_printed_line_drafts(folder: Path, name: str) -> None:
    """T-50: the text is the target's own, and drafts are accepted; nothing is cut (A6-8)."""
    file, target, mode, prompts, spec_type = CASES[name]
    server = llama_binary("llama-server")
    job = LaunchJob(folder / file, folder / target if target else None, mode=mode, server=server)
    decided = launch(job)
    assert decided.spec_type == spec_type and not any(remark.warning for remark in decided.remarks)
    alone = launch(LaunchJob(folder / file, folder / target if target else None, mode="off", server=server))
    answers = served(decided, folder / f"{name}.log", prompts)
    plain = served(alone, folder / f"{name} off.log", prompts)
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in plain]
    drafted = sum(answer["timings"].get("draft_n", 0) for answer in answers)
    accepted = sum(answer["timings"].get("draft_n_accepted", 0) for answer in answers)
    print(f"RESULT {name}: {accepted} of {drafted} drafts accepted, length {decided.resolved.draft_length}")
    assert LEAST.get(name, 0.2) * drafted < accepted <= drafted
    assert "clamping" not in (folder / f"{name}.log").read_text(errors="replace")
    assert not any("draft_n" in answer["timings"] for answer in plain)


def test_a_target_that_llama_cpp_split(folder: Path) -> None:
    """The real tool's parts: the same tensors, the same launch, and a server that starts with the first of them."""
    server = llama_binary("llama-server")
    command = [llama_binary("llama-gguf-split"), "--split", "--split-max-tensors", "16", folder / "both.gguf"]
    subprocess.run([*command, folder / "parts"], check=True, capture_output=True)
    first = min(folder.glob("parts-*.gguf"))
    found, whole = read_model(first), read_gguf(folder / "both.gguf")
    assert found.parts == len(list(folder.glob("parts-*.gguf"))) > 1 and found.tensors == whole.tensors
    decided = launch(LaunchJob(first, mode="mtp", server=server))
    assert decided.resolved == launch(LaunchJob(folder / "both.gguf", mode="mtp", server=server)).resolved
    (answer,) = served(decided, folder / "parts.log", MTP_PROMPTS[:1])
    assert answer["timings"]["draft_n"] > 0


def test_no_option_is_deprecated_or_twice(folder: Path) -> None:
    """T-29: the server says so itself."""
    server = llama_binary("llama-server")
    job = LaunchJob(folder / "dflash.gguf", folder / "target.gguf", mode="dflash+ngram", server=server)
    served(launch(job), folder / "words.log", PAIR_PROMPTS[:1])
    log = (folder / "words.log").read_text(errors="replace")
    assert "DEPRECATED" not in log and "specified multiple times" not in log


def test_what_the_real_server_can() -> None:
    """A3-7 .. A3-9: every way and every option of today's."""
    engine = find_server(llama_binary("llama-server"))
    assert flavour(engine.abilities) is Flavour.CURRENT and engine.abilities.chains.known is Known.YES
    for way in WAYS:
        assert can(engine.abilities, way).known is Known.YES
        assert engine.abilities.spec_type(SPEC_TYPES[way]) == SPEC_TYPES[way]
    for purpose in ("ngram match", "ngram shortest", "ngram longest", "default drafting", "devices", "model"):
        assert engine.abilities.flag(purpose) == FLAGS[purpose][0]
    assert devices(engine.path, engine.abilities).gpu.known in (Known.YES, Known.NO)
    placing = PLACING & engine.abilities.flags.keys()
    assert len(placing) > 15 and all(engine.abilities.aliases(flag) <= PLACING for flag in placing)


def test_auto_does_not_take_a_tiny_target_s_head(folder: Path) -> None:
    """A3-15: and the line still starts."""
    decided = launch(LaunchJob(folder / "both.gguf", server=llama_binary("llama-server")))
    assert decided.resolved.ways == ("ngram",)
    assert len(served(decided, folder / "auto.log", MTP_PROMPTS[:1])) == 1
