"""A batch: what is up to date is skipped, what fails stops no other, and everything is told in order."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from batches import JOBS, jobs_file, threads

from convert_drafter.converters.batch import schedule, work
from convert_drafter.converters.batch.crew import Crew, crew
from convert_drafter.converters.batch.log import log_path
from convert_drafter.converters.batch.schedule import run_tasks
from convert_drafter.converters.batch.task import Result, Summary, Task
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands import show_batch
from convert_drafter.converters.commands.jobs_file import read_jobs
from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.verdict import Gate, Outcome, Verdict

SCHEMA = json.loads((Path(work.__file__).parent / "log.schema.json").read_text())
NAMES = ["first-BF16", "first-Q8_0", "second"]


def run(path: Path, width: int = 1) -> Summary:
    with threads(width) as found:
        return run_tasks(read_jobs(path), found)


def outcomes(found: Summary) -> dict[str, str]:
    return {result.task: result.status.value for result in found.results}


def command(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == code


@pytest.mark.parametrize("width", [1, 3])
def test_a_second_run_does_nothing(tmp_path: Path, width: int) -> None:
    path = jobs_file(tmp_path)
    assert outcomes(run(path, width)) == dict.fromkeys(NAMES, "done")
    files = {file: file.stat() for file in (tmp_path / "out").iterdir()}
    assert {file.name for file in files} == {
        f"{name}.gguf{end}" for name in ("first-BF16", "first-Q8_0", "second-F16") for end in ("", ".stamp.json")
    }
    for file in files:
        if file.suffix == ".gguf":
            os.utime(file, (1, 1))
    before = {file: file.read_bytes() for file in files if file.suffix == ".gguf"}
    found = run(path, width)
    assert outcomes(found) == dict.fromkeys(NAMES, "up to date")
    assert before == {file: file.read_bytes() for file in before}
    assert all(file.stat().st_mtime == 1 for file in before)


def test_only_what_changed_is_made_again(tmp_path: Path) -> None:
    path = jobs_file(tmp_path)
    run(path)
    (tmp_path / "out" / "second-F16.gguf").unlink()
    assert outcomes(run(path)) == {**dict.fromkeys(NAMES, "up to date"), "second": "done"}
    jobs_file(tmp_path, JOBS.replace('quant = "F16"', 'quant = "F16"\nset.rope_parameters.rope_theta = 5000'))
    found = run(path)
    assert outcomes(found) == {**dict.fromkeys(NAMES, "up to date"), "second": "done"}
    assert found.results[2].reasons[0] == "set: was {}, is {'rope_parameters.rope_theta': '5000'}"
    jobs_file(tmp_path)
    assert outcomes(run(path)) == {**dict.fromkeys(NAMES, "up to date"), "second": "done"}
    weights = tmp_path / "drafter" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert outcomes(run(path)) == dict.fromkeys(NAMES, "done")


def test_convert_if_changed_and_a_batch_believe_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One stamp for a batch and for the Makefile's rules, which are `convert --if-changed`."""
    path, out = jobs_file(tmp_path), tmp_path / "out" / "second-F16.gguf"
    words = ["--for", "lucebox", "--quant", "F16", "--if-changed", "-o"]
    run(path)
    command("convert", tmp_path / "drafter", *words, out)
    assert capsys.readouterr().out == f"{out} is up to date\n"
    out.unlink()
    command("convert", tmp_path / "drafter", *words, out)
    assert "wrote" in capsys.readouterr().out
    assert outcomes(run(path)) == dict.fromkeys(NAMES, "up to date")


def test_a_failure_stops_only_what_reads_its_result(tmp_path: Path) -> None:
    more = """
[[job]]
name = "bad"
source = "absent"
quant = "BF16"
[[job]]
name = "reader"
do = "quantize"
source = "out/bad-BF16.gguf"
quant = "Q8_0"
[[job]]
name = "reader-of-reader"
do = "quantize"
source = "out/reader-Q8_0.gguf"
quant = "Q4_0"
[[job]]
name = "after"
do = "quantize"
source = "out/second-F16.gguf"
quant = "Q8_0"
"""
    found = run(jobs_file(tmp_path, JOBS + more))
    assert outcomes(found) == {
        **dict.fromkeys(NAMES, "done"), "bad": "failed", "reader": "not run", "reader-of-reader": "not run",
        "after": "done",
    }  # fmt: skip
    assert found.failed
    bad, reader, again = (result.failure for result in found.results[3:6])
    assert bad is not None
    assert bad.message.startswith(f"{tmp_path}/absent: there is nothing of this name; expected a checkpoint's folder")
    assert bad.exit_code == 3
    assert reader is not None
    assert again is not None
    assert (reader.message, again.message) == ("waits for bad, which failed", "waits for reader, which was not run")


