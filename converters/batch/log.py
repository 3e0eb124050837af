"""A log for each task, as versioned JSON (log.schema.json); docs/batch.md describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert_drafter.converters.batch.task import Result, Summary, Task
from convert_drafter.converters.destination import write_whole

LOG, SUMMARY, VERSION = "convert-drafter/batch-log", "convert-drafter/batch", 1


def log_path(folder: Path, task: str) -> Path:
    return folder / f"{task}.json"


def entry(task: Task, result: Result) -> dict[str, Any]:
    """Everything about one task, plain."""
    failure = result.failure
    return {
        "task": task.name,
        "does": task.does,
        "place": task.where,
        "status": result.status.value,
        "reasons": list(result.reasons),
        "started": result.started,
        "seconds": round(result.seconds, 3),
        "attempts": result.attempts,
        "after": list(task.after),
        "outputs": [str(path) for path in task.outputs],
        "warnings": list(result.warnings),
        "failure": None if failure is None else {"message": failure.message, "exit_code": failure.exit_code},
        "figures": dict(result.figures),
    }


def write_log(folder: Path, task: Task, result: Result) -> None:
    """Written complete or not at all. Raises `WrongInput` where it cannot be."""
    content = {
        "schema": LOG,
        "version": VERSION,
        **entry(task, result),
        "made_from": dict(result.stamp),
        "worker": dict(result.worker),
        "traceback": result.failure and result.failure.traceback,
    }
    write_whole(json.dumps(content, indent=2, default=str) + "\n", log_path(folder, task.name))


def summary_json(tasks: list[Task], summary: Summary, logs: Path) -> dict[str, Any]:
    return {
        "schema": SUMMARY,
        "version": VERSION,
        "interrupted": summary.interrupted,
        "failed": summary.failed,
        "logs": str(logs),
        "tasks": [entry(task, result) for task, result in zip(tasks, summary.results, strict=True)],
    }
