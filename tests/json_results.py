"""What `--json` of inspect, convert, quantize, redialect and list prints, held to its schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

CONVERTERS = Path(__file__).parent.parent / "converters"
RESULTS = json.loads((CONVERTERS / "commands" / "results.schema.json").read_text())


def checked(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    jsonschema.validate(found, RESULTS)
    return found
