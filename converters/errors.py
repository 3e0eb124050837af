"""Everything that can be wrong, as one small family of exceptions.

DrafterError
├── WrongUsage      exit 2: the command asks for something that is not offered
├── WrongInput      exit 3: a file, key or tensor is not what it has to be
│   ├── BadFact     a fact of the model contradicts another one
│   └── Problems    several of them, shown together
├── MissingEngine   exit 4: an engine or an optional package is not installed
└── EngineFailure   exit 1 or 3: an engine stopped, by what the file made it do or without it (verify)
"""

from __future__ import annotations

from collections.abc import Iterable


class DrafterError(Exception):
    """Base of every error a user may see; `exit_code` is the command's exit status."""

    exit_code = 3


class WrongUsage(DrafterError):
    exit_code = 2


class WrongInput(DrafterError):
    exit_code = 3


class MissingEngine(DrafterError):
    exit_code = 4


class BadFact(WrongInput):
    """A field of the spec holds a value it cannot have."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(f"{field}: found {found!r}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected


class Problems(WrongInput):
    """Every problem of one input at once, so that a user mends them in one go."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.where, self.problems = where, tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{where}: {count} problem{'s' if count != 1 else ''}{lines}")


def plain(text: str) -> str:
    """Text from a file without its control characters: they would reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
