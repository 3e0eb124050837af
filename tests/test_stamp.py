"""Stamps: a file is made again exactly when what it is made from changes (T-27, T-28), and never because of a time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_llama_server import HELP, make
from json_results import checked
from published import PAIR, small_checkpoint
from target_gguf import split_gguf, write_target

from convert_drafter.converters import ConvertJob, QuantizeJob, TypeOptions, VerifyJob, convert, file_hash, stamp
from convert_drafter.converters.cli import main
from convert_drafter.converters.convert import prepare, write_conversion
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.file_hash import SETTLED, FileHash, hash_file
from convert_drafter.converters.quantize import prepare_quantize, write_quantization
from convert_drafter.converters.stamp import Verification, if_changed, read_stamp, record, stamp_path, standing


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered from another test."""
    monkeypatch.setattr(file_hash, "_hashed", {})


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this moment count as old enough to be told apart by their times."""
    monkeypatch.setattr(file_hash, "SETTLED", -(10**12))


@pytest.fixture
def job(tmp_path: Path) -> ConvertJob:
    return ConvertJob(small_checkpoint(tmp_path / "drafter"), None, "lucebox", "Q8_0", tmp_path / "out.gguf")


def reasons(job: ConvertJob) -> tuple[str, ...]:
    return standing(prepare(job)).reasons


def made(job: ConvertJob) -> ConvertJob:
    assert if_changed(prepare(job), True, lambda: write_conversion(prepare(job))) is not None
    return job


def rewritten(path: Path, place: int = -1) -> None:
    """Another byte in the file, its size and time of modification as they were."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


# --- conversions ---


def test_what_was_made_is_up_to_date(job: ConvertJob) -> None:
    assert reasons(job) == (f"{job.out}: not there",)
    made(job)
    assert reasons(job) == ()
    assert if_changed(prepare(job), True, lambda: pytest.fail("made again")) is None
    assert reasons(replace(job, threads=1)) == ()  # it changes no byte


def test_a_file_without_a_stamp_is_made_again(job: ConvertJob) -> None:
    convert(job)
    assert reasons(job) == ("no stamp of an earlier run",)


CHANGES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"recipe": "BF16"}, ("recipe", "keys", "tensors")),
    ({"settings": {"rope_parameters.rope_theta": "5000"}}, ("set", "facts", "keys")),
    ({"options": TypeOptions(tensor_types=((".*ffn_down.*", "F16"),))}, ("types", "tensors")),
    ({"measure": True}, ("report",)),
]


