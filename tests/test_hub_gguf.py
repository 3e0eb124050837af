"""GGUFs of a repository where a path may stand: which is meant, and which of its bytes are sent (hub on loopback)."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import fake_llama_server
import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from json_results import checked
from mtp_checkpoints import job, small
from planted_faults import Draft
from published import PAIR
from server_helps import CURRENT
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, WrongInput, convert, doctor, inspect
from convert_drafter.converters.batch import preflight
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands.jobs_file import read_jobs
from convert_drafter.converters.convert import prepare
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.holes import has_holes, joined, without
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import choose, fetch_header, fetch_tensors, fetch_whole
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize, write_quantization
from convert_drafter.converters.redialect import RedialectJob, redialect
from convert_drafter.converters.repository import WATCH, Contents, Repository
from convert_drafter.converters.scan.scan import scan
from convert_drafter.converters.stamp import Verification, standing
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.converters.verify import verify
from convert_drafter.converters.verify.job import EngineAnswer, VerifyJob
from convert_drafter.converters.verify.measured import Watch

ROOT = Path(__file__).parent.parent
STEP = 2**18  # bytes that the start of a file is fetched in
NEWER = "f" * 40


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Repositories: of one file, of several beside a config, of a head and its target's layers."""
    root = tmp_path_factory.mktemp("ggufs")
    found = {f"org/{name}": root / name for name in ("one", "many", "head", "target-GGUF")}
    for folder in found.values():
        folder.mkdir()
        (folder / "README.md").write_text("a page")
    for recipe, places in {"Q8_0": ["one", "many"], "Q4_K_M": ["many"], "F32": ["many"]}.items():
        for place in places:
            out = root / place / f"dflash-{recipe}.gguf"
            convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, out))
    (root / "many" / "config.json").write_text("{}")
    write_target(PAIR / "target", root / "target-GGUF" / "target-F32.gguf")
    convert(job(small(root / "mtp"), root / "mtp.gguf"))
    write_attached(root / "mtp.gguf", root / "head" / "target-Q8_0.gguf")
    return found


