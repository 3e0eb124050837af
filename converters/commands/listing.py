"""`list`: what is supported."""

from __future__ import annotations

import click

from convert_drafter.converters.commands import show
from convert_drafter.converters.commands.options import json_option
from convert_drafter.converters.commands.output import emit_result


@click.command("list")
@click.argument("what", type=click.Choice(list(show.LISTS)))
@json_option
def list_command(what: str, as_json: bool) -> None:
    """List what is supported.

    \b
    convert-drafter list dialects
    """
    rows = show.LISTS[what]()
    emit_result(as_json, "list", {"rows": rows}, lambda: show.listing(rows))
