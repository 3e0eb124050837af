"""The `convert-drafter` command: parses, calls the library, prints. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

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

from convert_drafter.converters import show, show_doctor, show_quantize
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import ConvertJob, prepare, write_conversion
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.errors import DrafterError, plain
from convert_drafter.converters.inspection import inspect
from convert_drafter.converters.options import (
    INPUT,
    RECIPE,
    encoding_options,
    json_option,
    parse_settings,
    runtime_option,
    settings_option,
    verify_options,
)
from convert_drafter.converters.provenance import tool_version
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize, write_quantization
from convert_drafter.converters.redialect import RedialectJob, prepare_redialect, write_redialection
from convert_drafter.converters.verdict import Outcome, Verdict
from convert_drafter.converters.verify.job import VerifyJob
from convert_drafter.converters.verify.measured import Watch
from convert_drafter.converters.verify.reports import html, report
from convert_drafter.converters.verify.verify import verify

errors = Console(stderr=True, highlight=False, soft_wrap=True)
results = Console(highlight=False)
STDOUT = Path("-")
PATIENCE = 1e-4  # seconds a thread waits before it asks for Python's lock; with Python's own 5 ms cores stand idle
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tool_version(), prog_name="convert-drafter")
def cli() -> None:
    """Turn a published speculative-decoding drafter into a GGUF, with every fact checked."""


@cli.command()
@click.argument("source", type=INPUT)
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: tokenizer, depth, hidden size.")
@runtime_option
@click.option(
    "--quant", "recipe", metavar="RECIPE", type=RECIPE, required=True,
    help="How weights are stored: Q8_0, Q4_K_M ... (`list recipes`).",
)  # fmt: skip
@click.option("-o", "--out", type=INPUT, required=True, help="The GGUF to write.")
@click.option("--attach", type=INPUT, metavar="TARGET.gguf", help="Put an MTP head into its target's GGUF.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@click.option("--ignore-tensor", "ignore", multiple=True, metavar="GLOB", help="Leave a source tensor out on purpose.")
@settings_option
@encoding_options
@json_option
def convert(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Convert SOURCE, a checkpoint folder or .safetensors file, to a GGUF.

    \b
    convert-drafter convert Qwen3.6-27B-DFlash --target Qwen3.6-27B \\
        --for llama.cpp --quant Q8_0 -o dflash-Qwen3.6-27B-Q8_0.gguf
    """
    job = ConvertJob(**options)
    conversion = prepare_attach(job) if job.attach else prepare(job)
    show.warnings(errors, conversion.warnings)
    if dry_run:
        emit(as_json, show.plan_json(conversion), lambda: show.plan(conversion))
        return
    with progress(conversion.job.out.name, conversion.n_bytes) as advance:
        report = write_conversion(conversion, advance)
    emit(as_json, show.report_json(report), lambda: show.report(report))


