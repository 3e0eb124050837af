"""One task from beginning to end, in whatever process: skipped where its stamp holds, else made and stamped."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.batch.task import Failure, Result, Status, Task
from convert_drafter.converters.convert import ConvertJob, prepare, write_conversion
from convert_drafter.converters.errors import DrafterError, WrongInput
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize, write_quantization
from convert_drafter.converters.stamp import Standing, Verification, code_digest, record, standing
from convert_drafter.converters.verdict import NO
from convert_drafter.converters.verify.reports import html, report
from convert_drafter.converters.verify.verify import verify
from convert_drafter.quant.measure import Errors

STATUS_FILE = Path("/proc/self/status")  # Linux
FAULT = 70  # EX_SOFTWARE in sysexits.h: a fault of ours, which no command means to end with


@dataclass(frozen=True)
class Made:
    """What a maker did; nothing where `found` was up to date. `fault` is a verification's answer where it is no."""

    found: Standing
    warnings: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None


def run_task(task: Task, code: str | None = None, rehash: bool = False) -> Result:
    """Do a task; whatever goes wrong is in the result. `code` is the digest of the program that asks for it."""
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    try:
        _same_program(code)
        for out in task.outputs:
            out.parent.mkdir(parents=True, exist_ok=True)
        made = MAKERS[type(task.job)](task.job, rehash)
        result = _result(task, made)
    except Exception as error:
        result = Result(task.name, Status.FAILED, failure=failure_of(error))
    return replace(result, started=started, seconds=time.monotonic() - clock, worker=_worker())


def failure_of(error: BaseException) -> Failure:
    """An exception in words for people; what nobody foresaw keeps its traceback for the log."""
    if isinstance(error, DrafterError):
        return Failure(str(error), error.exit_code)
    if isinstance(error, MemoryError):
        return Failure("out of memory: allow more (--memory-limit), or give the job fewer threads", 3)
    if isinstance(error, OSError):
        return Failure(f"{error.filename or 'disk'}: {error.strerror or error}", 3)
    lines = "".join(traceback.format_exception(error))
    return Failure(f"a fault of convert-drafter: {error!r}; its log has the place, please report it", FAULT, lines)


def _same_program(code: str | None) -> None:
    if code is not None and code != code_digest():
        other = "has another convert-drafter than the one that started this batch"
        raise WrongInput(f"{platform.node()}: {other}; install the same version there")


def _result(task: Task, made: Made) -> Result:
    if made.found.up_to_date:
        return Result(task.name, Status.UP_TO_DATE, warnings=made.warnings, stamp=_stamp(made.found))
    status = Status.DONE if made.fault is None else Status.FAILED
    failure = None if made.fault is None else Failure(made.fault, NO)
    return Result(
        task.name, status, reasons=made.found.reasons, warnings=made.warnings, figures=made.figures,
        stamp=_stamp(made.found), failure=failure,
    )  # fmt: skip


def _stamp(found: Standing) -> dict[str, Any]:
    """Settings and content, without the times and places that a stamp remembers."""
    hashes = {name: known.sha256 for name, known in found.stamp.inputs.items()}
    return {"settings": dict(found.stamp.settings), "inputs": hashes}


def _convert(job: ConvertJob, rehash: bool) -> Made:
    decided = prepare_attach(job) if job.attach else prepare(job)
    found = standing(decided, rehash)
    if found.up_to_date:
        return Made(found, decided.warnings)
    done = write_conversion(decided)
    record(found)
    types = (tensor.choice.type.name for tensor in decided.plan.tensors)
    figures = _figures(done.out, done.source_bytes, done.out_bytes, types, done.launch, done.errors)
    return Made(found, decided.warnings, figures)


def _quantize(job: QuantizeJob, rehash: bool) -> Made:
    decided = prepare_quantize(job)
    found = standing(decided, rehash)
    if found.up_to_date:
        return Made(found, decided.warnings)
    done = write_quantization(decided)
    record(found)
    types = (recoding.choice.type.name for recoding in decided.recodings)
    figures = _figures(done.out, done.source_bytes, done.out_bytes, types, done.launch, done.errors)
    return Made(found, decided.warnings, figures)


def _figures(
    out: Path, source: int, size: int, types: Iterable[str], launch: str | None, errors: Mapping[str, Errors]
) -> dict[str, Any]:
    measured = {
        name: {"rmse": e.rmse, "relative": e.relative, "max": e.max, "cosine": e.cosine} for name, e in errors.items()
    }
    written = {"out": str(out), "source_bytes": source, "out_bytes": size, "tensors": dict(Counter(types))}
    return {**written, "launch": launch, **({"errors": measured} if measured else {})}


def _verify(asked: Verification, rehash: bool) -> Made:
    """A verification that fails is not stamped: it is asked again the next time."""
    job = asked.job
    report.check_places([asked.json, *([asked.html] if asked.html else ())], job.inputs)
    html.check(asked.html)
    found = standing(asked, rehash)
    if found.up_to_date:
        return Made(found)
    verdict = verify(job)
    report.write_json(verdict, asked.json)
    if asked.html is not None:
        html.write_page(verdict, asked.html)
    content = report.as_json(verdict)
    figures = {"verdict": str(asked.json), "outcome": content["outcome"], "answer": content["answer"]}
    if verdict.exit_code(asked.strict):
        return Made(found, verdict.notes, figures, content["answer"])
    record(found)
    return Made(found, verdict.notes, figures)


MAKERS: dict[type, Callable[[Any, bool], Made]] = {
    ConvertJob: _convert, QuantizeJob: _quantize, Verification: _verify
}  # fmt: skip


def _worker() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "peak_bytes": _peak()}


def _peak() -> int | None:
    """The most memory this process has held, in bytes; getrusage would count what its parent held as it forked."""
    try:
        words = STATUS_FILE.read_text().split("VmHWM:")[1].split()
    except (OSError, IndexError):
        return None
    return int(words[0]) * 1024


__all__ = ["failure_of", "run_task"]
