"""jobs.toml: what to convert, quantize and verify, read into the jobs that the commands build.

`[defaults]` holds for every job that knows the key, `[[job]]` is one job for each of its recipes and runtimes.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click

from convert_drafter.converters.batch.task import Job, Task, linked
from convert_drafter.converters.commands.checking import verify_command
from convert_drafter.converters.commands.jobs_options import BadValue, keys, read_value, unknown
from convert_drafter.converters.commands.making import convert, quantize
from convert_drafter.converters.commands.options import type_options
from convert_drafter.converters.convert import ConvertJob
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.quantize import QuantizeJob
from convert_drafter.converters.stamp import Verification
from convert_drafter.converters.verify.job import VerifyJob

COMMANDS: dict[str, click.Command] = {"convert": convert, "quantize": quantize, "verify": verify_command}
MATRIX = ("quant", "for")  # keys that may be lists: a task for each
TEMPLATES = ("out", "json", "html")  # paths that name what is made
OWN = ("name", "do", "verify")
OF_THE_JOB = {"convert": ("file", "source", "set"), "quantize": ("file",)}  # its verification's, from the job itself
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
HEADER = re.compile(r"^[ \t]*\[\[[ \t]*job[ \t]*\]\]", re.MULTILINE)


def read_jobs(path: Path) -> list[Task]:
    """Every task of a jobs.toml, in its order. Raises `WrongInput`, or `Problems` with all that is wrong in it."""
    tasks, problems = survey_jobs(path)
    if problems:
        raise Problems(str(path), problems)
    return tasks


def survey_jobs(path: Path) -> tuple[list[Task], list[str]]:
    """The tasks that can be read, and what is wrong. Raises `WrongInput` for what is no TOML at all."""
    with file_access(path, "read"):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WrongInput(f"{path}: not valid TOML: {error}; expected [defaults] and [[job]] tables") from error
    problems = [unknown(key, ("defaults", "job")) for key in found if key not in ("defaults", "job")]
    defaults, jobs = found.get("defaults", {}), found.get("job", [])
    if not isinstance(defaults, dict):
        return [], [*problems, "defaults: expected a table, [defaults]"]
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, dict) for job in jobs):
        return [], [*problems, "job: found none, expected at least one [[job]] table"]
    problems += [f"defaults: {unknown(key, known)}" for known in (_all_keys(),) for key in defaults if key not in known]
    tasks: list[Task] = []
    for job, where in zip(jobs, _places(jobs, text), strict=True):
        entry = _Entry(job, defaults, where, path)
        tasks += entry.tasks()
        problems += [f"{where}: {problem}" for problem in entry.problems]
    problems += _same_names(tasks)
    linked_tasks, wrong = linked(tasks)
    return linked_tasks, problems + (wrong if not problems else [])


def _places(jobs: Sequence[Mapping[str, Any]], text: str) -> Iterator[str]:
    """What a message calls each job: its name and the line of its [[job]]."""
    lines = [text.count("\n", 0, match.start()) + 1 for match in HEADER.finditer(text)]
    for i, job in enumerate(jobs):
        named = f"job {job['name']!r}" if isinstance(job.get("name"), str) else f"job {i + 1}"
        yield f"{named}, line {lines[i]}" if len(lines) == len(jobs) else named  # a text may hold such a line


def _all_keys() -> list[str]:
    return list(dict.fromkeys([*OWN[1:], *(key for command in COMMANDS.values() for key in keys(command))]))


def _same_names(tasks: Sequence[Task]) -> Iterator[str]:
    first: dict[str, Task] = {}
    for task in tasks:
        if (other := first.setdefault(task.name, task)) is not task:
            yield f"{task.where}: task {task.name!r} is one of {other.where} too, expected a name of its own"


@dataclass
class _Entry:
    """One [[job]] with the defaults under it; what is wrong in it is collected."""

    job: Mapping[str, Any]
    defaults: Mapping[str, Any]
    where: str
    path: Path

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        merged = {**self.defaults, **self.job}
        self.name, self.does = merged.get("name"), merged.get("do", "convert")

    def tasks(self) -> list[Task]:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            self.problems.append(f"name: found {self.name!r}, expected letters, digits, dots and dashes")
        if self.does not in COMMANDS:
            self.problems.append(f"do: found {self.does!r}, expected one of {', '.join(COMMANDS)}")
        if self.problems:
            return []
        command = COMMANDS[self.does]
        given = self._given(command)
        matrix = [self._list(given, key) for key in MATRIX]
        tasks: list[Task] = []
        for values in product(*matrix):
            chosen = {key: value for key, value in zip(MATRIX, values, strict=True) if value is not None}
            tasks += self._of_one(command, {**given, **chosen})
        return [] if self.problems else tasks

    def _given(self, command: click.Command) -> dict[str, Any]:
        """The job's keys over those defaults that its command knows."""
        known = keys(command)
        own = OWN if self.does != "verify" else OWN[:2]
        self.problems += [unknown(key, [*own, *known]) for key in self.job if key not in known and key not in own]
        given = {key: value for key, value in self.defaults.items() if key in known}
        return given | {key: value for key, value in self.job.items() if key in known}

    def _list(self, given: Mapping[str, Any], key: str) -> list[Any]:
        value = given.get(key)
        if not isinstance(value, list):
            return [value]
        if not value or len({str(one) for one in value}) < len(value):
            self.problems.append(f"{key}: found {value!r}, expected at least one, and each once")
        return value

    def _of_one(self, command: click.Command, given: dict[str, Any]) -> list[Task]:
        """The task of one recipe and runtime, and its verification."""
        words = {"name": str(self.name), **{key: self._spelled(command, key, given) for key in MATRIX if key in given}}
        several = [key for key in MATRIX if isinstance({**self.defaults, **self.job}.get(key), list)]
        name = "-".join([words["name"], *(words[key] for key in several if key in words)])
        options = self._options(command, given, words)
        if self.problems:
            return []
        made = self._job(self.does, options)
        tasks = [Task(name, made, self.where)]
        asked = self.job.get("verify", self.defaults.get("verify", False))
        if self.does != "verify" and asked is not False:
            tasks += self._verification(asked, made, options, words, f"{name}.verify")
        return tasks

    def _spelled(self, command: click.Command, key: str, given: Mapping[str, Any]) -> str:
        """A recipe or runtime as its table spells it; what is none is told with the other options."""
        with suppress(BadValue):
            return str(read_value(keys(command)[key], given[key], self.path.parent))
        return str(given[key])

    def _options(
        self, command: click.Command, given: Mapping[str, Any], words: Mapping[str, str], under: str = ""
    ) -> dict[str, Any]:
        """The command's options by their own names."""
        known, options = keys(command), dict[str, Any]()
        for key, param in known.items():
            if key in given:
                try:
                    value = self._filled(given[key], words) if key in TEMPLATES else given[key]
                    options[str(param.name)] = read_value(param, value, self.path.parent)
                except BadValue as bad:
                    self._wrong(f"{under}{key}: {bad}")
            elif param.required and not under:
                self._wrong(f"{key}: missing, expected in the job or in [defaults]")
        return options

    def _wrong(self, problem: str) -> None:
        if problem not in self.problems:  # each recipe of the job would say it again
            self.problems.append(problem)

    def _filled(self, template: Any, words: Mapping[str, str]) -> Any:
        if not isinstance(template, str):
            return template
        if strange := [name for name in PLACEHOLDER.findall(template) if name not in words]:
            raise BadValue(f"found {{{strange[0]}}}, expected one of {', '.join(f'{{{name}}}' for name in words)}")
        return PLACEHOLDER.sub(lambda match: words[match[1]], template)

    def _job(self, does: str, options: dict[str, Any]) -> Job:
        if does == "verify":
            return self._asked(options)
        wishes = type_options(options)
        if does == "quantize":
            return QuantizeJob(**options, options=wishes)
        return ConvertJob(**{"target": None, **options}, options=wishes)

    def _verification(
        self, asked: Any, made: Job, options: Mapping[str, Any], words: Mapping[str, str], name: str
    ) -> list[Task]:
        """The verification of what a job makes: its file, source, target and settings are the job's."""
        below, above = (part if isinstance(part, dict) else {} for part in (asked, self.defaults.get("verify")))
        given, known = {**above, **below}, keys(verify_command)
        if not isinstance(asked, (bool, dict)):
            self._wrong(f"verify: found {asked!r}, expected true, false or a table of options")
        for key in given:
            if key in OF_THE_JOB[self.does]:
                self._wrong(f"verify.{key}: found a second one, expected none: it is the job's own")
            elif key not in known:
                self._wrong(f"verify.{unknown(key, known)}")
        found = self._options(verify_command, given, words, "verify.")
        assert isinstance(made, (ConvertJob, QuantizeJob))
        found.setdefault("targets", (options["target"],) if options.get("target") else ())
        if self.does == "convert":
            found |= {"source": options["source"], "settings": options.get("settings", {})}
        if not found["targets"]:
            self._wrong("verify.target: missing, expected the target that the drafter is run with")
        if self.problems:
            return []
        return [Task(name, self._asked({**found, "file": made.out}), self.where)]

    def _asked(self, options: dict[str, Any]) -> Verification:
        file: Path = options["file"]
        json = options.pop("json_out", None) or file.with_suffix(".verdict.json")
        html, strict = options.pop("html_out", None), options.pop("strict", False)
        job = VerifyJob(**options, command=f"convert-drafter batch {self.path.name}")
        return Verification(job, json, html, strict)


__all__ = ["read_jobs", "survey_jobs"]
