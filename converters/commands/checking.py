"""Commands that look at a drafter: `inspect`, `doctor` and `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from convert_drafter.converters.commands import show, show_doctor
from convert_drafter.converters.commands.options import (
    INPUT,
    json_option,
    plans_options,
    settings_option,
    verify_options,
)
from convert_drafter.converters.commands.output import emit, emit_result, errors, phases, progress, results
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.errors import plain
from convert_drafter.converters.inspection import inspect
from convert_drafter.converters.preflight import Plans, beside_file, is_checkpoint, preflight
from convert_drafter.converters.verdict import Outcome, Verdict
from convert_drafter.converters.verify.job import VerifyJob
from convert_drafter.converters.verify.reports import html, report
from convert_drafter.converters.verify.verify import verify

STDOUT = Path("-")


@click.command("inspect")
@click.argument("path", type=INPUT)
@click.option("--target", type=INPUT, help="The target's folder or GGUF, for what only it tells.")
@settings_option
@json_option
def inspect_command(path: Path, target: Path | None, settings: dict[str, str], as_json: bool) -> None:
    """Show kind, facts (each with the place it came from) and tensors of a checkpoint or a GGUF.

    \b
    convert-drafter inspect Qwen3.6-27B-DFlash
    """
    inspection = inspect(path, settings, target)
    show.warnings(errors, inspection.warnings)
    emit_result(as_json, "inspection", inspection.as_json(), lambda: show.inspection(inspection))


@click.command("doctor")
@click.argument("path", metavar="DRAFTER", type=INPUT)
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: is the file this target's?")
@click.option("--source", type=INPUT, help="The checkpoint: are these its facts and its weights?")
@click.option("--jobs", is_flag=True, help="DRAFTER is a jobs.toml: can every job of it begin?")
@plans_options
@json_option
def doctor_command(
    path: Path, target: Path | None, source: Path | None, jobs: bool, plans: Plans, as_json: bool
) -> int:
    """Find every fault of a drafter's GGUF without running it: exit status 0 for none, 1 for faults.

    Of a checkpoint's folder, what would go wrong in converting and serving it. Nothing is written or started.

    \b
    convert-drafter doctor dflash-Qwen3.6-27B-Q8_0.gguf \\
        --target Qwen3.6-27B --source Qwen3.6-27B-DFlash
    convert-drafter doctor Qwen3.6-27B-DFlash \\
        --target Qwen3.6-27B --quant Q8_0 --parallel 4
    convert-drafter doctor --jobs jobs.toml
    """
    if jobs:
        return _doctor_jobs(path, target, source, plans, as_json)
    if is_checkpoint(path) and source is None:
        gates = preflight(path, target, plans)
    else:
        total = path.stat().st_size * (1 if source is None else 2) if path.is_file() else 0
        with progress(path.name, total) as advance:
            gates = doctor(path, target, source, on_bytes=advance) + beside_file(path, target, plans)
    emit(as_json, show_doctor.diagnosis_json(path, gates), lambda: plain(show_doctor.diagnosis(path, gates)))
    return int(any(gate.outcome is Outcome.FAIL for gate in gates))


def _doctor_jobs(path: Path, target: Path | None, source: Path | None, plans: Plans, as_json: bool) -> int:
    from convert_drafter.converters.commands.batching import doctor_jobs  # which reads jobs with the commands here

    if target is not None or source is not None:
        raise click.UsageError("--jobs: a jobs.toml names targets and sources itself; leave --target and --source out")
    if replace(plans, strict=False) != Plans():
        raise click.UsageError("--jobs: a jobs.toml says itself what is planned; only --strict and --json go with it")
    return doctor_jobs(path, plans.strict, as_json)


@click.command("verify")
@verify_options
@click.option("--strict", is_flag=True, help="Exit with 1 also where too few prompts decide nothing.")
@click.option("--json", "json_out", type=INPUT, metavar="R.json", help="Write the verdict as JSON; - prints it.")
@click.option("--html", "html_out", type=INPUT, metavar="R.html", help="Write the verdict as a page of its own.")
def verify_command(job: VerifyJob, strict: bool, json_out: Path | None, html_out: Path | None) -> int:
    """Run a drafter's GGUF with its target and say whether it is as good as the original: 0 yes, 1 no.

    \b
    convert-drafter verify dflash-Qwen3.6-27B-Q8_0.gguf \\
        --target Qwen3.6-27B --source Qwen3.6-27B-DFlash
    """
    places = {report.write_json: json_out, html.write_page: html_out}
    written = {write: path for write, path in places.items() if path is not None and path != STDOUT}
    report.check_places([*written.values(), *filter(None, [job.repair])], job.inputs)  # before minutes are spent
    html.check(html_out)
    with phases() as watch:
        verdict = verify(replace(job, command=click.get_current_context().find_root().obj), watch)
    for write, path in written.items():
        write(verdict, path)
    show_verdict(verdict, json_out == STDOUT, list(written.values()))
    show.warnings(errors, verdict.notes)
    return verdict.exit_code(strict)


def show_verdict(verdict: Verdict, as_json: bool, written: Sequence[Path]) -> None:
    """In colour on a terminal, as plain text elsewhere; what cannot show Unicode gets ASCII."""
    if as_json or not results.is_terminal:
        unicode = results.encoding.startswith("utf")
        emit(as_json, report.as_json(verdict), lambda: report.text(verdict, unicode=unicode))
    else:
        results.print(report.layout(verdict))
    for path in () if as_json else written:
        click.echo(f"wrote {plain(str(path))}")