def write_attached(head: Path, out: Path, n_bytes: int = 3_000_000_000) -> None:
    """A head behind the layers of its target, which are a hole that nobody should ask for."""
    file = read_gguf(head)
    trunk = StoredTensor("blk.0.ffn_up.weight", (1, 64), file.tensors["output_norm.weight"].type)
    tensors = [*file.tensors.values(), trunk]
    zeros = [np.zeros(trunk.n_bytes, np.uint8)]
    write_gguf(out, list(file.keys.values()), tensors, lambda t: file.slabs(t.name) if t is not trunk else zeros)
    raw = bytearray(out.read_bytes())
    place = raw.index(trunk.name.encode()) + len(trunk.name) + 4 + 8
    raw[place : place + 8] = (n_bytes // 256).to_bytes(8, "little")
    out.write_bytes(raw)
    with out.open("r+b") as opened:
        opened.truncate(len(raw) - trunk.n_bytes + n_bytes // 256 * 256)


@pytest.fixture
def gguf_hub(hub: FakeHub, ggufs: dict[str, Path]) -> FakeHub:
    hub.repositories |= ggufs
    return hub


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    code = exit_.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def header_bytes(path: Path) -> int:
    return min(read_gguf(path).offsets.values())


# --- which file ---

MANY = (
    *("README.md", "mmproj-F16.gguf", "imatrix.gguf", "dflash-Q4_K_M.gguf", "dflash-Q4_K_M-drafter.gguf"),
    *("dflash-Q8_0.gguf", "BF16/model-00001-of-00002.gguf", "BF16/model-00002-of-00002.gguf", "x/Q2_K.gguf"),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dflash-Q8_0.gguf", "dflash-Q8_0.gguf"),
        ("q8_0", "dflash-Q8_0.gguf"),
        ("Q4_K_M", "dflash-Q4_K_M.gguf"),
        ("Q4_K_M-drafter", "dflash-Q4_K_M-drafter.gguf"),
        ("drafter", "dflash-Q4_K_M-drafter.gguf"),
        ("BF16", "BF16/model-00001-of-00002.gguf"),
        ("BF16/model-00001-of-00002.gguf", "BF16/model-00001-of-00002.gguf"),
        ("mmproj-F16.gguf", "mmproj-F16.gguf"),
        ("Q2_K", "x/Q2_K.gguf"),
    ],
)
def test_a_file_is_meant_by_its_name_or_its_quant(name: str, expected: str) -> None:
    found = choose(Contents(Repository("org/many", None, "", name), COMMIT, MANY))
    assert found.file == expected and found.count == (2 if expected.startswith("BF16") else 1)


@pytest.mark.parametrize(
    ("repository", "files", "said"),
    [
        (Repository("o/n", None), MANY, "found 5 GGUFs, expected one: give o/n:FILE or :QUANT; there are: dflash-Q4_K"),
        (Repository("o/n", None, "", "Q4"), MANY, "o/n:Q4: no GGUF is named so, or of this quant, among 7, expected"),
        (Repository("o/n", None, "", "dflash"), MANY, "found 3 GGUFs, expected one"),
        (Repository("o/n", None, "", "F16"), MANY, "no GGUF is named so"),
        (Repository("o/n", None), ("README.md",), "o/n: found no GGUF, expected one; there is README.md"),
        (Repository("o/n", None, "y"), MANY, "o/n/y: found no GGUF, expected one; there is nothing"),
    ],
)
def test_several_or_none_are_told(repository: Repository, files: tuple[str, ...], said: str) -> None:
    with pytest.raises(WrongInput) as caught:
        choose(Contents(repository, COMMIT, files))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_only_one_is_taken(gguf_hub: FakeHub, ggufs: dict[str, Path]) -> None:
    path = fetch_whole(Path("org/one@main"))
    assert path.read_bytes() == (ggufs["org/one"] / "dflash-Q8_0.gguf").read_bytes()
    assert f"/models--org--one/snapshots/{COMMIT}/" in str(path) and not has_holes(path)


@pytest.mark.parametrize("name", ["../../evil.gguf", "/evil.gguf", "a//evil.gguf", "a\\..\\evil.gguf", "evil\n.gguf"])
def test_a_server_cannot_name_a_place_outside(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    told = SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name)])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *_, **__: told)
    with pytest.raises(WrongInput, match="org/pair: found no GGUF, expected one; there is nothing"):
        fetch_header(Path("org/pair"))


def test_a_commit_is_forty_digits(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(sha="../../x", siblings=[])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, *_, **__: told)
    with pytest.raises(WrongInput, match=r"the hub gave '\.\./\.\./x' for its commit"):
        fetch_header(Path("org/pair"))


