"""How results look: reports as text for people and as plain data for --json. Nothing is printed here."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from convert_drafter.converters.commands.amounts import size
from convert_drafter.converters.convert import Conversion, Report, launch_command
from convert_drafter.converters.dialects import CELLS
from convert_drafter.converters.drafter_file import Fact
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import plain
from convert_drafter.converters.inspection import Inspection
from convert_drafter.converters.plan import Plan
from convert_drafter.converters.recipes import F32_IN_DRAFTERS, KEPT_IN_DRAFTERS, LEAST, RECIPES, Choice
from convert_drafter.converters.redialect import Redialection, RedialectReport
from convert_drafter.quant import TYPES
from convert_drafter.quant.measure import Errors

WIDTH = 1000  # never fold: a terminal does it by itself, a file or a pipe should not have it


def warnings(console: Console, messages: Sequence[str]) -> None:
    for message in messages:
        console.print(f"warning: {plain(message)}", markup=False)


def table(*columns: str) -> Table:
    """An empty table; a column whose name begins with ">" is aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.strip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def render(*parts: Table | str) -> str:
    """Tables and lines as plain text; a console is only used to lay them out."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH, highlight=False, color_system=None)
    for part in parts:
        console.print(part, markup=False, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()


# --- convert ---


def plan(conversion: Conversion) -> str:
    rows = table("tensor", "from", ">shape", "type", ">size", "why")
    for t in conversion.plan.tensors:
        shape = " x ".join(map(str, t.shape))
        rows.add_row(t.name, t.header.name, shape, t.choice.type.name, size(t.n_bytes), t.choice.reason)
    for drop in conversion.plan.dropped:
        rows.add_row("(left out)", drop.source, "", "", "", drop.reason)
    return render(rows, "", _total(conversion.plan), *fallbacks(_choices(conversion.plan)))


def total(tensors: int, weights: int, n_bytes: int) -> str:
    return f"{tensors} tensors, {weights:,} weights, {size(n_bytes)}, {8 * n_bytes / weights:.2f} bits per weight"


def _total(plan: Plan) -> str:
    return total(len(plan.tensors), plan.n_weights, plan.n_bytes)


def fallbacks(choices: Mapping[str, Choice]) -> list[str]:
    """A line for each tensor, by name, that could not take its recipe's type, and their number."""
    lines = [f"{name}: {choice.reason}" for name, choice in choices.items() if choice.fell_back]
    return [*lines, f"{len(lines)} of {len(choices)} tensors fell back to another type"] if lines else []


def _choices(plan: Plan) -> dict[str, Choice]:
    return {tensor.name: tensor.choice for tensor in plan.tensors}


def error_table(errors: Mapping[str, Errors], choices: Mapping[str, Choice]) -> list[str]:
    """What quantization did to each tensor, as lines; none where nothing was measured."""
    if not errors:
        return []
    rows = table("tensor", "type", ">rmse", ">relative", ">max", ">cosine")
    for name, e in errors.items():
        if not e.squared_error:
            continue
        figures = (f"{e.rmse:.3e}", f"{e.relative:.3%}", f"{e.max:.3e}", f"{e.cosine:.6f}")
        rows.add_row(name, choices[name].type.name, *figures)
    exact = sum(not e.squared_error for e in errors.values())
    return ["", render(rows), *([f"{exact} more tensors are exact"] if exact else [])]


def errors_json(errors: Mapping[str, Errors]) -> dict[str, dict[str, float]]:
    return {
        name: {"rmse": e.rmse, "relative": e.relative, "max": e.max, "cosine": e.cosine} for name, e in errors.items()
    }


def plan_json(conversion: Conversion) -> dict[str, Any]:
    return {
        "tensors": [
            {
                "name": t.name,
                "source": t.header.name,
                "shape": t.shape,
                "type": t.choice.type.name,
                "bytes": t.n_bytes,
                "reason": t.choice.reason,
            }
            for t in conversion.plan.tensors
        ],
        "quantization": conversion.published.checkpoint.quantization,
        "dropped": [{"source": d.source, "reason": d.reason} for d in conversion.plan.dropped],
        "bytes": conversion.plan.n_bytes,
        "weights": conversion.plan.n_weights,
        "bits_per_weight": 8 * conversion.plan.n_bytes / conversion.plan.n_weights,
        "warnings": list(conversion.warnings),
        "launch": launch_command(conversion),
    }


def report(report: Report) -> str:
    conversion, base = report.conversion, report.conversion.base
    ratio = report.out_bytes / report.source_bytes
    target = [] if base is None else [f"  beside the {len(base.tensors)} tensors of {base.path}, every byte as it was"]
    lines = [
        f"wrote {report.out} ({conversion.job.recipe} for {conversion.cell.runtime})",
        f"  {size(report.source_bytes)} of safetensors -> {size(report.out_bytes)} of GGUF ({ratio:.0%}), tokenizer"
        f" {'included' if conversion.cell.tokenizer else 'not needed'}",
        f"  {_total(conversion.plan)}",
        *target,
        *(f"  left out {line}" for line in _left_out(conversion.plan)),
        *(f"  {line}" for line in fallbacks(_choices(conversion.plan))),
        *(f"  note: {text}" for text in _notes(conversion)),
        "run it:",
        f"  {report.launch}",
        *error_table(report.errors, _choices(conversion.plan)),
    ]
    return "\n".join(lines)


def _left_out(plan: Plan) -> Iterator[str]:
    """A line for each reason: a quantized checkpoint has a tensor for each matrix that says nothing about weights."""
    reasons: dict[str, list[str]] = {}
    for drop in plan.dropped:
        reasons.setdefault(drop.reason, []).append(drop.source)
    for reason, (first, *others) in reasons.items():
        yield f"{first}{f' and {len(others)} more' if others else ''}: {reason}"


