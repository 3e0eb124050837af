"""From rules, spec and headers to a Plan: which tensor goes where, in which type, or every problem at once.

A plan is made from headers alone. No tensor data is read, so a dry run costs nothing and nothing is written before
everything is known to fit.
"""

from __future__ import annotations

import glob
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from convert_drafter.converters.checkpoint import TensorHeader
from convert_drafter.converters.dimensions import DIMENSIONS
from convert_drafter.converters.errors import Problems
from convert_drafter.converters.ops import COPY, Op, then
from convert_drafter.converters.recipe_rules import Facts
from convert_drafter.converters.recipes import Choice, Recipe
from convert_drafter.converters.roles import Role, TensorKey, describe, role_name
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.type_choice import Candidate, TypeOptions, choose_types
from convert_drafter.quant import I64, TYPES

ONLY_LAYER = "midlayer."  # SafeAILab's name of EAGLE-3's layer
READABLE_DTYPES, ID_DTYPES = ("F32", "F16", "BF16"), ("I64", "I32")


@dataclass(frozen=True)
class TensorRule:
    """A checkpoint tensor's place in the hub; `{i}` in `source` is the layer and the name is matched whole.

    `{j}` is the layer counted from the drafter's first; a source without either is the first layer's.

    An optional tensor may be `required_with` another role: where that one is there, this one has to be. One that is
    `needed_for` a fact is optional without it, one `of` a fact is there exactly where that is true.
    """

    source: str
    role: Role
    shape: tuple[str, ...]
    op: Op = COPY
    optional: bool = False
    required_with: Role | None = None
    needed_for: str | None = None
    of: str | None = None

    def exists(self, spec: DrafterSpec) -> bool:
        return self.of is None or bool(getattr(spec, self.of))

    def needed(self, spec: DrafterSpec) -> bool:
        return not self.optional if self.needed_for is None else getattr(spec, self.needed_for) is not None

    def expected_shape(self, spec: DrafterSpec, layer: int | None = None) -> tuple[int, ...]:
        return tuple(DIMENSIONS[name](spec.of_layer(layer)) for name in self.shape)

    def keys(self, spec: DrafterSpec) -> Iterator[TensorKey]:
        """The tensors of this rule: one for each layer, or the one that the drafter has once."""
        if not self.role.per_layer:
            return iter([(self.role, None)])
        layers = spec.layers if "{" in self.source else spec.layers[:1]
        return ((self.role, layer) for layer in layers)

    def source_name(self, key: TensorKey, spec: DrafterSpec) -> str:
        _, layer = key
        return self.source if layer is None else self.source.format(i=layer, j=layer - spec.first_layer)

    def key_of(self, number: str | None, spec: DrafterSpec) -> TensorKey:
        """The place of a tensor with this number in its name."""
        if not self.role.per_layer:
            return self.role, None
        counted_here = number is None or "{j}" in self.source
        return self.role, int(number or 0) + (spec.first_layer if counted_here else 0)


@dataclass(frozen=True)
class Dropped:
    """A checkpoint tensor that is left out on purpose."""

    source: str
    reason: str


@dataclass(frozen=True)
class Match:
    """A source tensor that found its place."""

    key: TensorKey
    header: TensorHeader
    rule: TensorRule


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: where it comes from, its name, shape in torch order and type."""

    key: TensorKey
    header: TensorHeader
    op: Op
    name: str
    shape: tuple[int, ...]
    choice: Choice

    @property
    def n_bytes(self) -> int:
        return self.choice.type.n_bytes(self.shape)


@dataclass(frozen=True)
class Plan:
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[Dropped, ...]

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors)


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{[ij]\\}", r"(\\d{1,9})", re.escape(source)))


def leave_out(name: str) -> str:
    """The option that leaves out just this tensor, to be pasted into a shell."""
    return f"--ignore-tensor {shlex.quote(glob.escape(name))}"


def plain_name(name: str) -> str:
    """The name that rules are written in, whatever an export puts the drafter or its target's text model under."""
    name = name.removeprefix("model.").removeprefix("language_model.").removeprefix("backbone.")
    return f"layers.0.{name.removeprefix(ONLY_LAYER)}" if name.startswith(ONLY_LAYER) else name


