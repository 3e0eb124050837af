"""`org/name` where a path may stand: what is fetched, and what is said where it cannot be (hub on loopback)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_checkpoints import job, small
from published import PAIR
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import ConvertJob, WrongInput, WrongUsage, convert, doctor, inspect
from convert_drafter.converters.card import making_command, read_card
from convert_drafter.converters.checkpoint import open_checkpoint, read_rows
from convert_drafter.converters.cli import main
from convert_drafter.converters.destination import refuse_overwriting
from convert_drafter.converters.drafters import needed
from convert_drafter.converters.excerpt import plan_excerpt, read_remote_header, write_excerpt
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.repository import WATCH, Repository, repository_of
from convert_drafter.converters.verdict import Outcome

HEAD = Path("org/target")


def refusal(place: Path, part: Part = Part.DRAFTER) -> str:
    with pytest.raises(WrongInput) as caught:
        fetch(place, part, needed)
    return str(caught.value)


def weights_sent(hub: FakeHub) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


# --- names ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("z-lab/Qwen3.6-27B-DFlash", Repository("z-lab/Qwen3.6-27B-DFlash", None)),
        ("org/name@main", Repository("org/name", "main")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        (f"org/name@{COMMIT}", Repository("org/name", COMMIT)),
        ("name", None),
        ("./org/name", None),
        ("../org/name", None),
        ("a/b/c", Repository("a/b", None, "c")),
        ("org/name/sub/folder@v1", Repository("org/name", "v1", "sub/folder")),
        ("org/name:Q8_0", Repository("org/name", None, "", "Q8_0")),
        ("org/name:sub/x y.gguf@refs/pr/1", Repository("org/name", "refs/pr/1", "", "sub/x y.gguf")),
        ("org/name/sub:Q8_0", Repository("org/name", None, "sub", "Q8_0")),
        ("org/name@v1:Q8_0", Repository("org/name", "v1", "", "Q8_0")),
        ("org/name@v1:Q8_0@v2", None),
        ("org/name/x.gguf", None),
        ("org/name/x.safetensors", None),
        ("org/name/../x", None),
        ("org/name:", None),
        ("/org/name", None),
        ("org/name:a\nb", None),
        ("org/name.gguf", None),
        ("org/model.safetensors", None),
        ("org/na me", None),
        ("org/name@", None),
        ("org/näme", None),
    ],
)
def test_names_of_repositories(text: str, expected: Repository | None) -> None:
    assert repository_of(text) == expected == repository_of(Path(text)) or text.startswith("./")
    assert expected is None or str(expected) == text or "@v1:" in text
    assert expected is None or repository_of(str(expected)) == expected


def test_what_lies_here_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert repository_of("org/name") is None
    assert fetch(Path("org/name"), Part.DRAFTER) == Path("org/name")


# --- what is fetched ---


def test_a_head_is_fetched_by_the_bytes_of_its_tensors(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    """T-64: the file is the one from the whole checkpoint; of the weights only what it needs was sent."""
    convert(job(HEAD, tmp_path / "hub.gguf"))
    convert(job(repository, tmp_path / "here.gguf"))
    ours, theirs = read_gguf(tmp_path / "hub.gguf"), read_gguf(tmp_path / "here.gguf")
    assert ours.tensors == theirs.tensors
    assert all((ours.tensor_bytes(name) == theirs.tensor_bytes(name)).all() for name in ours.tensors)
    pinned = {f"drafter.{what}.{key}" for what in ("source", "target") for key in ("repository", "revision")}
    assert ours.keys.keys() - theirs.keys.keys() == pinned
    assert {ours.keys[key].value for key in pinned} == {"org/target", COMMIT}
    said = {"general.name", "drafter.target.name"}
    assert all(ours.keys[key] == theirs.keys[key] for key in theirs.keys if key not in said)  # the headers' hashes too
    tensors = open_checkpoint(repository, needed).tensors
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in repository.glob("*.safetensors"))
    assert (
        sum(t.n_bytes for t in tensors.values())
        < weights_sent(hub)
        < sum(t.n_bytes for t in tensors.values()) + headers + 1
    )
    assert not any(Path(tmp_path / "work").iterdir())


def test_a_second_conversion_fetches_nothing(hub: FakeHub, tmp_path: Path) -> None:
    convert(job(HEAD, tmp_path / "one.gguf"))
    sent = weights_sent(hub)
    convert(job(HEAD, tmp_path / "two.gguf", recipe="Q8_0"))
    assert weights_sent(hub) == sent
    assert inspect(HEAD).kind == "mtp-qwen35"
    (structure, pairing) = doctor(tmp_path / "one.gguf", HEAD, HEAD)
    assert (structure.outcome, pairing.outcome) == (Outcome.PASS, Outcome.PASS)
    assert weights_sent(hub) == sent


def test_a_single_file_is_fetched_in_parts_too(hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["org/one"] = small(tmp_path / "one")
    found = open_checkpoint(fetch(Path("org/one@main"), Part.DRAFTER, needed), needed)
    here = load_file(tmp_path / "one" / "model.safetensors")
    assert sum(t.n_bytes for t in found.tensors.values()) < weights_sent(hub) < sum(t.nbytes for t in here.values())
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(read_rows(tensor, 0, tensor.rows), here[name])


def test_a_huge_target_costs_its_head_alone(hub: FakeHub, tmp_path: Path) -> None:
    """T-64: 3.6 GB of layers, a head of 5 MB; the ratio of a 360 GB release and its 5 GB head and less."""
    folder = small(tmp_path / "huge")
    path = folder / "model.safetensors"
    head = {name: t for name, t in load_file(path).items() if name in needed(list(load_file(path)))}
    head["mtp.extra"] = np.zeros(5_000_000 // 4, np.float32)
    save_file(head, path)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    for i in range(6):
        place = len(data) + i * 600_000_000
        header[f"model.layers.{i}.mlp.up_proj.weight"] = {
            "dtype": "F32", "shape": [150_000_000], "data_offsets": [place, place + 600_000_000],
        }  # fmt: skip
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.truncate(8 + len(text) + len(data) + 6 * 600_000_000)  # a hole; nobody should ask for it
    hub.repositories["org/huge"] = folder
    fetch(Path("org/huge"), Part.DRAFTER, needed)
    assert len(data) < weights_sent(hub) < len(data) + 3 * len(text) + 100 < 6_000_000 < path.stat().st_size // 500


def test_of_a_target_only_config_and_tokenizer(hub: FakeHub, tmp_path: Path) -> None:
    convert(job(Path("org/drafter"), tmp_path / "o.gguf", target=Path("org/pair")))
    assert not any(name.startswith("model") for name in hub.sent if hub.sent[name] > 5_000_000)
    assert weights_sent(hub) < 2 * (PAIR / "drafter" / "model.safetensors").stat().st_size
    keys = read_gguf(tmp_path / "o.gguf").keys
    assert keys["drafter.target.repository"].value == "org/pair" and keys["drafter.target.revision"].value == COMMIT


def test_everything_of_a_target_that_is_run(hub: FakeHub) -> None:
    folder = fetch(Path("org/pair"), Part.WHOLE)
    assert (folder / "model.safetensors").stat().st_size == (PAIR / "target" / "model.safetensors").stat().st_size


def test_other_tensors_that_are_needed_are_fetched_again(hub: FakeHub) -> None:
    """Another release of this program may need more of a target."""
    folder = fetch(HEAD, Part.DRAFTER, lambda names: [name for name in names if name.startswith("mtp.")])
    assert len(open_checkpoint(folder).tensors) == 15
    again = fetch(HEAD, Part.DRAFTER, needed)
    assert again == folder and len(open_checkpoint(folder).tensors) == 18


# --- transfers that break off ---


def test_a_broken_transfer_goes_on_where_it_stopped(hub: FakeHub, repository: Path) -> None:
    hub.break_after, hub.breaks = 40_000, 7
    found = open_checkpoint(fetch(HEAD, Part.DRAFTER, needed), needed)
    tensors = open_checkpoint(repository, needed).tensors
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(read_rows(tensor, 0, tensor.rows), read_rows(tensors[name], 0, tensor.rows))
    assert weights_sent(hub) < sum(t.n_bytes for t in tensors.values()) + 8 * 2000


def test_an_interrupted_fetch_is_resumed(hub: FakeHub) -> None:
    """What was there before Ctrl-C is not sent again, and half a file is none."""
    hub.break_after, hub.breaks = 100_000, 100

    def stop(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    token = WATCH.set(stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(HEAD, Part.DRAFTER, needed)
    WATCH.reset(token)
    sent = weights_sent(hub)
    hub.breaks = 0
    told: list[tuple[int, int]] = []
    token = WATCH.set(lambda name, done, total: told.append((done, total)))
    folder = fetch(HEAD, Part.DRAFTER, needed)
    WATCH.reset(token)
    total = told[-1][1]
    assert told[-1][0] == total and total // 3 < sent
    assert weights_sent(hub) < total + 10_000 + 100_000  # one broken piece at most comes twice
    assert len(open_checkpoint(folder).tensors) == 18


def test_a_busy_hub_is_asked_again(hub: FakeHub) -> None:
    hub.refuse[503] = 3
    assert len(open_checkpoint(fetch(HEAD, Part.DRAFTER, needed)).tensors) == 18


def test_a_hub_that_stays_busy_is_given_up(hub: FakeHub) -> None:
    hub.refuse[503] = 1000
    assert "org/target: no such path; from the hub: the hub refused" in refusal(HEAD)


def test_a_server_that_falls_silent_is_asked_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes and nobody hangs up: huggingface_hub's time limit, which range reads have as well."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.break_after, hub.breaks, hub.stall = 40_000, 2, 30
    started = time.monotonic()
    assert len(open_checkpoint(fetch(HEAD, Part.DRAFTER, needed)).tensors) == 18
    assert hub.breaks == 0 and time.monotonic() - started < hub.stall / 2


def test_a_server_without_ranges_is_told(hub: FakeHub) -> None:
    hub.ranges = False
    assert "the server sends whole files only; hf download the repository instead" in refusal(HEAD)


# --- a checkpoint in a sub-folder ---


@pytest.fixture
def nested(hub: FakeHub, repository: Path, tmp_path: Path) -> FakeHub:
    """Two checkpoints, neither at the root: a drafter and a target with a head."""
    folder = tmp_path / "nested"
    shutil.copytree(PAIR / "drafter", folder / "a" / "drafter")
    shutil.copytree(repository, folder / "head")
    (folder / "tokenizer_config.json").write_text("{}")
    hub.repositories["org/nested"] = folder
    return hub


def test_a_sub_folder_is_a_checkpoint(nested: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on its card names the sub-folder, and makes the same file."""
    out, here = tmp_path / "a.gguf", tmp_path / "b.gguf"
    convert(ConvertJob(Path("org/nested/a/drafter@main"), Path("org/pair"), "llama.cpp", "Q8_0", out))
    keys = read_gguf(out).keys
    assert keys["drafter.source.path"].value == "a/drafter" and "drafter.target.path" not in keys
    command = making_command(read_card([out]).first)
    assert command is not None and f"convert org/nested/a/drafter@{COMMIT} --target org/pair@{COMMIT}" in command
    with pytest.raises(SystemExit) as done:
        main([*shlex.split(command)[1:-1], str(here)])
    assert done.value.code == 0 and here.read_bytes() == out.read_bytes()
    assert not any(name.startswith("model-0") for name in nested.sent)  # the other folder's shards


