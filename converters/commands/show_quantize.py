"""How `quantize` looks: as text for people and as plain data for --json. Nothing is printed here."""

from __future__ import annotations

from typing import Any

from convert_drafter.converters.commands.amounts import size
from convert_drafter.converters.commands.show import error_table, errors_json, fallbacks, render, table, total
from convert_drafter.converters.quantize import Quantization, QuantizeReport
from convert_drafter.converters.recipes import Choice


def quantization(decided: Quantization) -> str:
    """The plan of a dry run."""
    rows = table("tensor", ">shape", "from", "type", ">size", "why")
    for r in decided.recodings:
        shape = " x ".join(map(str, r.stored.shape))
        rows.add_row(
            r.stored.name, shape, r.stored.type.name, r.result.type.name, size(r.result.n_bytes), r.choice.reason
        )
    return render(rows, "", _total(decided), *fallbacks(_choices(decided)))


def _total(decided: Quantization) -> str:
    return total(len(decided.recodings), decided.n_weights, decided.n_bytes)


def _choices(decided: Quantization) -> dict[str, Choice]:
    return {r.stored.name: r.choice for r in decided.recodings}


def quantization_json(decided: Quantization) -> dict[str, Any]:
    return {
        "tensors": [
            {
                "name": r.stored.name,
                "shape": r.stored.shape,
                "from": r.stored.type.name,
                "type": r.result.type.name,
                "bytes": r.result.n_bytes,
                "importance": r.weighted,
                "reason": r.choice.reason,
            }
            for r in decided.recodings
        ],
        "bytes": decided.n_bytes,
        "weights": decided.n_weights,
        "bits_per_weight": 8 * decided.n_bytes / decided.n_weights,
        "warnings": list(decided.warnings),
    }


def quantized(report: QuantizeReport) -> str:
    decided = report.quantization
    launch = report.launch  # read back from the file, so once
    copied = sum(r.copied for r in decided.recodings)
    weighted = sum(r.weighted for r in decided.recodings)
    lines = [
        f"wrote {report.out} ({decided.job.recipe})",
        f"  {size(report.source_bytes)} -> {size(report.out_bytes)} ({report.out_bytes / report.source_bytes:.0%}),"
        f" {copied} tensors copied as they are" + (f", {weighted} weighted by importance" if weighted else ""),
        f"  {_total(decided)}",
        *(f"  {line}" for line in fallbacks(_choices(decided))),
        *(["run it:", f"  {launch}"] if launch else []),
        *error_table(report.errors, _choices(decided)),
    ]
    return "\n".join(lines)


def quantized_json(report: QuantizeReport) -> dict[str, Any]:
    sizes = {"out": str(report.out), "source_bytes": report.source_bytes, "out_bytes": report.out_bytes}
    measured = {"errors": errors_json(report.errors)} if report.errors else {}
    return {**sizes, **quantization_json(report.quantization), "launch": report.launch, **measured}
