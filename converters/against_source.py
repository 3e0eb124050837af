"""A drafter's GGUF against the tensors of the checkpoint it was made from, and what a wrong one is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert_drafter.converters.convert import Published
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.encoding import cores
from convert_drafter.converters.gguf_file import StoredTensor
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.ops import COPY, then
from convert_drafter.converters.plan import Match, Matcher
from convert_drafter.converters.roles import describe
from convert_drafter.converters.source_facts import fact_findings, unread_settings
from convert_drafter.converters.structure import Finding, Survey
from convert_drafter.converters.tensor_errors import FLOATS, Comparison, OnBytes, Source, compare, decoder
from convert_drafter.quant.base import F32Array

SHAPES = ("layer_count", "hidden_size", "feed_forward_size", "head_count", "kv_head_count", "head_dim", "vocab_size")
SAMPLE = 16  # rows of a tensor that tell which one it is
SEARCHED = 4  # wrong tensors whose rows are looked for one by one
CLOSE = 0.9  # cosine above which a row is taken for another: Q2_K, the coarsest, leaves 0.93 and more


@dataclass(frozen=True)
class Agreement:
    """What the comparison found; `compared` in the file's order."""

    findings: tuple[Finding, ...]
    compared: tuple[Comparison, ...] = ()


def agreement(
    survey: Survey, published: Published, broken: frozenset[str], on_bytes: OnBytes = lambda n: None
) -> Agreement:
    """Compare all facts, and all tensors but the `broken` ones, of which nothing can be said."""
    root = published.checkpoint.root
    if different := _another_drafter(survey, published):
        return Agreement((Finding(f"not the drafter in {root}: {different}"),))
    findings = fact_findings(survey, published)
    matcher = published.match()
    findings += [Finding(f"{root}: {problem}") for problem in matcher.problems]
    pairs = _pairs(survey, matcher, published.spec.head_dim)
    findings += [*_closure(survey, matcher), *unread_settings(published)]
    compared = list[Comparison]()
    with cores() as run:
        for stored, source in pairs:
            if stored.name not in broken and decoder(stored.type) is not None and stored.shape == source.header.shape:
                compared.append(compare(survey.file, stored, source, run, on_bytes))
            else:
                on_bytes(stored.n_bytes)
    findings += _verdicts(survey, matcher, {stored.name: source for stored, source in pairs}, compared, root)
    return Agreement(tuple(findings), tuple(compared))


def _another_drafter(survey: Survey, published: Published) -> str:
    """In one line, why this is another drafter altogether; two facts of its shape that differ are no mistake."""
    ours, theirs = survey.facts, vars(published.spec)
    if survey.cell.kind != published.kind.name:
        return f"the file has a {survey.cell.kind} drafter, the checkpoint a {published.kind.name} one"
    differing = [name for name in SHAPES if name in ours and ours[name] != theirs[name]]
    if len(differing) < 2:
        return ""
    return ", ".join(f"{name} {ours[name]} in the file, {theirs[name]} there" for name in differing)


# --- tensors ---


def _pairs(survey: Survey, matcher: Matcher, head_dim: int) -> list[tuple[StoredTensor, Source]]:
    return [
        (stored, _source(survey, matcher.matches[key], head_dim))
        for key, stored in survey.tensors.items()
        if key in matcher.matches
    ]


def _source(survey: Survey, match: Match, head_dim: int) -> Source:
    """A checkpoint's tensor as a file of this cell has it."""
    return Source(match.header, then(match.rule.op, survey.cell.transforms.get(match.key[0], COPY)), head_dim)


def _closure(survey: Survey, matcher: Matcher) -> Iterator[Finding]:
    """T-19: what only one side has; a required tensor that the file lacks is said already."""
    for key, stored in survey.tensors.items():
        if key not in matcher.matches:
            yield Finding(f"{stored.name}: the checkpoint has no {describe(key)}")
    spec = survey.spec or matcher.spec
    always = {rule.role for rule in rules_of(survey.cell.kind) if rule.needed(spec)}
    for key, match in matcher.matches.items():
        if survey.tensors and key not in survey.tensors and key[0] not in always:
            yield Finding(f"{match.header.name}: in the checkpoint, missing in the file ({describe(key)})")


def _verdicts(
    survey: Survey, matcher: Matcher, sources: Mapping[str, Source], compared: list[Comparison], root: Path
) -> Iterator[Finding]:
    wrong = [c for c in compared if c.too_far]
    if len(wrong) > 2 and len(wrong) > 0.8 * len(compared):
        worst, best = max(c.relative for c in wrong), min(c.relative for c in wrong)
        yield Finding(
            f"not the weights in {root}: {len(wrong)} of {len(compared)} tensors differ by {best:.0%} to {worst:.0%}:"
            " the file is of another drafter or another revision"
        )
        return
    for number, c in enumerate(wrong):
        what = _explained(survey, matcher, sources, c, search=number < SEARCHED)
        yield Finding(f"{c.name} ({c.type}): {_distance(c)}{what}")
    for c in compared:
        if c.too_far:
            continue
        row = survey.file.tensors[c.name].shape[-1]
        if c.broken_group:
            place = f"row {c.worst // row}, from column {c.worst % row}"
            found = f"an error {c.beyond:.0f} times what {c.type} makes of these weights"
            yield Finding(f"{c.name} ({c.type}): {place}: {found}: damaged")
        elif c.rounded:
            yield Finding(f"{c.name}: rounded to {c.rounded} on its way to {c.type}", fault=False)
        elif 0 < c.differing <= c.blocks // 10 and c.own:
            few = f"{c.differing} of {c.blocks} blocks are not exactly what {c.type} encodes to, as good as it"
            yield Finding(f"{c.name}: {few}: another build, or bits that hardly matter", fault=False)


