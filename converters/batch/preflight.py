"""Before a night is spent: whether every task of a batch can begin. Headers are read, nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.batch.task import Task
from convert_drafter.converters.checkpoint import open_checkpoint
from convert_drafter.converters.convert import ConvertJob, prepare
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.drafters import needed
from convert_drafter.converters.errors import DrafterError, Problems
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_header
from convert_drafter.converters.pairing import check_pairing
from convert_drafter.converters.preflight import tokenizer_gate
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize
from convert_drafter.converters.stamp import Verification
from convert_drafter.converters.structure import survey
from convert_drafter.converters.target import read_target
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.converters.verify.prompts import read_prompts
from convert_drafter.converters.verify.reports import html
from convert_drafter.converters.verify.verify import find_engine
from convert_drafter.converters.weight_files import everything, find_config, find_weights

NOT_THERE_YET = ".not-there-yet"
KEY_BYTES, TENSOR_BYTES = 24, 192  # beside a key's text; of a tensor's description and the gap that aligns its data


@dataclass(frozen=True)
class Checked:
    """What was found about one task; `n_bytes` is the size of what it will write, None where nobody can tell yet."""

    task: Task
    faults: tuple[str, ...]
    notes: tuple[str, ...]
    n_bytes: int | None = None


@dataclass(frozen=True)
class Disk:
    """A disk that results go to: bytes that are needed at most, if every task runs, and that are free."""

    folder: Path
    needed: int
    free: int

    @property
    def fault(self) -> bool:
        return self.needed > self.free


@dataclass(frozen=True)
class Preflight:
    """`problems` are jobs.toml's own."""

    problems: tuple[str, ...]
    checks: tuple[Checked, ...]
    disks: tuple[Disk, ...]

    @property
    def faulty(self) -> bool:
        return bool(self.problems) or any(check.faults for check in self.checks) or any(d.fault for d in self.disks)


def preflight(
    tasks: Sequence[Task],
    problems: Sequence[str] = (),
    watch: Callable[[str, int, int], None] = lambda phase, done, total: None,
    strict: bool = False,
) -> Preflight:
    """Look at every task; `problems` of reading them are handed through, `strict` makes warnings faults."""
    before: dict[str, Checked] = {}
    for task in _in_order(tasks):
        watch("looking at jobs", len(before), len(tasks))
        before[task.name] = _checked(task, before, _Findings(strict))
    checks = tuple(before[name] for name in dict.fromkeys(task.name for task in tasks))
    return Preflight(tuple(problems), checks, tuple(_disks(checks)))


def _in_order(tasks: Sequence[Task]) -> Iterator[Task]:
    """Makers before those that read what they make, as a batch runs them; a circle, already a problem, as it is."""
    waiting = list(tasks)
    while waiting:
        names = {task.name for task in waiting}
        free = [task for task in waiting if not names & set(task.after)] or waiting
        yield from free
        waiting = [task for task in waiting if not any(task is other for other in free)]


@dataclass
class _Findings:
    strict: bool = False
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_bytes: int | None = None

    def ask(self, question: Callable[[], None]) -> None:
        """Take down what a question raises: every fault of a task is wanted, not the first."""
        try:
            question()
        except Problems as error:
            self.faults += [f"{error.where}: {problem}" for problem in error.problems]
        except DrafterError as error:
            self.faults.append(str(error))
        except OSError as error:
            self.faults.append(f"{error.filename or 'disk'}: {error.strerror or error}")

    def warn(self, warnings: Iterable[str]) -> None:
        (self.faults if self.strict else self.notes).extend(warnings)

    def gate(self, gate: Gate) -> None:
        """What a gate of `doctor` says of one file, as far as it is not simply right."""
        said = ": ".join((gate.name, gate.summary, *gate.details[:1]))
        if gate.outcome is Outcome.FAIL:
            self.faults.append(said)
        elif gate.outcome in (Outcome.ADVICE, Outcome.UNDECIDED):
            self.warn([said])


def _checked(task: Task, before: dict[str, Checked], found: _Findings) -> Checked:
    awaited = [path for path in task.inputs if not path.exists() and any(_makes(before, task, path))]
    for path in awaited:
        found.notes.append(f"{path}: is made by an earlier task, and looked at then")
    job = task.job
    for out in task.outputs:
        found.faults += _place_faults(out)
    if isinstance(job, Verification):
        _verification(job, awaited, found)
    elif not awaited and not found.faults:
        found.ask(lambda: _decided(job, found))
    elif isinstance(job, QuantizeJob):
        found.n_bytes = max((size for name in task.after if (size := _size_of(name, before))), default=None)
    lost = [name for name in task.after if name in before and before[name].faults]
    found.faults += [f"waits for {name}, which cannot begin" for name in lost]
    return Checked(task, tuple(dict.fromkeys(found.faults)), tuple(found.notes), found.n_bytes)


