"""Whether a program that was stopped is really gone."""

from __future__ import annotations

import os
import time
from pathlib import Path


def gone(pid: int, patience: float = 10.0) -> bool:
    """Whether a process has ended; one that only waits to be reaped has."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
