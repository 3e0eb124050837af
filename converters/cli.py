"""The `convert-drafter` command: parses, calls the library, prints. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from convert_drafter.converters import show, show_quantize
from convert_drafter.converters.convert import ConvertJob, prepare, write_conversion
from convert_drafter.converters.dialects import RUNTIMES
from convert_drafter.converters.errors import DrafterError
from convert_drafter.converters.inspection import inspect
from convert_drafter.converters.provenance import tool_version
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize, write_quantization
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.redialect import RedialectJob, prepare_redialect, write_redialection
from convert_drafter.converters.type_choice import TypeOptions

INPUT = click.Path(path_type=Path)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
TYPE_WISHES = ("tensor_types", "pure", "output_type", "embedding_type", "no_fallback")
PATIENCE = 1e-4  # seconds a thread waits before it asks for Python's lock; with Python's own 5 ms cores stand idle
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def settings_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", callback=parse_settings,
        help="Give or correct a config fact, e.g. --set dflash_config.block_size=16. Recorded in the file.",
    )(command)  # fmt: skip


def runtime_option(command: Callable[..., Any]) -> Callable[..., Any]:
    choice = click.Choice(RUNTIMES, case_sensitive=False)
    return click.option("--for", "runtime", type=choice, required=True, help="The runtime that will load it.")(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def parse_settings(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise click.BadParameter("expected KEY=VALUE", context, parameter)
    return {key: text for key, _, text in pairs}


def parse_types(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """REGEX=TYPE; a regex may hold an equals sign, a type's name cannot."""
    pairs = [value.rpartition("=") for value in values]
    if any(not regex or not name for regex, _, name in pairs):
        raise click.BadParameter("expected REGEX=TYPE", context, parameter)
    return tuple((regex, name) for regex, _, name in pairs)


def encoding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How weights are encoded: the same options for `convert` and `quantize`; the command gets `options`."""

    @wraps(command)
    def with_options(*arguments: Any, **given: Any) -> Any:
        wishes = TypeOptions(**{name: given.pop(name) for name in TYPE_WISHES})
        return command(*arguments, options=wishes, **given)

    for option in reversed((
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=parse_types,
                     help="Give tensors a type of their own; the first regex found in a name decides."),
        click.option("--pure", is_flag=True, help="The recipe's own type for every matrix, no mixture."),
        click.option("--output-tensor-type", "output_type", metavar="TYPE", help="Type of the output head."),
        click.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="Type of the embedding."),
        click.option("--no-fallback", is_flag=True, help="Refuse if a tensor's rows do not fit its type."),
        click.option("--imatrix", "importance", type=INPUT, help="Importance of columns, from llama-imatrix."),
        click.option("--threads", type=click.IntRange(1), help="Cores to use; all without it."),
        click.option("--report", "measure", is_flag=True, help="Show what encoding did to each tensor."),
    )):  # fmt: skip
        with_options = option(with_options)
    return with_options


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(tool_version(), prog_name="convert-drafter")
def cli() -> None:
    """Turn a published speculative-decoding drafter into a GGUF, with every fact checked."""


@cli.command()
@click.argument("source", type=INPUT)
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: tokenizer, depth, hidden size.")
@runtime_option
@click.option(
    "--quant", "recipe", metavar="RECIPE", type=click.Choice(list(RECIPES), case_sensitive=False), required=True,
    help="How weights are stored: Q8_0, Q4_K_M ... (`list recipes`).",
)  # fmt: skip
@click.option("-o", "--out", type=INPUT, required=True, help="The GGUF to write.")
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
    conversion = prepare(ConvertJob(**options))
    show.warnings(errors, conversion.warnings)
    if dry_run:
        emit(as_json, show.plan_json(conversion), lambda: show.plan(conversion))
        return
    with progress(conversion.job.out.name, conversion.plan.n_bytes) as advance:
        report = write_conversion(conversion, advance)
    emit(as_json, show.report_json(report), lambda: show.report(report))


@cli.command()
@click.argument("source", metavar="IN.gguf", type=INPUT)
@click.argument("out", metavar="OUT.gguf", type=INPUT)
@click.argument("recipe", metavar="TYPE", type=click.Choice(list(RECIPES), case_sensitive=False))
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
@settings_option
@json_option
def inspect_command(path: Path, settings: dict[str, str], as_json: bool) -> None:
    """Show kind, facts (each with the place it came from) and tensors of a checkpoint or a GGUF.

    \b
    convert-drafter inspect Qwen3.6-27B-DFlash
    """
    inspection = inspect(path, settings)
    show.warnings(errors, inspection.warnings)
    emit(as_json, inspection.as_json(), lambda: show.inspection(inspection))


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every foreseeable failure is one message and an exit code, never a traceback."""
    sys.setswitchinterval(PATIENCE)
    for name in ("SIGTERM", "SIGHUP"):  # as clean an end as Ctrl-C; not every system has both
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, signal.default_int_handler)
    try:
        code = cli.main(arguments, prog_name="convert-drafter", standalone_mode=False)
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
    click.echo(f"error: {show.plain(message)}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