def test_a_model_in_parts_is_refused_before_it_is_fetched(gguf_hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in (1, 2):
        (folder / f"big-{part:05}-of-00002.gguf").write_bytes(b"GGUF" + bytes(10**6))
    gguf_hub.repositories["org/parts"] = folder
    with pytest.raises(WrongInput, match=r"in 2 parts, .*`hf download org/parts --include 'big-\*\.gguf'`.*--merge"):
        fetch_whole(Path("org/parts"))
    assert not gguf_hub.sent["big-00001-of-00002.gguf"]


# --- the header alone ---


def test_inspect_reads_the_header(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    here = ggufs["org/many"] / "dflash-F32.gguf"
    expected = inspect(here).as_json() | {"path": "org/many:F32"}
    assert inspect(Path("org/many:F32")).as_json() == expected
    size = header_bytes(here)
    assert size <= gguf_hub.sent[here.name] < size + STEP < here.stat().st_size // 10
    code, out, err = run(capsys, "inspect", "org/many:F32", "--json")
    found = checked(out)
    assert (code, err) == (0, "") and {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert gguf_hub.sent[here.name] < size + STEP  # which is still there


def test_a_target_s_header_is_enough_to_convert(gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """Its tokenizer and its facts; the line that runs the result names no file with holes."""
    here = ggufs["org/head"] / "target-Q8_0.gguf"
    out = tmp_path / "o.gguf"
    conversion = prepare(replace(job(ggufs["org/one"].parent / "mtp", out), target=Path("org/head")))
    keys = {entry.key: entry.value for entry in conversion.keys}
    assert keys["drafter.target.repository"] == "org/head" and keys["drafter.target.revision"] == COMMIT
    assert keys["drafter.target.path"] == here.name
    assert gguf_hub.sent[here.name] < header_bytes(here) + STEP
    assert convert(conversion.job).launch.startswith("llama-server -m TARGET.gguf ")


def test_a_header_that_was_interrupted_goes_on(gguf_hub: FakeHub, ggufs: dict[str, Path]) -> None:
    here = ggufs["org/one"] / "dflash-Q8_0.gguf"
    gguf_hub.break_after, gguf_hub.breaks = 20_000, 3
    assert inspect(Path("org/one")).as_json()["keys"] == inspect(here).as_json()["keys"]
    assert gguf_hub.sent[here.name] < header_bytes(here) + STEP


def test_a_header_is_there_offline(gguf_hub: FakeHub, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = inspect(Path("org/one@main"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    gguf_hub.repositories.clear()
    assert inspect(Path("org/one@main")) == expected
    with pytest.raises(WrongInput, match="org/many: no such path; from the hub: HF_HUB_OFFLINE is set"):
        inspect(Path("org/many"))


def test_what_hf_downloaded_is_found_offline(
    gguf_hub: FakeHub, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download("org/many", "dflash-Q8_0.gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_header(Path("org/many:Q8_0")) == fetch_whole(Path("org/many")) == Path(path)


# --- a drafter's tensors alone ---


def test_a_head_in_its_target_costs_the_head(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """3 GB of which a header and a head are sent, once for all that look at it."""
    here, mtp = ggufs["org/head"] / "target-Q8_0.gguf", ggufs["org/head"].parent / "mtp.gguf"
    source = mtp.parent / "mtp"
    code, out, err = run(capsys, "doctor", "org/head:Q8_0", "--source", source, "--target", source, "--json")
    gates = {gate["name"]: gate for gate in json.loads(out)["gates"]}
    assert (code, err) == (0, "") and gates["structure"]["outcome"] == gates["pairing"]["outcome"] == "pass"
    assert "bit for bit" in gates["structure"]["summary"]
    head = sum(t.n_bytes for t in read_gguf(mtp).tensors.values())
    most = header_bytes(here) + head + STEP
    assert head < gguf_hub.sent[here.name] < most < here.stat().st_size // 1000
    again = doctor(Path("org/head"), source, source)
    assert [gate.outcome for gate in again] == [Outcome.PASS] * 2 and gguf_hub.sent[here.name] < most


def test_tensors_that_were_interrupted_go_on(gguf_hub: FakeHub, ggufs: dict[str, Path]) -> None:
    here = ggufs["org/head"] / "target-Q8_0.gguf"
    file = read_gguf(fetch_header(Path("org/head")))
    own = {name: tensor for name, tensor in file.tensors.items() if name != "blk.0.ffn_up.weight"}
    file = replace(file, tensors=own)

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    token = WATCH.set(stop)
    gguf_hub.break_after, gguf_hub.breaks = 100_000, 100
    with pytest.raises(KeyboardInterrupt):
        fetch_tensors(Path("org/head"), file)
    WATCH.reset(token)
    sent = gguf_hub.sent[here.name]
    gguf_hub.breaks = 0
    there = fetch_tensors(Path("org/head"), file)
    whole = read_gguf(here)
    assert all((there.tensor_bytes(name) == whole.tensor_bytes(name)).all() for name in own)
    total = sum(tensor.n_bytes for tensor in own.values())
    assert total // 3 < sent and gguf_hub.sent[here.name] < total + header_bytes(here) + STEP + 100_000


# --- doctor ---


def test_doctor_says_what_it_says_of_the_file_here(gguf_hub: FakeHub, ggufs: dict[str, Path]) -> None:
    here = ggufs["org/many"] / "dflash-Q8_0.gguf"
    found = doctor(Path("org/many:Q8_0"), PAIR / "target", PAIR / "drafter")
    assert found == doctor(here, PAIR / "target", PAIR / "drafter")
    assert gguf_hub.sent[here.name] < here.stat().st_size + header_bytes(here) + STEP


def test_a_fault_of_the_header_costs_no_weights(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    draft = Draft.of(ggufs["org/many"] / "dflash-F32.gguf")
    del draft.keys[draft.key(".rope.freq_base")]
    (tmp_path / "sick").mkdir()
    path = draft.write(tmp_path / "sick" / "a.gguf")
    gguf_hub.repositories["org/sick"] = path.parent
    code, out, err = run(capsys, "doctor", "org/sick")
    assert (code, err) == (1, "") and "rope.freq_base: missing" in out and "its weights were not fetched" in out
    assert gguf_hub.sent[path.name] < header_bytes(path) + STEP < path.stat().st_size // 10
    assert max(map(len, out.splitlines())) <= 80


def test_another_target_costs_no_weights(gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path) -> None:
    structure, pairing = doctor(Path("org/many:F32"), small(tmp_path / "other"))
    assert (structure.outcome, pairing.outcome) == (Outcome.PASS, Outcome.FAIL)
    here = ggufs["org/many"] / "dflash-F32.gguf"
    assert gguf_hub.sent[here.name] < header_bytes(here) + STEP


@pytest.mark.parametrize("cut", [1000, 200_000])
def test_a_damaged_file_is_a_fault(gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path, cut: int) -> None:
    """As one on the disk: cut in its header, or behind it."""
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "a.gguf"
    path.write_bytes((ggufs["org/one"] / "dflash-Q8_0.gguf").read_bytes()[:cut])
    gguf_hub.repositories["org/cut"] = path.parent
    (found,) = doctor(Path("org/cut"))
    assert (found,) == doctor(path) and found.outcome is Outcome.FAIL


def test_a_checkpoint_of_the_hub_is_looked_at_as_one(gguf_hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "doctor", "org/drafter", "--target", "org/pair")
    assert (code, err) == (0, "") and "org/drafter: 25 tensors in 1 file, and config.json" in " ".join(out.split())
    assert "can be served" in out or "facts" in out


# --- quantize, redialect, launch, card ---


def test_quantize_makes_what_it_makes_of_the_file_here(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here, ours, theirs = ggufs["org/many"] / "dflash-F32.gguf", tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert run(capsys, "quantize", "org/many:F32", ours, "Q4_K_M", "--dry-run")[0] == 0
    assert gguf_hub.sent[here.name] < header_bytes(here) + STEP
    code, said, err = run(capsys, "quantize", "org/many:F32", ours, "Q4_K_M", "--if-changed")
    assert (code, err) == (0, "")
    assert run(capsys, "quantize", here, theirs, "Q4_K_M")[1].splitlines()[1] == said.splitlines()[1]
    assert ours.read_bytes() == theirs.read_bytes()
    assert "is up to date" in run(capsys, "quantize", "org/many:F32", ours, "Q4_K_M", "--if-changed")[1]
    assert gguf_hub.sent[here.name] < here.stat().st_size + header_bytes(here) + STEP


def test_an_importance_matrix_of_the_hub(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It lies beside the models, and is no model: taken by its name only."""
    folder, name = tmp_path / "weighed", "blk.0.ffn_up.weight"
    folder.mkdir()
    here = ggufs["org/many"] / "dflash-F32.gguf"
    row = read_gguf(here).tensors[name].shape[-1]
    keys = [
        KeyValue("general.architecture", GGUFValueType.STRING, "imatrix"),
        KeyValue("general.type", GGUFValueType.STRING, "imatrix"),
        KeyValue("imatrix.datasets", GGUFValueType.ARRAY, ("a.txt",), GGUFValueType.STRING),
        KeyValue("imatrix.chunk_count", GGUFValueType.UINT32, 1),
        KeyValue("imatrix.chunk_size", GGUFValueType.UINT32, 512),
    ]
    sums = {f"{name}.in_sum2": np.arange(1, row + 1, dtype=np.float32), f"{name}.counts": np.ones(1, np.float32)}
    stored = [StoredTensor(key, value.shape, GGMLQuantizationType.F32) for key, value in sums.items()]
    write_gguf(folder / "imatrix.gguf", keys, stored, lambda tensor: [sums[tensor.name]])
    (folder / here.name).symlink_to(here)
    gguf_hub.repositories["org/weighed"] = folder
    for out, matrix in {"a": "org/weighed:imatrix.gguf", "b": folder / "imatrix.gguf", "c": None}.items():
        words = [] if matrix is None else ["--imatrix", matrix]
        assert run(capsys, "quantize", "org/weighed", tmp_path / f"{out}.gguf", "Q4_K_M", *words)[0] == 0
    ours, theirs, plain = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert ours == theirs and len(plain) < len(ours)


def test_the_commit_stays_that_of_the_header(gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path) -> None:
    """A branch that moves between decision and work."""
    decided = prepare_quantize(QuantizeJob(Path("org/one"), tmp_path / "o.gguf", "Q4_0", allow_requantize=True))
    gguf_hub.revisions = {"main": NEWER, "old": COMMIT}
    written = write_quantization(decided).quantization.file.path
    assert f"/snapshots/{NEWER}/" not in str(written) and f"/snapshots/{COMMIT}/" in str(written)


def test_redialect_makes_what_it_makes_of_the_file_here(
    gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path
) -> None:
    here = ggufs["org/many"] / "dflash-Q8_0.gguf"
    for source, out in ((here, "a.gguf"), (Path("org/many:Q8_0@main"), "b.gguf")):
        redialect(RedialectJob(source, None, "ik_llama.cpp", tmp_path / out))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_launch_names_files_that_are_there(
    gguf_hub: FakeHub,
    ggufs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_llama_server.make(tmp_path, help=CURRENT)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    code, out, err = run(capsys, "launch", "org/many:Q8_0", "--target", "org/pair", "--device", "cpu")
    words = shlex.split(out.replace("\\\n", ""))
    drafter = Path(words[words.index("-md") + 1])
    assert code == 0 and words[words.index("-m") + 1] == "TARGET.gguf", err
    assert drafter.read_bytes() == (ggufs["org/many"] / "dflash-Q8_0.gguf").read_bytes()
    assert gguf_hub.sent["model.safetensors"] == 0  # the target's weights are no GGUF


def test_other_engines_get_the_names_of_repositories(gguf_hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    """They fetch for themselves; what was fetched here may be a part."""
    code, out, err = run(capsys, "launch", "org/drafter", "--target", "org/pair", "--engine", "vllm", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["command"][:3] == ["vllm", "serve", "org/pair"]
    assert json.loads(found["command"][4])["model"] == "org/drafter" == found["files"]["drafter"]["path"]
    code, out, err = run(capsys, "launch", "org/target", "--engine", "sglang")
    assert (code, err) == (0, "") and "--model-path org/target " in out and "org/target" not in gguf_hub.sent
    code, out, err = run(capsys, "launch", "org/target@main", "--engine", "sglang")
    assert code == 2 and "give org/target, and the revision in their own option: -- --revision main" in err


def test_a_card_of_files_on_the_hub(
    gguf_hub: FakeHub, ggufs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [ggufs["org/many"] / f"dflash-{recipe}.gguf" for recipe in ("Q8_0", "Q4_K_M")]
    code, out, _ = run(capsys, "card", "org/many:Q8_0", "org/many:Q4_K_M")
    assert code == 0 and run(capsys, "card", *files)[1] == out


def test_a_gguf_is_no_checkpoint(gguf_hub: FakeHub, tmp_path: Path) -> None:
    for name in ("org/many:Q8_0", "org/one"):
        with pytest.raises(WrongInput, match=rf"{name}: .*converted already"):
            convert(ConvertJob(Path(name), None, "lucebox", "F16", tmp_path / "o.gguf"))


def test_a_target_that_is_run_is_fetched_whole(gguf_hub: FakeHub, ggufs: dict[str, Path]) -> None:
    for part in (Part.WHOLE, Part.SERVED):
        assert not has_holes(fetch(Path("org/many:Q8_0"), part))
    assert has_holes(fetch(Path("org/many:F32"), Part.CONFIG))


def test_jobs_in_another_folder_name_repositories(hub: FakeHub) -> None:
    """Paths count from the jobs' folder, names of repositories do not."""
    Path("conf").mkdir()
    Path("conf/jobs.toml").write_text(
        '[[job]]\nname = "a"\nsource = "org/drafter"\ntarget = "org/pair@main"\nfor = "lucebox"\nquant = "Q8_0"\n'
        'out = "out/{name}.gguf"\n[[job]]\nname = "b"\ndo = "quantize"\nsource = "out/a.gguf"\nquant = "Q4_0"\n'
        'out = "out/new/{name}.gguf"\n'
    )
    tasks = read_jobs(Path("conf/jobs.toml"))
    assert tasks[0].inputs == (Path("org/drafter"), Path("org/pair@main")) and tasks[1].after == ("a",)
    assert tasks[1].inputs == tasks[0].outputs == (Path("conf/out/a.gguf"),)


def test_a_target_in_parts_tells_all_by_its_first(gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path) -> None:
    draft = Draft.of(ggufs["org/target-GGUF"] / "target-F32.gguf")
    draft.keys["split.count"] = KeyValue("split.count", GGUFValueType.UINT16, 2)
    (tmp_path / "parts").mkdir()
    draft.write(tmp_path / "parts" / "big-F32-00001-of-00002.gguf")
    (tmp_path / "parts" / "big-F32-00002-of-00002.gguf").write_bytes(bytes(10**6))
    gguf_hub.repositories["org/parts"] = tmp_path / "parts"
    for name, target in (("a", Path("org/parts:F32")), ("b", ggufs["org/target-GGUF"] / "target-F32.gguf")):
        convert(ConvertJob(PAIR / "drafter", target, "llama.cpp", "Q8_0", tmp_path / f"{name}.gguf"))
    ours, theirs = (read_gguf(tmp_path / f"{name}.gguf").keys for name in "ab")
    assert {key for key in ours if ours[key] != theirs.get(key)} <= {
        f"drafter.target.{key}" for key in ("name", "repository", "revision", "path")
    }
    assert not gguf_hub.sent["big-F32-00002-of-00002.gguf"]
    served = fetch(Path("org/parts:F32"), Part.SERVED)  # llama-server finds the others beside the first
    for part in (tmp_path / "parts").iterdir():
        assert served.with_name(part.name).read_bytes() == part.read_bytes()
    assert served.name == "big-F32-00001-of-00002.gguf" and not has_holes(served)


def test_jobs_name_ggufs(
    gguf_hub: FakeHub, ggufs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at by their headers, made, and up to date as files that lie here are."""
    (tmp_path / "jobs.toml").write_text(
        '[[job]]\nname = "a"\ndo = "quantize"\nsource = "org/many:F32@main"\nquant = "Q8_0"\nout = "{name}.gguf"\n'
        '[[job]]\nname = "b"\ndo = "verify"\nfile = "org/many:Q8_0"\ntarget = "org/pair"\nsource = "org/drafter"\n'
        'json = "b.json"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "find_engine", lambda name, job: None)
    here = ggufs["org/many"] / "dflash-F32.gguf"
    quantization, verification = read_jobs(Path("jobs.toml"))
    checked = preflight.preflight([quantization, verification])
    assert not checked.faulty and gguf_hub.sent[here.name] < header_bytes(here) + STEP
    assert isinstance(quantization.job, QuantizeJob) and isinstance(verification.job, Verification)
    found = standing(prepare_quantize(quantization.job))
    assert not found.up_to_date and found.wanted.inputs["source"].read_bytes() == here.read_bytes()
    inputs = standing(verification.job).wanted.inputs
    assert {"file", "folder/model.safetensors", "folder/config.json", "source/model.safetensors"} <= inputs.keys()
    assert inputs["file"].read_bytes() == (ggufs["org/many"] / "dflash-Q8_0.gguf").read_bytes()


def test_verify_runs_whole_files(
    gguf_hub: FakeHub, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an engine gets, in place of one that measures."""
    gguf_hub.repositories["org/target"] = PAIR / "target"  # as its name is in the file
    given: list[VerifyJob] = []

    def run_nothing(job: VerifyJob, gates: Sequence[Gate], watch: Watch) -> EngineAnswer:
        given.append(job)
        return EngineAnswer((), {})

    monkeypatch.setattr(verify, "find_engine", lambda name, job: run_nothing)
    words = ["--target", "org/target", "--target", "org/target-GGUF", "--source", "org/drafter", "--json", "-"]
    code, out, _ = run(capsys, "verify", "org/many:Q8_0", *words)
    gates = {gate["name"]: gate["outcome"] for gate in json.loads(out)["gates"]}
    assert code == 0 and gates["structure"] == gates["pairing"] == "pass" and len(given) == 2
    job = given[0]
    assert job.file.read_bytes() == (ggufs["org/many"] / job.file.name).read_bytes()
    assert job.folder is not None and (job.folder / "model.safetensors").exists()
    assert job.gguf is not None and job.gguf.read_bytes() == (ggufs["org/target-GGUF"] / "target-F32.gguf").read_bytes()


def test_the_page_s_commands_run(
    gguf_hub: FakeHub, ggufs: dict[str, Path], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/hub.md, with small models under the names of large ones."""
    fake_llama_server.make(tmp_path, help=CURRENT)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gguf_hub.repositories |= {
        "z-lab/Qwen3-8B-DFlash": PAIR / "drafter",
        "Qwen/Qwen3-8B": PAIR / "target",
        "Qwen/Qwen3-8B-GGUF": ggufs["org/target-GGUF"],
        "Qwen/Qwen3.5-4B": repository,
        "me/drafters-GGUF": ggufs["org/many"],
    }
    commands = re.findall(r"^\$ convert-drafter (.+)$", (ROOT / "docs" / "hub.md").read_text(), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        with pytest.raises(SystemExit) as done:
            main(shlex.split(command))
        assert done.value.code == 0, command


def test_a_slash_before_a_file_is_the_disk_s(hub: FakeHub) -> None:
    for look in (doctor, inspect, fetch_whole):
        with pytest.raises(
            WrongInput, match=r"nothing of this name; a GGUF in a repository on the hub: org/one:x\.gguf"
        ):
            look(Path("org/one/x.gguf"))


def test_a_scan_takes_no_file_with_holes_for_a_model(gguf_hub: FakeHub, tmp_path: Path) -> None:
    path = fetch_header(Path("org/one"))
    found = scan(path.parent)
    assert not found.models and [skipped.path for skipped in found.skipped] == [path]


# --- ranges ---

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)))


@given(RANGES, st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_ranges_are_sets_of_bytes(ranges: list[tuple[int, int]], whole: tuple[int, int]) -> None:
    every = {at for start, end in ranges for at in range(start, end)}
    there = joined(ranges)
    assert [at for start, end in there for at in range(start, end)] == sorted(every)
    assert all(a[1] < b[0] for a, b in pairwise(there))
    missing = [at for start, end in without(whole, there) for at in range(start, end)]
    assert missing == sorted(set(range(*whole)) - every)