def _distance(c: Comparison) -> str:
    if c.type in FLOATS:
        return f"{c.differing} of {c.blocks} weights are not the checkpoint's, off by up to {c.max:.3g}"
    if c.relative <= c.allowed:
        return f"its weights are {c.gain:.2f} times what {c.type} makes of the checkpoint's"
    return f"error {c.relative:.1%} of the checkpoint's weights, expected at most {c.allowed:.1%}"


# --- what a wrong tensor is ---


def _explained(survey: Survey, matcher: Matcher, sources: Mapping[str, Source], wrong: Comparison, search: bool) -> str:
    """Another tensor of the source, the same one turned or in another order, where that fits."""
    stored = survey.file.tensors[wrong.name]
    if len(stored.shape) > 2:
        return ""
    width = stored.shape[-1]
    rows = np.unique(np.linspace(0, max(1, stored.n_elements // width) - 1, SAMPLE).astype(int))
    here = np.stack([_row(survey.file, stored, int(row)) for row in rows])
    own = sources[wrong.name]
    limit = max(wrong.allowed, 1e-3)
    for match in matcher.matches.values():
        other = _source(survey, match, own.head_dim)
        name = match.header.name
        if match.header.shape == stored.shape and name != own.header.name and _near(here, _at(other, rows), limit):
            return f"; it holds what the checkpoint calls {name}"
    if own.header.shape[0] > 1 and len(stored.shape) == 1:
        return _shifted(here[0], own.weights(0, own.header.rows).reshape(-1))
    if not search:
        return ""
    if stored.shape == stored.shape[::-1] and _near(here, _columns(own, rows), limit):
        return "; it is the checkpoint's, transposed"
    order = _order(own, here)
    if order is not None and not np.array_equal(order, rows):
        moved = next(i for i in range(len(rows)) if order[i] != rows[i])
        return f"; its rows are in another order: row {rows[moved]} is the checkpoint's row {order[moved]}"
    return ""


def _row(file: GGUFFile, stored: StoredTensor, row: int) -> F32Array:
    kind = decoder(stored.type)
    assert kind is not None, stored.type
    data = file.tensor_bytes(stored.name, row * stored.row_bytes, (row + 1) * stored.row_bytes)
    return kind.decode(data.view(kind.layout)).reshape(-1)


def _near(here: F32Array, there: F32Array, limit: float) -> bool:
    size = float(np.square(there).sum())
    return size > 0 and float(np.square(here - there).sum()) <= limit**2 * size * 1.2


def _at(source: Source, rows: np.ndarray[Any, Any]) -> F32Array:
    """Some rows of a source's tensor, (n, row) f32."""
    if len(source.header.shape) == 1:
        return source.weights(0, source.header.rows)
    step = source.head_dim if source.op.by_head else 1
    return np.concatenate([source.weights(r // step * step, r // step * step + step)[r % step][None] for r in rows])


def _columns(source: Source, columns: np.ndarray[Any, Any]) -> F32Array:
    return np.concatenate([source.weights(a, b)[:, columns] for a, b in source.ranges()]).T


def _order(source: Source, here: F32Array) -> np.ndarray[Any, Any] | None:
    """The source's row that each of these rows is, or None if one is none of them."""
    best, found = np.full(len(here), -1.0), np.zeros(len(here), int)
    unit = here / np.maximum(np.linalg.norm(here, axis=1, keepdims=True), 1e-30)
    for start, stop in source.ranges():
        rows = source.weights(start, stop)
        cosines = unit @ (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)).T
        index = cosines.argmax(axis=1)
        value = cosines[np.arange(len(here)), index]
        found = np.where(value > best, index + start, found)
        best = np.maximum(value, best)
    return found if (best > CLOSE).all() else None


def _shifted(here: F32Array, there: F32Array) -> str:
    """A vector that differs by a constant: norms are published around 0 by some and around 1 by others (P-42)."""
    difference = here - there
    step = float(difference.mean())
    if abs(step) > 1e-3 and float(np.abs(difference - step).max()) < 1e-3 * abs(step) + 1e-6:
        return f"; it is the checkpoint's {'plus' if step > 0 else 'minus'} {abs(step):g}"
    if np.allclose(np.sort(here), np.sort(there)):
        return "; it is the checkpoint's in another order"
    return ""
