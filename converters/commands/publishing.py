"""`card`: the page of a repository of drafter GGUFs, and the files with it to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from convert_drafter.converters.card import push, read_card
from convert_drafter.converters.card_page import card_text
from convert_drafter.converters.commands.options import INPUT
from convert_drafter.converters.commands.output import progress
from convert_drafter.converters.destination import refuse_overwriting, write_whole
from convert_drafter.converters.hub_gguf import fetch_whole


@click.command("card")
@click.argument("files", metavar="FILE...", type=INPUT, nargs=-1, required=True)
@click.option("--verify", "verdicts", type=INPUT, multiple=True, metavar="R.json", help="What `verify --json` wrote.")
@click.option("--license", metavar="ID", help="The licence of the drafter's release, as the hub spells it.")
@click.option("-o", "--out", type=INPUT, help="Write the page there; without it, it is printed.")
@click.option("--push", "repository", metavar="ORG/NAME", help="Upload the files and the page to this repository.")
@click.option("--private", is_flag=True, help="A repository that --push makes is private.")
def card_command(
    files: Sequence[Path],
    verdicts: Sequence[Path],
    license: str | None,
    out: Path | None,
    repository: str | None,
    private: bool,
) -> None:
    """Write the README.md of a repository of drafter GGUFs: what they are, sums, acceptance, how to run them.

    \b
    convert-drafter card dflash-Q8_0.gguf dflash-Q4_K_M.gguf \\
        --verify q8.json --verify q4.json -o README.md
    """
    files = [fetch_whole(path) for path in files]
    if out is not None:
        refuse_overwriting(out, [*files, *verdicts])
    total = sum(path.stat().st_size for path in files if path.is_file())
    with progress("hashing", total) as advance:
        card = read_card(files, verdicts, license, advance)
    text = card_text(card)
    if out is not None:
        write_whole(text, out)
        click.echo(f"wrote {out}")
    elif repository is None:
        click.echo(text, nl=False)
    if repository is not None:
        click.echo(f"pushed to {push(card, text, repository, private)}")
