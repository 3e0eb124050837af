"""What is done, in the options of the server that is installed: no option twice, and no minimum above its maximum.

An option is named by its purpose; `probe.FLAGS` has the spellings. Options that only make sense together are a group,
which is emitted whole or not at all (T-26: half of one left a minimum of 48 beside a maximum of 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convert_drafter.converters.launch.modes import NGRAM
from convert_drafter.converters.launch.resolve import Ngram, Request, Resolved, spec_type
from convert_drafter.converters.verify.in_llama_cpp.probe import FLAGS, Abilities

SHORT = {"--model": "-m", "--spec-draft-model": "-md", "--model-draft": "-md"}  # as everybody writes them
P_MIN = "0.0"  # spelled, because its default differs between versions and changes what is drafted (T-58)
Group = tuple[tuple[str, str], ...]  # (purpose, value)


@dataclass
class Line:
    """A command line in the making; `taken` are the options it has, in every spelling, `own` those the user gave."""

    abilities: Abilities
    taken: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)
    own: set[str] = field(default_factory=set)
    overridden: list[str] = field(default_factory=list)  # purposes that the user's own options are for

    def take(self, extra: Sequence[str]) -> None:
        """Options that the user gives: they win, so ours of the same name are left out."""
        for word in extra:
            if word.startswith("-"):
                self.own |= self.spellings(word.split("=")[0])
        self.taken |= self.own

    def spellings(self, flag: str) -> frozenset[str]:
        """As the server's help has them; without a help those that are known."""
        known = next((names for names in FLAGS.values() if flag in names or SHORT.get(names[0]) == flag), ())
        return self.abilities.aliases(flag) | {flag, *known, *(SHORT[name] for name in known if name in SHORT)}

    def add(self, *group: tuple[str, str]) -> bool:
        """All of the group, or nothing where the server lacks one of its options or one is there already."""
        flags = [self.abilities.flag(purpose) for purpose, _ in group]
        if any(flag is None or flag in self.taken for flag in flags):
            self.overridden += [purpose for flag, (purpose, _) in zip(flags, group, strict=True) if flag in self.own]
            return False
        for flag, (_, value) in zip(flags, group, strict=True):
            assert flag is not None
            self.taken |= self.spellings(flag)
            self.words += [self._short(flag), value]
        return True

    def switch(self, purpose: str) -> None:
        """An option without a value."""
        if (flag := self.abilities.flag(purpose)) is not None and flag not in self.taken:
            self.taken |= self.spellings(flag)
            self.words.append(flag)

    def _short(self, flag: str) -> str:
        short = SHORT.get(flag, flag)
        return short if self.abilities.problem is not None or short in self.abilities.flags else flag


def command(target: str, drafter: Path | None, request: Request, resolved: Resolved, abilities: Abilities) -> Line:
    """The options to run the server with: target, drafter, drafting; the user's own are to follow."""
    line = Line(abilities)
    line.take(request.extra)
    line.add(("model", target))
    if drafter is not None:
        line.add(("drafter", str(drafter)))
    for group in drafting(request, resolved, abilities):
        line.add(*group)
    if resolved.default:
        line.switch("default drafting")
    return line


def drafting(request: Request, resolved: Resolved, abilities: Abilities) -> Iterator[Group]:
    """Groups of options in the order they are tried: the drafter's before those an n-gram way would share with it."""
    if not resolved.ways:
        return
    yield (("spec type", spec_type(resolved.ways, abilities)),)
    if resolved.drafter is not None:
        yield (("draft length", str(resolved.draft_length)),)
        yield (("p_min", P_MIN),)
    if NGRAM in resolved.ways:
        yield from ngram_groups(request.ngram)


def ngram_groups(ngram: Ngram) -> tuple[Group, ...]:
    """A3-10 .. A3-13. A legacy server has one pair of limits, which is the drafter's where there is one (A3-12)."""
    limits = (("ngram shortest", str(ngram.shortest)), ("ngram longest", str(ngram.longest)))
    return ((("ngram match", str(ngram.match)),), limits)