def test_a_head_in_a_sub_folder_costs_its_bytes(nested: FakeHub, repository: Path, tmp_path: Path) -> None:
    place = Path("org/nested/head")
    convert(job(place, tmp_path / "a.gguf"))
    convert(job(repository, tmp_path / "b.gguf"))
    ours, theirs = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert all((ours.tensor_bytes(name) == theirs.tensor_bytes(name)).all() for name in theirs.tensors)
    assert ours.keys["drafter.source.path"].value == ours.keys["drafter.target.path"].value == "head"
    sent = weights_sent(nested)
    assert sent < sum(path.stat().st_size for path in repository.glob("*.safetensors"))
    assert inspect(place).kind == "mtp-qwen35" and weights_sent(nested) == sent


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("org/nested", "org/nested: no config.json; a config.json is in sub-folders: give org/nested/a/drafter, "),
        ("org/nested@main", "give org/nested/a/drafter@main, org/nested/head@main"),
        ("org/nested/a", "org/nested/a: no config.json; a config.json is in sub-folders: give org/nested/a/drafter"),
        ("org/nested/nothing", "org/nested/nothing: no config.json; a config.json is in sub-folders: give "),
        ("org/drafter/x", "org/drafter/x: no config.json; it is at the root: give org/drafter"),
    ],
)
@pytest.mark.parametrize("part", [Part.DRAFTER, Part.CONFIG, Part.WHOLE])
def test_sub_folders_are_listed(nested: FakeHub, place: str, said: str, part: Part) -> None:
    assert said in refusal(Path(place), part)