@pytest.mark.parametrize(("change", "names"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_a_changed_setting_is_noticed_both_ways(
    job: ConvertJob, change: dict[str, Any], names: tuple[str, ...]
) -> None:
    """T-28: a wish that is taken back counts as much as one that is made."""
    other = replace(job, **change)
    for before, after in ((job, other), (other, job)):
        made(before)
        assert [reason.split(":")[0] for reason in reasons(after)] == list(names)
        before.out.unlink()


def test_another_runtime_is_noticed(tmp_path: Path) -> None:
    job = ConvertJob(PAIR / "drafter", PAIR / "target", "lucebox", "Q8_0", tmp_path / "out.gguf")
    made(job)
    assert "runtime: was 'lucebox', is 'llama.cpp'" in reasons(replace(job, runtime="llama.cpp"))


@pytest.mark.usefixtures("settled")
def test_other_bytes_under_the_same_size_and_time_are_noticed(job: ConvertJob) -> None:
    made(job)
    assert reasons(job) == ()
    rewritten(job.source / "model.safetensors")
    assert reasons(job) == ("source/model.safetensors: changed",)


@pytest.mark.usefixtures("settled")
def test_another_fact_in_a_config_of_the_same_size_is_noticed(job: ConvertJob) -> None:
    made(job)
    config = (job.source / "config.json").read_bytes()
    rewritten(job.source / "config.json", config.index(b"4096") + 3)  # max_position_embeddings: 4097
    assert reasons(job) == ("facts: changed", "keys: changed", "source/config.json: changed")


def test_a_time_alone_changes_nothing(job: ConvertJob) -> None:
    made(job)
    for path in (job.source / "model.safetensors", job.source / "config.json", job.out):
        os.utime(path, (1, 1))
    assert reasons(job) == ()
    os.utime(job.out, (2**33, 2**33))
    assert reasons(job) == ()


def test_a_checkpoint_that_moved_is_the_same(job: ConvertJob, tmp_path: Path) -> None:
    made(job)
    shutil.move(job.source, tmp_path / "elsewhere" / "drafter")
    assert reasons(replace(job, source=tmp_path / "elsewhere" / "drafter")) == ()
    shutil.move(tmp_path / "elsewhere" / "drafter", tmp_path / "renamed")
    assert reasons(replace(job, source=tmp_path / "renamed")) == ("keys: changed",)  # general.name


def test_the_target_s_tokenizer_is_noticed_and_nothing_else_of_it(tmp_path: Path) -> None:
    """What a drafter's file takes of its target is in its keys, so a target of any size is not hashed."""
    target = tmp_path / "target"
    shutil.copytree(PAIR / "target", target)
    job = made(ConvertJob(PAIR / "drafter", target, "llama.cpp", "BF16", tmp_path / "out.gguf"))
    rewritten(target / "model.safetensors")
    assert reasons(job) == ()
    tokenizer = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": "{{ another }}"}))
    assert reasons(job) == ("keys: changed",)


def test_another_program_makes_it_again(job: ConvertJob, monkeypatch: pytest.MonkeyPatch) -> None:
    made(job)
    monkeypatch.setattr(stamp, "code_digest", lambda beside: "another")
    assert reasons(job) == ("code: changed",)


def test_the_program_s_digest_is_of_what_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout changes without its version."""
    copy = tmp_path / "converters"
    shutil.copytree(stamp.HERE, copy)
    monkeypatch.setattr(stamp, "HERE", copy)

    def digests() -> list[str]:
        stamp.code_digest.cache_clear()
        return [stamp.code_digest(stamp.BESIDE_FILES), stamp.code_digest(stamp.BESIDE_VERDICTS)]

    try:
        first = digests()
        (copy / "commands" / "show.py").write_text("# other\n")
        assert digests() == first
        (copy / "verify" / "loop.py").write_text("# other\n")
        second = digests()
        assert (second[0] == first[0], second[1] == first[1]) == (True, False)
        (copy / "ops.py").write_text("# other\n")
        assert not set(digests()) & {*first, *second}
    finally:
        stamp.code_digest.cache_clear()


@pytest.mark.usefixtures("settled")
def test_a_result_that_is_another_file_is_made_again(job: ConvertJob) -> None:
    made(job)
    rewritten(job.out)
    assert reasons(job) == ("out.gguf: not the file that was made",)
    job.out.unlink()
    assert reasons(job) == (f"{job.out}: not there",)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": "convert-drafter/stamp", "version": 2}', "null"])
def test_a_stamp_that_cannot_be_read_proves_nothing(job: ConvertJob, content: str) -> None:
    made(job)
    stamp_path(job.out).write_text(content)
    assert reasons(job) == ("no stamp of an earlier run",)


@pytest.mark.parametrize("part", ["settings", "inputs", "outputs"])
def test_a_stamp_with_a_part_of_another_kind_proves_nothing(job: ConvertJob, part: str) -> None:
    made(job)
    content = json.loads(stamp_path(job.out).read_text())
    for wrong in (3, ["a"], {"a": 1}, {"a": {"sha256": "x"}}):
        stamp_path(job.out).write_text(json.dumps({**content, part: wrong}))
        assert reasons(job) != ()


def test_a_source_that_changes_meanwhile_gets_no_stamp(job: ConvertJob) -> None:
    decided = prepare(job)
    before = standing(decided)
    write_conversion(decided)
    rewritten(job.source / "model.safetensors")
    with pytest.raises(WrongInput, match=r"model\.safetensors: changed while .*out\.gguf was made of it; run it again"):
        record(before)
    assert read_stamp(job.out) is None


# --- quantization and verification ---


def test_quantization_is_stamped_too(job: ConvertJob, tmp_path: Path) -> None:
    convert(replace(job, recipe="BF16", out=tmp_path / "in.gguf"))
    wanted = QuantizeJob(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0")
    decided = prepare_quantize(wanted)
    if_changed(decided, True, lambda: write_quantization(decided))
    assert standing(decided).up_to_date
    assert standing(prepare_quantize(replace(wanted, recipe="Q4_0"))).reasons == (
        "recipe: was 'Q8_0', is 'Q4_0'", "keys: changed", "tensors: changed",
    )  # fmt: skip
    rewritten(wanted.source)
    assert standing(decided).reasons == ("source: changed",)


def test_a_verification_is_its_settings_and_every_file_it_reads(tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(PAIR / "target", target)
    (target / ".cache").mkdir()
    for name in (".cache/x", "other.gguf", "a.verdict.json", "a.gguf.stamp.json"):
        (target / name).write_text("not read")
    file, verdict = tmp_path / "a.gguf", tmp_path / "a.verdict.json"
    file.write_text("a drafter")
    verdict.write_text("a verdict")
    asked = Verification(VerifyJob(file, (target,), PAIR / "drafter"), verdict)
    record(standing(asked))
    assert standing(asked).up_to_date
    for change in (
        {"new_tokens": 8},
        {"max_drop": 0.1},
        {"template": {"enable_thinking": False}},
        {"dtype": "float16"},
    ):
        assert len(standing(replace(asked, job=replace(asked.job, **change))).reasons) == 1
    assert standing(replace(asked, strict=True)).reasons == ("strict: was False, is True",)
    assert standing(replace(asked, job=replace(asked.job, threads=1))).up_to_date
    known = read_stamp(verdict)
    assert known is not None
    assert {name for name in known.inputs if name.startswith("folder/")} == {
        f"folder/{path.name}" for path in (PAIR / "target").iterdir()
    }
    rewritten(target / "model.safetensors")
    assert standing(asked).reasons == ("folder/model.safetensors: changed",)


def test_llama_server_is_its_program_and_its_libraries(tmp_path: Path) -> None:
    """A rebuilt libllama under the same program is another engine; what else lies in its folder is not."""
    for folder in ("bin", "lib"):
        (tmp_path / folder).mkdir()
    server = make(tmp_path / "bin", help=HELP)
    for name in ("bin/libllama.so.0.6.0", "bin/libggml-cpu.so", "lib/libmtmd.dylib", "lib/libllama.so.0.6.0"):
        (tmp_path / name).write_text("code")
    (tmp_path / "bin" / "libllama.so").symlink_to("libllama.so.0.6.0")
    for name in ("bin/libother.so", "bin/llama-cli", "bin/llama.txt"):
        (tmp_path / name).write_text("not its own")
    target = write_target(PAIR / "target", tmp_path / "target.gguf")
    asked = Verification(VerifyJob(target, (target,), server=server), tmp_path / "a.verdict.json")
    (tmp_path / "a.verdict.json").write_text("a verdict")
    record(standing(asked))
    known = read_stamp(tmp_path / "a.verdict.json")
    assert known is not None and {name for name in known.inputs if "server" in name} == {
        "llama-server", *(f"llama-server/{name}" for name in ("libllama.so.0.6.0", "libggml-cpu.so", "libmtmd.dylib"))
    }  # fmt: skip
    (tmp_path / "bin" / "libother.so").write_text("changed")
    assert standing(asked).up_to_date
    rewritten(tmp_path / "bin" / "libllama.so.0.6.0")
    assert standing(asked).reasons == ("llama-server/libllama.so.0.6.0: changed",)


def test_a_target_in_parts_is_all_of_them(tmp_path: Path) -> None:
    first, second, _ = split_gguf(write_target(PAIR / "target", tmp_path / "target.gguf"), tmp_path / "parts")
    file, verdict = tmp_path / "a.gguf", tmp_path / "a.verdict.json"
    file.write_text("a drafter")
    verdict.write_text("a verdict")
    asked = Verification(VerifyJob(file, (first,), server=make(tmp_path, help=HELP)), verdict)
    record(standing(asked))
    assert standing(asked).up_to_date
    rewritten(second)
    assert standing(asked).reasons == (f"gguf/{second.name}: changed",)


# --- hashes ---


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    found: list[Path] = []
    read = file_hash._read
    monkeypatch.setattr(file_hash, "_read", lambda path, advance: (found.append(path), read(path, advance))[1])
    return found


def old(path: Path, content: str) -> Path:
    """A file that nobody touched for longer than a disk's clock takes to tick."""
    path.write_text(content)
    time.sleep(SETTLED / 1e9 + 0.1)
    return path


def test_an_untouched_file_is_read_once(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "a", "content")
    known = hash_file(path)
    assert (len(reads), known.seen is not None) == (1, True)
    assert hash_file(path) == known
    assert len(reads) == 1  # this process remembers
    monkeypatch.setattr(file_hash, "_hashed", {})
    assert hash_file(path, known) == known
    assert len(reads) == 1  # the stamp remembers
    assert hash_file(path, known, rehash=True) == known
    assert len(reads) == 2
    rewritten(path)
    assert hash_file(path, known).sha256 != known.sha256


def test_a_young_file_is_read_again(tmp_path: Path, reads: list[Path]) -> None:
    """A write in the same tick of the disk's clock would leave every time as it is."""
    (tmp_path / "a").write_text("content")
    known = hash_file(tmp_path / "a")
    assert known.seen is None
    assert hash_file(tmp_path / "a", known) == known
    assert len(reads) == 2


@pytest.mark.usefixtures("settled")
def test_a_file_moved_over_another_is_read(tmp_path: Path, reads: list[Path]) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))
    known = hash_file(tmp_path / "a")
    (tmp_path / "b").replace(tmp_path / "a")
    assert hash_file(tmp_path / "a", known).sha256 != known.sha256


