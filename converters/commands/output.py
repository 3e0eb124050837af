"""What commands print: results on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from convert_drafter.converters.errors import plain
from convert_drafter.converters.repository import WATCH
from convert_drafter.converters.verify.measured import Watch

errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)
VERSION = 1  # of results.schema.json


def emit(as_json: bool, data: Any, text: Callable[[], str]) -> None:
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text())


def emit_result(as_json: bool, name: str, data: Mapping[str, Any], text: Callable[[], str]) -> None:
    """As `emit`, after the name and version of what it is; results.schema.json has them all."""
    emit(as_json, {"schema": f"convert-drafter/{name}", "version": VERSION, **data}, text)


def emit_made(
    as_json: bool, name: str, report: Any, out: Path, data: Callable[[Any], Any], text: Callable[[Any], str]
) -> None:
    """What was made; no report where it was up to date."""
    if report is None:
        up_to_date = {"out": str(out), "up_to_date": True}
        emit_result(as_json, name, up_to_date, lambda: plain(f"{out} is up to date"))
    else:
        emit_result(as_json, name, data(report), lambda: text(report))


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr when it is a terminal; yields the function to tell bytes to; 0 is an unknown total."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(name, total=total or None)
        yield lambda n: bar.advance(task, n)


@contextmanager
def phases() -> Iterator[Watch]:
    """A line for each phase of long work on stderr, when it is a terminal; a total of 0 is one nobody knows."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total or None)

        yield watch


@contextmanager
def fetching() -> Iterator[None]:
    """Progress of what is fetched from the hub, a bar that is there as long as bytes come."""
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars: list[Progress] = []

    def watch(name: str, done: int, total: int) -> None:
        if not bars:
            bars.append(Progress(*columns, console=errors, disable=not errors.is_terminal))
            bars[0].start()
            bars[0].add_task(name, total=total)
        bars[0].update(bars[0].task_ids[0], completed=done)
        if done == total:
            bars.pop().stop()

    token = WATCH.set(watch)
    try:
        yield
    finally:
        WATCH.reset(token)
        for bar in bars:
            bar.stop()