def _size_of(name: str, before: dict[str, Checked]) -> int | None:
    return before[name].n_bytes if name in before else None


def _makes(before: dict[str, Checked], task: Task, path: Path) -> Iterator[bool]:
    for name in task.after:
        yield name in before and path.absolute() in {out.absolute() for out in before[name].task.outputs}


def _decided(job: ConvertJob | QuantizeJob, found: _Findings) -> None:
    """Decide all that the task will decide. A folder that is not there yet is made by it, and nothing is in it."""
    if not job.out.parent.is_dir():
        job = replace(job, out=_existing(job.out.parent) / f"{job.out.name}{NOT_THERE_YET}")
    if isinstance(job, QuantizeJob):
        quantization = prepare_quantize(job)
        found.warn(quantization.warnings)
        found.n_bytes = quantization.n_bytes + _head_bytes(quantization.keys, len(quantization.recodings))
        return
    conversion = prepare_attach(job) if job.attach else prepare(job)
    found.warn(conversion.warnings)
    found.gate(tokenizer_gate(conversion))
    base = len(conversion.base.tensors) if conversion.base else 0
    found.n_bytes = conversion.n_bytes + _head_bytes(conversion.keys, base + len(conversion.plan.tensors))


def _head_bytes(keys: Iterable[KeyValue], n_tensors: int) -> int:
    """Of a file's head at most: text takes more than numbers; a tensor has a name, four sizes and a gap behind it."""
    return sum(KEY_BYTES + len(entry.key) + len(str(entry.value)) for entry in keys) + n_tensors * TENSOR_BYTES


def _verification(asked: Verification, awaited: Sequence[Path], found: _Findings) -> None:
    job = asked.job
    found.ask(lambda: html.check(asked.html))
    found.ask(lambda: _engines(asked))
    found.ask(lambda: _prompts(job.prompts))
    there = [target for target in job.targets if target not in awaited]
    for target in there:
        found.ask(lambda target=target: _target(target))  # type: ignore[misc]
    if job.source is not None and job.source not in awaited:
        found.ask(lambda: _source(job.source))
    if job.file not in awaited:
        faulty = len(found.faults)
        found.ask(lambda: _drafter(job.file, there if not faulty else (), found))


def _engines(asked: Verification) -> None:
    for name in asked.job.engines:
        find_engine(name, asked.job)


def _prompts(path: Path | None) -> None:
    read_prompts(path)


def _target(path: Path) -> None:
    """A verification runs the target: its weights are needed, where a conversion takes its config and tokenizer."""
    read_target(fetch(path, Part.CONFIG))
    if path.is_dir():
        find_config(path, find_weights(path, everything).folder)


def _source(path: Path | None) -> None:
    if path is not None:
        open_checkpoint(fetch(path, Part.DRAFTER, needed), needed)


def _drafter(path: Path, targets: Sequence[Path], found: _Findings) -> None:
    """The file, and whether it is these targets': to run a pair that is none takes as long."""
    drafter = read_drafter_file(fetch_header(path))
    found.faults += [f"{path}: {problem}" for problem in drafter.problems]
    for target in () if drafter.problems else targets:
        place = fetch(target, Part.CONFIG)
        found.gate(check_pairing(survey(drafter.file, drafter.cell, read_target(place)), place))


# --- places ---


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)


def _place_faults(out: Path) -> Iterator[str]:
    place = _existing(out.parent)
    if out.is_dir():
        yield f"{out}: is a folder, expected the name of a file"
    elif not place.is_dir():
        yield f"{out}: cannot be written: {place} is no folder"
    elif not os.access(place, os.W_OK | os.X_OK):
        yield f"{out}: cannot be written: no file can be made in {place}"


def _disks(checks: Sequence[Checked]) -> Iterator[Disk]:
    """For each disk: what all results need beyond those they replace, and the largest twice, as it grows beside."""
    folders: dict[int, Path] = {}
    growth: dict[int, int] = {}
    largest: dict[int, int] = {}
    for check in checks:
        out, size = check.task.outputs[0], check.n_bytes or 0
        if not size:
            continue
        folder = _existing(out.parent)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        old = out.stat().st_size if out.is_file() else 0
        growth[device] = growth.get(device, 0) + max(0, size - old)
        largest[device] = max(largest.get(device, 0), min(old, size))
    for device, folder in folders.items():
        yield Disk(folder, growth[device] + largest[device], shutil.disk_usage(folder).free)


__all__ = ["Checked", "Disk", "Preflight", "preflight"]
