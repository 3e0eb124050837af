"""The commands: each parses, calls the library and prints. A body is short; the library does the work."""

from __future__ import annotations

from convert_drafter.converters.commands.batching import batch
from convert_drafter.converters.commands.checking import doctor_command, inspect_command, verify_command
from convert_drafter.converters.commands.launching import launch_command
from convert_drafter.converters.commands.listing import list_command
from convert_drafter.converters.commands.making import convert, quantize, redialect
from convert_drafter.converters.commands.publishing import card_command
from convert_drafter.converters.commands.scanning import scan_command

COMMANDS = (
    *(convert, quantize, redialect, inspect_command, doctor_command, verify_command),
    *(scan_command, launch_command, batch, card_command, list_command),
)
