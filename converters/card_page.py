"""The page of a card: Markdown behind the YAML that the hub reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from convert_drafter.converters.card import Card, CardFile, making_command, recipe_of
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import plain
from convert_drafter.converters.json_text import value_at
from convert_drafter.converters.launch.line import launch_line


def card_text(card: Card) -> str:
    """The page: Markdown behind the YAML that the hub reads."""
    parts = (_about(card), _running(card), _files(card), _types(card), _acceptance(card), _making(card))
    return f"---\n{_front_matter(card)}---\n\n" + "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _front_matter(card: Card) -> str:
    from huggingface_hub import ModelCardData

    source = card.first.says("drafter.source.repository")
    data = ModelCardData(
        license=card.license,
        base_model=source,
        library_name="gguf",
        tags=["gguf", "speculative-decoding", card.first.drafter.cell.kind, card.first.drafter.cell.runtime],
    )
    relation = "" if source is None else "base_model_relation: quantized\n"
    return data.to_yaml().rstrip() + "\n" + relation


def _about(card: Card) -> list[str]:
    drafter = card.first.drafter
    name = card.first.says("general.name") or card.first.path.stem
    source, target = card.source, card.target
    lines = [
        f"# {_plain(name)}, GGUF",
        "",
        f"A drafter for speculative decoding. {KINDS[drafter.cell.kind].summary}.",
        "",
    ]
    if target is not None:
        lines.append(f"- It drafts for `{_code(target)}` and is of no use without it; the text stays the target's own.")
    if source is not None:
        lines.append(f"- Converted from `{_code(source)}`.")
    lines.append(f"- For {drafter.cell.runtime}; what it loads was read in {drafter.cell.source}.")
    if ran := list(_ran_in(card)):
        lines.append(f"- Verified in {', '.join(ran)}.")
    return lines


# where a verdict's settings have the version of the program that loaded the file (docs/verify.md)
RAN_IN = {"llama-server": ("llama.cpp", "file", "llama-server"), "torch": ("torch", "torch")}


def _ran_in(card: Card) -> Iterator[str]:
    """Engines that loaded one of the files and ran it, by name and version."""
    settings = [verdict.get("settings") for file in card.files for verdict in file.verdicts]
    found = [(name, value_at(table, path)) for table in settings for name, path in RAN_IN.items()]
    yield from dict.fromkeys(f"{name} {_plain(version)}" for name, version in found if isinstance(version, str))


def _running(card: Card) -> list[str]:
    """The line that runs the smallest file that is not the worst: the one given first."""
    drafter, path = card.first.drafter, Path(card.first.path.name)
    line = launch_line(drafter.cell, drafter.spec, None, path)
    return ["## Run it", "", "```console", f"$ {line}", "```"]


def _files(card: Card) -> list[str]:
    rows = [
        (f"`{_code(f.path.name)}`", recipe_of(f.drafter) or "a mixture of its own", f"{f.n_bytes:,}", f"{f.bits:.2f}")
        for f in card.files
    ]
    sums = [f"{f.sha256}  {f.path.name}" for f in card.files]
    table = _table(("file", "recipe", "bytes", "bits per weight"), rows)
    return ["## Files", "", *table, "", "```", *sums, "```", "", "Check with `sha256sum --check`."]


def _types(card: Card) -> list[str]:
    counts = [Counter(t.type.name for t in f.drafter.file.tensors.values()) for f in card.files]
    names = sorted({name for count in counts for name in count})
    rows = [
        (f"`{_code(f.path.name)}`", *(str(count[name]) if name in count else "-" for name in names))
        for f, count in zip(card.files, counts, strict=True)
    ]
    return ["Tensors by type:", "", *_table(("file", *names), rows)]


# --- what was measured ---


def _acceptance(card: Card) -> list[str]:
    walks = [(file, verdict, gate) for file in card.files for verdict, gate in _measured(file)]
    if not walks:
        return []
    head = ("file", "engine", "prompts", "tokens per step", "original", "difference")
    note = [
        "Tokens committed per verify step of the target, its own included; `original` is the unquantized checkpoint on",
        "the same prompts. Intervals are of 95 %, over prompts.",
    ]
    return ["## Acceptance", "", *_table(head, [_row(*walk) for walk in walks]), "", *note, *_by_position(walks)]


Walk = tuple[CardFile, Mapping[str, Any], Mapping[str, Any]]  # a file, a verdict of it, the figures of its acceptance


def _measured(file: CardFile) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for verdict in file.verdicts:
        gates = (gate for gate in verdict.get("gates", ()) if gate.get("name") == "acceptance")
        figures: dict[str, Any] = next((gate["figures"] for gate in gates), {})
        if figures.get("file"):
            yield verdict, figures


def _row(file: CardFile, verdict: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[str, ...]:
    walk, original = figures["file"], figures.get("original") or {}
    return (
        f"`{_code(file.path.name)}`",
        _plain(str(verdict.get("engine"))),
        str(figures.get("prompts", "-")),
        _with_interval(walk.get("length"), walk.get("length_interval"), ".2f"),
        _share(original.get("length"), ".2f"),
        _with_interval(figures.get("difference"), figures.get("interval"), "+.1%"),
    )


def _by_position(walks: Sequence[Walk]) -> list[str]:
    """A row for each draft position, a column for each file; none where no engine tells positions apart."""
    several = len({verdict.get("engine") for _, verdict, _ in walks}) > 1
    columns, names = [], []
    for file, verdict, figures in walks:
        shares, intervals = (figures["file"].get(key) or [] for key in ("by_position", "by_position_interval"))
        if shares:
            names.append(f"`{_code(file.path.name)}`" + (f", {_plain(str(verdict.get('engine')))}" if several else ""))
            columns.append([_with_interval(*pair, ".0%") for pair in zip_longest(shares, intervals[: len(shares)])])
    if not columns:
        return []
    rows = zip_longest(*columns, fillvalue="-")
    numbered = [(str(i), *row) for i, row in enumerate(rows, 1)]
    return ["", "Share of accepted drafts by draft position:", "", *_table(("position", *names), numbered)]


def _with_interval(value: Any, interval: Any, how: str) -> str:
    shown = _share(value, how)
    if isinstance(interval, list) and interval and all(map(_is_number, interval)):
        shown += " ({} to {})".format(*(_share(end, how) for end in interval))
    return shown


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _share(value: Any, how: str) -> str:
    """A number as it is shown; one that could not be measured is null."""
    return format(value, how) if _is_number(value) else "-"


# --- how it was made ---


def _making(card: Card) -> list[str]:
    commands = [command for file in card.files if (command := making_command(file)) is not None]
    version = card.first.says("drafter.tool.version")
    if not commands:
        return []
    lines = ["## How it was made", "", "```console", *(f"$ {command}" for command in commands), "```"]
    return [*lines, "", f"With convert-drafter {version}."] if version else lines


# --- Markdown ---


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)]


def _code(text: str) -> str:
    return plain(" ".join(text.split())).replace("`", "'")


def _plain(text: str) -> str:
    """A name in a sentence: what Markdown would read as more than a letter is escaped."""
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#" else letter for letter in plain(" ".join(text.split())))