class Matcher:
    """Gives every source tensor its place, and collects what does not fit."""

    def __init__(self, spec: DrafterSpec, rules: Sequence[TensorRule], dropped: Sequence[Dropped]) -> None:
        self.spec, self.rules = spec, [rule for rule in rules if rule.exists(spec)]
        self._rules = [(_pattern(rule.source), rule) for rule in self.rules]
        self._dropped = [(_pattern(drop.source), drop) for drop in dropped]
        self.matches: dict[TensorKey, Match] = {}
        self.dropped: list[Dropped] = []
        self.problems: list[str] = []

    def place(self, name: str, header: TensorHeader) -> None:
        for pattern, drop in self._dropped:
            if pattern.fullmatch(plain_name(name)):
                self.dropped.append(Dropped(name, drop.reason))
                return
        for pattern, rule in self._rules:
            if found := pattern.fullmatch(plain_name(name)):
                number = found[1] if found.groups() else None
                self._use(name, Match(rule.key_of(number, self.spec), header, rule))
                return
        self.problems.append(f"{name}: unknown tensor {list(header.shape)}; leave it out with {leave_out(name)}")

    def _use(self, name: str, match: Match) -> None:
        key, shape = match.key, match.rule.expected_shape(self.spec, match.key[1])
        if key in self.matches:
            self.problems.append(f"{name}: {describe(key)} is there twice, also as {self.matches[key].header.name}")
        elif key[1] is not None and key[1] not in self.spec.layers:
            self.problems.append(f"{name}: layer {key[1]}, but the config counts {self.spec.layer_count} layers")
        elif match.header.shape != shape:
            widths = ", ".join(match.rule.shape)
            self.problems.append(f"{name}: found shape {list(match.header.shape)}, expected {list(shape)} ({widths})")
        elif match.rule.op.ids and match.header.dtype not in ID_DTYPES:
            self.problems.append(f"{name}: dtype {match.header.dtype}, expected token ids in {' or '.join(ID_DTYPES)}")
        elif not match.rule.op.ids and match.header.dtype not in READABLE_DTYPES:
            kinds = ", ".join(READABLE_DTYPES)
            self.problems.append(
                f"{name}: dtype {match.header.dtype}, expected one of {kinds}; no quantization_config says how to"
                " read it, use the unquantized release"
            )
        self.matches.setdefault(key, match)

    def check_complete(self) -> None:
        present = {role for role, _ in self.matches}
        needed = [rule for rule in self.rules if rule.needed(self.spec) or rule.required_with in present]
        required = {rule.role: rule for rule in reversed(needed)}  # by its first spelling
        for rule in reversed(required.values()):
            for key in rule.keys(self.spec):
                if key not in self.matches:
                    self.problems.append(f"{rule.source_name(key, self.spec)}: missing ({describe(key)})")


def match_tensors(
    spec: DrafterSpec,
    rules: Sequence[TensorRule],
    dropped: Sequence[Dropped],
    headers: Mapping[str, TensorHeader],
    ignore: Sequence[str] = (),
) -> Matcher:
    """Place every tensor of `headers`; `ignore` are the user's glob patterns of tensors to leave out."""
    matcher = Matcher(spec, rules, dropped)
    for mask in ignore:
        if not any(fnmatchcase(name, mask) for name in headers):
            matcher.problems.append(f"--ignore-tensor '{mask}': matches no tensor of the checkpoint")
    for name, header in headers.items():
        pattern = next((p for p in ignore if fnmatchcase(name, p)), None)
        if pattern is not None:
            matcher.dropped.append(Dropped(name, f"--ignore-tensor '{pattern}'"))
        else:
            matcher.place(name, header)
    matcher.check_complete()
    return matcher