def test_a_task_begins_when_what_it_reads_is_made(tmp_path: Path) -> None:
    """Also where jobs.toml names the reader first."""
    reader = '[[job]]\nname = "reader"\ndo = "quantize"\nsource = "out/second-F16.gguf"\nquant = "Q8_0"\n'
    head, _, rest = JOBS.partition("[[job]]")
    path = jobs_file(tmp_path, f"{head}{reader}[[job]]{rest}")
    assert outcomes(run(path, 3)) == {"reader": "done", **dict.fromkeys(NAMES, "done")}
    assert next(iter(outcomes(run(path, 3)).items())) == ("reader", "up to date")
    changed = path.read_text().replace('quant = "F16"', 'quant = "F16"\nset.rope_parameters.rope_theta = 5000')
    path.write_text(changed)
    assert outcomes(run(path, 3)) == {"reader": "done", **dict.fromkeys(NAMES[:2], "up to date"), "second": "done"}


def verdict(outcome: Outcome) -> Verdict:
    return Verdict("a.gguf", "target", None, "torch", {}, (Gate("structure", outcome, "as it is"),))


@pytest.mark.parametrize(("outcome", "status"), [(Outcome.FAIL, "failed"), (Outcome.PASS, "done")])
def test_a_verification_that_says_no_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, status: str
) -> None:
    more = 'verify = true\ntarget = "target"\n'
    (tmp_path / "target").mkdir()
    monkeypatch.setattr(work, "verify", lambda job: verdict(outcome))
    path = jobs_file(tmp_path, JOBS.replace('quant = "F16"\n', f'quant = "F16"\n{more}'))
    monkeypatch.setattr(schedule, "run_task", without_target)
    found = run(path)
    assert outcomes(found) == {**dict.fromkeys(NAMES, "done"), "second.verify": status}
    assert json.loads((tmp_path / "out" / "second-F16.verdict.json").read_text())["outcome"] == outcome.value
    again = "up to date" if status == "done" else "failed"
    assert outcomes(run(path)) == {**dict.fromkeys(NAMES, "up to date"), "second.verify": again}


def without_target(task: Task, code: str | None, rehash: bool) -> Result:
    """The small drafter has no target: its conversion is asked without one."""
    job: Any = task.job
    return work.run_task(replace(task, job=replace(job, target=None)) if task.does == "convert" else task, code, rehash)


def test_a_fault_of_ours_is_told_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(job: object) -> object:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(work, "prepare", broken)
    (task, *_) = read_jobs(jobs_file(tmp_path))
    result = work.run_task(task)
    assert result.failure is not None
    assert result.failure.message.startswith("a fault of convert-drafter: ZeroDivisionError('of ours')")
    assert "ZeroDivisionError" in (result.failure.traceback or "")
    monkeypatch.setattr(work, "prepare", lambda job: (_ for _ in ()).throw(MemoryError()))
    out_of_memory = work.run_task(task).failure
    assert out_of_memory is not None
    assert out_of_memory.message.startswith("out of memory: allow more")


def test_another_program_s_worker_is_refused(tmp_path: Path) -> None:
    (task, *_) = read_jobs(jobs_file(tmp_path))
    failure = work.run_task(task, code="another").failure
    assert failure is not None
    assert "has another convert-drafter than the one that started this batch" in failure.message


class Broken(Executor):
    """Loses every call, or cannot take one."""

    def __init__(self, takes: bool) -> None:
        self.takes, self.calls = takes, 0

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.calls += 1
        if not self.takes:
            raise RuntimeError("closed")
        lost: Future[Any] = Future()
        lost.set_exception(ConnectionError("gone"))
        return lost


@pytest.mark.parametrize("takes", [True, False])
def test_a_lost_call_is_tried_again_and_then_fails(tmp_path: Path, takes: bool) -> None:
    executor = Broken(takes)
    found = run_tasks(read_jobs(jobs_file(tmp_path)), Crew(executor, 2, 1, 2, True, lambda: None, advice="; call home"))
    assert outcomes(found) == dict.fromkeys(NAMES, "failed")
    assert executor.calls == 6
    told = "ConnectionError: gone" if takes else "RuntimeError: closed"
    assert {result.failure and result.failure.message for result in found.results} == {f"{told}, 2 times; call home"}
    assert {result.attempts for result in found.results} == {2}