def test_what_is_spelled_wrong_here_is_not_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    """A path into a folder that is here names nothing on the hub."""
    (Path("org") / "other").mkdir(parents=True)
    assert repository_of("org/nested/a") is None and repository_of("org/name") == Repository("org/name", None)
    assert repository_of("org/name:Q8_0") == Repository("org/name", None, "", "Q8_0")


# --- what cannot be had ---


def test_an_unknown_repository_is_told(hub: FakeHub) -> None:
    said = refusal(Path("org/nothing"))
    assert said.startswith("org/nothing: no such path; from the hub: no such repository, or a private one")
    assert "hf auth login" in said and "\n" not in said


def test_an_unknown_revision_is_told(hub: FakeHub) -> None:
    assert "no revision v9: give a branch, a tag or a commit" in refusal(Path("org/target@v9"))


@pytest.mark.parametrize(("gated", "said"), [(False, "`hf auth login`"), (True, "access has to be asked for")])
def test_a_token_is_wanted(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, gated: bool, said: str) -> None:
    """And goes to the hub alone: the address that weights come from never sees it."""
    hub.tokens, hub.gated = {"hf_secret"}, gated
    assert said in refusal(HEAD)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert len(open_checkpoint(fetch(HEAD, Part.DRAFTER, needed)).tensors) == 18
    assert not hub.leaked


