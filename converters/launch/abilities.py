"""What the installed llama-server can do of what is asked: yes, no, or unknown with the reason (T-33).

The probe itself is verify's; here its answers are put in terms of modes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from convert_drafter.converters.launch.modes import DRAFTERS, NGRAM, SPEC_TYPES
from convert_drafter.converters.verify.in_llama_cpp.probe import FLAGS, PROBE_SECONDS, Abilities, Ability, Known
from convert_drafter.converters.verify.in_llama_cpp.process import output_of

# "  CUDA0: NVIDIA H100 (81089 MiB, 80000 MiB free)" (common_print_available_devices in common/arg.cpp)
DEVICE = re.compile(r"^ {2}(?P<name>\w+): .*?(\((?P<total>\d+) MiB, \d+ MiB free\))?$", re.MULTILINE)
ACCELERATORS = ("BLAS", "ZDNN", "ZENDNN")  # the processor's own, which are listed too and hold no model
NOT_PROBED = "no llama-server was probed"


class Flavour(StrEnum):
    """Which names the options have: drafters and n-grams each their own, or both the same."""

    CURRENT = "current"
    LEGACY = "legacy"
    NEITHER = "neither"


def unprobed(reason: str = NOT_PROBED) -> Abilities:
    """The abilities of a server that is not there: nothing is known, the newest spellings are used."""
    return Abilities(found=False, problem=reason)


def flavour(abilities: Abilities) -> Flavour:
    """A3-8. An engine that could not be asked is taken for a current one."""
    flag = abilities.flag("draft length")
    if flag is None:
        return Flavour.NEITHER
    return Flavour.CURRENT if flag == FLAGS["draft length"][0] else Flavour.LEGACY


def can(abilities: Abilities, way: str) -> Ability:
    """Whether the server drafts in this way: it knows the type, and has the options that the type cannot be without."""
    if way == NGRAM and flavour(abilities) is Flavour.NEITHER:
        return abilities.has("draft length")
    if way in DRAFTERS and (length := abilities.has("draft length")).known is Known.NO:
        return length
    return abilities.drafts(SPEC_TYPES[way])


@dataclass(frozen=True)
class Devices:
    """What a server runs on beside the processor: whether there is a GPU, and the bytes that all of them have."""

    gpu: Ability
    memory: int | None = None


def devices(path: Path, abilities: Abilities) -> Devices:
    """By the server's --list-devices."""
    if (listing := abilities.has("devices")).known is not Known.YES:
        return Devices(Ability(Known.UNKNOWN, listing.reason))
    try:
        state = path.stat()
    except OSError as error:
        return Devices(Ability(Known.UNKNOWN, f"{path}: {error.strerror}"))
    return _devices(path.absolute(), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _devices(path: Path, modified: int, size: int) -> Devices:
    try:
        status, text = output_of([str(path), "--list-devices"], PROBE_SECONDS)
    except OSError as error:
        return Devices(Ability(Known.UNKNOWN, f"--list-devices: {error.strerror}"))
    if status != 0 or "Available devices" not in text:
        return Devices(Ability(Known.UNKNOWN, "--list-devices lists none"))
    gpus = [found for found in DEVICE.finditer(text) if found["name"].upper() not in ACCELERATORS]
    told = [int(found["total"]) * 2**20 for found in gpus if int(found["total"] or 0)]  # a driver may not tell
    memory = sum(told) if gpus and len(told) == len(gpus) else None
    return Devices(Ability(Known.YES if gpus else Known.NO, "--list-devices"), memory)
