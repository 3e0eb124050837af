"""Where the `convert-drafter` command starts: it imports the rest only once Ctrl-C has an answer.

A package of its own, because importing any module of `converters` imports all of it: a third of a second.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C
SAID = b"error: interrupted; nothing was left behind\n"


def main() -> NoReturn:
    """Run the command. Ctrl-C during the imports ends it as one at any later time does."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, end)
    try:
        from convert_drafter.converters.cli import main as run

        signal.signal(signal.SIGINT, before)
        run()
    except KeyboardInterrupt:
        sys.stderr.write(SAID.decode())
        sys.exit(INTERRUPTED)


def end(number: int, frame: FrameType | None) -> NoReturn:
    """At once: an exception in the middle of an import of C code comes out as another one, and nothing is open yet."""
    os.write(2, SAID)
    os._exit(INTERRUPTED)