def plan_tensors(
    matcher: Matcher,
    recipe: Recipe,
    names: Callable[[TensorKey], str | None],
    runtime: str,
    needs: Mapping[Role, Role] | None = None,
    options: TypeOptions | None = None,
    transforms: Mapping[Role, Op] | None = None,
) -> Plan:
    """Name and type every matched tensor, in the order of the rules, layer by layer.

    `names` gives the runtime's name of a role, None where it has none: that is a problem, never a silent loss. `needs`
    are the roles the runtime takes only together with another one, `transforms` what it wants done to some tensors.
    What is wrong is added to the matcher's problems.
    """
    order = {rule.role: n for n, rule in enumerate(matcher.rules)}
    keys = sorted(matcher.matches, key=lambda key: (-1 if key[1] is None else key[1], order[key[0]]))
    named = {key: name for key in keys if (name := names(key)) is not None}
    sources = {key: matcher.matches[key].header.name for key in keys}
    matcher.problems += unplaced(sources, names, runtime, needs or {})
    matches = [matcher.matches[key] for key in named]
    choices = _choose(recipe, matches, matcher, options)
    ops = transforms or {}
    planned = (
        PlannedTensor(m.key, m.header, then(m.rule.op, ops.get(m.key[0], COPY)), named[m.key], m.header.shape, choice)
        for m, choice in zip(matches, choices, strict=True)
    )
    return Plan(tuple(planned), tuple(matcher.dropped))


def unplaced(
    sources: Mapping[TensorKey, str],
    names: Callable[[TensorKey], str | None],
    runtime: str,
    needs: Mapping[Role, Role],
) -> Iterator[str]:
    """Tensors, by what their source calls them, that a runtime takes only with others or has no name for."""
    present = {role for role, _ in sources}
    for role, other in needs.items():
        if role in present and other not in present:
            yield f"{role.name}: {runtime} takes it only with {other.name}, which is missing"
    for key, source in sources.items():
        if names(key) is None:
            lost = "without it the drafter computes something else"
            yield f"{source}: {runtime} has no tensor for {describe(key)}; {lost}"


def type_facts(spec: DrafterSpec) -> Facts:
    """What types depend on beside the tensors, as llama-quantize reads it of the file."""
    mixture = spec.experts if spec.trunk is None else spec.experts or spec.trunk.experts
    # a head's kind has the name of its target's architecture
    kind = spec.kind.removeprefix("mtp-")
    return Facts(kind, spec.layers.stop, 0 if mixture is None else mixture.count, *_heads(spec))


def _heads(spec: DrafterSpec) -> tuple[int, int]:
    """Heads and their keys as llama-quantize counts them: the first layer's, which may be the target's."""
    trunk = spec.trunk
    heads = trunk.head_counts[0] if trunk and trunk.head_counts else spec.head_count
    return heads, trunk.kv_head_counts[0] if trunk and trunk.kv_head_counts else spec.kv_head_count


def _choose(
    recipe: Recipe, matches: Sequence[Match], matcher: Matcher, options: TypeOptions | None
) -> Sequence[Choice]:
    """Types by llama.cpp's names, whatever the runtime calls the tensors: one drafter, one mixture."""
    weights = [match for match in matches if not match.rule.op.ids]
    candidates = [
        # what no recipe quantizes is F32, as llama.cpp's own converter writes it (conversion/base.py)
        Candidate(role_name(match.key), match.header.shape, TYPES["F32"])
        for match in weights
    ]
    try:
        chosen = iter(choose_types(recipe, candidates, type_facts(matcher.spec), options))
        return [Choice(I64, "token ids: I64") if match.rule.op.ids else next(chosen) for match in matches]
    except Problems as found:
        matcher.problems += found.problems
        return [Choice(TYPES["F32"])] * len(matches)  # nobody converts what has problems
