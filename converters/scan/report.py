"""A scan as versioned JSON (scan.schema.json, docs/scan.md). Nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert_drafter.converters.scan.found import Artifact, Candidate, Head, Model, Pair, Scan, What

SCHEMA, VERSION = "convert-drafter/scan", 1
SCHEMA_FILE = Path(__file__).parent / "scan.schema.json"


def as_json(found: Scan) -> dict[str, Any]:
    """The scan as JSON of version `VERSION`; what headers do not tell is null."""
    artifacts = found.artifacts
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "root": str(found.root),
        "catalog": None if found.catalog is None else str(found.catalog),
        "counts": {
            "models": len(found.models),
            "variants": len(artifacts),
            "drafters": sum(each.what is What.DRAFTER for each in artifacts),
            "pairs": sum(pair.target is not None for pair in found.pairs),
            "faulty": sum(bool(each.faults) for each in artifacts),
            "bytes": sum(each.n_bytes for each in artifacts),
        },
        "models": [_model(model) for model in found.models],
        "pairs": [_pair(pair) for pair in found.pairs],
        "skipped": [{"path": str(each.path), "reason": each.reason} for each in found.skipped],
        "notes": list(found.notes),
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "key": model.key,
        "name": model.name,
        "what": model.what.value,
        "kind": model.kind or None,
        "standalone_deploy": any(each.standalone_deploy for each in model.variants),
        "ui": {"role": model.variants[0].ui_role},
        "bytes": model.n_bytes,
        "variants": [_variant(each) for each in model.variants],
    }


def _variant(each: Artifact) -> dict[str, Any]:
    shape = asdict(each.shape)
    return {
        "path": str(each.path),
        "also": _paths(each.also),
        "format": each.format,
        "files": _paths(each.files),
        "bytes": each.n_bytes,
        "name": each.name,
        "quant": each.quant or None,
        "bits_per_weight": each.bits,
        "weights": each.weights,
        "told_by": each.told_by.value,
        "kind": each.kind or None,
        "architecture": each.architecture or None,
        "runtime": each.runtime or None,
        "shape": shape | {"captures": list(each.shape.captures)},
        "head": None if each.head is None else _head(each.head),
        "repository": each.repository,
        "revision": each.revision,
        "recorded_target": dict(each.recorded) or None,
        "standalone_deploy": bool(each.standalone_deploy),
        "ui": {"role": each.ui_role},
        "complete": each.complete,
        "faults": list(each.faults),
        "notes": list(each.notes),
        "mend": each.mend or None,
    }


def _paths(paths: Sequence[Path]) -> list[str]:
    return [str(path) for path in paths]


def _head(head: Head) -> dict[str, Any]:
    return {"kind": head.kind or None, "note": head.note or None}


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "drafter": str(pair.drafter.path),
        "target": None if pair.target is None else _target(pair.target),
        "basis": pair.basis or None,
        "evidence": list(pair.evidence),
        "candidates": [_candidate(each) for each in pair.candidates],
    }


def _candidate(each: Candidate) -> dict[str, Any]:
    return {**_target(each.target), "fits": list(each.fits), "against": list(each.against)}


def _target(model: Model) -> dict[str, Any]:
    return {"key": model.key, "name": model.name, "paths": [str(each.path) for each in model.variants]}
