"""Where the `convert-drafter` command starts: it imports the rest only once Ctrl-C has an answer.

A package of its own, because importing any module of `converters` imports all of it: a third of a second.
"""

from __future__ import annotations

import sys
from typing import NoReturn

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def main() -> NoReturn:
    """Run the command. Ctrl-C during the imports ends it as one at any later time does."""
    try:
        from convert_drafter.converters.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was left behind\n")
        sys.exit(INTERRUPTED)
