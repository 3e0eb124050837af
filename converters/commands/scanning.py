"""`scan`: every model artifact below a folder."""

from __future__ import annotations

from pathlib import Path

import click

from convert_drafter.converters.commands import show_scan
from convert_drafter.converters.commands.options import INPUT, json_option
from convert_drafter.converters.commands.output import emit, phases
from convert_drafter.converters.errors import plain
from convert_drafter.converters.scan.report import as_json as scan_json
from convert_drafter.converters.scan.scan import scan


@click.command("scan")
@click.argument("folder", metavar="DIR", type=INPUT)
@click.option(
    "--catalog", type=INPUT, metavar="FILE", help="YAML, TOML or JSON naming drafters: speculative_config.model"
)
@json_option
def scan_command(folder: Path, catalog: Path | None, as_json: bool) -> None:
    """Find every model below a folder: its quants, its drafters, and which drafter belongs to which target.

    \b
    convert-drafter scan ~/.cache/huggingface/hub
    """
    with phases() as watch:
        found = scan(folder, catalog, watch)
    emit(as_json, scan_json(found), lambda: plain(show_scan.scanned(found)))
