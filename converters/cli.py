"""The `convert-drafter` command: its commands (`commands/`), and what every failure of them ends in."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from convert_drafter.converters.commands import COMMANDS
from convert_drafter.converters.commands.output import fetching
from convert_drafter.converters.encoding import PATIENCE
from convert_drafter.converters.errors import DrafterError, plain
from convert_drafter.converters.provenance import tool_version

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


@click.group(
    commands=list(COMMANDS), context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(tool_version(), prog_name="convert-drafter")
def cli() -> None:
    """Turn a published speculative-decoding drafter into a GGUF, with every fact checked.

    Where a checkpoint, a target or a GGUF is asked for, a path may be a repository on the Hugging Face hub:
    ORG/NAME[/FOLDER][:FILE or :QUANT][@REVISION].
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: every foreseeable failure is one message and an exit code, never a traceback."""
    sys.setswitchinterval(PATIENCE)
    for name in ("SIGTERM", "SIGHUP"):  # as clean an end as Ctrl-C; not every system has both
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
            signal.signal(number, signal.default_int_handler)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with fetching():
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