def test_a_repository_without_weights_is_told(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a-Q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "ggufs" / "config.json").write_text("{}")
    hub.repositories["org/ggufs"] = tmp_path / "ggufs"
    assert "org/ggufs" in refusal(Path("org/ggufs")) and "converted already" in refusal(Path("org/ggufs"))


def test_an_index_names_only_plain_files(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    index = {"weight_map": {"mtp.a": "../../evil.safetensors"}}
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repositories["org/bad"] = tmp_path / "bad"
    assert "weight_map: expected tensors and plain names of shards" in refusal(Path("org/bad"))


def test_offline_takes_what_is_there(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    """As its users know it: HF_HUB_OFFLINE; the command as a whole, with its own environment."""
    out, sent = tmp_path / "o.gguf", hub.sent
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    program = [sys.executable, "-m", "convert_drafter.converters.cli"]
    words = ["convert", "org/target", "--for", "llama.cpp", "--quant", "F32", "-o", str(out)]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *words], env=environment | more, capture_output=True, text=True)

    nothing = run(HF_HUB_OFFLINE="1")
    assert nothing.returncode == 3 and nothing.stderr.count("\n") == 1
    assert "org/target: no such path; from the hub:" in nothing.stderr and "offline" in nothing.stderr
    online = run()
    assert (online.returncode, online.stderr) == (0, ""), online.stderr
    before = sum(sent.values())
    out.unlink()
    offline = run(HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stderr) == (0, "") and out.exists()
    assert sum(sent.values()) == before