def _notes(conversion: Conversion) -> Iterator[str]:
    published = conversion.published
    if stored := published.checkpoint.quantization:
        yield f"the source is quantized ({stored}): its weights were rounded before they came here"
    yield from (note.text for note in conversion.cell.notes if note.concerns(published.spec))


def report_json(report: Report) -> dict[str, Any]:
    sizes = {"out": str(report.out), "source_bytes": report.source_bytes, "out_bytes": report.out_bytes}
    measured = {"errors": errors_json(report.errors)} if report.errors else {}
    return {**sizes, **plan_json(report.conversion), **measured}


# --- redialect ---


def redialection(decided: Redialection) -> str:
    tensors = table("tensor", "from", ">shape", "type", ">size")
    for move in decided.moves:
        stored = move.stored
        shape = " x ".join(map(str, stored.shape))
        tensors.add_row(move.name, stored.name, shape, stored.type.name, size(stored.n_bytes))
    return render(_facts(decided.drafter.facts), "", tensors, "", _copied(decided))


def _copied(decided: Redialection) -> str:
    tokenizer = "tokenizer included" if decided.cell.tokenizer else "no tokenizer needed"
    return f"{len(decided.moves)} tensors, {size(decided.n_bytes)}, every byte as it was, {tokenizer}"


def redialected(report: RedialectReport) -> str:
    decided = report.redialection
    lines = [
        f"wrote {report.out} ({decided.drafter.cell.runtime} -> {decided.cell.runtime})",
        f"  {_copied(decided)}",
        *(f"  note: {note}" for note in decided.notes),
        "run it:",
        f"  {decided.launch}",
    ]
    return "\n".join(lines)


def redialection_json(decided: Redialection) -> dict[str, Any]:
    tensors = [(move.name, move.stored) for move in decided.moves]
    return {
        "from": decided.drafter.cell.runtime,
        "for": decided.cell.runtime,
        "facts": {f.name: {"value": f.value, "origin": f.origin} for f in decided.drafter.facts},
        "tensors": [
            {"name": name, "source": t.name, "shape": t.shape, "type": t.type.name, "bytes": t.n_bytes}
            for name, t in tensors
        ],
        "bytes": decided.n_bytes,
        "warnings": list(decided.warnings),
        "launch": decided.launch,
    }


def redialected_json(report: RedialectReport) -> dict[str, Any]:
    sizes = {"out": str(report.out), "source_bytes": report.source_bytes, "out_bytes": report.out_bytes}
    return {**sizes, **redialection_json(report.redialection)}


# --- inspect ---


def inspection(found: Inspection) -> str:
    facts = _facts(found.facts)
    tensors = table("tensor", ">shape", "type", ">size")
    for t in found.tensors:
        tensors.add_row(t.name, " x ".join(map(str, t.shape)), t.type, size(t.n_bytes))
    total = sum(t.n_bytes for t in found.tensors)
    what = "no drafter we know" if found.kind == "unknown" else f"{found.kind} drafter"
    head = f"{found.path}: {what}, {found.format}"
    runtimes = [f"{name}: {reason or 'loads it'}" for name, reason in found.runtimes.items()]
    counts = f"{len(found.tensors)} tensors, {size(total)}"
    return render(head, "", facts, "", tensors, "", counts, *runtimes)


def _facts(facts: Sequence[Fact]) -> Table:
    rows = table("fact", "value", "from")
    for fact in facts:
        rows.add_row(fact.name, _value(fact.value), fact.origin)
    return rows


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_value(v) for v in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9g}" if isinstance(value, float) else str(value)


# --- list ---


def _kinds() -> list[dict[str, str]]:
    return [
        {"kind": k.name, "what it is": k.summary, "runtimes": ", ".join(r for name, r in CELLS if name == k.name)}
        for k in KINDS.values()
    ]


def _dialects() -> list[dict[str, str]]:
    return [
        {
            "runtime": cell.runtime,
            "kind": cell.kind,
            "general.architecture": cell.arch,
            "tokenizer": "the target's, in the file" if cell.tokenizer else "none",
            "read from": cell.source,
        }
        for cell in CELLS.values()
    ]


def _recipes() -> list[dict[str, str]]:
    """One row a mixture; the same with a floor for drafters has a column."""
    return [
        {
            "recipe": r.name,
            "with a floor for drafters": drafter if (drafter := f"{r.name}-drafter") in RECIPES else "",
            "bits per weight": f"{TYPES[r.weights].bits_per_weight:g}",
            "summary": r.summary,
        }
        for r in RECIPES.values()
        if not r.kept
    ]


def _kept() -> list[dict[str, str]]:
    least = [(named, LEAST) for named in KEPT_IN_DRAFTERS] + [(named, "F32") for named in F32_IN_DRAFTERS]
    return [
        {"tensors": ", ".join(named.patterns), "what they are": named.what, "at least": kind, "why": named.why}
        for named, kind in least
    ]


def _types() -> list[dict[str, str]]:
    return [
        {"type": t.name, "block": str(t.block), "bits per weight": f"{t.bits_per_weight:g}", "ggml id": str(t.ggml_id)}
        for t in TYPES.values()
    ]


LISTS: dict[str, Callable[[], list[dict[str, str]]]] = {
    "kinds": _kinds,
    "dialects": _dialects,
    "recipes": _recipes,
    "kept": _kept,
    "types": _types,
}


def listing(rows: list[dict[str, str]]) -> str:
    shown = table(*rows[0])
    for row in rows:
        shown.add_row(*row.values())
    return render(shown)
