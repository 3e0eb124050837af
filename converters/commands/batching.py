"""`batch`: many jobs from one file."""

from __future__ import annotations

from pathlib import Path

import click

from convert_drafter.converters.batch.crew import crew
from convert_drafter.converters.batch.log import summary_json, write_log
from convert_drafter.converters.batch.preflight import preflight
from convert_drafter.converters.batch.schedule import Tell, run_tasks
from convert_drafter.converters.batch.task import Result, Summary, Task
from convert_drafter.converters.commands import show_batch
from convert_drafter.converters.commands.jobs_file import read_jobs, survey_jobs
from convert_drafter.converters.commands.options import INPUT, json_option, parse_memory
from convert_drafter.converters.commands.output import emit, errors, phases
from convert_drafter.converters.errors import plain
from convert_drafter.converters.verdict import NO

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


@click.command()
@click.argument("path", metavar="JOBS.toml", type=INPUT)
@click.option("--workers", type=click.IntRange(1), help="Processes at a time; without it what keeps all cores busy.")
@click.option("--memory-limit", "memory", metavar="SIZE", callback=parse_memory, help="Of each process, e.g. 4GiB.")
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="A Dask cluster's scheduler, which then does the work.")
@click.option("--logs", type=INPUT, metavar="FOLDER", help="Where each job's log goes; JOBS.logs without it.")
@click.option("--rehash", is_flag=True, help="Read every file again; trust no remembered hash.")
@json_option
def batch(path: Path, logs: Path | None, rehash: bool, as_json: bool, **crewing: object) -> int:
    """Convert, quantize and verify what JOBS.toml lists; what is up to date is skipped: 0 all is well, 1 a job failed.

    \b
    convert-drafter batch jobs.toml
    """
    tasks, folder = read_jobs(path), logs or path.with_suffix(".logs")
    folder.mkdir(parents=True, exist_ok=True)
    with crew(tasks=len(tasks), **crewing) as found:  # type: ignore[arg-type]
        summary = run_tasks(tasks, found, rehash, _telling(folder, len(tasks)))
    emit(as_json, summary_json(tasks, summary, folder), lambda: plain(show_batch.summary(tasks, summary, folder)))
    return _exit_code(summary)


def _telling(folder: Path, count: int) -> Tell:
    """Writes each log, and a line on stderr as a task ends: a night is long."""
    ended: list[str] = []

    def tell(task: Task, result: Result) -> None:
        ended.append(task.name)
        write_log(folder, task, result)
        errors.print(plain(show_batch.ended(len(ended), count, result)), markup=False)

    return tell


def _exit_code(summary: Summary) -> int:
    return INTERRUPTED if summary.interrupted else NO if summary.failed else 0


def doctor_jobs(path: Path, strict: bool, as_json: bool) -> int:
    """`doctor --jobs`: whether every job can begin; 1 where one cannot."""
    tasks, problems = survey_jobs(path)
    with phases() as watch:
        found = preflight(tasks, problems, watch, strict)
    emit(as_json, show_batch.preflight_json(path, found), lambda: plain(show_batch.preflight(path, found)))
    return NO if found.faulty else 0