def test_crews_that_cannot_be() -> None:
    for words in ({"workers": 2}, {"memory": 2**30}):
        with (
            pytest.raises(WrongUsage, match=r"is for this machine; with --scheduler it is told to"),
            crew(scheduler="tcp://x:1", **words),
        ):
            pass


# --- the command ---


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jobs_file(tmp_path, JOBS.replace('source = "drafter"\nquant = "F16"', 'source = "absent"\nquant = "F16"'))
    command("batch", path, "--logs", tmp_path / "logs", code=1)
    shown = capsys.readouterr()
    table, failures, total = shown.out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["task", *NAMES]
    assert " ".join(failures.split()).startswith(f"second: {tmp_path}/absent: there is nothing of this name; expected")
    assert f"log: {tmp_path}/logs/second.json" in " ".join(failures.split())
    assert total == f"3 tasks: 2 done, 1 failed; logs in {tmp_path}/logs\n"
    assert "[3/3] second: failed: " in shown.err
    for name in NAMES:
        content = json.loads(log_path(tmp_path / "logs", name).read_text())
        jsonschema.validate(content, SCHEMA)
        assert content["task"] == name
    done = json.loads(log_path(tmp_path / "logs", "first-Q8_0").read_text())
    assert done["status"] == "done"
    assert done["reasons"] == [f"{tmp_path}/out/first-Q8_0.gguf: not there"]
    assert done["figures"]["out_bytes"] == (tmp_path / "out" / "first-Q8_0.gguf").stat().st_size
    assert done["figures"]["tensors"] == {"Q8_0": 15, "F32": 10}
    assert done["made_from"]["settings"]["recipe"] == "Q8_0"
    assert done["worker"]["pid"] != os.getpid()
    shutil.copytree(tmp_path / "drafter", tmp_path / "absent")
    command("batch", path, "--json", "--rehash")
    content = json.loads(capsys.readouterr().out)
    jsonschema.validate(content, SCHEMA)
    assert [task["status"] for task in content["tasks"]] == ["up to date", "up to date", "done"]
    assert (tmp_path / "jobs.logs" / "second.json").is_file()


def test_a_jobs_file_that_is_wrong_ends_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("batch", jobs_file(tmp_path, JOBS.replace('"F16"', '"F17"')), code=3)
    assert "job 'second', line 10: quant: found \"F17\", expected a recipe; did" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "jobs.logs").exists()


@pytest.mark.parametrize("value", ["4", "4 cats", "-1G", "GiB"])
def test_a_memory_limit_is_a_size(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("batch", jobs_file(tmp_path), "--memory-limit", value, code=2)
    assert "expected a size, e.g. 512MiB or 4GiB" in capsys.readouterr().err


def test_a_scheduler_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import distributed  # noqa: F401
    except ImportError:
        command("batch", jobs_file(tmp_path), "--scheduler", "tcp://127.0.0.1:9", code=4)
        assert '--scheduler needs dask.distributed: pip install "convert-drafter[batch]"' in capsys.readouterr().err
        return
    command("batch", jobs_file(tmp_path), "--scheduler", "nonsense://x", code=3)
    assert "error: --scheduler nonsense://x: no Dask scheduler answers" in capsys.readouterr().err


def test_the_table_fits_80_columns() -> None:
    name = "a-drafter-with-a-very-long-name-Q4_K_M-drafter-and-some-more-of-it-x" * 2
    failure = work.failure_of(OSError(28, "No space left on device", "/" + "long/" * 30))
    tasks = [Task(name, None, "job 'a'"), Task("b", None, "job 'b'")]  # type: ignore[arg-type]
    results = (
        Result(name, schedule.Status.DONE, 4000.0, figures={"out_bytes": 123456789}),
        Result("b", schedule.Status.FAILED, 61.0, failure=failure),
    )
    lines = show_batch.summary(tasks, Summary(results), Path("logs")).splitlines()
    assert all(len(line) <= 80 for line in lines if "long/" not in line)
    assert "1:06:40 h" in lines[1] or "1:06:40 h" in lines[2]
    assert any(line.split() == ["b", "failed", "1:01", "min"] for line in lines)