def test_a_hub_that_is_down_is_not_needed(hub: FakeHub, tmp_path: Path) -> None:
    """What was fetched is taken, as huggingface_hub takes it; a revision that is gone is told."""
    convert(job(HEAD, tmp_path / "a.gguf"))
    hub.tokens = {"another"}
    convert(job(HEAD, tmp_path / "b.gguf"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_result_may_be_replaced_where_a_source_is_on_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "o.gguf"
    out.write_bytes(b"an old one")
    refuse_overwriting(out, [Path("org/drafter"), Path("org/one:Q8_0")])
    convert(ConvertJob(Path("org/drafter"), Path("org/pair"), "llama.cpp", "Q8_0", out))
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        refuse_overwriting(out, [Path("org/drafter"), out])


def test_jobs_name_repositories(hub: FakeHub, tmp_path: Path) -> None:
    """Looked at first, then made in processes of their own, then up to date without a word to the hub's storage."""
    (tmp_path / "jobs.toml").write_text(
        '[[job]]\nname = "a"\nsource = "org/drafter"\ntarget = "org/pair@main"\nfor = "llama.cpp"\nquant = "Q8_0"\n'
        'out = "{name}.gguf"\n'
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    program = [sys.executable, "-m", "convert_drafter.converters.cli"]

    def run(*words: str) -> tuple[int, str]:
        done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, said = run("doctor", "--jobs", "jobs.toml")
    assert code == 0 and "1 task can begin" in said, said
    code, said = run("batch", "jobs.toml")
    assert code == 0 and "1 done" in said, said
    assert read_gguf(tmp_path / "a.gguf").keys["drafter.source.revision"].value == COMMIT
    sent = sum(hub.sent.values())
    environment["HF_HUB_OFFLINE"] = "1"
    code, said = run("batch", "jobs.toml")
    assert code == 0 and "1 up to date" in said and sum(hub.sent.values()) == sent, said


# --- excerpts ---


def interrupting(most: int) -> Callable[[int], None]:
    """Hears of bytes, and interrupts when there are more."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done > most:
            raise KeyboardInterrupt

    return advance


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5)), unique_by=lambda p: p[0]), st.data())
def test_an_excerpt_is_a_whole_file_with_some_tensors(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Any tensors of any file, however often it is interrupted and wherever."""
    folder = tmp_path_factory.mktemp("excerpt")
    tensors = {name: np.arange(size * 3, dtype=np.int32).reshape(size, 3) for name, size in sizes}
    save_file(tensors, folder / "whole.safetensors")
    raw = (folder / "whole.safetensors").read_bytes()
    header = read_remote_header("whole", lambda start, end: iter([raw[start:end]]))
    chosen = data.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set[str]()
    excerpt, out = plan_excerpt(header, chosen), folder / "model.safetensors"
    for stop in sorted(data.draw(st.lists(st.integers(0, excerpt.n_bytes), max_size=3))):
        with suppress(KeyboardInterrupt):
            write_excerpt(excerpt, out, lambda start, end: iter([raw[start:end]]), interrupting(stop))
    write_excerpt(excerpt, out, lambda start, end: iter([raw[start:end]]), interrupting(excerpt.n_bytes))
    assert out.stat().st_size == excerpt.n_bytes
    (folder / "config.json").write_text("{}")
    (folder / "whole.safetensors").unlink()
    found = load_file(out)
    assert found.keys() == chosen
    assert all((found[name] == tensors[name]).all() for name in chosen)
