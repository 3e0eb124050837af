"""How a scan looks: models with all their copies, at most 80 columns wide. Nothing is printed here."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert_drafter.converters.commands.amounts import count, size
from convert_drafter.converters.scan.found import Artifact, Model, Pair, Scan, What

WIDTH = 80
QUANT, SIZE = 16, 10  # columns
CONTINUED = " \\"  # to a shell
SECTIONS = {
    What.TARGET: "models",
    What.DRAFTER: "drafters, which are not deployed by themselves",
    What.PART: "parts of models",
    What.UNKNOWN: "not understood",
}
BASES = {
    "inside": "inside it", "recorded": "as it records", "catalog": "as the catalog says",
    "shapes": "by shapes and vocabulary", "name": "by its name alone",
}  # fmt: skip


def scanned(found: Scan) -> str:
    pairs = {pair.drafter.path: pair for pair in found.pairs if pair.basis != "inside"}
    lines = [*_wrapped(str(found.root), ""), *_wrapped(_counts(found), "")]
    for what, title in SECTIONS.items():
        models = [model for model in found.models if model.what is what]
        lines += ["", title] if models else []
        for model in models:
            lines += _model(model, found.root, pairs)
    if found.skipped:
        lines += ["", "not looked at"]
        for each in found.skipped:
            lines += _wrapped(f"{_below(each.path, found.root)}: {each.reason}", "  ", "    ")
    for note in found.notes:
        lines += ["", *_wrapped(f"note: {note}", "")]
    return "\n".join(lines)


def _counts(found: Scan) -> str:
    artifacts, models = found.artifacts, found.models
    if not artifacts:
        return "no model in it: looked for .safetensors and .gguf files in it and in every folder below"
    drafters = [pair for pair in found.pairs if pair.basis != "inside"]
    paired = sum(pair.target is not None for pair in drafters)
    faulty = sum(bool(each.faults) for each in artifacts)
    return (
        f"{count(len(models), 'model')} in {count(len(artifacts), 'copy', 'copies')},"
        f" {size(sum(each.n_bytes for each in artifacts))}; {count(len(drafters), 'drafter')}"
        f"{f', {paired} with the target here' if drafters else ''}"
        f"{f'; {faulty} with faults (!)' if faulty else ''}"
    )


def _model(model: Model, root: Path, pairs: Mapping[Path, Pair]) -> Iterator[str]:
    own = [pairs[each.path] for each in model.variants if each.path in pairs]
    together = _together(own)
    told = "" if together is None else _target(together)
    yield from _wrapped(": ".join(filter(None, (model.name, _what(model), told))), "  ", "    ")
    for each in model.variants:
        yield from _columns(each, root)
        if each.path in pairs and together is None:
            yield from _wrapped(_target(pairs[each.path]), " " * 6, " " * 8)
        yield from _remarks(each)


def _together(pairs: Sequence[Pair]) -> Pair | None:
    """What is said once for all copies of a drafter: the same target, by what tells it best, or the same reason."""
    best = min(pairs, key=lambda pair: [*BASES, ""].index(pair.basis), default=None)
    if best is None or any(pair.target is not best.target for pair in pairs):
        return None
    return best if best.target or len({_target(pair) for pair in pairs}) == 1 else None


def _what(model: Model) -> str:
    first = next((each for each in model.variants if each.shape.hidden_size), model.variants[0])
    if model.what is not What.TARGET:
        return model.kind or first.architecture
    shape, head = first.shape, next((each.head for each in model.variants if each.head), None)
    depth = f"{shape.depth} layers of width {shape.hidden_size}" if shape.depth and shape.hidden_size else ""
    inside = "" if head is None else f"MTP head inside ({head.kind})" if head.kind else "MTP head inside"
    return ", ".join(filter(None, (first.architecture, depth, inside)))


def _target(pair: Pair) -> str:
    if pair.target is not None:
        return f"for {pair.target.name}, {BASES[pair.basis]}"
    names = ", ".join(each.target.name for each in pair.candidates)
    return f"{'; '.join(pair.evidence)}{f' ({names})' if names else ''}"


def _columns(each: Artifact, root: Path) -> Iterator[str]:
    """Quant, size and place; a long one goes on below itself."""
    where = f"{_below(each.path, root)}{_parts(each)}"
    room = WIDTH - 4 - QUANT - SIZE - 3
    quants, places = _folded(each.quant or "-", QUANT), _folded(where, room)
    for i in range(max(len(quants), len(places))):
        quant, place = (column[i] if i < len(column) else "" for column in (quants, places))
        amount = size(each.n_bytes) if i == 0 else ""
        yield f"    {quant:<{QUANT}} {amount:>{SIZE}}  {place}".rstrip()


def _parts(each: Artifact) -> str:
    if each.format == "safetensors":
        return "/" if len(each.files) == 1 else f"/ ({len(each.files)} files)"
    return "" if len(each.files) == 1 else f" ({len(each.files)} parts)"


def _remarks(each: Artifact) -> Iterator[str]:
    for path in each.also:
        yield from _wrapped(f"also {path}", " " * 6, " " * 8)
    for fault in each.faults:
        yield from _wrapped(f"! {fault}", " " * 6, " " * 8)
    notes = [f"MTP head: {each.head.note}"] if each.head is not None and each.head.note else []
    for note in (*each.notes, *notes):
        yield from _wrapped(f"- {note}", " " * 6, " " * 8)
    if each.mend:
        yield from _command(each.mend)


def _command(line: str) -> Iterator[str]:
    """A command over several lines that can be copied as they are; an argument is never parted."""
    lines = [" " * 7]
    for word in map(shlex.quote, shlex.split(line)):
        if len(lines[-1]) + len(word) + 3 > WIDTH and lines[-1].strip():
            lines[-1] += CONTINUED
            lines.append(" " * 9)
        lines[-1] += f" {word}"
    yield from lines


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _folded(text: str, width: int) -> Sequence[str]:
    """A path over several lines, parted behind a slash where there is one far enough to the right."""
    lines = [text]
    while len(lines[-1]) > width:
        cut = lines[-1].rfind("/", width // 2, width) + 1 or width
        lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines


def _wrapped(text: str, first: str, rest: str = "") -> Sequence[str]:
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first]
