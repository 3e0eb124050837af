"""docs/json.md names every schema of `--json` and the file that describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
from json_results import CONVERTERS

ROOT = CONVERTERS.parent
ROW = re.compile(r"^\| .+? \| (?P<names>.+?) \| `(?P<file>.+?)` \|", re.MULTILINE)


def named(schema: Any) -> Iterator[str]:
    """Every constant that a field of the name `schema` has."""
    if isinstance(schema, dict):
        yield from [schema["schema"]["const"]] if "const" in schema.get("schema", {}) else []
        for part in schema.values():
            yield from named(part)


def test_the_page_names_every_schema() -> None:
    """R2"""
    files = CONVERTERS.rglob("*.schema.json")
    there = {(name, str(path.relative_to(ROOT))) for path in files for name in named(json.loads(path.read_text()))}
    page = (ROOT / "docs" / "json.md").read_text()
    told = {(name, row["file"]) for row in ROW.finditer(page) for name in re.findall(r"`(.+?)`", row["names"])}
    assert told == there


def test_schemas_are_schemas_and_installed() -> None:
    packaged = (ROOT / "pyproject.toml").read_text()
    for path in CONVERTERS.rglob("*.schema.json"):
        jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))
        package = ".".join(("convert_drafter", *Path(path.relative_to(ROOT)).parent.parts))
        assert re.search(rf'^"{re.escape(package)}" = \["\*\.json"', packaged, re.MULTILINE), package