def test_a_file_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_text("content")
    read = file_hash._read
    monkeypatch.setattr(file_hash, "_read", lambda path, advance: (read(path, advance), path.write_text("more"))[0])
    with pytest.raises(WrongInput, match="a: changed while it was read, expected a file that nobody is writing"):
        hash_file(path)
    with pytest.raises(WrongInput, match="absent: cannot be read: No such file"):
        hash_file(tmp_path / "absent")


def test_hashes_know_their_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("abc")
    assert hash_file(tmp_path / "a") == FileHash("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


# --- the commands ---


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    def call(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        assert exit_.value.code == code, out.err
        return out.out

    yield call


def test_if_changed_of_convert_and_quantize(job: ConvertJob, tmp_path: Path, run: Any) -> None:
    words = ("convert", job.source, "--for", "lucebox", "--quant", "BF16", "-o", job.out, "--if-changed")
    assert run(*words).startswith(f"wrote {job.out}")
    before = job.out.stat()
    assert run(*words) == f"{job.out} is up to date\n"
    said = checked(run(*words, "--json"))
    assert (said["schema"], said["out"], said["up_to_date"]) == ("convert-drafter/conversion", str(job.out), True)
    assert job.out.stat() == before
    assert run(*words, "--set", "rope_parameters.rope_theta=5000").startswith("wrote")
    small = ("quantize", job.out, tmp_path / "small.gguf", "Q8_0", "--if-changed")
    assert run(*small).startswith("wrote")
    assert run(*small) == f"{tmp_path / 'small.gguf'} is up to date\n"
    run(*words)
    assert run(*small).startswith("wrote")


def test_without_it_no_stamp_is_left(job: ConvertJob, run: Any) -> None:
    run("convert", job.source, "--for", "lucebox", "--quant", "BF16", "-o", job.out)
    assert [path.name for path in job.out.parent.iterdir() if path.is_file()] == ["out.gguf"]
