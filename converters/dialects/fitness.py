"""Whether a runtime takes a drafter: facts that its keys cannot carry, and what its loader demands of them."""

from __future__ import annotations

import numpy as np

from convert_drafter.converters.dialects.cell import F32, OWN_ROWS, U32, Cell, Facts
from convert_drafter.converters.spec import DrafterSpec, facts_of


def objections(cell: Cell, spec: DrafterSpec, architecture: str | None = None, where: Facts | None = None) -> list[str]:
    """Every fact of `spec` that this runtime cannot carry or does not accept.

    `architecture` is the target's, `where` the config keys that facts are from.
    """
    facts = facts_of(spec)
    fixed = {implied.field: implied.value(facts) for implied in cell.implied}
    carried = {row.field for row in (*cell.rows, *OWN_ROWS)} | set(cell.harmless)
    lost = [
        f"{name} = {value!r}: {cell.runtime} has no key for it and would run with {fixed.get(name, 'none')}"
        for name, value in facts.items()
        if name not in carried and value != fixed.get(name)
    ]
    broken = [f"{limit.field}: {limit.message}" for limit in cell.limits if not limit.holds(spec)]
    if _captures_last(spec) and (cell.targets or {}).get(architecture or "") is False:
        broken.append(
            f"capture_layers: the last layer is captured; {cell.runtime} has no state after it ({architecture})"
        )
    return lost + broken + _unstorable(cell, facts, where or {})


def _unstorable(cell: Cell, facts: Facts, where: Facts) -> list[str]:
    """Facts whose number its key cannot hold, our own keys included."""
    out = []
    for row in (*cell.rows, *OWN_ROWS):
        value = row.codec.encode(facts[row.field], facts) if row.field in facts else None
        place = f" ({where[row.field]})" if where.get(row.field, row.field) != row.field else ""
        with np.errstate(over="ignore", under="ignore"):
            if row.type == U32 and isinstance(value, int) and not 0 <= value < 2**32:
                out.append(f"{row.field} = {value}: does not fit an unsigned 32-bit key{place}")
            elif row.type == F32 and value and not 0 < abs(np.float32(value)) < np.inf:
                out.append(f"{row.field} = {value:g}: does not fit a 32-bit float key{place}")
    return sorted(set(out))


def doubts(cell: Cell, spec: DrafterSpec, architecture: str | None = None) -> list[str]:
    """What may not run in this runtime, as far as the target is known."""
    if cell.targets is None or architecture in cell.targets:
        return []
    if architecture is not None:
        known = f"not known to hand out hidden states in {cell.runtime}; a target that does not stops at an assertion"
        return [f"target architecture {architecture}: {known}"]
    last = "the target's last layer is captured, which few of its targets hand out"
    return [f"capture_layers: {last} in {cell.runtime}"] if _captures_last(spec) else []


def _captures_last(spec: DrafterSpec) -> bool:
    return max(spec.capture_layers, default=-1) == spec.target_layer_count - 1