@cli.command()
@click.argument("source", metavar="IN.gguf", type=INPUT)
@click.argument("out", metavar="OUT.gguf", type=INPUT)
@click.argument("recipe", metavar="TYPE", type=RECIPE)
@click.option("--allow-requantize", is_flag=True, help="Take tensors that are quantized already; they lose twice.")
@click.option("--dry-run", is_flag=True, help="Show types and sizes; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@encoding_options
@json_option
def quantize(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Quantize any GGUF, of a drafter or of another model, as llama-quantize does. TYPE is a recipe.

    \b
    convert-drafter quantize dflash-BF16.gguf dflash-Q4_K_M.gguf Q4_K_M
    """
    decided = prepare_quantize(QuantizeJob(**options))
    show.warnings(errors, decided.warnings)
    if dry_run:
        emit(as_json, show_quantize.quantization_json(decided), lambda: show_quantize.quantization(decided))
        return
    with progress(decided.job.out.name, decided.n_bytes) as advance:
        report = write_quantization(decided, advance)
    emit(as_json, show_quantize.quantized_json(report), lambda: show_quantize.quantized(report))


@cli.command()
@click.argument("source", metavar="FILE", type=INPUT)
@runtime_option
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: tokenizer, depth.")
@click.option("-o", "--out", type=INPUT, required=True, help="The GGUF to write.")
@click.option("--dry-run", is_flag=True, help="Show facts and names; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@click.option(
    "--set", "settings", multiple=True, metavar="FACT=VALUE", callback=parse_settings,
    help="Give or correct a fact as `inspect` names it, e.g. --set rope.theta=10000000. Recorded in the file.",
)  # fmt: skip
@json_option
def redialect(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Rewrite a drafter's GGUF for another runtime; weights are copied as they are.

    \b
    convert-drafter redialect dflash-Qwen3.6-27B-Q8_0.gguf --for ik_llama.cpp -o ik-dflash-Qwen3.6-27B-Q8_0.gguf
    """
    decided = prepare_redialect(RedialectJob(**options))
    show.warnings(errors, decided.warnings)
    if dry_run:
        emit(as_json, show.redialection_json(decided), lambda: show.redialection(decided))
        return
    with progress(decided.job.out.name, decided.n_bytes) as advance:
        report = write_redialection(decided, advance)
    emit(as_json, show.redialected_json(report), lambda: show.redialected(report))


@cli.command("inspect")
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
    emit(as_json, inspection.as_json(), lambda: show.inspection(inspection))


@cli.command("doctor")
@click.argument("path", metavar="FILE", type=INPUT)
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: is the file this target's?")
@click.option("--source", type=INPUT, help="The checkpoint: are these its facts and its weights?")
@json_option
def doctor_command(path: Path, target: Path | None, source: Path | None, as_json: bool) -> int:
    """Find every fault of a drafter's GGUF without running it: exit status 0 for none, 1 for faults.

    \b
    convert-drafter doctor dflash-Qwen3.6-27B-Q8_0.gguf --target Qwen3.6-27B --source Qwen3.6-27B-DFlash
    """
    total = path.stat().st_size * (1 if source is None else 2) if path.is_file() else 0
    with progress(path.name, total) as advance:
        gates = doctor(path, target, source, on_bytes=advance)
    emit(as_json, show_doctor.diagnosis_json(path, gates), lambda: plain(show_doctor.diagnosis(path, gates)))
    return int(any(gate.outcome is Outcome.FAIL for gate in gates))


@cli.command("verify")
@verify_options
@click.option("--strict", is_flag=True, help="Exit with 1 also where too few prompts decide nothing.")
@click.option("--json", "json_out", type=INPUT, metavar="R.json", help="Write the verdict as JSON; - prints it.")
@click.option("--html", "html_out", type=INPUT, metavar="R.html", help="Write the verdict as a page of its own.")
def verify_command(job: VerifyJob, strict: bool, json_out: Path | None, html_out: Path | None) -> int:
    """Run a drafter's GGUF with its target and say whether it is as good as the original: 0 yes, 1 no.

    \b
    convert-drafter verify dflash-Qwen3.6-27B-Q8_0.gguf --target Qwen3.6-27B --source Qwen3.6-27B-DFlash
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


@cli.command("list")
@click.argument("what", type=click.Choice(list(show.LISTS)))
@json_option
def list_command(what: str, as_json: bool) -> None:
    """List what is supported.

    \b
    convert-drafter list dialects
    """
    rows = show.LISTS[what]()
    emit(as_json, rows, lambda: show.listing(rows))


def emit(as_json: bool, data: Any, text: Callable[[], str]) -> None:
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text())


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr when it is a terminal; yields the function to tell bytes to."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(name, total=total)
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every foreseeable failure is one message and an exit code, never a traceback."""
    sys.setswitchinterval(PATIENCE)
    for name in ("SIGTERM", "SIGHUP"):  # as clean an end as Ctrl-C; not every system has both
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, signal.default_int_handler)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(
            words, prog_name="convert-drafter", standalone_mode=False, obj=shlex.join(["convert-drafter", *words])
        )
    except DrafterError as error:
        fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; nothing was left behind", INTERRUPTED)
    except OSError as error:
        fail(f"{error.filename or 'standard output'}: {error.strerror or error}", DrafterError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {plain(message)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
