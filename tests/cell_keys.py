"""What a runtime's cell writes of a drafter: by name, as golden lists have it, and read back as the same drafter."""

from __future__ import annotations

import json
from typing import Any

from convert_drafter.converters.dialects import objections, read, write
from convert_drafter.converters.dialects.cell import Cell
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, spec_from


def keys_of(cell: Cell, spec: DrafterSpec) -> dict[str, KeyValue]:
    return {kv.key: kv for kv in write(cell, spec)}


def shown(keys: tuple[KeyValue, ...]) -> dict[str, Any]:
    return {
        kv.key: [kv.type.name if kv.element is None else f"[{kv.element.name}]", json.loads(json.dumps(kv.value))]
        for kv in keys
    }


def tensor_names(cell: Cell) -> dict[str, str | None]:
    roles = dict.fromkeys(rule.role for rule in rules_of(cell.kind))
    return {role.name: cell.tensor_name((role, 2 if role.per_layer else None)) for role in Role if role in roles}


def assert_comes_back(cell: Cell, spec: DrafterSpec) -> None:
    """Also without our own keys: llama.cpp's converter notes neither the target's depth nor its width."""
    assert objections(cell, spec) == []
    keys = keys_of(cell, spec)
    assert spec_from({"kind": cell.kind, **read(cell, keys)}) == spec
    theirs = {name: entry for name, entry in keys.items() if not name.startswith("drafter.")}
    assert spec_from({"kind": cell.kind, **read(cell, theirs)}) == spec
